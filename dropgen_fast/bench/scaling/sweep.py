"""The sweep of an axis: each point tried alone, then all that fit timed against each other."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dropgen_fast.bench.measure import Meter, Run, Spread
from dropgen_fast.bench.scaling import cluster
from dropgen_fast.bench.scaling.cases import Axis, Base, Case, Limits, Point
from dropgen_fast.bench.scaling.child import in_child, limit_memory
from dropgen_fast.bench.step import ready_batches, training_step

HOPELESS = 1.5
"""A point is not even tried where its step is expected to take so many times what is allowed."""
START_S = 60.0
"""What a process may take to start and to build a model, on top of the time of its steps."""


def sweep(axis: Axis, values: Sequence[int], base: Base, device: torch.device, rounds: int, limits: Limits,
          progress: Callable[[str], None]) -> list[Point]:
    """Measure an axis other than "processes"."""
    points: list[Point] = []
    for value in values:
        progress(f"{axis} {value}")
        case = base.at(axis, value)
        expected_s = _expected_s(case, points[-1]) if points else 0.0
        if expected_s > HOPELESS * limits.step_s:
            why = f"not tried: by the point before a step would take {expected_s:.0f} s, {limits.step_s:g} s are allowed"
            points.append(Point(case, problem=why))
        else:
            points.append(_tried(case, device, limits))
    fitting = [point for point in points if not point.problem]
    if fitting:
        progress(f"{axis}: {rounds} rounds of {len(fitting)} points")
        ahead_s = sum(point.tried_s for point in fitting)
        timed = in_child(_timed, ([point.case for point in fitting], device, torch.get_num_threads(), rounds, limits),
                         START_S * len(fitting) + 5 * (rounds + 2) * ahead_s)
        if isinstance(timed, str):
            return [dataclasses.replace(point, problem=point.problem or f"not timed: together with the others {timed}")
                    for point in points]
        found = dict(zip([point.case.value for point in fitting], timed, strict=True))
        points = [dataclasses.replace(point, ms=found.get(point.case.value, ())) for point in points]
    return points


def _expected_s(case: Case, before: Point) -> float:
    """A step's time by that of the point before, in proportion to the operations; 0 where that is not known."""
    return before.tried_s * case.base.operations() / before.case.base.operations()


def _tried(case: Case, device: torch.device, limits: Limits) -> Point:
    """Two steps in a process of its own: their memory, and the second one's time."""
    tried = in_child(_two_steps, (case, device, torch.get_num_threads(), limits), START_S + 3 * limits.step_s)
    if isinstance(tried, str):
        return Point(case, problem=tried)
    peak, seconds = tried
    if seconds > limits.step_s:
        return Point(case, (), peak, f"a step takes {seconds:.0f} s, {limits.step_s:g} s are allowed", tried_s=seconds)
    return Point(case, (), peak, tried_s=seconds)


def _two_steps(case: Case, device: torch.device, threads: int, limits: Limits) -> tuple[int | None, float]:
    torch.set_num_threads(threads)
    meter, config = Meter(device, rounds=1), case.base.step()
    batches, seconds = ready_batches(config, device), 0.0
    limit_memory(device, limits.memory_bytes)
    warm_up(case.base, device)

    def steps() -> None:
        nonlocal seconds
        step = training_step(config, device, case.base.method, 1)
        for number, batch in enumerate(batches[:2]):
            begun = time.perf_counter()
            float(step([batch], number))
            seconds = time.perf_counter() - begun

    return meter.peak_bytes(steps), seconds


def _timed(cases: Sequence[Case], device: torch.device, threads: int, rounds: int, limits: Limits) -> list[list[float]]:
    torch.set_num_threads(threads)
    meter, ways = Meter(device, rounds=rounds), dict[str, Run]()
    limit_memory(device, limits.memory_bytes)
    for case in cases:
        ways[str(case.value)] = way = step_of(case.base, device)
        way(0, 0, lambda: None)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what one size has left is of no use to the next
    times = meter.interleave(ways, math.inf)
    return [times.ms(name, 0, 1) for name in ways]


