"""The suite "overview": where the time of a training goes on this machine, on one screen, and what to change.

The op on one case, the step with its parts, and the loader alone, each measured as its own suite does it, in less time.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dropgen_fast.bench import op, report, step
from dropgen_fast.bench.loading.volumes import make_store
from dropgen_fast.bench.measure import Meter, Spread
from dropgen_fast.bench.op import OpConfig, OpResult
from dropgen_fast.bench.report import Row
from dropgen_fast.bench.step import StepConfig, StepResult
from dropgen_fast.data.augmentation import AugmentationConfig
from dropgen_fast.data.pipeline import TrainingPipeline
from dropgen_fast.data.store import Store
from dropgen_fast.step import PARTS

SHARES = {"op": 0.2, "step": 0.6, "loader": 0.2}
"""Of the seconds for measuring."""
LOADER_CASES, LOADER_EDGE = 2, 1.5
"""Volumes of noise, and the longest edge of the largest in edges of the patch."""
LOADER_WARM, LOADER_GROUP, LOADER_LEAST = 4, 3, 5
"""Batches before the first is timed; batches that are timed together, since some lie ready; such groups at least."""
HEAVY = 0.25
"""Share of the step from which on a part that could be smaller is worth a word."""


@dataclass(frozen=True)
class OverviewResult:
    """What the three measured."""

    op: OpResult
    step: StepResult
    loader_ms: Spread
    """Of a batch, with nothing else running."""
    loader_threads: int


def run(
    op_config: OpConfig, step_config: StepConfig, meter: Meter, seconds: float,
    progress: Callable[[str], None] = lambda text: None,
) -> OverviewResult:
    """Measure for about `seconds`; compiling, warming up and preparing a store come on top.

    Raises:
        InputError: an option that does not fit.
    """
    if not op_config.strides:
        op_config = dataclasses.replace(op_config, strides=(2,))
    if len(op_config.dtypes) > 1:
        op_config = dataclasses.replace(op_config, dtypes=("bfloat16" if meter.device.type == "cuda" else "float32",))
    step_config = step.resolved(step_config, meter.device)
    of_step = step.run(step_config, meter, SHARES["step"] * seconds, lambda text: progress(f"step: {text}"))
    threads = torch.get_num_threads()
    progress("loader: a store of noise")
    loader = loader_ms(step_config, meter.device, threads, SHARES["loader"] * seconds)
    of_op = op.run(op_config, meter, SHARES["op"] * seconds, lambda text: progress(f"op {text}"))
    return OverviewResult(of_op, of_step, loader, threads)


def loader_ms(config: StepConfig, device: torch.device, threads: int, seconds: float) -> Spread:
    """Milliseconds of a batch of the paper's recipe from a store of noise that the page cache holds."""
    assert config.patch is not None
    assert config.batch is not None
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(make_store(Path(folder), config.patch, cases=LOADER_CASES, seed=0, workers=1,
                                      edges=(max(config.patch), int(LOADER_EDGE * max(config.patch)))))
        pipeline = TrainingPipeline(store, patch=config.patch, batch_size=config.batch, seed=0,
                                    augmentation=AugmentationConfig(), num_threads=threads,
                                    device=device.index or 0 if device.type == "cuda" else None)
        for _ in range(LOADER_WARM):
            next(pipeline)
        times_ms: list[float] = []
        end = time.perf_counter() + seconds
        while len(times_ms) < LOADER_LEAST or time.perf_counter() < end:
            begun = time.perf_counter()
            for _ in range(LOADER_GROUP):
                next(pipeline)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times_ms.append(1e3 * (time.perf_counter() - begun) / LOADER_GROUP)
        return Spread.of(times_ms)


def rows(result: OverviewResult, facts: Mapping[str, Any]) -> list[Row]:
    """The rows of the op and of the step, and those of the loader."""
    about = {**facts, "case": step.fields(result.step.config), "rounds": result.step.rounds}
    own = {**step.values(result.step), "step.ms.loader": (result.loader_ms, "ms"),
           "step.patches_per_s": (patches_per_s(result), "patches/s")}
    return [*report.rows(result.op, facts), *(report.make_row(name, spread, unit, about) for name, (spread, unit) in own.items())]


