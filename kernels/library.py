"""The native library: found, loaded, and its errors turned into Python's."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

PATH = Path(__file__).parent / "libdropgen_fast.so"
# Numbered as enum Type of native.h.
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int16: 3, torch.uint8: 4}
STATUS = {1: "out of memory", 2: "an element type that the kernel does not know",
          3: "the native library was built from other sources; install again"}


@lru_cache(maxsize=1)
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library and "", or None and the reason why there is none."""
    if not PATH.exists():
        return None, "the native library was not built (reinstall without DROPGEN_FAST_NO_NATIVE, with a C++17 compiler)"
    try:
        return ctypes.CDLL(str(PATH)), ""
    except OSError as first:
        # Its OpenMP symbols come from the runtime that torch loaded; a torch without one needs the system's.
        try:
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(PATH)), ""
        except OSError:
            return None, f"the native library does not load: {first}"


def call(name: str, arguments: ctypes.Structure) -> None:
    """Call ``dgf_<name>``; the interpreter lock is released while it runs.

    Raises:
        RuntimeError: there is no library, or the kernel failed.
    """
    library, reason = load()
    if library is None:
        raise RuntimeError(reason)
    if status := getattr(library, f"dgf_{name}")(ctypes.byref(arguments)):
        raise RuntimeError(f"{name}: {STATUS.get(status, f'status {status}')}")


class NativeTensor(ctypes.Structure):
    """A tensor (N, C, D, H, W) as the library sees it: address, element type, strides in elements."""

    _fields_ = (("data", ctypes.c_void_p), ("type", ctypes.c_int32), ("strides", ctypes.c_int64 * 5))

    @classmethod
    def of(cls, tensor: Tensor | None) -> NativeTensor:
        """Describe a tensor without copying it; None is a null address."""
        if tensor is None:
            return cls()
        return cls(tensor.data_ptr(), TYPES[tensor.dtype], (ctypes.c_int64 * 5)(*tensor.stride()))
