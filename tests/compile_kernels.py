"""Compile fuse_streams' Triton kernels for a GPU that need not be here: ``python compile_kernels.py 90``.

Prints a line a kernel: its name and the bytes of its machine code. A program of its own because Triton's interpreter,
which the tests run in, takes the compiler's place in a process.

Triton makes an integer argument that is 1 a constant, so the kernels that divide by a size are compiled for that too.
"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import dropgen_fast.kernels.fuse_streams.triton as kernels

POINTERS = {"image": "*fp32", "features": "*bf16", "out": "*bf16", "grad": "*bf16", "grad_image": "*fp32",
            "scale": "*fp32", "image_stats": "*fp32", "feature_stats": "*fp32", "stats": "*fp32", "partial": "*fp32",
            "sums": "*fp32"}
SCALARS = {"eps": "fp32", "norm_a": "fp32", "norm_b": "fp32"}
BLOCK = {"BLOCK": 1024}
CASES: list[tuple[Any, dict[str, Any], dict[str, str]]] = [
    (kernels._image_chunks, BLOCK | {"CHUNKS": 64}, {}),
    (kernels._channel_chunks, BLOCK | {"CHUNKS": 64}, {}),
    (kernels._combine, {"CHUNKS": 64}, {}),
    *[(kernels._voxel_statistics, BLOCK | {"STANDARD": s}, {}) for s in (True, False)],
    *[(kernels._fuse, {"IMAGE_NORM": i, "FEATURE_NORM": f, "HAS_FEATURES": True, "SAME": same, "BLOCK_C": c, "BLOCK_V": v}, {})
      for i, f, same, c, v in [(0, 0, True, 1, 1024), (0, 0, False, 1, 1024), (2, 1, False, 32, 64), (3, 3, True, 32, 64)]],
    (kernels._fuse, {"IMAGE_NORM": 1, "FEATURE_NORM": 0, "HAS_FEATURES": False, "SAME": True, "BLOCK_C": 1, "BLOCK_V": 1024}, {}),
    *[(kernels._fuse, {"IMAGE_NORM": 0, "FEATURE_NORM": 0, "HAS_FEATURES": True, "SAME": False, "BLOCK_C": 1, "BLOCK_V": 1024,
                       size: 1, coarse: 1}, {}) for size, coarse in zip("DHW", "dhw", strict=True)],
    *[(kernels._transpose_interpolation, BLOCK | {size: 1, coarse: 1}, {"out": "*fp32"})
      for size, coarse in zip("DHW", "dhw", strict=True)],
    *[(kernels._image_backward, BLOCK | {"WINDOW": w}, {}) for w in (True, False)],
    (kernels._transpose_interpolation, BLOCK, {"out": "*fp32"}),
    (kernels._instance_norm_sums, BLOCK, {"grad": "*fp32"}),
    (kernels._instance_norm_backward, BLOCK, {"grad": "*fp32"}),
    *[(kernels._voxel_norm_backward, BLOCK | {"STANDARD": s}, {"grad": "*fp32"}) for s in (True, False)],
]


def main() -> None:
    """Compile every case for the compute capability given."""
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    for kernel, constants, types in CASES:
        signature = {name: "constexpr" if name in constants else (POINTERS | SCALARS | types).get(name, "i32")
                     for name in kernel.arg_names}
        constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        compiled = triton.compile(ASTSource(kernel, signature, constexprs=constexprs), target=target)
        print(kernel.__name__, len(compiled.asm["cubin"]))


if __name__ == "__main__":
    main()
