"""The command: which suites there are, what is done with what they measured."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from dropgen_fast.bench import compare, extractor, machine, overview, report, step
from dropgen_fast.bench.extractor import ExtractorConfig
from dropgen_fast.bench.loading import suite as loading
from dropgen_fast.bench.loading.suite import LoadingConfig
from dropgen_fast.bench.measure import Meter, Spread
from dropgen_fast.bench.op import OpConfig
from dropgen_fast.bench.op import run as measure_op
from dropgen_fast.bench.page import page
from dropgen_fast.bench.step import StepConfig
from dropgen_fast.bench.trace import write_trace
from dropgen_fast.device import choose_device
from dropgen_fast.errors import InputError
from dropgen_fast.files import write_atomically
from dropgen_fast.presets import load_preset

SECONDS, QUICK_SECONDS = 36.0, 3.0
QUICK_SIZE, QUICK_STRIDE = 32, 2
QUICK_NETWORK = ("base_channels=4", "downsamplings=3")
ALL = "all"


@dataclass(frozen=True)
class BenchConfig:
    """Measure speed on this machine, side by side with what one would write instead, and keep it as rows."""

    suite: str = "overview"
    """What to measure. overview: the machine, the op on one case, the parts of a training step, the loader, and what limits;
    op: the fusion op on all its cases; extractor: the frozen extractors beside their plain definitions; loading: the loader
    beside MONAI's; step: an optimizer step of DropGen, of ERM and of the plain recipe; all: one after the other."""
    preset: str | None = None
    """A data set's preset: its patch and its number of classes are what is trained on."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:<n>."""
    threads: int | None = None
    """Threads of torch and of the op on the CPU; default torch's."""
    rounds: int | None = None
    """Rounds of every measurement; by default as many as --seconds allows."""
    seconds: float | None = None
    """For all rounds of a suite together; compiling and warming up come on top. Default 36, with --quick 3."""
    json: Path | None = None
    """File to which a row, a JSON object, is appended for each value."""
    html: Path | None = None
    """File for a page with the screens, the pictures and the rows."""
    picture: Path | None = None
    """File for the suite's picture as PNG: the op's roofline, or the timeline of a step."""
    trace: Path | None = None
    """File for a Chrome trace (chrome://tracing, Perfetto) of a few steps of DropGen, with the parts of each by name."""
    compare: Path | None = None
    """Earlier rows to hold these against, with a verdict on noise."""
    quick: bool = False
    """A smoke test: 32³ voxels, stride 2, a small network, few rounds, unless said otherwise; numbers that mean little."""
    op: Annotated[OpConfig, tyro.conf.arg(name="")] = field(default_factory=OpConfig)
    """Options of the suite op."""
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)
    """Options of the suite extractor."""
    loading: LoadingConfig = field(default_factory=LoadingConfig)
    """Options of the suite loading."""
    step: StepConfig = field(default_factory=StepConfig)
    """Options of the suite step."""


@dataclass(frozen=True)
class Outcome:
    """What a suite gives: a screen, rows, and ways to draw its pictures, by caption."""

    screen: str
    rows: list[report.Row]
    pictures: Mapping[str, Callable[[], bytes]]


Suite = Callable[[BenchConfig, Meter, dict[str, Any], float], Outcome]
"""Configuration, meter, the facts that rows carry, and seconds for the rounds."""


def run_overview(config: BenchConfig, meter: Meter, facts: dict[str, Any], seconds: float) -> Outcome:
    """The suite "overview"."""
    result = overview.run(config.op, config.step, meter, seconds, _progress("overview"))
    return Outcome(overview.screen(result, facts), overview.rows(result, facts),
                   {"Timeline of a step": lambda: step.picture(result.step),
                    "Roofline and bandwidth of the op": lambda: report.picture(result.op, facts)})


def run_op(config: BenchConfig, meter: Meter, facts: dict[str, Any], seconds: float) -> Outcome:
    """The suite "op"."""
    result = measure_op(config.op, meter, seconds, _progress("op"))
    return Outcome(report.screen(result, facts), report.rows(result, facts),
                   {"Roofline and bandwidth of the op": lambda: report.picture(result, facts)})


def run_extractor(config: BenchConfig, meter: Meter, facts: dict[str, Any], seconds: float) -> Outcome:
    """The suite "extractor"."""
    result = extractor.run(config.extractor, meter, seconds, _progress("extractor"))
    about = {**facts, "case": dataclasses.asdict(result.config), "rounds": result.rounds}
    return Outcome(extractor.screen(result), _rows(extractor.values(result), about),
                   {"Extractors beside their plain definitions": lambda: extractor.picture(result)})


def run_loading(config: BenchConfig, meter: Meter, facts: dict[str, Any], seconds: float) -> Outcome:
    """The suite "loading"."""
    result = loading.run(config.loading, meter.device, seconds, _progress("loading"), rounds=config.rounds,
                         threads=config.threads)
    about = {**facts, "case": loading.fields(result), "rounds": result.rounds}
    return Outcome(loading.screen(result), _rows(loading.values(result), about),
                   {"Loading beside MONAI's": lambda: loading.picture(result)})


