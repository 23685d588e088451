"""The bench: what it counts, what it claims, what it writes. Tiny sizes; no speed is asserted."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from matplotlib.image import imread

from dropgen_fast.bench import machine, measure, op, report
from dropgen_fast.bench import run as bench_run
from dropgen_fast.bench.measure import COPY, Meter, Spread, Times
from dropgen_fast.bench.op import DIRECTIONS, OTHERS, Case, Draw, Measured, OpResult, Work, work
from dropgen_fast.cli import COMMANDS
from dropgen_fast.cli import run as run_cli
from dropgen_fast.kernels.fuse_streams import fuse_streams
from dropgen_fast.kernels.fuse_streams.backends import choose

CPU = torch.device("cpu")
CASE = Case(batch=2, size=(8, 6, 10), stride=2, feature_channels=3, dtype="bfloat16", layout="contiguous", p=0.75)
TINY = ["--suite", "op", "--device", "cpu", "--threads", "1", "--size", "12", "--batch", "1", "--feature-channels", "4"]
FACTS = {"device": "AMD EPYC 9999 96-Core Processor", "threads": 2, "load_average": 0.1, "dropgen_fast": "0.1.0",
         "torch": "2.13.0+cu130", "triton": "3.9.0", "monai": "1.6.1", "cuda": "13.0", "driver": "580.00.00",
         "commit": "0123456789abcdef-dirty", "date": "2026-01-01T00:00:00+00:00"}


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """A copy and a matrix that take no time."""
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})
    monkeypatch.setattr(measure, "MATRIX_SIDE", {"cpu": 32, "cuda": 32})


def no_compiler(case):
    def way(image, features):
        raise RuntimeError("no working\ncompiler here")
    return way


@pytest.fixture
def quick(monkeypatch):
    """Nothing is compiled; torch.compile is told to be missing instead."""
    monkeypatch.setattr(op, "compiled", no_compiler)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_compiles_measures_and_writes(tmp_path, capsys):
    rows_file, picture = tmp_path / "rows.jsonl", tmp_path / "roofline.png"
    arguments = [*TINY, "--strides", "2", "--dtypes", "float32", "--rounds", "1"]
    assert run_cli("bench", bench_run.main, [*arguments, "--json", str(rows_file), "--picture", str(picture)]) == 0
    screen = capsys.readouterr().out
    assert "could not be run" not in screen
    rows = {row["name"]: row for row in read(rows_file)}
    assert len(rows) == len(read(rows_file))
    for row in rows.values():
        assert {"name", "value", "unit", "low", "high", "device", "commit", "torch", "triton", "threads", "date", "driver",
                "cuda", "cpu", "dropgen_fast"} <= row.keys()
        assert 0 < row["low"] <= row["value"] <= row["high"] < math.inf
        assert row["threads"] == 1
    for direction in DIRECTIONS:
        def of(what, direction=direction):
            return rows[f"op.{direction}.{what}.float32.stride2"]

        share = of("share_of_bandwidth")
        assert share["case"] == {"n": 1, "size": [12, 12, 12], "stride": 2, "feature_channels": 4, "dtype": "float32",
                                 "layout": "contiguous", "p": 0.75, "direction": direction, "backend": "auto"}
        assert (share["rounds"], share["taken_by"]) == (1, choose("auto", torch.zeros(1, 1, 2, 2, 2), None))
        assert share["bytes_moved"] >= share["bytes"] > 0
        # One round: every spread is one number, and the rows must agree with each other.
        assert share["value"] == pytest.approx(share["bytes"] / of("ms")["value"] / 1e6 / share["copy_gb_s"])
        assert of("gb_s")["value"] == pytest.approx(share["bytes"] / of("ms")["value"] / 1e6)
        for way in OTHERS:
            ratio = of(f"x_{way}")
            assert ratio["value"] == pytest.approx(of(f"ms_{way}")["value"] / of("ms")["value"])
            assert rows[f"op.{direction}.x_{way}"]["value"] == pytest.approx(ratio["value"])
            assert rows[f"op.{direction}.x_{way}"]["cases"] == ["float32.stride2"]
        assert rows[f"op.{direction}.share_of_bandwidth"]["value"] == pytest.approx(share["value"])
    forward, read_too = (rows[f"op.{d}.ms.float32.stride2"]["value"] for d in ("forward", "forward_read"))
    assert forward < read_too
    assert rows["op.backward.ms.float32.stride2"]["value"] < rows["op.both.ms.float32.stride2"]["value"]
    pixels = imread(picture)
    assert pixels.shape[1] > 1000
    assert pixels.std() > 0.05


def test_rows_are_appended_and_a_missing_compiler_is_told(quick, tmp_path, capsys):
    rows_file = tmp_path / "rows.jsonl"
    arguments = [*TINY, "--strides", "1", "3", "--rounds", "2", "--dtypes", "bfloat16", "--layout", "channels_last",
                 "--backends", "auto", "reference", "--json", str(rows_file)]
    assert run_cli("bench", bench_run.main, arguments) == 0
    screen = capsys.readouterr().out
    assert "torch.compile could not be run: no working compiler here" in screen
    first = rows_file.read_bytes()
    assert run_cli("bench", bench_run.main, arguments) == 0
    assert rows_file.read_bytes().startswith(first)
    assert len(read(rows_file)) == 2 * len(first.splitlines())
    names = {row["name"] for row in read(rows_file)}
    assert len(names) == len(first.splitlines())
    assert {"op.forward.x_eager.bfloat16.stride3.channels_last", "op.forward.x_eager.bfloat16.stride3.channels_last.reference",
            "op.backward.x_monai.channels_last.reference"} <= names
    assert not any("compile" in name for name in names)


def test_quick_is_small_unless_said_otherwise(quick, monkeypatch):
    seen = []
    monkeypatch.setattr(bench_run, "measure_op", lambda options, *rest: seen.append(options) or made_up())
    threads = torch.get_num_threads()
    for extra in ([], ["--size", "16"], ["--strides", "1", "4"]):
        assert bench_run.main(["--suite", "op", "--device", "cpu", "--quick", "--threads", str(threads + 1), *extra]) == 0
        assert torch.get_num_threads() == threads
    assert [(options.size, options.strides) for options in seen] == [((32,), (2,)), ((16,), (2,)), ((32,), (1, 4))]


@pytest.mark.parametrize(("bad", "words"), [
    (["--suite", "steps"], "--suite must be one of overview, op, extractor, loading, step, all, got 'steps'"),
    (["--rounds", "0"], "--rounds must be at least 1, got 0"),
    (["--threads", "-1"], "--threads must be at least 1"),
    (["--seconds", "0"], "--seconds must be above 0"),
    (["--size", "8", "8"], "--size must be one number of voxels, or three, each at least 2, got 8 8"),
    (["--size", "1"], "--size must be"),
    (["--batch", "0"], "--batch must be at least 1, got 0"),
    (["--feature-channels", "0"], "--feature-channels must be at least 1"),
    (["--size", "8", "--strides", "2", "9"], "--strides must be at least 1 and at most the shortest side, 8, got 2 9"),
    (["--dtypes", "int8"], "--dtypes must be of float32, bfloat16, float16, got int8"),
    (["--p", "1"], "--p must be in [0, 1), got 1.0"),
    (["--backends", "fast"], "--backends must be of"),
    (["--device", "tpu"], "device must be"),
    (["--json", "no/such/folder/rows.jsonl"], "--json must be a file in a folder that is there, got no/such/folder"),
    (["--picture", "."], "--picture must be a file"),
])
def test_wrong_input_is_one_line_before_anything_is_measured(bad, words, monkeypatch, capsys):
    monkeypatch.setattr(op, "_measure", lambda *_: pytest.fail("measured"))
    assert run_cli("bench", bench_run.main, ["--suite", "op", "--device", "cpu", *bad]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_backend_that_is_not_here_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(op, "available_backends", lambda: {"native": "no library was built", "triton": "", "reference": ""})
    assert run_cli("bench", bench_run.main, ["--suite", "op", "--device", "cpu", "--backends", "native"]) == 2
    assert "backend 'native' cannot be had here: no library was built" in capsys.readouterr().err


def test_a_backend_that_refuses_the_case_is_left_out_unless_asked_for(monkeypatch, capsys):
    def refuse(backend, image, features):
        if backend == "auto":
            return "reference"
        raise RuntimeError(f"backend {backend!r} cannot take this call: it runs on the GPU")

    monkeypatch.setattr(op, "choose", refuse)
    assert run_cli("bench", bench_run.main, [*TINY, "--strides", "2", "--backends", "triton"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("'triton' cannot take this call: it runs on the GPU")
    monkeypatch.setattr(op, "available_backends", lambda: {"native": "not built", "triton": "", "reference": ""})
    assert op.backends(op.OpConfig(), CPU) == ["auto"]
    on_a_gpu = op.backends(op.OpConfig(), torch.device("cuda"))
    assert on_a_gpu == ["auto", "triton"]
    assert op.who_takes(on_a_gpu, False, torch.zeros(1), torch.zeros(1)) == {"auto": "reference"}


def test_sizes_follow_the_device():
    for device, batch, side in (("cpu", 2, 96), ("cuda", 4, 128)):
        found = op.cases(op.OpConfig(), torch.device(device))
        assert {(case.batch, case.size) for case in found} == {(batch, (side,) * 3)}
        assert [(case.dtype, case.stride) for case in found] == [(d, s) for d in ("float32", "bfloat16") for s in (1, 2, 4)]
    assert op.cases(op.OpConfig(size=(4, 6, 8), strides=(4,)), CPU)[0].size == (4, 6, 8)


def test_the_command_is_listed(capsys):
    assert "bench" in COMMANDS
    with pytest.raises(SystemExit) as stop:
        bench_run.main(["--help"])
    assert stop.value.code == 0
    assert "--feature-channels" in capsys.readouterr().out


# ---- what is counted ------------------------------------------------------------------------------------------------


def test_bytes_of_a_case_counted_by_hand():
    # 2 samples; 8·6·10 = 480 voxels; features on 4·3·5 = 60; float32 image, bfloat16 features and result of 4 channels.
    draw = Draw(seed=0, images=1, features=2)
    image, features, result = 1 * 480 * 4, 2 * 60 * 2, 2 * 4 * 480 * 2
    forward = work(CASE, draw, "forward")
    assert forward.compulsory_bytes == image + features + result == 9840
    assert forward.bytes_moved == 2 * image + 2 * features + result == 12000
    assert work(CASE, draw, "forward_read").compulsory_bytes == 9840 + 7680
    gradient, written = 2 * 480 * 2, 2 * 3 * 60 * 2
    backward = work(CASE, draw, "backward")
    assert backward.compulsory_bytes == gradient + features + written == 2880
    assert backward.bytes_moved == 2 * gradient + 2 * features + written
    both = work(CASE, draw, "both")
    assert both == Work(9840 + 2880, 12000 + backward.bytes_moved, forward.operations + backward.operations)
    # Operations: image 4 a voxel; features 4 for statistics, 21 for interpolation and 2 to normalize.
    assert forward.operations == 480 * 4 + 2 * (60 * 4 + 480 * 23)
    assert work(replace(CASE, stride=1), draw, "forward").operations == 480 * 4 + 2 * (480 * 4 + 480 * 2)
    assert backward.operations == 2 * (4 * (480 + 8 * 6 * 5 + 8 * 3 * 5) + 12 * 60)


def test_nothing_kept_leaves_the_result():
    nothing = Draw(seed=0, images=0, features=0)
    assert work(CASE, nothing, "forward").compulsory_bytes == 2 * 4 * 480 * 2
    assert work(CASE, nothing, "backward").compulsory_bytes == 2 * 3 * 60 * 2


def test_the_coarse_grid_rounds_up():
    assert replace(CASE, size=(9, 8, 7), stride=4).coarse == (3, 2, 2)


@pytest.mark.parametrize(("p", "features"), [(0.75, 5), (0.5, 5), (0.0, 5), (0.9, 16)])
def test_draws_are_what_the_op_keeps_and_their_mean_is_what_is_expected(p, features):
    case = replace(CASE, p=p, feature_channels=features, dtype="float32")
    chosen = op.draws(case, CPU)
    assert len({draw.seed for draw in chosen}) == op.DRAWS
    assert chosen == op.draws(case, CPU)
    image = torch.randn(2, 1, *case.size)
    values = torch.randn(2, features, *case.coarse)
    for draw in chosen:
        torch.manual_seed(draw.seed)
        kept = op.ours(case)(image, values).abs().amax((2, 3, 4)) > 0
        assert (int(kept[:, 0].sum()), int(kept[:, 1:].sum())) == (draw.images, draw.features)
    mean = sum(draw.features for draw in chosen) / op.DRAWS
    assert abs(mean - 2 * features * (1 - p)) <= 0.5 / op.DRAWS + 1e-9
    assert abs(sum(draw.images for draw in chosen) / op.DRAWS - 2 * (1 - p)) <= 0.5 / op.DRAWS + 1e-9


@pytest.mark.parametrize("layout", op.LAYOUTS)
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-5), ("bfloat16", 2**-7)])  # a few roundings of each kind
def test_all_ways_compute_the_same(stride, dtype, tolerance, layout):
    case = replace(CASE, stride=stride, dtype=dtype, layout=layout, p=0.0)
    inputs = op.Inputs.make(case, CPU)
    assert len(inputs.images) == len(inputs.features) == op.MAX_INPUT_SETS
    image, features = inputs.pair(1)
    assert features.shape == (2, 3, *case.coarse)
    expected = fuse_streams(image, features.float(), p=0.0, backend="reference")
    for name, way in {"ours": op.ours(case), "eager": op.eager(case), "monai": op.monai(case)}.items():
        result = way(image, features)
        assert result.dtype == op.DTYPES[dtype], name
        assert result.is_contiguous(memory_format=op.LAYOUTS[layout]), name
        torch.testing.assert_close(result.float(), expected, rtol=tolerance, atol=tolerance)


def test_inputs_rotate():
    inputs = op.Inputs.make(CASE, CPU)
    assert not torch.equal(inputs.pair(0)[0], inputs.pair(1)[0])
    assert torch.equal(inputs.pair(0)[1], inputs.pair(len(inputs.features))[1])


# ---- how it is measured ---------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_and_the_order_turns():
    order = []

    def way(name):
        def run(number, place, mark):
            order.append((number, place, name))
            mark()
            mark()
        return run

    times = Meter(CPU, rounds=3).interleave({"a": way("a"), "b": way("b")}, seconds=0)
    assert times.rounds == 3
    assert order == [(0, 0, "a"), (0, 1, "b"), (1, 0, "b"), (1, 2, "a"), (2, 1, "a"), (2, 2, "b")]  # the copy is third
    assert "a" in times
    assert len(times.ms(COPY, 0, 1)) == 3


def test_rounds_end_with_the_time_but_not_before_the_least():
    def run(number, place, mark):
        mark()
        mark()

    assert Meter(CPU).interleave({"a": run}, seconds=0).rounds == measure.MIN_ROUNDS
    assert measure.MIN_ROUNDS < Meter(CPU).interleave({"a": run}, seconds=5).rounds == measure.MAX_ROUNDS


def test_ratios_are_taken_within_rounds():
    # The machine is three times slower in the second round: the ratio of 2 and the share do not notice.
    times = Times({"ours, auto": [[0, 1.0], [0, 3.0], [0, 1.0]], "eager": [[0, 2.0], [0, 6.0], [0, 2.0]],
                   COPY: [[0, 0.5], [0, 1.5], [0, 0.5]]})
    meter = Meter(CPU)
    seeds = [Draw(0, 1, 2)]
    found = op._evaluate(CASE, "forward", ("auto", "native"), times, (0, 1), seeds, meter, {"ours, auto": 1, "eager": None})
    assert found.ratios == {"eager": Spread(2, 2, 2)}
    share = work(CASE, seeds[0], "forward").compulsory_bytes / (2 * meter.copy_bytes) / 2
    assert found.share.low == pytest.approx(share)
    assert found.share.high == pytest.approx(share)
    assert found.peak_bytes == {"ours": 1, "eager": None}


def test_spread_is_median_and_quartiles():
    assert Spread.of([5, 1, 3, 2, 4]) == Spread(3, 2, 4)
    mean = Spread.geometric_mean([Spread(2, 1, 4), Spread(8, 4, 16)])
    assert (mean.median, mean.low, mean.high) == pytest.approx((4, 2, 8))


@pytest.mark.parametrize(("spread", "verdict", "text"), [
    (Spread(2, 1.8, 2.2), "claim", "2.00 (1.80-2.20)"), (Spread(25, 24, 26), "claim", "25.0 (24.0-26.0)"),
    (Spread(0.5, 0.45, 0.6), "claim", "0.50 (0.45-0.60)"), (Spread(1.05, 0.9, 1.3), "one", "≈ 1 (0.90-1.30)"),
    (Spread(1.5, 1, 2), "one", "≈ 1 (1.00-2.00)"), (Spread(1.5, 1.1, 1.8), "unclear", "unclear (1.10-1.80)"),
    (Spread(0.9, 0.7, 0.95), "unclear", "unclear (0.70-0.95)")])
def test_a_ratio_is_claimed_only_where_its_spread_allows(spread, verdict, text):
    assert spread.verdict() == verdict
    assert report.ratio_text(spread) == text
    assert report.make_row("op.forward.x_eager", spread, "ratio", {})["claim"] == (verdict == "claim")


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel does not let the peak be reset")
def test_peak_memory_is_what_a_call_holds_at_most():
    """In a process of its own: in one that has run other tests the allocator may have kept as much from them."""
    program = """
