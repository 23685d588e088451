"""`dice_cross_entropy` on a GPU: its Triton kernels for real, against the definition. Run with ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceCELoss
from test_dice_ce import CASES, LABELS, Case, check, exact, gradient

from dropgen_fast.kernels.dice_ce import dice_cross_entropy

pytestmark = pytest.mark.gpu
BIG = {
    "16": Case(classes=16, size=(64, 72, 65)), "16 last": Case(classes=16, size=(64, 72, 65), last=True, dtype=torch.bfloat16),
    "4 last": Case(classes=4, size=(96, 100, 131), last=True), "14": Case(classes=14, size=(48, 64, 80), dtype=torch.float16),
    "17 last": Case(classes=17, size=(33, 41, 65), last=True, n=3), "256": Case(classes=256, size=(20, 21, 23), n=1),
    "2": Case(classes=2, size=(128, 128, 100), dtype=torch.bfloat16, background=True),
    **{str(dtype): Case(classes=9, size=(33, 34, 35), label_dtype=dtype) for dtype in LABELS},
}


@pytest.mark.parametrize("name", CASES)
def test_small(name: str) -> None:
    check(*CASES[name].make("cuda"), CASES[name].background, "triton")


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name", BIG)
def test_large(name: str, backend: str) -> None:
    check(*BIG[name].make("cuda"), BIG[name].background, backend)


def test_the_patch_of_amos() -> None:
    """Against MONAI's in float32 on the same GPU, each as far from the definition as rounding lets it be."""
    scores, label = Case(classes=16, size=(192, 192, 128), n=1).make("cuda")
    loss, grad = gradient(scores, label, False, "triton")
    bound = exact(scores, label)
    theirs = scores.clone().requires_grad_()
    value = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)(theirs, label)
    assert abs(loss - value.detach()) <= 2 * bound.loss_error
    assert bound.agrees(grad)


def test_auto_is_triton_and_repeats_its_bits() -> None:
    scores, label = BIG["16"].make("cuda")
    wanted = gradient(scores, label, False, "triton")
    for _ in range(3):
        found = gradient(scores, label, False, "auto")
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(("value", "label_value"), [(float("nan"), 0), (float("inf"), 0), (0.0, 200)])
def test_what_is_no_number_is_told(value: float, label_value: int) -> None:
    for last in (False, True):
        scores, label = Case(classes=16, size=(20, 21, 23), last=last).make("cuda")
        scores[0, 3, 5, 6, 7], label[0, 0, 5, 6, 7] = value, label_value
        loss, grad = gradient(scores, label, False, "triton")
        alone = exact(scores[1:], label[1:], upstream=0.5)
        assert loss.isnan()
        assert grad[0].isnan().all()
        assert alone.agrees(grad[1:])


def test_the_host_does_not_wait() -> None:
    scores, label = BIG["16"].make("cuda")
    wanted = [t.cpu() for t in gradient(scores, label, False, "auto")]  # compiles, and leaves memory in the allocator
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = torch.cuda.Event()
        torch.cuda._sleep(1_000_000_000)
        done.record()
        found = gradient(scores, label, False, "auto")
        waited = done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waited
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))


def test_a_graph_replays_with_new_scores() -> None:
    scores, label = BIG["16 last"].make("cuda")
    static = scores.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(dice_cross_entropy(static, label), static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = dice_cross_entropy(static, label)
        grad = torch.autograd.grad(loss, static)[0]
    new = scores.flip(0)
    with torch.no_grad():
        static.copy_(new)
    graph.replay()
    wanted = gradient(static.detach(), label, False, "triton")
    assert torch.equal(loss, wanted[0])
    assert torch.equal(grad, wanted[1])


def test_compiled() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(dice_cross_entropy, fullgraph=True)
    for name in ("16", "16 last"):
        scores, label = BIG[name].make("cuda")
        wanted = gradient(scores, label, False, "triton")
        scores.requires_grad_()
        loss = compiled(scores, label)
        assert torch.equal(loss.detach(), wanted[0])
        assert torch.equal(torch.autograd.grad(loss, scores)[0], wanted[1])


def test_memory_is_the_gradient() -> None:
    """Beside it some sums: less than 1 % of the scores."""
    scores, label = Case(classes=16, size=(128, 128, 128), n=1, dtype=torch.bfloat16).make("cuda")
    gradient(scores, label, False, "triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradient(scores, label, False, "triton")
    assert torch.cuda.max_memory_allocated() - before <= 1.01 * scores.nbytes


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_the_current_one() -> None:
    assert torch.cuda.current_device() == 0
    check(*BIG["16"].make("cuda:1"), False, "triton")


@pytest.mark.parametrize("last", [False, True])
def test_more_than_two_to_the_31_scores(last: bool) -> None:
    """Offsets of a batch need 64 bits: 2.2 · 10⁹ scores of 2 bytes, and their gradient."""
    shape = (3, 17, 350, 350, 350)
    scores = torch.empty(shape, dtype=torch.bfloat16, device="cuda",
                         memory_format=torch.channels_last_3d if last else torch.contiguous_format).zero_()
    label = torch.zeros(3, 1, *shape[2:], dtype=torch.uint8, device="cuda")
    label[-1] = 16
    scores[-1, -1] = 1.0
    loss, grad = gradient(scores, label, False, "triton")
    corner = exact(scores[:, :, :2, :2, :2].cpu(), label[:, :, :2, :2, :2])  # every voxel of a sample is alike
    assert abs(loss.item() - corner.loss.item()) <= corner.loss_error + 1e-4  # smoothing is felt in 8 voxels: 1e-5 of 1/17 each
    ours, few = grad[:, :, -1, -1, -1].cpu().double() * shape[2] ** 3, corner.grad[:, :, 0, 0, 0] * 8
    assert (ours - few).abs().max() <= 1e-2 * few.abs().max()
    assert torch.equal(grad[-1, :, 0, 0, 0], grad[-1, :, -1, -1, -1])
