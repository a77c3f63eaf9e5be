"""The loop: network, images, teacher, settings → a trained network and what was measured on the way.

Optimizers, schedule, mixup, moving average and metrics are timm's. The decision that is not obvious: every epoch starts
from a seed of its own, and what the epochs hand on (weights, buffers, optimizer, moving average, measured rows) is all
in the checkpoint; so a run that is resumed gives, on one CPU thread, the same bits as one that was never killed.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from timm.data import Mixup
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, accuracy, distribute_bn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from archscan.capture import train_mode
from archscan.data import ImageSet
from archscan.errors import BadInput
from archscan.evaluation import top_one
from archscan.losses import logits_of
from archscan.processes import Place
from archscan.report.training import EpochRow, Moment, TrainingRun
from archscan.saving import distinct_tensors
from archscan.training.checkpoints import Checkpoint, copy_into, pack_optimizer, unpack_optimizer
from archscan.training.distillation import Teacher, distillation_loss
from archscan.training.images import Epochs, seeded_everywhere
from archscan.training.parts import Meters, amp_dtype, check_labels, make_optimizer, moved, parallel
from archscan.training.settings import Hyperparameters, TrainSettings, choose

_LEAST_LR_SHARE = 0.01
_EMA_DECAY = 0.9998
_SECONDS_BETWEEN_MOMENTS = 0.25
_STEPS_BETWEEN_CHECKS = 50


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained network.

    Attributes:
        model: The network, in eval mode, on the device where the one that was given is.
        history: What was measured.
    """

    model: nn.Module
    history: TrainingRun


@dataclass(frozen=True, eq=False)
class Job:
    """What to train, on what.

    Attributes:
        model: A classifier; it is left unchanged.
        images: To learn from.
        settings: How.
        teacher: To learn from besides.
        evaluation: Images for the accuracy after every epoch; None for no accuracy.
        place: Which process this is.
    """

    model: nn.Module
    images: Epochs
    settings: TrainSettings
    teacher: Teacher
    evaluation: ImageSet | None
    place: Place


def run(
    job: Job,
    *,
    resume_from: Checkpoint | None = None,
    save: Callable[[Checkpoint], None] = lambda _checkpoint: None,
    watch: Callable[[Moment], None] = lambda _moment: None,
) -> Trained:
    """Train; global random generators are left as they were.

    Args:
        job: What to train, on what.
        resume_from: Where an earlier run stopped.
        save: Called in the first process before the first epoch and after each.
        watch: Called in the first process some times a second, and after each epoch.

    Raises:
        BadInput: The optimizer is unknown, a label is no class of the network, the loss becomes infinite or NaN, or
            the checkpoint is of another run.
    """
    device = job.place.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        trainer = _Trainer(job, save, watch)
        if resume_from is not None:
            trainer.restore(resume_from)
        else:
            trainer.begin()
        for epoch in range(len(trainer.rows), trainer.hyper.epochs):
            trainer.train_epoch(epoch)
        return trainer.result()


def hyperparameters(job: Job) -> Hyperparameters:
    """Choose what the settings leave open."""
    images = job.images
    has_batchnorm = any(isinstance(module, _BatchNorm) for module in job.model.modules())
    return choose(job.settings, images.samples, images.batch_size, images.side_pixels, has_batchnorm=has_batchnorm)


