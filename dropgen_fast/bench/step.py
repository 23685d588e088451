"""The suite "step": an optimizer step of DropGen, of ERM, and of the method's recipe in plain torch, with batches at hand.

Each round runs one step of each way, on the same batch. Ours tells when each of its parts ends (`TrainingStep.observe`), so that
the parts are those of the very steps whose ratio is taken.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dropgen_fast.bench import extractor
from dropgen_fast.bench.measure import Meter, Run, Spread, Times
from dropgen_fast.bench.recipe import Recipe
from dropgen_fast.bench.report import ratio_text
from dropgen_fast.config import TrainConfig
from dropgen_fast.distributed import Ranks
from dropgen_fast.errors import InputError
from dropgen_fast.losses import build_loss
from dropgen_fast.model import DropGen, ModelConfig, build_model
from dropgen_fast.page import COLOURS, INK, plain_axes, to_png
from dropgen_fast.step import PARTS, Patches, TrainingStep

PATCHES = {"cpu": (64, 64, 64), "cuda": (128, 128, 128)}
BATCHES = {"cpu": 1, "cuda": 4}
PRECISIONS = {"cpu": "fp32", "cuda": "bf16"}
READY = 3  # batches, used in turn
Batch = tuple[Tensor, Tensor]
Variant = Literal["plain", "cached"]


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
    """As train's; of the anatomix family with random weights, on whose values no time depends."""
    strides: tuple[int, ...] = (1, 2)
    """Of the extractor; the first is compared with the recipe, which has stride 1."""
    variants: tuple[Variant, ...] = ()
    """Of DropGen's step at stride 1: plain, with the extractor as its plain definition; cached, with its features at hand."""
    network_options: tuple[str, ...] = ()
    """Of the paper's U-Net, as train's."""
    precision: str | None = None
    """bf16 or fp32; default fp32 on a CPU, bf16 on a GPU."""
    compile: bool | None = None
    """Compile our network and loss, and measure the recipe under torch.compile too; default: on a GPU."""


@dataclass(frozen=True)
class StepResult:
    """Milliseconds and ratios by name of the way."""

    config: StepConfig
    ms: Mapping[str, Spread]
    parts: Mapping[str, Mapping[str, Spread]]
    """Of each way that is ours, by name: milliseconds of each of `step.PARTS`."""
    ratios: Mapping[str, Spread]
    peak_bytes: Mapping[str, int | None]
    """On a GPU."""
    rounds: int


