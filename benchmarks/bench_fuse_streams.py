"""The cases of ``python -m dropgen_fast.bench --suite op`` through pytest-benchmark, a group for each case and direction.

    pytest benchmarks --benchmark-only

For looking into one case: ``-k "float32-stride2-backward"``. Ways run one after the other here, not interleaved, so take
ratios and shares of bandwidth from the command.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch

from dropgen_fast.bench import op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAYS: dict[str, Callable[[op.Case], op.Way]] = {"ours": op.ours, "eager": op.eager, "compile": op.compiled, "monai": op.monai}


@lru_cache(maxsize=1)
def prepared(case: op.Case) -> tuple[op.Inputs, list[op.Draw]]:
    """Inputs and draws, kept for the next way of the same case."""
    return op.Inputs.make(case, DEVICE), op.draws(case, DEVICE)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("case", op.cases(op.OpConfig(), DEVICE), ids=lambda case: case.name.replace(".", "-"))
def bench_fuse_streams(benchmark: Any, case: op.Case, direction: str, way: str) -> None:
    """One direction of one case in one way."""
    torch.compiler.reset()
    call, (inputs, seeds), number = WAYS[way](case), prepared(case), 0

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal number
        torch.manual_seed(seeds[number % len(seeds)].seed)
        image, features = inputs.pair(number)
        gradient = inputs.gradients[number % len(inputs.gradients)]
        features = features.detach().requires_grad_(direction != "forward")
        number += 1
        out = call(image, features) if direction == "backward" else None
        synchronize()
        return (image, features, gradient, out), {}

    def run(image: torch.Tensor, features: torch.Tensor, gradient: torch.Tensor, out: torch.Tensor | None) -> None:
        if out is None:
            out = call(image, features)
        if direction != "forward":
            torch.autograd.grad(out, features, gradient)
        synchronize()

    benchmark.group = f"{case.name}.{direction}"
    with torch.random.fork_rng(devices=[DEVICE] if DEVICE.type == "cuda" else []):
        benchmark.pedantic(run, setup=setup, rounds=op.DRAWS, warmup_rounds=2)


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
