r"""fuse_streams on a GPU: ``pytest -m gpu`` runs this, `native` and `triton` alike, and nothing else needs a GPU.

With NVIDIA's sanitizer, a tool a run (racecheck looks at shared memory, initcheck at what was never written; torch's caching
allocator hides a read past a tensor's end, so it is turned off):

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --target-processes all --error-exitcode 1 \
        python -m pytest -m gpu tests/test_fuse_streams_gpu.py -k "values or strides or norms"

and the same with ``--tool racecheck``, ``--tool initcheck`` and ``--tool synccheck``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fuse_streams_cases import IMAGE_NORMS, TOLERANCE, close, definition, half_of, layouts, streams
from torch import Tensor

from dropgen_fast import StreamFusion, fuse_streams
from dropgen_fast.kernels.fuse_streams import FEATURE_NORMS, available_backends, backends, draw_scale, native

pytestmark = pytest.mark.gpu


@pytest.fixture(params=("native", "triton"))
def backend(request: pytest.FixtureRequest) -> str:
    if reason := available_backends()[request.param] or (native.CUDA_MISSING if request.param == "native" else ""):
        pytest.fail(f"{request.param} must be here for the tests: {reason}")
    return str(request.param)


def agrees(
    backend: str, image: Tensor, features: Tensor | None, keep: Tensor, *, grad: Callable[[Tensor], Tensor] | None = None,
    memory_format: torch.memory_format = torch.contiguous_format, dtype: torch.dtype | None = None, device: str = "cuda",
    **options: Any,
) -> None:
    """Result and gradients of CUDA copies, strides kept, against the definition of the CPU tensors in float64."""
    given = [t for t in (image, features) if t is not None]
    inputs = [on_gpu(t, device).requires_grad_(t.is_floating_point()) for t in given]
    result = fuse_streams(*inputs, keep=keep.to(device), backend=backend, memory_format=memory_format, dtype=dtype, **options)
    exact = [t.double().requires_grad_() for t in given]
    wanted = definition(exact[0], exact[1] if len(exact) > 1 else None, keep, **options)
    assert result.is_contiguous(memory_format=memory_format)
    close(result.detach().cpu(), wanted.detach(), scale=max(4.0, float(wanted.detach().abs().max())))
    g = torch.randn(result.shape, generator=torch.Generator().manual_seed(3)).to(result.dtype)
    g = g if grad is None else grad(g)
    of = [i for i, t in enumerate(inputs) if t.requires_grad]
    got = torch.autograd.grad(result, [inputs[i] for i in of], on_gpu(g, device))
    for a, b in zip(got, torch.autograd.grad(wanted, [exact[i] for i in of], g.double()), strict=True):
        close(a.cpu(), b, scale=max(1.0, float(b.abs().max())))


def on_gpu(t: Tensor, device: str = "cuda") -> Tensor:
    """A copy with the very strides of `t`, zero ones and gaps included."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((span,), (1,)).to(device, copy=True).as_strided(t.shape, t.stride())


# ---- values and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("shape", "grid"), [
    ((2, 1, 33, 40, 65), (17, 20, 33)), ((2, 1, 32, 40, 64), (16, 20, 32)), ((2, 1, 32, 40, 64), (32, 40, 64)),
    ((1, 1, 48, 64, 96), (12, 16, 24)), ((1, 2, 31, 64, 64), (8, 64, 8))])
def test_values(
    backend: str, shape: tuple[int, ...], grid: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format,
) -> None:
    image, features = streams(shape, grid, 16, dtype=dtype, image_dtype=dtype)
    for multiple in (1, 8):
        agrees(backend, image, features, half_of(shape[0], shape[1] + 16), memory_format=memory_format, channel_multiple=multiple)


@pytest.mark.parametrize(("image_norm", "feature_norm"), list(itertools.product(IMAGE_NORMS, FEATURE_NORMS)))
def test_norms(backend: str, image_norm: str, feature_norm: str) -> None:
    image, features = streams((2, 2, 20, 30, 40), (10, 15, 20))
    agrees(backend, image, features, half_of(2, 7), image_norm=IMAGE_NORMS[image_norm], feature_norm=feature_norm)


@pytest.mark.parametrize("image_dtype", [torch.int16, torch.uint8])
def test_whole_numbers(backend: str, image_dtype: torch.dtype) -> None:
    for width, dtype in itertools.product((64, 37), (torch.float32, torch.bfloat16)):
        image, features = streams((2, 1, 20, 24, width), (20, 24, width), image_dtype=image_dtype)
        agrees(backend, image, features, half_of(2, 6), dtype=dtype)


