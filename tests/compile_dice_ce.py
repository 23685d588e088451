"""Compile `dice_cross_entropy`'s Triton kernels for GPUs that need not be here: ``python compile_dice_ce.py 80 90 100``.

See compile_kernels.py.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from compile_kernels import empty, record, report

import dropgen_fast.kernels.dice_ce.triton as kernels


def launches_of(
    size: tuple[int, int, int] = (128, 128, 128), *, n: int = 2, classes: int = 16, dtype: torch.dtype = torch.float32,
    label_dtype: torch.dtype = torch.uint8, layout: str = "dense", include_background: bool = False,
) -> dict[str, list[Any]]:
    """The launches of a call and of its gradient."""
    scores, label = empty((n, classes, *size), dtype, layout), empty((n, 1, *size), label_dtype)
    loss, coefficients = empty((), torch.float32), empty((n, classes, 2), torch.float32)
    return {
        "forward": record(
            lambda: kernels.forward(scores, label, loss, coefficients, include_background=include_background), kernels),
        "backward": record(
            lambda: kernels.backward(loss, scores, label, coefficients, empty((n, classes, *size), dtype, layout)), kernels),
    }


BF16: dict[str, Any] = {"dtype": torch.bfloat16}
LAST: dict[str, Any] = {"layout": "last"}
HOT: dict[str, dict[str, Any]] = {
    f"{classes}{name}": {"classes": classes, **settings} for classes in (16, 4)
    for name, settings in (("", {}), (" bf16", BF16), (" last", LAST), (" bf16 last", {**BF16, **LAST}))
}
GENERAL: dict[str, dict[str, Any]] = {
    "half": {"dtype": torch.float16}, "background": {"include_background": True},
    **{str(dtype): {"label_dtype": dtype} for dtype in (torch.int8, torch.int16, torch.int32, torch.int64)},
    **{f"{classes}{name}": {"classes": classes, "dtype": torch.bfloat16, **settings} for classes in (2, 9, 14, 17, 105, 256)
       for name, settings in (("", {}), (" last", LAST))},
    "odd": {"size": (33, 41, 65), "n": 1}, "odd last": {"size": (33, 41, 65), "n": 1, **BF16, **LAST},
    "huge": {"size": (1024, 1024, 1024), "classes": 17, "n": 3, **BF16}, "one voxel": {"size": (1, 1, 1), "n": 1},
    "two voxels": {"size": (1, 1, 2), "n": 1, **LAST},
}

if __name__ == "__main__":
    report(launches_of, HOT, GENERAL, [int(word) for word in sys.argv[1:]])