import torch
from dropgen_fast.bench.measure import Meter
meter, size = Meter(torch.device("cpu")), 64 << 20
for call in (lambda: torch.ones(size, dtype=torch.uint8), lambda: torch.ones(size, dtype=torch.uint8).neg(), lambda: None):
    print(meter.peak_bytes(call) / size)
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    one, two, none = map(float, told.split())
    assert (one, two) == pytest.approx((1, 2), rel=0.1)
    assert none < 1 / 16


def test_peak_memory_is_unknown_where_the_kernel_does_not_tell(monkeypatch):
    called = []
    monkeypatch.setattr(measure, "_status_bytes", lambda field: (_ for _ in ()).throw(OSError("no such field")))
    assert Meter(CPU).peak_bytes(lambda: called.append(1)) is None
    assert called == [1]


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_commit_is_of_this_checkout_or_none(tmp_path):
    def git(*arguments):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@e", *arguments], check=True,
                       capture_output=True)

    assert machine.commit(tmp_path) is None
    git("init", "-q")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("1")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = machine.commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "rows.jsonl").write_text("{}")  # what was measured earlier does not change what is measured
    assert machine.commit(tmp_path) == clean
    (tmp_path / "kernels" / "a.py").write_text("2")
    assert machine.commit(tmp_path) == f"{clean}-dirty"
    assert machine.commit(tmp_path / "kernels") is None  # an environment inside someone's checkout


