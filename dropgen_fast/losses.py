"""Segmentation losses: the paper's, and any other by import path; weighted over the predictions of deep supervision."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropgen_fast.errors import InputError
from dropgen_fast.kernels.dice_ce import dice_cross_entropy
from dropgen_fast.networks import heads, import_object, keyword_options, one_line

GIVEN = {"include_background": False, "to_onehot_y": True, "softmax": True, "use_softmax": True}
"""Given to every loss that has an argument of that name (MONAI's words), unless an option says otherwise."""
OTHER_ACTIVATIONS = ("sigmoid", "other_act")
"""Arguments that stand in the place of a softmax."""
TRIED_SIDE = 8
"""Voxels of each axis of the scores that a loss is tried on."""
TRIED_MARGIN = 1e-3
"""Share of its value by which a loss must fall from wrong scores to right ones: more than rounding."""

Adapt = Callable[[Tensor], Tensor]


class DiceCE(nn.Module):
    """The mean Dice loss plus the mean cross-entropy of a softmax: the paper's loss, `dice_cross_entropy` as a module.

    The value and the gradient of ``monai.losses.DiceCELoss(to_onehot_y=True, softmax=True)``, which has more options.

    Args:
        include_background: count class 0 in the Dice term; the paper does not.
    """

    def __init__(self, include_background: bool = False) -> None:
        super().__init__()
        if not isinstance(include_background, bool):
            raise ValueError(f"include_background must be true or false, got {include_background!r}")
        self.include_background = include_background

    def forward(self, scores: Tensor, label: Tensor) -> Tensor:
        """Loss () float32 of scores (N, C, D, H, W) in any floating type, and class indices (N, 1, D, H, W) of any whole type."""
        return dice_cross_entropy(scores, label, include_background=self.include_background)


LOSSES: dict[str, Callable[..., Any]] = {"dice_ce": DiceCE}
"""Losses that go by a name of their own."""


class SegmentationLoss(nn.Module):
    """The loss of what a network gives: one prediction, or with deep supervision the weighted mean over several.

    Prediction i, counted from the finest, weighs 2^-i, and the weights sum to 1: nnU-Net's rule (Isensee et al. 2021, doi
    10.1038/s41592-020-01008-z), but that nnU-Net gives the coarsest none; here a network that offers a prediction has it
    trained. For a coarser prediction the label is brought to its grid by the nearest voxel (half-pixel centres).

    Args:
        loss: (scores (N, C, d, h, w) float32, what `adapt` makes of the label) → (); a `DiceCE` gets the scores in their own
            type, without a copy.
        adapt: the label (N, 1, d, h, w) uint8 as that loss wants it.
    """

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], adapt: Adapt) -> None:
        super().__init__()
        self.loss = loss
        self.adapt = adapt

    def forward(self, output: object, label: Tensor) -> Tensor:
        """Loss () float32 of the output of a network, in any floating type, and the label (N, 1, D, H, W) uint8."""
        predictions = heads(output)
        total = 2 - 2.0 ** (1 - len(predictions))  # 1 + 1/2 + 1/4 + …
        # Autocast would take matrix products and convolutions within a loss to half precision again.
        with torch.autocast(label.device.type, enabled=False):
            terms = [self.loss(scores if isinstance(self.loss, DiceCE) else scores.float(),
                               self.adapt(_on_grid(label, scores.shape[2:]))) / (2.0**i * total)
                     for i, scores in enumerate(predictions)]
        return torch.stack(terms).sum().float()


