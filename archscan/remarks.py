"""What a report says of the weights and the images of a slimming: what was opened and read → tables and sentences."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from archscan.data import ImageSet
from archscan.findings import Finding
from archscan.options import SlimOptions
from archscan.report import model as numbers
from archscan.slimming import reads_images
from archscan.sources import WeightsInfo
from archscan.wording import enumerated


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one slimming.

    Attributes:
        calibration: What to score and to repair on; None where nothing looks at images.
        evaluation: What to measure accuracy on; None where it is not asked for.
        labels_fit: Whether the calibration labels are classes of the model.
    """

    calibration: ImageSet | None
    evaluation: ImageSet | None
    labels_fit: bool


def weights_of(info: WeightsInfo) -> numbers.Weights:
    """Say where the weights come from."""
    return numbers.Weights(info.kind, info.origin, info.reason)


def data_of(images: Images) -> numbers.Data | None:
    """Say what the network was scored on; None for nothing."""
    found = images.calibration
    if found is None:
        return None
    labels = "dataset" if images.labels_fit else "model"
    return numbers.Data(found.kind, len(found), len(found.classes), labels, found.skipped)


def warnings_of(weights: WeightsInfo, images: Images) -> Iterator[str]:
    """Give what makes the scores say little, a sentence each."""
    if weights.kind == "random":
        yield f"{numbers.RANDOM_WEIGHTS}, so the scores reflect initialisation, not training ({weights.reason})."
    elif weights.kind == "pretrained" and weights.reason:
        yield f"{weights.reason[0].upper()}{weights.reason[1:]}; train it before the scores mean much."
    if images.calibration is not None and images.calibration.is_synthetic:
        yield f"{numbers.NOISE}, so the scores say little about real images; pass --data."


def qualified(findings: Sequence[Finding], weights: WeightsInfo) -> tuple[Finding, ...]:
    """Say of findings that were estimated with random weights that they were: they describe the initialisation."""
    if weights.kind != "random":
        return tuple(findings)
    return tuple(
        item
        if item.confidence is None
        else replace(item, measured_on=enumerated([*filter(None, [item.measured_on]), "random weights"]))
        for item in findings
    )


def notes_of(options: SlimOptions, images: Images, criterion: str) -> Iterator[str]:
    """Give what a user has to know of the images, a sentence each."""
    calibration = images.calibration
    if calibration is not None and not images.labels_fit and reads_images(criterion):
        count = len(calibration.classes)
        own = f"the {count} class{'es' * (count > 1)} of the data {'are' if count > 1 else 'is'} not the model's"
        why = "noise has none" if calibration.is_synthetic else own
        yield f"Labels were drawn from the model's own predictions (the true Fisher), since {why}."
    for what, found in (("calibration", calibration), ("evaluation", images.evaluation)):
        if found is not None and found.skipped:
            names = ", ".join(found.skipped[:3]) + (f" and {len(found.skipped) - 3} more" * (len(found.skipped) > 3))
            several = "s could not be read and were" if len(found.skipped) > 1 else " could not be read and was"
            yield f"{len(found.skipped)} {what} image{several} skipped: {names}."
    wanted = options.data.samples
    if calibration is not None and wanted is not None and len(calibration) < wanted:
        yield f"There were only {len(calibration)} of the {wanted} calibration images asked for."
