"""Low resolution, Gibbs ringing, Gaussian smoothing and sharpening of a batch, each sample with its own parameters.

Shape letters: N batch, C channels, D H W voxels. Images are (N, C, D, H, W) float32 on any device; parameters are CPU tensors,
so that which samples are worked on is known without waiting for a GPU, and reach its kernels as plain numbers: nothing is copied
to the device and nothing waits for it. A sample whose parameter says "off" costs a copy at most.

The input is never changed. Where no sample is chosen the input itself is returned; otherwise the result is a new contiguous
tensor. No gradients: an image that requires them is refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dropgen_fast.kernels import memory

TRUNCATED = 4.0
"""Standard deviations at which a Gaussian is cut off, as in MONAI."""
NEGLIGIBLE = 1e-6
"""Gaussian smoothing leaves an axis out where a voxel's neighbours together weigh no more than this: sigma below 0.1022 voxels.

A filter that gives the neighbours the weight e and the voxel itself 1 - e changes no voxel by more than e max|x| where the image
has one sign, and 2 e max|x| in any case. Three axes left out: 3e-6 of the image's largest value, a tenth of a step of int16.
"""


def low_resolution(image: Tensor, zoom: Tensor, *, like_monai: bool = False) -> Tensor:
    """As if acquired on a coarser grid: nearest neighbour down to round(size · zoom) voxels, trilinear back up.

    A coarse voxel takes the value of the voxel nearest to its centre, so that the image stays where it is.

    Args:
        image: (N, C, D, H, W) float32.
        zoom: (N,), CPU, above 0; 1: off. Sizes are rounded half to even, and are at least 1.
        like_monai: take voxel floor(i · size / coarse size) for coarse voxel i, as MONAI's `RandSimulateLowResolution` does: the
            lowest of those that it covers and not the middle one, which moves the image by up to half a coarse voxel.

    Raises:
        ValueError: a shape, dtype or zoom is wrong.
    """
    zooms = _numbers("zoom", zoom, image)
    if not all(0 < z <= 1 for z in zooms):
        raise ValueError(f"zoom must be above 0 and at most 1, got {zooms}")
    shape = tuple(image.shape[2:])
    sizes = {i: size for i, z in enumerate(zooms) if (size := tuple(max(1, round(n * z)) for n in shape)) != shape}
    if not sizes:
        return image
    out = _result(image, sizes)
    for i, voxels, target in _pieces(image, out, sizes):
        coarse = F.interpolate(voxels[None], size=sizes[i], mode="nearest" if like_monai else "nearest-exact")
        target[:] = F.interpolate(coarse, size=shape, mode="trilinear", align_corners=False)[0]
    return out


def gibbs_ringing(image: Tensor, alpha: Tensor, *, like_monai: bool = False) -> Tensor:
    """Ringing from a truncated k-space: frequencies farther from zero than (1 - alpha) · max(D, H, W) · √2/2 bins are removed.

    Distances are counted in bins of each axis, as in MONAI's `GibbsNoise`.

    Args:
        image: (N, C, D, H, W) float32.
        alpha: (N,), CPU, from 0 to 1; 0: off.
        like_monai: centre the mask on bin (size - 1) / 2 of the shifted spectrum, as MONAI does: along an axis of even size that
            is half a bin off zero frequency. For an alpha near 1 such a mask removes the mean as well.

    Raises:
        ValueError: a shape, dtype or alpha is wrong.
    """
    alphas = _numbers("alpha", alpha, image)
    if not all(0 <= a <= 1 for a in alphas):
        raise ValueError(f"alpha must be from 0 to 1, got {alphas}")
    chosen = [i for i, a in enumerate(alphas) if a > 0]
    if not chosen:
        return image
    shape = tuple(image.shape[2:])
    distance, mirrored = _squared_distances(shape, like_monai, image.device)
    masks = {i: _mask(distance, mirrored, (1 - alphas[i]) * max(shape) * math.sqrt(2) / 2) for i in chosen}
    out = _result(image, chosen)
    spectrum = _empty((_step(image), *distance.shape), image.device, torch.complex64)
    for i, voxels, target in _pieces(image, out, chosen):
        torch.fft.rfftn(voxels, dim=(1, 2, 3), out=spectrum)
        torch.fft.irfftn(spectrum.mul_(masks[i]), s=shape, dim=(1, 2, 3), out=target)
    return out


def gaussian_smooth(image: Tensor, sigma_voxels: Tensor) -> Tensor:
    """Gaussian filter, zeros outside the image: MONAI's `GaussianSmooth`.

    Weights are integrals of the Gaussian over voxels, out to 4 sigma, and are not renormalised. An axis whose filter changes
    nothing that matters is left out: see NEGLIGIBLE.

    Args:
        image: (N, C, D, H, W) float32.
        sigma_voxels: (N, 3), CPU: standard deviation along D, H, W; 0: off.

    Raises:
        ValueError: a shape, dtype or sigma is wrong.
    """
    sigmas = _sigmas("sigma_voxels", sigma_voxels, image)
    filters = {i: [_taps(s) if _matters(s) else [1.0] for s in row] for i, row in enumerate(sigmas) if any(map(_matters, row))}
    if not filters:
        return image
    out = _result(image, filters)
    spare = _empty((_step(image), *image.shape[2:]), image.device)
    for i, voxels, target in _pieces(image, out, filters):
        _filter(voxels, filters[i], target, spare)
    return out


def is_smoothed(sigma_voxels: Tensor) -> Tensor:
    """(N,) bool, CPU: which samples `gaussian_smooth` works on, given sigma (N, 3)."""
    return torch.tensor([any(map(_matters, row)) for row in sigma_voxels.tolist()], dtype=torch.bool)


def gaussian_sharpen(image: Tensor, sigma1_voxels: Tensor, sigma2_voxels: Tensor, alpha: Tensor) -> Tensor:
    """Unsharp mask of a smoothed image: b + alpha (b - g2 * b) with b = g1 * x: MONAI's `GaussianSharpen`.

    Args:
        image: (N, C, D, H, W) float32.
        sigma1_voxels: (N, 3), CPU: standard deviations of g1 along D, H, W, as in `gaussian_smooth`; 0: no filter on that axis.
        sigma2_voxels: (N, 3), CPU: those of g2.
        alpha: (N,), CPU; 0: the sample is left as it is, not smoothed by g1 either.

    Raises:
        ValueError: a shape, dtype or sigma is wrong.
    """
    first = _sigmas("sigma1_voxels", sigma1_voxels, image)
    second = _sigmas("sigma2_voxels", sigma2_voxels, image)
    alphas = _numbers("alpha", alpha, image)
    if not all(map(math.isfinite, alphas)):
        raise ValueError(f"alpha must be finite, got {alphas}")
    chosen = [i for i, a in enumerate(alphas) if a != 0]
    if not chosen:
        return image
    filters = {i: ([_taps(s) for s in first[i]], [_taps(s) for s in second[i]]) for i in chosen}
    out = _result(image, chosen)
    blurred, spare = _empty((2, _step(image), *image.shape[2:]), image.device)
    for i, voxels, target in _pieces(image, out, chosen):
        _filter(voxels, filters[i][0], blurred, spare)
        _filter(blurred, filters[i][1], target, spare)
        target.lerp_(blurred, 1 + alphas[i])  # past its end: blurred + alpha (blurred - target)
    return out


def _numbers(name: str, values: Tensor, image: Tensor) -> list[float]:
    """A parameter (N,) as Python numbers, once it and the image are what they must be."""
    return _rows(name, values, image, (image.shape[0],))


def _sigmas(name: str, values: Tensor, image: Tensor) -> list[list[float]]:
    """Standard deviations (N, 3) as Python numbers."""
    rows: list[list[float]] = _rows(name, values, image, (image.shape[0], 3))
    if not all(0 <= s < math.inf for row in rows for s in row):
        raise ValueError(f"{name} must be finite and not negative, got {rows}")
    return rows


def _rows(name: str, values: Tensor, image: Tensor, shape: tuple[int, ...]) -> list:
    if image.dim() != 5 or image.dtype != torch.float32 or 0 in image.shape[1:]:
        raise ValueError(f"image must be (N, C, D, H, W) float32 and not empty, got {tuple(image.shape)} {image.dtype}")
    if image.requires_grad:
        raise ValueError("image must not require gradients: augmentations are not differentiable")
    if tuple(values.shape) != shape or values.device.type != "cpu":
        raise ValueError(f"{name} must be {shape} on the CPU, got {tuple(values.shape)} on {values.device}")
    return values.tolist()


def _empty(shape: Sequence[int], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    if device.type == "cpu":
        return memory.empty(tuple(shape), dtype)
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def _result(image: Tensor, chosen: Collection[int]) -> Tensor:
    """A new tensor that holds the samples that are not chosen; the others are to be written."""
    out = _empty(image.shape, image.device)
    for i in range(image.shape[0]):
        if i not in chosen:
            out[i] = image[i]
    return out


def _step(image: Tensor) -> int:
    """Channels worked on at once: on the CPU one, which its caches hold; on a GPU all, for fewer launches."""
    return 1 if image.device.type == "cpu" else image.shape[1]


def _pieces(image: Tensor, out: Tensor, chosen: Iterable[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The chosen samples' number, voxels and place in the result, (channels, D, H, W), `_step` channels at a time."""
    step = _step(image)
    for i in chosen:
        for c in range(0, image.shape[1], step):
            yield i, image[i, c:c + step], out[i, c:c + step]


