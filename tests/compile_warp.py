"""Compile `warp`'s Triton kernel for GPUs that need not be here: ``python compile_warp.py 80 90 100``; see compile_kernels.py."""

from __future__ import annotations

import sys
from typing import Any

import torch
from compile_kernels import empty, record, report

import dropgen_fast.kernels.warp.triton as kernels

SIZE = (128, 128, 128)


def launches_of(
    size: tuple[int, int, int] = SIZE, grid: tuple[int, int, int] | None = (8, 8, 8), *, n: int = 2, channels: int = 1,
    labels: int = 1, dtype: torch.dtype = torch.float32, label_dtype: torch.dtype = torch.uint8, border: bool = False,
) -> dict[str, list[Any]]:
    """The launches of a call; `grid` None: no displacement; `labels` 0: no label."""
    image = empty((n, channels, *size), dtype)
    label = empty((n, labels, *size), label_dtype) if labels else None
    displacement = empty((n, 3, *grid), torch.float32) if grid else None
    matrix = empty((n, 3, 4), torch.float32)
    return {"forward": record(lambda: kernels.warp(image, label, matrix, displacement, border=border), kernels)}


HOT: dict[str, dict[str, Any]] = {
    "elastic": {}, "affine": {"grid": None}, "half": {"dtype": torch.float16},
}
GENERAL: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": torch.bfloat16, "grid": None}, "channels": {"channels": 4}, "image alone": {"labels": 0, "grid": None},
    "dense": {"grid": SIZE}, "border": {"border": True}, "int16": {"label_dtype": torch.int16},
    "int32": {"label_dtype": torch.int32, "labels": 2}, "by 8": {"size": (40, 72, 72)}, "by 4": {"size": (40, 50, 100)},
    "odd": {"size": (33, 41, 65), "grid": (5, 7, 9), "n": 1}, "huge": {"size": (512, 512, 512), "channels": 17, "n": 3},
    "one voxel": {"size": (1, 1, 1), "grid": (1, 1, 1), "n": 1},
    **{f"one {axis}": {"size": tuple(1 if k == i else 32 for k in range(3)), "grid": tuple(1 if k == i else 4 for k in range(3))}
       for i, axis in enumerate("zyx")},
}

if __name__ == "__main__":
    report(launches_of, HOT, GENERAL, [int(word) for word in sys.argv[1:]])
