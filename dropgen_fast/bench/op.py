"""The suite "op": `fuse_streams` beside what one would write instead.

Ways that are compared, all with the same inputs and the same type of result:
  ours     `fuse_streams` as a user calls it, its own draw included
  eager    steps 1 to 4 of the method in plain torch; features are normalized on their own grid, then brought to the image's,
           which costs less than the other way round and is what the op computes
  compile  the same function under torch.compile, static shapes, no graph break
  monai    the same steps from MONAI's parts: ScaleIntensity, instance norm, UpSample, dropout

What is timed: "forward" is the call alone, with nothing to differentiate, as in training on frozen features.
"forward_read" is the call, one sum over its result and the release of the result: what a way leaves in the cache, and what its
memory costs the first reader, is counted. "backward" is the gradient to the features alone, of a forward just
recorded; "both" is that forward and backward together.

Draws: how many channels a draw keeps decides what there is to do. Before each run torch is seeded with the next of a few
seeds, chosen so that the op keeps in every draw as many channels as is to be expected at this p, spread over samples and
channels at random. The recipes work on every channel whatever they draw, so their draw makes no difference.

Bytes: the compulsory ones count each value once: the image of the samples whose image is kept, the kept channels of the
features on their own grid, and the whole result, dropped channels too. Backward: the gradient of the kept feature
channels, those features, and the whole gradient to the features. A share of bandwidth is compulsory bytes over time over
what a copy reached in the same round. Statistics need a pass of their own before values can be normalized (backward: sums
before the gradient), so what is read is read twice unless a cache holds it; that count is given beside it as `bytes_moved`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dropgen_fast.bench.machine import last_level_cache_bytes
from dropgen_fast.bench.measure import Meter, Run, Spread, Times
from dropgen_fast.errors import InputError
from dropgen_fast.kernels.fuse_streams import BACKENDS, available_backends, fuse_streams
from dropgen_fast.kernels.fuse_streams.backends import choose

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}
OTHERS = ("eager", "compile", "monai")
DRAWS = 8
SEEDS_TRIED = 4096
"""Before the nearest draw is taken for one that keeps exactly what is expected."""
MAX_INPUT_SETS = 8

Way = Callable[[Tensor, Tensor], Tensor]
"""Image (N, 1, D, H, W) float32 and features (N, Cf, d, h, w) to (N, 1 + Cf, D, H, W) in the features' dtype."""

DIRECTIONS = {"forward": ("forward", 0, 1), "forward_read": ("forward", 0, 2), "backward": ("training", 1, 2),
              "both": ("training", 0, 2)}
"""What is timed: the pass that is run and the marks between which it is timed."""


@dataclass(frozen=True)
class OpConfig:
    """Options of the suite "op"."""

    size: tuple[int, ...] = ()
    """Voxels of a side, or of the three; default 96, on a GPU 128."""
    batch: int | None = None
    """Samples; default 2, on a GPU 4."""
    feature_channels: int = 16
    """Channels of the features."""
    strides: tuple[int, ...] = ()
    """How many times coarser than the image the features are, on each axis; default 1 2 4."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Of features and result: float32, bfloat16, float16. The image is float32."""
    p: float = 0.75
    """Drop rate of every channel."""
    layout: Literal["contiguous", "channels_last"] = "contiguous"
    """Memory layout of the result."""
    backends: tuple[str, ...] = ()
    """Of the op: auto, native, triton, reference. Default auto, on a GPU also each that is there.
    The picture shows the first."""


