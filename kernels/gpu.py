"""What the ops' Triton backends share: whether Triton is here, the device to launch on, and small tensors sent from the host."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

try:
    import triton
except ImportError:  # the other backends do without
    triton = None

__all__ = ["INTERPRETED", "MISSING", "on_device_of", "sent"]

MISSING = "" if triton is not None else "Triton is not installed"
"""Why no Triton backend can be had here, or ""."""
INTERPRETED = triton is not None and triton.knobs.runtime.interpret
"""Whether Triton's kernels are defined for its interpreter, which runs on the CPU (TRITON_INTERPRET=1)."""


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Makes the tensor's device the current one, on which Triton launches and CUDA makes its contexts."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without waiting for what is queued there; a tensor that lies there is returned as it is.

    CUDA copies from pageable memory may wait for the stream, whatever ``non_blocking`` says; from pinned memory they do not.
    So the tensor is first copied to pinned memory, which torch's allocator keeps from call to call and gives to nobody else
    before the transfer is done. Only where that memory has to grow, as in the first calls, may the host wait. A CUDA graph
    must not capture this: it would read the pinned copy, which another call may own by then, each time it is replayed.
    """
    if tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
