"""Large results on the CPU lie in mappings that are used again: never while anything sees them, and never trusted to be zero."""

from __future__ import annotations

import mmap
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fuse_streams_cases import close, definition, half_of, streams

from dropgen_fast import fuse_streams
from dropgen_fast.kernels import memory

LAYOUTS = {"NCDHW": torch.contiguous_format, "channels-last": torch.channels_last_3d}
SHAPE = (2, 3, 70, 80, 90)


@pytest.fixture(autouse=True)
def _nothing_waits() -> Iterator[None]:
    memory.release()
    yield
    memory.release()


@pytest.mark.parametrize("memory_format", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_tensor(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    tensor = memory.empty(SHAPE, dtype, memory_format)
    assert tensor.shape == SHAPE
    assert tensor.dtype == dtype
    assert tensor.is_contiguous(memory_format=memory_format)
    tensor.fill_(3)
    assert tensor.sum(dtype=torch.float64) == 3 * tensor.numel()


def test_memory_is_used_again_when_nothing_sees_it() -> None:
    tensor = memory.empty(SHAPE, torch.float32)
    address = tensor.data_ptr()
    del tensor
    assert memory.empty(SHAPE, torch.float32).data_ptr() == address


@pytest.mark.parametrize("hold", [
    lambda t: t, lambda t: t[1, 2], lambda t: t.detach(), lambda t: t.numpy(), lambda t: t.untyped_storage(),
    lambda t: memoryview(t.numpy()), lambda t: torch.utils.dlpack.to_dlpack(t), lambda t: torch.from_dlpack(t).flatten()[-1:],
], ids=["itself", "view", "detached", "numpy", "storage", "memoryview", "capsule", "dlpack"])
def test_memory_is_not_used_again_while_anything_sees_it(hold: Any) -> None:
    tensor = memory.empty(SHAPE, torch.float32).fill_(7)
    address = tensor.data_ptr()
    held = hold(tensor)
    del tensor
    others = [memory.empty(SHAPE, torch.float32) for _ in range(3)]
    assert address not in {t.data_ptr() for t in others}
    assert len({t.data_ptr() for t in others}) == 3
    del held
    others.append(memory.empty(SHAPE, torch.float32))
    assert others[-1].data_ptr() == address


def test_memory_that_a_graph_saved_is_not_used_again() -> None:
    weight = torch.ones((), requires_grad=True)
    tensor = memory.empty(SHAPE, torch.float32).fill_(2)
    product = (weight * tensor).sum()
    del tensor
    memory.empty(SHAPE, torch.float32).zero_()
    product.backward()
    assert weight.grad == 2 * 2 * 3 * 70 * 80 * 90


def test_only_a_few_wait_and_release_lets_go() -> None:
    for side in range(70, 80):
        memory.empty((2, 3, side, 80, 90), torch.float32)
    assert len(memory._mappings) <= memory.KEPT
    kept = memory.empty(SHAPE, torch.float32)
    memory.release()
    assert len(memory._mappings) == 1
    kept.zero_()


def test_of_many_of_one_size_only_a_few_wait() -> None:
    held = [memory.empty(SHAPE, torch.float32) for _ in range(6)]
    assert len({t.data_ptr() for t in held}) == 6
    del held
    for _ in range(2):
        memory.empty(SHAPE, torch.float32)
        assert len(memory._mappings) <= memory.KEPT


def test_a_forked_child_finds_the_lock_open() -> None:
    with memory._lock:
        child = os.fork()
        if child == 0:  # no pytest in the child
            signal.alarm(20)
            memory.empty(SHAPE, torch.float32)
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_threads_never_share_memory() -> None:
    wrong = []

    def work(value: int) -> None:
        for _ in range(30):
            tensor = memory.empty(SHAPE, torch.float32).fill_(value)
            if not bool((tensor == value).all()):
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_small_tensor_is_torchs_own() -> None:
    assert memory.empty((2, 3, 4, 5, 6), torch.float32).shape == (2, 3, 4, 5, 6)
    assert not memory._mappings


@pytest.mark.parametrize("refused", ["mapping", "huge pages"])
def test_where_memory_cannot_be_had_this_way(monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no room")

    if refused == "mapping":
        monkeypatch.setattr(memory.mmap, "mmap", refuse)
    else:
        monkeypatch.delattr(memory.mmap, "MADV_HUGEPAGE")
    assert memory.empty(SHAPE, torch.float32).shape == SHAPE
    assert not memory._mappings


def test_references_are_counted_as_expected() -> None:
    items = [mmap.mmap(-1, mmap.PAGESIZE)]
    assert memory._references(items, 0) == memory.UNUSED
    tensor = torch.frombuffer(items[0], dtype=torch.uint8)
    assert memory._references(items, 0) == memory.UNUSED + 1
    del tensor
    assert memory._references(items, 0) == memory.UNUSED


@pytest.mark.parametrize("memory_format", LAYOUTS.values(), ids=LAYOUTS)
def test_what_lay_in_the_memory_does_not_show(memory_format: torch.memory_format) -> None:
    image, features = streams((2, 1, 40, 48, 64), (20, 24, 32), 5)
    wanted = definition(image, features, keep := half_of(2, 6), channel_multiple=4)
    for _ in range(2):
        result = fuse_streams(image, features, keep=keep, channel_multiple=4, memory_format=memory_format, backend="native")
        assert result.numel() * 4 > memory.LARGE
        close(result, wanted, scale=4)
        result.fill_(torch.nan)
        del result


@pytest.mark.parametrize("memory_format", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("grid", [(40, 48, 64), (20, 24, 32), (13, 20, 37)], ids=["equal", "half", "any"])
def test_a_large_result_is_the_definition(grid: tuple[int, ...], memory_format: torch.memory_format) -> None:
    """Large enough for a mapping and for many blocks of planes, which the sizes of the other tests are not."""
    image, features = streams((2, 1, 40, 48, 64), grid, 5)
    features.requires_grad_()
    image.requires_grad_()
    keep = half_of(2, 6)
    result = fuse_streams(image, features, keep=keep, memory_format=memory_format, channel_multiple=4, backend="native")
    assert result.numel() * 4 > memory.LARGE
    exact = [t.detach().double().requires_grad_() for t in (image, features)]
    wanted = definition(*exact, keep, channel_multiple=4)
    close(result.detach(), wanted.detach(), scale=4)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory_format)
    got = torch.autograd.grad(result, (image, features), grad)
    for g, w in zip(got, torch.autograd.grad(wanted, exact, grad.double()), strict=True):
        close(g, w, scale=float(w.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("feature_norm", ["instance", "unit", "none"])
@pytest.mark.parametrize("grid", [(32, 40, 48), (16, 20, 24)], ids=["equal", "half"])
def test_large_gradients_in_half_precision(grid: tuple[int, ...], feature_norm: str, dtype: torch.dtype) -> None:
    image, features = streams((2, 1, 32, 40, 48), grid, 20, dtype=dtype)
    features.requires_grad_()
    keep = half_of(2, 21)
    result = fuse_streams(image, features, keep=keep, feature_norm=feature_norm, backend="native")
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    (got,) = torch.autograd.grad(result, features, grad)
    exact = features.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(definition(image, exact, keep, feature_norm=feature_norm), exact, grad.double())
    assert got.dtype == dtype
    close(got, wanted, scale=float(wanted.abs().max()))
    if feature_norm != "unit":  # which spans the channels
        assert not got[~keep[:, 1:]].any()
