"""Losses by name and by import path against their formulas, over one prediction and over several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import monai.losses
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropgen_fast.errors import InputError
from dropgen_fast.losses import build_loss

CLASSES = 3
CE = "torch.nn:CrossEntropyLoss"


class WithChannel(nn.Module):
    """A loss of our users': class indices (N, 1, D, H, W), whole numbers that `one_hot` takes."""

    def forward(self, scores: Tensor, label: Tensor) -> Tensor:
        if label.dim() != 5:
            raise ValueError("label wants a channel")
        return (scores.softmax(1) - F.one_hot(label[:, 0], scores.shape[1]).movedim(-1, 1)).square().mean()


class Counting(nn.Module):
    """A loss that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, scores: Tensor, label: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(scores, label)


class Elementwise(nn.Module):
    """A loss that compares whatever can be broadcast."""

    def forward(self, scores: Tensor, label: Tensor) -> Tensor:
        return (scores.sigmoid() - label).abs().mean()


class Reversed(nn.Module):
    """A score, which is higher where the network is right."""

    def forward(self, scores: Tensor, label: Tensor) -> Tensor:
        return -F.cross_entropy(scores, label)


class Hard(nn.Module):
    """The share of wrong voxels, which has no gradient."""

    def forward(self, scores: Tensor, label: Tensor) -> Tensor:
        return (scores.argmax(1) != label).float().mean()


class Projected(nn.Module):
    """A loss with a matrix product, which autocast would take to half precision."""

    def forward(self, scores: Tensor, label: Tensor) -> Tensor:
        mixed = torch.einsum("ncdhw,ck->nkdhw", scores, torch.eye(scores.shape[1], device=scores.device) + 0.3)
        return F.cross_entropy(mixed, label)


def factory(scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that gives a loss which is no module."""
    return lambda scores, label: scale * F.cross_entropy(scores, label)


def number() -> float:
    """A factory that gives no loss."""
    return 1.0


def scores_and_label(size: tuple[int, ...] = (4, 6, 5), seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, CLASSES, *size, generator=generator).requires_grad_()
    return scores, torch.randint(0, CLASSES, (2, 1, *size), generator=generator, dtype=torch.uint8)


def dice_ce_by_hand(scores: Tensor, label: Tensor) -> Tensor:
    """Mean over samples and foreground classes of 1 - (2 Σ p g + s) / (Σ p + Σ g + s), s = 1e-5, plus the mean of -log p."""
    p = scores.double().softmax(1)
    g = torch.stack([label[:, 0] == k for k in range(scores.shape[1])], 1).double()
    axes = (2, 3, 4)
    dice = 1 - (2 * (p * g).sum(axes) + 1e-5) / (p.sum(axes) + g.sum(axes) + 1e-5)
    return dice[:, 1:].mean() - (p.log() * g).sum(1).mean()


def test_dice_ce_is_the_paper_s() -> None:
    """float32 sums of 120 voxels: an error of at most 120 · 2^-24 = 7e-6 of the value."""
    scores, label = scores_and_label()
    loss = build_loss("dice_ce", (), CLASSES)
    value = loss(scores, label)
    assert (value.shape, value.dtype) == ((), torch.float32)
    wanted = dice_ce_by_hand(scores, label)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=0)
    gradient, exact = (torch.autograd.grad(v, scores)[0] for v in (value, wanted))
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))
    assert label.dtype == torch.uint8


def test_dice_ce_with_the_background() -> None:
    """MONAI's, both of float32 sums of 120 voxels."""
    scores, label = scores_and_label()
    value = build_loss("dice_ce", ("include_background=true",), CLASSES)(scores, label)
    wanted = monai.losses.DiceCELoss(to_onehot_y=True, softmax=True)(scores, label)
    torch.testing.assert_close(value, wanted, rtol=2e-5, atol=0)
    assert abs(value - build_loss("dice_ce", (), CLASSES)(scores, label)) > 1e-3


def test_dice_ce_makes_no_copy_of_half_scores() -> None:
    """What the gradient keeps: the scores themselves, the label, two numbers of each sample and class."""
    scores, label = scores_and_label((8, 8, 8))
    half = scores.detach().bfloat16().requires_grad_()
    loss = build_loss("dice_ce", (), CLASSES)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        loss(half, label)
    assert [t.data_ptr() for t in kept if t.numel() >= label.numel()] == [half.data_ptr(), label.data_ptr()]


