"""How a training step's time and memory grow with patch, batch, channels, classes and processes; and a cluster on paper.

    python benchmarks/scaling.py --json benchmarks/results/<device>.jsonl --picture docs/scaling_<device>.png
    python benchmarks/scaling.py --model

The first measures on this machine (`dropgen_fast/bench/scaling/` says how); parts can be measured one by one (``--parts``), and
the picture is drawn from all rows of the file. Parts:

  patch, batch, channels, classes, processes   axes, each swept around the base case
  gradients                                    when the gradients of the paper's network are there, within a step of 64³ voxels
  checkpoint                                   what a checkpoint of the paper's network takes, in the folder --scratch

The second prints the tables of docs/scaling.md, from counted bytes and the assumptions of ``--cluster``; it measures nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from dropgen_fast.bench import machine
from dropgen_fast.bench.report import Row
from dropgen_fast.bench.scaling import cases, cluster, parts, report, sweep
from dropgen_fast.bench.scaling.cases import AXES, Base, Limits
from dropgen_fast.bench.step import PATCHES, PRECISIONS
from dropgen_fast.cli import run
from dropgen_fast.device import choose_device, free_bytes
from dropgen_fast.errors import InputError
from dropgen_fast.files import write_atomically

Part = Literal["patch", "batch", "channels", "classes", "processes", "gradients", "checkpoint"]
PARTS: tuple[Part, ...] = (*AXES, "gradients", "checkpoint")
SMALL_NETWORK = ("base_channels=4", "downsamplings=3")
BASE_BATCH = {"cpu": 2, "cuda": 4}
"""On a CPU torch leaves convolutions of a single small sample to a slow loop, which would be all one saw of a small network."""
QUICK_PATCH, QUICK_NETWORK = 16, ("base_channels=2", "downsamplings=2")
ROUNDS, QUICK_ROUNDS = 5, 2
MEMORY_SHARE = 0.8
"""Of what is free, for a point."""
STEP_S = {"cpu": 10.0, "cuda": 60.0}


@dataclass(frozen=True)
class ScalingConfig:
    """Measure how a training step grows on this machine, or print what a cluster would need."""

    model: bool = False
    """Print the tables of the model on paper and measure nothing."""
    parts: tuple[Part, ...] = PARTS
    """What to measure."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:<n>."""
    patch: tuple[int, ...] = (64, 96, 128, 192, 256)
    """Edges of the cubes of the axis patch, voxels."""
    batch: tuple[int, ...] = (1, 2, 4, 8)
    """Patches a batch of the axis batch."""
    channels: tuple[int, ...] = (0, 12, 16, 32)
    """Feature channels of the axis channels; 0 is ERM."""
    classes: tuple[int, ...] = (2, 4, 16, 32)
    """Of the axis classes."""
    processes: tuple[int, ...] = (1, 2, 4)
    """Of the axis processes; each has the cores divided by the largest."""
    base_patch: int | None = None
    """Edge of the base case's cube; default 64 on a CPU, 128 on a GPU."""
    base_batch: int | None = None
    """Patches of the base case; default 2 on a CPU, 4 on a GPU."""
    base_channels: int = 16
    """Feature channels of the base case."""
    base_classes: int = 4
    """Classes of the base case."""
    network_options: tuple[str, ...] | None = None
    """Of the paper's U-Net, as train's; default a small one on a CPU, the paper's on a GPU."""
    precision: Literal["bf16", "fp32"] | None = None
    """Default fp32 on a CPU, bf16 on a GPU."""
    compile: bool | None = None
    """Compile network and loss; default: on a GPU."""
    step_s: float | None = None
    """A point whose step takes longer is reported and not timed; default 10 on a CPU, 60 on a GPU."""
    memory_gib: float | None = None
    """What a point may take; default 0.8 of what is free."""
    rounds: int | None = None
    """Of each axis; default 5, with --quick 2."""
    threads: int | None = None
    """Of torch on the CPU, but for the axis processes; default torch's."""
    scratch: Path = Path(".")
    """Folder in which the checkpoint is written, and removed."""
    json: Path | None = None
    """File to which a row, a JSON object, is appended for each value."""
    picture: Path | None = None
    """File for time and memory against each axis as PNG."""
    quick: bool = False
    """A smoke test: tiny network, patches of 16 and 32, two values of each axis; numbers that mean little."""
    cluster: cluster.Cluster = field(default_factory=cluster.Cluster)
    """Assumptions of --model."""


def resolved(config: ScalingConfig) -> ScalingConfig:
    """With --quick, the small values where none were given."""
    if not config.quick:
        return config
    small: dict[str, Any] = {"patch": (16, 32), "batch": (1, 2), "channels": (0, 12), "classes": (2, 4), "processes": (1, 2)}
    default = ScalingConfig()
    values = {name: value for name, value in small.items() if getattr(config, name) == getattr(default, name)}
    return dataclasses.replace(config, base_patch=config.base_patch or QUICK_PATCH, rounds=config.rounds or QUICK_ROUNDS,
                               network_options=config.network_options or QUICK_NETWORK, **values)


