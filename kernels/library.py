"""The native libraries, for the CPU and for CUDA: found, loaded, and their errors turned into Python's."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

PATHS = {"cpu": Path(__file__).parent / "libdropgen_fast.so", "cuda": Path(__file__).parent / "libdropgen_fast_cuda.so"}
ABSENT = {
    "cpu": "the native library was not built (reinstall without DROPGEN_FAST_NO_NATIVE, with a C++17 compiler)",
    "cuda": "the native library was built without CUDA (no nvcc was found, or DROPGEN_FAST_CUDA=0): reinstall where nvcc is",
}
# Numbered as enum Type of native.h.
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int16: 3, torch.uint8: 4}
# Numbered as the enums Status of the native sources; from CUDA_ERROR on they are CUDA's own.
STATUS = {1: "out of memory", 2: "an element type that the kernel does not know",
          3: "the native library was built from other sources; install again", 4: "the workspace is too small",
          5: "more voxels, channels or samples than the kernel counts"}
CUDA_ERROR = 1000


@lru_cache(maxsize=2)
def load(device: str = "cpu") -> tuple[ctypes.CDLL | None, str]:
    """The library for a type of device and "", or None and the reason why there is none."""
    path = PATHS[device]
    if not path.exists():
        return None, ABSENT[device]
    try:
        return _declared(ctypes.CDLL(str(path)), device), ""
    except OSError as first:
        # Its OpenMP symbols come from the runtime that torch loaded; a torch without one needs the system's.
        try:
            ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
            return _declared(ctypes.CDLL(str(path)), device), ""
        except OSError:
            return None, f"the native library does not load: {first}"


def _declared(library: ctypes.CDLL, device: str) -> ctypes.CDLL:
    if device == "cuda":
        library.dgf_cuda_error.restype = ctypes.c_char_p
    return library


def call(name: str, arguments: ctypes.Structure) -> None:
    """Call ``dgf_<name>`` on the CPU; the interpreter lock is released while it runs.

    Raises:
        RuntimeError: there is no library, or the kernel failed.
    """
    library = _loaded("cpu")
    try:
        entry = getattr(library, f"dgf_{name}")
    except AttributeError as error:
        raise RuntimeError(f"{name}: {STATUS[3]}") from error
    if status := entry(ctypes.byref(arguments)):
        raise RuntimeError(f"{name}: {STATUS.get(status, f'status {status}')}")


def call_cuda(
    name: str, workspace_name: str, arguments: ctypes.Structure, device: torch.device, library: ctypes.CDLL | None = None,
) -> None:
    """Launch ``dgf_<name>`` on the stream that `arguments` holds; the current device must be `device`.

    Its workspace, of as many bytes as ``dgf_<workspace_name>`` says, comes from torch: no call allocates by itself, so a
    graph can capture it. What goes wrong while a kernel runs is raised by a later call of CUDA, as with torch's own.

    Raises:
        RuntimeError: there is no library, or the launch failed.
    """
    library = library or _loaded("cuda")
    size_of = getattr(library, f"dgf_{workspace_name}")
    size_of.restype = ctypes.c_int64
    size = max(0, size_of(ctypes.byref(arguments)))
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    pointer = ctypes.c_void_p(workspace.data_ptr() if size else None)
    if status := getattr(library, f"dgf_{name}")(ctypes.byref(arguments), pointer, ctypes.c_int64(size)):
        words = library.dgf_cuda_error(status).decode() if status >= CUDA_ERROR else STATUS.get(status, f"status {status}")
        raise RuntimeError(f"{name}: {words}")


def _loaded(device: str) -> ctypes.CDLL:
    library, reason = load(device)
    if library is None:
        raise RuntimeError(reason)
    return library


class NativeTensor(ctypes.Structure):
    """A tensor (N, C, D, H, W) as the library sees it: address, element type, strides in elements."""

    _fields_ = (("data", ctypes.c_void_p), ("type", ctypes.c_int32), ("strides", ctypes.c_int64 * 5))

    @classmethod
    def of(cls, tensor: Tensor | None) -> NativeTensor:
        """Describe a tensor without copying it; None is a null address."""
        if tensor is None:
            return cls()
        return cls(tensor.data_ptr(), TYPES[tensor.dtype], (ctypes.c_int64 * 5)(*tensor.stride()))
