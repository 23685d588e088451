"""fuse_streams: every backend against the definition in float64."""

from __future__ import annotations

import io
import itertools
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dropgen_fast import StreamFusion, Window, ZScore, fuse_streams
from dropgen_fast.kernels.fuse_streams import FEATURE_NORMS, available_backends, draw_scale, native, pack_image_norm, reference

BACKENDS = ("reference", "native", "triton")
# Half a unit in the last place of the result, relative to its own size, and float32's share of the arithmetic before it:
# about 40 roundings of values that instance norm may have made 10 times larger than their standard deviation.
TOLERANCE = {torch.float32: (3e-6, 5e-5), torch.float16: (2**-11, 1e-4), torch.bfloat16: (2**-8, 1e-4)}
IMAGE_NORMS = {"minmax": "minmax", "none": "none", "window": Window(-0.5, 0.8), "zscore": ZScore(0.3, 1.7)}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if reason := available_backends()[request.param]:
        pytest.fail(f"{request.param} must be here for the tests: {reason}")
    return str(request.param)


def streams(
    shape: tuple[int, ...] = (2, 1, 6, 7, 9), grid: tuple[int, ...] = (3, 7, 4), channels: int = 5, *,
    dtype: torch.dtype = torch.float32, image_dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(shape, generator=generator)
    image = (image * 40 + 100).clamp(0, 255).to(image_dtype) if not image_dtype.is_floating_point else image.to(image_dtype)
    return image, (torch.randn((shape[0], channels, *grid), generator=generator) * 2 + 1).to(dtype)


def half_of(n: int, c: int, seed: int = 1) -> Tensor:
    """A draw in which some channels are dropped and some are kept."""
    keep = torch.rand(n, c, generator=torch.Generator().manual_seed(seed)) < 0.6
    keep[:, 0], keep[:, -1] = True, False
    return keep


def definition(
    image: Tensor, features: Tensor | None, keep: Tensor, *, p: float = 0.75, mode: str = "channel", **kwargs: Any,
) -> Tensor:
    """The definition in float64, from the very values that the backend was given."""
    cf = features.shape[1] if features is not None else 0
    scale = draw_scale(image.shape[0], image.shape[1], cf, (p, p), mode=mode, keep=keep)
    options = {"image_norm": "minmax", "feature_norm": "instance", "eps": 1e-5} | kwargs
    options["image_norm"] = pack_image_norm(options["image_norm"])
    return reference.fuse_streams(image.double(), features.double() if features is not None else None, scale.double(),
                                  dtype=torch.float64, **options)


def close(result: Tensor, wanted: Tensor, scale: float = 1.0, *, backend: str = "") -> None:
    relative, absolute = TOLERANCE[result.dtype]
    if result.dtype == torch.bfloat16 and backend == "triton" and not result.is_cuda:
        relative *= 2  # Triton's interpreter cuts float32 to bfloat16 off where a GPU rounds it: a whole unit, not half
    torch.testing.assert_close(result.double(), wanted, rtol=relative, atol=absolute * scale)


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


def layouts(t: Tensor) -> list[Tensor]:
    """The same values: dense, channels-last, every other voxel of a larger tensor, axes exchanged."""
    wide = torch.zeros(*t.shape[:4], 2 * t.shape[4], dtype=t.dtype)[..., ::2].copy_(t)
    turned = t.transpose(2, 4).contiguous().transpose(2, 4)
    return [t, t.contiguous(memory_format=torch.channels_last_3d), wide, turned]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("channel_multiple", [1, 8])
def test_layouts(backend: str, memory_format: torch.memory_format, channel_multiple: int) -> None:
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


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_default_dtype_does_not_reach_the_draw(backend: str, default: torch.dtype) -> None:
    image, features = streams()
    wanted = fuse_streams(image, features, p=0.0, backend=backend)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(fuse_streams(image, features, p=0.0, backend=backend), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


def test_draw_counts_in_training_only(backend: str) -> None:
    image, features = streams()
    result = fuse_streams(image, features, keep=half_of(2, 6), training=False, backend=backend)
    assert torch.equal(result, fuse_streams(image, features, p=0.0, backend=backend))


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


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("name", ["native", "triton"])
def test_any_call(name: str, data: st.DataObject) -> None:
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


# ---- the draw --------------------------------------------------------------------------------------------------------


def test_channel_draw() -> None:
    torch.manual_seed(0)
    scale = draw_scale(4000, 1, 4, (0.25, 0.75))
    assert scale[:, 0].unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert scale[:, 1:].unique().tolist() == [0.0, 4.0]
    # Standard error of a share of 4 000 draws is at most 0.008; five of them.
    assert (scale[:, 0] == 0).float().mean() == pytest.approx(0.25, abs=0.04)
    assert (scale[:, 1:] == 0).float().mean(0).tolist() == pytest.approx([0.75] * 4, abs=0.04)
    assert torch.corrcoef(scale.T.double()).fill_diagonal_(0).abs().max() < 0.08  # each on its own


def test_channel_draw_is_unbiased_as_torch_dropout() -> None:
    torch.manual_seed(0)
    assert draw_scale(20000, 1, 1, (0.75, 0.75)).mean() == pytest.approx(1.0, abs=5 * (3 / 40000) ** 0.5)


def test_stream_draw() -> None:
    torch.manual_seed(0)
    scale = draw_scale(6000, 2, 3, (0.5, 0.3), mode="stream")
    assert set(scale.unique().tolist()) == {0.0, 1.0}
    image, features = scale[:, :2], scale[:, 2:]
    assert (image.amin(1) == image.amax(1)).all()
    assert (features.amin(1) == features.amax(1)).all()
    assert ((image[:, 0] == 0) & (features[:, 0] == 0)).sum() == 0
    assert (image[:, 0] == 0).float().mean() == pytest.approx(0.5, abs=0.033)
    assert (features[:, 0] == 0).float().mean() == pytest.approx(0.3, abs=0.03)


def test_one_rate_in_stream_mode_is_the_images() -> None:
    image, features = streams()
    torch.manual_seed(0)
    result = torch.cat([fuse_streams(image, features, p=1.0, mode="stream") for _ in range(5)])
    assert not result[:, 0].any()
    assert result[:, 1:].flatten(2).any(-1).all()


@pytest.mark.parametrize("mode", ["channel", "stream"])
@pytest.mark.parametrize("options", [{"p": 0.0}, {"training": False}])
def test_nothing_is_dropped(backend: str, options: dict[str, Any], mode: str) -> None:
    image, features = streams()
    close(fuse_streams(image, features, backend=backend, mode=mode, **options),
          definition(image, features, torch.ones(2, 6, dtype=torch.bool), p=0.0), scale=4)


def test_p_near_one(backend: str) -> None:
    image, features = streams()
    keep = half_of(2, 6)
    result = fuse_streams(image, features, p=0.9999, keep=keep, backend=backend)
    close(result, definition(image, features, keep, p=0.9999), scale=4e4)


def test_draw_follows_the_seed_on_every_backend() -> None:
    image, features = streams((8, 1, 6, 7, 9))
    drawn = []
    for name in BACKENDS:
        torch.manual_seed(7)
        drawn.append(fuse_streams(image, features, p=0.5, backend=name).flatten(2).any(-1))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert 0 < drawn[0].sum() < drawn[0].numel()


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


# ---- a citizen of torch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["native", "triton"])
@pytest.mark.parametrize("feature_norm", ["instance", "unit"])
def test_opcheck(name: str, feature_norm: str) -> None:
    image, features = (t.requires_grad_() for t in streams())
    scale = draw_scale(2, 1, 5, (0.5, 0.5), keep=half_of(2, 6))
    torch.library.opcheck(torch.ops.dropgen_fast.fuse_streams.default,
                          (image, features, scale, "window", -0.5, 0.8, feature_norm, 1e-5, torch.float32, True, 8, name))


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_compile_dynamic_shapes(name: str, eps: float) -> None:
    torch._dynamo.reset()
    fusion = StreamFusion(0.5, backend=name, eps=eps)
    compiled = torch.compile(fusion, fullgraph=True, dynamic=True, backend="inductor" if name == "native" else "aot_eager")
    for seed, shape in enumerate([(4, 1, 6, 7, 9), (2, 1, 8, 5, 6)]):
        image, features = streams(shape, (3, 5, 4), seed=seed)
        keep = half_of(shape[0], 6)
        torch.testing.assert_close(compiled(image, features, keep), fusion(image, features, keep))


def test_export() -> None:
    image, features = streams()
    fusion = StreamFusion(0.5, backend="native").eval()
    program = torch.export.export(fusion, (image, features))
    torch.testing.assert_close(program.module()(image, features), fusion(image, features))


def test_module_is_saved_and_copied() -> None:
    buffer = io.BytesIO()
    torch.save(StreamFusion(0.5, memory_format=torch.channels_last_3d), buffer)
    buffer.seek(0)
    image, features = streams()
    loaded = torch.load(buffer, weights_only=False).eval()
    assert loaded(image, features).is_contiguous(memory_format=torch.channels_last_3d)


def test_op_refuses_a_wrong_draw() -> None:
    image, features = streams()
    for scale in (torch.ones(2, 6, dtype=torch.float64), torch.ones(1, 6), torch.ones(2, 5)):
        with pytest.raises(ValueError, match=r"scale must be \(2, 6\) float32"):
            torch.ops.dropgen_fast.fuse_streams(image, features, scale, "none", 0.0, 0.0, "none", 1e-5, torch.float32, False, 1,
                                                "native")


@pytest.mark.parametrize("name", ["native", "reference"])
def test_compile_fullgraph(name: str) -> None:
    image, features = streams((4, 1, 6, 7, 9))
    torch._dynamo.reset()
    fusion = StreamFusion(0.5, backend=name, memory_format=torch.channels_last_3d)
    compiled = torch.compile(fusion, fullgraph=True, backend="aot_eager")
    keep = half_of(4, 6)
    torch.testing.assert_close(compiled(image, features, keep), fusion(image, features, keep))
    assert compiled(image, features).stride() == fusion(image, features).stride()


def test_module_follows_training_mode() -> None:
    image, features = streams((16, 1, 6, 7, 9))
    fusion = StreamFusion(0.75)
    torch.manual_seed(0)
    assert not fusion(image, features).flatten(2).any(-1).all()
    assert fusion.eval()(image, features).flatten(2).any(-1).all()
    assert not list(fusion.parameters())
    assert not fusion.state_dict()


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


# ---- ahead of time, for GPUs that are not here -----------------------------------------------------------------------


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_for_gpus(capability: int) -> None:
    """The interpreter accepts what the compiler refuses, so compile too; in a process where it is off."""
    pytest.importorskip("triton.backends.nvidia.driver")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, os.path.join(os.path.dirname(__file__), "compile_kernels.py"), str(capability)],
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    names = {line.split()[0] for line in done.stdout.splitlines()}
    assert {"_fuse", "_transpose_interpolation", "_image_chunks", "_channel_chunks", "_combine"} <= names
    assert all(int(line.split()[1]) > 0 for line in done.stdout.splitlines()), done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_on_a_gpu(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    image, features = streams((2, 1, 33, 40, 65), (17, 20, 33), 16, dtype=dtype, image_dtype=dtype)
    keep = half_of(2, 17)
    x, f = image.cuda().requires_grad_(), features.cuda().requires_grad_()
    result = fuse_streams(x, f, keep=keep.cuda(), memory_format=memory_format, channel_multiple=8, backend="triton")
    close(result.cpu(), definition(image, features, keep, channel_multiple=8), scale=4)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    result.backward(grad.cuda())
    exact = [t.double().requires_grad_() for t in (image, features)]
    definition(*exact, keep, channel_multiple=8).backward(grad.double())
    close(f.grad.cpu(), exact[1].grad, scale=float(exact[1].grad.abs().max()))
    close(x.grad.cpu(), exact[0].grad, scale=float(exact[0].grad.abs().max()))


# ---- wrong calls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "message"), [
    ({"image": torch.zeros(2, 6, 7, 9)}, r"image must be \(N, Ci, D, H, W\).*\(2, 6, 7, 9\)"),
    ({"image": torch.zeros(2, 1, 0, 7, 9)}, "no empty axis"),
    ({"image": torch.zeros(2, 1, 6, 7, 9, dtype=torch.int64)}, "image must be one of float32.*int64"),
    ({"image": torch.zeros(2, 1, 6, 7, 9, dtype=torch.float64)}, "image must be one of float32.*float64"),
    ({"features": torch.zeros(2, 6, 7, 9)}, "features must be"),
    ({"features": torch.zeros(3, 5, 3, 7, 4)}, "batch size 2, got 3"),
    ({"features": torch.zeros(2, 5, 7, 7, 4)}, r"no larger than the image.*\(7, 7, 4\)"),
    ({"features": torch.zeros(2, 5, 3, 7, 4, dtype=torch.int16)}, "features must be one of float32.*int16"),
    ({"p": 1.0}, r"p must be in \[0, 1\), got 1.0"),
    ({"p": -0.1}, r"p must be in \[0, 1\)"),
    ({"p": float("nan")}, r"p must be in \[0, 1\)"),
    ({"p": (0.1, 0.2, 0.3)}, "p must be one rate or"),
    ({"p": "0.5"}, "p must be one rate or"),
    ({"keep": [True] * 6}, "keep must be a tensor"),
    ({"p": (0.6, 0.5), "mode": "stream"}, "sum is at most 1"),
    ({"mode": "voxel"}, "mode must be one of channel, stream"),
    ({"keep": torch.ones(2, 5, dtype=torch.bool)}, r"keep must be \(2, 6\) bool"),
    ({"keep": torch.ones(2, 6)}, r"keep must be \(2, 6\) bool"),
    ({"image_norm": "max"}, "image_norm must be"),
    ({"feature_norm": "batch"}, "feature_norm must be one of instance"),
    ({"eps": 0.0}, "eps must be a positive"),
    ({"dtype": torch.int16}, "dtype must be one of"),
    ({"memory_format": torch.channels_last}, "memory_format must be"),
    ({"channel_multiple": 0}, "channel_multiple must be"),
    ({"backend": "cuda"}, "backend must be one of auto, native"),
])
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    image, features = streams()
    arguments: dict[str, Any] = {"image": image, "features": features} | change
    with pytest.raises(ValueError, match=message):
        fuse_streams(arguments.pop("image"), arguments.pop("features"), **arguments)


@pytest.mark.parametrize("bounds", [(1, 1), (2, 1), (0, float("inf"))])
def test_wrong_window(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="Window needs finite lo < hi"):
        Window(*bounds)


def test_wrong_zscore() -> None:
    with pytest.raises(ValueError, match="std > 0"):
        ZScore(0, 0)


def test_missing_backend_says_why_and_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "MISSING", "the native library was not built")
    image, features = streams()
    with pytest.raises(RuntimeError, match=r"'native' cannot take this call: the native library was not built.*reference"):
        fuse_streams(image, features, backend="native")
    close(fuse_streams(image, features, p=0.0), definition(image, features, torch.ones(2, 6, dtype=torch.bool), p=0.0), scale=4)
