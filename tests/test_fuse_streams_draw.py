"""What fuse_streams drops: rates, modes, schedules, seeds."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fuse_streams_cases import BACKENDS, close, definition, half_of, streams
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from dropgen_fast import StreamFusion, fuse_streams
from dropgen_fast.kernels.fuse_streams import RateSchedule, draw_scale


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
@pytest.mark.parametrize("options", [{"p": 0.0}, {"p": torch.zeros(2)}, {"training": False},
                                     {"training": False, "p": torch.tensor(0.5)}])
@pytest.mark.parametrize("backend", ["native", "reference"])
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
    image, features = streams((8, 1, 2, 3, 2), (1, 3, 2), 2)
    drawn = []
    for name in BACKENDS:
        torch.manual_seed(7)
        drawn.append(fuse_streams(image, features, p=0.5, backend=name).flatten(2).any(-1))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert 0 < drawn[0].sum() < drawn[0].numel()


@pytest.mark.parametrize(("backend", "default"), [
    ("native", torch.float64), ("native", torch.bfloat16), ("reference", torch.float64), ("triton", torch.bfloat16)])
@pytest.mark.parametrize("p", [0.3, (0.3, 0.5), torch.tensor(0.3), torch.tensor([0.3, 0.5])])
def test_default_dtype_does_not_reach_the_draw(backend: str, default: torch.dtype, p: Any) -> None:
    image, features = streams((2, 1, 2, 3, 2), (1, 3, 2), 3)
    torch.manual_seed(0)
    wanted = fuse_streams(image, features, p=p, at_least_one=True, backend=backend)
    torch.set_default_dtype(default)
    torch.manual_seed(0)
    try:
        assert torch.equal(fuse_streams(image, features, p=p, at_least_one=True, backend=backend), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


def test_draw_counts_in_training_only(backend: str) -> None:
    image, features = streams()
    result = fuse_streams(image, features, keep=half_of(2, 6), training=False, backend=backend)
    assert torch.equal(result, fuse_streams(image, features, p=0.0, backend=backend))


@pytest.mark.parametrize("mode", ["channel", "stream"])
@pytest.mark.parametrize(("numbers", "tensor"), [(0.3, torch.tensor(0.3)), ((0.25, 0.6), torch.tensor([0.25, 0.6]))])
def test_rates_in_a_tensor_are_those_rates(mode: str, numbers: float | tuple[float, float], tensor: Tensor) -> None:
    image, features = streams((64, 2, 2, 3, 2), (1, 3, 2), 3)
    results = []
    for p in (numbers, tensor):
        torch.manual_seed(3)
        results.append(fuse_streams(image, features, p=p, mode=mode))
    dropped = results[0].flatten(2).any(-1).logical_not()
    assert 0 < dropped.sum() < dropped.numel()
    # 1 - p of a p that is itself rounded to float32, and two more roundings.
    torch.testing.assert_close(results[1], results[0], rtol=4 * 2**-24, atol=0)


class Kernels(TorchDispatchMode):
    """Counts the operators that would each be a kernel on a GPU."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.count += name not in ("empty", "new_empty", "empty_like", "detach", "view", "expand", "slice", "split", "unsqueeze")
        return function(*args, **(kwargs or {}))


def kernels(call: Callable[[], Any]) -> int:
    with Kernels() as mode:
        call()
    return mode.count


def test_the_papers_draw_takes_as_few_kernels_as_dropout() -> None:
    volume, rate = torch.ones(4, 17, 2, 2, 2), torch.tensor(0.75)
    assert kernels(lambda: draw_scale(4, 1, 16, (0.75, 0.75))) == kernels(lambda: F.dropout3d(volume, 0.75, True)) == 3
    assert kernels(lambda: draw_scale(4, 1, 16, rate)) == 4  # and 1 - p
    assert kernels(lambda: draw_scale(4, 1, 16, (0.5, 0.75), training=False)) == 1


