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


@pytest.mark.parametrize("on_the_gpu", [False, True], ids=["drawn on the host", "drawn on the GPU"])
def test_the_host_does_not_wait(on_the_gpu: bool) -> None:
    image, label, matrix, displacement = BIG["coarse"].make("cuda")
    if on_the_gpu and displacement is not None:
        matrix, displacement = matrix.cuda(), displacement.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        warp(image, label, matrix, displacement)
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
