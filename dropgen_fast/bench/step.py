"""The suite "step": an optimizer step of DropGen, of ERM, and of the method's recipe in plain torch, with batches at hand."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dropgen_fast.bench.measure import Meter, Run, Spread, Times
from dropgen_fast.bench.recipe import Recipe
from dropgen_fast.config import TrainConfig
from dropgen_fast.distributed import Ranks
from dropgen_fast.errors import InputError
from dropgen_fast.losses import build_loss
from dropgen_fast.model import DropGen, ModelConfig, build_model
from dropgen_fast.step import TrainingStep

PATCHES = {"cpu": (64, 64, 64), "cuda": (128, 128, 128)}
BATCHES = {"cpu": 1, "cuda": 4}
PRECISIONS = {"cpu": "fp32", "cuda": "bf16"}
READY = 3  # batches, used in turn


@dataclass(frozen=True)
class StepConfig:
    """What is trained."""

    patch: tuple[int, int, int] | None = None
    """Voxels; default 64³ on a CPU, 128³ on a GPU."""
    batch: int | None = None
    """Patches; default 1 on a CPU, 4 on a GPU."""
    classes: int = 4
    """With the background."""
    extractor: str = "mind"
    """As train's."""
    strides: tuple[int, ...] = (1, 2)
    """Of the extractor; the first is compared with the recipe, which has stride 1."""
    network_options: tuple[str, ...] = ()
    """Of the paper's U-Net, as train's."""
    precision: str | None = None
    """bf16 or fp32; default fp32 on a CPU, bf16 on a GPU."""
    compile: bool | None = None
    """Compile our network and loss, and measure the recipe under torch.compile too; default: on a GPU."""


@dataclass(frozen=True)
class StepResult:
    """Milliseconds and ratios by name."""

    config: StepConfig
    ms: Mapping[str, Spread]
    ratios: Mapping[str, Spread]
    peak_bytes: Mapping[str, int | None]
    rounds: int


def resolved(config: StepConfig, device: torch.device) -> StepConfig:
    """The configuration with what the device decides."""
    kind = device.type
    chosen = StepConfig(
        patch=config.patch or PATCHES[kind], batch=config.batch or BATCHES[kind], classes=config.classes,
        extractor=config.extractor, strides=config.strides, network_options=config.network_options,
        precision=config.precision or PRECISIONS[kind], compile=kind == "cuda" if config.compile is None else config.compile)
    if chosen.precision not in ("bf16", "fp32"):
        raise InputError(f"--step.precision must be bf16 or fp32, got {chosen.precision!r}")
    if chosen.classes < 2 or not chosen.strides or 1 not in chosen.strides:
        raise InputError("--step.classes must be at least 2 and --step.strides must hold 1, "
                         f"got {chosen.classes} and {chosen.strides}")
    return chosen


def run(config: StepConfig, meter: Meter, seconds: float, progress: Callable[[str], None] = lambda text: None) -> StepResult:
    """Measure every way for about `seconds`; compiling and warming up come on top.

    Raises:
        InputError: an option that does not fit, or a step too large for the memory.
    """
    config = resolved(config, meter.device)
    batches = make_batches(config, meter.device)
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"erm": make_step(config, meter.device, "erm", 1)}
    for stride in config.strides:
        ways[_name(stride)] = make_step(config, meter.device, "dropgen", stride)
    ways["recipe"] = _recipe(config, meter.device, compiled=False)
    if config.compile:
        ways["recipe_compile"] = _recipe(config, meter.device, compiled=True)
    runs: dict[str, Run] = {name: _run(way, batches) for name, way in ways.items()}
    peaks: dict[str, int | None] = {}
    try:
        for name, way in runs.items():
            progress(f"warming up {name}")
            for number in range(2):
                way(number, 0, lambda: None)
            peaks[name] = meter.peak_bytes(lambda way=way: way(2, 0, lambda: None))  # type: ignore[misc]
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise InputError(f"a step of {config.batch} patches of {config.patch} does not fit the memory of {meter.device}; "
                         "take a smaller --step.patch or --step.batch") from error
    times = meter.interleave(runs, seconds)
    ms = {name: times.ms(name, 0, 1) for name in runs}
    spreads = {name: Spread.of(values) for name, values in ms.items()}
    return StepResult(config, spreads, _ratios(config, times), peaks, times.rounds)


