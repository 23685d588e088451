"""`warp`: affine maps, flips and elastic displacement of an image and its label in one gather.

The public function checks its arguments and hands them to a backend: `reference` (the definition, plain torch), `native`
(C++ on the CPU) or `triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..choice import choose
from ..gpu import on_device_of, sent
from . import native, reference, triton

__all__ = ["available_backends", "warp"]

IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32)
PADDINGS = ("zeros", "border")


def warp(
    image: Tensor, label: Tensor | None, matrix: Tensor, displacement: Tensor | None = None, *,
    padding: str = "zeros", backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Read each voxel of the result where an affine map and a displacement say: the image linearly, the label nearest.

        out[n, :, o] = image[n, :, s(o)],   s(o) = A·(o + u(o)) + t,   matrix[n] = [A|t]

    with o and s in voxels along the axes D, H, W, voxel 0 at coordinate 0. Each s is computed once, for all channels and the
    label. Flips are matrices, too: -1 on the diagonal and t = size - 1.

    Args:
        image: (N, C, D, H, W), float32, float16 or bfloat16, of finite voxels.
        label: (N, L, D, H, W), uint8, int16 or int32, or None.
        matrix: (N, 3, 4) float32, on the CPU or on the image's device. On the CPU it must be finite.
        displacement: (N, 3, d, h, w) float32 with d ≤ D, h ≤ H, w ≤ W: u in voxels, along D, H, W, on a coarser grid or the
            image's own, interpolated trilinearly with half-pixel centres, equal to ``F.interpolate(..., align_corners=False)``.
            On the CPU or on the image's device. None for zero.
        padding: "zeros": what lies outside the image counts 0, and the label there is 0. "border": s is clamped to the image.
        backend: "auto" takes the fastest that fits the call; any other is taken or refused.

    Returns:
        The warped image in its dtype, and the warped label in its own, or None; both contiguous. Not differentiable.

    The image is Σ weight · voxel over the 8 voxels around s, summed in float32; the label is the voxel floor(s + 1/2). A
    coordinate that is not a number reads outside ("zeros") or voxel 0 ("border"). Where both lie on the CPU, a sample whose
    matrix is the identity and whose displacement is None or zero is copied by "native" and "triton".

    On a GPU nothing waits for the device. A CUDA graph can capture a call whose matrix and displacement lie there, and must not
    capture any other: it would read the host's copy of them, which may have other contents when it is replayed.

    The definition computes s in float64, the other backends in float32, with an error of at most about 1e-5 voxels for a map
    that moves neighbours no further than 2 voxels apart, and a few roundings of |A·u| where there is a displacement (each at
    most 6e-8 of it). They count from a whole voxel near s, so that the error does not grow with the volume. The label of a voxel
    whose s is that close to a tie may therefore differ between backends.

    Raises:
        ValueError: an argument that does not fit, named with what was wanted and what came.
        RuntimeError: a backend that cannot be had here, with the reason and the ones that can.
    """
    _check(image, label, matrix, displacement, padding)
    chosen = choose(backend, _refusals(image))
    border = padding == "border"
    if chosen == "native":
        return native.warp(image, label, matrix, displacement, border=border)
    if chosen == "triton":
        return triton.warp(image, label, matrix, displacement, border=border)
    with on_device_of(image):
        matrix = sent(matrix, image.device)
        displacement = sent(displacement, image.device) if displacement is not None else None
    return reference.warp(image, label, matrix, displacement, border=border)


def available_backends() -> dict[str, str]:
    """Each backend's name and "" where it can be had here, else the reason why not."""
    return {"native": native.MISSING, "triton": triton.MISSING, "reference": ""}


def _refusals(image: Tensor) -> dict[str, str]:
    """Each backend, the best first, and why it cannot take a call with this image, or ""."""
    reasons = {"native": native.refuses(image), "triton": triton.refuses(image)}
    first = "triton" if image.is_cuda else "native"
    # Interpreted, Triton's kernels are for tests, which ask for them by name.
    return {first: reasons.pop(first), "reference": "", **reasons}


def _check(image: Tensor, label: Tensor | None, matrix: Tensor, displacement: Tensor | None, padding: str) -> None:
    _check_volumes("image", image, "(N, C, D, H, W)", IMAGE_DTYPES)
    n, size, device = image.shape[0], tuple(image.shape[2:]), image.device
    if label is not None:
        _check_volumes("label", label, "(N, L, D, H, W)", LABEL_DTYPES)
        if label.shape[0] != n or tuple(label.shape[2:]) != size:
            raise ValueError(f"label must have the image's samples and voxels, {(n, 'L', *size)}, got {tuple(label.shape)}")
        if label.device != device:
            raise ValueError(f"label must be on the image's device {device}, got {label.device}")
    _check_tensor("matrix", matrix, "(N, 3, 4)", (torch.float32,))
    if tuple(matrix.shape) != (n, 3, 4):
        raise ValueError(f"matrix must be {(n, 3, 4)}, got {tuple(matrix.shape)}")
    if displacement is not None:
        _check_volumes("displacement", displacement, "(N, 3, d, h, w)", (torch.float32,))
        grid = tuple(displacement.shape[2:])
        if tuple(displacement.shape[:2]) != (n, 3):
            raise ValueError(f"displacement must be {(n, 3, 'd', 'h', 'w')}, got {tuple(displacement.shape)}")
        if any(coarse > fine for coarse, fine in zip(grid, size, strict=True)):
            raise ValueError(f"displacement must be no larger than the image: grid {grid} against {size}")
    for name, tensor in (("matrix", matrix), ("displacement", displacement)):
        if tensor is not None and tensor.device != device and tensor.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU or on the image's device {device}, got {tensor.device}")
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
    # On another device the question would make the host wait.
    if matrix.device.type == "cpu" and not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"matrix must be finite, got {matrix[~torch.isfinite(matrix)][0].item()}")


def _check_volumes(name: str, tensor: Tensor, wanted: str, dtypes: tuple[torch.dtype, ...]) -> None:
    _check_tensor(name, tensor, wanted, dtypes)
    if tensor.dim() != 5 or 0 in tensor.shape:
        raise ValueError(f"{name} must be {wanted} with no empty axis, got shape {tuple(tensor.shape)}")


def _check_tensor(name: str, tensor: Tensor, wanted: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor {wanted}, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {'a nested one' if tensor.is_nested else tensor.layout}")
    if tensor.dtype not in dtypes:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {kinds}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require a gradient: warp is not differentiable")
