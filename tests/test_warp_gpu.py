"""`warp` on a GPU: its Triton kernel for real, against the definition. Run with ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_warp import CASES, VALUE, Case, check, definition

from dropgen_fast.kernels.warp import warp

pytestmark = pytest.mark.gpu
BIG = {
    "affine": Case(size=(96, 100, 131), n=2, channels=2), "coarse": Case(size=(96, 100, 131), grid=(6, 7, 8), n=2),
    "dense": Case(size=(64, 64, 64), grid=(64, 64, 64), padding="border"), "vectors": Case(size=(64, 64, 128), grid=(8, 8, 8)),
    "by 8": Case(size=(40, 72, 72), dtype=torch.bfloat16, label_dtype=torch.int32, grid=(4, 4, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_small(name: str) -> None:
    check(CASES[name].make("cuda"), CASES[name].padding, "triton")


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name", BIG)
def test_large(name: str, backend: str) -> None:
    check(BIG[name].make("cuda"), BIG[name].padding, backend)


def test_the_matrix_may_lie_on_the_gpu() -> None:
    image, label, matrix, displacement = BIG["coarse"].make("cuda")
    assert displacement is not None
    here = warp(image, label, matrix, displacement)
    there = warp(image, label, matrix.cuda(), displacement.cuda())
    assert torch.equal(here[0], there[0])
    assert here[1] is not None
    assert there[1] is not None
    assert torch.equal(here[1], there[1])


def busy() -> torch.cuda.Event:
    """Keep the current stream busy for a good part of a second; the event is when it is done."""
    event = torch.cuda.Event()
    torch.cuda._sleep(1_000_000_000)
    event.record()
    return event


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("on_the_gpu", [False, True], ids=["drawn on the host", "drawn on the GPU"])
def test_the_host_does_not_wait(on_the_gpu: bool, backend: str) -> None:
    image, label, matrix, displacement = BIG["coarse"].make("cuda")
    if on_the_gpu and displacement is not None:
        matrix, displacement = matrix.cuda(), displacement.cuda()
    wanted, _ = warp(image, label, matrix, displacement, backend=backend)  # compiles, and leaves memory in the allocators
    wanted = wanted.cpu()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = busy()
        out, _ = warp(image, label, matrix, displacement, backend=backend)
        waited = done.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waited
    assert torch.equal(out.cpu(), wanted)


def test_the_parameters_may_change_as_soon_as_the_call_returns() -> None:
    """What is sent is a copy, though the GPU has not yet come to it."""
    image, label, matrix, displacement = BIG["coarse"].make("cuda")
    assert displacement is not None
    wanted, _ = warp(image, label, matrix, displacement)
    torch.cuda.synchronize()
    busy()
    out, _ = warp(image, label, matrix, displacement)
    matrix.zero_()
    displacement.zero_()
    other, _ = warp(image, label, matrix, displacement)  # must not take the memory of a transfer that is still to come
    assert torch.equal(out, wanted)
    assert not torch.equal(other, wanted)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_another_stream(backend: str) -> None:
    """All that a call does is on the current stream: what another one is busy with does not hold it up."""
    image, label, matrix, displacement = BIG["coarse"].make("cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        warp(image, label, matrix, displacement, backend=backend)
    torch.cuda.synchronize()
    done = busy()
    with torch.cuda.stream(side):
        out, _ = warp(image, label, matrix, displacement, backend=backend)
    side.synchronize()
    assert not done.query()
    torch.cuda.synchronize()
    wanted, _ = definition(image, label, matrix, displacement, "zeros")
    assert (out.cpu().double() - wanted).abs().max().item() <= VALUE


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_device_that_is_not_the_current_one(backend: str) -> None:
    assert torch.cuda.current_device() == 0
    check(BIG["coarse"].make("cuda:1"), "zeros", backend)
    image, label, matrix, displacement = BIG["coarse"].make("cuda:1")
    assert displacement is not None
    check((image, label, matrix.to("cuda:1"), displacement.to("cuda:1")), "zeros", backend)
    with pytest.raises(ValueError, match="matrix must be on the CPU or on the image's device cuda:1, got cuda:0"):
        warp(image, label, matrix.to("cuda:0"), displacement, backend=backend)


def test_samples_without_a_map_are_copied() -> None:
    image, label, matrix, _ = Case(size=(33, 40, 65), n=3).make("cuda")
    matrix[1] = torch.eye(3, 4)
    for place in (matrix, matrix.cuda()):
        out, label_out = warp(image, label, place)
        assert label is not None
        assert label_out is not None
        assert torch.equal(out[1], image[1])
        assert torch.equal(label_out[1], label[1])


def test_a_graph_replays_with_new_parameters() -> None:
    image, label, matrix, displacement = BIG["coarse"].make("cuda")
    assert displacement is not None
    static, field = matrix.cuda(), displacement.cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warp(image, label, static, field)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = warp(image, label, static, field)
    static.copy_(matrix.flip(0))
    graph.replay()
    wanted, _ = definition(image, label, matrix.flip(0), displacement, "zeros")
    assert (out.cpu().double() - wanted).abs().max().item() <= VALUE


@pytest.mark.parametrize("shape", [(3, 17, 350, 350, 350)], ids=str)
def test_more_than_two_to_the_31_voxels(shape: tuple[int, ...]) -> None:
    """Offsets of a batch need 64 bits: 2.2 · 10⁹ voxels of 2 bytes, there and back."""
    image = torch.zeros(shape, dtype=torch.float16, device="cuda")
    image[-1, -1] = torch.rand(shape[2:], device="cuda").half()
    matrix = torch.eye(3, 4).repeat(shape[0], 1, 1)
    matrix[:, :, 3] = 0.5
    out, _ = warp(image, None, matrix)
    wanted = F.avg_pool3d(F.pad(image[-1:, -1:].float(), (0, 1, 0, 1, 0, 1)), 2, 1)  # half a voxel along each axis
    assert (out[-1:, -1:].float() - wanted).abs().max().item() <= 2**-12 + 1e-6
    assert not out[0].any()


def test_more_than_two_to_the_31_labels() -> None:
    shape = (3, 17, 350, 350, 350)
    image, label = torch.zeros(3, 1, *shape[2:], device="cuda"), torch.zeros(shape, dtype=torch.uint8, device="cuda")
    label[-1, -1] = torch.randint(1, 200, shape[2:], dtype=torch.uint8, device="cuda")
    matrix = torch.eye(3, 4).repeat(shape[0], 1, 1)
    matrix[:, :, 3] = 1.25
    _, found = warp(image, label, matrix)
    assert found is not None
    assert torch.equal(found[-1, -1], F.pad(label[-1, -1, 1:, 1:, 1:], (0, 1, 0, 1, 0, 1)))
    assert not found[-1, :-1].any()
    assert not found[0].any()