def resolved(config: StepConfig, device: torch.device) -> StepConfig:
    """The configuration with what the device decides."""
    kind = device.type
    chosen = StepConfig(
        patch=config.patch or PATCHES[kind], batch=config.batch or BATCHES[kind], classes=config.classes,
        extractor=config.extractor, strides=config.strides, variants=config.variants, network_options=config.network_options,
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
    batches = ready_batches(config, meter.device)
    runs = {name: way() for name, way in ways(config, meter.device, batches).items()}
    peaks: dict[str, int | None] = {}
    try:
        for name, way in runs.items():
            progress(f"warming up {name}")
            for number in range(2):
                way(number, 0, lambda: None)
            # On a CPU memory that one way has freed stays with the process, and the next would seem to take none.
            on_gpu = meter.device.type == "cuda"
            peaks[name] = meter.peak_bytes(lambda way=way: way(2, 0, lambda: None)) if on_gpu else None  # type: ignore[misc]
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise InputError(f"a step of {config.batch} patches of {config.patch} does not fit the memory of {meter.device}; "
                         "take a smaller --step.patch or --step.batch") from error
    times = meter.interleave(runs, seconds)
    ms = {name: Spread.of(times.ms(name, 0, -1)) for name in runs}
    parts = {name: {part: Spread.of(times.ms(name, k, k + 1)) for k, part in enumerate(PARTS)}
             for name in runs if not name.startswith("recipe")}
    return StepResult(config, ms, parts, _ratios(config, times), peaks, times.rounds)


def ways(config: StepConfig, device: torch.device, batches: Sequence[Batch]) -> dict[str, Callable[[], Run]]:
    """What is compared, by name; each is made when it is called."""
    found: dict[str, Callable[[], Run]] = {"erm": functools.partial(_ours, config, device, "erm", 1, batches)}
    for stride in config.strides:
        found[_name(stride)] = functools.partial(_ours, config, device, "dropgen", stride, batches)
    for variant in config.variants:
        found[f"dropgen_{variant}"] = functools.partial(_ours, config, device, "dropgen", 1, batches, variant)
    found["recipe"] = functools.partial(_recipe, config, device, batches, compiled=False)
    if config.compile:
        found["recipe_compile"] = functools.partial(_recipe, config, device, batches, compiled=True)
    return found


def screen(result: StepResult) -> str:
    """The result for a terminal."""
    config = result.config
    d, h, w = config.patch or (0, 0, 0)
    lines = [f"training step: {config.batch} patches of {d} × {h} × {w}, {config.classes} classes, {config.precision}, "
             f"extractor {config.extractor}, {result.rounds} rounds", f"{'':<18}{'ms':>10}{'quartiles':>20}{'peak GiB':>10}"]
    for name, spread in result.ms.items():
        peak = result.peak_bytes[name]
        lines.append(f"{name:<18}{spread.median:>10.1f}{f'{spread.low:.1f} - {spread.high:.1f}':>20}"
                     f"{'-' if peak is None else f'{peak / 2**30:.2f}':>10}")
    lines += ["", f"{'ms (share of the step)':<26}" + "".join(f"{part:>16}" for part in PARTS)]
    for name, parts in result.parts.items():
        cells = [f"{spread.median:.1f} ({100 * spread.median / result.ms[name].median:.0f} %)" for spread in parts.values()]
        lines.append(f"{name:<26}" + "".join(f"{cell:>16}" for cell in cells))
    lines.append("")
    for name, spread in result.ratios.items():
        lines.append(f"{name:<34}{ratio_text(spread)}")
    return "\n".join(lines)


def values(result: StepResult) -> dict[str, tuple[Spread, str]]:
    """Name of each row to its value and unit."""
    return ({f"step.ms.{name}": (spread, "ms") for name, spread in result.ms.items()}
            | {f"step.ms.{name}.{part}": (spread, "ms") for name, parts in result.parts.items() for part, spread in parts.items()}
            | {f"step.{name}": (spread, "ratio") for name, spread in result.ratios.items()})


def picture(result: StepResult) -> bytes:
    """The timeline of a step in each way, one part after the other, a PNG; whiskers are the quartiles of the whole."""
    figure = Figure(figsize=(9.2, 0.5 * len(result.ms) + 1.5), layout="constrained")
    axes = figure.subplots()
    for y, (name, whole) in enumerate(result.ms.items()):
        parts = result.parts.get(name)
        begin = 0.0
        for k, (part, ms) in enumerate(parts.items() if parts is not None else [("", whole)]):
            axes.barh(y, ms.median, left=begin, height=0.62, color=COLOURS[k] if part else COLOURS[6],
                      label=part if part and name == "erm" else None)
            begin += ms.median
        axes.errorbar(whole.median, y, xerr=[[whole.median - whole.low], [whole.high - whole.median]], color=INK, capsize=3)
    axes.set_yticks(range(len(result.ms)), list(result.ms))
    axes.invert_yaxis()
    axes.set_xlabel("ms, medians")
    figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=9)
    plain_axes(axes)
    return to_png(figure, 120)


def fields(config: StepConfig) -> dict[str, Any]:
    """As rows have it: what decides the time of a way, whatever it is compared with."""
    return {**{name: value for name, value in dataclasses.asdict(config).items() if name != "variants"}, "network": "unet"}


def _name(stride: int) -> str:
    return "dropgen" if stride == 1 else f"dropgen_stride{stride}"


