"""The cases of ``python -m dropgen_fast.bench --suite step`` through pytest-benchmark: one optimizer step of each way.

    pytest benchmarks/bench_step.py --benchmark-only

Ways run one after the other here, not interleaved, so take ratios from the command.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dropgen_fast.bench import step
from dropgen_fast.bench.measure import Run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = step.resolved(step.StepConfig(), DEVICE)
BATCHES = step.ready_batches(CONFIG, DEVICE)
WAYS: dict[str, Callable[[], Run]] = step.ways(CONFIG, DEVICE, BATCHES)


@pytest.mark.parametrize("way", WAYS)
def bench_step(benchmark: Any, way: str) -> None:
    """One step, its batch at hand."""
    torch.compiler.reset()
    run, number = WAYS[way](), 0

    def once() -> None:
        nonlocal number
        run(number, 0, lambda: None)
        number += 1
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = "step"
    benchmark.pedantic(once, rounds=5, warmup_rounds=2)
