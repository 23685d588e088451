"""fuse_streams as a citizen of torch, and what it says to wrong calls."""

from __future__ import annotations

import io
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuse_streams_cases import IMAGE_NORMS, close, definition, half_of, streams
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

from dropgen_fast import StreamFusion, Window, ZScore, fuse_streams
from dropgen_fast.kernels.fuse_streams import FEATURE_NORMS, RateSchedule, draw_scale, pack_image_norm

OPS = torch.ops.dropgen_fast


# ---- the registration ------------------------------------------------------------------------------------------------


def op_arguments(
    name: str, *, feature_norm: str = "instance", image_norm: str = "window", channels_last: bool = False,
    image_dtype: torch.dtype = torch.float32, alone: bool = False,
) -> tuple[Any, ...]:
    """What the forward op is called with; some channels are dropped."""
    image, features = streams((2, 2, 3, 4, 5), (2, 4, 3), 3, image_dtype=image_dtype)
    memory = torch.channels_last_3d if channels_last else torch.contiguous_format
    image, features = image.contiguous(memory_format=memory), features.contiguous(memory_format=memory)
    if image_dtype.is_floating_point:
        image.requires_grad_()
    scale = draw_scale(2, 2, 0 if alone else 3, (0.5, 0.5), keep=half_of(2, 2 if alone else 5))
    return (image, None if alone else features.requires_grad_(), scale, *pack_image_norm(IMAGE_NORMS[image_norm]), feature_norm,
            1e-3, torch.float32, channels_last, 4 if channels_last else 1, name)


CALLS: dict[str, dict[str, Any]] = {
    **{norm: {"feature_norm": norm} for norm in FEATURE_NORMS}, **{norm: {"image_norm": norm} for norm in IMAGE_NORMS},
    "channels-last": {"channels_last": True}, "int16": {"image_dtype": torch.int16}, "alone": {"alone": True},
}


@pytest.mark.parametrize("options", [pytest.param(options, id=name) for name, options in CALLS.items()])
def test_opcheck(options: dict[str, Any]) -> None:
    torch.library.opcheck(OPS.fuse_streams.default, op_arguments("native", **options))


@pytest.mark.parametrize("options", [pytest.param(options, id=name) for name, options in CALLS.items()])
def test_opcheck_backward(options: dict[str, Any]) -> None:
    image, features, scale, *settings, _dtype, _last, _multiple, name = op_arguments("native", **options)
    out, image_stats, feature_stats = OPS.fuse_streams(image, features, scale, *settings, _dtype, _last, _multiple, name)
    image, features = image.detach(), None if features is None else features.detach()
    image_dtype = image.dtype if image.is_floating_point() else None
    torch.library.opcheck(OPS.fuse_streams_backward.default, (
        torch.randn_like(out.detach()), image if image_dtype else None, features, scale, image_stats, feature_stats, 2, *settings,
        image_dtype, name))


def test_opcheck_triton() -> None:
    """The interpreter is slow: one call, less its gradient's second trace."""
    torch.library.opcheck(OPS.fuse_streams.default, op_arguments("triton"), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("name", "eps"), [("native", 1e-5), ("reference", 1e-3)])
def test_compile_dynamic_shapes(name: str, eps: float) -> None:
    torch._dynamo.reset()
    fusion = StreamFusion(0.5, backend=name, eps=eps)
    compiled = torch.compile(fusion, fullgraph=True, dynamic=True, backend="inductor" if name == "native" else "aot_eager")
    for seed, shape in enumerate([(4, 1, 6, 7, 9), (2, 1, 8, 5, 6)]):
        image, features = streams(shape, (3, 5, 4), seed=seed)
        keep = half_of(shape[0], 6)
        torch.testing.assert_close(compiled(image, features, keep), fusion(image, features, keep))