@dataclass(frozen=True)
class Case:
    """One problem size."""

    batch: int
    size: tuple[int, int, int]
    stride: int
    feature_channels: int
    dtype: str
    layout: str
    p: float

    @property
    def coarse(self) -> tuple[int, int, int]:
        """(d, h, w) of the features."""
        d, h, w = (-(-side // self.stride) for side in self.size)
        return d, h, w

    @property
    def element_bytes(self) -> int:
        """Of a value of the features and of the result."""
        return DTYPES[self.dtype].itemsize

    @property
    def name(self) -> str:
        """As the names of rows have it."""
        return f"{self.dtype}.stride{self.stride}" + ("" if self.layout == "contiguous" else f".{self.layout}")

    def fields(self) -> dict[str, Any]:
        """As rows have it."""
        return {"n": self.batch, "size": list(self.size), "stride": self.stride, "feature_channels": self.feature_channels,
                "dtype": self.dtype, "layout": self.layout, "p": self.p}


def cases(config: OpConfig, device: torch.device) -> list[Case]:
    """The cases that a configuration asks for.

    Raises:
        InputError: an option out of its range.
    """
    cuda = device.type == "cuda"
    size = config.size or ((128,) if cuda else (96,))
    if len(size) not in (1, 3) or min(size) < 2:
        raise InputError(f"--size must be one number of voxels, or three, each at least 2, got {_words(size)}")
    d, h, w = size if len(size) == 3 else size * 3
    batch = (4 if cuda else 2) if config.batch is None else config.batch
    if batch < 1:
        raise InputError(f"--batch must be at least 1, got {batch}")
    if config.feature_channels < 1:
        raise InputError(f"--feature-channels must be at least 1, got {config.feature_channels}")
    strides = config.strides or (1, 2, 4)
    if min(strides) < 1 or max(strides) > min(size):
        raise InputError(f"--strides must be at least 1 and at most the shortest side, {min(size)}, got {_words(strides)}")
    if not config.dtypes or not set(config.dtypes) <= DTYPES.keys():
        raise InputError(f"--dtypes must be of {', '.join(DTYPES)}, got {_words(config.dtypes)}")
    if not 0 <= config.p < 1:
        raise InputError(f"--p must be in [0, 1), got {config.p}")
    return [Case(batch, (d, h, w), stride, config.feature_channels, dtype, config.layout, config.p)
            for dtype in dict.fromkeys(config.dtypes) for stride in dict.fromkeys(strides)]


def _words(values: Sequence[object]) -> str:
    return " ".join(map(str, values)) or "nothing"


def backends(config: OpConfig, device: torch.device) -> list[str]:
    """The op's backends to measure; the first is the one that the others are compared with.

    Raises:
        InputError: one that does not exist, or that cannot be had here.
    """
    reasons = available_backends()
    for name in config.backends:
        if name not in BACKENDS:
            raise InputError(f"--backends must be of {', '.join(BACKENDS)}, got {name!r}")
        if reasons.get(name):
            raise InputError(f"backend {name!r} cannot be had here: {reasons[name]}")
    if config.backends:
        return list(dict.fromkeys(config.backends))
    if device.type != "cuda":
        return ["auto"]
    return ["auto", *(name for name, why in reasons.items() if not why and name != "reference")]


def who_takes(names: Sequence[str], asked_for: bool, image: Tensor, features: Tensor) -> dict[str, str]:
    """Backend → the one that runs when it is named: which one "auto" is. One that refuses is left out.

    Raises:
        InputError: it was asked for.
    """
    found = {}
    for name in names:
        try:
            found[name] = choose(name, image, features)
        except RuntimeError as error:
            if asked_for:
                raise InputError(str(error)) from error
    return found


# ---- what is compared -----------------------------------------------------------------------------------------------


def ours(case: Case, backend: str = "auto") -> Way:
    """The op."""

    def fused(image: Tensor, features: Tensor) -> Tensor:
        return fuse_streams(image, features, p=case.p, dtype=DTYPES[case.dtype], memory_format=LAYOUTS[case.layout],
                            backend=backend)

    return fused


def eager(case: Case) -> Way:
    """Steps 1 to 4 of the method in plain torch."""

    def recipe(image: Tensor, features: Tensor) -> Tensor:
        lo, hi = image.amin((1, 2, 3, 4), keepdim=True), image.amax((1, 2, 3, 4), keepdim=True)
        image = ((image - lo) / (hi - lo)).to(features.dtype)
        features = F.instance_norm(features)
        if features.shape[2:] != image.shape[2:]:
            features = F.interpolate(features, size=image.shape[2:], mode="trilinear", align_corners=False)
        x = F.dropout3d(torch.cat([image, features], 1), case.p)
        return x.contiguous(memory_format=LAYOUTS[case.layout])

    return recipe


def compiled(case: Case) -> Way:
    """The eager recipe under torch.compile. Forget what was compiled for earlier cases first: `torch.compiler.reset`."""
    way: Way = torch.compile(eager(case), dynamic=False, fullgraph=True)
    return way


def monai(case: Case) -> Way:
    """The steps from MONAI's parts, as its users chain them."""
    from monai.networks.blocks import UpSample
    from monai.networks.layers import get_dropout_layer, get_norm_layer
    from monai.transforms import ScaleIntensity

    rescale = ScaleIntensity(minv=0.0, maxv=1.0)
    same = case.coarse == case.size
    upsample: nn.Module = nn.Identity() if same else UpSample(
        3, in_channels=case.feature_channels, out_channels=case.feature_channels, mode="nontrainable", size=case.size,
        interp_mode="linear", align_corners=False)
    norm = get_norm_layer("instance", spatial_dims=3, channels=case.feature_channels)
    dropout = get_dropout_layer(("dropout", {"p": case.p}), dropout_dim=3)

    def chain(image: Tensor, features: Tensor) -> Tensor:
        image = torch.stack([rescale(sample).as_tensor() for sample in image]).to(features.dtype)
        x: Tensor = dropout(torch.cat([image, upsample(norm(features))], 1))
        return x.contiguous(memory_format=LAYOUTS[case.layout])

    return chain


def other_ways(case: Case) -> dict[str, Way]:
    """What the op is compared with, by name."""
    return {"eager": eager(case), "compile": compiled(case), "monai": monai(case)}


# ---- inputs and draws -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Several sets of inputs, larger together than the cache, so that none is found there."""

    images: list[Tensor]
    features: list[Tensor]
    gradients: list[Tensor]

    @staticmethod
    def make(case: Case, device: torch.device) -> Inputs:
        """Normally distributed values."""
        generator = torch.Generator(device).manual_seed(0)
        cache = last_level_cache_bytes(device)

        def sets(*made: tuple[int, tuple[int, int, int], torch.dtype]) -> Iterator[list[Tensor]]:
            size = sum(case.batch * channels * math.prod(grid) * dtype.itemsize for channels, grid, dtype in made)
            count = min(MAX_INPUT_SETS, max(2, -(-2 * cache // size)))
            for channels, grid, dtype in made:
                yield [torch.randn(case.batch, channels, *grid, device=device, generator=generator).to(dtype)
                       for _ in range(count)]

        dtype = DTYPES[case.dtype]
        images, features = sets((1, case.size, torch.float32), (case.feature_channels, case.coarse, dtype))
        gradients, = sets((1 + case.feature_channels, case.size, dtype))
        return Inputs(images, features, [g.contiguous(memory_format=LAYOUTS[case.layout]) for g in gradients])

    def pair(self, number: int) -> tuple[Tensor, Tensor]:
        """Image and features of a set."""
        return self.images[number % len(self.images)], self.features[number % len(self.features)]


@dataclass(frozen=True)
class Draw:
    """A seed of torch's and what the op keeps under it."""

    seed: int
    images: int
    """Samples whose image is kept."""
    features: int
    """(sample, feature channel) pairs that are kept."""


def draws(case: Case, device: torch.device, count: int = DRAWS) -> list[Draw]:
    """Draws that keep as many channels as is to be expected: the whole numbers around it, in turn, so that their mean is it."""
    image = torch.rand(case.batch, 1, 2, 2, 2, device=device)
    features = torch.rand(case.batch, case.feature_channels, 2, 2, 2, device=device)

    def draw(seed: int) -> Draw:
        torch.manual_seed(seed)
        kept = fuse_streams(image, features, p=case.p, backend="reference").abs().amax((2, 3, 4)) > 0
        return Draw(seed, int(kept[:, 0].sum()), int(kept[:, 1:].sum()))

    expected = case.batch * (1 - case.p), case.batch * case.feature_channels * (1 - case.p)
    seeds = iter(range(SEEDS_TRIED))
    tried: list[Draw] = []
    found: list[Draw] = []
    for i in range(count):
        # Of the running total that is expected, what the i-th draw adds; the tiny term keeps halves from rounding to even.
        wanted_images, wanted_features = (round((i + 1) * e + 1e-9) - round(i * e + 1e-9) for e in expected)
        misses = [abs(d.images - wanted_images) + abs(d.features - wanted_features) for d in tried]
        while 0 not in misses and (seed := next(seeds, None)) is not None:
            tried.append(draw(seed))
            misses.append(abs(tried[-1].images - wanted_images) + abs(tried[-1].features - wanted_features))
        found.append(tried.pop(misses.index(min(misses))))
    return found


# ---- what there is to do --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What a direction of a case cannot do without."""

    compulsory_bytes: int
    bytes_moved: int
    """With the second read that statistics need, no cache helping."""
    operations: int
    """Additions, multiplications and comparisons in float32."""


def work(case: Case, draw: Draw, direction: str) -> Work:
    """Count the work of one draw; the module's docstring says what is counted.

    Operations: per kept image voxel 2 comparisons and 2 to normalize. Per kept feature value 4 for mean and variance; per
    voxel of the result 2 to normalize and scale and, where the grids differ, 7 linear interpolations of 3. Backward, per
    kept channel: where the grids differ 4 for every value that is narrowed along x, then y, then z; 12 per feature value
    for its scale, the two sums and the gradient of the normalization.
    """
    voxels, coarse = math.prod(case.size), math.prod(case.coarse)
    channels = case.batch * (1 + case.feature_channels)
    size = case.element_bytes
    same = case.size == case.coarse
    if direction == "both":
        a, b = work(case, draw, "forward"), work(case, draw, "backward")
        return Work(a.compulsory_bytes + b.compulsory_bytes, a.bytes_moved + b.bytes_moved, a.operations + b.operations)
    if direction == "backward":
        read = draw.features * (voxels + coarse) * size
        written = case.batch * case.feature_channels * coarse * size
        (d, h, w), (height, width) = case.size, case.coarse[1:]
        narrowing = 0 if same else 4 * (d * h * w + d * h * width + d * height * width)
        return Work(read + written, 2 * read + written, draw.features * (narrowing + 12 * coarse))
    read = draw.images * voxels * 4 + draw.features * coarse * size
    result = channels * voxels * size
    operations = draw.images * voxels * 4 + draw.features * (4 * coarse + (2 if same else 23) * voxels)
    if direction == "forward_read":
        return Work(read + 2 * result, 2 * read + 2 * result, operations + channels * voxels)
    return Work(read + result, 2 * read + result, operations)


# ---- measuring ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One direction of one case with one backend of the op."""

    case: Case
    direction: str
    backend: str
    taken_by: str
    """The backend that ran: which one "auto" is."""
    rounds: int
    ms: Mapping[str, Spread]
    """By way: ours and the others that could be had."""
    ratios: Mapping[str, Spread]
    """Time of each other way over ours."""
    work: Work
    """Mean over the draws."""
    gb_s: Spread
    """Compulsory bytes over time."""
    share: Spread
    """That over the copy's."""
    copy_gb_s: Spread
    peak_bytes: Mapping[str, int | None]
    """By way: of "forward" and "forward_read" that of the forward, of "backward" and "both" that of both."""


@dataclass(frozen=True)
class OpResult:
    """All that the suite measured."""

    measured: list[Measured]
    missing: dict[str, str]
    """Way → why it could not be run."""
    matrix_gflop_s: Spread


def run(config: OpConfig, meter: Meter, seconds: float, progress: Callable[[str], None] = lambda text: None) -> OpResult:
    """Measure every case; `seconds` is for the rounds of all of them, compiling and warming up come on top.

    Raises:
        InputError: an option that does not fit, or a case too large for the memory.
    """
    todo, names = cases(config, meter.device), backends(config, meter.device)
    measured: list[Measured] = []
    missing: dict[str, str] = {}
    cuda = meter.device.type == "cuda"
    with torch.random.fork_rng(devices=[meter.device] if cuda else []):
        for number, case in enumerate(todo, 1):
            progress(f"{number} of {len(todo)}: {case.dtype}, stride {case.stride}")
            torch.compiler.reset()  # else the ninth graph of the recipe would silently run uncompiled
            try:
                measured += _measure(case, names, bool(config.backends), meter, seconds / len(todo), missing)
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise InputError(f"{case.dtype}, stride {case.stride} does not fit the memory of {meter.device}; "
                                 "take a smaller --size or --batch") from error
    return OpResult(measured, missing, meter.matrix_gflop_s())


def _measure(
    case: Case, names: Sequence[str], asked_for: bool, meter: Meter, seconds: float, missing: dict[str, str],
) -> list[Measured]:
    inputs, seeds = Inputs.make(case, meter.device), draws(case, meter.device)
    takers = who_takes(names, asked_for, *inputs.pair(0))
    ways = {**{_key(name): ours(case, name) for name in takers}, **other_ways(case)}
    result: list[Measured] = []
    for kind, build in (("forward", forward_run), ("training", training_run)):
        runs = {way: build(call, inputs, seeds) for way, call in ways.items()}
        peaks = {way: _warm_up(way, run, meter, missing) for way, run in runs.items()}
        runs = {way: run for way, run in runs.items() if way not in missing}
        times = meter.interleave(runs, seconds / 2)
        for direction, (of, first, last) in DIRECTIONS.items():
            if of == kind:
                result += [_evaluate(case, direction, (name, taken_by), times, (first, last), seeds, meter, peaks)
                           for name, taken_by in takers.items()]
    order = list(DIRECTIONS)
    return sorted(result, key=lambda m: order.index(m.direction))


def _key(backend: str) -> str:
    return f"ours, {backend}"


def _warm_up(way: str, run: Run, meter: Meter, missing: dict[str, str]) -> int | None:
    """Run twice, compiling first; the second run's peak. A recipe that cannot be compiled here is left out, with the reason."""
    def ignored() -> None:
        pass

    if way in missing:
        return None
    try:
        run(0, 0, ignored)
    except RuntimeError as error:
        if way != "compile" or isinstance(error, torch.OutOfMemoryError):
            raise
        missing[way] = " ".join(str(error).split())[:200]
        return None
    return meter.peak_bytes(lambda: run(1, 1, ignored))


def forward_run(way: Way, inputs: Inputs, seeds: Sequence[Draw]) -> Run:
    """Marks: before the call, after it, after a sum over the result and its release."""

    def run(number: int, place: int, mark: Callable[[], None]) -> None:
        image, features = inputs.pair(number + place)
        torch.manual_seed(seeds[number % len(seeds)].seed)
        mark()
        out = way(image, features)
        mark()
        out.sum()  # in its own type: another would make a copy first
        del out
        mark()

    return run


def training_run(way: Way, inputs: Inputs, seeds: Sequence[Draw]) -> Run:
    """Marks: before the call, after it (recorded for autograd), after the gradient to the features."""

    def run(number: int, place: int, mark: Callable[[], None]) -> None:
        image, features = inputs.pair(number + place)
        features = features.detach().requires_grad_()
        gradient = inputs.gradients[(number + place) % len(inputs.gradients)]
        torch.manual_seed(seeds[number % len(seeds)].seed)
        mark()
        out = way(image, features)
        mark()
        torch.autograd.grad(out, features, gradient)
        mark()

    return run


def _evaluate(
    case: Case, direction: str, backend: tuple[str, str], times: Times, marks: tuple[int, int], seeds: Sequence[Draw],
    meter: Meter, peaks: Mapping[str, int | None],
) -> Measured:
    mine = _key(backend[0])
    mine_ms = times.ms(mine, *marks)
    others_ms = {way: times.ms(way, *marks) for way in OTHERS if way in times}
    works = [work(case, seeds[number % len(seeds)], direction) for number in range(times.rounds)]
    mean = Work(*(round(sum(values) / len(works)) for values in
                  zip(*((w.compulsory_bytes, w.bytes_moved, w.operations) for w in works), strict=True)))
    copy_gb_s = meter.copy_gb_s(times)
    gb_s = [w.compulsory_bytes / ms / 1e6 for w, ms in zip(works, mine_ms, strict=True)]
    return Measured(
        case, direction, *backend, times.rounds,
        ms={way: Spread.of(values) for way, values in {"ours": mine_ms, **others_ms}.items()},
        ratios={way: Spread.of(b / a for a, b in zip(mine_ms, values, strict=True)) for way, values in others_ms.items()},
        work=mean, gb_s=Spread.of(gb_s), share=Spread.of(a / b for a, b in zip(gb_s, copy_gb_s, strict=True)),
        copy_gb_s=Spread.of(copy_gb_s),
        peak_bytes={"ours": peaks[mine], **{way: peaks[way] for way in others_ms}})
