"""``torchrun -m dropgen_fast.bench.scaling.together task.json found.json``: a step of several processes.

Each process has its own share of the cores. A round runs, one after the other and all processes at once: the step with its
gradients averaged; the same step of each process alone; the all-reduce alone, of as many bytes as the network has gradients, in
the buckets that DistributedDataParallel makes of them; and an exchange, in which each process sends so many bytes to the next and
gets as many from the one before, as in a ring: what the link between two processes lets pass. A round counts as the slowest
process' time.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dropgen_fast.bench.measure import Meter, Run
from dropgen_fast.bench.scaling import cluster
from dropgen_fast.bench.scaling.cases import Base
from dropgen_fast.bench.scaling.sweep import step_of, warm_up
from dropgen_fast.bench.step import ready_batches
from dropgen_fast.distributed import Ranks

COUNTED = 3
"""All-reduces over which the bytes on the loopback interface are counted."""
LOOPBACK = Path("/proc/net/dev")


def measure(task: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Milliseconds by round, bytes and memory; the same in every process."""
    device = ranks.device
    base = Base(**{**task["base"], "network_options": tuple(task["base"]["network_options"])})
    meter = Meter(device, rounds=task["rounds"])
    sizes = [size for size, _ in cluster.buckets(cluster.arrivals(base.layers()))]

    def barrier() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if ranks.size > 1:
            ranks.gather(0)

    ways: dict[str, Run] = {}
    batches = ready_batches(base.step(), device)
    warm_up(base, device)

    def steps() -> None:
        ways["step"] = step_of(base, device, batches, ranks, barrier)
        for number in range(2):
            ways["step"](number, 0, lambda: None)

    peak = meter.peak_bytes(steps)
    ways["step"](2, 0, lambda: None)  # DistributedDataParallel orders its buckets after the first
    ways["alone"] = step_of(base, device, batches, None, barrier)
    if ranks.size > 1:
        ways |= _traffic(sizes, ranks, barrier)
    for name in ways:
        ways[name](0, 0, lambda: None)
    times = meter.interleave(ways, float("inf"))
    slowest = {name: [max(row) for row in zip(*ranks.gather(times.ms(name, 0, 1)), strict=True)] for name in ways}
    peaks = [p for p in ranks.gather(peak) if p is not None]
    return {
        "step_ms": slowest["step"], "alone_ms": slowest["alone"], "all_reduce_ms": slowest.get("all_reduce", []),
        "exchange_gb_s": [sum(sizes) / ms / 1e6 for ms in slowest.get("exchange", [])], "bytes": sum(sizes),
        "sent_bytes": _sent_bytes(ways["all_reduce"], ranks, barrier) if ranks.size > 1 else [],
        "peak_bytes": max(peaks, default=None)}


def _traffic(sizes: Sequence[int], ranks: Ranks, barrier: Callable[[], None]) -> dict[str, Run]:
    parts = [torch.zeros(size // cluster.FLOAT_BYTES, device=ranks.device) for size in sizes]
    sent = torch.zeros(sum(part.numel() for part in parts), device=ranks.device)
    got = torch.zeros_like(sent)

    def all_reduce(number: int, place: int, mark: Callable[[], None]) -> None:
        barrier()
        mark()
        for work in [dist.all_reduce(part, async_op=True) for part in parts]:
            work.wait()
        mark()

    def exchange(number: int, place: int, mark: Callable[[], None]) -> None:
        barrier()
        mark()
        sending = dist.P2POp(dist.isend, sent, (ranks.rank + 1) % ranks.size)
        getting = dist.P2POp(dist.irecv, got, (ranks.rank - 1) % ranks.size)
        for work in dist.batch_isend_irecv([sending, getting]):
            work.wait()
        mark()

    return {"all_reduce": all_reduce, "exchange": exchange}


def _sent_bytes(all_reduce: Run, ranks: Ranks, barrier: Callable[[], None]) -> list[float]:
    """What a process sends in an all-reduce, counted on the loopback interface; nothing where the GPUs' links are used."""
    if ranks.device.type == "cuda" or not LOOPBACK.exists():
        return []
    found = []
    for number in range(COUNTED):
        barrier()
        before = _loopback_bytes()
        barrier()
        all_reduce(number, 0, lambda: None)
        barrier()
        found.append((_loopback_bytes() - before) / ranks.size)
    return ranks.from_first(found)


def _loopback_bytes() -> int:
    line = next(line for line in LOOPBACK.read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def main(argv: list[str]) -> int:
    """Measure the task in the first file, write what was found into the second."""
    task = json.loads(Path(argv[0]).read_text())
    first = int(os.environ.get("LOCAL_RANK", "0")) * task["share"]
    cores = task["cores"]
    os.sched_setaffinity(0, {cores[(first + k) % len(cores)] for k in range(task["share"])})
    torch.set_num_threads(task["share"])
    ranks = Ranks.join(task["device"])
    try:
        found = measure(task, ranks)
        if ranks.first:
            Path(argv[1]).write_text(json.dumps(found))
    finally:
        ranks.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