def screen(result: StepResult) -> str:
    """The result for a terminal."""
    config = result.config
    d, h, w = config.patch or (0, 0, 0)
    lines = [f"training step: {config.batch} patches of {d} × {h} × {w}, {config.classes} classes, {config.precision}, "
             f"extractor {config.extractor}, {result.rounds} rounds", f"{'':<18}{'ms':>10}{'quartiles':>20}{'peak GiB':>10}"]
    for name, spread in result.ms.items():
        peak = result.peak_bytes[name]
        lines.append(f"{name:<18}{spread.median:>10.1f}{f'{spread.low:.1f} – {spread.high:.1f}':>20}"
                     f"{'-' if peak is None else f'{peak / 2**30:.2f}':>10}")
    for name, spread in result.ratios.items():
        text = {"claim": f"{spread.median:.2f}", "one": "no difference", "unclear": "unclear"}[spread.verdict()]
        lines.append(f"{name:<34}{text:>14}  ({spread.low:.2f} – {spread.high:.2f})")
    return "\n".join(lines)


def values(result: StepResult) -> dict[str, tuple[Spread, str]]:
    """Name of each row to its value and unit."""
    return ({f"step.ms.{name}": (spread, "ms") for name, spread in result.ms.items()}
            | {f"step.{name}": (spread, "ratio") for name, spread in result.ratios.items()})


def picture(result: StepResult) -> bytes:
    """The times as bars, a PNG."""
    figure = Figure(figsize=(7, 0.6 * len(result.ms) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = list(result.ms)[::-1]
    spreads = [result.ms[name] for name in names]
    axes.barh(names, [s.median for s in spreads], color=["#D55E00" if n.startswith("recipe") else "#0072B2" for n in names],
              xerr=[[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]], capsize=3)
    axes.set_xlabel("ms a step, median and quartiles")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    png = io.BytesIO()
    figure.savefig(png, dpi=120)
    return png.getvalue()


def fields(config: StepConfig) -> dict[str, Any]:
    """As rows have it."""
    return {**dataclasses.asdict(config), "network": "unet"}


def _name(stride: int) -> str:
    return "dropgen" if stride == 1 else f"dropgen_stride{stride}"


def _ratios(config: StepConfig, times: Times) -> dict[str, Spread]:
    def over(one: str, other: str) -> Spread:
        return Spread.of(a / b for a, b in zip(times.ms(one, 0, 1), times.ms(other, 0, 1), strict=True))

    ratios = {("dropgen_over_erm" if s == 1 else f"dropgen_over_erm.stride{s}"): over(_name(s), "erm") for s in config.strides}
    ratios["x_recipe"] = over("recipe", "dropgen")
    if "recipe_compile" in times:
        ratios["x_recipe_compile"] = over("recipe_compile", "dropgen")
    return ratios


def make_batches(config: StepConfig, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """`READY` batches of a resolved configuration: image (N, 1, D, H, W) in [0, 1] and label (N, 1, D, H, W) uint8, at random."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch or 1, 1, *(config.patch or ()))
    return [(torch.rand(shape, generator=generator).to(device),
             torch.randint(config.classes, shape, generator=generator, dtype=torch.uint8).to(device)) for _ in range(READY)]


def _model(config: StepConfig, device: torch.device, method: str, stride: int) -> tuple[DropGen, TrainConfig]:
    assert config.patch is not None
    settings = ModelConfig(method=method, extractor=config.extractor, extractor_stride=stride,  # type: ignore[arg-type]
                           network_options=config.network_options, precision=config.precision)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = build_model(settings, image_channels=1, classes=config.classes, patch=config.patch).to(device).train()
    return model, TrainConfig(store=Path(), out=Path(), model=settings, compile=config.compile)


def make_step(config: StepConfig, device: torch.device, method: str, stride: int, ranks: Ranks | None = None
              ) -> Callable[[Tensor, Tensor], Tensor]:
    """Our training step (image, label) → loss of a resolved configuration, with a model of its own.

    Args:
        config: patch, classes, extractor, network and precision.
        device: of model and batches.
        method: as train's, such as "dropgen" or "erm".
        stride: of the extractor.
        ranks: processes that average their gradients; None: this one alone.

    Raises:
        InputError: an extractor or a network that cannot be had, or that does not take the patch.
    """
    model, training = _model(config, device, method, stride)
    step = TrainingStep(model, build_loss(training.loss, training.loss_options, config.classes).to(device), training,
                        ranks or Ranks(device=device))
    number = iter(range(training.steps))
    return lambda image, label: step([(image, label)], next(number))


def _recipe(config: StepConfig, device: torch.device, *, compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """The same network, weights and extractor, in torch's own memory layout, as the reference trains it."""
    model, _ = _model(config, device, "dropgen", 1)
    network = copy.deepcopy(model.network).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    recipe = Recipe(network, model.extractor, bf16=config.precision == "bf16")
    if compiled:
        network.compile()
        recipe.fused = torch.compile(recipe.fused)  # type: ignore[method-assign]
    return recipe.step


def _run(way: Callable[[Tensor, Tensor], Any], batches: list[tuple[Tensor, Tensor]]) -> Run:
    def run(number: int, place: int, mark: Callable[[], None]) -> None:
        image, label = batches[number % len(batches)]
        mark()
        way(image, label)
        mark()

    return run
