"""Slim every CNN of timm and torchvision and prove each slim network: the coverage sweep.

    python scripts/coverage.py --source all --resume
    python scripts/coverage.py --slice --timeout 120

Each network runs in a process of its own with a time limit, in one thread. Records are added to ``coverage.jsonl`` in
the output folder as they come; ``coverage.json`` and ``coverage.md`` are made of all of them at the end.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import archscan  # noqa: F401 - before anything that imports torchvision

# isort: split
import timm  # noqa: F401 - before the fork, which makes each process start at once
import torch
import torchvision  # noqa: F401
from coverage_network import examine
from coverage_networks import SLICE, list_networks, module_of
from coverage_report import write_report

PEER_TIMEOUT_S = 75.0

Record = dict[str, Any]


def _in_child(work: Callable[[str, Callable[[str], None]], Record], network: str, pipe: Connection) -> None:
    """Run in the forked process: send the name of each stage, then the record."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - what libraries say on the way
    torch.set_num_threads(1)
    record = work(network, lambda stage: pipe.send(stage))
    pipe.send(record)


def run_alone(
    work: Callable[[str, Callable[[str], None]], Record], network: str, timeout_s: float
) -> tuple[Record | None, str]:
    """Run `work` on a network in a process of its own.

    Returns:
        Its record, None where it crashed or ran out of time; and the stage that was reached.
    """
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_in_child, args=(work, network, send))
    process.start()
    send.close()
    stage, record, end = "start", None, time.monotonic() + timeout_s
    try:
        while record is None and receive.poll(max(0.0, end - time.monotonic())):
            message = receive.recv()
            stage, record = (message, None) if isinstance(message, str) else (stage, message)
    except EOFError:
        stage += " (crashed)"
    else:
        if record is None:
            stage += f" (out of time after {timeout_s:.0f} s)"
    process.kill()
    process.join()
    return record, stage


def _peer(network: str, report: Callable[[str], None]) -> Record:
    from coverage_peer import time_peer
    from coverage_subjects import build, smallest_input

    model = build(network)
    example = smallest_input(network, model)
    report("trace")
    try:
        return time_peer(model, example)
    except Exception as error:  # whatever the peer raises is its verdict
        return {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"}


def sweep_one(network: str, timeout_s: float, peer: bool) -> Record:
    """Make the record of one network."""
    start = time.monotonic()
    record, stage = run_alone(examine, network, timeout_s)
    if record is None:
        record = {"network": network, "problems": [{"check": "process", "cause": f"stopped in {stage}"}]}
    record |= {"module": module_of(network), "seconds": round(time.monotonic() - start, 1)}
    if peer:
        found, stage = run_alone(_peer, network, PEER_TIMEOUT_S)
        record["peer"] = found or {"error": f"stopped in {stage}"}
    return record


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Slim every CNN of timm and torchvision and prove each slim network.")
    parser.add_argument("--source", choices=("timm", "torchvision", "all"), default="all")
    parser.add_argument("--match", default="*", help="shell pattern on the names")
    parser.add_argument("--slice", action="store_true", help="only the smallest network of each timm module")
    parser.add_argument("--shard", default="1/1", help="i/n: every n-th network, from the i-th")
    parser.add_argument("--resume", action="store_true", help="skip the networks that have a record")
    parser.add_argument("--again", action="store_true", help="with --resume: run those that failed again")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each network")
    parser.add_argument("--peer", action="store_true", help="time Torch-Pruning too")
    parser.add_argument("--output", type=Path, default=Path("reports"))
    return parser.parse_args()


def _read(path: Path) -> dict[str, Record]:
    """Read the records so far; the last of each network counts."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {record["network"]: record for record in map(json.loads, lines)}


def _line(number: int, count: int, record: Record) -> str:
    causes = "; ".join(f"{problem['check']}: {problem['cause']}" for problem in record["problems"])
    return f"[{number}/{count}] {record['network']} {record['seconds']} s  {causes or 'ok'}"


def main() -> None:
    """Run the sweep."""
    options = _arguments()
    networks, left_out = list_networks(options.source, options.match)
    if options.slice:
        networks = [network for network in SLICE if network in set(networks)]
    shard, shards = (int(part) for part in options.shard.split("/"))
    networks = networks[shard - 1 :: shards]
    options.output.mkdir(parents=True, exist_ok=True)
    cache = options.output / "coverage.jsonl"
    if not options.resume:
        cache.unlink(missing_ok=True)
    done = _read(cache)
    if options.again:
        done = {network: record for network, record in done.items() if not record["problems"]}
    todo = [network for network in networks if network not in done]
    print(f"{len(networks)} networks, {len(networks) - len(todo)} have a record")
    with cache.open("a", encoding="utf-8") as file:
        for number, network in enumerate(todo, start=1):
            record = sweep_one(network, options.timeout, options.peer)
            file.write(json.dumps(record) + "\n")
            file.flush()
            print(_line(number, len(todo), record), flush=True)
    write_report(options.output, list(_read(cache).values()), left_out, " ".join(sys.argv))


if __name__ == "__main__":
    main()