# ---- at least one channel --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rates", [(0.9, 0.9), (0.6, 0.95), torch.tensor(0.9), torch.tensor([0.95, 0.6])])
def test_at_least_one_channel(rates: Any) -> None:
    n = 20_000
    torch.manual_seed(0)
    free = draw_scale(n, 1, 2, rates)
    torch.manual_seed(0)
    scale = draw_scale(n, 1, 2, rates, at_least_one=True)
    empty = ~free.any(1)
    assert torch.equal(scale[~empty], free[~empty])
    rescued = scale[empty] != 0
    assert (rescued.sum(1) == 1).all()
    count = rescued.shape[0]
    # Any of the three with equal chance, whatever their rates; five standard deviations of a binomial.
    assert count > 5_000
    assert rescued.sum(0).tolist() == pytest.approx([count / 3] * 3, abs=5 * (count * 2 / 9) ** 0.5)
    for column in range(3):  # scaled as any survivor of that channel
        assert len(set(scale[:, column].unique().tolist()) - {0.0}) == 1


def test_at_least_one_where_a_rate_is_zero() -> None:
    torch.manual_seed(0)
    scale = draw_scale(500, 1, 2, (0.0, 0.9), at_least_one=True)
    torch.manual_seed(0)
    assert torch.equal(scale, draw_scale(500, 1, 2, (0.0, 0.9)))


def test_at_least_one_reaches_the_op() -> None:
    image, features = streams((64, 1, 2, 3, 2), (1, 3, 2), 2)
    for name in ("native", "reference"):
        torch.manual_seed(0)
        assert fuse_streams(image, features, p=0.95, at_least_one=True, image_norm="none", feature_norm="none",
                            backend=name).flatten(1).any(1).all()
    torch.manual_seed(0)
    assert not fuse_streams(image, features, p=0.95, image_norm="none", feature_norm="none").flatten(1).any(1).all()
    assert not fuse_streams(image, features, p=0.95, at_least_one=True, keep=torch.zeros(64, 3, dtype=torch.bool)).any()


def test_at_least_one_stream() -> None:
    for rates in [(0.5, 0.5), torch.tensor([0.5, 0.5])]:
        results = []
        for option in (False, True):
            torch.manual_seed(0)
            results.append(draw_scale(100, 2, 3, rates, mode="stream", at_least_one=option))
        assert torch.equal(*results)
        assert results[0].any(1).all()
    assert not draw_scale(9, 2, 0, (1.0, 0.0), mode="stream").any()
    assert draw_scale(9, 2, 0, (1.0, 0.0), mode="stream", at_least_one=True).all()


# ---- a schedule ------------------------------------------------------------------------------------------------------


def test_schedule_is_linear_between_knots_and_constant_outside() -> None:
    schedule = RateSchedule([(100, 0.0), (300, (0.5, 0.75)), (400, 0.25)])
    assert [schedule(step) for step in (0, 100, 200, 300, 350, 400, 10**9)] == [
        (0, 0), (0, 0), (0.25, 0.375), (0.5, 0.75), (0.375, 0.5), (0.25, 0.25), (0.25, 0.25)]
    assert RateSchedule([(0, 0.5)], mode="stream")(7) == (0.5, 0.0)


@pytest.mark.parametrize(("first", "last"), [((1.0, 0.0), (0.0, 1.0)), ((0.35, 0.65), (0.9, 0.1)), ((0.7, 0.3), (0.1, 0.9))])
def test_rates_between_good_knots_are_good(first: tuple[float, float], last: tuple[float, float]) -> None:
    """Though their sum may be past 1 by a rounding, in float64 and in float32."""
    fusion = StreamFusion(RateSchedule([(0, first), (997, last)], mode="stream"), mode="stream")
    image, features = streams((1, 1, 1, 1, 1), (1, 1, 1), 1)
    for step in range(998):
        fusion.set_step(step)
        assert fusion(image, features).shape == (1, 2, 1, 1, 1)