def test_strides(backend: str) -> None:
    image, features = streams((2, 2, 16, 24, 40), (8, 12, 20))
    keep = half_of(2, 7)
    for kind in range(4):
        agrees(backend, layouts(image)[kind], layouts(features)[kind], keep, grad=lambda g, kind=kind: layouts(g)[kind])
    agrees(backend, image, features, keep, grad=lambda g: torch.ones(()).expand(g.shape))


def test_large_offsets_keep_their_digits(backend: str) -> None:
    image, features = streams((1, 1, 64, 64, 64), (64, 64, 64), 2)
    features += 1e4
    keep = torch.ones(1, 3, dtype=torch.bool)
    result = fuse_streams(image.cuda(), features.cuda(), p=0.0, backend=backend)
    close(result.cpu(), definition(image, features, keep, p=0.0), scale=20)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_voxels_stay_where_they_are(backend: str, bad: float) -> None:
    image, features = streams((2, 1, 16, 16, 32), (16, 16, 32))
    image[0, 0, 2, 3, 4] = features[1, 2, 5, 6, 8] = bad
    result = fuse_streams(image.cuda(), features.cuda(), p=0.0, backend=backend)
    assert (~result.isfinite()).nonzero().tolist() == [[0, 0, 2, 3, 4], [1, 3, 5, 6, 8]]


def test_dropped_channels_are_not_read(backend: str) -> None:
    image, features = streams((2, 1, 16, 16, 32), (8, 8, 16))
    keep = half_of(2, 6)
    features[~keep[:, 1:]] = torch.nan
    assert fuse_streams(image.cuda(), features.cuda(), keep=keep.cuda(), backend=backend).isfinite().all()


# ---- more voxels than 32 bits of offset ------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_offsets_of_64_bits(backend: str, memory_format: torch.memory_format) -> None:
    """2 × 17 channels of 416³ voxels: 2.4 · 10⁹ elements; the last channel of the last sample is looked at."""
    free = torch.cuda.mem_get_info()[0]
    if free < 24 << 30:
        pytest.skip(f"needs 24 GiB of free GPU memory, there are {free / 2**30:.1f}")
    image = torch.randint(0, 255, (2, 1, 416, 416, 416), dtype=torch.uint8, device="cuda")
    features = torch.randn((2, 16, 104, 104, 104), device="cuda", dtype=torch.bfloat16)
    result = fuse_streams(image, features, p=0.0, backend=backend, memory_format=memory_format)
    assert result.numel() > 2**31
    keep = torch.ones(1, 2, dtype=torch.bool)
    wanted = definition(image[1:].cpu(), features[1:, 15:].cpu(), keep, p=0.0)
    close(result[1:, [0, 16]].cpu(), wanted, scale=4)


# ---- streams, graphs, devices ----------------------------------------------------------------------------------------


