"""Compile `mind_ssc`'s Triton kernels for GPUs that need not be here: ``python compile_mind_ssc.py 80 90 100``."""

from __future__ import annotations

import sys
from typing import Any

import torch
from compile_kernels import empty, record, report

import dropgen_fast.kernels.mind_ssc.triton as kernels

SIZE = (128, 128, 128)


def launches_of(
    size: tuple[int, int, int] = SIZE, *, n: int = 2, radius: int = 1, dilation: int = 1,
    dtype: torch.dtype = torch.float32, image_dtype: torch.dtype = torch.float32,
) -> dict[str, list[Any]]:
    """The launches of a call."""
    image, out = empty((n, 1, *size), image_dtype), empty((n, 12, *size), dtype)
    return {"forward": record(lambda: kernels.mind_ssc(image, out, radius=radius, dilation=dilation), kernels)}


HOT: dict[str, dict[str, Any]] = {"float32": {}, "bfloat16": {"dtype": torch.bfloat16}}
GENERAL: dict[str, dict[str, Any]] = {
    "bfloat16 image": {"image_dtype": torch.bfloat16}, "half": {"dtype": torch.float16, "image_dtype": torch.float16},
    "int16": {"image_dtype": torch.int16}, "uint8": {"image_dtype": torch.uint8},
    "two apart": {"dilation": 2}, "radius 0": {"radius": 0}, "radius 2": {"radius": 2}, "radius 3": {"radius": 3, "dilation": 3},
    "odd": {"size": (33, 41, 65), "n": 1}, "huge": {"size": (1024, 1024, 1024), "n": 3}, "one voxel": {"size": (1, 1, 1), "n": 1},
    **{f"one {axis}": {"size": tuple(1 if k == i else 32 for k in range(3))} for i, axis in enumerate("zyx")},
}

if __name__ == "__main__":
    report(launches_of, HOT, GENERAL, [int(word) for word in sys.argv[1:]])
