"""MIND-SSC: the modality independent neighbourhood descriptor with self-similarity context, weightless.

Heinrich et al., "Towards Realtime Multimodal Fusion for Image-Guided Interventions Using Self-similarities", MICCAI 2013.
The arithmetic is the op `mind_ssc`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dropgen_fast.kernels.mind_ssc import CHANNELS, mind_ssc

__all__ = ["CHANNELS", "MIND", "VERSION"]

VERSION = "mind-ssc 1"


class MIND(nn.Module):
    """MIND-SSC of a volume (N, 1, D, H, W) → (N, 12, D, H, W) in [0, 1], float32, without gradient; see `mind_ssc`.

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
        image = image.detach()
        with torch.autocast(image.device.type, enabled=False):
            return mind_ssc(image.float(), radius=self.radius, dilation=self.dilation)
