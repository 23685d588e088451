"""`warp` in C++ on the CPU: hands tensors to native.cpp."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from .. import library, memory

MOST_VOXELS = 2**31 - 64  # of a channel, which native.cpp counts in 32 bits
LONGEST_AXIS = 2**20


MISSING = library.load()[1]
"""Why this backend cannot be had here, or ""."""


class Arguments(ctypes.Structure):
    """WarpArguments of native.h, field by field."""

    _fields_ = (
        ("bytes", ctypes.c_int64), ("batch", ctypes.c_int64), ("channels", ctypes.c_int64), ("labels", ctypes.c_int64),
        ("size", ctypes.c_int64 * 3), ("coarse", ctypes.c_int64 * 3),
        ("image", ctypes.c_void_p), ("out", ctypes.c_void_p), ("label", ctypes.c_void_p), ("label_out", ctypes.c_void_p),
        ("matrix", ctypes.c_void_p), ("displacement", ctypes.c_void_p),
        ("type", ctypes.c_int32), ("label_bytes", ctypes.c_int32), ("border", ctypes.c_int32), ("threads", ctypes.c_int32),
    )


def refuses(image: Tensor) -> str:
    """Why this backend cannot take a call with this image, or ""."""
    if MISSING:
        return MISSING
    if image.device.type != "cpu":
        return f"it runs on the CPU, and the image is on {image.device}"
    if math.prod(image.shape[2:]) >= MOST_VOXELS or max(image.shape[2:]) > LONGEST_AXIS:
        return f"it counts the voxels of a channel in 32 bits, and the image has {tuple(image.shape[2:])}"
    return ""


def warp(
    image: Tensor, label: Tensor | None, matrix: Tensor, displacement: Tensor | None, *, border: bool,
) -> tuple[Tensor, Tensor | None]:
    """See the public `warp`."""
    image, matrix = image.contiguous(), matrix.contiguous()
    label = label.contiguous() if label is not None else None
    displacement = displacement.contiguous() if displacement is not None else None
    out = memory.empty(tuple(image.shape), image.dtype)
    label_out = memory.empty(tuple(label.shape), label.dtype) if label is not None else None
    library.call("warp", Arguments(
        bytes=ctypes.sizeof(Arguments), batch=image.shape[0], channels=image.shape[1],
        labels=label.shape[1] if label is not None else 0, size=(ctypes.c_int64 * 3)(*image.shape[2:]),
        coarse=(ctypes.c_int64 * 3)(*(displacement.shape[2:] if displacement is not None else image.shape[2:])),
        image=image.data_ptr(), out=out.data_ptr(),
        label=label.data_ptr() if label is not None else None,
        label_out=label_out.data_ptr() if label_out is not None else None,
        matrix=matrix.data_ptr(), displacement=displacement.data_ptr() if displacement is not None else None,
        type=library.TYPES[image.dtype], label_bytes=label.element_size() if label is not None else 1,
        border=border, threads=torch.get_num_threads(),
    ))
    return out, label_out
