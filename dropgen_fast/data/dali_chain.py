"""The intensity chain out of DALI operators, each a pass over the volume: what the fused op is measured against.

`DaliIntensityChain` makes the voxels of `dropgen_fast.kernels.intensity_chain` from the same parameters, to the rounding of
float32. Importing this module imports DALI.

Shapes: N batch, C channels, D H W voxels; DALI sees samples (C, D, H, W) in its layout "CDHW". The same graph serves DALI's CPU
backend and the GPU. `if` on a switch is DALI's conditional execution: only the samples that a stage is on for pay for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import nvidia.dali.math as dmath
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from dropgen_fast.kernels.intensity_chain import BIAS_TERMS, IntensityParameters, standard_normal
from dropgen_fast.kernels.intensity_chain.reference import GAMMA_EPSILON, INT16_ONE, SMALLEST_SPAN

LAYOUT = "CDHW"
VOXELS = [1, 2, 3]
"""Axes of a sample's voxels."""
DTYPES = {torch.float32: types.FLOAT, torch.float16: types.FLOAT16, torch.int16: types.INT16}
SWITCHES = ("noisy", "rician", "biased", "gamma_on", "brighter", "contrasted", "rescaled")


class DaliIntensityChain:
    """`intensity_chain` out of DALI's operators, for batches of at most `batch_size` images (N, C, D, H, W).

    Args:
        batch_size: most samples of a call.
        channels, shape: C and (D, H, W) of the images.
        device: where the images are and the work is done.
        dtype: of the images: float32, float16, or int16, which is value · 32767.
        num_threads: DALI's CPU threads; a sample is worked on by one of them.
    """

    def __init__(self, batch_size: int, channels: int, shape: tuple[int, int, int], device: torch.device | str = "cpu", *,
                 dtype: torch.dtype = torch.float32, num_threads: int = 2) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be float32, float16 or int16, got {dtype}")
        self._device = torch.device(device)
        self._batch_size, self._shape, self._dtype = batch_size, (channels, *shape), dtype
        gpu = self._device.type == "cuda"
        index = (torch.cuda.current_device() if self._device.index is None else self._device.index) if gpu else None
        self._pipeline = chain_graph(shape=shape, dtype=dtype, gpu=gpu, batch_size=batch_size, num_threads=num_threads,
                                     device_id=index)
        self._pipeline.build()

    def __call__(self, image: Tensor, parameters: IntensityParameters) -> Tensor:
        """The stages of `IntensityParameters`: (N, C, D, H, W) float32, contiguous.

        The image and the noise fields are not copied (on a GPU DALI gathers the noise fields into memory of its own). They live
        until DALI is done with them: DALI prefetches nothing here, and the result, which is always computed anew and never
        the image's memory, is ready when this returns; on a GPU it is ready in the order of torch's current stream, on which
        the allocator reuses memory. The result is DALI's own memory, which it does not use again while a tensor of it is alive.

        Raises:
            ValueError: the image or the parameters are not what the chain was made for.
        """
        self._check(image, parameters)
        image = image.contiguous()
        noise = self._noise(parameters)
        stream = torch.cuda.current_stream(self._device) if image.is_cuda else None
        self._pipeline.feed_input("image", _for_dali(image), cuda_stream=stream)
        for name, fields in noise.items():
            self._pipeline.feed_input(name, [_for_dali(field) for field in fields], cuda_stream=stream)
        for name, values in {**_switches(parameters), **_numbers(parameters)}.items():
            self._pipeline.feed_input(name, values.numpy())
        (result,) = self._pipeline.run(stream)
        return torch.from_dlpack(result.as_tensor())

    def _check(self, image: Tensor, parameters: IntensityParameters) -> None:
        if image.dim() != 5 or tuple(image.shape[1:]) != self._shape or not 1 <= image.shape[0] <= self._batch_size:
            raise ValueError(f"image must be ({self._batch_size} or fewer, {', '.join(map(str, self._shape))}), "
                             f"got {tuple(image.shape)}")
        if image.dtype != self._dtype or image.device.type != self._device.type:
            raise ValueError(f"image must be {self._dtype} on {self._device}, got {image.dtype} on {image.device}")
        if (parameters.samples, parameters.channels) != tuple(image.shape[:2]):
            raise ValueError(f"parameters must be of {image.shape[0]} samples and {image.shape[1]} channels, "
                             f"got {parameters.samples} and {parameters.channels}")

    def _noise(self, parameters: IntensityParameters) -> dict[str, list[Tensor]]:
        """The noise fields z1, z2, z3: (C, D, H, W) of the samples that need one, of one voxel for the others."""
        nothing = torch.zeros((1, 1, 1, 1), device=self._device)

        def field(std: Tensor, stream: int) -> list[Tensor]:
            chosen = [n for n, value in enumerate(std.tolist()) if value != 0]
            fields = [nothing] * len(std)
            if chosen:
                for n, z in zip(chosen, standard_normal(parameters.seed[chosen], self._shape, stream, self._device), strict=True):
                    fields[n] = z
            return fields

        p = parameters
        return {"z1": field(p.noise_std, 0), "z2": field(p.rician_std, 1), "z3": field(p.rician_std, 2)}


def _for_dali(volume: Tensor) -> Any:
    """The same memory as DALI takes it: it supposes that any torch tensor is on a GPU."""
    return volume if volume.is_cuda else volume.numpy()