def test_compiled_gradients_with_dynamic_shapes() -> None:
    """Both directions through one graph."""
    torch._dynamo.reset()
    fusion = StreamFusion(0.5, backend="native", image_norm=Window(-0.5, 0.8))
    compiled = torch.compile(fusion, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed, (shape, grid) in enumerate([((4, 1, 6, 7, 9), (3, 5, 4)), ((2, 1, 8, 5, 6), (8, 3, 2))]):
        image, features = (t.requires_grad_() for t in streams(shape, grid, seed=seed))
        keep, grad = half_of(shape[0], 6), torch.randn(shape[0], 6, *shape[2:])
        got = torch.autograd.grad(compiled(image, features, keep), (image, features), grad)
        wanted = torch.autograd.grad(fusion(image, features, keep), (image, features), grad)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("p", [0.5, RateSchedule([(0, 0.5)])], ids=["constant", "schedule"])
@pytest.mark.parametrize("training", [True, False])
def test_export(training: bool, p: Any, strict: bool) -> None:
    """Any batch, any size; in training mode the draw is in the program."""
    fusion = StreamFusion(p, backend="native").train(training)
    axes = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO, 4: Dim.AUTO}
    program = torch.export.export(fusion, streams((4, 1, 8, 6, 10), (4, 3, 5)), strict=strict,
                                  dynamic_shapes={"image": axes, "features": axes}).module()
    for shape, grid in [((4, 1, 8, 6, 10), (4, 3, 5)), ((16, 1, 4, 9, 6), (3, 5, 3))]:
        image, features = streams(shape, grid)
        results = []
        for call in (fusion, program):
            torch.manual_seed(1)
            results.append(call(image, features))
        assert torch.equal(*results)
        assert results[0].flatten(2).any(-1).all() == (not training)


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


# ---- torch.func ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "in_dims"), [
    *[(name, dims) for name in ("native", "reference") for dims in [(0, 0), (1, 2), (None, 0), (0, None)]],
    ("triton", (0, None))])
def test_vmap(name: str, in_dims: tuple[int | None, int | None]) -> None:
    image, features = streams((6, 1, 3, 4, 5), (2, 4, 3), 3)
    image, features = (t.unflatten(0, (3, 2)) for t in (image, features))
    keep = half_of(2, 4)
    parts = [t if axis is not None else t[:1].expand_as(t) for t, axis in zip((image, features), in_dims, strict=True)]
    wanted = torch.stack([fuse_streams(i, f, keep=keep, backend=name) for i, f in zip(*parts, strict=True)])
    given = [t[0] if axis is None else t.movedim(0, axis) for t, axis in zip((image, features), in_dims, strict=True)]
    result = torch.func.vmap(lambda i, f: fuse_streams(i, f, keep=keep, backend=name), in_dims)(*given)
    torch.testing.assert_close(result, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("batch", "feature_norm", "name"), [
    *itertools.product((1, 2), ("instance", "standard", "unit"), ("native",)),
    (1, "instance", "triton"), (2, "unit", "triton"),  # the mapping is the op's, for all backends
])
def test_vmap_of_gradients(batch: int, feature_norm: str, name: str) -> None:
    """Statistics are not mapped while gradients are: they are repeated, and of one sample that is a stride of zero."""
    image, features = streams((batch, 1, 4, 6, 6), (2, 3, 3), 3)
    keep = torch.ones(batch, 4, dtype=torch.bool)
    result, vjp = torch.func.vjp(
        lambda i, f: fuse_streams(i, f, p=0.0, keep=keep, feature_norm=feature_norm, backend=name), image, features)
    grads = torch.randn(2, *result.shape, generator=torch.Generator().manual_seed(3))
    wanted = [torch.stack(parts) for parts in zip(*(vjp(grad) for grad in grads), strict=True)]
    for got, one_by_one in zip(torch.func.vmap(vjp)(grads), wanted, strict=True):
        torch.testing.assert_close(got, one_by_one, rtol=0, atol=0)


def test_vmap_of_the_image_alone_and_of_the_draw() -> None:
    image, _ = streams((2, 3, 3, 4, 5))
    keeps = torch.stack([half_of(2, 3, seed) for seed in range(4)])
    result = torch.func.vmap(lambda keep: fuse_streams(image, keep=keep, backend="native"))(keeps)
    assert torch.equal(result, torch.stack([fuse_streams(image, keep=keep, backend="native") for keep in keeps]))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_draws_as_its_randomness_says() -> None:
    image, features = (t.expand(50, *t.shape) for t in streams((2, 1, 1, 1, 1), (1, 1, 1), 3))
    options: dict[str, Any] = {"p": (0.3, 0.5), "image_norm": "none", "feature_norm": "none", "backend": "native"}

    def call(i: Tensor, f: Tensor) -> Tensor:
        return fuse_streams(i, f, **options)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(call)(image, features)
    torch.manual_seed(0)
    assert torch.func.vmap(call, randomness="same")(image, features).unique(dim=0).shape[0] == 1
    assert torch.func.vmap(call, randomness="different")(image, features).unique(dim=0).shape[0] > 20