def test_the_machine_is_described():
    facts = machine.describe(CPU)
    assert facts["threads"] == torch.get_num_threads()
    assert facts["torch"] == torch.__version__
    assert facts["device"] == facts["cpu"] != ""
    assert facts["driver"] is None
    assert machine.last_level_cache_bytes(CPU) >= 1 << 20


# ---- what is shown --------------------------------------------------------------------------------------------------


def made_up(backends=("auto",)):
    """Results that no machine measured: every case of the default run, the second dtype twice as fast against eager."""
    measured = []
    for backend in backends:
        for case in op.cases(op.OpConfig(), CPU):
            for direction in DIRECTIONS:
                ms = {way: Spread(value, value * 0.99, value * 1.01) for way, value in
                      {"ours": 123.4, "eager": 246.8 * (2 if case.dtype == "bfloat16" else 1), "compile": 123.4,
                       "monai": 12340.0}.items()}
                ratios = {way: Spread(*(v / 123.4 for v in (ms[way].median, ms[way].low, ms[way].high))) for way in OTHERS}
                measured.append(Measured(
                    case, direction, backend, "native" if backend == "auto" else backend, 5, ms, ratios,
                    work(case, Draw(0, 1, 8), direction), Spread(20, 19, 21), Spread(0.5, 0.475, 0.525), Spread(40, 39, 41),
                    dict.fromkeys(ms, 1000)))
    return OpResult(measured, {}, Spread(200, 190, 210))