def check(config: ScalingConfig) -> None:
    """Tell before anything is measured what could not work; raises `InputError`."""
    for name in ("patch", "batch", "channels", "classes", "processes"):
        values, least = getattr(config, name), {"channels": 0, "classes": 2}.get(name, 1)
        if not values or min(values) < least or list(values) != sorted(set(values)):
            raise InputError(f"--{name} must be rising whole numbers of at least {least}, got {values}")
    if config.base_classes < 2 or config.base_channels < 0:
        raise InputError("--base-classes must be at least 2 and --base-channels at least 0, "
                         f"got {config.base_classes} and {config.base_channels}")
    for name in ("base_patch", "base_batch", "step_s", "memory_gib", "rounds", "threads"):
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name.replace('_', '-')} must be above 0, got {value}")
    if not config.parts:
        raise InputError("--parts must name one at least")
    if not config.scratch.is_dir():
        raise InputError(f"--scratch must be a folder that is there, got {config.scratch}")
    for name, path in (("json", config.json), ("picture", config.picture)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise InputError(f"--{name} must be a file in a folder that is there, got {path}")


def base_of(config: ScalingConfig, device: torch.device) -> Base:
    """The base case, with what the device decides."""
    on_cpu = device.type == "cpu"
    options = config.network_options if config.network_options is not None else SMALL_NETWORK if on_cpu else ()
    return Base(
        patch=config.base_patch or PATCHES[device.type][0], batch=config.base_batch or BASE_BATCH[device.type],
        channels=config.base_channels, classes=config.base_classes, network_options=options,
        precision=config.precision or PRECISIONS[device.type], compile=not on_cpu if config.compile is None else config.compile)


def bench(config: ScalingConfig) -> report.Result:
    """Measure, print, write.

    Raises:
        InputError: an option that does not fit.
    """
    check(config)
    config = resolved(config)
    device = choose_device(config.device)
    begun, threads = time.perf_counter(), torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        facts = {**machine.describe(device), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        results: list[report.Result] = []
        rows: list[Row] = []
        for part in _measured(config, device):
            results.append(part)
            made = report.rows(part, facts)
            rows += made
            if config.json is not None:  # part by part: a later one may fail, and each takes minutes
                with config.json.open("a") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in made)
    finally:
        torch.set_num_threads(threads)
    result = report.together(results)
    print(report.screen(result, facts))
    if config.json is not None:
        print(f"{len(rows)} rows appended to {config.json}")
        rows = [json.loads(line) for line in config.json.read_text().splitlines()]
    if config.picture is not None:
        write_atomically(config.picture, report.picture(rows))
        print(f"picture: {config.picture}")
    print(f"{time.perf_counter() - begun:.0f} s")
    return result


def _measured(config: ScalingConfig, device: torch.device) -> Iterator[report.Result]:
    """Part after part."""
    base = base_of(config, device)
    rounds = config.rounds or ROUNDS
    memory_bytes = (config.memory_gib * 2**30 if config.memory_gib is not None else MEMORY_SHARE * free_bytes(device))
    limits = Limits(int(memory_bytes), config.step_s or STEP_S[device.type])
    axes = [axis for axis in AXES if axis in config.parts]
    whole = base if config.quick else dataclasses.replace(base, patch=64, network_options=())
    cases.check([base.at("patch", base.patch), *(base.at(axis, value) for axis in axes for value in getattr(config, axis))])
    for axis in axes:
        measure = sweep.sweep_processes if axis == "processes" else functools.partial(sweep.sweep, axis)
        points = measure(getattr(config, axis), base, device, rounds, limits, _say)
        yield report.Result(base, {axis: points}, {}, whole)
    if "gradients" in config.parts:
        _say("gradients")
        found = parts.ready_shares(whole, device, rounds)
        yield report.Result(base, {}, {f"gradients.{name}": value for name, value in found.items()}, whole)
    if "checkpoint" in config.parts:
        _say("checkpoint")
        found = parts.checkpoint_values(whole, config.scratch, rounds)
        yield report.Result(base, {}, {f"checkpoint.{name}": value for name, value in found.items()}, whole)


def _say(what: str) -> None:
    print(f"scaling: {what}", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> int:
    """The command."""
    config = tyro.cli(ScalingConfig, args=list(argv), prog="scaling.py")
    if config.model:
        config.cluster.check()
        print("\n\n".join(f"{title}\n\n{table}" for title, table in cluster.tables(config.cluster).items()))
        return 0
    bench(config)
    return 0


if __name__ == "__main__":
    sys.exit(run("scaling", main, sys.argv[1:]))