@pytest.fixture
def captured(backend: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """A backend, and inputs for which its kernels are compiled and loaded."""
    image, features = (t.cuda() for t in streams((2, 1, 32, 32, 64), (16, 16, 32), 16, dtype=torch.bfloat16))
    fuse_streams(image, features, p=0.5, backend=backend)
    torch.cuda.synchronize()
    yield backend, image, features
    torch.cuda.synchronize()


def test_graph_replays_with_the_draw_that_it_is_given(captured: tuple[str, Tensor, Tensor]) -> None:
    backend, image, features = captured
    scale = torch.ones(2, 17, device="cuda")

    def call() -> Tensor:
        return torch.ops.dropgen_fast.fuse_streams(image, features, scale, "minmax", 0.0, 0.0, "instance", 1e-5,
                                                   torch.bfloat16, True, 8, backend)[0]

    call()  # compiled and loaded before the capture, as with any kernel
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for seed in range(3):
        torch.manual_seed(seed)
        scale.copy_(draw_scale(2, 1, 16, (0.5, 0.5), device="cuda"))
        image.add_(seed)
        graph.replay()
        assert torch.equal(result, call())


def test_graph_draws_afresh(captured: tuple[str, Tensor, Tensor]) -> None:
    backend, image, features = captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fuse_streams(image, features, p=0.5, backend=backend)
    kept = []
    for _ in range(8):
        graph.replay()
        kept.append(result.flatten(2).any(-1))
    assert any(not torch.equal(kept[0], k) for k in kept[1:])
    assert 0.3 < torch.stack(kept).float().mean() < 0.7  # 272 draws at 0.5, a standard error of 0.03


def test_graph_of_forward_and_backward(captured: tuple[str, Tensor, Tensor]) -> None:
    backend, image, features = captured
    features = features.detach().requires_grad_()
    scale = draw_scale(2, 1, 16, (0.5, 0.5), keep=half_of(2, 17).cuda(), device="cuda")
    grad = torch.randn(2, 17, 32, 32, 64, device="cuda", dtype=torch.bfloat16)

    def step() -> Tensor:
        out = torch.ops.dropgen_fast.fuse_streams(image, features, scale, "minmax", 0.0, 0.0, "instance", 1e-5,
                                                  torch.bfloat16, False, 1, backend)[0]
        return torch.autograd.grad(out, features, grad)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    grad.normal_()
    graph.replay()
    assert torch.equal(result, step())


def test_side_stream(captured: tuple[str, Tensor, Tensor]) -> None:
    """It follows what its stream was given before it: a long wait, then the inputs."""
    backend, image, features = captured
    keep = half_of(2, 17).cuda()
    wanted = fuse_streams(image, features, keep=keep, backend=backend)
    late = torch.zeros_like(features)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late.copy_(features)
        result = fuse_streams(image, late, keep=keep, backend=backend)
    assert not side.query()  # nothing waited for the host
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(result, wanted)


def test_another_device(backend: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    image, features = streams((2, 1, 16, 16, 32), (8, 8, 16))
    with torch.cuda.device(0):
        agrees(backend, image, features, half_of(2, 6), device="cuda:1")
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("feature_norm", ["instance", "standard"])
def test_the_same_bits_every_time(backend: str, feature_norm: str) -> None:
    image, features = streams((2, 2, 32, 48, 64), (16, 24, 32), 8)
    x, f = image.cuda().requires_grad_(), features.cuda().requires_grad_()
    grad = torch.randn(2, 10, 32, 48, 64, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        for _ in range(4):
            result = fuse_streams(x, f, keep=half_of(2, 10).cuda(), feature_norm=feature_norm, backend=backend)
            found.append((result.detach(), *torch.autograd.grad(result, (x, f), grad)))
    finally:
        torch.use_deterministic_algorithms(False)
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))


def test_compile_fullgraph(backend: str) -> None:
    torch._dynamo.reset()
    image, features = (t.cuda() for t in streams((4, 1, 16, 16, 32), (8, 8, 16)))
    keep = half_of(4, 6).cuda()
    fusion = StreamFusion(0.5, backend=backend, memory_format=torch.channels_last_3d)
    compiled = torch.compile(fusion, fullgraph=True)
    torch.testing.assert_close(compiled(image, features, keep), fusion(image, features, keep))
    f, g = features.clone().requires_grad_(), features.clone().requires_grad_()
    compiled(image, f, keep).square().sum().backward()
    fusion(image, g, keep).square().sum().backward()
    torch.testing.assert_close(f.grad, g.grad)


# ---- neighbours ------------------------------------------------------------------------------------------------------


def test_cupy_arrays(backend: str) -> None:
    cupy = pytest.importorskip("cupy")
    image, features = streams((1, 1, 16, 16, 32), (8, 8, 16))
    x, f = cupy.asarray(image.numpy()), cupy.asarray(features.numpy())
    shared = torch.from_dlpack(x)
    assert shared.data_ptr() == x.data.ptr  # no copy
    result = cupy.from_dlpack(fuse_streams(shared, torch.from_dlpack(f), p=0.0, backend=backend))
    wanted = definition(image, features, torch.ones(1, 6, dtype=torch.bool), p=0.0)
    close(torch.from_numpy(cupy.asnumpy(result)), wanted, scale=4)


def test_the_faster_backend_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.CUDA_MISSING or available_backends()["triton"]:
        pytest.fail("both backends must be here")
    monkeypatch.setattr(backends, "FASTEST", {})
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    image, features = (t.cuda() for t in streams((1, 1, 32, 32, 64), (16, 16, 32)))
    runs: list[str] = []

    def run(name: str) -> Tensor:
        runs.append(name)
        return fuse_streams(image, features, p=0.0, backend=name)

    chosen = backends.measured("triton", image, features, ("minmax",), run)
    assert set(runs) == {"triton", "native"}
    assert chosen in runs
    runs.clear()
    assert backends.measured("triton", image, features, ("minmax",), run) == chosen
    assert not runs
