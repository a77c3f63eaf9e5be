"""One network of each block design goes through the coverage sweep: proven, priced, trained, saved.

A handful runs with all other tests; the whole slice, in two processes, with ``pytest -m coverage``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import archscan  # noqa: F401 - before anything that imports torchvision

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import coverage_networks  # noqa: E402

PROCESSES = 2
HANDFUL = ("timm:test_resnet", "timm:test_convnext", "timm:test_nfnet", "timm:test_coatnet", "timm:test_byobnet")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


def swept(networks, folder, processes):
    """Run the sweep on networks, in processes that take turns; return the records by network."""
    running = []
    for number in range(1, processes + 1):
        output = folder / str(number)
        options = ("--shard", f"{number}/{processes}", "--timeout", "300", "--output", str(output))
        command = [sys.executable, str(SCRIPTS / "coverage.py"), "--networks", *networks, *options]
        environment = {**os.environ, **ENVIRONMENT}
        running.append((subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL), output))
    records = {}
    for process, output in running:
        assert process.wait() == 0
        lines = (output / "coverage.jsonl").read_text(encoding="utf-8").splitlines()
        records |= {record["network"]: record for record in map(json.loads, lines)}
    return records


def see(record):
    causes = "; ".join(f"{problem['check']}: {problem['cause']}" for problem in record["problems"])
    assert not causes, f"{record['network']}: {causes}"
    assert record["everywhere"]["cut"] > 0
    assert record["plans"]["random"]["ratio"] <= record["plans"]["random"]["target"]


@pytest.fixture(scope="module")
def slice_records(request, tmp_path_factory):
    chosen = [item.callspec.params["network"] for item in request.session.items if "slice_records" in item.fixturenames]
    return swept(chosen, tmp_path_factory.mktemp("slice"), PROCESSES)


@pytest.fixture(scope="module")
def handful_records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("handful")
    records = swept(HANDFUL, folder, 1)
    return records, (folder / "1/coverage.md").read_text(encoding="utf-8")


@pytest.mark.coverage
@pytest.mark.parametrize("network", coverage_networks.SLICE)
def test_slice(network, slice_records):
    see(slice_records[network])


@pytest.mark.parametrize("network", HANDFUL)
def test_handful(network, handful_records):
    see(handful_records[0][network])


def test_the_page_tells_what_was_swept(handful_records):
    records, page = handful_records
    assert "| timm | 5 | " in page
    for name, record in records.items():
        assert f"| {name} | {record['params'] / 1e6:.1f} | 3x64x64 | float64 |" in page
    assert "Nothing." in page
    assert "| convit | 3 | timm:convit_base | a transformer" in page


def test_modules_take_turns_and_small_networks_come_first():
    names = ["timm:resnet18", "timm:resnet50", "timm:densenet121", "timm:resnet10t", "timm:densenet201"]
    ordered = coverage_networks.in_order(names, dict(zip(names, (12, 26, 8, 5, 20), strict=True)))
    assert ordered == ["timm:resnet10t", "timm:densenet121", "timm:resnet18", "timm:densenet201", "timm:resnet50"]


def test_a_failure_is_told_with_its_cause():
    record = {"network": "timm:x", "problems": [{"check": "price", "cause": "7 where the plan says 8"}]}
    with pytest.raises(AssertionError, match="timm:x: price: 7 where the plan says 8"):
        see(record)
