"""``archscan finetune DIR --data DATA``: train a saved result, taught by its dense original."""

import argparse
import sys

from archscan.arguments import (
    Parser,
    add_output,
    add_printing,
    add_run,
    add_saved,
    add_seed,
    parse_count,
    parse_number,
    parse_whole,
    read_printing,
    read_run,
)
from archscan.commands.export import add_export
from archscan.commands.printing import print_report, progress_for
from archscan.options import OutputOptions


def parse_share(text: str) -> float:
    """Read a number from 0 to 1."""
    number = parse_number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def parse_from_zero(text: str) -> float:
    """Read a number from 0 on."""
    number = parse_number(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of ``archscan finetune DIR --data DATA``."""
    parser = Parser(
        prog="archscan finetune",
        allow_abbrev=False,
        description="Train a saved network, taught by its dense original, and save it as another result. Starts on "
        "several GPUs with: torchrun --nproc-per-node N -m archscan finetune DIR …",
    )
    add_saved(parser)
    parser.add_argument("--data", required=True, metavar="DATA", help="images to learn from: a DIR, a ZIP, or digits")
    parser.add_argument("--eval-data", metavar="DATA", help="images to measure accuracy on, after every epoch")
    parser.add_argument("--samples", type=parse_count, metavar="N", help="learn from at most so many (default: all)")
    _add_training(parser)
    _add_teacher(parser)
    group = add_run(parser)
    group.add_argument("--amp", action="store_true", help="compute in half precision where that is safe")
    workers = "processes that prepare images (default: as many as help)"
    group.add_argument("--workers", type=parse_whole, metavar="N", help=workers)
    add_seed(group)
    group.add_argument("--resume", action="store_true", help="go on with the unfinished run of the same output")
    folder = "of the result (default: DIR-finetuned)"
    output = add_output(parser, folder, "replace an existing folder, or an unfinished run")
    add_printing(output)
    add_export(output)
    return parser


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training (defaults follow the size of the data)")
    group.add_argument("--epochs", type=parse_count, metavar="N", help="passes over the images")
    group.add_argument("--lr", type=parse_from_zero, metavar="X", help="peak of the learning rate")
    group.add_argument("--batch-size", type=parse_count, metavar="N", help="images per step, over all processes")
    group.add_argument("--opt", metavar="NAME", help="an optimizer of timm: sgd, adamw, lamb …")
    group.add_argument("--weight-decay", type=parse_from_zero, metavar="X", help="of weights, not of biases")
    group.add_argument("--smoothing", type=parse_share, default=0.0, metavar="X", help="of labels (default: 0)")
    group.add_argument("--mixup", type=parse_from_zero, default=0.0, metavar="A", help="Beta(A, A) (default: 0, off)")
    group.add_argument("--cutmix", type=parse_from_zero, default=0.0, metavar="A", help="likewise (default: 0, off)")
    flips = "probability of a horizontal flip (default: 0.5; 0 on digits)"
    group.add_argument("--hflip", type=parse_share, metavar="P", help=flips)
    group.add_argument("--ema", action="store_true", help="save the moving average of the weights")


def _add_teacher(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("teacher")
    who = "dense (the default where its weights are at hand), none, a FILE of weights for it, or a saved DIR"
    group.add_argument("--teacher", metavar="WHO", help=who)
    share = "share of the teacher in the loss (default: %(default)s)"
    group.add_argument("--distill-weight", type=parse_share, default=0.9, metavar="W", help=share)
    softens = "softens the scores of both (default: %(default)g)"
    group.add_argument("--temperature", type=parse_from_zero, default=4.0, metavar="T", help=softens)


def run(parsed: argparse.Namespace, command_line: str) -> None:
    """Train, save, and print the report; under ``torchrun`` the first process prints."""
    from archscan.commands.training_view import watching
    from archscan.errors import is_first
    from archscan.opening import use_machine
    from archscan.training import Request, TrainSettings, finetune_folder

    output = read_printing(parsed) if is_first() else OutputOptions(quiet=True)
    settings = TrainSettings(
        epochs=parsed.epochs,
        lr=parsed.lr,
        batch_size=parsed.batch_size,
        samples=parsed.samples,
        optimizer=parsed.opt,
        weight_decay=parsed.weight_decay,
        smoothing=parsed.smoothing,
        mixup=parsed.mixup,
        cutmix=parsed.cutmix,
        hflip=parsed.hflip,
        distill_weight=parsed.distill_weight,
        temperature=parsed.temperature,
        ema=parsed.ema,
        amp=parsed.amp,
        workers=parsed.workers,
        seed=parsed.seed,
    )
    request = Request(
        folder=parsed.folder,
        data=parsed.data,
        eval_data=parsed.eval_data,
        output=parsed.output,
        teacher=parsed.teacher,
        settings=settings,
        resume=parsed.resume,
        overwrite=parsed.overwrite,
        device=use_machine(read_run(parsed)),
        exports=parsed.export,
        command_line=command_line,
    )
    with watching(sys.stderr, hidden=output.quiet) as watch:
        saved, _ = finetune_folder(request, progress_for(output), watch)
    if is_first():
        print_report(saved.report, output, saved.folder)
