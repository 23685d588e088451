"""`mind_ssc` beside its plain form, eager and under torch.compile.

    pytest benchmarks/bench_mind_ssc.py --benchmark-only       a case at a time, for looking into one
    python benchmarks/bench_mind_ssc.py                        the ratios: ways interleaved, against a copy in the same rounds

A floor is the time in which a copy moves the bytes that a call must: the image read once, the result written once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import tyro
from torch import Tensor

from dropgen_fast.bench.extractor import timed, ways
from dropgen_fast.bench.measure import Meter, Spread
from dropgen_fast.cli import run
from dropgen_fast.errors import InputError
from dropgen_fast.kernels.mind_ssc import CHANNELS, mind_ssc

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = 45  # of a case


@dataclass(frozen=True)
class Case:
    """An image of n cubes."""

    n: int
    side_voxels: int

    @property
    def name(self) -> str:
        """Such as 2x96."""
        return f"{self.n}x{self.side_voxels}"

    def make(self) -> Tensor:
        """(n, 1, side, side, side) in [0, 1]."""
        g = torch.Generator().manual_seed(0)
        return torch.rand(self.n, 1, *[self.side_voxels] * 3, generator=g).to(DEVICE)

    @property
    def floor_bytes(self) -> int:
        """Float32 in, float32 out."""
        return 4 * (1 + CHANNELS) * self.n * self.side_voxels**3


CASES = (Case(1, 128), Case(2, 96), Case(1, 64))


@pytest.mark.parametrize("way", ["ours", "eager", "compile"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def bench_mind_ssc(benchmark: Any, case: Case, way: str) -> None:
    """One case in one way."""
    torch.compiler.reset()
    image, call = case.make(), ways("mind", DEVICE)[way]

    def once() -> None:
        call(image)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark.pedantic(once, rounds=10, warmup_rounds=2)


@dataclass(frozen=True)
class MindSscConfig:
    """`mind_ssc` beside its plain form: a line for each case, with the share of the floor's bandwidth."""

    cases: tuple[str, ...] = tuple(case.name for case in CASES)
    """Images and the edge of their cubes in voxels, as 2x96."""
    seconds: float = SECONDS
    """Of the rounds of a case."""


def main(argv: Sequence[str]) -> int:
    """The command."""
    config = tyro.cli(MindSscConfig, args=list(argv), prog="bench_mind_ssc.py")
    cases = [case_of(name) for name in config.cases]
    meter = Meter(DEVICE)
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU"
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for case in cases:
        torch.compiler.reset()
        image = case.make()
        calls = ways("mind", DEVICE)
        for call in calls.values():
            torch.testing.assert_close(call(image), mind_ssc(image), rtol=1e-4, atol=1e-5)
            call(image)
        times = meter.interleave({name: timed(call, [image], half=False) for name, call in calls.items()}, config.seconds)
        ms = {name: times.ms(name, 0, 1) for name in calls}
        words = [f"{name} {show(Spread.of(b / a for a, b in zip(ms['ours'], ms[name], strict=True)))} x"
                 for name in calls if name != "ours"]
        share = Spread.of(case.floor_bytes / a / 1e6 / copy for a, copy in zip(ms["ours"], meter.copy_gb_s(times), strict=True))
        print(f"{case.name}: {', '.join(words)}; {case.floor_bytes / 1e6:.0f} MB, {show(share)} of a copy's bandwidth; "
              f"ours {show(Spread.of(ms['ours']))} ms, {times.rounds} rounds", flush=True)
    return 0


def case_of(name: str) -> Case:
    """The case of that name; raises `InputError`."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
    if found is None:
        raise InputError(f"--cases must be such as 2x96, images and the edge of their cubes, got {name!r}")
    return Case(int(found[1]), int(found[2]))


def show(spread: Spread) -> str:
    """Median and quartiles."""
    return f"{spread.median:.3g} ({spread.low:.3g} to {spread.high:.3g})"


if __name__ == "__main__":
    sys.exit(run("bench_mind_ssc", main, sys.argv[1:]))