def _ratios(config: StepConfig, times: Times) -> dict[str, Spread]:
    def over(one: str, other: str) -> Spread:
        return Spread.of(a / b for a, b in zip(times.ms(one, 0, -1), times.ms(other, 0, -1), strict=True))

    ratios = {("dropgen_over_erm" if s == 1 else f"dropgen_over_erm.stride{s}"): over(_name(s), "erm") for s in config.strides}
    ratios |= {f"dropgen_over_erm.{variant}": over(f"dropgen_{variant}", "erm") for variant in config.variants}
    ratios["x_recipe"] = over("recipe", "dropgen")
    if "recipe_compile" in times:
        ratios["x_recipe_compile"] = over("recipe_compile", "dropgen")
    return ratios


def ready_batches(config: StepConfig, device: torch.device) -> list[Batch]:
    """Noise and random labels: (image (N, 1, D, H, W), label of that shape), used in turn."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch or 1, 1, *(config.patch or ()))
    return [(torch.rand(shape, generator=generator).to(device),
             torch.randint(config.classes, shape, generator=generator, dtype=torch.uint8).to(device)) for _ in range(READY)]


def _model(config: StepConfig, device: torch.device, method: str, stride: int, *, plain: bool = False
           ) -> tuple[DropGen, TrainConfig]:
    assert config.patch is not None
    settings = ModelConfig(method=method, extractor=config.extractor, extractor_stride=stride,  # type: ignore[arg-type]
                           network_options=config.network_options, precision=config.precision)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = build_model(settings, image_channels=1, classes=config.classes, patch=config.patch,
                        extractor=extractor.frozen(config.extractor, stride, plain=plain)).to(device).train()
    return model, TrainConfig(store=Path(), out=Path(), model=settings, compile=config.compile)


def training_step(
    config: StepConfig, device: torch.device, method: str, stride: int, ranks: Ranks | None = None, *, plain: bool = False,
) -> TrainingStep:
    """Ours, with fresh weights.

    Args:
        config: resolved.
        device: of model and batches.
        method: as train's, such as "dropgen" or "erm".
        stride: of the extractor.
        ranks: processes that average their gradients; None: this one alone.
        plain: with the plain definition of the extractor.

    Raises:
        InputError: an extractor or a network that cannot be had, or that does not take the patch.
    """
    model, training = _model(config, device, method, stride, plain=plain)
    loss = build_loss(training.loss, training.loss_options, config.classes).to(device)
    return TrainingStep(model, loss, training, ranks or Ranks(device=device))


def _ours(config: StepConfig, device: torch.device, method: str, stride: int, batches: Sequence[Batch],
          variant: Variant | None = None) -> Run:
    step, numbers = training_step(config, device, method, stride, plain=variant == "plain"), itertools.count()
    ready: Sequence[Patches] = batches
    if variant == "cached":
        ready = [(image, label, _features(step.model, image)) for image, label in batches]

    def run(number: int, place: int, mark: Callable[[], None]) -> None:
        step.observe = lambda part: mark()
        mark()
        step([ready[number % len(ready)]], next(numbers))

    return run


def _features(model: DropGen, image: Tensor) -> Tensor:
    """As the step has them."""
    with torch.autocast(image.device.type, torch.bfloat16, enabled=model.fusion.dtype == torch.bfloat16):
        features = model.features(image)
    assert features is not None
    return features


def _recipe(config: StepConfig, device: torch.device, batches: Sequence[Batch], *, compiled: bool) -> Run:
    """The same network and weights in torch's own memory layout, and the extractor's plain definition: the reference's step."""
    model, _ = _model(config, device, "dropgen", 1)
    network = copy.deepcopy(model.network).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    features = extractor.definition(config.extractor).to(device) if config.extractor in extractor.NAMES else model.extractor
    recipe = Recipe(network, features, bf16=config.precision == "bf16")
    if compiled:
        network.compile()
        recipe.fused = torch.compile(recipe.fused)  # type: ignore[method-assign]

    def run(number: int, place: int, mark: Callable[[], None]) -> None:
        mark()
        recipe.step(*batches[number % len(batches)])
        mark()

    return run
