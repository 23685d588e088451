"""`dice_cross_entropy`: Dice and cross-entropy of a softmax, one pass over the scores forward and one backward.

The public function checks its arguments and hands them to a backend: `reference` (the definition, plain torch), `native`
(C++ on the CPU) or `triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..choice import choose
from . import native, reference, triton
from .op import forward

__all__ = ["available_backends", "dice_cross_entropy"]

SCORE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LABEL_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def dice_cross_entropy(scores: Tensor, label: Tensor, *, include_background: bool = False, backend: str = "auto") -> Tensor:
    """The mean Dice loss plus the mean cross-entropy, of p = softmax(scores) and the classes y of the label.

        mean over n, c of 1 - (2 Σ p[n, c]·[y = c] + s) / (Σ p[n, c] + Σ [y = c] + s)   +   mean over n, voxels of -log p[n, y]

    with Σ over the voxels of a sample, s = 1e-5 and the background, class 0, left out of the first mean: the value and the
    gradient of ``monai.losses.DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)``.

    Args:
        scores: (N, C, D, H, W), C ≥ 2, float32, float16 or bfloat16, contiguous or channels-last (any other layout is copied);
            float64 is the reference backend's.
        label: (N, 1, D, H, W), uint8, int8, int16, int32 or int64, on the scores' device.
        include_background: count class 0 in the Dice term.
        backend: "auto" takes the fastest that fits the call; any other is taken or refused.

    Returns:
        () float32 (of float64 scores float64). Differentiable with respect to `scores`; the gradient has their type and layout.

    Arithmetic is float32 whatever the type of the scores, sums over the volume are taken in an order that only sizes decide: a
    call gives the same bits with any number of threads. For the gradient the softmax is computed again; nothing of the size of
    the scores is kept but the scores. Nothing waits for a GPU.

    A score that is NaN or +inf, a voxel whose scores are all -inf, and a label that is no class make the loss NaN, and the
    whole gradient of that sample. Any other -inf is a probability of 0: the loss is infinite if the label asks for that class.

    Second and forward-mode derivatives are the reference backend's alone, the others raise.

    Raises:
        ValueError: an argument that does not fit, named with what was wanted and what came.
        RuntimeError: a backend that cannot be had here, with the reason and the ones that can.
    """
    _check(scores, label)
    chosen = choose(backend, _refusals(scores))
    if chosen == "reference":
        return reference.dice_cross_entropy(scores, label, include_background=include_background)
    return forward(scores, label, include_background, chosen)


def available_backends() -> dict[str, str]:
    """Each backend's name and "" where it can be had here, else the reason why not."""
    return {"native": native.MISSING, "triton": triton.MISSING, "reference": ""}


def _refusals(scores: Tensor) -> dict[str, str]:
    """Each backend, the best first, and why it cannot take a call with these scores, or ""."""
    double = "it computes in float32, and the scores are float64" if scores.dtype == torch.float64 else ""
    reasons = {"native": double or native.refuses(scores), "triton": double or triton.refuses(scores)}
    first = "triton" if scores.is_cuda else "native"
    # Interpreted, Triton's kernels are for tests, which ask for them by name.
    return {first: reasons.pop(first), "reference": "", **reasons}


def _check(scores: Tensor, label: Tensor) -> None:
    _check_volumes("scores", scores, "(N, C, D, H, W)", SCORE_DTYPES)
    if scores.shape[1] < 2:
        raise ValueError(f"scores must have at least 2 classes, the background one of them, got {scores.shape[1]}")
    _check_volumes("label", label, "(N, 1, D, H, W)", LABEL_DTYPES)
    wanted = (scores.shape[0], 1, *scores.shape[2:])
    if tuple(label.shape) != wanted:
        raise ValueError(f"label must be {wanted}, got {tuple(label.shape)}")
    if label.device != scores.device:
        raise ValueError(f"label must be on the scores' device {scores.device}, got {label.device}")


def _check_volumes(name: str, tensor: Tensor, wanted: str, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor {wanted}, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided:
        raise ValueError(f"{name} must be a dense tensor, got {'a nested one' if tensor.is_nested else tensor.layout}")
    if tensor.dtype not in dtypes:
        kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be one of {kinds}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.dim() != 5 or 0 in tensor.shape:
        raise ValueError(f"{name} must be {wanted} with no empty axis, got shape {tuple(tensor.shape)}")
