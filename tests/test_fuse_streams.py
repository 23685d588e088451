"""fuse_streams: every backend against the definition in float64."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuse_streams_cases import IMAGE_NORMS, TOLERANCE, close, definition, half_of, layouts, streams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dropgen_fast import Window, fuse_streams
from dropgen_fast.kernels.fuse_streams import FEATURE_NORMS, native

# ---- the definition itself, against other people's code --------------------------------------------------------------


def test_definition_is_the_recipe() -> None:
    """Steps 1 to 4 of the method, written with torch's own modules."""
    image, features = (t.double() for t in streams(grid=(6, 7, 9)))
    keep = half_of(2, 6)
    lo, hi = image.amin((1, 2, 3, 4), keepdim=True), image.amax((1, 2, 3, 4), keepdim=True)
    x = torch.cat([(image - lo) / (hi - lo), F.instance_norm(features, eps=1e-5)], 1) * keep[:, :, None, None, None] / 0.25
    torch.testing.assert_close(definition(image, features, keep), x, rtol=1e-12, atol=1e-12)


def test_normalizing_before_interpolating_is_the_same() -> None:
    """Weights sum to one, so normalizing the interpolated features with the coarse statistics gives the same."""
    image, features = (t.double() for t in streams())
    keep = torch.ones(2, 6, dtype=torch.bool)
    mean, variance = features.mean((2, 3, 4), keepdim=True), features.var((2, 3, 4), keepdim=True, correction=0)
    fine = F.interpolate(features, size=image.shape[2:], mode="trilinear", align_corners=False)
    late = (fine - mean) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(definition(image, features, keep, p=0.0)[:, 1:], late, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("feature_norm", ["instance", "unit", "standard", "none"])
@pytest.mark.parametrize("image_norm", ["none", "window", "zscore"])
def test_definition_has_right_gradients(image_norm: str, feature_norm: str) -> None:
    image, features = (t.double().requires_grad_() for t in streams((2, 1, 3, 4, 5), (2, 4, 3), 3))
    keep = half_of(2, 4)
    norms = {"image_norm": IMAGE_NORMS[image_norm], "feature_norm": feature_norm}
    assert torch.autograd.gradcheck(lambda i, f: definition(i, f, keep, p=0.5, **norms), (image, features))


def test_minmax_gradient_holds_the_statistics() -> None:
    image = streams()[0].double().requires_grad_()
    definition(image, None, torch.ones(2, 1, dtype=torch.bool), p=0.0).sum().backward()
    span = image.amax((1, 2, 3, 4)) - image.amin((1, 2, 3, 4))
    torch.testing.assert_close(image.grad, (1 / span)[:, None, None, None, None].expand_as(image).detach())


def test_checked_mode_names_the_tensor() -> None:
    image, features = streams()
    features[0, 2, 1, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="features holds 1 NaN or infinite"):
        definition(image, features, torch.ones(2, 6, dtype=torch.bool), check_finite=True)


# ---- every backend against it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("grid", [(6, 7, 9), (3, 7, 4), (1, 2, 9)], ids=["equal", "coarse", "coarsest"])
def test_forward(backend: str, grid: tuple[int, ...], dtype: torch.dtype) -> None:
    image, features = streams(grid=grid, dtype=dtype, image_dtype=dtype)
    keep = half_of(2, 6)
    result = fuse_streams(image, features, keep=keep, backend=backend)
    assert result.dtype == dtype
    close(result, definition(image, features, keep), scale=4, backend=backend)
    assert torch.equal(result[~keep], torch.zeros_like(result[~keep]))


@pytest.mark.parametrize(("image_norm", "feature_norm"), list(itertools.product(IMAGE_NORMS, FEATURE_NORMS)))
def test_norms(backend: str, image_norm: str, feature_norm: str) -> None:
    image, features = streams((2, 2, 6, 7, 9))
    keep = half_of(2, 7)
    norms = {"image_norm": IMAGE_NORMS[image_norm], "feature_norm": feature_norm}
    close(fuse_streams(image, features, keep=keep, backend=backend, **norms), definition(image, features, keep, **norms), scale=4)


@pytest.mark.parametrize("image_dtype", [torch.int16, torch.uint8, torch.float16, torch.bfloat16])
def test_image_types(backend: str, image_dtype: torch.dtype) -> None:
    image, features = streams(image_dtype=image_dtype)
    keep = torch.ones(2, 6, dtype=torch.bool)
    result = fuse_streams(image, features, keep=keep, p=0.0, backend=backend)
    close(result, definition(image, features, keep, p=0.0))
    assert result[:, 0].amin() == 0
    assert result[:, 0].amax() == 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("channel_multiple", [1, 8])
def test_layouts(backend: str, memory_format: torch.memory_format, channel_multiple: int) -> None:
    if backend == "triton" and channel_multiple == 8 and memory_format == torch.contiguous_format:
        pytest.skip("long in Triton's interpreter; test_triton_seventeen_channels_rounded_up rounds up")
    image, features = streams((2, 2, 6, 7, 9))
    keep = half_of(2, 7)
    wanted = definition(image, features, keep, channel_multiple=channel_multiple)
    for i, f in zip(layouts(image), layouts(features), strict=True):
        result = fuse_streams(i, f, keep=keep, backend=backend, memory_format=memory_format, channel_multiple=channel_multiple)
        close(result, wanted, scale=4)
        assert result.is_contiguous(memory_format=memory_format)
        assert result.shape[1] == (8 if channel_multiple == 8 else 7)


def test_seventeen_channels_batch_one_odd_sizes(backend: str) -> None:
    image, features = streams((1, 1, 5, 1, 37), (5, 1, 13), 16)
    keep = half_of(1, 17)
    close(fuse_streams(image, features, keep=keep, backend=backend), definition(image, features, keep), scale=4)


def test_image_alone(backend: str) -> None:
    image, _ = streams((2, 3, 6, 7, 9))
    keep = half_of(2, 3)
    close(fuse_streams(image, keep=keep, backend=backend), definition(image, None, keep), scale=4)


def test_constant_image_is_zero(backend: str) -> None:
    image, features = streams()
    image[1] = 3.25
    result = fuse_streams(image, features, p=0.0, backend=backend)
    assert not result[1, 0].any()
    assert result[0, 0].amax() == 1


def test_constant_feature_is_zero(backend: str) -> None:
    image, features = streams()
    features[0, 2] = 7.0
    assert not fuse_streams(image, features, p=0.0, backend=backend)[0, 3].any()


def test_large_offsets_keep_their_digits(backend: str) -> None:
    """A standard deviation of 1 around 10 000: E[x²] - E[x]² in float32 would have no digit left."""
    image, features = streams(grid=(6, 7, 9))
    features += 1e4
    keep = torch.ones(2, 6, dtype=torch.bool)
    # The inputs themselves are rounded to 1e4 · 2⁻²⁴ = 6e-4 of a standard deviation; the definition sees the same ones.
    close(fuse_streams(image, features, p=0.0, backend=backend), definition(image, features, keep, p=0.0), scale=20)


@pytest.mark.parametrize(("shape", "grid", "feature_norm"), [
    ((1, 1, 20, 70, 50), (20, 70, 50), "instance"),  # 70 000 voxels: every chunk of the statistics takes more than one round
    ((1, 1, 11, 36, 40), (11, 18, 20), "instance"),  # 3 960 coarse voxels: several blocks of every kernel
    ((1, 1, 11, 36, 40), (11, 18, 20), "unit"),
])
def test_many_voxels(backend: str, shape: tuple[int, ...], grid: tuple[int, ...], feature_norm: str) -> None:
    """More than one block, piece and chunk of every kernel, at statistics that a wrong combination would miss."""
    image, features = streams(shape, grid, 2)
    image += torch.linspace(-5, 5, shape[2])[:, None, None]
    features += torch.linspace(-50, 50, grid[1])[:, None] + torch.linspace(0, 30, grid[0])[:, None, None]
    image, features = layouts(image)[2].requires_grad_(), layouts(features)[2].requires_grad_()  # every other voxel of rows
    keep = torch.ones(1, 3, dtype=torch.bool)
    options: dict[str, Any] = {"p": 0.0, "feature_norm": feature_norm}
    result = fuse_streams(image, features, backend=backend, **options)
    exact = [t.detach().double().requires_grad_() for t in (image, features)]
    wanted = definition(*exact, keep, **options)
    close(result.detach(), wanted.detach(), scale=4)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(3)) + torch.linspace(-1, 1, shape[2])[:, None, None]
    got = torch.autograd.grad(result, (image, features), grad)
    for g, w in zip(got, torch.autograd.grad(wanted, exact, grad.double()), strict=True):
        close(g, w, scale=float(w.abs().max()))