@pytest.mark.parametrize("name", ["native", "reference"])
def test_gradients_by_torch_func(name: str) -> None:
    """Of each sample, all at once, as they are one by one."""
    image, features = streams((3, 1, 3, 4, 5), (2, 4, 3), 3)
    keep = half_of(3, 4)

    def loss(i: Tensor, f: Tensor, k: Tensor) -> Tensor:
        return fuse_streams(i[None], f[None], keep=k[None], backend=name).square().sum()

    leaves = [t.clone().requires_grad_() for t in (image, features)]
    fuse_streams(*leaves, keep=keep, backend=name).square().sum().backward()
    got = torch.func.vmap(torch.func.grad(loss, (0, 1)))(image, features, keep)
    torch.testing.assert_close(got, tuple(t.grad for t in leaves))
    one = torch.func.grad(loss, 1)(image[0], features[0], keep[0])
    torch.testing.assert_close(one, leaves[1].grad[0])


@pytest.mark.parametrize("name", ["native", "triton"])
def test_forward_mode_and_second_order_are_refused(name: str) -> None:
    image, features = streams((1, 1, 3, 4, 5), (2, 4, 3), 3)
    keep = half_of(1, 4)
    message = 'second order and forward-mode ones with backend="reference" only'
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(lambda f: fuse_streams(image, f, keep=keep, backend=name), (features,), (features,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        fuse_streams(image, forward_ad.make_dual(features, features), keep=keep, backend=name)
    features.requires_grad_()
    loss = fuse_streams(image, features, keep=keep, backend=name).square().sum()
    gradient, = torch.autograd.grad(loss, features, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        gradient.square().sum().backward()


def test_reference_has_them() -> None:
    image, features = (t.double() for t in streams((1, 1, 2, 2, 3), (2, 1, 2), 2))
    torch.autograd.gradgradcheck(lambda f: definition(image, f, half_of(1, 3), eps=1e-2), features.requires_grad_())
    call = lambda f: fuse_streams(image.float(), f, keep=half_of(1, 3), backend="reference")  # noqa: E731
    assert torch.func.jvp(call, (features.detach().float(),), (torch.ones(1, 2, 2, 1, 2),))[1].shape == (1, 3, 2, 2, 3)


# ---- modes and surroundings ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["native", "reference"])
def test_autocast_changes_nothing(name: str) -> None:
    keep = half_of(2, 6)
    for dtype in (torch.float32, torch.bfloat16):
        image, features = streams(dtype=dtype)
        plain = fuse_streams(image, features, keep=keep, backend=name)
        with torch.autocast("cpu", torch.bfloat16):
            result = fuse_streams(image, features, keep=keep, backend=name)
            chosen = fuse_streams(image, features, keep=keep, backend=name, dtype=torch.float16)
        assert result.dtype == dtype
        assert torch.equal(result, plain)
        assert chosen.dtype == torch.float16


@pytest.mark.parametrize("name", ["native", "reference"])
def test_without_gradients_and_in_inference_mode(name: str) -> None:
    image, features = streams()
    features.requires_grad_()
    keep = half_of(2, 6)
    wanted = fuse_streams(image, features, keep=keep, backend=name)
    assert wanted.requires_grad
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = fuse_streams(image, features, keep=keep, backend=name)
        assert not result.requires_grad
        assert torch.equal(result, wanted)
    image, _ = streams(image_dtype=torch.int16)
    result = fuse_streams(image, features, keep=keep, backend=name)  # an image of integers has no gradient
    assert torch.autograd.grad(result.sum(), features)[0].shape == features.shape
    assert not fuse_streams(image, features.detach(), keep=keep, backend=name).requires_grad


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # and fills what torch.empty gives with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(("name", "shape"), [
    ("native", (9, 8, 7)), ("native", (60, 80, 60)),  # the larger takes memory of its own
    ("triton", (4, 3, 5))])
def test_deterministic_algorithms(name: str, shape: tuple[int, int, int]) -> None:
    image, features = (t.requires_grad_() for t in streams((1, 1, *shape), (4, 2, 3), 5))
    keep = half_of(1, 6)
    runs = []
    for _ in range(2):
        result = fuse_streams(image, features, keep=keep, backend=name, image_norm=ZScore(0.1, 2.0), channel_multiple=4)
        runs.append((result.detach(), *torch.autograd.grad(result.square().sum(), (image, features))))
    for first, second in zip(*runs, strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_recomputes_with_the_same_draw(reentrant: bool) -> None:
    image, features = streams((32, 1, 2, 3, 2), (1, 3, 2), 3)
    fusion = StreamFusion(0.5, backend="native")
    gradients = []
    for wrapped in (False, True):
        leaf = features.clone().requires_grad_()
        torch.manual_seed(0)
        result = checkpoint(fusion, image, leaf, use_reentrant=reentrant) if wrapped else fusion(image, leaf)
        torch.manual_seed(9)  # whatever is drawn between the two passes
        result.square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


class Fused(torch.utils.data.Dataset[Tensor]):
    """A data set that fuses in its worker."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        """One sample's result."""
        return fuse_streams(*streams((1, 1, 6, 7, 9), seed=index), training=False, backend="native")[0]


def test_in_the_workers_of_a_data_loader() -> None:
    batches = list(torch.utils.data.DataLoader(Fused(), batch_size=2, num_workers=1))
    assert torch.equal(torch.cat(batches), torch.stack([Fused()[i] for i in range(4)]))


@pytest.mark.parametrize("name", ["native", "reference"])
def test_calls_from_many_threads(name: str) -> None:
    cases = [streams((2, 1, 12, 13, 14), (6, 7, 5), seed=seed) for seed in range(4)]
    keep = half_of(2, 6)
    wanted = [fuse_streams(*case, keep=keep, backend=name) for case in cases]
    agreed = [0] * 4

    def work(index: int) -> None:
        for _ in range(10):
            agreed[index] += torch.equal(fuse_streams(*cases[index], keep=keep, backend=name), wanted[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert agreed == [10] * 4


@pytest.mark.parametrize("name", ["native", "reference"])
def test_arrays_come_and_go_without_a_copy(name: str) -> None:
    image, features = (t.numpy() for t in streams())
    keep = half_of(2, 6)
    wanted = definition(torch.tensor(image), torch.tensor(features), keep)
    for bring in (torch.from_dlpack, torch.from_numpy):
        given = bring(image), bring(features)
        assert given[0].data_ptr() == image.ctypes.data
        result = fuse_streams(*given, keep=keep, backend=name)
        close(result, wanted, scale=4, backend=name)
        back = np.from_dlpack(result)
        assert back.ctypes.data == result.data_ptr()
        assert np.array_equal(back, result.numpy())


@pytest.mark.parametrize("name", ["native", "reference"])
def test_subclasses_of_tensor(name: str) -> None:
    """MONAI's pipelines hand on tensors that carry an affine."""
    from monai.data import MetaTensor  # not at the top: the processes of the data-parallel test would wait for it

    image, features = streams()
    keep = half_of(2, 6)
    wanted = fuse_streams(image, features, keep=keep, backend=name)
    result = fuse_streams(MetaTensor(image), MetaTensor(features), keep=keep, backend=name)
    assert torch.equal(torch.as_tensor(result).as_subclass(Tensor), wanted)


# ---- data parallel ---------------------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """A learnable extractor, the fusion, a network: gradients flow through the op."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.extractor, self.network = nn.Conv3d(1, 3, 2, stride=2, bias=False), nn.Conv3d(4, 2, 3, padding=1)
        self.fusion = StreamFusion(RateSchedule([(0, 0.5)]), backend="native")

    def forward(self, image: Tensor, keep: Tensor | None = None) -> Tensor:
        """Scores (N, 2, D, H, W)."""
        return self.network(self.fusion(image, self.extractor(image), keep))


def _train_as_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(Tiny())
    image, keep = streams((4, 1, 6, 4, 8))[0], half_of(4, 4)
    model(image[2 * rank:2 * rank + 2], keep[2 * rank:2 * rank + 2]).square().mean().backward()
    gradients = [p.grad for p in model.parameters()]
    torch.manual_seed(100 + rank)
    drawn = fuse_streams(*streams((32, 1, 1, 1, 1), (1, 1, 1), 4), image_norm="none", feature_norm="none") != 0
    torch.save((gradients, drawn), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_train_as_a_rank, (str(tmp_path),), nprocs=2)
    (first, drawn), (second, drawn_too) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model = Tiny()
    model(streams((4, 1, 6, 4, 8))[0], half_of(4, 4)).square().mean().backward()
    for one, other, parameter in zip(first, second, model.parameters(), strict=True):
        assert torch.equal(one, other)
        # The same few hundred float32 products, summed in another order: a rounding of 6e-8 for each at the most.
        torch.testing.assert_close(one, parameter.grad, rtol=1e-5, atol=1e-5 * float(parameter.grad.abs().max()))
    assert not torch.equal(drawn, drawn_too)


# ---- wrong calls -----------------------------------------------------------------------------------------------------


HALVES = torch.full((2,), 0.5)


@pytest.mark.parametrize(("change", "message"), [
    ({"image": torch.zeros(2, 6, 7, 9)}, r"image must be \(N, Ci, D, H, W\).*\(2, 6, 7, 9\)"),
    ({"image": torch.zeros(2, 1, 1, 6, 7, 9)}, r"image must be \(N, Ci, D, H, W\).*\(2, 1, 1, 6, 7, 9\)"),
    ({"image": torch.zeros(())}, r"image must be \(N, Ci, D, H, W\).*\(\)"),
    *[({"image": torch.zeros([0 if k == axis else n for k, n in enumerate((2, 1, 6, 7, 9))])}, "image must be .* no empty axis")
      for axis in range(5)],
    *[({"features": torch.zeros([0 if k == axis else n for k, n in enumerate((2, 5, 3, 7, 4))])},
       "features must be .* no empty axis") for axis in range(5)],
    *[({"image": torch.zeros(2, 1, 6, 7, 9).to(dtype)}, f"image must be one of float32.*{dtype}")
      for dtype in (torch.int64, torch.float64, torch.bool, torch.int8, torch.complex64, torch.float8_e5m2)],
    *[({"features": torch.zeros(2, 5, 3, 7, 4).to(dtype)}, f"features must be one of float32.*{dtype}")
      for dtype in (torch.int16, torch.uint8, torch.float64, torch.complex64)],
    ({"image": np.zeros((2, 1, 6, 7, 9), np.float32)}, r"image must be a tensor .*got ndarray; torch.from_dlpack"),
    ({"features": np.zeros((2, 5, 3, 7, 4), np.float32)}, r"features must be a tensor .*got ndarray; torch.from_dlpack"),
    ({"image": None}, "image must be a tensor .*got NoneType"),
    ({"image": torch.zeros(2, 1, 6, 7, 9).to_sparse()}, "image must be a dense tensor, got torch.sparse_coo"),
    ({"features": torch.zeros(2, 5, 3, 7, 4).to_sparse()}, "features must be a dense tensor, got torch.sparse_coo"),
    ({"features": torch.zeros(2, 6, 7, 9)}, "features must be"),
    ({"features": torch.zeros(3, 5, 3, 7, 4)}, "batch size 2, got 3"),
    ({"features": torch.zeros(2, 5, 7, 7, 4)}, r"no larger than the image.*\(7, 7, 4\)"),
    ({"features": torch.zeros(2, 5, 3, 7, 4, device="meta")}, "features must be on the image's device cpu, got meta"),
    ({"image": torch.zeros(2, 1, 6, 7, 9, device="meta")}, "features must be on the image's device meta, got cpu"),
    ({"p": 1.0}, r"p must be in \[0, 1\), got 1.0"),
    ({"p": -0.1}, r"p must be in \[0, 1\)"),
    ({"p": float("nan")}, r"p must be in \[0, 1\)"),
    ({"p": (0.1, 1.0)}, r"p must be in \[0, 1\), got \(0.1, 1.0\)"),
    ({"p": (0.1, 0.2, 0.3)}, "p must be one rate or"),
    ({"p": "0.5"}, "p must be one rate or"),
    ({"p": True}, "p must be one rate or .*got True"),
    ({"p": (False, 0.5)}, "p must be one rate or"),
    ({"p": None}, "p must be one rate or .*got None"),
    ({"p": (0.6, 0.5), "mode": "stream"}, "sum is at most 1"),
    ({"p": (1.5, -0.5), "mode": "stream"}, "sum is at most 1"),
    ({"p": torch.tensor(1.0)}, r"p must be in \[0, 1\), got 1.0"),
    ({"p": torch.tensor([0.5, -0.5])}, r"p must be in \[0, 1\), got \[0.5, -0.5\]"),
    ({"p": torch.tensor([0.75, 0.5]), "mode": "stream"}, r"sum is at most 1 in stream mode, got \[0.75, 0.5\]"),
    ({"p": torch.tensor(1.25), "mode": "stream"}, "in stream mode, got 1.25"),
    ({"p": HALVES[:1]}, r"p as a tensor must be \(\) or \(2,\) float32 on cpu, got \(1,\) torch.float32 on cpu"),
    ({"p": HALVES.double()}, r"p as a tensor must be .*got \(2,\) torch.float64"),
    ({"p": HALVES.to("meta")}, r"p as a tensor must be \(\) or \(2,\) float32 on cpu, got \(2,\) torch.float32 on meta"),
    ({"p": HALVES.clone().requires_grad_()}, "p must not require a gradient"),
    ({"keep": [True] * 6}, "keep must be a tensor"),
    ({"mode": "voxel"}, "mode must be one of channel, stream"),
    ({"keep": torch.ones(2, 5, dtype=torch.bool)}, r"keep must be \(2, 6\) bool"),
    ({"keep": torch.ones(6, dtype=torch.bool)}, r"keep must be \(2, 6\) bool on cpu, got \(6,\)"),
    ({"keep": torch.ones(2, 6)}, r"keep must be \(2, 6\) bool"),
    ({"keep": torch.ones(2, 6, dtype=torch.bool, device="meta")}, r"keep must be \(2, 6\) bool on cpu, got .* on meta"),
    ({"keep": torch.ones(2, 6, dtype=torch.bool).to_sparse()}, "keep must be a dense tensor"),
    ({"image_norm": "max"}, "image_norm must be"),
    ({"feature_norm": "batch"}, "feature_norm must be one of instance"),
    ({"eps": 0.0}, "eps must be a positive"),
    ({"eps": float("inf")}, "eps must be a positive number, got inf"),
    ({"eps": "1e-5"}, "eps must be a positive number, got '1e-5'"),
    ({"dtype": torch.int16}, "dtype must be one of"),
    ({"dtype": "float32"}, "dtype must be one of"),
    ({"memory_format": torch.channels_last}, "memory_format must be"),
    ({"memory_format": torch.preserve_format}, "memory_format must be"),
    ({"channel_multiple": 0}, "channel_multiple must be"),
    ({"channel_multiple": 8.0}, "channel_multiple must be"),
    ({"backend": "cuda"}, "backend must be one of auto, native"),
])
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    image, features = streams()
    arguments: dict[str, Any] = {"image": image, "features": features} | change
    with pytest.raises(ValueError, match=message) as caught:
        fuse_streams(arguments.pop("image"), arguments.pop("features"), **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    image, features = streams()
    nested = torch.nested.nested_tensor(list(image), layout=layout)
    with pytest.raises(ValueError, match="image must be a dense tensor, got a nested one"):
        fuse_streams(nested, features)
    with pytest.raises(ValueError, match="features must be a dense tensor, got a nested one"):
        fuse_streams(image, nested)


@pytest.mark.filterwarnings("ignore:.*quantize:DeprecationWarning", "ignore:.*quantize:UserWarning")
def test_quantized_tensors_are_refused() -> None:
    image, features = streams()
    with pytest.raises(ValueError, match=r"image must be one of float32.*quint8"):
        fuse_streams(torch.quantize_per_tensor(image, 0.1, 10, torch.quint8), features)


def test_a_backend_for_another_device_says_so() -> None:
    image, features = (t.to("meta") for t in streams())
    with pytest.raises(RuntimeError, match=r"'native' cannot take this call: .* a tensor is on meta.*; what can: .*reference"):
        fuse_streams(image, features, backend="native")
    assert fuse_streams(image, features).shape == (2, 6, 6, 7, 9)


@pytest.mark.parametrize("p", [1.0, (0.1, 0.2, 0.3), True])
def test_a_module_refuses_a_wrong_rate_when_it_is_made(p: Any) -> None:
    with pytest.raises(ValueError, match="p must be"):
        StreamFusion(p)


@pytest.mark.parametrize("bounds", [(1, 1), (2, 1), (0, float("inf"))])
def test_wrong_window(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="Window needs finite lo < hi"):
        Window(*bounds)


def test_wrong_zscore() -> None:
    with pytest.raises(ValueError, match="std > 0"):
        ZScore(0, 0)
