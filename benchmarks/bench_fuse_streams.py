"""`fuse_streams` beside what a user would write instead: the recipe in eager torch, and under torch.compile.

    pytest benchmarks --benchmark-only

Each case runs N = 2, 96³ voxels, one image channel and 16 feature channels, p = 0.75, the features on the image's grid
or 2 or 4 times coarser. Compare the rows of one run with each other: absolute times depend on the machine and its load.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dropgen_fast import fuse_streams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE, FEATURES, RATE = 96, 16, 0.75


def recipe(image: Tensor, features: Tensor) -> Tensor:
    """Steps 1 to 4 of the method, as the reference writes them."""
    lo, hi = image.amin((1, 2, 3, 4), keepdim=True), image.amax((1, 2, 3, 4), keepdim=True)
    if features.shape[2:] != image.shape[2:]:
        features = F.interpolate(features, size=image.shape[2:], mode="trilinear", align_corners=False)
    return F.dropout3d(torch.cat([((image - lo) / (hi - lo)).to(features.dtype), F.instance_norm(features)], 1), RATE)


def fused(image: Tensor, features: Tensor) -> Tensor:
    """The op."""
    return fuse_streams(image, features, p=RATE)


WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fused": fused, "eager": recipe, "compiled": torch.compile(recipe, dynamic=False)}


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS)
def bench_fuse_streams(benchmark: Callable[..., None], way: str, stride: int, dtype: torch.dtype, direction: str) -> None:
    """One way of fusing, forward alone or forward and backward to the features."""
    torch.manual_seed(0)
    image = torch.randn(2, 1, SIZE, SIZE, SIZE, device=DEVICE)
    features = torch.randn(2, FEATURES, *[SIZE // stride] * 3, device=DEVICE, dtype=dtype, requires_grad=direction == "both")

    def run() -> None:
        out = WAYS[way](image, features)
        if direction == "both":
            features.grad = None
            out.backward(out.detach())
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    run()  # compiles
    benchmark.group = f"{direction}, {str(dtype).removeprefix('torch.')}, stride {stride}"
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
