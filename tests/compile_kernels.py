"""Compile Triton kernels for GPUs that need not be here; as a program, fuse_streams': ``compile_kernels.py 80 90 100``.

Every case is a call as users make it, on tensors without memory. Its launches are written down instead of run (`record`), and
compiled with the specialization that Triton's just-in-time compiler would give them (`report`): a number that is 1 is a
constant, pointers and numbers that 16 divides are marked so. Prints JSON lines: of each case which kernels are launched, of
each launch that differs from those before it the registers, the memory that registers were spilled to, and global loads and
stores by width. Other ops have a program of their own, which imports what is general from here.

A program of its own because Triton's interpreter, which the tests run in, takes the compiler's place in a process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import dropgen_fast.kernels.fuse_streams.triton as kernels

CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
TYPES = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
         torch.int32: "*i32", torch.int16: "*i16", torch.int8: "*i8", torch.uint8: "*u8"}
LAST = torch.channels_last_3d
Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


def empty(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "dense") -> Tensor:
    """A tensor without memory: "dense", channels-"last", a "crop" of a larger one."""
    if layout == "crop":
        return torch.empty(*(n + 2 for n in shape), dtype=dtype, device="meta")[tuple(slice(1, n + 1) for n in shape)]
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=LAST if layout == "last" else torch.contiguous_format)


class Recorder:
    """Takes a kernel's place and writes its launches down."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            if not all(0 < n < limit for n, limit in zip(grid, (2**31, 2**16, 2**16), strict=False)):
                raise ValueError(f"{self.kernel.__name__} was given the grid {grid}")
            self.launches.append((self.kernel, arguments, options))
        return launch


def record(call: Callable[[], Any], module: ModuleType) -> list[Launch]:
    """The launches that a call makes of the kernels that `module` defines."""
    launches: list[Launch] = []
    found = {name: value for name, value in vars(module).items() if isinstance(value, triton.JITFunction)}
    try:
        for name, kernel in found.items():
            setattr(module, name, Recorder(kernel, launches))
        call()
    finally:
        for name, kernel in found.items():
            setattr(module, name, kernel)
    return launches


