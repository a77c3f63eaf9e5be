"""Learn from labels and from a teacher: logits of both, targets → loss; and where the teacher comes from.

L = (1 - w) CE(student, target) + w T^2 KL(softmax(teacher / T) || softmax(student / T)), after Hinton et al. (2015,
section 2). The defaults w = 0.9 and T = 4 are those of Tian et al. (2020, "Contrastive representation distillation",
section 4) for this loss.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from archscan.errors import BadInput
from archscan.recipes import Recipe
from archscan.saved import is_saved, open_original, open_saved
from archscan.sources import Subject, open_subject


@dataclass(frozen=True, eq=False)
class Teacher:
    """Who teaches.

    Attributes:
        model: The network; None where there is no teacher.
        name: What it is, or why there is none.
    """

    model: nn.Module | None
    name: str


def distillation_loss(
    student_BK: Tensor, target: Tensor, teacher_BK: Tensor | None, weight: float, temperature: float, smoothing: float
) -> Tensor:
    """Compute the loss of a batch: a scalar, the mean over samples.

    Args:
        student_BK: Logits of the network that learns.
        target: Class numbers of shape [B], or probabilities of shape [B, K].
        teacher_BK: Logits of the teacher; None for the labels alone.
        weight: Share of the teacher, w.
        temperature: T.
        smoothing: Of class numbers; probabilities are taken as they are.
    """
    student_BK = student_BK.float()
    hard = F.cross_entropy(student_BK, target, label_smoothing=0.0 if target.is_floating_point() else smoothing)
    if teacher_BK is None:
        return hard
    log_student = F.log_softmax(student_BK / temperature, 1)
    log_teacher = F.log_softmax(teacher_BK.float() / temperature, 1)
    soft = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
    return (1 - weight) * hard + weight * temperature**2 * soft


def open_teacher(folder: Path, recipe: Recipe | None, subject: Subject, wanted: str | None) -> Teacher:
    """Open the teacher of a saved network.

    Args:
        folder: Of the saved network.
        recipe: Of its architecture before it was slimmed.
        subject: The saved network.
        wanted: ``dense`` for the original with the weights that it was slimmed with, ``none``, a file of weights for
            the original, or a saved folder; None for ``dense`` where it is at hand.

    Raises:
        BadInput: It is not at hand, or its classes are not the network's.
    """
    if wanted == "none":
        return Teacher(None, "none")
    if wanted in (None, "dense"):
        try:
            return Teacher(open_original(folder), "the dense original")
        except BadInput as error:
            if wanted == "dense":
                raise BadInput(f"the dense original cannot teach: {error}; pass --teacher none or FILE") from error
            return Teacher(None, f"none, since the dense original is not at hand ({error})")
    assert wanted is not None
    if is_saved(wanted):
        other = open_saved(Path(wanted))
        if other.num_classes != subject.num_classes:
            raise BadInput(f"{wanted} has {other.num_classes} classes and {folder} {subject.num_classes}")
        return Teacher(other.model, wanted)
    if recipe is None or recipe.source == "file":
        raise BadInput(f"the original of {folder} is code of its own; pass --teacher none, or a saved folder")
    size = subject.preprocessing.input_size
    name = f"{recipe.source}:{recipe.name}"
    dense = open_subject(name, weights=wanted, num_classes=subject.num_classes, input_size=size)
    return Teacher(dense.model, wanted)
