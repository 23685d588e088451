"""`FoldedUNet`: a trained `UNet` rewritten for inference, with the same result to rounding.

Four things make it fast. What is constant is folded: BatchNorm into the convolution before it. What is linear is exchanged: a 3³
convolution of an image upsampled by two is a transposed convolution of the image itself, or a 2³ convolution with eight times the
output channels, one set for each place of a voxel in its cell of 2³: 8 products instead of 27. What is padded is not copied:
every activation carries a margin of one voxel. And convolution, sum and ReLU are one call of oneDNN on the CPU; on a GPU
torch.compile makes one kernel of all that lies between two convolutions (`FrozenExtractor.compile`).

The margin: an activation of interior (D, H, W) lies in (D + 2, H + 2, W + 2). A convolution with zero padding maps such a buffer
to another one, right in its interior; then the six faces are written with what reflect padding would have there. Where the
interior is small (`LEAST_MARGIN_VOXELS`), the convolutions of a margin would cost more than the copy, and the interior alone is
computed and padded; under torch.compile always, since there the padding is part of a kernel that writes anyway.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from dropgen_fast.networks import UNet, size_problem

LEAST_MARGIN_VOXELS = 24**3
"""Of an interior, for its margin to be convolved with it."""
ALIGNMENT = 64  # values: what vector units, tensor cores and cuDNN ask of a weight's first byte, with room to spare

Padding = Literal["reflect", "replicate"]


@dataclass(frozen=True)
class _Weight:
    """Where in the flat vector of weights an array lies, channels last."""

    start: int
    shape: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """The array: a bias (Co,), or a convolution's (Co, Ci, kd, kh, kw) with the channels last in memory."""
        array = flat.narrow(0, self.start, math.prod(self.shape)).view(self.shape)
        return array if array.dim() == 1 else array.permute(0, 4, 1, 2, 3)