def test_a_sample_without_its_image(backend: str) -> None:
    """Its statistics are not read for it, nor for its neighbour from it."""
    image, features = streams((2, 2, 6, 7, 9))
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[0, :2] = False
    keep[1, 0] = False
    close(fuse_streams(image, features, keep=keep, backend=backend), definition(image, features, keep), scale=4)


def test_nan_spoils_its_voxel_in_unit_norm(backend: str) -> None:
    image, features = streams(grid=(6, 7, 9))
    features[0, 1, 2, 3, 4] = torch.nan
    wrong = ~fuse_streams(image, features, p=0.0, feature_norm="unit", backend=backend).isfinite()
    assert wrong[0, 1:, 2, 3, 4].all()
    assert wrong.sum() == 5


def test_image_alone_is_float32_whatever_its_own() -> None:
    assert fuse_streams(streams(image_dtype=torch.bfloat16)[0]).dtype == torch.float32


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_voxels_stay_where_they_are(backend: str, bad: float) -> None:
    image, features = streams(grid=(6, 7, 9))
    keep = torch.ones(2, 6, dtype=torch.bool)
    clean = definition(image, features, keep, p=0.0)
    image[0, 0, 2, 3, 4] = bad
    features[1, 2, 5, 6, 8] = bad
    result = fuse_streams(image, features, p=0.0, backend=backend)
    wrong = ~result.isfinite()
    assert wrong.sum() == 2
    assert wrong[0, 0, 2, 3, 4]
    assert wrong[1, 3, 5, 6, 8]
    assert (result - clean)[~wrong].abs().max() < 0.2  # one voxel of hundreds is missing from two statistics


