"""The method's training step as one would write it in plain torch and MONAI: what the engine is measured and checked against."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from torch import Tensor, nn


class Recipe:
    """The step of the reference (arXiv 2604.02564), line by line.

    Args:
        network: (N, C, D, H, W) → (N, classes, D, H, W).
        extractor: (N, Ci, D, H, W) → (N, Cf, D, H, W), frozen; None is ERM.
        p: channel dropout.
        steps: over which the cosine falls to zero.
        bf16: run extractor and network under bfloat16 autocast.
    """

    def __init__(self, network: nn.Module, extractor: Callable[[Tensor], Tensor] | None, *, p: float = 0.75,
                 learning_rate: float = 2e-4, weight_decay: float = 1e-5, steps: int = 250_000, bf16: bool = True) -> None:
        self.network, self.extractor, self.p, self.bf16 = network, extractor, p, bf16
        self.loss = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=weight_decay)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def step(self, image: Tensor, label: Tensor, keep: Tensor | None = None) -> Tensor:
        """One step; image (N, Ci, D, H, W) in [0, 1], label (N, 1, D, H, W); `keep` (N, Ci + Cf) bool fixes the draw."""
        self.optimizer.zero_grad()
        with torch.autocast(image.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext():
            scores = self.network(self.fused(image, keep))
        loss: Tensor = self.loss(scores.float(), label)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def fused(self, image: Tensor, keep: Tensor | None = None) -> Tensor:
        """Instance norm of the features, concatenation, channel dropout."""
        if self.extractor is None:
            return image
        with torch.no_grad():
            features = F.instance_norm(self.extractor(image))
        x = torch.cat([image, features], 1)
        if keep is None:
            return F.dropout3d(x, self.p)
        return x * (keep.to(x.dtype) / (1 - self.p))[:, :, None, None, None]