@dataclass(frozen=True)
class _Convolution:
    """A convolution of the network and what follows it."""

    weight: _Weight
    """Of its input; after an upsampling, of the channels that the way down left."""
    bias: _Weight | None
    upsampled: _Weight | None
    """After an upsampling, of the upsampled channels: as it is, or `_transposed`, which takes them before."""
    eps: float | None
    """Of the InstanceNorm that follows; None where there is none."""
    relu: bool

    def of(self, flat: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias."""
        return self.weight.of(flat), self.bias.of(flat) if self.bias is not None else None


class FoldedUNet(nn.Module):
    """The function of a `UNet` in evaluation mode, (N, in, D, H, W) → (N, out, D, H, W), faster and without a gradient.

    It runs in the data type of autocast where that is on, else in that of its weights, which are one vector (a state dict of one
    entry, and one kernel to cast them all). The result has its channels last in memory.

    Args:
        network: a `UNet` with 3³ convolutions and reflect padding, of any normalization, pooling and upsampling. Its weights are
            copied, folded in float64.
    """

    compilable = True
    """What lies between its convolutions is many small operations, which torch.compile joins."""
    flat: Tensor

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.downsamplings = network.downsamplings
        layers = list(network.model)
        self.average = any(isinstance(layer, nn.AvgPool3d) for layer in layers)
        self.trilinear = any(isinstance(layer, nn.Upsample) and layer.mode == "trilinear" for layer in layers)
        self.convolutions: list[_Convolution] = []
        arrays: list[Tensor] = []
        start = 0

        def keep(array: Tensor) -> _Weight:
            nonlocal start
            kept = array.permute(0, 2, 3, 4, 1) if array.dim() == 5 else array
            padded = kept.new_zeros(-(-kept.numel() // ALIGNMENT) * ALIGNMENT)
            padded[:kept.numel()] = kept.reshape(-1)
            arrays.append(padded)
            place = _Weight(start, tuple(kept.shape))
            start += padded.numel()
            return place

        for index, layer in enumerate(layers):
            if not isinstance(layer, nn.Conv3d):
                continue
            weight, bias, eps, relu = _folded(layers[index:index + 3])
            upsampled = None
            if index and isinstance(layers[index - 1], nn.Upsample):
                skipped = weight.shape[0]  # the widths are as many at each level on the way up as on the way down
                weight, part = weight[:, :skipped], weight[:, skipped:]
                upsampled = keep(part if self.trilinear else _transposed(part))
            self.convolutions.append(_Convolution(keep(weight), keep(bias) if bias is not None else None, upsampled, eps, relu))
        dtype = next(network.parameters()).dtype
        self.register_buffer("flat", torch.cat(arrays).to(dtype))

    @property
    def divisor(self) -> int:
        """What every axis of the input must be a multiple of."""
        return 2**self.downsamplings

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Features (N, out, D, H, W), channels last in memory, of an image (N, in, D, H, W).

        Raises:
            ValueError: a size that the `UNet` refuses.
        """
        problem = size_problem(x.shape[2:], self.divisor)
        if problem is not None:
            raise ValueError(f"a U-Net of {self.downsamplings} downsamplings: {problem}")
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.flat.dtype
        with torch.autocast(kind, enabled=False):
            return self._run(x.to(dtype), self.flat.to(dtype))

    def _run(self, x: Tensor, flat: Tensor) -> Tensor:
        convolutions = iter(self.convolutions)
        margin = F.pad(x, (1,) * 6, mode="reflect").contiguous(memory_format=torch.channels_last_3d)
        margin = _layer(margin, flat, next(convolutions))
        lowest = self.downsamplings
        skips: list[Tensor] = []
        for level in range(lowest + 1):
            margin = _layer(margin, flat, next(convolutions))
            margin = _layer(margin, flat, next(convolutions), "reflect" if level < lowest else self._padding)
            if level < lowest:
                skips.append(margin)
                margin = self._pooled(margin)
        while skips:
            margin = self._up(margin, skips.pop(), flat, next(convolutions))
            margin = _layer(margin, flat, next(convolutions), self._padding if skips else "reflect")
        return _convolve(margin, *next(convolutions).of(flat), 0)

    @property
    def _padding(self) -> Padding:
        """What goes around the input of an upsampling, if there is one: the reflection of doubled voxels repeats the edge."""
        return "reflect" if self.trilinear or not self.downsamplings else "replicate"

    def _pooled(self, margin: Tensor) -> Tensor:
        """The pooled interior with its margin."""
        if torch.compiler.is_compiling():
            cells = _interior(margin).unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
            return F.pad(cells.mean((3, 5, 7)) if self.average else cells.amax((3, 5, 7)), (1,) * 6, mode="reflect")
        if self.average:
            # The mean of 2³ voxels, as F.avg_pool3d has it, whose CPU kernel takes seven times as long and has no bfloat16.
            return F.pad(F.interpolate(_interior(margin), scale_factor=0.5, mode="trilinear"), (1,) * 6, mode="reflect")
        # Cells of two voxels that begin one voxel outside the buffer: the interior's are whole, and the others lie in the margin.
        return _mirror(F.max_pool3d(margin, 2, padding=1))

    def _up(self, margin: Tensor, skip: Tensor, flat: Tensor, convolution: _Convolution) -> Tensor:
        """The first layer after an upsampling: its convolution of a concatenation is the sum of the convolutions of the parts."""
        assert convolution.upsampled is not None
        weight = convolution.upsampled.of(flat)
        whole = _whole(skip, convolution)
        if self.trilinear:
            wide = F.interpolate(_interior(margin), scale_factor=2, mode="trilinear")
            plus = _convolve(F.pad(wide, (1,) * 6, mode="reflect"), weight, None, int(whole))
        elif _has_onednn(margin):
            plus = F.conv_transpose3d(margin, weight, stride=2, padding=2 if whole else 3)
        else:
            cells = _unfolded(_convolve(margin, _cells(weight), None, 0))
            plus = cells if whole else _interior(cells)
        return _layer(skip, flat, convolution, plus=plus)


def _folded(layers: list[nn.Module]) -> tuple[Tensor, Tensor | None, float | None, bool]:
    """Weight and bias in float64 of the convolution that a list begins with, the eps of an InstanceNorm behind it, and whether a
    ReLU ends it.

    BatchNorm in evaluation mode is y → γ (y - μ) / √(σ² + ε) + β, which goes into the convolution. InstanceNorm takes each
    channel's mean off, and so any bias.
    """
    convolution, *following = layers
    assert isinstance(convolution, nn.Conv3d)
    weight = convolution.weight.detach().double()
    bias = convolution.bias.detach().double() if convolution.bias is not None else None
    norm = following[0] if following else None
    if isinstance(norm, nn.InstanceNorm3d):
        return weight, None, norm.eps, True
    if isinstance(norm, nn.BatchNorm3d):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = norm.bias.detach().double() - norm.running_mean.double() * scale
        return weight * scale[:, None, None, None, None], shift if bias is None else shift + bias * scale, None, True
    return weight, bias, None, False


def _transposed(weight: Tensor) -> Tensor:
    """The weight (Ci, Co, 4, 4, 4) of a transposed convolution of stride 2: nearest upsampling, then a 3³ one (Co, Ci, 3, 3, 3).

    Along one axis, without padding: input voxel i, doubled, reaches output voxels 2 i + k for k from 0 to 3, through the taps
    w₂, w₁ + w₂, w₀ + w₁ and w₀.
    """
    for axis in (2, 3, 4):
        first, second, third = weight.unbind(axis)
        weight = torch.stack((third, second + third, first + second, first), axis)
    return weight.transpose(0, 1)


def _cells(transposed: Tensor) -> Tensor:
    """A `_transposed` weight (Ci, Co, 4, 4, 4) as that of a convolution (8 · Co, Ci, 2, 2, 2) with the same result, unordered.

    Its output channels are the voxels of a cell of 2³, in the order of D, H, W, and then the channels; see `_unfolded`.
    """
    taps = transposed.unflatten(4, (2, 2)).unflatten(3, (2, 2)).unflatten(2, (2, 2))  # tap k = 2 q + p: place p, input 1 - q
    return taps.permute(3, 5, 7, 1, 0, 2, 4, 6).flip(5, 6, 7).flatten(0, 3).contiguous(memory_format=torch.channels_last_3d)


def _unfolded(cells: Tensor) -> Tensor:
    """(N, 8 · C, d, h, w) → (N, C, 2 d, 2 h, 2 w): the channels of a voxel as the voxels of a cell, channels last in memory."""
    n, channels, d, h, w = cells.shape
    cells = cells.permute(0, 2, 3, 4, 1).reshape(n, d, h, w, 2, 2, 2, channels // 8).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return cells.reshape(n, 2 * d, 2 * h, 2 * w, channels // 8).permute(0, 4, 1, 2, 3)


def _whole(margin: Tensor, convolution: _Convolution) -> bool:
    """Whether a layer's margin is convolved with its interior. InstanceNorm must see the interior alone."""
    d, h, w = margin.shape[2:]
    if torch.compiler.is_compiling():
        return False
    return convolution.eps is None and (d - 2) * (h - 2) * (w - 2) >= LEAST_MARGIN_VOXELS


def _layer(
    margin: Tensor, flat: Tensor, convolution: _Convolution, padding: Padding = "reflect", plus: Tensor | None = None,
) -> Tensor:
    """Convolution, normalization and ReLU, from an activation with its margin to one with a margin as `padding` says.

    `plus` is added before the normalization, and overwritten; it has a margin where `_whole` says so.
    """
    weight, bias = convolution.of(flat)
    if _whole(margin, convolution):
        return _mirror(_convolve(margin, weight, bias, 1, relu=convolution.relu, plus=plus), padding)
    if convolution.eps is None:
        interior = _convolve(margin, weight, bias, 0, relu=convolution.relu, plus=plus)
    else:
        interior = _instance_norm(_convolve(margin, weight, bias, 0, plus=plus), convolution.eps).relu_()
    return F.pad(interior, (1,) * 6, mode=padding)


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, *, relu: bool = False, plus: Tensor | None = None,
) -> Tensor:
    """relu(convolution + plus), with zero padding; `plus` may be overwritten."""
    if _has_onednn(x):
        # What torch.compile calls for such a chain. `F.conv3d` has no ReLU, no sum, and leaves small inputs to a slow loop.
        rest = ((padding,) * 3, (1, 1, 1), (1, 1, 1), 1)
        if plus is not None:
            out: Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
                plus, x, weight, bias, *rest, "add", 1.0, "relu" if relu else None, [], None)
        else:
            out = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *rest, "relu" if relu else "none", [], None)
        return out
    out = F.conv3d(x, weight, bias, padding=padding)
    if plus is not None:
        out += plus
    return out.relu_() if relu else out