def test_a_headline_is_the_geometric_mean_of_its_cases():
    rows = {row["name"]: row for row in report.rows(made_up(("auto", "triton")), FACTS)}
    headline = rows["op.forward.x_eager"]
    assert headline["value"] == pytest.approx(math.sqrt(2 * 4))
    assert headline["low"] == pytest.approx(0.99 * math.sqrt(2 * 4))
    assert headline["claim"]
    assert headline["cases"] == [f"{dtype}.stride{stride}" for dtype in ("float32", "bfloat16") for stride in (1, 2, 4)]
    assert not rows["op.forward.x_compile"]["claim"]
    assert rows["op.backward.x_eager.triton"]["backend"] == "triton"
    assert rows["op.both.share_of_bandwidth"]["value"] == pytest.approx(0.5)
    assert rows["device.copy_gb_s"]["value"] == pytest.approx(40)
    assert rows["op.forward.ms_monai.float32.stride4"]["peak_bytes"] == 1000


def test_the_screen_fits_and_says_what_counts():
    text = report.screen(made_up(("auto", "reference")), FACTS)
    assert max(map(len, text.splitlines())) <= 120
    for words in (FACTS["device"], "580.00.00", "0123456789ab-dirty", "40.0 (40.0-40.0) GB/s", "N = 2, 96×96×96 voxels",
                  "auto is native", "Median of 5 rounds",
                  "≈ 1 (0.99-1.01)", "100 (99.0-101)", "50 % (48-52)", *report.TITLES.values()):
        assert words in text, words
    forward = text.split("\n\n")[1].splitlines()
    assert len(forward) == 1 + 2 * (6 + 1)
    assert forward[1].startswith("float32, stride 1, auto")


def test_the_picture_is_a_png_also_without_a_compiler():
    result = made_up()
    bare = OpResult([replace(m, ms={w: s for w, s in m.ms.items() if w != "compile"}) for m in result.measured], {},
                    result.matrix_gflop_s)
    for each in (result, bare):
        png = report.picture(each, FACTS)
        assert png.startswith(b"\x89PNG")
        assert imread(io.BytesIO(png)).std() > 0.05