def warm_up(base: Base, device: torch.device) -> None:
    """A step of next to nothing: what libraries take of a CPU's memory at their first call is none of a step's."""
    if device.type == "cpu":
        small = dataclasses.replace(base, patch=8, batch=1, network_options=("base_channels=1", "downsamplings=1"))
        step_of(small, device)(0, 0, lambda: None)


def step_of(base: Base, device: torch.device, batches: Sequence[tuple[Tensor, Tensor]] | None = None, ranks: Any = None,
            before: Callable[[], None] = lambda: None) -> Run:
    """A step as `Meter` runs it; `before` is called before the clock starts. Batches are made where none are given."""
    config = base.step()
    ready = ready_batches(config, device) if batches is None else batches
    step, numbers = training_step(config, device, base.method, 1, ranks), itertools.count()

    def run(number: int, place: int, mark: Callable[[], None]) -> None:
        batch = ready[number % len(ready)]
        before()
        mark()
        step([batch], next(numbers))
        mark()

    return run


# ---- processes that train together --------------------------------------------------------------------------------------


def sweep_processes(counts: Sequence[int], base: Base, device: torch.device, rounds: int, limits: Limits,
                    progress: Callable[[str], None]) -> list[Point]:
    """Measure the axis "processes": the batch is that of each process, which has the same share of the cores at every count."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // max(counts))
    points = []
    for count in counts:
        progress(f"processes {count}")
        if device.type == "cuda" and count > torch.cuda.device_count():
            points.append(Point(base.at("processes", count), problem=f"there are {torch.cuda.device_count()} GPUs"))
            continue
        task = {"base": dataclasses.asdict(base), "device": device.type, "rounds": rounds, "share": share, "cores": cores}
        points.append(_together(count, task, base, limits))
    return points


def _together(count: int, task: dict[str, Any], base: Base, limits: Limits) -> Point:
    case = base.at("processes", count)
    timeout_s = START_S + (task["rounds"] + 4) * 4 * limits.step_s
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "task.json", Path(folder) / "found.json"
        given.write_text(json.dumps(task))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count),
                   "-m", "dropgen_fast.bench.scaling.together", str(given), str(found)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(task["share"])}
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment) as done:
            try:
                _, told = done.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                done.terminate()  # the launcher ends its workers, which a kill would leave behind
                done.communicate()
                return Point(case, problem=f"not done after {timeout_s:.0f} s")
        if done.returncode:
            raise RuntimeError(f"{count} processes: {told[-2000:]}")
        return together_point(case, json.loads(found.read_text()), len(task["cores"]) < count * task["share"])


def together_point(case: Case, found: dict[str, Any], shared_cores: bool) -> Point:
    """What `together` measured, beside the model. Each list is over the rounds, of the slowest process."""
    def ratio(one: Sequence[float], other: Sequence[float]) -> Spread:
        return Spread.of(a / b for a, b in zip(one, other, strict=True))

    step, alone = found["step_ms"], found["alone_ms"]
    more = {"ms_alone": (Spread.of(alone), "ms"),
            "all_reduce_share": (Spread.of((a - b) / a for a, b in zip(step, alone, strict=True)), "ratio")}
    if case.value > 1:
        sent = cluster.ring_bytes(found["bytes"], case.value)
        predicted = [sent / gb_s / 1e6 for gb_s in found["exchange_gb_s"]]
        waited = [a - b for a, b in zip(step, alone, strict=True)]
        more |= {"exchange_gb_s": (Spread.of(found["exchange_gb_s"]), "GB/s"),
                 "all_reduce_ms": (Spread.of(found["all_reduce_ms"]), "ms"),
                 "all_reduce_over_model": (ratio(found["all_reduce_ms"], predicted), "ratio"),
                 "waited_over_all_reduce": (ratio(waited, found["all_reduce_ms"]), "ratio")}
        if found["sent_bytes"]:
            more["bytes_over_model"] = (Spread.of([b / sent for b in found["sent_bytes"]]), "ratio")
    if shared_cores:
        more["shared_cores"] = (Spread(1.0, 1.0, 1.0), "flag")
    return Point(case, step, found["peak_bytes"], more=more)
