"""`mind_ssc` in C++ on the CPU: hands tensors to native.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import library

FURTHEST = 64  # voxels: a thread's memory grows with the radius, the dilation and their product

MISSING = library.load()[1]
"""Why this backend cannot be had here, or "". Found at import: torch.compile traces the choice of a backend."""


class Arguments(ctypes.Structure):
    """MindSscArguments of native.h, field by field."""

    _fields_ = (
        ("bytes", ctypes.c_int64), ("batch", ctypes.c_int64), ("size", ctypes.c_int64 * 3),
        ("radius", ctypes.c_int64), ("dilation", ctypes.c_int64),
        ("image", ctypes.c_void_p), ("out", ctypes.c_void_p),
        ("image_type", ctypes.c_int32), ("out_type", ctypes.c_int32), ("threads", ctypes.c_int32),
    )


def refuses(image: Tensor, radius: int, dilation: int) -> str:
    """Why this backend cannot take a call, or ""."""
    if MISSING:
        return MISSING
    if image.device.type != "cpu":
        return f"it runs on the CPU, and the image is on {image.device}"
    if image.dtype not in library.TYPES:
        return f"it has no kernel for {image.dtype}"
    if max(radius, dilation) > FURTHEST:
        return f"it looks up to radius {FURTHEST} and dilation {FURTHEST}, and they are {radius} and {dilation}"
    return ""


def mind_ssc(image: Tensor, out: Tensor, *, radius: int, dilation: int) -> None:
    """Write `out` (N, 12, D, H, W); both contiguous. See the public `mind_ssc`."""
    library.call("mind_ssc", Arguments(
        bytes=ctypes.sizeof(Arguments), batch=image.shape[0], size=(ctypes.c_int64 * 3)(*image.shape[2:]),
        radius=radius, dilation=dilation, image=image.data_ptr(), out=out.data_ptr(),
        image_type=library.TYPES[image.dtype], out_type=library.TYPES[out.dtype], threads=torch.get_num_threads(),
    ))
