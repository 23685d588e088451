"""`dice_cross_entropy` in C++ on the CPU: hands tensors to native.cpp."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import library

MOST_CLASSES = 128

MISSING = library.load()[1]
"""Why this backend cannot be had here, or "". Found at import: torch.compile traces the choice of a backend."""


class Arguments(ctypes.Structure):
    """DiceCeArguments of native.h, field by field."""

    _fields_ = (
        ("bytes", ctypes.c_int64), ("batch", ctypes.c_int64), ("classes", ctypes.c_int64), ("voxels", ctypes.c_int64),
        ("scores", ctypes.c_void_p), ("label", ctypes.c_void_p), ("loss", ctypes.c_void_p), ("coefficients", ctypes.c_void_p),
        ("grad", ctypes.c_void_p), ("grad_scores", ctypes.c_void_p),
        ("type", ctypes.c_int32), ("label_bytes", ctypes.c_int32), ("channels_last", ctypes.c_int32),
        ("first_class", ctypes.c_int32), ("threads", ctypes.c_int32),
    )


def refuses(scores: Tensor) -> str:
    """Why this backend cannot take a call with these scores, or ""."""
    if MISSING:
        return MISSING
    if scores.device.type != "cpu":
        return f"it runs on the CPU, and the scores are on {scores.device}"
    if scores.shape[1] > MOST_CLASSES:
        return f"it takes {MOST_CLASSES} classes, and the scores have {scores.shape[1]}"
    return ""


def forward(scores: Tensor, label: Tensor, loss: Tensor, coefficients: Tensor, *, include_background: bool) -> None:
    """Write `loss` () and `coefficients` (N, C, 2); scores are dense, contiguous or channels-last, the label contiguous."""
    arguments = _arguments(scores, label, coefficients)
    arguments.loss, arguments.first_class = loss.data_ptr(), int(not include_background)
    library.call("dice_ce_forward", arguments)


def backward(grad: Tensor, scores: Tensor, label: Tensor, coefficients: Tensor, grad_scores: Tensor) -> None:
    """Write `grad_scores`, dense as the scores are."""
    arguments = _arguments(scores, label, coefficients)
    arguments.grad, arguments.grad_scores = grad.data_ptr(), grad_scores.data_ptr()
    library.call("dice_ce_backward", arguments)


def _arguments(scores: Tensor, label: Tensor, coefficients: Tensor) -> Arguments:
    return Arguments(
        bytes=ctypes.sizeof(Arguments), batch=scores.shape[0], classes=scores.shape[1], voxels=label[0].numel(),
        scores=scores.data_ptr(), label=label.data_ptr(), coefficients=coefficients.data_ptr(),
        type=library.TYPES[scores.dtype], label_bytes=label.element_size(), channels_last=not scores.is_contiguous(),
        threads=torch.get_num_threads())
