"""`mind_ssc`: the descriptor MIND-SSC of a volume, twelve channels, in two sweeps over the image.

The public function checks its arguments and hands them to a backend: `reference` (the definition, plain torch), `native`
(C++ on the CPU) or `triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..choice import choose
from . import native, reference, triton
from .op import forward
from .reference import CHANNELS, NEIGHBOURS, PAIRS

__all__ = ["CHANNELS", "NEIGHBOURS", "PAIRS", "available_backends", "mind_ssc"]

IMAGE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int16, torch.uint8, torch.float64)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def mind_ssc(
    image: Tensor, *, radius: int = 1, dilation: int = 1, dtype: torch.dtype = torch.float32, backend: str = "auto",
) -> Tensor:
    """The modality independent neighbourhood descriptor with self-similarity context (Heinrich et al., MICCAI 2013).

        out[n, k] = exp(-(SSD[n, k] - min over k of SSD[n, k]) / v[n])
        SSD[n, k](o) = mean over the box around o of (I[n](q + a[k]) - I[n](q + b[k]))²
        v[n] = mean over k of SSD[n, k] - min over k of SSD[n, k], held within 10^±3 times its mean over the volume, + 1e-9

    (a[k], b[k]) is the k-th of `PAIRS`: two of the six face neighbours, `dilation` voxels away, that lie an edge apart. Edges are
    clamped twice: q, the voxels of the box, to the volume, and then q + a and q + b.

    Args:
        image: (N, 1, D, H, W), float32, float16, bfloat16, int16 or uint8; float64 is the reference backend's.
        radius: of the box, in voxels: (2 · radius + 1)³.
        dilation: distance of the neighbours, in voxels.
        dtype: of the result: float32, float16 or bfloat16. Arithmetic is float32 whatever it is and whatever the image's type.
        backend: "auto" takes the fastest that fits the call; any other is taken or refused.

    Returns:
        (N, 12, D, H, W) in `dtype` (of a float64 image and a float32 `dtype`: float64), in [0, 1], contiguous. Not
        differentiable.

    It does not change when intensities are scaled, shifted or inverted, but for rounding and the 1e-9. A voxel that is NaN or
    infinite can make all of its sample NaN. The number of threads does not change a bit. Nothing waits for a GPU.

    Raises:
        ValueError: an argument that does not fit, named with what was wanted and what came.
        RuntimeError: a backend that cannot be had here, with the reason and the ones that can.
    """
    _check(image, radius, dilation, dtype)
    chosen = choose(backend, _refusals(image, radius, dilation))
    if chosen == "reference":
        out = reference.mind_ssc(image, radius=radius, dilation=dilation)
        return out if dtype == torch.float32 else out.to(dtype)
    return forward(image, radius, dilation, dtype, chosen)


def available_backends() -> dict[str, str]:
    """Each backend's name and "" where it can be had here, else the reason why not."""
    return {"native": native.MISSING, "triton": triton.MISSING, "reference": ""}


def _refusals(image: Tensor, radius: int, dilation: int) -> dict[str, str]:
    """Each backend, the best first, and why it cannot take a call with this image, or ""."""
    double = "it computes in float32, and the image is float64" if image.dtype == torch.float64 else ""
    reasons = {"native": double or native.refuses(image, radius, dilation),
               "triton": double or triton.refuses(image, radius, dilation)}
    first = "triton" if image.is_cuda else "native"
    # Interpreted, Triton's kernels are for tests, which ask for them by name.
    return {first: reasons.pop(first), "reference": "", **reasons}


def _check(image: Tensor, radius: int, dilation: int, dtype: torch.dtype) -> None:
    if not isinstance(image, Tensor):
        raise ValueError(f"image must be a tensor (N, 1, D, H, W), got {type(image).__name__}")
    if image.is_nested or image.layout != torch.strided:
        raise ValueError(f"image must be a dense tensor, got {'a nested one' if image.is_nested else image.layout}")
    if image.dtype not in IMAGE_DTYPES:
        raise ValueError(f"image must be one of {_names(IMAGE_DTYPES)}, got {_names((image.dtype,))}")
    if image.dim() != 5 or image.shape[1] != 1 or 0 in image.shape:
        raise ValueError(f"image must be (N, 1, D, H, W) with no empty axis, got shape {tuple(image.shape)}")
    if image.requires_grad:
        raise ValueError("image must not require a gradient: mind_ssc is not differentiable")
    if not isinstance(radius, int) or not isinstance(dilation, int) or radius < 0 or dilation < 1:
        raise ValueError(f"radius must be at least 0 and dilation at least 1, both whole voxels, got {radius} and {dilation}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {_names(DTYPES)}, got {_names((dtype,))}")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