def test_dropped_channels_are_not_read(backend: str) -> None:
    image, features = streams()
    keep = half_of(2, 6)
    features[~keep[:, 1:]] = torch.nan
    result = fuse_streams(image, features, keep=keep, backend=backend)
    assert result.isfinite().all()


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("grid", "feature_norm"), [
    *[(grid, "instance") for grid in [(6, 7, 9), (3, 7, 4), (1, 2, 9), (5, 6, 8)]],
    *[((3, 7, 4), norm) for norm in ["unit", "standard", "none"]]])
def test_gradients(backend: str, grid: tuple[int, ...], feature_norm: str) -> None:
    image, features = (t.requires_grad_() for t in streams((2, 2, 6, 7, 9), grid))
    keep = half_of(2, 7)
    options = {"keep": keep, "image_norm": Window(-0.5, 0.8), "feature_norm": feature_norm}
    grad = torch.randn(2, 7, 6, 7, 9, generator=torch.Generator().manual_seed(3))
    result = fuse_streams(image, features, backend=backend, **options)
    got = torch.autograd.grad(result, (image, features), grad)
    exact = [t.detach().double().requires_grad_() for t in (image, features)]
    wanted_from = definition(*exact, keep, image_norm=Window(-0.5, 0.8), feature_norm=feature_norm)
    wanted = torch.autograd.grad(wanted_from, exact, grad.double())
    for g, w in zip(got, wanted, strict=True):
        close(g, w, scale=float(w.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_half_precision(backend: str, dtype: torch.dtype) -> None:
    image, features = (t.requires_grad_() for t in streams(dtype=dtype, image_dtype=dtype))
    keep = half_of(2, 6)
    result = fuse_streams(image, features, keep=keep, backend=backend)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    got = torch.autograd.grad(result, (image, features), grad)
    exact = [t.detach().double().requires_grad_() for t in (image, features)]
    wanted = torch.autograd.grad(definition(*exact, keep), exact, grad.double())
    for g, w in zip(got, wanted, strict=True):
        assert g.dtype == dtype
        close(g, w, scale=float(w.abs().max()), backend=backend)


def test_gradients_of_any_layout(backend: str) -> None:
    """Non-contiguous gradients, and those of a sum, whose strides are zero."""
    image, features = (t.requires_grad_() for t in streams())
    exact = [t.detach().double().requires_grad_() for t in (image, features)]
    keep = half_of(2, 6)
    wanted_from = definition(*exact, keep)
    result = fuse_streams(image, features, keep=keep, backend=backend)
    base = torch.randn(result.shape, generator=torch.Generator().manual_seed(3))
    for grad in (*layouts(base), torch.ones(()).expand(result.shape)):
        got = torch.autograd.grad(result, (image, features), grad, retain_graph=True)
        wanted = torch.autograd.grad(wanted_from, exact, grad.double(), retain_graph=True)
        for g, w in zip(got, wanted, strict=True):
            close(g, w, scale=max(1.0, float(w.abs().max())))


def test_unit_norm_gradient_of_a_zero_vector(backend: str) -> None:
    image, features = streams((1, 1, 2, 2, 2), (2, 2, 2), 3)
    features[..., 0] = 0
    features[0, :, 0, 0, 1] = torch.tensor([3e-3, -2e-3, 1e-3])  # shorter than eps, and not zero
    features.requires_grad_()
    fuse_streams(image, features, p=0.0, feature_norm="unit", eps=1e-2, backend=backend).sum().backward()
    exact = features.detach().double().requires_grad_()
    keep = torch.ones(1, 4, dtype=torch.bool)
    definition(image, exact, keep, p=0.0, feature_norm="unit", eps=1e-2).sum().backward()
    close(features.grad, exact.grad, scale=100)


# ---- hypothesis: any shape, ratio, layout, mode ----------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_call_native(data: st.DataObject) -> None:
    any_call("native", data)


@settings(max_examples=14, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_call_triton(data: st.DataObject) -> None:
    any_call("triton", data)


def any_call(name: str, data: st.DataObject) -> None:
    """A call that is drawn, against the definition."""
    size = data.draw(st.tuples(*[st.integers(1, 9)] * 3), "size")
    grid = tuple(data.draw(st.integers(1, n), "grid") for n in size)
    n, ci, cf = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 4)), "channels")
    image_dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int16, torch.uint8]), "image dtype")
    image, features = streams((n, ci, *size), grid, cf, image_dtype=image_dtype, seed=data.draw(st.integers(0, 99), "seed"))
    keep = half_of(n, ci + cf, data.draw(st.integers(0, 99), "draw"))
    options = {"image_norm": data.draw(st.sampled_from(list(IMAGE_NORMS.values())), "image norm"),
               "feature_norm": data.draw(st.sampled_from(["instance", "unit", "standard", "none"]), "feature norm"),
               "channel_multiple": data.draw(st.sampled_from([1, 4]), "multiple"),
               "eps": 1e-3}  # a channel of two voxels may have next to no variance
    mode = data.draw(st.sampled_from(["channel", "stream"]), "mode")
    last = data.draw(st.booleans(), "channels last")
    result = fuse_streams(data.draw(st.sampled_from(layouts(image)), "image layout"),
                          data.draw(st.sampled_from(layouts(features)), "features layout"), p=0.5, mode=mode, keep=keep,
                          memory_format=torch.channels_last_3d if last else torch.contiguous_format, backend=name, **options)
    wanted = definition(image, features, keep, p=0.5, mode=mode, **options)
    close(result, wanted, scale=max(4.0, float(wanted.abs().max())))