def launches_of(
    size: tuple[int, ...] = (128, 128, 128), grid: tuple[int, ...] | None = None, *, n: int = 4, channels: int = 16,
    image_channels: int = 1, dtype: torch.dtype = torch.bfloat16, image_dtype: torch.dtype = torch.float32,
    image_layout: str = "dense", features_layout: str = "dense", grad_layout: str = "dense", out_layout: str = "dense",
    multiple: int = 1, image_norm: tuple[str, float, float] = ("minmax", 0.0, 0.0), feature_norm: str = "instance",
    backward: bool = True,
) -> dict[str, list[Launch]]:
    """Launches of the forward and of the backward to both inputs.

    `channels` 0: no features; `grid` None: features of the image's size.
    """
    grid = grid or size
    image = empty((n, image_channels, *size), image_dtype, image_layout)
    features = empty((n, channels, *grid), dtype, features_layout) if channels else None
    streams = image_channels + channels
    scale, image_stats = empty((n, streams), torch.float32), empty((n, 2), torch.float32)
    feature_stats = empty((n, channels, 2) if feature_norm == "instance" else (n, 2, *grid), torch.float32)
    result = (n, -(-streams // multiple) * multiple, *size)
    norms: dict[str, Any] = {"image_norm": image_norm, "feature_norm": feature_norm, "eps": 1e-5}
    out = empty(result, dtype, out_layout)
    found = {"forward": record(
        lambda: kernels.forward(image, features, scale, out, image_stats, feature_stats, **norms), kernels)}
    if backward:
        grad = empty((), dtype).expand(result) if grad_layout == "expanded" else empty(result, dtype, grad_layout)
        found["backward"] = record(lambda: kernels.backward(
            grad, image, features, scale, image_stats, feature_stats, empty(tuple(image.shape), image_dtype),
            empty(tuple(features.shape), torch.float32) if features is not None else None,
            image_channels=image_channels, **norms), kernels)
    return found


HALF, QUARTER, ODD = (64, 64, 64), (32, 32, 32), (48, 48, 48)
FLOAT: dict[str, Any] = {"dtype": torch.float32}
WIDE: dict[str, Any] = {"out_layout": "last", "features_layout": "last", "grad_layout": "last", "multiple": 8, "backward": False}
HOT: dict[str, dict[str, Any]] = {
    "same": {}, "same float32": FLOAT,
    "half": {"grid": HALF}, "half float32": {"grid": HALF, **FLOAT},
    "quarter": {"grid": QUARTER}, "arbitrary": {"grid": ODD},
    "last same": WIDE, "last half": {"grid": HALF, **WIDE},
    "last half of dense": {"grid": HALF, **WIDE, "features_layout": "dense"},
}
GENERAL: dict[str, dict[str, Any]] = {
    "quarter float32": {"grid": QUARTER, **FLOAT}, "arbitrary float32": {"grid": ODD, **FLOAT},
    "eighth": {"grid": (16, 16, 16)}, "third": {"size": (96, 96, 96), "grid": (32, 32, 32)},
    "flat z": {"grid": (128, 64, 64)}, "flat y": {"grid": (64, 128, 64)}, "flat x": {"grid": (64, 64, 128)},
    "by 8": {"size": (40, 72, 72), "grid": (20, 36, 36)},
    "odd": {"size": (33, 40, 65), "grid": (17, 20, 33), "n": 1},
    "long rows": {"size": (8, 64, 1024), "grid": (4, 32, 512)},
    "crops": {"size": (33, 40, 65), "image_layout": "crop", "features_layout": "crop", "grad_layout": "crop"},
    "crops half": {"grid": HALF, "image_layout": "crop", "features_layout": "crop", "grad_layout": "crop", **FLOAT},
    "from last": {"features_layout": "last", "grad_layout": "last", "image_dtype": torch.int16},
    "from last half": {"grid": HALF, "features_layout": "last", "grad_layout": "last"},
    "expanded": {"grad_layout": "expanded"}, "expanded half": {"grid": HALF, "grad_layout": "expanded"},
    **{f"one {axis}": {"size": tuple(1 if k == i else 16 for k in range(3)), "grid": tuple(1 if k == i else 8 for k in range(3))}
       for i, axis in enumerate("zyx")},
    "to one": {"size": (16, 16, 16), "grid": (1, 1, 1), "channels": 1, "n": 1},
    "one voxel": {"size": (1, 1, 1), "channels": 1, "n": 1},
    "unit": {"feature_norm": "unit", "image_norm": ("window", -1.0, 1.0)},
    "unit half": {"grid": HALF, "feature_norm": "unit", "image_norm": ("none", 0.0, 0.0), "image_dtype": torch.uint8},
    "standard half": {"grid": HALF, "feature_norm": "standard", "image_norm": ("zscore", 0.5, 2.0)},
    "standard crops": {"size": (33, 40, 65), "feature_norm": "standard", "features_layout": "crop", "grad_layout": "crop"},
    "none of either": {"feature_norm": "none", "image_norm": ("none", 0.0, 0.0)},
    "none": {"feature_norm": "none"}, "none half": {"grid": HALF, "feature_norm": "none"},
    "image": {"channels": 0, "image_channels": 3},
    "last image": {"channels": 0, "image_channels": 3, **WIDE},
    "huge": {"size": (512, 512, 512), "grid": (256, 256, 256), "channels": 31, "n": 2},
    "huge last": {"size": (512, 512, 512), "channels": 31, "n": 2, **WIDE},
    "last odd": {"size": (33, 40, 65), "grid": (17, 20, 33), "image_channels": 2, **WIDE, "multiple": 1},
    "last crops": {"size": (33, 40, 65), **WIDE, "features_layout": "crop", "image_layout": "crop"},
    "last unit": {"grid": HALF, "feature_norm": "unit", **WIDE},
    "last arbitrary": {"grid": ODD, **WIDE, **FLOAT},
}


def specialize(arguments: dict[str, Any], constants: dict[str, Any]) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """(signature, constants, attributes) as the just-in-time compiler derives them from the values of a launch."""
    signature: dict[str, str] = {}
    attributes: dict[Any, Any] = {}
    fixed: dict[Any, Any] = {}
    for index, (name, value) in enumerate({**arguments, **constants}.items()):
        if name in constants or (isinstance(value, int) and value == 1):
            signature[name], fixed[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            # An offset into other memory is what a crop's pointer has; allocations start at multiples of 512 bytes.
            signature[name] = TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, fixed, attributes


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack and local memory: what registers are spilled to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {key: int(re.search(rf"\b{word}:(\d+)", said)[1])  # type: ignore[index]
            for key, word in (("registers", "REG"), ("stack", "STACK"), ("local", "LOCAL"))}


def accesses(ptx: str) -> dict[str, int]:
    """Global loads and stores by width: {"ld 128": 12, …}."""
    found: Counter[str] = Counter()
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx):
        found[f"{kind} {int(vector or 1) * int(bits)}"] += 1
    return dict(found)


def report(
    launches_of: Callable[..., Mapping[str, list[Launch]]], hot: Mapping[str, Mapping[str, Any]],
    general: Mapping[str, Mapping[str, Any]], capabilities: Sequence[int],
) -> None:
    """Print what becomes of each case: of the hot ones for each compute capability, of the general ones for the first.

    Args:
        launches_of: makes the calls of a case, whose settings are its keywords; the launches of each by name ("forward", …).
        hot: settings of each case by its name.
        general: the same.
        capabilities: 90 is sm_90.
    """
    for capability in capabilities:
        done = set()
        for case, settings in {**hot, **(general if capability == capabilities[0] else {})}.items():
            launches = launches_of(**settings)
            print(json.dumps({"case": case, **{way: [kernel.__name__ for kernel, _, _ in launches[way]] for way in launches}}))
            for kernel, values, options in (launch for way in launches.values() for launch in way):
                constants = {name: value for name, value in options.items() if name in kernel.arg_names}
                told = {name: value for name, value in options.items() if name not in constants}
                names = [name for name in kernel.arg_names if name not in constants]
                ordered = {name: constants[name] for name in kernel.arg_names[len(names):]}
                signature, fixed, attributes = specialize(dict(zip(names, values, strict=True)), ordered)
                key = str((kernel.__name__, signature, fixed, attributes, told))
                if key in done:
                    continue
                done.add(key)
                compiled = triton.compile(ASTSource(kernel, signature, constexprs=fixed, attrs=attributes),
                                          target=GPUTarget("cuda", capability, 32), options=told)
                print(json.dumps({"capability": capability, "case": case, "kernel": kernel.__name__,
                                  **resources(compiled.asm["cubin"]), **accesses(compiled.asm["ptx"])}), flush=True)


if __name__ == "__main__":
    report(launches_of, HOT, GENERAL, [int(word) for word in sys.argv[1:]])
