"""The suite "extractor": features of the frozen extractors, beside their plain definitions, eager and under torch.compile.

Ways that are compared, with the same weights and images:
  ours     what `load_extractor` gives and a training step runs: on a GPU that compiles it, under torch.compile
  eager    the definition as one would write it: for the anatomix family the U-Net of modules, for mind plain torch
  compile  that definition under torch.compile, static shapes, no graph break

Weights are random: no arithmetic depends on their values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from dropgen_fast.bench.measure import Meter, Run, Spread, Times
from dropgen_fast.bench.report import ratio_text
from dropgen_fast.errors import InputError
from dropgen_fast.features import FrozenExtractor, anatomix, load_extractor
from dropgen_fast.features.folded import FoldedUNet
from dropgen_fast.kernels.mind_ssc import CHANNELS, reference
from dropgen_fast.networks import one_line
from dropgen_fast.page import plain_axes, to_png

SIZES = {"cpu": (96, 96, 96), "cuda": (128, 128, 128)}
BATCHES = {"cpu": 1, "cuda": 4}
PRECISIONS = {"cpu": "fp32", "cuda": "bf16"}
NAMES = (*anatomix.ARCHITECTURES, "mind")
READY = 3  # images, used in turn

Way = Callable[[Tensor], Tensor]


class PlainMIND(nn.Module):
    """The definition of `mind`, in plain torch."""

    def forward(self, image: Tensor) -> Tensor:
        """(N, 1, D, H, W) → (N, 12, D, H, W)."""
        return reference.mind_ssc(image, radius=1, dilation=1)


@dataclass(frozen=True)
class ExtractorConfig:
    """What is extracted from what."""

    names: tuple[str, ...] = ("anatomix", "mind")
    """Of anatomix, anatomix-dev and mind."""
    size: tuple[int, int, int] | None = None
    """Voxels; default 96³ on a CPU, 128³ on a GPU."""
    batch: int | None = None
    """Images; default 1 on a CPU, 4 on a GPU."""
    precision: str | None = None
    """bf16, under autocast as in training, or fp32; default fp32 on a CPU, bf16 on a GPU."""


@dataclass(frozen=True)
class ExtractorResult:
    """Milliseconds and ratios by ``<extractor>.<way>``."""

    config: ExtractorConfig
    ms: Mapping[str, Spread]
    ratios: Mapping[str, Spread]
    rounds: int
    problems: Mapping[str, str]
    """What could not be run, and why."""


def resolved(config: ExtractorConfig, device: torch.device) -> ExtractorConfig:
    """The configuration with what the device decides."""
    kind = device.type
    chosen = replace(config, size=config.size or SIZES[kind], batch=config.batch or BATCHES[kind],
                     precision=config.precision or PRECISIONS[kind])
    if chosen.precision not in ("bf16", "fp32"):
        raise InputError(f"--extractor.precision must be bf16 or fp32, got {chosen.precision!r}")
    if not chosen.names or any(name not in NAMES for name in chosen.names):
        raise InputError(f"--extractor.names must be of {', '.join(NAMES)}, got {' '.join(chosen.names)}")
    return chosen


def run(
    config: ExtractorConfig, meter: Meter, seconds: float, progress: Callable[[str], None] = lambda text: None,
) -> ExtractorResult:
    """Measure every way of each extractor, one extractor after the other, for about `seconds`; compiling comes on top.

    Raises:
        InputError: an option that does not fit, or an image too large for the memory.
    """
    config = resolved(config, meter.device)
    assert config.size is not None
    for name in config.names:
        frozen(name).check_patch(config.size)
    images = ready_images(config, meter.device)
    ms: dict[str, Spread] = {}
    ratios: dict[str, Spread] = {}
    problems: dict[str, str] = {}
    rounds = 0
    for name in config.names:
        runs: dict[str, Run] = {}
        for way, function in ways(name, meter.device).items():
            progress(f"{name}: warming up {way}")
            one = timed(function, images, half=config.precision == "bf16")
            try:
                for number in range(2):
                    one(number, 0, lambda: None)
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise InputError(f"{config.batch} images of {config.size} do not fit the memory of {meter.device}; take a "
                                 "smaller --extractor.size or --extractor.batch") from error
            except Exception as error:  # a compiler that is missing or fails, in its own words
                if way != "compile":
                    raise
                problems[f"{name}.{way}"] = one_line(error)
                continue
            runs[way] = one
        times = meter.interleave(runs, seconds / len(config.names))
        rounds = times.rounds
        ms |= {f"{name}.{way}": Spread.of(times.ms(way, 0, 1)) for way in runs}
        ratios |= _ratios(name, times)
    return ExtractorResult(config, ms, ratios, rounds, problems)


def screen(result: ExtractorResult) -> str:
    """The result for a terminal."""
    config = result.config
    d, h, w = config.size or (0, 0, 0)
    lines = [f"extractors: {config.batch} images of {d} × {h} × {w}, {config.precision}, {result.rounds} rounds",
             f"{'':<26}{'ms':>10}{'quartiles':>20}"]
    lines += [f"{name:<26}{spread.median:>10.1f}{f'{spread.low:.1f} - {spread.high:.1f}':>20}"
              for name, spread in result.ms.items()]
    lines += [f"{name:<34}{ratio_text(spread)}" for name, spread in result.ratios.items()]
    lines += [f"{name} could not be run: {problem}" for name, problem in result.problems.items()]
    return "\n".join(lines)


def values(result: ExtractorResult) -> dict[str, tuple[Spread, str]]:
    """Name of each row to its value and unit."""
    return ({f"extractor.{name}.ms": (spread, "ms") for name, spread in result.ms.items()}
            | {f"extractor.{name}": (spread, "ratio") for name, spread in result.ratios.items()})


def picture(result: ExtractorResult) -> bytes:
    """The times as bars, a PNG."""
    figure = Figure(figsize=(9.2, 0.5 * len(result.ms) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = list(reversed(list(result.ms)))
    spreads = [result.ms[name] for name in names]
    axes.barh(names, [s.median for s in spreads], color=["#0072B2" if n.endswith(".ours") else "#D55E00" for n in names],
              xerr=[[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]], capsize=3)
    axes.set_xlabel("ms, median and quartiles")
    plain_axes(axes)
    return to_png(figure, 120)


def ready_images(config: ExtractorConfig, device: torch.device) -> list[Tensor]:
    """Noise (N, 1, D, H, W) of a resolved configuration, used in turn."""
    generator = torch.Generator().manual_seed(0)
    shape = (config.batch or 1, 1, *(config.size or ()))
    return [torch.rand(shape, generator=generator).to(device) for _ in range(READY)]


def definition(name: str) -> nn.Module:
    """The definition of an extractor (N, 1, D, H, W) → (N, C, d, h, w), in evaluation mode, with random weights if it has any."""
    if name == "mind":
        return PlainMIND().eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return anatomix.build(name).eval().requires_grad_(False)


def frozen(name: str, stride: int = 1, *, plain: bool = False) -> FrozenExtractor:
    """The same as `load_extractor` gives it; of the anatomix family with the weights of `definition`.

    With `plain` the definition itself, as an extractor.
    """
    if plain and name not in NAMES:
        raise InputError(f"extractor {name} has no plain definition; there is one of {', '.join(NAMES)}")
    if not plain and name not in anatomix.ARCHITECTURES:
        return load_extractor(name, stride=stride)
    network: Any = definition(name)
    channels = CHANNELS if name == "mind" else anatomix.channels(name)
    return FrozenExtractor(network if plain else FoldedUNet(network), name=name, channels=channels, stride=stride, sha256="")


def ways(name: str, device: torch.device) -> dict[str, Way]:
    """What is compared, by name."""
    ours, plain = frozen(name).to(device), definition(name).to(device)
    if device.type == "cuda":
        ours.compile(dynamic=False)  # as `TrainingStep` does
    return {"ours": ours, "eager": plain, "compile": torch.compile(plain, fullgraph=True, dynamic=False)}


def _ratios(name: str, times: Times) -> dict[str, Spread]:
    def over(way: str) -> Spread:
        return Spread.of(a / b for a, b in zip(times.ms(way, 0, 1), times.ms("ours", 0, 1), strict=True))

    ratios = {f"{name}.x_plain": over("compile")} if "compile" in times else {}
    return ratios | {f"{name}.x_eager": over("eager")}


def timed(way: Way, images: list[Tensor], *, half: bool) -> Run:
    """A call as `Meter` runs it, under autocast to bfloat16 where `half` says so."""
    def run(number: int, place: int, mark: Callable[[], None]) -> None:
        image = images[number % len(images)]
        with torch.no_grad(), torch.autocast(image.device.type, torch.bfloat16) if half else contextlib.nullcontext():
            mark()
            way(image)
            mark()

    return run