@pytest.mark.parametrize(("path", "options", "same"), [
    ("monai.losses:DiceFocalLoss", ("gamma=3", "lambda_focal=0.5"),
     monai.losses.DiceFocalLoss(include_background=False, to_onehot_y=True, softmax=True, gamma=3, lambda_focal=0.5)),
    ("monai.losses:TverskyLoss", ("alpha=0.3", "beta=0.7"),
     monai.losses.TverskyLoss(include_background=False, to_onehot_y=True, softmax=True, alpha=0.3, beta=0.7)),
    ("monai.losses:FocalLoss", (), monai.losses.FocalLoss(include_background=False, to_onehot_y=True, use_softmax=True)),
    ("monai.losses:DiceLoss", ("sigmoid=true",), monai.losses.DiceLoss(include_background=False, to_onehot_y=True, sigmoid=True)),
    ("monai.losses:DiceCELoss", ("include_background=true", "weight=[1, 2, 3]"),
     monai.losses.DiceCELoss(to_onehot_y=True, softmax=True, weight=torch.tensor([1.0, 2.0, 3.0]))),
    ("monai.losses:DiceCELoss", ("lambda_ce=0.5",),
     monai.losses.DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, lambda_ce=0.5)),
])
def test_monai_s_losses(path: str, options: tuple[str, ...], same: nn.Module) -> None:
    scores, label = scores_and_label()
    assert torch.equal(build_loss(path, options, CLASSES)(scores, label), same(scores, label))


@pytest.mark.parametrize(("path", "options", "same"), [
    (CE, (), F.cross_entropy),
    (CE, ("weight=[1, 2, 3]", "label_smoothing=0.1"),
     lambda s, y: F.cross_entropy(s, y, torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1)),
    (f"{__name__}:WithChannel", (), lambda s, y: (s.softmax(1) - torch.eye(CLASSES)[y].movedim(-1, 1)).square().mean()),
    (f"{__name__}:factory", ("scale=2",), lambda s, y: 2 * F.cross_entropy(s, y)),
])
def test_losses_that_take_class_indices(path: str, options: tuple[str, ...], same: Any) -> None:
    scores, label = scores_and_label()
    value = build_loss(path, options, CLASSES)(scores, label)
    assert torch.equal(value, same(scores, label[:, 0].long()))
    assert torch.autograd.grad(value, scores)[0].any()


@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("name", ["torch.nn:MSELoss", "torch.nn:SmoothL1Loss", f"{__name__}:Elementwise"])
def test_an_index_is_not_stretched_over_the_channels(name: str, classes: int) -> None:
    """Scores (2, 2, D, H, W) and a label (2, D, H, W) or (2, 1, D, H, W) have a mean difference, which is nonsense."""
    with pytest.raises(InputError, match=r"cannot take scores.*(no lower for right scores|size)"):
        build_loss(name, (), classes)


def test_trying_leaves_no_trace() -> None:
    before = torch.get_rng_state()
    assert build_loss(f"{__name__}:Counting", (), CLASSES).loss.calls == 0
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("path", ["dice_ce", CE, f"{__name__}:Projected"])
def test_half_precision_scores_are_taken_to_float32(path: str) -> None:
    """Within autocast too: the bits are those of the same scores in float32."""
    scores, label = scores_and_label()
    loss = build_loss(path, (), CLASSES)
    half = scores.detach().bfloat16().requires_grad_()
    wanted = loss(half.detach().float(), label)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(half, label)
    assert value.dtype == torch.float32
    assert torch.equal(value, wanted)
    value.backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("path", ["dice_ce", CE])
def test_deep_supervision(path: str) -> None:
    """Weights 4/7, 2/7, 1/7; the coarser labels are voxels of the finer one, at the centre of each cell, ties upwards."""
    scores, label = scores_and_label((8, 8, 4))
    loss = build_loss(path, (), CLASSES)
    output = [scores, scores_and_label((4, 4, 2), 1)[0], scores_and_label((2, 2, 2), 2)[0]]
    labels = [label, label[:, :, 1::2, 1::2, 1::2], label[:, :, 2::4, 2::4, 1::2]]
    one, two, three = (loss(*pair) for pair in zip(output, labels, strict=True))
    for kind in (list, tuple):
        torch.testing.assert_close(loss(kind(output), label), (4 * one + 2 * two + three) / 7, rtol=1e-6, atol=0)
    assert all(g.any() for g in torch.autograd.grad(loss(output, label), output))


