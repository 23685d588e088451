"""The loss beside MONAI's DiceCELoss and MONAI's under torch.compile.

    python benchmarks/bench_dice_ce.py            ratios: what is compared runs interleaved (dropgen_fast/bench/measure.py)
    pytest benchmarks/bench_dice_ce.py --benchmark-only -k "channels-last-float32-ours"      to look into one case

Forward and backward of scores (1, 16, 192, 192, 128), the patch of the preset amos, with a label of random classes. Half scores
are taken to float32 for MONAI's, as a training loop does for its accuracy. The share of bandwidth is that of the compulsory
bytes (`compulsory_bytes`) over time against a plain copy in the same rounds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import tyro
from monai.losses import DiceCELoss
from torch import Tensor

from dropgen_fast.bench import machine
from dropgen_fast.bench.measure import Meter, Run, Spread
from dropgen_fast.device import choose_device
from dropgen_fast.kernels import memory
from dropgen_fast.kernels.dice_ce import dice_cross_entropy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last_3d}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DiceCeConfig:
    """Measure the loss beside MONAI's on this machine."""

    size: tuple[int, int, int] = (192, 192, 128)
    """Voxels of a patch."""
    classes: int = 16
    """With the background."""
    batch: int = 1
    """Patches."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of the scores."""
    layouts: tuple[str, ...] = ("channels-last", "contiguous")
    """Of the scores."""
    ways: tuple[str, ...] = ("ours", "monai", "monai-compile")
    """What is compared."""
    seconds: float = 30.0
    """For the rounds of each case; compiling and warming up come on top."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:<n>."""


def ours() -> Loss:
    """The op as it is."""
    return dice_cross_entropy


def monai() -> Loss:
    """MONAI's, of float32 scores."""
    loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    return lambda scores, label: loss(scores.float(), label)


def compiled() -> Loss:
    """The same under torch.compile."""
    torch.compiler.reset()
    return torch.compile(monai(), dynamic=False)


WAYS: dict[str, Callable[[], Loss]] = {"ours": ours, "monai": monai, "monai-compile": compiled}


def inputs(config: DiceCeConfig, dtype: str, layout: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scores that want a gradient, and a label."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(config.batch, config.classes, *config.size, generator=generator)
    label = torch.randint(config.classes, (config.batch, 1, *config.size), generator=generator, dtype=torch.uint8)
    scores = scores.to(device, DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
    return scores.requires_grad_(), label.to(device)


def compulsory_bytes(scores: Tensor, label: Tensor) -> int:
    """Forward the scores and the label are read, backward they are read again, and the gradient is written."""
    volume = scores.numel() * scores.element_size()
    return 3 * volume + 2 * label.numel() * label.element_size()


def run_of(loss: Loss, scores: Tensor, label: Tensor) -> Run:
    """Three marks: before, after the forward, after the backward."""
    def run(number: int, place: int, mark: Callable[[], None]) -> None:
        mark()
        value = loss(scores, label)
        mark()
        torch.autograd.grad(value, scores)
        mark()

    return run


def measure(config: DiceCeConfig, dtype: str, layout: str, meter: Meter) -> list[str]:
    """The lines of one case."""
    scores, label = inputs(config, dtype, layout, meter.device)
    runs = {name: run_of(WAYS[name](), scores, label) for name in config.ways}
    peaks: dict[str, int | None] = {}
    for name, run in runs.items():
        print(f"warming up {name}", file=sys.stderr, flush=True)
        for number in range(2):
            run(number, 0, lambda: None)
        memory.release()  # of the CPU: what waits for the next result would not count
        peaks[name] = meter.peak_bytes(lambda run=run: run(2, 0, lambda: None))  # type: ignore[misc]
    times = meter.interleave(runs, config.seconds)
    moved, copy = compulsory_bytes(scores, label), meter.copy_gb_s(times)
    lines = [f"{tuple(scores.shape)} {dtype} {layout}: {moved / 1e6:.0f} MB compulsory, copy {text(Spread.of(copy))} GB/s, "
             f"{times.rounds} rounds",
             f"{'':<14}{'forward ms':>24}{'backward ms':>24}{'both ms':>24}{'share of copy':>20}{'peak MiB':>10}"]
    for name in runs:
        parts = [Spread.of(times.ms(name, *marks)) for marks in ((0, 1), (1, 2), (0, 2))]
        share = Spread.of(moved / ms / 1e6 / rate for ms, rate in zip(times.ms(name, 0, 2), copy, strict=True))
        peak = peaks[name]
        lines.append(f"{name:<14}" + "".join(f"{text(part):>24}" for part in parts) + f"{text(share):>20}"
                     + f"{'-' if peak is None else f'{peak / 2**20:.0f}':>10}")
    if "ours" in runs:
        for name in (name for name in runs if name != "ours"):
            for what, marks in (("forward", (0, 1)), ("backward", (1, 2)), ("both", (0, 2))):
                ratio = Spread.of(a / b for a, b in zip(times.ms(name, *marks), times.ms("ours", *marks), strict=True))
                lines.append(f"{name} over ours, {what}: {text(ratio)} ({ratio.verdict()})")
    return lines


def text(spread: Spread) -> str:
    """Median and quartiles."""
    return f"{spread.median:.3g} ({spread.low:.3g}–{spread.high:.3g})"


def main() -> None:
    """The program."""
    config = tyro.cli(DiceCeConfig)
    device = choose_device(config.device)
    facts = machine.describe(device)
    print(", ".join(f"{key} {facts[key]}" for key in ("device", "threads", "load_average", "torch", "triton", "monai", "commit")))
    meter = Meter(device)
    for dtype in config.dtypes:
        for layout in config.layouts:
            print("\n".join(measure(config, dtype, layout, meter)), flush=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def bench_dice_ce(benchmark: Any, layout: str, dtype: str, way: str) -> None:
    """Forward and backward in one way."""
    scores, label = inputs(DiceCeConfig(), dtype, layout, DEVICE)
    loss = WAYS[way]()

    def run() -> None:
        torch.autograd.grad(loss(scores, label), scores)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{layout}.{dtype}"
    benchmark.pedantic(run, rounds=5, warmup_rounds=2)


if __name__ == "__main__":
    main()