# ---- threads and instruction sets ------------------------------------------------------------------------------------


def test_threads_do_not_change_a_bit() -> None:
    image, features = streams((2, 1, 20, 30, 40), (10, 15, 20), 6)
    features.requires_grad_()
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            result = fuse_streams(image, features, p=0.0, backend="native")
            results.append((result.detach(), torch.autograd.grad(result.square().sum(), features)[0]))
    finally:
        torch.set_num_threads(before)
    for result, grad in results[1:]:
        assert torch.equal(result, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_levels_of_the_cpu_agree() -> None:
    """The library holds code for several instruction sets; one per process is picked, so ask other processes."""
    program = ("import torch; from dropgen_fast import fuse_streams; torch.manual_seed(0)\n"
               "i, f = torch.randn(2, 1, 9, 10, 33), torch.randn(2, 5, 4, 10, 17, requires_grad=True)\n"
               "y = fuse_streams(i, f, p=0.0, backend='native', dtype=torch.float16); (y.float() ** 2).sum().backward()\n"
               "print(*y.double().flatten(1).norm(dim=1).tolist(), *f.grad.double().flatten(1).norm(dim=1).tolist())")
    found = []
    for level in "012":
        done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "DROPGEN_FAST_CPU_LEVEL": level},
                              capture_output=True, text=True, check=True)
        found.append([float(v) for v in done.stdout.split()])
    assert len(found[0]) == 4
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(found[2], rel=1e-5)


