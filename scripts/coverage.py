"""Slim every CNN of timm and torchvision and prove each slim network: the coverage sweep.

    python scripts/coverage.py --source all --resume
    python scripts/coverage.py --slice --timeout 120

Each network runs in a process of its own with a time limit, in one thread. Modules take turns, and the smallest of
their networks come first, so that an interrupted sweep has seen most. Records are added to ``coverage.jsonl`` in the
output folder as they come; ``coverage.json`` and ``coverage.md`` are made of all of them at the end, and ``--resume``
reads both.
"""

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarking import provenance, restart_with_quiet_memory

if __name__ == "__main__":
    restart_with_quiet_memory(threads=1)

import archscan  # before anything that imports torchvision

# isort: split
import timm  # noqa: F401 - before the fork, which makes each process start at once
import torch
import torchvision  # noqa: F401
from coverage_network import examine
from coverage_networks import SLICE, count_parameters, in_order, list_networks, module_of
from coverage_report import write_report

from archscan.reference_nets import cifar_resnet

PEER_TIMEOUT_S = 75.0
PATIENCE = 8.0

LARGE_PARAMETERS = 100_000_000
LARGE_TIMEOUTS = 4
"""Networks with more parameters get this many times the limit."""

_M_MMAP_MAX = -4  # of glibc's mallopt

Record = dict[str, Any]


Work = Callable[[str, Callable[[str], None]], Record]
"""From the name of a network, and who is told the name of each stage, to a record."""


def _in_child(work: Work, network: str, pipe: Connection, limit_s: float) -> None:
    """Run in the forked process: send the name of each stage, then the record."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - what libraries say on the way
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(limit_s), resource.RLIM_INFINITY))
    torch.set_num_threads(1)
    record = work(network, lambda stage: pipe.send(stage))
    pipe.send(record)


def run_alone(work: Work, network: str, limit_s: float) -> tuple[Record | None, str]:
    """Run `work` on a network in a process of its own.

    Args:
        work: What to do.
        network: With which network.
        limit_s: CPU seconds that it may take; a machine that does other things too may take `PATIENCE` times as long.

    Returns:
        Its record, None where it crashed or ran out of time; and the stage that was reached.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_in_child, args=(work, network, send, limit_s))
    process.start()
    send.close()
    stage, record, end = "start", None, time.monotonic() + PATIENCE * limit_s
    try:
        while record is None and receive.poll(max(0.0, end - time.monotonic())):
            message = receive.recv()
            stage, record = (message, None) if isinstance(message, str) else (stage, message)
    except EOFError:
        process.join()
        late = process.exitcode == -signal.SIGXCPU
        stage += f" (out of time after {limit_s:.0f} s)" if late else f" (crashed, exit code {process.exitcode})"
    else:
        if record is None:
            stage += f" (out of patience after {PATIENCE * limit_s:.0f} s)"
    process.kill()
    process.join()
    return record, stage


def _peer(shape: list[int], network: str, report: Callable[[str], None]) -> Record:
    from coverage_peer import time_peer
    from coverage_subjects import build_for

    model = build_for(network, shape[1:])
    report("trace")
    try:
        return time_peer(model, torch.randn(shape))
    except Exception as error:  # whatever the peer raises is its verdict
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"}


def _examined(facts: Record, network: str, report: Callable[[str], None]) -> Record:
    if facts["params"] > LARGE_PARAMETERS:
        ctypes.CDLL(None).mallopt(_M_MMAP_MAX, 65536)  # freed memory goes back at once; slower, and much smaller
    return examine(network, report, facts)


def sweep_one(network: str, facts: Record, timeout_s: float, peer: bool) -> Record:
    """Make the record of one network."""
    start = time.monotonic()
    if facts["params"] > LARGE_PARAMETERS:
        timeout_s *= LARGE_TIMEOUTS
    record, stage = run_alone(partial(_examined, facts), network, timeout_s)
    if record is None:
        record = {"network": network, **facts, "problems": [{"check": "process", "cause": f"stopped in {stage}"}]}
    record |= {"module": module_of(network), "wall_s": round(time.monotonic() - start, 1)}
    return with_peer(record) if peer else record


