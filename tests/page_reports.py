"""Made-up reports that have everything that the page can show."""

import functools
import math
from dataclasses import replace

from archscan.findings import Finding, Saving
from archscan.report.details import Agreement, CurvePoint, GroupSaliency, LayerLink, SaliencyDetail
from archscan.report.model import Exported, Latency
from archscan.report.training import EpochRow, TrainingRun
from tests.test_report import densenet201, densenet_report, random_report, resnet50, resnet_report, scan_report

CRITERIA = ("sosp-h", "obd", "taylor-fo", "magnitude")
KINDS = ("capacity", "redundancy", "dead", "duplicate", "cost", "width", "capacity", "redundancy")


def with_everything(report, network):
    """Add links, saliencies, findings, latency, and what modules take in bytes and time."""
    return replace(
        report,
        links=links(network, report),
        saliency=saliency(report) if report.after else None,
        findings=tuple(finding(report, place, kind) for place, kind in enumerate(KINDS)) if report.after else (),
        history=trainings() if report.after else (),
        exports=exports() if report.after else (),
        latency=Latency(41.2, 1.1, 29.8, 0.9, 0.72, 0.70, 0.75, 30, 1, 2, "contiguous", "cpu")
        if report.after
        else None,
        modules=tuple(
            replace(
                row, activation_bytes=4 * row.macs // 1000, time_ms=row.macs / 1e8, macs_per_byte=9.0, bound="memory"
            )
            for row in report.modules
        ),
    )


def trainings():
    """Two rounds of a slimming, and a fine-tuning after them."""
    return (training(2, 0.71, 1), training(2, 0.69, 2), training(3, 0.74))


def training(epochs, before, round_=None):
    rows = (
        EpochRow(place, 0.01 / place, 2 / place, 0.6, before + place / 100, 900.0, 61.5)
        for place in range(1, epochs + 1)
    )
    teacher = "the dense original"
    return TrainingRun(5000, 64, "sgd", 0.01, 5e-4, teacher, 1, False, False, 0, before, tuple(rows), "", round_, 0.6)


def exports():
    onnx = Exported(
        "onnx", "model.onnx", 61_234_567, 15_300_000, None, 3.1e-6, 1e-7, 20, "onnxruntime 1.31 at batch 1 and 3"
    )
    return onnx, Exported("script", "model.ts.pt", 61_500_000, 15_300_000, 1, 0.0, 0.0, None, "torch 2.13 at batch 1")


def links(network, report):
    number = {group.name: place for place, group in enumerate(report.groups)}
    reads, writes = {}, {}
    for path, source, target, *_ in network()[0]:
        reads.setdefault(path, {}).update({number[source]: None} if source in number else {})
        writes.setdefault(path, {})[number[target]] = None
    return tuple(LayerLink(path, tuple(reads[path]), tuple(writes[path])) for path in writes)


def saliency(report):
    spread = [
        GroupSaliency(
            group.name,
            tuple(10 ** (math.sin(place) - 5 + step / 2) for step in range(5)),
            None if group.frozen else 1e-9 * (1 + place % 7),
        )
        for place, group in enumerate(report.groups)
    ]
    curve = tuple(CurvePoint(1 - step / 20, 0.05 * (step / 10) ** 3) for step in range(20))
    uniform = tuple(CurvePoint(1 - step / 10, 0.08 * (step / 5) ** 2) for step in range(10))
    rows = tuple(tuple(1.0 if a == b else round(0.9 - 0.25 * abs(a - b), 2) for b in range(4)) for a in range(4))
    return SaliencyDetail(tuple(spread), curve, uniform, Agreement(CRITERIA, rows))


def finding(report, place, kind):
    free = [group for group in report.groups if not group.frozen]
    named = free[place * 3 % len(free)]
    return Finding(
        rank=place + 1,
        kind=kind,
        level="group",
        where=(named.name, *(["another"] if place % 2 else [])),
        seen=f"{named.name} kept {named.kept} of its {named.units} channels while the network kept 60.3% of its own.",
        why="Its channels are the hardest to spare, so that it limits accuracy.",
        remedy="Widen it, and pay for that with the groups that gave most.",
        option=f"archscan widen resnet50 --group {named.name}" if place % 2 == 0 else "",
        gain="about 0.4 points of accuracy" if place % 3 == 0 else "",
        confidence=None if kind in ("dead", "width") else 0.5 + place / 20,
        measured_on="512 images",
        saving=Saving(12_300_000, 4_100, lossless=kind == "dead") if kind in ("dead", "duplicate") else None,
    )


@functools.cache
def slim_report():
    return with_everything(resnet_report(), resnet50)


@functools.cache
def alarming_report():
    return with_everything(random_report(), resnet50)


@functools.cache
def dense_report():
    return with_everything(densenet_report(), densenet201)


@functools.cache
def scanned_report():
    return with_everything(scan_report(), resnet50)