# ---- what Triton's variants need -------------------------------------------------------------------------------------


def triton_agrees(
    shape: tuple[int, ...], grid: tuple[int, ...], channels: int, *, memory_format: torch.memory_format = torch.contiguous_format,
    image_layout: int = 0, features_layout: int = 0, grad_layout: int = 0, dtype: torch.dtype = torch.float32, **options: Any,
) -> None:
    """Forward and both gradients against the definition; layouts as `layouts` counts them, 4 a box out of a larger tensor."""
    def laid(tensor: Tensor, layout: int) -> Tensor:
        if layout < 4:
            return layouts(tensor)[layout]
        larger = torch.full([n + 3 for n in tensor.shape], torch.nan, dtype=tensor.dtype)
        return larger[tuple(slice(2, n + 2) for n in tensor.shape)].copy_(tensor)

    image, features = streams(shape, grid, channels, dtype=dtype)
    features += torch.linspace(-3, 3, grid[2]).to(dtype) + torch.linspace(0, 2, grid[0])[:, None, None].to(dtype)
    keep = half_of(shape[0], shape[1] + channels)
    x, f = laid(image, image_layout).requires_grad_(), laid(features, features_layout).requires_grad_()
    options = {"p": 0.5, "keep": keep, "eps": 1e-3} | options
    result = fuse_streams(x, f, backend="triton", memory_format=memory_format, **options)
    assert result.is_contiguous(memory_format=memory_format)
    exact = [t.double().requires_grad_() for t in (image, features)]
    wanted = definition(*exact, **options)
    close(result.detach(), wanted.detach(), scale=4, backend="triton")
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    got = torch.autograd.grad(result, (x, f), laid(grad, grad_layout))
    for g, w in zip(got, torch.autograd.grad(wanted, exact, grad.double()), strict=True):
        close(g, w, scale=float(w.abs().max()), backend="triton")


RATIOS = [
    ((8, 12, 18), (4, 6, 9)), ((8, 12, 20), (2, 3, 5)), ((8, 16, 24), (1, 2, 3)), ((9, 6, 15), (3, 2, 5)),  # whole ratios
    ((6, 8, 20), (6, 4, 5)), ((8, 6, 9), (4, 6, 3)), ((4, 9, 20), (1, 3, 20)),  # another along each axis
    ((9, 10, 20), (1, 1, 1)), ((7, 11, 23), (5, 3, 17)), ((10, 6, 13), (3, 5, 13)),  # any
]


@pytest.mark.parametrize(("size", "grid", "memory_format"), [
    *[(*ratio, torch.contiguous_format) for ratio in RATIOS],
    *[(*ratio, torch.channels_last_3d) for ratio in RATIOS[::3]]], ids=str)
def test_triton_ratios(size: tuple[int, ...], grid: tuple[int, ...], memory_format: torch.memory_format) -> None:
    # One voxel has no variance for a norm, and no gradient through it.
    triton_agrees((1, 1, *size), grid, 2, memory_format=memory_format, feature_norm="none" if grid == (1, 1, 1) else "instance")