@pytest.mark.parametrize(("knots", "mode", "message"), [
    ([], "channel", r"knots must be \(step, p\) pairs, at least one, got \[\]"),
    (0.5, "channel", "knots must be .* got 0.5"),
    ([(0, 0.1, 0.2)], "channel", r"knots must be \(step, p\) pairs"),
    ([(0, 0.1), (0, 0.2)], "channel", r"increasing steps, got \[0, 0\]"),
    ([(5, 0.1), (1, 0.2)], "channel", "increasing steps"),
    ([(-1, 0.1)], "channel", "whole steps of at least 0"),
    ([(0.5, 0.1)], "channel", "whole steps of at least 0"),
    ([(0, 1.0)], "channel", r"p must be in \[0, 1\), got 1.0"),
    ([(0, (0.7, 0.7))], "stream", "sum is at most 1"),
    ([(0, True)], "channel", "p must be one rate or"),
    ([(0, torch.tensor(0.5))], "channel", "p must be one rate or"),
    ([(0, 0.5)], "voxel", "mode must be one of channel, stream, got 'voxel'"),
])
def test_wrong_schedules(knots: Any, mode: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RateSchedule(knots, mode)


def test_a_schedule_drives_a_module() -> None:
    image, features = streams((400, 1, 1, 1, 1), (1, 1, 1), 4)
    fusion = StreamFusion(RateSchedule([(0, 0.0), (10, (0.5, 0.9))]), image_norm="none", feature_norm="none")
    torch.manual_seed(0)
    for step in (0, 5, 10, 20):
        fusion.set_step(step)
        share = (fusion(image, features) == 0).flatten(1).float().mean(0)
        rates = [min(step, 10) / 10 * p for p in (0.5, 0.9, 0.9, 0.9, 0.9)]
        assert share.tolist() == pytest.approx(rates, abs=5 * 0.5 / 20)  # five standard errors of a share of 400
    fusion.set_rates(0.25)
    assert fusion.rates is not None
    assert fusion.rates.tolist() == [0.25, 0.25]
    assert fusion.eval()(image, features).all()


def test_rates_of_a_module_follow_it_and_are_never_cast() -> None:
    fusion = StreamFusion(RateSchedule([(0, 0.7)]))
    assert fusion.rates is not None
    exact, place = fusion.rates.clone(), fusion.rates.data_ptr()
    fusion.set_rates(0.1)
    fusion.set_step(3)
    assert fusion.rates.data_ptr() == place  # in place, as a captured graph needs it
    for cast in (fusion.half(), fusion.bfloat16(), fusion.to(torch.float64), torch.nn.Sequential(fusion).half()[0],
                 copy.deepcopy(fusion), pickle.loads(pickle.dumps(fusion))):
        assert cast.rates.dtype == torch.float32
        assert torch.equal(cast.rates, exact)
        assert cast.p == RateSchedule([(0, 0.7)])
    copied = copy.deepcopy(fusion)
    copied.set_rates(0.2)
    assert torch.equal(fusion.rates, exact)
    assert not fusion.state_dict()
    assert not list(fusion.parameters())
    assert fusion.to("meta").rates.device.type == "meta"
    back = fusion.to_empty(device="cpu")
    back.set_step(0)
    assert torch.equal(back.rates, exact)


def test_a_constant_rate_is_not_set() -> None:
    fusion = StreamFusion(0.5)
    assert fusion.rates is None
    assert not list(fusion.buffers())
    fusion.set_step(9)
    with pytest.raises(ValueError, match=r"p must be a RateSchedule for rates to be set, got the constant 0.5"):
        fusion.set_rates(0.25)
    scheduled = StreamFusion(RateSchedule([(0, 0.5)]))
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\), got 1.5"):
        scheduled.set_rates(1.5)
    with pytest.raises(ValueError, match="p must be a schedule for mode 'stream', got one for 'channel'"):
        StreamFusion(RateSchedule([(0, 0.5)]), mode="stream")


@pytest.mark.parametrize("mode", ["channel", "stream"])
def test_a_schedule_compiles_once(mode: str) -> None:
    image, features = streams((32, 1, 2, 3, 2), (1, 3, 2), 3)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fusion = StreamFusion(RateSchedule([(0, 0.0), (8, (0.4, 0.5))], mode), mode=mode)
    compiled = torch.compile(fusion, fullgraph=True, backend=counter)
    dropped = []
    for step in (0, 2, 4, 6, 8):
        fusion.set_step(step)
        torch.manual_seed(step)
        result = compiled(image, features)
        torch.manual_seed(step)
        torch.testing.assert_close(result, fusion(image, features))
        dropped.append(int(result.flatten(2).any(-1).logical_not().sum()))
    assert counter.frame_count == 1
    assert dropped[0] == 0
    assert dropped[1] < dropped[-1]
