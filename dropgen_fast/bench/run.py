"""The command: which suites there are, what is done with what they measured."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from dropgen_fast.bench import machine, report, step
from dropgen_fast.bench.measure import Meter
from dropgen_fast.bench.op import OpConfig
from dropgen_fast.bench.op import run as measure_op
from dropgen_fast.bench.step import StepConfig
from dropgen_fast.errors import InputError
from dropgen_fast.files import write_atomically
from dropgen_fast.inference import choose_device

SECONDS, QUICK_SECONDS = 36.0, 3.0
QUICK_SIZE, QUICK_STRIDE = 32, 2
QUICK_NETWORK = ("base_channels=4", "downsamplings=3")


@dataclass(frozen=True)
class BenchConfig:
    """Measure speed on this machine, side by side with what one would write instead, and keep it as rows."""

    suite: str = "op"
    """What to measure: op (the fusion op), step (an optimizer step of DropGen, of ERM and of the plain recipe)."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:<n>."""
    threads: int | None = None
    """Threads of torch and of the op on the CPU; default torch's."""
    rounds: int | None = None
    """Rounds of every measurement; by default as many as --seconds allows."""
    seconds: float | None = None
    """For all rounds together; compiling and warming up come on top. Default 36, with --quick 3."""
    json: Path | None = None
    """File to which a row, a JSON object, is appended for each value."""
    picture: Path | None = None
    """File for a roofline and the bandwidths as PNG."""
    quick: bool = False
    """A smoke test: 32³ voxels, stride 2, a small network, few rounds, unless said otherwise; numbers that mean little."""
    op: Annotated[OpConfig, tyro.conf.arg(name="")] = field(default_factory=OpConfig)
    """Options of the suite op."""
    step: StepConfig = field(default_factory=StepConfig)
    """Options of the suite step."""


@dataclass(frozen=True)
class Outcome:
    """What a suite gives: a screen, rows, and a way to draw its picture."""

    screen: str
    rows: list[report.Row]
    picture: Callable[[], bytes]


Suite = Callable[[BenchConfig, Meter, dict[str, Any], float], Outcome]
"""Configuration, meter, the facts that rows carry, and seconds for the rounds."""


def run_op(config: BenchConfig, meter: Meter, facts: dict[str, Any], seconds: float) -> Outcome:
    """The suite "op"."""
    options = config.op
    if config.quick:
        options = dataclasses.replace(options, size=options.size or (QUICK_SIZE,), strides=options.strides or (QUICK_STRIDE,))
    result = measure_op(options, meter, seconds, lambda text: print(f"op {text}", file=sys.stderr, flush=True))
    return Outcome(report.screen(result, facts), report.rows(result, facts), lambda: report.picture(result, facts))


def run_step(config: BenchConfig, meter: Meter, facts: dict[str, Any], seconds: float) -> Outcome:
    """The suite "step"."""
    options = config.step
    if config.quick:
        options = dataclasses.replace(options, patch=options.patch or (QUICK_SIZE,) * 3,
                                      network_options=options.network_options or QUICK_NETWORK)
    result = step.run(options, meter, seconds, lambda text: print(f"step {text}", file=sys.stderr, flush=True))
    about = {**facts, "case": step.fields(result.config), "rounds": result.rounds}
    rows = [report.make_row(name, spread, unit, about) for name, (spread, unit) in step.values(result).items()]
    return Outcome(step.screen(result), rows, lambda: step.picture(result))


SUITES: dict[str, Suite] = {"op": run_op, "step": run_step}


def bench(config: BenchConfig) -> Outcome:
    """Measure, print, write.

    Raises:
        InputError: an option that does not fit.
    """
    _check(config)
    device = choose_device(config.device)
    seconds = config.seconds or (QUICK_SECONDS if config.quick else SECONDS)
    threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        facts = {**machine.describe(device), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        begun = time.perf_counter()
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            outcome = SUITES[config.suite](config, Meter(device, rounds=config.rounds), facts, seconds)
    finally:
        torch.set_num_threads(threads)
    print(outcome.screen)
    if config.json is not None:
        with config.json.open("a") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in outcome.rows)
        print(f"{len(outcome.rows)} rows appended to {config.json}")
    if config.picture is not None:
        write_atomically(config.picture, outcome.picture())
        print(f"picture: {config.picture}")
    print(f"{time.perf_counter() - begun:.0f} s")
    return outcome


def _check(config: BenchConfig) -> None:
    """Tell before anything is measured what could not work."""
    if config.suite not in SUITES:
        raise InputError(f"--suite must be one of {', '.join(SUITES)}, got {config.suite!r}")
    for name, value in (("threads", config.threads), ("rounds", config.rounds)):
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    if config.seconds is not None and not config.seconds > 0:
        raise InputError(f"--seconds must be above 0, got {config.seconds}")
    for name, path in (("json", config.json), ("picture", config.picture)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise InputError(f"--{name} must be a file in a folder that is there, got {path}")


def main(argv: Sequence[str]) -> int:
    """The command ``bench``."""
    bench(tyro.cli(BenchConfig, args=argv, prog="dropgen-fast bench"))
    return 0