@pytest.mark.parametrize("grid", [(3, 4, 16), (2, 2, 8)], ids=["same", "coarse"])
@pytest.mark.parametrize("multiple", [8, 16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_triton_seventeen_channels_rounded_up(grid: tuple[int, ...], multiple: int, memory_format: torch.memory_format) -> None:
    triton_agrees((1, 1, 3, 4, 16), grid, 16, memory_format=memory_format, channel_multiple=multiple,
                  features_layout=int(memory_format == torch.channels_last_3d))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that the interpreter comes to tiles, chunks, rounds and rows after the first."""
    from dropgen_fast.kernels.fuse_streams import triton
    monkeypatch.setattr(triton, "TILES", {name: triton.Tile(vectors=1, warps=1) for name in triton.TILES})
    monkeypatch.setattr(triton, "CHUNKS", 2)
    monkeypatch.setattr(triton, "PROGRAMS_LAST", 3)
    monkeypatch.setattr(triton, "LONGEST_ROW", 64)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", [0, 1, 2, 3, 4], ids=["dense", "last", "every other", "turned", "box"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("grid", [(3, 5, 75), (2, 3, 37)], ids=["same", "coarse"])
def test_triton_many_tiles(grid: tuple[int, ...], memory_format: torch.memory_format, layout: int) -> None:
    """1 125 voxels in tiles of 128: the last is cut short, and every program has more than one."""
    triton_agrees((1, 2, 3, 5, 75), grid, 3, memory_format=memory_format, image_layout=layout, features_layout=layout,
                  grad_layout=layout)


def test_triton_refuses_what_32_bits_cannot_count() -> None:
    from dropgen_fast.kernels.fuse_streams import triton
    assert triton.refuses([torch.empty(1, 1, 1290, 1290, 1290, device="meta")]) == ""
    assert "32 bits" in triton.refuses([torch.empty(1, 1, 1291, 1290, 1290, device="meta")])
    assert "32 bits" in triton.refuses([torch.empty(1, 1, 1, 1, 32_001, device="meta")])
    assert "samples" in triton.refuses([torch.empty(32_769, 1, 1, 1, 1, device="meta")])


@pytest.mark.usefixtures("small_tiles")
def test_triton_reach_wider_than_a_tile() -> None:
    """A coarse voxel reaches 150 columns, in tiles of 64."""
    triton_agrees((1, 1, 4, 6, 75), (2, 3, 1), 2)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("feature_norm", ["unit", "standard", "none"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("grid", [(3, 4, 40), (3, 2, 20)], ids=["same", "coarse"])
def test_triton_many_tiles_of_other_norms(grid: tuple[int, ...], memory_format: torch.memory_format, feature_norm: str) -> None:
    triton_agrees((1, 1, 3, 4, 40), grid, 3, memory_format=memory_format, feature_norm=feature_norm, eps=1e-2,
                  image_norm=Window(-0.5, 0.8))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", [0, 1], ids=["dense", "last"])
def test_triton_statistics_of_odd_channels(layout: int) -> None:
    """A first voxel that is nothing like the rest, a large offset, voxels that are not finite; over many chunks."""
    image, features = streams((1, 1, 4, 9, 31), (4, 9, 31), 3)
    features[0, 0] += 1e4
    features[0, 1] += 1e4
    features[0, 1, 0, 0, 0] = -5.0
    features[0, 2, :, ::3] = torch.nan
    features[0, 2, 0, 0, 0] = torch.inf
    keep = torch.ones(1, 4, dtype=torch.bool)
    result = fuse_streams(image, layouts(features)[layout], p=0.0, backend="triton")
    wanted = definition(image, features, keep, p=0.0)
    finite = wanted.isfinite()
    assert torch.equal(result.isfinite(), finite)
    close(result[finite], wanted[finite], scale=20)  # as test_large_offsets_keep_their_digits


# ---- a backend that is not there ------------------------------------------------------------------------------------


def test_missing_backend_says_why_and_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MISSING", "the native library was not built")
    image, features = streams()
    with pytest.raises(RuntimeError, match=r"'native' cannot take this call: the native library was not built.*reference"):
        fuse_streams(image, features, backend="native")
    close(fuse_streams(image, features, p=0.0), definition(image, features, torch.ones(2, 6, dtype=torch.bool), p=0.0), scale=4)
