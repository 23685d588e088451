"""`dice_cross_entropy`: the definition against MONAI's DiceCELoss, each backend against the definition in float64."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.export import Dim

from dropgen_fast.kernels import memory
from dropgen_fast.kernels.dice_ce import available_backends, dice_cross_entropy, native, reference

OPS = torch.ops.dropgen_fast
UNIT = 2.0**-24  # largest relative error of one rounding to float32
ADDED = 128  # numbers that are added up in float32 one after the other, at most: the run of the native backend
TINY = 2.0**-120  # a probability below e^-87 may be 0
HALF = {torch.float32: (0.0, 0.0), torch.float16: (2.0**-11, 2.0**-25), torch.bfloat16: (2.0**-8, 0.0)}
"""Of rounding a gradient to a type: relative, half of the last place, and absolute, below the normal numbers."""
LABELS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@pytest.fixture(params=("reference", "native", "triton"))
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend by name."""
    if reason := available_backends()[request.param]:
        pytest.fail(f"{request.param} must be here for the tests: {reason}")
    return str(request.param)


@dataclass(frozen=True)
class Case:
    """A call: sizes, types, layout, and how far the scores of a voxel lie apart."""

    classes: int = 5
    size: tuple[int, int, int] = (5, 6, 7)
    n: int = 2
    dtype: torch.dtype = torch.float32
    label_dtype: torch.dtype = torch.uint8
    last: bool = False
    background: bool = False
    spread: float = 2.0
    sure: float = 0.0
    """Added to the score of the label's class."""
    absent: int = 1
    """Of the classes, the last ones that no voxel has."""

    def make(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """(scores, label)."""
        g = torch.Generator().manual_seed(self.classes + self.n + sum(self.size))
        scores = torch.randn(self.n, self.classes, *self.size, generator=g) * self.spread
        label = torch.randint(0, max(1, self.classes - self.absent), (self.n, 1, *self.size), generator=g)
        scores = scores.scatter_add(1, label, torch.full_like(scores, self.sure)).to(self.dtype)
        layout = torch.channels_last_3d if self.last else torch.contiguous_format
        return scores.to(device).contiguous(memory_format=layout), label.to(device, self.label_dtype)


@dataclass(frozen=True)
class Exact:
    """Loss and gradient of a call in float64, and how far float32 arithmetic may be off either, voxel by voxel."""

    loss: Tensor
    grad: Tensor
    loss_error: float
    grad_error: Tensor

    def agrees(self, grad: Tensor, times: float = 1.0, relative: float = 0.0, absolute: float = 0.0) -> bool:
        """Whether a gradient is within `times` its error and a rounding to its own type."""
        off = (grad.cpu().double() - self.grad).abs()
        return bool((off <= times * self.grad_error + relative * self.grad.abs() + absolute).all())


def exact(scores: Tensor, label: Tensor, background: bool = False, upstream: float = 1.0) -> Exact:
    """The definition in float64 on the CPU, with worst-case bounds on the rounding of float32 arithmetic.

    In roundings (u = 2^-24): e^(score - greatest) is off by |score - greatest| u for the difference, by as much again where a
    GPU multiplies it by log2 e, and by 3 u for the function; its sum over C classes adds C u, a GPU's quotient and the product
    5 u. Sums over voxels add 128 u at most, one more rounding each for what is done with them. So p is off by `p_error` of
    itself, Dice's sums by `sum_error`, a ratio of two by twice as much. The gradient p (q - Σ p q + even) - [y = c] even adds the
    C terms of Σ p q; with |q| + even at most `largest`, it is off by a share of p · largest, and in the voxel's own class by
    three roundings of even.
    """
    double = scores.detach().cpu().double().requires_grad_()
    loss = reference.dice_cross_entropy(double, label.cpu(), include_background=background)
    grad = torch.autograd.grad(loss * upstream, double)[0]
    with torch.no_grad():
        classes, voxels, n = double.shape[1], double[0, 0].numel(), len(double)
        below = (double.amax(1, keepdim=True) - double).nan_to_num(posinf=0.0)
        p, mine = double.softmax(1), label.cpu() == torch.arange(classes).view(1, -1, 1, 1, 1)
        both = (p.sum((2, 3, 4)) + mine.sum((2, 3, 4)))[:, 0 if background else 1:] + reference.SMOOTH
        even = 1 / (n * voxels)
        largest = 3 / both.amin(1).view(-1, 1, 1, 1, 1) / (n * both.shape[1]) + even  # |hit| + |all| + even, for num ≤ den
        reach = below.max().item()
        p_error = (2 * reach + 3 + classes + 5) * UNIT
        sum_error = p_error + (ADDED + 2) * UNIT
        own = (below * mine).sum(1).mean().item()
        cross_entropy = ADDED * own * UNIT + (3 + classes) * UNIT + 2 * reach * UNIT + 2 * UNIT * abs(loss.item())
        share = 2 * (p_error + 3 * sum_error + (classes + 8) * UNIT)
        grad_error = (share * largest * p + 3 * UNIT * even * mine) * abs(upstream)
    return Exact(loss.detach(), grad, 2 * sum_error + cross_entropy, grad_error + TINY)


def gradient(scores: Tensor, label: Tensor, background: bool, backend: str, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    """(loss, gradient) of a call."""
    scores = scores.detach().requires_grad_()
    loss = dice_cross_entropy(scores, label, include_background=background, backend=backend)
    assert (loss.dtype, loss.shape, loss.device) == (torch.float32, (), scores.device)
    return loss.detach(), torch.autograd.grad(loss * upstream, scores)[0]


def check(scores: Tensor, label: Tensor, background: bool, backend: str, upstream: float = 1.0) -> None:
    """A call against the definition: types, layout, values."""
    before = scores.clone(), label.clone()
    wanted = exact(scores, label, background, upstream)
    loss, grad = gradient(scores, label, background, backend, upstream)
    assert torch.equal(scores, before[0])
    assert torch.equal(label, before[1])
    assert abs(loss.item() - wanted.loss.item()) <= wanted.loss_error
    assert (grad.dtype, grad.shape, grad.device) == (scores.dtype, scores.shape, scores.device)
    relative, absolute = HALF[scores.dtype]
    # Triton's interpreter cuts digits off where a GPU rounds to bfloat16.
    relative *= 2 if backend == "triton" and scores.dtype == torch.bfloat16 and not scores.is_cuda else 1
    assert wanted.agrees(grad, 1 + relative, relative, absolute)


CASES = {
    "plain": Case(), "background": Case(background=True), "one sample": Case(n=1), "last": Case(last=True, n=3),
    "half": Case(dtype=torch.float16), "bfloat16": Case(dtype=torch.bfloat16, classes=4),
    "half last": Case(dtype=torch.float16, last=True), "bfloat16 last": Case(dtype=torch.bfloat16, last=True, background=True),
    **{str(dtype).removeprefix("torch."): Case(label_dtype=dtype) for dtype in LABELS},
    "two classes": Case(classes=2, absent=0), "two classes last": Case(classes=2, last=True, dtype=torch.bfloat16),
    "16 classes": Case(classes=16, size=(4, 8, 16)), "16 last": Case(classes=16, last=True), "17 classes": Case(classes=17),
    "17 last": Case(classes=17, last=True, label_dtype=torch.int16), "128 classes": Case(classes=128, n=1, last=True),
    "every class there": Case(absent=0, background=True), "background alone": Case(absent=4),
    "far apart": Case(spread=40.0), "far apart, half": Case(spread=40.0, dtype=torch.float16),
    "sure": Case(spread=0.5, sure=15.0), "sure, half": Case(spread=0.5, sure=15.0, dtype=torch.float16, last=True),
    "more than a tile": Case(size=(9, 10, 11), classes=3), "by 16": Case(size=(4, 8, 16), n=1),
    "one voxel": Case(size=(1, 1, 1), n=1), "two voxels last": Case(size=(1, 1, 2), last=True),
    **{f"one {axis}": Case(size=tuple(1 if k == i else 6 for k in range(3)), last=True)  # type: ignore[arg-type]
       for i, axis in enumerate("zyx")},
}


@pytest.mark.parametrize("name", CASES)
def test_against_the_definition(name: str, backend: str) -> None:
    case = CASES[name]
    check(*case.make(), case.background, backend)


@pytest.mark.parametrize("case", [
    *[Case(classes=3, size=(1, 1, voxels)) for voxels in (127, 128, 129, 255, 8191, 8192, 8193)],
    Case(classes=16, size=(40, 41, 33)), Case(classes=4, size=(40, 41, 33), last=True, dtype=torch.bfloat16, n=3),
    Case(classes=14, size=(30, 31, 33), dtype=torch.float16, label_dtype=torch.int64), Case(classes=128, size=(20, 20, 30), n=1),
], ids=str)
def test_the_native_kernel_beyond_one_run(case: Case) -> None:
    """Tails of runs and of blocks, several blocks, several threads."""
    check(*case.make(), case.background, "native")


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("name", ["plain", "two classes", "17 classes", "background alone", "far apart", "one voxel"])
def test_the_definition_is_monai_s(name: str, background: bool) -> None:
    """In float64, but for MONAI's half of what is neither hit nor missed: some roundings of 2^-53."""
    scores, label = CASES[name].make()
    scores = scores.double().requires_grad_()
    wanted = DiceCELoss(include_background=background, to_onehot_y=True, softmax=True)(scores, label)
    found = dice_cross_entropy(scores, label, include_background=background)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)
    grads = [torch.autograd.grad(loss, scores)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-13 * float(grads[1].abs().max()))


@pytest.mark.parametrize("name", ["plain", "background", "last", "17 classes", "far apart"])
def test_each_backend_is_monai_s(name: str, backend: str) -> None:
    """Both in float32, so twice as far apart as either may be from the definition."""
    case = CASES[name]
    scores, label = case.make()
    found = gradient(scores, label, case.background, backend)
    theirs = scores.clone().requires_grad_()
    loss = DiceCELoss(include_background=case.background, to_onehot_y=True, softmax=True)(theirs, label)
    wanted = exact(scores, label, case.background)
    assert abs(found[0] - loss.detach()) <= 2 * wanted.loss_error
    assert ((found[1] - torch.autograd.grad(loss, theirs)[0]).abs() <= 2 * wanted.grad_error).all()


def test_what_is_wrong_is_beyond_the_bounds() -> None:
    """That the comparisons above can fail: another smoothing, a Dice over the batch, a background, a shifted label."""
    monai = {"include_background": False, "to_onehot_y": True, "softmax": True}
    for name, change in (("plain", {"batch": True}), ("plain", {"include_background": True}), ("plain", {"lambda_ce": 0.999}),
                         ("sure", {"smooth_nr": 1.1e-5}), ("sure", {"smooth_dr": 1.1e-5})):
        scores, label = CASES[name].make()
        wanted = exact(scores, label)
        double = scores.double().requires_grad_()
        loss = DiceCELoss(**{**monai, **change})(double, label)  # type: ignore[arg-type]
        assert abs(loss.item() - wanted.loss.item()) > wanted.loss_error, change
        assert not wanted.agrees(torch.autograd.grad(loss, double)[0]), change
        assert abs(exact(scores, label.roll(1, -1)).loss - wanted.loss) > wanted.loss_error


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("classes", [2, 4])
def test_gradcheck_on_the_definition(classes: int, background: bool) -> None:
    scores, label = Case(classes=classes, size=(2, 3, 2)).make()
    scores = scores.double().requires_grad_()
    arguments: dict[str, Any] = {"include_background": background, "backend": "reference"}
    assert torch.autograd.gradcheck(lambda s: dice_cross_entropy(s, label, **arguments), (scores,))
    assert torch.autograd.gradgradcheck(lambda s: dice_cross_entropy(s, label, **arguments), (scores,))


@pytest.mark.parametrize("level", ["0", "1"])
def test_each_level_of_the_cpu(level: str) -> None:
    """The library holds code for several instruction sets; one per process is picked, so ask other processes."""
    program = """
from test_dice_ce import CASES, Case, check
for case in (*CASES.values(), Case(classes=16, size=(20, 21, 23)), Case(classes=9, size=(20, 21, 23), last=True)):
    check(*case.make(), case.background, "native")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=os.path.dirname(__file__),
                          env={**os.environ, "DROPGEN_FAST_CPU_LEVEL": level}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("last", [False, True])
def test_threads_do_not_change_a_bit(last: bool) -> None:
    scores, label = Case(classes=7, size=(40, 41, 33), last=last).make()
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            found.append(gradient(scores, label, False, "native"))
    finally:
        torch.set_num_threads(threads)
    for loss, grad in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(grad, found[0][1])


def test_what_comes_from_above_scales_the_gradient(backend: str) -> None:
    scores, label = Case().make()
    for upstream in (-3.0, 1024.0, 0.0):
        check(scores, label, False, backend, upstream)


# ---- what is no number -----------------------------------------------------------------------------------------------


def halves(scores: Tensor, label: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the gradients of the two samples; that of the second must not depend on the first."""
    loss, grad = gradient(scores, label, False, backend)
    alone = exact(scores[1:], label[1:], upstream=0.5)
    assert alone.agrees(grad[1:])
    return loss, grad[0], grad[1]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("where", [0, 1, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_told(value: float, where: int, last: bool, backend: str) -> None:
    scores, label = Case(last=last).make()
    for own in (0, 1):  # the class of the voxel's label, or another
        label[0, 0, 2, 3, 4], scores[0, :, 2, 3, 4] = own, 0.5
        scores[0, where, 2, 3, 4] = value
        loss, spoilt, _ = halves(scores, label, backend)
        assert loss.isnan()
        assert spoilt.isnan().all()


@pytest.mark.parametrize(("dtype", "value"), [
    (torch.uint8, 5), (torch.uint8, 255), (torch.int8, -1), (torch.int8, -128), (torch.int16, -1), (torch.int16, 256),
    (torch.int32, 5), (torch.int32, 2**16), (torch.int32, -(2**31)), (torch.int64, 5), (torch.int64, 2**32), (torch.int64, -1),
    (torch.int64, -(2**63)), (torch.int64, 2**32 + 1),
])
def test_a_label_that_is_no_class_is_told(dtype: torch.dtype, value: int, backend: str) -> None:
    scores, label = Case(label_dtype=dtype).make()
    label[0, 0, 4, 5, 6] = value
    loss, spoilt, _ = halves(scores, label, backend)
    assert loss.isnan()
    assert spoilt.isnan().all()


def test_a_probability_of_zero(backend: str) -> None:
    """-inf is one; the loss is infinite where the label asks for it, and the gradient is a number still."""
    scores, label = Case().make()
    scores[0, 3, 1, 2, 3], label[0, 0, 1, 2, 3] = -math.inf, 1
    check(scores, label, False, backend)
    assert gradient(scores, label, False, backend)[1][0, 3, 1, 2, 3] == 0
    label[0, 0, 1, 2, 3] = 3
    wanted = exact(scores, label)
    loss, grad = gradient(scores, label, False, backend)
    assert loss == math.inf
    assert wanted.agrees(grad)
    scores[0, :, 1, 2, 3] = -math.inf
    loss, spoilt, _ = halves(scores, label, backend)
    assert loss.isnan()
    assert spoilt.isnan().all()


def test_scores_without_bounds(backend: str) -> None:
    """Sure of itself, and right or wrong: the loss is 0 + 0 or what the scores say, and nothing overflows."""
    label = torch.randint(0, 3, (1, 1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    right = torch.zeros(1, 3, 4, 4, 4).scatter_(1, label, 1e4)
    assert dice_cross_entropy(right, label, backend=backend).item() == pytest.approx(0, abs=1e-6)
    wrong = dice_cross_entropy(right.roll(1, 1), label, backend=backend)
    assert wrong.item() == pytest.approx(1e4 + 1, rel=1e-6)
    huge = dice_cross_entropy(right * 3e34, label.roll(1, -1), backend=backend)
    assert not huge.isnan()


# ---- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_do_not_matter(dtype: torch.dtype, large: bool, backend: str) -> None:
    """The gradient of channels-last scores is channels-last, any other is contiguous; values are the same."""
    if large and backend != "native":
        pytest.skip("memory.py serves large results of the CPU")
    size = (24, 40, 80) if large else (5, 6, 8)
    scores, label = Case(size=size, dtype=dtype, classes=16).make()
    assert (scores.nbytes > memory.LARGE) == large
    wanted, grad_wanted = gradient(scores, label, False, backend)
    wide = torch.zeros(2, 16, *(edge + 2 for edge in size), dtype=dtype)
    wide[:, :, 1:-1, 1:-1, 1:-1] = scores
    stacked = torch.stack([scores.roll(1, 0), scores], 1)  # as deep supervision stacks its predictions
    bound = exact(scores, label)
    relative = 2 * HALF[dtype][0] if backend != "triton" else 4 * HALF[dtype][0]
    for other in (scores.contiguous(memory_format=torch.channels_last_3d), wide[:, :, 1:-1, 1:-1, 1:-1],
                  stacked.unbind(1)[1], scores.transpose(3, 4).contiguous().transpose(3, 4)):
        loss, grad = gradient(other, label.transpose(2, 4).contiguous().transpose(2, 4), False, backend)
        last = other.is_contiguous(memory_format=torch.channels_last_3d)
        if backend != "reference":  # whose gradient torch lays out
            assert grad.is_contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
        assert abs(loss - wanted) <= 2 * bound.loss_error
        assert ((grad.double() - grad_wanted.double()).abs() <= 2 * bound.grad_error + relative * bound.grad.abs()).all()


def test_an_expanded_gradient(backend: str) -> None:
    """What comes from above may have any strides and any place among others."""
    scores, label = Case().make()
    scores.requires_grad_()
    losses = torch.stack([dice_cross_entropy(scores, label, backend=backend)] * 3)
    found = torch.autograd.grad(losses.sum(), scores)[0]
    wanted = exact(scores, label, upstream=3.0)
    assert wanted.agrees(found)


# ---- as a citizen of torch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"last": True}, {"dtype": torch.bfloat16, "n": 1}], ids=str)
def test_opcheck(options: dict[str, Any]) -> None:
    scores, label = Case(**options, size=(3, 4, 5)).make()
    torch.library.opcheck(OPS.dice_ce.default, (scores.requires_grad_(), label, False, "native"))
    coefficients = OPS.dice_ce(scores.detach(), label, False, "native")[1]
    torch.library.opcheck(OPS.dice_ce_backward.default,
                          (torch.tensor(0.5), scores.detach(), label, coefficients, "native"))


def test_opcheck_of_a_view() -> None:
    scores, label = Case(size=(3, 4, 5)).make()
    view = torch.stack([scores, scores], 1).unbind(1)[1]
    torch.library.opcheck(OPS.dice_ce.default, (view.requires_grad_(), label, True, "native"))


def test_opcheck_triton() -> None:
    """The interpreter is slow: one call, less its gradient's second trace."""
    scores, label = Case(size=(3, 4, 5)).make()
    torch.library.opcheck(OPS.dice_ce.default, (scores, label, False, "triton"), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("last", [False, True])
def test_compiled_with_a_network(last: bool, name: str) -> None:
    """One graph of network, loss and gradient, at any size; bits of the eager op, up to a convolution's order of sums."""
    torch._dynamo.reset()
    layout = torch.channels_last_3d if last else torch.contiguous_format
    torch.manual_seed(0)
    network = nn.Conv3d(2, 4, 3, padding=1).to(memory_format=layout)  # type: ignore[call-overload]

    def step(image: Tensor, label: Tensor) -> Tensor:
        return dice_cross_entropy(network(image), label, backend=name)

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if name == "native" else "aot_eager")
    for size in ((6, 7, 8), (8, 6, 5), (4, 9, 6)):
        image = torch.randn(2, 2, *size).contiguous(memory_format=layout)
        label = Case(classes=4, size=size).make()[1]
        losses, grads = [], []
        for call in (compiled, step):
            losses.append(call(image, label))
            grads.append(torch.autograd.grad(losses[-1], network.weight)[0])
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5 * float(grads[1].abs().max()))
    torch._dynamo.reset()


@pytest.mark.parametrize("last", [False, True])
def test_compiled_bits(last: bool) -> None:
    """Without anything around it the compiled call is the op itself."""
    torch._dynamo.reset()
    compiled = torch.compile(dice_cross_entropy, fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        scores, label = Case(last=last, dtype=dtype).make()
        loss, grad = gradient(scores, label, False, "native")
        scores.requires_grad_()
        found = compiled(scores, label)
        assert torch.equal(found.detach(), loss)
        assert torch.equal(torch.autograd.grad(found, scores)[0], grad)
    torch._dynamo.reset()


def test_export() -> None:
    class Loss(nn.Module):
        def forward(self, scores: Tensor, label: Tensor) -> Tensor:
            return dice_cross_entropy(scores, label)

    scores, label = Case().make()
    axes = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO, 4: Dim.AUTO}
    program = torch.export.export(Loss(), (scores, label), dynamic_shapes={"scores": axes, "label": axes}).module()
    for case in (Case(), Case(size=(3, 4, 9), n=3)):
        assert torch.equal(program(*case.make()), dice_cross_entropy(*case.make()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_leaves_it_alone(dtype: torch.dtype, backend: str) -> None:
    """Within it the bits are those of outside, for scores of either type."""
    for case in (Case(), Case(dtype=dtype)):
        scores, label = case.make()
        wanted = gradient(scores, label, False, backend)
        with torch.autocast("cpu", dtype):
            found = gradient(scores, label, False, backend)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_gradients_of_torch_func(backend: str) -> None:
    scores, label = Case().make()
    found = torch.func.grad(lambda s: dice_cross_entropy(s, label, backend=backend))(scores)
    assert torch.equal(found, gradient(scores, label, False, backend)[1])


def test_scores_without_a_gradient(backend: str) -> None:
    scores, label = Case().make()
    assert not dice_cross_entropy(scores, label, backend=backend).requires_grad
    with torch.inference_mode():
        loss = dice_cross_entropy(scores, label, backend=backend)
    assert torch.equal(loss.clone(), gradient(scores, label, False, backend)[0])


@pytest.mark.parametrize("name", ["native", "triton"])
def test_other_derivatives_are_refused(name: str) -> None:
    scores, label = Case(size=(2, 3, 4)).make()
    leaf = scores.clone().requires_grad_()
    first = torch.autograd.grad(dice_cross_entropy(leaf, label, backend=name), leaf, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=r'second order and forward-mode ones with backend="reference" only'):
        torch.autograd.grad(first.sum(), leaf)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match='backend="reference" only'):
        dice_cross_entropy(forward_ad.make_dual(scores, torch.ones_like(scores)), label, backend=name)


def test_only_the_scores_are_kept() -> None:
    """For the gradient: the tensors themselves, and two numbers of each sample and class."""
    scores, label = Case(classes=16, size=(16, 16, 16)).make()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        dice_cross_entropy(scores.requires_grad_(), label, backend="native")
    addresses = {scores.data_ptr(), label.data_ptr()}
    assert sorted(t.numel() for t in kept if t.data_ptr() not in addresses) == [2 * 16 * 2]
    assert addresses <= {t.data_ptr() for t in kept}


# ---- choice and errors -----------------------------------------------------------------------------------------------


def test_auto_takes_what_fits() -> None:
    """Bits tell: of float64, and of more classes than the kernels take, the definition's; else the native backend's."""
    scores, label = Case(size=(9, 10, 11)).make()
    assert torch.equal(dice_cross_entropy(scores, label), dice_cross_entropy(scores, label, backend="native"))
    double = scores.double()
    assert torch.equal(dice_cross_entropy(double, label), dice_cross_entropy(double, label, backend="reference"))
    many, label = Case(classes=300, size=(2, 3, 4), label_dtype=torch.int16).make()
    assert torch.equal(dice_cross_entropy(many, label), dice_cross_entropy(many, label, backend="reference"))
    for name in ("native", "triton"):
        with pytest.raises(RuntimeError, match=rf"'{name}' cannot take this call: .*float64; what can: reference"):
            dice_cross_entropy(double, Case(size=(9, 10, 11)).make()[1], backend=name)
        with pytest.raises(RuntimeError, match=rf"'{name}' cannot take this call: .* classes.*300"):
            dice_cross_entropy(many, label, backend=name)
    meta = [t.to("meta") for t in Case().make()]
    assert dice_cross_entropy(*meta).shape == ()
    with pytest.raises(RuntimeError, match="runs on the CPU, and the scores are on meta"):
        dice_cross_entropy(*meta, backend="native")


def test_most_classes_are_one_number() -> None:
    """Of native.py and native.h."""
    scores, label = Case(classes=native.MOST_CLASSES, size=(1, 1, 2)).make()
    dice_cross_entropy(scores, label, backend="native")
    many = torch.zeros(1, native.MOST_CLASSES + 1, 1, 1, 1)
    with pytest.raises(RuntimeError, match="dice_ce_forward: more voxels, channels or samples"):
        native.forward(many, torch.zeros(1, 1, 1, 1, 1, dtype=torch.uint8), torch.empty(()),
                       torch.empty(1, native.MOST_CLASSES + 1, 2), include_background=True)


@pytest.mark.parametrize(("change", "message"), [
    ({"scores": None}, r"scores must be a tensor \(N, C, D, H, W\), got NoneType"),
    ({"scores": torch.zeros(2, 5, 6, 7)}, r"scores must be \(N, C, D, H, W\) with no empty axis, got shape \(2, 5, 6, 7\)"),
    ({"scores": torch.zeros(2, 5, 0, 6, 7)}, "no empty axis"),
    ({"scores": torch.zeros(2, 1, 5, 6, 7)}, "at least 2 classes, the background one of them, got 1"),
    ({"scores": torch.zeros(2, 5, 5, 6, 7, dtype=torch.int32)}, "scores must be one of float32, .*got int32"),
    ({"scores": torch.zeros(2, 5, 5, 6, 7).to_sparse()}, "scores must be a dense tensor, got torch.sparse_coo"),
    ({"label": [0]}, r"label must be a tensor \(N, 1, D, H, W\), got list"),
    ({"label": torch.zeros(2, 5, 6, 7, dtype=torch.uint8)}, r"label must be \(N, 1, D, H, W\)"),
    ({"label": torch.zeros(2, 1, 5, 6, 7)}, "label must be one of uint8, .*got float32"),
    ({"label": torch.zeros(2, 1, 5, 6, 7, dtype=torch.bool)}, "label must be one of .*got bool"),
    ({"label": torch.zeros(2, 5, 5, 6, 7, dtype=torch.uint8)}, r"label must be \(2, 1, 5, 6, 7\), got \(2, 5, 5, 6, 7\)"),
    ({"label": torch.zeros(2, 1, 5, 6, 8, dtype=torch.uint8)}, r"label must be \(2, 1, 5, 6, 7\), got \(2, 1, 5, 6, 8\)"),
    ({"label": torch.zeros(1, 1, 5, 6, 7, dtype=torch.uint8)}, r"label must be \(2, 1, 5, 6, 7\)"),
    ({"label": torch.zeros(2, 1, 5, 6, 7, dtype=torch.uint8, device="meta")}, "label must be on the scores' device cpu, got me"),
    ({"backend": "cuda"}, "backend must be one of auto, native, reference, triton, got 'cuda'"),
])
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    scores, label = Case().make()
    arguments: dict[str, Any] = {"scores": scores, "label": label} | change
    with pytest.raises(ValueError, match=message) as caught:
        dice_cross_entropy(arguments.pop("scores"), arguments.pop("label"), **arguments)
    assert "\n" not in str(caught.value)