def _squared_distances(shape: Sequence[int], like_monai: bool, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Squared distance from the mask's centre of each bin of the half spectrum (D, H, W // 2 + 1), and that of its mirror bin.

    The mask about zero frequency equals its mirror image: None. MONAI's, half a bin aside, does not; multiplied with the spectrum
    of a real image it makes an image that is not real, of which MONAI keeps the real part. That part has the spectrum
    F(f) (M(f) + M(-f)) / 2, because F(-f) is the conjugate of F(f).

    Distances are multiples of 1/4 far below 2^22: exact in float32.
    """
    axes = []
    for n in shape:
        k = torch.arange(n, device=device)
        frequency = torch.where(2 * k < n, k, k - n).float()  # an even axis' highest is -n/2, where fftshift puts it
        offset = 0.5 if like_monai and n % 2 == 0 else 0.0
        axes.append((frequency + offset) ** 2)
    if not like_monai or all(n % 2 for n in shape):
        return _sum_over_half(axes), None
    return _sum_over_half(axes), _sum_over_half([torch.cat([axis[:1], axis[1:].flip(0)]) for axis in axes])  # bins -k mod n


def _sum_over_half(axes: Sequence[Tensor]) -> Tensor:
    d, h, w = axes
    return d.view(-1, 1, 1) + h.view(-1, 1) + w[:len(w) // 2 + 1]


def _mask(distance: Tensor, mirrored: Tensor | None, radius: float) -> Tensor:
    """What the half spectrum (D, H, W // 2 + 1) is multiplied with; arguments from `_squared_distances`."""
    bound = _largest_within(radius)
    inside = distance <= bound
    return inside if mirrored is None else (inside.float() + (mirrored <= bound)) * 0.5


def _largest_within(radius: float) -> float:
    """The largest multiple of 1/4 whose square root is at most `radius`: the mask then needs no square root and no rounding."""
    quarters = math.floor(4 * radius * radius) + 1
    while quarters > 0 and math.sqrt(quarters / 4) > radius:
        quarters -= 1
    return quarters / 4


def _matters(sigma: float) -> bool:
    return _neighbours_weight(sigma) > NEGLIGIBLE


def _neighbours_weight(sigma: float) -> float:
    """What a Gaussian filter gives to all voxels but the centre one."""
    return math.erfc(0.5 / (math.sqrt(2) * sigma)) if sigma > 0 else 0.0


def _taps(sigma: float) -> list[float]:
    """Weights of a Gaussian filter at 0, 1, 2, … voxels from its centre: integrals over voxels, as MONAI's `gaussian_1d`."""
    if sigma == 0:
        return [1.0]
    tail = int(max(sigma * TRUNCATED, 0.5) + 0.5)
    t = 1 / (math.sqrt(2) * sigma)
    return [math.erf(0.5 * t)] + [0.5 * (math.erfc((k - 0.5) * t) - math.erfc((k + 0.5) * t)) for k in range(1, tail + 1)]


def _filter(image: Tensor, taps: Sequence[Sequence[float]], out: Tensor, spare: Tensor) -> None:
    """Filter (C, D, H, W) along D, H and W into `out`, with `spare` of its size to work in.

    A sum of shifted slices: for filters this short it is faster on the CPU than a convolution or a product with a banded matrix,
    and it is float32 whatever precision the caller's autocast or torch's settings allow those two.
    """
    axes = [axis for axis in range(3) if len(taps[axis]) > 1]
    if not axes:
        out.copy_(image)
        return
    source, target, other = (image, out, spare) if len(axes) % 2 else (image, spare, out)
    for axis in axes:
        _filter_axis(source, taps[axis], axis + 1, target)
        source, target, other = target, other, target


def _filter_axis(source: Tensor, taps: Sequence[float], dim: int, target: Tensor) -> None:
    size = source.shape[dim]
    torch.mul(source, taps[0], out=target)
    for k, weight in enumerate(taps[1:size], start=1):
        target.narrow(dim, 0, size - k).add_(source.narrow(dim, k, size - k), alpha=weight)
        target.narrow(dim, k, size - k).add_(source.narrow(dim, 0, size - k), alpha=weight)