def with_peer(record: Record) -> Record:
    """Add what Torch-Pruning does with the same network and input, to the record of a network that could be opened."""
    if "input" not in record:
        return record
    found, stage = run_alone(partial(_peer, record["input"]), record["network"], PEER_TIMEOUT_S)
    return record | {"peer": found or {"error": f"stopped in {stage}"}}


def _commit() -> str:
    """Name the commit that is checked out, with ``-dirty`` where files differ from it; empty outside a repository."""
    folder = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _warm_up() -> None:
    """Import all that is imported late, so that it is neither done nor timed in every process."""
    import fvcore.nn  # noqa: F401

    archscan.slim(cifar_resnet(8), torch.randn(1, 3, 32, 32), target_flops=0.6, criterion="magnitude")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Slim every CNN of timm and torchvision and prove each slim network.")
    parser.add_argument("--source", choices=("timm", "torchvision", "all"), default="all")
    parser.add_argument("--match", default="*", help="shell pattern on the names")
    parser.add_argument("--slice", action="store_true", help="only one small network of each block design")
    parser.add_argument("--networks", nargs="+", help="only these, such as timm:resnet18")
    parser.add_argument("--shard", default="1/1", help="i/n: every n-th network, from the i-th")
    parser.add_argument("--resume", action="store_true", help="skip the networks that have a record")
    parser.add_argument("--again", action="store_true", help="with --resume: run those that failed again")
    parser.add_argument("--report", action="store_true", help="only write the report on the records, with --resume")
    parser.add_argument("--timeout", type=float, default=300.0, help="CPU seconds for each network")
    parser.add_argument("--peer", action="store_true", help="time Torch-Pruning too; with --resume, where it lacks")
    parser.add_argument("--output", type=Path, default=Path("reports"))
    return parser.parse_args()


def _read(folder: Path) -> dict[str, Record]:
    """Read the records so far, of this sweep and of earlier ones; the last of each network counts."""
    whole, lines = folder / "coverage.json", folder / "coverage.jsonl"
    records: list[Record] = json.loads(whole.read_text(encoding="utf-8"))["records"] if whole.is_file() else []
    if lines.is_file():
        records.extend(map(json.loads, lines.read_text(encoding="utf-8").splitlines()))
    return {record["network"]: record for record in records}


def _line(number: int, count: int, record: Record) -> str:
    causes = "; ".join(f"{problem['check']}: {problem['cause']}" for problem in record["problems"])
    return f"[{number}/{count}] {record['network']} {record['wall_s']} s  {causes or 'ok'}"


def _sweep(options: argparse.Namespace, networks: list[str], parameters: dict[str, int]) -> None:
    """Examine the networks that have no record yet."""
    done = _read(options.output) if options.resume else {}
    if options.again:
        done = {network: record for network, record in done.items() if not record["problems"]}
    alone = {network for network, record in done.items() if options.peer and "input" in record and "peer" not in record}
    todo = [network for network in networks if network not in done or network in alone]
    print(f"{len(networks)} networks, {len(networks) - len(todo)} have a record", flush=True)
    commit = _commit()
    _warm_up()
    with (options.output / "coverage.jsonl").open("a", encoding="utf-8") as file:
        for number, network in enumerate(todo, start=1):
            facts = {"params": parameters[network], "commit": commit}
            if network in alone:
                record = with_peer(done[network])
            else:
                record = sweep_one(network, facts, options.timeout, options.peer)
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(_line(number, len(todo), record), flush=True)


def main() -> None:
    """Run the sweep."""
    options = _arguments()
    networks, left_out = list_networks(options.source, options.match)
    chosen = SLICE if options.slice else options.networks
    if chosen:
        networks = [network for network in networks if network in chosen]
    options.output.mkdir(parents=True, exist_ok=True)
    parameters = count_parameters(networks, Path(__file__).resolve().parent.parent / "reports/coverage_params.json")
    networks = in_order(networks, parameters)
    shard, shards = (int(part) for part in options.shard.split("/"))
    networks = networks[shard - 1 :: shards]
    if not options.resume:
        for name in ("coverage.jsonl", "coverage.json"):
            (options.output / name).unlink(missing_ok=True)
    if not options.report:
        _sweep(options, networks, parameters)
    write_report(options.output, list(_read(options.output).values()), left_out, module_of, provenance(threads=1))


if __name__ == "__main__":
    main()
