"""How time and memory of a training step grow: with the patch, the batch, the feature channels, the classes and the processes.

One axis is swept at a time around a base case. A point is first tried in a process of its own, which tells its memory, and
whether it fits the memory and the time that are given; the points of an axis that do are then timed against each other,
interleaved (`Meter`), in one process. What does not fit is kept, with the reason. Features come from `Lift`, which costs next to
nothing, so that what grows with the channels is the fusion and the network's first layer, not a foundation model.

Processes are started by torchrun (`dropgen_fast.bench.together`). Two parts hold the model of `dropgen_fast.bench.cluster`
against this machine: when gradients are ready within a step, and what a checkpoint takes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from dropgen_fast import checkpoint
from dropgen_fast.bench import cluster
from dropgen_fast.bench.measure import Meter, Run, Spread
from dropgen_fast.bench.step import StepConfig, ready_batches, training_step
from dropgen_fast.errors import InputError
from dropgen_fast.networks import UNet, keyword_options, one_line

Axis = Literal["patch", "batch", "channels", "classes", "processes"]
AXES: tuple[Axis, ...] = ("patch", "batch", "channels", "classes", "processes")
READY_SHARES = (0.25, 0.5, 0.75, 0.95)
"""Of the gradients' bytes: by which share of a step are they there?"""
HOPELESS = 1.5
"""A point is not even tried where its step is expected to take so many times what is allowed."""
START_S = 60.0
"""What a process may take to start and to build a model, on top of the time of its steps."""


# ---- what is measured ---------------------------------------------------------------------------------------------------


class Lift(nn.Module):
    """An extractor of next to no work: each feature is the image times a number of its own; (N, 1, D, H, W) → (N, C, D, H, W)."""

    scales: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("scales", torch.linspace(0.5, 1.5, channels).reshape(1, -1, 1, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Features of an image."""
        return image * self.scales


def __getattr__(name: str) -> Callable[[], Lift]:
    """``lift_<channels>``, the factory of that extractor, as `load_extractor` looks it up."""
    if name.startswith("lift_") and name[5:].isdigit():
        return functools.partial(Lift, int(name[5:]))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True)
class Base:
    """The case that every axis starts from."""

    patch: int
    """Edge of the cube, voxels."""
    batch: int
    channels: int
    """Of the features; 0 is ERM, the image alone."""
    classes: int
    network_options: tuple[str, ...]
    precision: str
    compile: bool

    def at(self, axis: Axis, value: int) -> Case:
        """The case with another value on one axis ("processes" changes nothing within a process)."""
        changed: dict[str, Any] = {axis: value} if axis != "processes" else {}
        return Case(axis, value, dataclasses.replace(self, **changed))

    @property
    def method(self) -> str:
        """As train's."""
        return "dropgen" if self.channels else "erm"

    def step(self) -> StepConfig:
        """As `training_step` wants it."""
        return StepConfig(patch=(self.patch,) * 3, batch=self.batch, classes=self.classes,
                          extractor=f"{__name__}:lift_{self.channels}", network_options=self.network_options,
                          precision=self.precision, compile=self.compile)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the network's input."""
        return (self.batch, 1 + self.channels, *[self.patch] * 3)

    def network(self) -> UNet:
        """The network alone."""
        options: dict[str, Any] = keyword_options(self.network_options, "network_options")
        return UNet(1 + self.channels, self.classes, **options)

    def layers(self) -> list[cluster.Layer]:
        """The network's, for such batches."""
        with torch.device("meta"):
            return cluster.layers(self.network(), self.shape)

    def operations(self) -> float:
        """Of the convolutions of a step."""
        return cluster.operations(self.layers())


@dataclass(frozen=True)
class Case:
    """A point of an axis."""

    axis: Axis
    value: int
    base: Base

    @property
    def size(self) -> int:
        """What the exponent refers to: voxels of a patch, channels of the network's input, else the value."""
        return {"patch": self.value**3, "channels": 1 + self.value}.get(self.axis, self.value)


@dataclass(frozen=True)
class Limits:
    """What a point may take."""

    memory_bytes: int
    step_s: float


@dataclass(frozen=True)
class Point:
    """A case with what was measured of it; where it did not fit, `problem` says why."""

    case: Case
    ms: Sequence[float] = ()
    """Of a step, round by round."""
    peak_bytes: int | None = None
    """Of building the model and two steps, beyond what the process had before; batches are not counted."""
    problem: str = ""
    tried_s: float = 0.0
    """Of the one step that was tried; 0 where there was none."""
    more: Mapping[str, tuple[Spread, str]] = field(default_factory=dict)
    """Further values of the axis "processes": name → spread, unit."""


def check(cases: Sequence[Case]) -> None:
    """Build the network of each case without memory; raises `InputError` for one that cannot be, or cannot take its patch."""
    for case in cases:
        try:
            case.base.layers()
        except (InputError, TypeError, ValueError) as error:
            raise InputError(f"{case.axis} {case.value}: {one_line(error)}") from error


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


# ---- processes of their own ---------------------------------------------------------------------------------------------


def in_child(function: Callable[..., Any], arguments: tuple[Any, ...], timeout_s: float) -> Any:
    """The function's result in a fresh process, or a string that says why there is none: memory, or time.

    Raises:
        InputError: what the function raised, an option that does not fit.
        RuntimeError: anything else that it raised.
    """
    context = multiprocessing.get_context("forkserver")  # a fork of this process would share its threads, a spawn imports anew
    context.set_forkserver_preload([__name__])
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sending, function, arguments), daemon=True)
    process.start()
    sending.close()
    try:
        if not receiving.poll(timeout_s):
            return f"not done after {timeout_s:.0f} s"
        kind, result = receiving.recv()
    except EOFError:
        process.join()
        return _ended(process.exitcode)
    finally:
        process.kill()  # it has nothing left to do
        process.join()
        receiving.close()
    if kind == "input":
        raise InputError(result)
    if kind == "error":
        raise RuntimeError(result)
    return result


