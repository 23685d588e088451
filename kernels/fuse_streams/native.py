"""`fuse_streams` in C++: hands tensors to native.cpp on the CPU, to native.cu on a GPU."""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from .. import library
from ..library import NativeTensor

# Numbered as the enums of native.h.
IMAGE_NORMS = {"minmax": 0, "none": 1, "window": 2, "zscore": 3}
FEATURE_NORMS = {"instance": 0, "unit": 1, "standard": 2, "none": 3}


class Arguments(ctypes.Structure):
    """FuseStreamsArguments of native.h, field by field."""

    _fields_ = (
        ("bytes", ctypes.c_int64), ("batch", ctypes.c_int64), ("image_channels", ctypes.c_int64),
        ("feature_channels", ctypes.c_int64),
        ("out_channels", ctypes.c_int64), ("size", ctypes.c_int64 * 3), ("coarse", ctypes.c_int64 * 3),
        ("image", NativeTensor), ("features", NativeTensor), ("out", NativeTensor),
        ("scale", ctypes.c_void_p), ("image_stats", ctypes.c_void_p), ("feature_stats", ctypes.c_void_p),
        ("grad_features", NativeTensor), ("grad_image", NativeTensor),
        ("image_norm", ctypes.c_int32), ("feature_norm", ctypes.c_int32), ("norm_a", ctypes.c_float),
        ("norm_b", ctypes.c_float), ("eps", ctypes.c_float), ("threads", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
    )


MISSING = library.load()[1]
"""Why this backend cannot be had here, or "". Found at import: torch.compile traces the choice of a backend."""
CUDA_MISSING = library.load("cuda")[1] if torch.version.cuda else "torch was built without CUDA"
"""The same of its CUDA half, which a torch without CUDA does not load."""
# What native.cu counts in 32 bits.
LONGEST_AXIS = 1 << 15
MOST_VOXELS = (1 << 31) - 1 - (1 << 20)


def refuses(tensors: list[Tensor]) -> str:
    """Why this backend cannot take these tensors, or ""."""
    for tensor in tensors:
        if tensor.device.type not in ("cpu", "cuda"):
            return f"it runs on the CPU and on CUDA, and a tensor is on {tensor.device}"
        if tensor.is_cuda and CUDA_MISSING:
            return CUDA_MISSING
        if tensor.dtype not in library.TYPES:
            return f"it has no kernel for {tensor.dtype}"
        if tensor.is_cuda and tensor.dim() == 5 and (
                math.prod(tensor.shape[2:]) > MOST_VOXELS or max(tensor.shape[2:]) > LONGEST_AXIS):
            return f"it counts the voxels of a channel in 32 bits on a GPU, and a tensor has {tuple(tensor.shape[2:])}"
    return ""


def forward(
    image: Tensor, features: Tensor | None, scale: Tensor, out: Tensor, image_stats: Tensor, feature_stats: Tensor, *,
    image_norm: tuple[str, float, float], feature_norm: str, eps: float,
) -> None:
    """Write `out` (N, C, D, H, W) and both statistics; see `fuse_streams`."""
    arguments = _arguments(image.shape[1], features, scale, out, image_stats, feature_stats, image_norm, feature_norm, eps)
    arguments.image = NativeTensor.of(image)
    _call("fuse_streams_forward", arguments, out)


def backward(
    grad: Tensor, image: Tensor | None, features: Tensor | None, scale: Tensor, image_stats: Tensor, feature_stats: Tensor,
    grad_image: Tensor | None, grad_features: Tensor | None, *,
    image_channels: int, image_norm: tuple[str, float, float], feature_norm: str, eps: float,
) -> None:
    """Write the gradients that are given, dense: `grad_image` in its type, `grad_features` in float32, on the CPU in its own."""
    arguments = _arguments(image_channels, features, scale, grad, image_stats, feature_stats, image_norm, feature_norm, eps)
    # Where the forward had features and this call needs no gradient to them, they still count as channels of the draw.
    arguments.feature_channels = scale.shape[1] - image_channels
    arguments.image, arguments.grad_image = NativeTensor.of(image), NativeTensor.of(grad_image)
    arguments.grad_features = NativeTensor.of(grad_features)
    _call("fuse_streams_backward", arguments, grad)


def _call(name: str, arguments: Arguments, tensor: Tensor) -> None:
    """On the device of `tensor`, on torch's current stream of it."""
    if not tensor.is_cuda:
        library.call(name, arguments)
        return
    with torch.cuda.device(tensor.device):
        arguments.stream = torch.cuda.current_stream(tensor.device).cuda_stream
        library.call_cuda(name, "fuse_streams_workspace", arguments, tensor.device)


def _arguments(
    image_channels: int, features: Tensor | None, scale: Tensor, out: Tensor, image_stats: Tensor, feature_stats: Tensor,
    image_norm: tuple[str, float, float], feature_norm: str, eps: float,
) -> Arguments:
    kind, norm_a, norm_b = image_norm
    size = out.shape[2:]
    grid = features.shape[2:] if features is not None else size
    return Arguments(
        bytes=ctypes.sizeof(Arguments), batch=out.shape[0], image_channels=image_channels, out_channels=out.shape[1],
        feature_channels=features.shape[1] if features is not None else 0,
        size=(ctypes.c_int64 * 3)(*size), coarse=(ctypes.c_int64 * 3)(*grid),
        features=NativeTensor.of(features), out=NativeTensor.of(out),
        scale=scale.data_ptr(), image_stats=image_stats.data_ptr(),
        feature_stats=feature_stats.data_ptr() if feature_stats.numel() else None,
        image_norm=IMAGE_NORMS[kind], feature_norm=FEATURE_NORMS[feature_norm], norm_a=norm_a, norm_b=norm_b, eps=eps,
        threads=torch.get_num_threads(),
    )