def patches_per_s(result: OverviewResult) -> Spread:
    """Of DropGen's step with batches at hand."""
    ms, batch = result.step.ms["dropgen"], result.step.config.batch or 1
    return Spread(1e3 * batch / ms.median, 1e3 * batch / ms.high, 1e3 * batch / ms.low)


def screen(result: OverviewResult, facts: Mapping[str, Any]) -> str:
    """One screen: the machine, the op, the parts of the step, the ratios, what limits and what to change."""
    of_step, config = result.step, result.step.config
    d, h, w = config.patch or (0, 0, 0)
    whole = of_step.ms["dropgen"]
    lines = [*report.head(result.op, facts), *report.op_lines(result.op), "",
             f"step     {config.batch} patch{'es' if (config.batch or 1) > 1 else ''} of {d} × {h} × {w}, {config.classes} "
             f"classes, {config.precision}, extractor {config.extractor}, {of_step.rounds} rounds",
             f"         {'':<22}{'ms':>9}{'quartiles':>20}{'of the step':>14}"]
    shown = {"loader, alone": result.loader_ms, **{_TITLES[part]: of_step.parts["dropgen"][part] for part in PARTS},
             "step": whole}
    for title, spread in shown.items():
        lines.append(f"         {title:<22}{spread.median:>9.1f}{f'{spread.low:.1f} - {spread.high:.1f}':>20}"
                     f"{100 * spread.median / whole.median:>12.0f} %")
    rate = patches_per_s(result)
    lines += ["", f"patches  {rate.median:.2f} a second ({rate.low:.2f} - {rate.high:.2f})"]
    lines += [f"ratio    {_RATIOS.get(name, name):<34}{report.ratio_text(spread)}" for name, spread in of_step.ratios.items()]
    return "\n".join([*lines, "", f"limits   {advice(result, on_gpu=facts['driver'] is not None)}"])


def advice(result: OverviewResult, *, on_gpu: bool) -> str:
    """What limits the training here, and what to change: one line."""
    of_step, config = result.step, result.step.config
    whole = of_step.ms["dropgen"].median
    parts = {part: spread.median for part, spread in of_step.parts["dropgen"].items()}
    if result.loader_ms.median > whole:
        return (f"loading: {result.loader_ms.median:.0f} ms a batch, and {whole:.0f} ms to train on it: more --loader-threads "
                f"({result.loader_threads} here), or a faster disk (docs/loading.md)")
    if parts["extractor"] > HEAVY * whole:
        stride = next((s for s in config.strides if s > 1), None)
        told = f" (the step then takes {of_step.ms[f'dropgen_stride{stride}'].median / whole:.2f} of the time)" if stride else ""
        return (f"the extractor, {100 * parts['extractor'] / whole:.0f} % of the step: --extractor-stride {stride or 2}{told}; "
                "or another extractor")
    if parts["optimizer"] > HEAVY * whole:
        return (f"the optimizer, {100 * parts['optimizer'] / whole:.0f} % of the step: more patches a step (--batch-size, "
                "--accumulate)")
    network = f"the network, {100 * (parts['forward'] + parts['backward']) / whole:.0f} % of the step"
    if not on_gpu:
        return f"{network}, on a CPU: a GPU, or a smaller network (--network-options base_channels=…)"
    if not config.compile:
        return f"{network}: compile it (--compile True)"
    if config.precision != "bf16":
        return f"{network}: --precision bf16"
    return f"{network}: --cuda-graph where kernels are short, else a larger --batch-size or a smaller network"


_TITLES = {"extractor": "extractor", "fusion": "fusion", "forward": "network, forward", "backward": "network, backward",
           "optimizer": "optimizer"}
_RATIOS = {"dropgen_over_erm": "DropGen ÷ ERM", "x_recipe": "× the plain recipe", "x_recipe_compile": "× the recipe, compiled",
           **{f"dropgen_over_erm.stride{s}": f"DropGen ÷ ERM, extractor stride {s}" for s in (2, 3, 4, 8)}}
