"""The cases of ``python -m dropgen_fast.bench --suite extractor`` through pytest-benchmark: features of one batch in each way.

    pytest benchmarks/bench_extractor.py --benchmark-only

Ways run one after the other here, not interleaved, so take ratios from the command.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dropgen_fast.bench import extractor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = extractor.resolved(extractor.ExtractorConfig(), DEVICE)
WAYS = ("ours", "eager", "compile")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", extractor.NAMES)
def bench_extractor(benchmark: Any, name: str, way: str) -> None:
    """One call, its image at hand."""
    torch.compiler.reset()
    (image, *_), call = extractor.ready_images(CONFIG, DEVICE), extractor.ways(name, DEVICE)[way]

    def once() -> None:
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=CONFIG.precision == "bf16"):
            call(image)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = name
    benchmark.pedantic(once, rounds=5, warmup_rounds=2)
