"""Rules of the design that can be read off the sources."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "archscan"

FLOW = (
    *("errors", "wording", "torchvision_ops", "processes"),
    *("reference_nets", "recipes", "weights", "hubs", "sources", "data"),
    *("meta_shapes", "graph", "capture", "coupling", "sizes", "streams", "groups", "ties"),
    *("mac_table", "liveness", "costs", "latency"),
    *("losses", "weight_statistics", "layer_statistics", "sharpness", "probes", "sharding"),
    *("gate_statistics", "gates", "criteria"),
    *("budgets", "widths", "knapsack", "search", "set_effects", "planner", "tradeoff"),
    *("ranges", "dead_units", "activations", "findings"),
    *("surgery", "divergence", "spies", "follow", "rebuild", "settle", "rounds"),
    *("recover", "rehearsal", "lockstep", "blocks", "positions", "least_squares", "heldout", "repairs", "reconstruct"),
    *("same_statistics", "randomize", "verify", "fold", "recount", "recognise", "folders", "saving", "evaluation"),
    *("options", "report", "detailing", "module_costs", "results", "saved", "timm_entrypoint", "exporters", "training"),
    *("retraining", "replan", "pace", "stages", "diagnosis", "slimming"),
    *("audit", "remarks", "opening", "closing", "pipeline", "auditing", "widening", "lossless"),
    *("comparing", "sweeping"),
    *("arguments", "commands", "cli", "__main__"),
)
"""Files in the order in which data flow through them; each imports only from files before it."""


def stage(module):
    return module.split(".")[1] if module.count(".") else "__init__"


def imports(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "archscan":
            if node.module == "archscan":
                yield from (f"archscan.{alias.name}" for alias in node.names if alias.name != "__version__")
            else:
                yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "archscan")


SOURCES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_only_from_files_above(file):
    own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in FLOW, f"{own} has no place in the flow"
    for module in imports(file):
        other = stage(module)
        assert other == own or FLOW.index(other) < FLOW.index(own), f"{file.name} imports {module} from below"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_fits_one_sitting(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 420
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 60, f"{node.name} is longer than a screen"


def test_the_readme_has_the_commands_that_ci_runs():
    readme, script = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", ".ci/run"))
    for command in ("pip install -q -c constraints.txt -e '.[dev,bench]'", "python -m pytest"):
        assert command in script
        assert command.replace(" -q", "") in readme
    assert "archscan resnet50 --target-flops 0.6" in readme


def test_pins_fit_the_ranges():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    ranges = re.findall(r'^ +"([\w-]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert ranges
    lower = {name.lower(): version for name, version in pins.items()}
    for name, least in ranges:
        assert name in lower, f"{name} is not pinned"
        assert [int(part) for part in re.findall(r"\d+", lower[name])[:2]] >= [int(p) for p in least.split(".")[:2]]