def test_dice_ce_takes_views_of_stacked_half_predictions() -> None:
    """As MONAI's DynUNet gives them in training under autocast: each a view of every other volume of a stack."""
    stack = torch.stack([scores_and_label(seed=seed)[0].detach() for seed in (0, 1)], 1).bfloat16().requires_grad_()
    label = scores_and_label()[1]
    loss = build_loss("dice_ce", (), CLASSES)
    assert not stack.unbind(1)[1].is_contiguous()
    value = loss(stack, label)
    wanted = (2 * dice_ce_by_hand(stack[:, 0], label) + dice_ce_by_hand(stack[:, 1], label)) / 3
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=0)
    gradient, exact = (torch.autograd.grad(v, stack)[0] for v in (value, wanted))
    torch.testing.assert_close(gradient, exact, rtol=2**-7, atol=1e-5 * float(exact.abs().max()))


def test_stacked_predictions_are_a_list_of_them() -> None:
    output = [scores_and_label(seed=seed)[0] for seed in (0, 1)]
    label = scores_and_label()[1]
    loss = build_loss("dice_ce", (), CLASSES)
    assert torch.equal(loss(torch.stack(output, 1), label), loss(output, label))
    assert torch.equal(loss(output[:1], label), loss(output[0], label))


@pytest.mark.parametrize("path", ["dice_ce", CE])
def test_the_compiler_takes_network_and_loss(path: str) -> None:
    """float32 sums of 512 voxels in another order: 512 · 2^-24 = 3e-5 of the value at most."""
    network, loss = nn.Conv3d(2, CLASSES, 3, padding=1), build_loss(path, (), CLASSES)
    x, label = torch.rand(2, 2, 8, 8, 8), scores_and_label((8, 8, 8))[1]

    def supervised(x: Tensor, label: Tensor) -> Tensor:
        value: Tensor = loss([network(x), network(x)[..., ::2, ::2, ::2]], label)
        return value

    wanted = supervised(x, label)
    torch._dynamo.reset()
    value = torch.compile(supervised, backend="aot_eager", dynamic=False, fullgraph=True)(x, label)
    torch.testing.assert_close(value, wanted, rtol=3e-5, atol=0)
    value.backward()
    assert network.weight.grad is not None
    torch._dynamo.reset()


@pytest.mark.parametrize(("path", "options", "message"), [
    ("dice", (), "no loss 'dice'; there is dice_ce, or give package.module:Name"),
    ("no.such.module:Loss", (), "cannot import no.such.module"),
    ("monai.losses:NoLoss", (), "has no NoLoss"),
    ("dice_ce", ("gamma",), "loss_options are name=value, got 'gamma'"),
    ("dice_ce", ("gamma=2",), r"refuses its arguments.*gamma"),
    ("dice_ce", ("include_background=2",), r"refuses its arguments.*include_background must be true or false, got 2"),
    (CE, ("weight=[1, 2]",), "cannot take scores .N, 3, D, H, W. .*weight"),
    (CE, ("reduction=none",), r"must give one number.*got shape \(2, 8, 8, 8\): set its reduction"),
    ("monai.losses:DiceLoss", ("reduction=none",), "must give one number"),
    ("builtins:dict", (), "no signature"),
    (f"{__name__}:CLASSES", (), "no signature"),
    ("torch.nn:ReLU", (), "cannot take scores"),
    ("torch.nn:MSELoss", (), "cannot take scores"),
    (f"{__name__}:number", (), "must give something to call with scores and label, got float"),
    (f"{__name__}:Reversed", (), "no lower for right scores than for wrong ones"),
    (f"{__name__}:Hard", (), "has no gradient with respect to the scores"),
    ("torch.nn.functional:cross_entropy", (), "refuses its arguments.*missing"),
])
def test_losses_that_cannot_be_had(path: str, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        build_loss(path, options, CLASSES)
    assert "\n" not in str(error.value)