def _ended(status: int | None) -> str:
    """Why a process gave no result. The system kills for want of memory, libraries abort."""
    if status in (-signal.SIGKILL, -signal.SIGABRT):
        return f"the process was ended by {signal.Signals(-status).name}, as for want of memory"
    return f"the process ended with status {status}"


def _child(sending: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        answer = ("result", function(*arguments))
    except InputError as error:
        answer = ("input", str(error))
    except Exception as error:
        what = " ".join(str(error).split())
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in what
        answer = ("result", "does not fit the memory") if memory else ("error", f"{type(error).__name__}: {what}")
    sending.send(answer)


def limit_memory(device: torch.device, memory_bytes: int) -> None:
    """Let this process fail where it would take more than so much, instead of taking it from others."""
    if device.type == "cuda":
        total, held = torch.cuda.get_device_properties(device).total_memory, torch.cuda.memory_reserved(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, (held + memory_bytes) / total), device)
        return
    status = Path("/proc/self/status").read_text()
    held = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (held + memory_bytes, resource.RLIM_INFINITY))


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
                   "-m", "dropgen_fast.bench.together", str(given), str(found)]
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


# ---- the model's other parts --------------------------------------------------------------------------------------------


def ready_shares(base: Base, device: torch.device, rounds: int) -> dict[str, tuple[Spread, str]]:
    """By which share of forward and backward pass so much of the gradients' bytes is there: measured, and by the model.

    The network is the base's; the optimizer, the loss' forward pass and the fusion are left out, as the model does.
    """
    found = in_child(_ready, (base, device, torch.get_num_threads(), rounds), START_S * 10)
    if isinstance(found, str):
        raise InputError(f"gradients: {found}")
    model = cluster.arrivals(base.layers())
    values: dict[str, tuple[Spread, str]] = {}
    for number, share in enumerate(READY_SHARES):
        values[f"ready_{100 * share:.0f}"] = (Spread.of(row[number] for row in found), "share of the step")
        values[f"ready_{100 * share:.0f}_model"] = (Spread.of([_reached(model, share)]), "share of the step")
    return values


