"""`intensity_chain` in C++ on the CPU: hands tensors to native.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import library
from .parameters import IntensityParameters


class Arguments(ctypes.Structure):
    """IntensityChainArguments of native.h, field by field."""

    _fields_ = (
        ("bytes", ctypes.c_int64), ("batch", ctypes.c_int64), ("channels", ctypes.c_int64), ("size", ctypes.c_int64 * 3),
        ("image", ctypes.c_void_p), ("out", ctypes.c_void_p), ("seed", ctypes.c_void_p), ("noise_std", ctypes.c_void_p),
        ("rician_std", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("gamma", ctypes.c_void_p),
        ("brightness", ctypes.c_void_p), ("contrast", ctypes.c_void_p), ("rescale", ctypes.c_void_p),
        ("image_type", ctypes.c_int32), ("threads", ctypes.c_int32),
    )


class NormalArguments(ctypes.Structure):
    """StandardNormalArguments of native.h, field by field."""

    _fields_ = (
        ("bytes", ctypes.c_int64), ("batch", ctypes.c_int64), ("size", ctypes.c_int64), ("seed", ctypes.c_void_p),
        ("out", ctypes.c_void_p), ("stream", ctypes.c_int32), ("threads", ctypes.c_int32),
    )


MISSING = library.load()[1]
"""Why this backend cannot be had here, or ""."""


def refuses(tensor: Tensor) -> str:
    """Why this backend cannot take this tensor, or ""."""
    return "" if tensor.device.type == "cpu" else f"it runs on the CPU, and a tensor is on {tensor.device}"


def intensity_chain(image: Tensor, parameters: IntensityParameters, out: Tensor) -> None:
    """Write `out` (N, C, D, H, W); both contiguous; see `dropgen_fast.kernels.intensity_chain`."""
    held = {name: getattr(parameters, name).contiguous() for name in (
        "seed", "noise_std", "rician_std", "bias", "gamma", "brightness", "contrast", "rescale")}
    library.call("intensity_chain", Arguments(
        bytes=ctypes.sizeof(Arguments), batch=image.shape[0], channels=image.shape[1],
        size=(ctypes.c_int64 * 3)(*image.shape[2:]), image=image.data_ptr(), out=out.data_ptr(),
        image_type=library.TYPES[image.dtype], threads=torch.get_num_threads(),
        **{name: tensor.data_ptr() for name, tensor in held.items()}))


def standard_normal(seed: Tensor, stream: int, out: Tensor) -> None:
    """Write `out` (N, …), contiguous."""
    seed = seed.contiguous()
    library.call("standard_normal", NormalArguments(
        bytes=ctypes.sizeof(NormalArguments), batch=len(seed), size=out[0].numel(), seed=seed.data_ptr(), out=out.data_ptr(),
        stream=stream, threads=torch.get_num_threads()))
