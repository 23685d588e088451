"""MIND-SSC: the modality independent neighbourhood descriptor with self-similarity context, weightless.

Heinrich et al., "Towards Realtime Multimodal Fusion for Image-Guided Interventions Using Self-similarities", MICCAI 2013.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = 12
VERSION = "mind-ssc 1"
# The six face neighbours, and the twelve pairs of them that are an edge apart (distance √2).
NEIGHBOURS = tuple(tuple(sign if axis == a else 0 for a in range(3)) for axis in range(3) for sign in (-1, 1))
PAIRS = tuple((a, b) for a, b in itertools.combinations(NEIGHBOURS, 2)
              if sum((i - j) ** 2 for i, j in zip(a, b, strict=True)) == 2)


class MIND(nn.Module):
    """MIND-SSC of a volume (N, 1, D, H, W) → (N, 12, D, H, W) in (0, 1], float32.

    Channel k is exp(-(SSD_k - min SSD) / v): SSD_k the mean squared difference, over a box, between the volume shifted to
    the k-th pair of neighbours; v their mean over the channels after the minimum is taken off, held within 10^±3 times
    its mean over the volume. Edges are clamped. It does not change when intensities are scaled, shifted or inverted.

    Args:
        radius: of the box, in voxels: (2 · radius + 1)³.
        dilation: distance of the neighbours, in voxels.
    """

    def __init__(self, radius: int = 1, dilation: int = 1) -> None:
        super().__init__()
        if radius < 0 or dilation < 1:
            raise ValueError(f"radius must be at least 0 and dilation at least 1, got {radius} and {dilation}")
        self.radius, self.dilation = radius, dilation

    def forward(self, image: Tensor) -> Tensor:
        """Descriptors of a volume; float32 whatever the input and the autocast."""
        if image.dim() != 5 or image.shape[1] != 1:
            raise ValueError(f"image must be (N, 1, D, H, W), got shape {tuple(image.shape)}")
        with torch.autocast(image.device.type, enabled=False):
            ssd = box_mean(self._squared_differences(image.contiguous().float()), self.radius)
            ssd -= ssd.amin(1, keepdim=True)
            noise = ssd.mean(1, keepdim=True)
            usual = noise.mean((1, 2, 3, 4), keepdim=True)
            noise = torch.minimum(torch.maximum(noise, usual * 1e-3), usual * 1e3) + 1e-9
            return ssd.div_(noise).neg_().exp_()

    def _squared_differences(self, image: Tensor) -> Tensor:
        """(N, 12, D, H, W): squared differences of the shifted volumes, pair by pair."""
        d = self.dilation
        size = image.shape[2:]
        padded = F.pad(image, (d,) * 6, mode="replicate")

        def shifted(offset: tuple[int, ...]) -> Tensor:
            view = padded
            for axis, (o, n) in enumerate(zip(offset, size, strict=True)):
                view = view.narrow(2 + axis, d + o * d, n)
            return view

        out = image.new_empty(image.shape[0], len(PAIRS), *size)
        for k, (a, b) in enumerate(PAIRS):
            torch.sub(shifted(a), shifted(b), out=out[:, k : k + 1])
        return out.square_()


def box_mean(x: Tensor, radius: int) -> Tensor:
    """Mean over (2 · radius + 1)³ voxels with clamped edges, axis by axis, of (N, C, D, H, W)."""
    width = 2 * radius + 1
    for axis in (2, 3, 4):
        pads = [0] * 6
        pads[2 * (4 - axis)] = pads[2 * (4 - axis) + 1] = radius
        padded = F.pad(x, pads, mode="replicate")
        x = padded.narrow(axis, 0, x.shape[axis]).clone()
        for shift in range(1, width):
            x += padded.narrow(axis, shift, x.shape[axis])
    return x.div_(width**3)
