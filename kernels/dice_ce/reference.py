"""`dice_cross_entropy` in plain torch: the definition that every other backend is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

SMOOTH = 1e-5
"""Added to the numerator and the denominator of Dice: MONAI's default."""


def dice_cross_entropy(scores: Tensor, label: Tensor, *, include_background: bool) -> Tensor:
    """See the public `dice_cross_entropy`; float64 scores are computed, and give a loss, in float64."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    number = torch.arange(scores.shape[1], device=label.device).view(1, -1, 1, 1, 1)
    is_class = label == number  # (N, C, D, H, W)
    log_p = scores.log_softmax(1)
    cross_entropy = -log_p.where(is_class, 0.0).sum(1).flatten(1).mean(1)
    p, voxels = log_p.exp(), (2, 3, 4)
    hit, both = p.where(is_class, 0.0).sum(voxels), p.sum(voxels) + is_class.sum(voxels)
    dice = 1 - (2 * hit + SMOOTH) / (both + SMOOTH)
    loss = dice[:, 0 if include_background else 1:].mean(1) + cross_entropy
    # A product, and no choice: the gradient of a sample whose label is wrong is to be no number, too.
    wrong = ((label < 0) | (label >= scores.shape[1])).flatten(1).any(1)
    return (loss * torch.where(wrong, torch.nan, 1.0).to(loss)).mean()