def _has_onednn(x: Tensor) -> bool:
    """Whether oneDNN's fused convolutions take a tensor. torch.compile fuses by itself, and a fake tensor has no values."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _instance_norm(x: Tensor, eps: float) -> Tensor:
    """InstanceNorm without affine; torch's own goes through another memory layout.

    Its BatchNorm of one sample does not, but on a CPU sums a channel's voxels one by one in float32. That is exact enough beside
    bfloat16 values; for others the statistics are taken by reductions that sum pairwise, which takes as long.
    """
    if x.dtype == torch.bfloat16 or x.device.type != "cpu":
        return torch.cat([F.batch_norm(sample, None, None, training=True, eps=eps) for sample in x.split(1)])
    centred = x - x.mean((2, 3, 4), keepdim=True)
    return centred.mul_((centred.square().mean((2, 3, 4), keepdim=True) + eps).rsqrt_())


def _interior(margin: Tensor) -> Tensor:
    return margin[:, :, 1:-1, 1:-1, 1:-1]


def _mirror(margin: Tensor, padding: Padding = "reflect") -> Tensor:
    """Write the six faces from the interior, axis by axis, which does edges and corners too."""
    inside = 2 if padding == "reflect" else 1
    for axis in (2, 3, 4):
        n = margin.shape[axis]
        margin.select(axis, 0).copy_(margin.select(axis, inside))
        margin.select(axis, n - 1).copy_(margin.select(axis, n - 1 - inside))
    return margin