def run_step(config: BenchConfig, meter: Meter, facts: dict[str, Any], seconds: float) -> Outcome:
    """The suite "step"."""
    result = step.run(config.step, meter, seconds, _progress("step"))
    about = {**facts, "case": step.fields(result.config), "rounds": result.rounds}
    return Outcome(step.screen(result), _rows(step.values(result), about),
                   {"Timeline of a step": lambda: step.picture(result)})


def _rows(values: Mapping[str, tuple[Spread, str]], about: Mapping[str, Any]) -> list[report.Row]:
    return [report.make_row(name, spread, unit, about) for name, (spread, unit) in values.items()]


SUITES: dict[str, Suite] = {"overview": run_overview, "op": run_op, "extractor": run_extractor, "loading": run_loading,
                            "step": run_step}


def bench(config: BenchConfig) -> Outcome:
    """Measure, print, write.

    Raises:
        InputError: an option that does not fit.
    """
    _check(config)
    before = compare.read_rows(config.compare) if config.compare is not None else None
    device = choose_device(config.device)
    config = _resolved(config)
    seconds = config.seconds or (QUICK_SECONDS if config.quick else SECONDS)
    threads = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        facts = {**machine.describe(device), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        begun = time.perf_counter()
        outcomes: dict[str, Outcome] = {}
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            # What the overview measures the suites measure again, on all cases.
            for suite in [name for name in SUITES if name != "overview"] if config.suite == ALL else [config.suite]:
                outcomes[suite] = SUITES[suite](config, Meter(device, rounds=config.rounds), facts, seconds)
                print(outcomes[suite].screen, flush=True)
            if config.trace is not None:
                write_trace(config.trace, config.step, device)
    finally:
        torch.set_num_threads(threads)
    whole = Outcome("\n".join(outcome.screen for outcome in outcomes.values()),
                    [row for outcome in outcomes.values() for row in outcome.rows],
                    {caption: draw for outcome in outcomes.values() for caption, draw in outcome.pictures.items()})
    _write(config, facts, outcomes, whole)
    if before is not None:
        print(f"\nbeside {config.compare}\n{compare.screen(whole.rows, before)}")
    print(f"{time.perf_counter() - begun:.0f} s")
    return whole


def _resolved(config: BenchConfig) -> BenchConfig:
    """The options with what --preset and --quick decide."""
    op, of_step = config.op, config.step
    if config.preset is not None:
        preset = load_preset(config.preset)
        classes = len(preset.classes) if preset.classes is not None else of_step.classes
        of_step = dataclasses.replace(of_step, patch=of_step.patch or preset.patch, classes=classes)
        op = dataclasses.replace(op, size=op.size or preset.patch or ())
    if config.quick:
        op = dataclasses.replace(op, size=op.size or (QUICK_SIZE,), strides=op.strides or (QUICK_STRIDE,))
        cube = (QUICK_SIZE,) * 3
        of_step = dataclasses.replace(of_step, patch=of_step.patch or cube,
                                      network_options=of_step.network_options or QUICK_NETWORK)
        config = dataclasses.replace(config, extractor=dataclasses.replace(config.extractor, size=config.extractor.size or cube),
                                     loading=dataclasses.replace(config.loading, patch=config.loading.patch or cube))
    return dataclasses.replace(config, op=op, step=of_step)


def _write(config: BenchConfig, facts: Mapping[str, Any], outcomes: Mapping[str, Outcome], whole: Outcome) -> None:
    """The files that were asked for."""
    if config.json is not None:
        with config.json.open("a") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in whole.rows)
        print(f"{len(whole.rows)} rows appended to {config.json}")
    if config.picture is not None:
        write_atomically(config.picture, next(iter(whole.pictures.values()))())
        print(f"picture: {config.picture}")
    if config.html is not None:
        pictures = {caption: draw() for caption, draw in whole.pictures.items()}
        screens = {suite: outcome.screen for suite, outcome in outcomes.items()}
        write_atomically(config.html, page("dropgen_fast bench", facts, screens, pictures, whole.rows))
        print(f"page: {config.html}")
    if config.trace is not None:
        print(f"trace: {config.trace}")


def _progress(suite: str) -> Callable[[str], None]:
    return lambda text: print(f"{suite} {text}", file=sys.stderr, flush=True)


def _check(config: BenchConfig) -> None:
    """Tell before anything is measured what could not work."""
    if config.suite not in (*SUITES, ALL):
        raise InputError(f"--suite must be one of {', '.join((*SUITES, ALL))}, got {config.suite!r}")
    for name, value in (("threads", config.threads), ("rounds", config.rounds)):
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    if config.seconds is not None and not config.seconds > 0:
        raise InputError(f"--seconds must be above 0, got {config.seconds}")
    for name, path in (("json", config.json), ("html", config.html), ("picture", config.picture), ("trace", config.trace)):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise InputError(f"--{name} must be a file in a folder that is there, got {path}")


def main(argv: Sequence[str]) -> int:
    """The command ``bench``."""
    bench(tyro.cli(BenchConfig, args=argv, prog="dropgen-fast bench"))
    return 0
