"""`mind_ssc` on a GPU: its Triton kernels for real, against the definition. Run with ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch
from test_mind_ssc import CASES, Case, check

from dropgen_fast.kernels.mind_ssc import mind_ssc

pytestmark = pytest.mark.gpu
BIG = {
    "cube": Case(size=(96, 96, 96), n=2), "odd": Case(size=(67, 101, 131)),
    "bfloat16": Case(size=(64, 64, 128), dtype=torch.bfloat16),
    "many columns": Case(size=(128, 128, 256)), "radius 2": Case(size=(40, 50, 60), radius=2),
    "radius 3": Case(size=(20, 33, 70), radius=3, dilation=5),
}


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name", CASES)
def test_small(name: str, backend: str) -> None:
    check(CASES[name], backend, CASES[name].make("cuda"))


@pytest.mark.parametrize("name", BIG)
def test_large(name: str) -> None:
    check(BIG[name], "triton", BIG[name].make("cuda"))


def test_a_call_gives_the_same_bits_every_time() -> None:
    image = BIG["many columns"].make("cuda")
    first = mind_ssc(image)
    assert all(torch.equal(mind_ssc(image), first) for _ in range(10))


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_the_host_does_not_wait(backend: str) -> None:
    image = BIG["odd"].make("cuda")
    wanted = mind_ssc(image, backend=backend).cpu()  # compiles, and leaves memory in the allocator
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        event = torch.cuda.Event()
        torch.cuda._sleep(1_000_000_000)
        event.record()
        out = mind_ssc(image, backend=backend)
        waited = event.query()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not waited
    assert torch.equal(out.cpu(), wanted)


def test_a_graph_replays_with_another_image() -> None:
    image = BIG["odd"].make("cuda")
    static = image.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        mind_ssc(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = mind_ssc(static)
    static.copy_(image.square())
    graph.replay()
    assert torch.equal(out, mind_ssc(image.square()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_the_current_one() -> None:
    assert torch.cuda.current_device() == 0
    check(BIG["odd"], "triton", BIG["odd"].make("cuda:1"))


def test_more_than_two_to_the_31_values() -> None:
    """Offsets of a batch need 64 bits: 2.2 · 10⁹ values of 2 bytes."""
    image = torch.zeros(9, 1, 273, 273, 273, dtype=torch.bfloat16, device="cuda")
    image[-1] = torch.rand(image.shape[1:], device="cuda").bfloat16()
    out = mind_ssc(image, dtype=torch.bfloat16)
    assert torch.equal(out[-1:], mind_ssc(image[-1:], dtype=torch.bfloat16))
    assert (out[0] == 1).all()
