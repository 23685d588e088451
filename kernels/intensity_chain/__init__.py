"""`intensity_chain`: noise, Rician noise, bias field, gamma, brightness, contrast and min-max in one call.

Every stage is fed with parameters that were drawn before (`IntensityParameters`), and the noise is a function of a seed and
of the voxel's place, so that the same parameters give the same voxels on every backend, device and number of threads, to
the rounding of float32. Backends: `native` (C++ on the CPU), `triton`, and `reference` (the definition, plain torch).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import memory
from ..choice import choose
from . import native, reference, triton
from .parameters import BIAS_TERMS, IntensityParameters

__all__ = ["BIAS_TERMS", "IntensityParameters", "available_backends", "intensity_chain", "standard_normal"]

IMAGE_DTYPES = (torch.float32, torch.float16, torch.int16)


def available_backends() -> dict[str, str]:
    """Each backend's name and "" where it can be had here, else the reason why not."""
    return {"native": native.MISSING, "triton": triton.MISSING, "reference": ""}


def intensity_chain(
    image: Tensor, parameters: IntensityParameters, *, out: Tensor | None = None, backend: str = "auto",
) -> Tensor:
    """The stages of `IntensityParameters`, in the order of its fields.

    Args:
        image: (N, C, D, H, W), float32, float16 or int16 (value / 32767), any strides. Voxels must be finite: they are not
            looked at, and one that is not spoils its sample.
        parameters: of N samples with C channels, on the CPU.
        out: (N, C, D, H, W) float32, contiguous, on the image's device, for the result; may be `image` itself, and must not
            overlap it otherwise. Default: a new tensor.
        backend: "auto" takes the fastest that fits the call; any other is taken or refused.

    Returns:
        (N, C, D, H, W) float32, contiguous. Not differentiable. On a GPU nothing waits for the device with `triton`; with
        `reference`, which is the choice where Triton cannot be had, copies of small tensors do. A CUDA graph cannot capture
        the call: parameters go through pinned memory of this call alone, and a replay would read what lies there later.

    Accuracy, in float32, relative to the larger of the range and the largest size of a value: a few roundings for each
    stage, times gamma where that is above 1. Under gamma, a voxel nearer to the minimum than 2^-126 of the range is at it.
    That is so where every voxel, before and after each stage, is below 1e18 in size (Rician noise squares it, and means sum),
    and where ranges and the standard deviation of Rician noise are above 1e-18 or 0.

    Raises:
        ValueError: an argument that does not fit, named with what was wanted and what came.
        RuntimeError: a backend that cannot be had here, with the reason and the ones that can.
    """
    _check(image, parameters, out)
    chosen = choose(backend, _refusals(image))
    with torch.no_grad():
        source = image.contiguous()  # also for the definition: in which order a mean is summed depends on strides
        if chosen == "reference":
            result = reference.intensity_chain(source, parameters)
            return result if out is None else out.copy_(result)
        if out is None:
            out = _empty(tuple(image.shape), image.device)
        (native if chosen == "native" else triton).intensity_chain(source, parameters, out)
    return out


def standard_normal(
    seed: Tensor, shape: Sequence[int], stream: int, device: torch.device | str = "cpu", backend: str = "auto",
) -> Tensor:
    """The noise field that `intensity_chain` adds: stream 0 is z1 of `noise_std`, 1 and 2 are z2 and z3 of `rician_std`.

    Args:
        seed: (N,) int64 on the CPU, as in `IntensityParameters`.
        shape: of a sample; for an image (C, D, H, W).
        stream: 0 ≤ stream < 2^31.
        device: of the result.
        backend: see `intensity_chain`.

    Returns:
        (N, *shape) float32. `reference` says which function of (seed, stream, voxel) it is.

    Raises:
        ValueError: an argument that does not fit.
        RuntimeError: a backend that cannot be had here, with the reason and the ones that can.
    """
    if not isinstance(seed, Tensor) or seed.dim() != 1 or seed.dtype != torch.int64 or seed.device.type != "cpu" or not len(seed):
        came = f"{tuple(seed.shape)} {seed.dtype} on {seed.device}" if isinstance(seed, Tensor) else type(seed).__name__
        raise ValueError(f"seed must be a tensor (N,) torch.int64 on cpu, N ≥ 1, got {came}")
    shape = tuple(shape)
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"shape must be whole numbers ≥ 1, got {shape}")
    if not isinstance(stream, int) or not 0 <= stream < 2**31:
        raise ValueError(f"stream must be a whole number of [0, 2^31), got {stream!r}")
    like = torch.empty((1, 1), dtype=torch.float32, device=device).expand(len(seed), 1)  # of the result, what backends look at
    chosen = choose(backend, _refusals(like))
    if chosen == "reference":
        return reference.standard_normal(seed, shape, stream, device)
    result = _empty((len(seed), *shape), like.device)
    (native if chosen == "native" else triton).standard_normal(seed, stream, result)
    return result


def _empty(shape: tuple[int, ...], device: torch.device) -> Tensor:
    if device.type == "cpu":
        return memory.empty(shape, torch.float32)
    return torch.empty(shape, dtype=torch.float32, device=device)


def _refusals(tensor: Tensor) -> dict[str, str]:
    """Each backend, the best first for the tensor's device, and "" or why it cannot take it."""
    found = {"native": native.MISSING or native.refuses(tensor), "triton": triton.MISSING or triton.refuses(tensor),
             "reference": ""}
    return {name: found[name] for name in (("triton", "reference", "native") if tensor.is_cuda
                                           else ("native", "reference", "triton"))}


def _check(image: Tensor, parameters: IntensityParameters, out: Tensor | None) -> None:
    if not isinstance(image, Tensor) or image.is_nested or image.layout != torch.strided:
        raise ValueError(f"image must be a dense tensor (N, C, D, H, W), got {_kind(image)}")
    if image.dim() != 5 or 0 in image.shape:
        raise ValueError(f"image must be (N, C, D, H, W) with no empty axis, got shape {tuple(image.shape)}")
    if image.dtype not in IMAGE_DTYPES:
        raise ValueError(f"image must be float32, float16 or int16, got {image.dtype}")
    if image.requires_grad:
        raise ValueError("image must not require a gradient: the chain is not differentiable; detach it")
    if not isinstance(parameters, IntensityParameters):
        raise ValueError(f"parameters must be IntensityParameters, got {type(parameters).__name__}")
    if (parameters.samples, parameters.channels) != tuple(image.shape[:2]):
        raise ValueError(f"parameters must be of the image's {image.shape[0]} samples and {image.shape[1]} channels, "
                         f"got {parameters.samples} and {parameters.channels}")
    if out is None:
        return
    if not isinstance(out, Tensor):
        raise ValueError(f"out must be a tensor, got {type(out).__name__}")
    if out.shape != image.shape or out.dtype != torch.float32 or out.device != image.device:
        raise ValueError(f"out must be {tuple(image.shape)} torch.float32 on {image.device}, "
                         f"got {tuple(out.shape)} {out.dtype} on {out.device}")
    if not out.is_contiguous() or out.requires_grad:
        raise ValueError("out must be contiguous and not require a gradient")


def _kind(image: object) -> str:
    if not isinstance(image, Tensor):
        return type(image).__name__
    return "a nested one" if image.is_nested else str(image.layout)