def build_loss(path: str, options: Sequence[str], classes: int) -> SegmentationLoss:
    """A loss of (what `DropGen.forward` gives in training, label (N, 1, D, H, W) uint8).

    `DiceCE`, and a loss that turns the label into one-hot itself, as MONAI's do (``to_onehot_y``), get it as it is. Any other
    gets class indices, (N, D, H, W) int64 as `torch.nn.CrossEntropyLoss` or (N, 1, D, H, W) int64, whichever it takes: it is
    tried on small tensors.

    Args:
        path: one of `LOSSES`, or ``package.module:Name``, a class or function that returns a loss: scores (N, C, D, H, W) before
            softmax, label → ().
        options: its keyword arguments as name=value; `GIVEN` are added. A list of numbers given as ``weight`` becomes a tensor.
        classes: C, with the background.

    Raises:
        InputError: nothing at that path, arguments that it refuses, or no differentiable number comes out.
    """
    if path not in LOSSES and ":" not in path:
        raise InputError(f"no loss {path!r}; there is {', '.join(LOSSES)}, or give package.module:Name")
    build = LOSSES[path] if path in LOSSES else import_object(path, "loss")
    arguments = _arguments(build, path, keyword_options(options, "loss_options"))
    try:
        loss = build(**arguments)
    except Exception as error:  # whatever a foreign class raises for arguments that it refuses
        raise InputError(f"loss {path} refuses its arguments {arguments}: {one_line(error)}") from error
    if not callable(loss):
        raise InputError(f"loss {path} must give something to call with scores and label, got {type(loss).__name__}")
    as_is = isinstance(loss, DiceCE) or bool(arguments.get("to_onehot_y"))
    return SegmentationLoss(loss, _fitting(loss, path, classes, as_is=as_is))


def _arguments(build: Callable[..., Any], path: str, options: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments for `build`: the options, and those of `GIVEN` that it has."""
    try:
        accepted = inspect.signature(build).parameters
    except (TypeError, ValueError) as error:
        raise InputError(f"loss {path} has no signature that can be read: wrap it in a function") from error
    given = {name: value for name, value in GIVEN.items() if name in accepted}
    if any(options.get(name) for name in OTHER_ACTIVATIONS):
        given.pop("softmax", None)
    arguments = given | options
    if isinstance(weight := arguments.get("weight"), list):
        arguments["weight"] = torch.tensor(weight, dtype=torch.float32)
    return arguments


def _fitting(loss: Callable[[Tensor, Tensor], Tensor], path: str, classes: int, *, as_is: bool) -> Adapt:
    """How the label must be given for the loss to be a number with a gradient, lower for right scores than for wrong ones.

    The last is so for no loss that compares each score with the index of the voxel's class, which torch would stretch over the
    channels: its sum over the channels is the same whichever of them is the highest.

    Raises:
        InputError: there is no way, or it is no such number.
    """
    classes_here = (torch.arange(TRIED_SIDE**3) % classes).reshape(1, 1, *[TRIED_SIDE] * 3).expand(2, -1, -1, -1, -1)
    right = torch.zeros(2, classes, *[TRIED_SIDE] * 3).scatter_(1, classes_here, 10.0)
    wrong = right.roll(1, 1).requires_grad_()
    label = classes_here.to(torch.uint8)
    tried = copy.deepcopy(loss)  # some keep a state
    problem = ""
    for adapt in (_as_is,) if as_is else (_indices, _indices_with_channel):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a label that does not fit, which is found out here
                high, low = tried(wrong, adapt(label)), tried(right, adapt(label))
        except Exception as error:  # whatever a foreign loss raises for a label that it cannot take
            problem = problem or one_line(error)
            continue
        _check_value(high, wrong, path)
        if float(high.detach() - low) > TRIED_MARGIN * max(abs(float(high.detach())), abs(float(low))):
            return adapt
        problem = problem or "it is no lower for right scores than for wrong ones"
    raise InputError(f"loss {path} cannot take scores (N, {classes}, D, H, W) with class indices as the label: {problem}")


def _check_value(value: object, scores: Tensor, path: str) -> None:
    if not isinstance(value, Tensor) or value.dim() != 0:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"loss {path} must give one number, a tensor of shape (), got {got}: set its reduction to the mean")
    if not value.requires_grad or torch.autograd.grad(value, scores, allow_unused=True)[0] is None:
        raise InputError(f"loss {path} has no gradient with respect to the scores: give a differentiable loss")


def _on_grid(label: Tensor, size: Sequence[int]) -> Tensor:
    """The label (N, 1, D, H, W) at the nearest voxel of a grid (d, h, w) over the same field of view."""
    return label if tuple(label.shape[2:]) == tuple(size) else F.interpolate(label, tuple(size), mode="nearest-exact")


def _as_is(label: Tensor) -> Tensor:
    return label


def _indices(label: Tensor) -> Tensor:
    return label[:, 0].long()


def _indices_with_channel(label: Tensor) -> Tensor:
    return label.long()
