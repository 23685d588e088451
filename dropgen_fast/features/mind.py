"""MIND-SSC: the modality independent neighbourhood descriptor with self-similarity context, weightless.

Heinrich et al., "Towards Realtime Multimodal Fusion for Image-Guided Interventions Using Self-similarities", MICCAI 2013.
"""

from __future__ import annotations

import itertools

import torch
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
            ssd = self._mean_squared_differences(image[:, 0].float())
            least = ssd.amin(1, keepdim=True)
            noise = ssd.mean(1, keepdim=True) - least
            usual = noise.mean((1, 2, 3, 4), keepdim=True)
            noise = torch.minimum(torch.maximum(noise, usual * 1e-3), usual * 1e3) + 1e-9
            return ssd.sub_(least).div_(noise).neg_().exp_()

    def _mean_squared_differences(self, volume: Tensor) -> Tensor:
        """(N, D, H, W) → (N, 12, D, H, W): means over the box of the squared differences, pair by pair.

        The mean is a sum of the differences of a volume scaled by the root of the box's size; edges are repeated in the
        one volume rather than in twelve; and one pair is finished before the next begins, so that its few volumes stay in
        the processor's cache. That is where the time goes otherwise.
        """
        volume = volume * (2 * self.radius + 1) ** -1.5
        shifted = {offset: self._shifted(volume, offset) for offset in NEIGHBOURS}
        out = volume.new_empty(volume.shape[0], len(PAIRS), *volume.shape[1:])
        for k, (a, b) in enumerate(PAIRS):
            squared = (shifted[a] - shifted[b]).square_()
            out[:, k] = box_sum(squared, self.radius)
        return out

    def _shifted(self, volume: Tensor, offset: tuple[int, ...]) -> Tensor:
        """The volume (N, D, H, W) as seen from that neighbour, edges clamped, then padded by the radius, edges clamped."""
        for axis, step in enumerate(offset, start=1):
            n = volume.shape[axis]
            index = torch.arange(-self.radius, n + self.radius, device=volume.device).clamp_(0, n - 1)
            volume = volume.index_select(axis, (index + step * self.dilation).clamp_(0, n - 1))
        return volume


def box_sum(x: Tensor, radius: int) -> Tensor:
    """Sums over (2 · radius + 1)³ voxels of (N, D + 2 · radius, …), axis by axis, where the whole box lies inside: (N, D, …)."""
    for axis in (3, 2, 1):
        n = x.shape[axis] - 2 * radius
        first, *others = (x.narrow(axis, k, n) for k in range(2 * radius + 1))
        x = sum(others, first)
    return x