def _switches(p: IntensityParameters) -> dict[str, Tensor]:
    """(N,) bool: which samples each stage is on for."""
    on = (p.noise_std != 0, p.rician_std != 0, (p.bias != 0).any(1), p.gamma != 1, (p.brightness != 1).any(1),
          (p.contrast != 1).any(1), p.rescale)
    return dict(zip(SWITCHES, on, strict=True))


def _numbers(p: IntensityParameters) -> dict[str, Tensor]:
    per_channel = {name: getattr(p, name)[:, :, None, None, None].contiguous() for name in ("brightness", "contrast")}
    return {"noise_std": p.noise_std, "rician_std": p.rician_std, "bias": p.bias, "gamma": p.gamma, **per_channel}


@pipeline_def(enable_conditionals=True, prefetch_queue_depth=1)
def chain_graph(shape: tuple[int, int, int], dtype: torch.dtype, gpu: bool) -> Any:
    """The chain; inputs are named as `DaliIntensityChain` feeds them.

    Parameters are on the CPU. On a GPU, DALI's arithmetic moves them there itself, where the other operand is there.
    """
    def volumes(name: str, kind: Any = types.FLOAT) -> Any:
        return fn.external_source(name=name, device="gpu" if gpu else "cpu", dtype=kind, ndim=4, layout=LAYOUT, no_copy=True)

    def number(name: str, ndim: int, kind: Any = types.FLOAT) -> Any:
        return fn.external_source(name=name, dtype=kind, ndim=ndim)

    image = volumes("image", DTYPES[dtype])
    z1, z2, z3 = volumes("z1"), volumes("z2"), volumes("z3")
    noisy, rician, biased, gamma_on, brighter, contrasted, rescaled = (number(name, 0, types.BOOL) for name in SWITCHES)
    if dtype != torch.float32:
        image = fn.cast(image, dtype=types.FLOAT)
    if dtype == torch.int16:
        image = image * float(np.float32(1 / INT16_ONE))
    noise_std, rician_std, gamma = (number(name, 0) for name in ("noise_std", "rician_std", "gamma"))
    brightness, contrast = (number(name, 4) for name in ("brightness", "contrast"))
    bias = number("bias", 1)

    if noisy:
        image = image + noise_std * z1
    if rician:
        real, imaginary = image + rician_std * z2, rician_std * z3
        image = dmath.sqrt(real * real + imaginary * imaginary)
    if biased:
        image = image * dmath.exp(_log_bias_field(bias, shape, gpu))
    if gamma_on:
        image = _gamma(image, gamma)
    if brighter:
        image = image * brightness
    if contrasted:
        image = _contrast(image, contrast)
    low, span = (types.Constant(np.float32(value), device="gpu" if gpu else "cpu") for value in (0, 1))
    if rescaled:
        low, span = _low_and_span(image)
    # Computed for all, so that a result is never the memory of an image.
    return (image - low) / span


def _log_bias_field(bias: Any, shape: tuple[int, int, int], gpu: bool) -> Any:
    """Σ c_ijk P_i P_j P_k over BIAS_TERMS, (1, D, H, W), of coefficients (20,).

    The terms are gathered by i: four planes (H, W), so that the volume is passed for four products and not for twenty.
    """
    degree = max(i for i, _, _ in BIAS_TERMS)
    legendre = [[np.polynomial.legendre.Legendre.basis(k)(np.linspace(-1, 1, n)).astype(np.float32) for k in range(degree + 1)]
                for n in shape]
    field = None
    for i in range(degree + 1):
        where = [t for t, term in enumerate(BIAS_TERMS) if term[0] == i]
        planes = np.stack([np.outer(legendre[1][j], legendre[2][k]) for _, j, k in (BIAS_TERMS[t] for t in where)], axis=-1)
        plane = fn.reductions.sum(types.Constant(planes) * bias[where[0]:where[-1] + 1], axes=[2])
        plane = fn.reshape(plane, shape=[1, 1, *shape[1:]], layout=LAYOUT)
        depth = types.Constant(legendre[0][i].reshape(1, -1, 1, 1), device="gpu" if gpu else "cpu", layout=LAYOUT)
        term = plane * depth
        field = term if field is None else field + term
    return field


def _gamma(image: Any, gamma: Any) -> Any:
    """MONAI's `AdjustContrast`: ((x - min) / (range + 1e-7)) ** gamma * range + min, over all channels."""
    low = fn.reductions.min(image)
    span = fn.reductions.max(image) - low
    return dmath.pow((image - low) / (span + GAMMA_EPSILON), gamma) * span + low


def _contrast(image: Any, factor: Any) -> Any:
    """batchgeneratorsv2's `ContrastTransform(preserve_range=True)`: clip((x - mean) · factor + mean, min, max) per channel."""
    low, high = fn.reductions.min(image, axes=VOXELS, keep_dims=True), fn.reductions.max(image, axes=VOXELS, keep_dims=True)
    mean = image
    for axis in reversed(VOXELS):  # a mean of means: in one go float32 would lose what the last of millions of voxels add
        mean = fn.reductions.mean(mean, axes=[axis], keep_dims=True)
    return dmath.clamp((image - mean) * factor + mean, low, high)


def _low_and_span(image: Any) -> tuple[Any, Any]:
    """Minimum and what to divide by, over all channels: 1 where the sample is constant."""
    low = fn.reductions.min(image)
    span = fn.reductions.max(image) - low
    return low, span + fn.cast(span < SMALLEST_SPAN, dtype=types.FLOAT)
