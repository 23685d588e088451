"""The scaling benchmark: its points, what does not fit, its rows and picture; the model on paper and the page that shows it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from monai.data.utils import dense_patch_slices

from dropgen_fast import checkpoint
from dropgen_fast.bench.measure import Spread
from dropgen_fast.bench.scaling import cluster, growth, parts, report, sweep
from dropgen_fast.bench.scaling.cases import AXES, Base, Limits, Point
from dropgen_fast.bench.scaling.child import in_child
from dropgen_fast.bench.scaling.cluster import Cluster, Layer
from dropgen_fast.cli import run as run_cli
from dropgen_fast.data.bricks import BRICK
from dropgen_fast.features import load_extractor
from dropgen_fast.networks import UNet

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling as command  # noqa: E402  # benchmarks/scaling.py

CPU = torch.device("cpu")
TINY = Base(patch=16, batch=1, channels=2, classes=3, network_options=("base_channels=2", "downsamplings=2"), precision="fp32",
            compile=False)
ROOMY = Limits(memory_bytes=8 << 30, step_s=60.0)


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_measures_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "rows.jsonl", tmp_path / "scaling.png"
    options = ["--quick", "--device", "cpu", "--rounds", "2", "--parts", "patch", "processes", "gradients", "checkpoint",
               "--processes", "2", "--patch", "16", "--scratch", str(tmp_path), "--json", str(file), "--picture", str(picture)]
    assert run_cli("scaling", command.main, options) == 0, capsys.readouterr().err
    rows = {row["name"]: row for row in map(json.loads, file.read_text().splitlines())}
    for row in rows.values():
        assert {"device", "threads", "commit", "date", "case"} <= row.keys()
        assert row["low"] <= row["value"] <= row["high"]
    for name in ("patch.16", "processes.2"):
        assert rows[f"scaling.{name}.ms"]["value"] > 0
        assert rows[f"scaling.{name}.peak_gib"]["value"] > 0
    # What a ring sends is what the loopback interface saw, and bookkeeping of a few KB for each message. Others may use it
    # too: the lower end of several counts is taken.
    sent = cluster.ring_bytes(cluster.FLOAT_BYTES * cluster.parameters(command.base_of(command.resolved(
        command.ScalingConfig(quick=True)), CPU).network()), 2)
    counted = rows["scaling.processes.2.bytes_over_model"]["low"] * sent
    assert sent <= counted < sent + 64 * 1024
    assert rows["scaling.processes.2.exchange_gb_s"]["value"] > 0
    assert [0 < rows[f"scaling.gradients.ready_{n}"]["value"] <= 1 for n in (25, 50, 75, 95)] == [True] * 4
    assert rows["scaling.checkpoint.bytes"]["value"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "scaling.png"}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_told_and_the_rest_is_timed() -> None:
    """A patch whose first layer alone is larger than what is allowed."""
    limits = Limits(memory_bytes=400 << 20, step_s=3600.0)  # on a busy machine, too, the large patch is to be tried
    points = sweep.sweep("patch", (16, 192), TINY, CPU, 1, limits, lambda text: None)
    assert [point.problem for point in points] == ["", "does not fit the memory"]
    assert len(points[0].ms) == 1
    assert points[1].ms == ()
    result = report.Result(TINY, {"patch": points})
    row = next(row for row in report.rows(result, {}) if row["name"] == "scaling.patch.192.ms")
    assert (row["value"], row["problem"]) == (None, "does not fit the memory")
    assert "does not fit the memory" in report.screen(result, {"device": "d", "threads": 1, "torch": "t"})
    assert report.picture(report.rows(result, {})).startswith(b"\x89PNG")


def test_a_step_over_the_time_is_told_and_a_longer_one_is_not_tried() -> None:
    limits = dataclasses.replace(ROOMY, step_s=1e-6)
    one, two = sweep.sweep("batch", (1, 2), TINY, CPU, 1, limits, lambda text: None)
    assert one.problem.startswith("a step takes")
    assert one.peak_bytes is not None
    assert two.problem.startswith("not tried: by the point before")
    assert (one.ms, two.ms) == ((), ())


def test_a_process_that_dies_or_dawdles_is_a_reason() -> None:
    assert in_child(math.sqrt, (9.0,), 60) == 3.0
    assert in_child(os._exit, (3,), 60) == "the process ended with status 3"
    killed = in_child(signal.raise_signal, (signal.SIGKILL,), 60)
    assert killed == "the process was ended by SIGKILL, as for want of memory"
    begun = time.monotonic()
    assert in_child(time.sleep, (60,), 0.2) == "not done after 0 s"
    assert time.monotonic() - begun < 50
    with pytest.raises(RuntimeError, match="ValueError"):
        in_child(math.sqrt, (-1.0,), 60)


@pytest.mark.parametrize(("words", "message"), [
    (["--patch", "32", "16"], "--patch must be rising whole numbers of at least 1"),
    (["--classes", "1", "2"], "--classes must be rising whole numbers of at least 2"),
    (["--base-classes", "1"], "--base-classes must be at least 2"),
    (["--rounds", "0"], "--rounds must be above 0, got 0"),
    (["--scratch", "/nowhere"], "--scratch must be a folder that is there"),
    (["--json", "/nowhere/rows"], "--json must be a file in a folder that is there"),
    (["--parts", "patch", "--patch", "16", "20", "--network-options", "downsamplings=3"],
     "patch 20: a U-Net of 3 downsamplings"),
    (["--parts", "checkpoint", "--base-patch", "18"], "patch 18: a U-Net of 2 downsamplings"),
    (["--network-options", "depth=3"], "patch 16: "),
    (["--model", "--cluster.links-per-node", "0"], "--cluster.links-per-node must be above 0, got 0"),
    (["--model", "--cluster.gpus", "8", "0"], "--cluster.gpus must be above 0, got (8, 0)"),
])
def test_wrong_options_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("scaling", command.main, ["--quick", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_parts_that_were_measured_are_kept_where_a_later_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(parts, "checkpoint_values", fails)
    monkeypatch.setattr(parts, "ready_shares", lambda *arguments: {"ready_25": (Spread(0.5, 0.5, 0.5), "share of the step")})
    file = tmp_path / "rows.jsonl"
    with pytest.raises(OSError, match="no space left"):
        command.main(["--quick", "--device", "cpu", "--parts", "gradients", "checkpoint", "--json", str(file)])
    assert [json.loads(line)["name"] for line in file.read_text().splitlines()] == ["scaling.gradients.ready_25"]


def test_points_that_do_not_fit_together_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "in_child", lambda function, *rest: (
        "does not fit the memory" if function is sweep._timed else (1 << 20, 0.1)))
    points = sweep.sweep("batch", (1, 2), TINY, CPU, 1, ROOMY, lambda text: None)
    assert [point.problem for point in points] == ["not timed: together with the others does not fit the memory"] * 2
    assert report.rows(report.Result(TINY, {"batch": points}), {})[0]["problem"] == points[0].problem


@pytest.mark.parametrize("channels", [0, 3])
def test_a_step_of_so_many_channels(channels: int) -> None:
    marks: list[None] = []
    step = sweep.step_of(dataclasses.replace(TINY, channels=channels), CPU)
    step(0, 0, lambda: marks.append(None))
    assert len(marks) == 2
    with torch.device("meta"):
        first = next(TINY.at("channels", channels).base.network().parameters())
    assert first.shape[1] == 1 + channels


def test_axes_change_one_thing() -> None:
    assert TINY.at("patch", 32).base == dataclasses.replace(TINY, patch=32)
    assert TINY.at("processes", 4).base == TINY
    assert [TINY.at(axis, 4).size for axis in AXES] == [64, 4, 5, 4, 4]
    assert [dataclasses.replace(TINY, channels=n).method for n in (0, 5)] == ["erm", "dropgen"]
    extractor = load_extractor(TINY.step().extractor)
    assert extractor.channels == 2
    assert extractor(torch.rand(1, 1, 4, 4, 4)).shape == (1, 2, 4, 4, 4)


def point(value: int, *ms: float, peak: int | None = None, problem: str = "") -> Point:
    return Point(TINY.at("batch", value), ms, peak, problem)


def test_exponents_are_taken_within_rounds() -> None:
    """The second round is ten times as slow for all; a point that does not fit counts for nothing."""
    points = [point(1, 1.0, 10.0, peak=4), point(2, 2.0, 20.0, peak=4), point(4, 4.0, 40.0), point(8, problem="no")]
    slopes = growth.exponents(points)
    assert (slopes["ms"].low, slopes["ms"].high) == pytest.approx((1, 1))
    assert slopes["gib"].median == pytest.approx(0)
    assert growth.exponents(points[:1]) == {}
    ratios = growth.over_model(points, TINY)
    assert {value: spread.median for value, spread in ratios.items()} == pytest.approx({1: 1, 2: 1, 4: 1})
    assert growth.over_model(points[1:], TINY) == {}  # the base was not measured


def test_what_processes_measure_is_held_against_the_model() -> None:
    found = {"step_ms": [30.0, 30.0], "alone_ms": [20.0, 20.0], "all_reduce_ms": [5.0, 5.0], "exchange_gb_s": [2.0, 2.0],
             "bytes": 8_000_000, "sent_bytes": [12_600_000.0], "peak_bytes": 7}
    more = sweep.together_point(TINY.at("processes", 4), found, shared_cores=False).more
    assert {name: spread.median for name, (spread, _) in more.items()} == pytest.approx({
        "ms_alone": 20, "all_reduce_share": 1 / 3, "exchange_gb_s": 2, "all_reduce_ms": 5,
        "all_reduce_over_model": 5 / 6, "waited_over_all_reduce": 2, "bytes_over_model": 1.05})  # 12 MB at 2 GB/s are 6 ms
    assert "shared_cores" in sweep.together_point(TINY.at("processes", 4), found, shared_cores=True).more


# ---- the model --------------------------------------------------------------------------------------------------------


def test_operations_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    network = TINY.network()
    fused, label = torch.rand(TINY.shape), torch.randint(3, (1, 16, 16, 16))
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(network(fused), label).backward()
    assert TINY.operations() == counter.get_total_flops()


def test_buckets_are_those_of_torch() -> None:
    network = cluster.paper_network(4)
    full = cluster.buckets(cluster.arrivals(cluster.layers(network, (1, 17, 64, 64, 64))))
    backwards = [torch.empty(p.shape) for p in network.parameters()][::-1]
    groups, _ = dist._compute_bucket_assignment_by_size(backwards, [cluster.FIRST_BUCKET_BYTES, cluster.BUCKET_BYTES])
    assert [size for size, _ in full] == [sum(4 * backwards[k].numel() for k in group) for group in groups]
    shares = [share for _, share in full]
    assert shares == sorted(shares)
    assert shares[0] > 1 / 3
    assert shares[-1] == pytest.approx(1)


def test_gradients_arrive_in_the_order_and_at_the_shares_of_their_operations() -> None:
    called = [Layer((10,), 1.0), Layer((), 0.0), Layer((20, 2), 3.0)]  # forward 4, backward 6 and 1
    assert cluster.operations(called) == 11
    assert cluster.arrivals(called) == [(8, 10 / 11), (80, 10 / 11), (40, 1.0)]


def test_an_all_reduce_is_the_faster_of_ring_and_trees() -> None:
    place = Cluster(gpus_per_node=2, nvlink_gb_s=100, link_gb_s=10, latency_us=10)
    assert cluster.all_reduce_s(10**9, 1, place) == 0
    assert cluster.all_reduce_s(10**9, 2, place) == pytest.approx(1e9 / 100e9 + 2e-5)
    assert cluster.all_reduce_s(10**9, 4, place) == pytest.approx(1.5 * 1e9 / 10e9 + 6e-5)
    assert cluster.all_reduce_s(4, 1024, place) == pytest.approx(20e-5, rel=1e-3)  # a ring would take 2046 messages
    assert dataclasses.replace(place, links_per_node=20).send_gb_s(4) == 100  # NVLink is the narrower place then


def test_only_what_comes_late_is_waited_for() -> None:
    place = Cluster(gpus_per_node=8, nvlink_gb_s=1.0, latency_us=0.0)
    size = int(8e9 / 14)  # one second by a ring of 8
    assert cluster.exposed_s([(size, 0.1), (size, 0.2)], 10.0, 8, place) == 0
    assert cluster.exposed_s([(size, 0.1), (size, 1.0)], 10.0, 8, place) == pytest.approx(1)
    assert cluster.exposed_s([(size, 0.9), (size, 1.0)], 1.0, 8, place) == pytest.approx(1.9)  # the second waits for the first


def test_windows_are_those_that_monai_visits() -> None:
    for volume, patch in (((512, 512, 400), (128, 128, 128)), ((100, 64, 64), (64, 64, 32))):
        steps = [n // 2 for n in patch]
        assert cluster.windows(volume, patch) == len(dense_patch_slices(volume, patch, steps))


def test_a_checkpoint_has_the_model_s_bytes(tmp_path: Path) -> None:
    network = UNet(17, 4, base_channels=8, downsamplings=3)
    optimizer = torch.optim.AdamW(network.parameters(), 0.0)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    checkpoint.save(tmp_path / "last.pt", {"network": network.state_dict(), "optimizer": optimizer.state_dict()})
    names = 1024 * (len(network.state_dict()) + 3 * len(list(network.parameters())))  # a header and a name for each tensor
    predicted = cluster.checkpoint_bytes(network)
    assert predicted <= (tmp_path / "last.pt").stat().st_size <= predicted + names


def test_validation_is_shared_out_by_whole_cases() -> None:
    assert cluster.validation_share(100, 8) == 100 / 104
    assert cluster.validation_share(20, 1024) == 20 / 1024


# ---- the page ---------------------------------------------------------------------------------------------------------


PAGE = ROOT / "docs" / "scaling.md"


def test_the_page_s_tables_are_the_model_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("scaling", command.main, ["--model"]) == 0
    printed, page = capsys.readouterr().out, PAGE.read_text()
    tables = cluster.tables(Cluster())
    assert len(tables) == 8
    for title, table in tables.items():
        assert table in printed, title
        assert table in page, title


def test_the_page_s_arithmetic() -> None:
    """Once more, by hand."""
    page = " ".join(PAGE.read_text().split())
    widths = [20 * 2**level for level in range(6)]
    weights = 27 * (17 * 20 + sum((widths[max(k - 1, 0)] + w) * w for k, w in enumerate(widths))
                    + sum((3 * w + w) * w for w in widths[:-1]))
    norms = 2 * (20 + sum(2 * w for w in widths) + sum(2 * w for w in widths[:-1]))
    count = weights + norms + 27 * 20 * 4
    size, last = 4 * count, 11.1
    n, patch = 1024, (192, 192, 128)
    bricks = 3 * math.prod(p + b - 1 for p, b in zip(patch, BRICK, strict=True))
    read = bricks + (1 + 191 / 32) * (1 + 191 / 32) * 2 * 131072
    for text in (
            f"| brats | 4 | {count:,} | {size / 1e6:.1f} |",
            f"| 1,024 | {2 * (n - 1) / n * size / 1e6:.0f} | ",
            f"| amos | 192 × 192 × 128 | {math.prod(patch) * 3 / 1e6:.2f} | {bricks / 1e6:.2f} | {read / 1e6:.2f} |",
            f"| amos | {8 * 4 / 0.1 * read / 1e9:.1f} | {8 * 4 / 0.3 * read / 1e9:.2f} | {8 * 4 * read / 1e9:.2f} |",
            f"| weights and moments | {3 * size / 1e6:.0f} | ",
            f"{n} × {3 * size / 1e6:.0f} MB = {n * 3 * size / 1e9:.0f} GB",
            f"{cluster.windows((512, 512, 400), (128, 128, 128))} windows",
            f"{250_000 / n:.0f} steps",
            f"the last bucket, {last} MB"):
        assert text in page, text


def test_the_page_s_measurements_are_rows() -> None:
    """Every number of the tables of what was measured stands in the rows that the page names."""
    page = PAGE.read_text()
    file = ROOT / "benchmarks" / "results" / re.findall(r"\(\.\./benchmarks/results/([\w.-]+\.jsonl)\)", page)[0]
    rows: dict[str, list[dict[str, object]]] = {}
    for row in map(json.loads, file.read_text().splitlines()):
        rows.setdefault(row["name"], []).append(row)
    told = re.findall(r"^\| `(scaling\.[\w.]+)` \| ([^|]+) \| ([^|]+) \|", page, re.MULTILINE)
    assert len(told) > 10
    for name, value, spread in told:
        numbers = [[f"{row[key]:.3g}" for key in ("value", "low", "high")] for row in rows[name] if row["value"] is not None]
        assert [value.strip(), *spread.strip().split(" – ")] in numbers, name