class _Trainer:
    """The state of a run between two epochs."""

    def __init__(self, job: Job, save: Callable[[Checkpoint], None], watch: Callable[[Moment], None]) -> None:
        self.job, self.save, self.watch = job, save, watch
        self.hyper = hyperparameters(job)
        settings, self.place, self.device = job.settings, job.place, job.place.device
        torch.default_generator.manual_seed(settings.seed)
        self.layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        self.model = moved(copy.deepcopy(job.model), self.device, self.layout)
        self.teacher = None if job.teacher.model is None else copy.deepcopy(job.teacher.model).eval()
        if self.teacher is not None:
            moved(self.teacher, self.device, self.layout).requires_grad_(False)
        self.optimizer = make_optimizer(self.model, self.hyper)
        total = self.hyper.epochs * self.hyper.steps
        self.schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=max(total, 2),
            lr_min=_LEAST_LR_SHARE * self.hyper.lr,
            warmup_t=self.hyper.warmup_steps,
            warmup_lr_init=self.hyper.lr / (self.hyper.warmup_steps + 1),
            t_in_epochs=False,
        )
        self.amp_dtype = amp_dtype(self.device) if settings.amp else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype == torch.float16)
        self.ema = ModelEmaV3(self.model, _EMA_DECAY, use_warmup=True, warmup_power=0.75) if settings.ema else None
        self.parallel: nn.Module | None = None  # made when there is a batch to try
        self.rows: list[EpochRow] = []
        self.accuracy_before: float | None = None

    # --- state ------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Measure the network as it came, and save it, so that a run can be resumed from the very start."""
        self.accuracy_before = self._evaluate(self.model)
        self._save()

    def _save(self) -> None:
        if self.place.is_first:
            self.save(self.checkpoint())

    def checkpoint(self) -> Checkpoint:
        """Take down all that the epochs hand on."""
        tensors = {f"model.{name}": tensor for name, tensor in distinct_tensors(self.model).items()}
        if self.ema is not None:
            tensors |= {f"ema.{name}": tensor for name, tensor in distinct_tensors(self.ema.module).items()}
        moments, optimizer = pack_optimizer(self.optimizer)
        tensors |= {f"optimizer.{name}": tensor for name, tensor in moments.items()}
        state = {
            "fingerprint": self.fingerprint(),
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "history": [row.__dict__ for row in self.rows],
            "accuracy_before": self.accuracy_before,
        }
        return Checkpoint(tensors, state)

    def fingerprint(self) -> dict[str, Any]:
        """Say what must be the same for a run to be resumed."""
        settings = self.job.settings
        named = ("seed", "smoothing", "mixup", "cutmix", "hflip", "distill_weight", "temperature", "ema", "amp")
        return {
            "images": self.job.images.samples,
            **self.hyper.__dict__,
            **{name: getattr(settings, name) for name in named},
            "teacher": self.job.teacher.name,
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to where a checkpoint was written.

        Raises:
            BadInput: It is of another run.
        """
        mine, found = self.fingerprint(), checkpoint.state.get("fingerprint")
        found = found if isinstance(found, dict) else {}
        for name, value in mine.items():
            if found.get(name) != value:
                raise BadInput(
                    f"the unfinished run has {name} = {found.get(name)!r} and this one {value!r}; resume it with the "
                    "same options, or start again with --overwrite"
                )
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for name, tensor in checkpoint.tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        copy_into(self.model, parts["model"])
        if self.ema is not None:
            copy_into(self.ema.module, parts["ema"])
        unpack_optimizer(self.optimizer, parts["optimizer"], checkpoint.state.get("optimizer"))
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(checkpoint.state["scaler"])
        self.rows = [EpochRow(**row) for row in checkpoint.state["history"]]
        self.accuracy_before = checkpoint.state["accuracy_before"]

    def result(self) -> Trained:
        """Return the network, where and how the one that was given is."""
        model = self.model if self.ema is None else self.ema.module
        home = next((tensor.device for tensor in self.job.model.parameters()), torch.device("cpu"))
        settings, hyper = self.job.settings, self.hyper
        history = TrainingRun(
            self.job.images.samples,
            hyper.batch_size,
            hyper.optimizer,
            hyper.lr,
            hyper.weight_decay,
            self.job.teacher.name,
            self.place.count,
            settings.ema,
            settings.amp,
            settings.seed,
            self.accuracy_before,
            tuple(self.rows),
        )
        return Trained(moved(model, home, torch.contiguous_format).eval(), history)

    # --- epochs -----------------------------------------------------------------------------------------------------

    def train_epoch(self, epoch: int) -> None:
        """Train for one epoch, number from 0; evaluate and save."""
        start = time.perf_counter()
        with seeded_everywhere(self.job.settings.seed, epoch, self.place.rank):
            if self.device.type == "cuda":
                torch.cuda.manual_seed(torch.default_generator.initial_seed())
            meters = self._steps(epoch, start)
        trained = time.perf_counter() - start
        if self.place.count > 1:
            distribute_bn(self.model, self.place.count, reduce=True)
            if self.ema is not None:
                distribute_bn(self.ema.module, self.place.count, reduce=True)
        loss, correct = meters.totals(self.place)
        self._require_finite(loss, epoch)
        seen = self.hyper.steps * self.hyper.batch_size
        evaluated = self._evaluate(self.model if self.ema is None else self.ema.module)
        seconds = time.perf_counter() - start
        self.rows.append(
            EpochRow(epoch + 1, meters.lr, loss, None if self._mixes else correct, evaluated, seen / trained, seconds)
        )
        self._save()
        self._tell(epoch, self.hyper.steps, meters, start)

    @property
    def _mixes(self) -> bool:
        return bool(self.job.settings.mixup or self.job.settings.cutmix)

    def _steps(self, epoch: int, start: float) -> Meters:
        meters, told = Meters(), start
        self.model.train()
        mixup = None
        for step, (images, labels) in enumerate(islice(self.job.images.epoch(epoch), self.hyper.steps)):
            images = images.to(device=self.device, memory_format=self.layout, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            target = labels
            self.parallel = self.parallel or parallel(self.model, images, self.place)
            if self._mixes:
                mixup = mixup or self._mixup(images)
                with seeded_everywhere(self.job.settings.seed, epoch, step, self.place.rank):
                    images, target = mixup(images, labels)
            meters.lr = self.optimizer.param_groups[0]["lr"]
            self._step(images, labels, target, meters)
            self.schedule.step_update(epoch * self.hyper.steps + step + 1)
            if self.ema is not None:
                self.ema.update(self.model, step=epoch * self.hyper.steps + step + 1)
            if (step + 1) % _STEPS_BETWEEN_CHECKS == 0:
                self._require_finite(meters.totals(self.place)[0], epoch)  # in all processes, or in none
            if time.perf_counter() - told >= _SECONDS_BETWEEN_MOMENTS:
                told = time.perf_counter()
                self._tell(epoch, step + 1, meters, start)
        return meters

    def _step(self, images: Tensor, labels: Tensor, target: Tensor, meters: Meters) -> None:
        settings = self.job.settings
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            logits = logits_of((self.parallel or self.model)(images))
            taught = None
            if self.teacher is not None:
                with torch.no_grad():
                    taught = logits_of(self.teacher(images))
        if meters.loss.count == 0:
            check_labels(labels, logits, taught)
        loss = distillation_loss(
            logits, target, taught, settings.distill_weight, settings.temperature, settings.smoothing
        )
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        meters.loss.update(loss.detach(), len(labels))
        meters.correct.update(accuracy(logits.detach(), labels)[0] / 100, len(labels))

    def _mixup(self, images: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        settings = self.job.settings
        with torch.no_grad(), train_mode(self.model, False):
            classes = logits_of(self.model(images[:1])).shape[1]
        mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = Mixup(
            settings.mixup, settings.cutmix, label_smoothing=settings.smoothing, num_classes=classes
        )
        return mix

    def _evaluate(self, model: nn.Module) -> float | None:
        """Measure the accuracy on the evaluation images, of which every process takes its part."""
        images = self.job.evaluation
        if images is None:
            return None
        mine = islice(images.batches(), self.place.rank, None, self.place.count)
        has_any = self.place.rank * images.batch_size < len(images)
        correct = top_one(model, mine).correct if has_any else 0
        return float(self.place.sum(torch.tensor([float(correct)], device=self.device))) / len(images)

    def _require_finite(self, loss: float, epoch: int) -> None:
        if not math.isfinite(loss):
            raise BadInput(f"the loss is {loss} in epoch {epoch + 1}; pass a smaller --lr than {self.hyper.lr:g}")

    def _tell(self, epoch: int, step: int, meters: Meters, start: float) -> None:
        if not self.place.is_first:
            return
        hyper, elapsed = self.hyper, time.perf_counter() - start
        row = self.rows[epoch] if len(self.rows) > epoch else None
        left = (hyper.epochs - epoch) * hyper.steps - step
        self.watch(
            Moment(
                epoch=epoch + 1,
                epochs=hyper.epochs,
                step=step,
                steps=hyper.steps,
                loss=row.train_loss if row else float(meters.loss.avg),
                accuracy=None if self._mixes else float(meters.correct.avg),
                images_per_second=row.images_per_second if row else step * hyper.batch_size / elapsed,
                seconds_left=elapsed / step * left,
                rows=tuple(self.rows),
            )
        )