def _ready(base: Base, device: torch.device, threads: int, rounds: int) -> list[list[float]]:
    torch.set_num_threads(threads)
    network = base.network().to(device)
    network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # torch's stubs lack this form
    fused = torch.rand(base.shape).to(device, memory_format=torch.channels_last_3d)
    stamps: list[tuple[int, float]] = []

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def note(parameter: Tensor) -> None:
        stamps.append((cluster.FLOAT_BYTES * parameter.numel(), now()))

    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(note)
    rows = []
    for number in range(rounds + 1):
        network.zero_grad()
        stamps.clear()
        begun = now()
        with torch.autocast(device.type, torch.bfloat16, enabled=base.precision == "bf16"):
            network(fused).float().mean().backward()
        length = now() - begun
        if number:  # the first warms up
            rows.append([_reached([(size, (at - begun) / length) for size, at in stamps], share) for share in READY_SHARES])
    return rows


def _reached(arriving: Sequence[tuple[int, float]], share: float) -> float:
    """When that share of the bytes has come."""
    sizes, at = zip(*arriving, strict=True)
    come = np.cumsum(sizes)
    return float(at[int(np.searchsorted(come, share * come[-1]))])


def checkpoint_values(base: Base, folder: Path, rounds: int) -> dict[str, tuple[Spread, str]]:
    """A checkpoint's bytes over the model's, and its time over that of plain writing so many bytes to the same disk."""
    network = base.network()
    optimizer = torch.optim.AdamW(network.parameters(), 0.0)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    content = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        saved, plain = Path(scratch) / "last.pt", Path(scratch) / "plain"
        checkpoint.save(saved, content)
        size = saved.stat().st_size
        block = b"\0" * size

        def save(number: int, place: int, mark: Callable[[], None]) -> None:
            mark()
            checkpoint.save(saved, content)
            mark()

        def write(number: int, place: int, mark: Callable[[], None]) -> None:
            plain.unlink(missing_ok=True)
            mark()
            with plain.open("wb") as file:
                file.write(block)
                file.flush()
                os.fsync(file.fileno())
            mark()

        times = Meter(torch.device("cpu"), rounds=rounds).interleave({"save": save, "write": write}, math.inf)
    saves, writes = times.ms("save", 0, 1), times.ms("write", 0, 1)
    return {"bytes": (Spread.of([size]), "bytes"),
            "bytes_over_model": (Spread.of([size / cluster.checkpoint_bytes(network)]), "ratio"),
            "ms": (Spread.of(saves), "ms"), "write_gb_s": (Spread.of(size / ms / 1e6 for ms in writes), "GB/s"),
            "ms_over_model": (Spread.of(a / b for a, b in zip(saves, writes, strict=True)), "ratio")}


# ---- exponents ----------------------------------------------------------------------------------------------------------


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """k of the least squares of log value = k · log size + constant."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def exponents(points: Sequence[Point]) -> dict[str, Spread]:
    """Of time (over the rounds) and of memory (one number) of an axis, over its points that were timed, and weighed; none of
    fewer than two.
    """
    made: dict[str, Spread] = {}
    timed = [point for point in points if point.ms and not point.problem]
    if len(timed) > 1:
        sizes = [point.case.size for point in timed]
        made["ms"] = Spread.of(exponent(sizes, row) for row in zip(*(point.ms for point in timed), strict=True))
    weighed = [point for point in points if point.peak_bytes]
    if len(weighed) > 1:
        slope = exponent([p.case.size for p in weighed], [float(p.peak_bytes or 0) for p in weighed])
        made["gib"] = Spread(slope, slope, slope)
    return made


def over_model(points: Sequence[Point], base: Base) -> dict[int, Spread]:
    """Time of each point over that which the base's time and the operations of both let expect; where the base was measured."""
    reference = next((p for p in points if p.case.base == base and p.ms and not p.problem), None)
    if reference is None or reference.case.axis == "processes":  # whose work is the same everywhere
        return {}
    return {p.case.value: Spread.of(
        a / b * base.operations() / p.case.base.operations() for a, b in zip(p.ms, reference.ms, strict=True))
        for p in points if p.ms and not p.problem}
