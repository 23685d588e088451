"""The loading benchmark and the suite: they run, name what is left out, count what they should; docs/loading.md's sums."""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import os
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from dropgen_fast.bench.loading import processes, recipes, suite, table
from dropgen_fast.bench.loading.processes import Place, Source, Turn, Unavailable, check_augments, opened, take_turns
from dropgen_fast.bench.loading.volumes import make_store
from dropgen_fast.bench.measure import Spread
from dropgen_fast.cli import run as run_cli
from dropgen_fast.data.augmentation import RECIPES, AugmentationConfig
from dropgen_fast.data.bricks import BRICK
from dropgen_fast.errors import InputError

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_loading  # noqa: E402

SIZE = (32, 32, 32)  # what the demo's network can halve, and no more
FACTS = {"name", "value", "unit", "low", "high", "device", "cpu", "threads", "commit", "date", "torch", "triton", "dali", "monai",
         "nnunetv2", "batchgeneratorsv2", "batchaug", "dropgen_fast", "patch", "batch_size", "volumes", "percentiles", "rounds"}


def place(folder: Path, cores: int = 1) -> Place:
    return Place(folder, folder, SIZE, 1, tuple(sorted(os.sched_getaffinity(0)))[:cores])


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_a_run_measures_every_part_and_names_what_is_left_out(tmp_path, capsys, monkeypatch):
    folders, make_store = [], bench_loading.make_store
    monkeypatch.setattr(bench_loading, "make_store", lambda folder, *rest, **more: folders.append(folder) or make_store(
        folder, *rest, **more))
    rows_file = tmp_path / "rows.jsonl"
    options = ["--quick", "--threads", "1", "--cases", "2", "--seconds", "0.02", "--operators", "noise", "--json", str(rows_file)]
    assert run_cli("bench_loading", bench_loading.main, options) == 0
    screen = capsys.readouterr().out
    assert [folder.parent.exists() for folder in folders] == [False]
    rows = {row["name"]: row for row in map(json.loads, rows_file.read_text().splitlines())}
    assert len(rows) == len(rows_file.read_text().splitlines())
    for row in rows.values():
        assert row.keys() >= FACTS
        assert row["low"] <= row["value"] <= row["high"]
        assert row["threads"] == 1
        assert (row["patch"], row["batch_size"], row["percentiles"], row["rounds"]) == (list(SIZE), 2, [20, 50, 80], 2)
        assert ("claim" in row) == (row["unit"] == "ratio")

    modules = {"nnunet": "nnunetv2", "batchaug": "batchaug"}
    has = {way: importlib.util.find_spec(module) is not None for way, module in modules.items()}
    wanted = {"loading.paper": {"ours", "ours_dali", "monai", "monai_alone", "batchaug", "step"},
              "loading.nnunet": {"ours", "nnunet"}, "chain.intensity": {"ours", "dali", "monai", "batchaug"},
              "chain.affine": {"ours", "monai", "batchaug"}}
    for group, ways in wanted.items():
        for way in ways:
            there = f"{group}.ms.{way}" in rows
            assert there == has.get(way, True), (group, way, screen)
            if not there:
                continue
            for what in ("patches_s", "ms", "cpu_ms"):
                assert 0 < rows[f"{group}.{what}.{way}"]["value"] < math.inf
            for what in ("x", "cpu_x"):
                assert (f"{group}.{what}.{way}" in rows) == (way != "ours")
    for way, there in has.items():
        if not there:
            assert re.search(rf"left out, {way}\w* cannot be imported", screen), screen
    assert {f"operator.noise.cpu_ms.{way}" for way in ("ours", "off", "monai")} <= rows.keys()
    assert "one augmentation alone" in screen


@pytest.mark.parametrize(("options", "says"), [
    (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    (["--rounds", "0"], "--rounds must be at least 1"),
    (["--threads", "100000"], "cores that this process may use, got 100000"),
    (["--patch", "4", "32", "32"], "--patch must be three numbers of at least 8"),
    (["--seconds", "0"], "--seconds must be above 0"),
    (["--operators", "noize"], "got 'noize'"),
    (["--operators", "noise", "--only", "paper"], "--operators needs the part operators"),
    (["--json", "/nowhere/rows.jsonl"], "--json must be a file in a folder that is there"),
    (["--store", "/nowhere"], "is not a prepared store"),
    (["--device", "tpu"], "device must be"),
])
def test_wrong_options_are_told_in_one_line(options, says, capsys):
    assert run_cli("bench_loading", bench_loading.main, ["--quick", *options]) == 2
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1


# ---- the suite ------------------------------------------------------------------------------------------------------


def test_the_suite_compares_counts_and_leaves_nothing_behind(monkeypatch):
    folders = []
    monkeypatch.setattr(suite, "make_store", lambda folder, *rest, **more: folders.append(folder) or make_store(
        folder, *rest, **more))
    config = suite.LoadingConfig(patch=(16, 16, 24), batch_size=1)
    result = suite.run(config, torch.device("cpu"), 0.02, rounds=3, threads=1)
    assert [folder.parent.exists() for folder in folders] == [False]
    assert (result.rounds, result.threads, result.missing) == (3, 1, {})
    values = suite.values(result)
    wanted = {"loading.patches_per_s": "1/s", "loading.cpu_ms_per_patch": "ms", "loading.patches_per_s.monai": "1/s",
              "loading.cpu_ms_per_patch.monai": "ms", "loading.x_monai": "ratio"}
    if result.amplification:
        wanted["loading.read_amplification"] = "ratio"
        assert len(result.amplification) == suite.CROPS
        assert min(result.amplification) >= 1
    else:
        assert "page cache" in result.uncounted
    assert {name: unit for name, (_, unit) in values.items()} == wanted
    for spread, _ in values.values():
        assert 0 < spread.low <= spread.median <= spread.high < math.inf
    json.dumps(suite.fields(result))
    assert "2 volumes of" in suite.fields(result)["volumes"]
    assert "read_amplification" in suite.screen(result)
    assert suite.picture(result).startswith(b"\x89PNG")


def loaded(ours: list[Turn], monai: list[Turn], **more) -> suite.LoadingResult:
    return suite.LoadingResult(suite.LoadingConfig(patch=SIZE), 2, "", {"ours": ours, "monai": monai}, **{
        "missing": {}, "amplification": [], "uncounted": "a reason", "read_ahead_kib": 128, **more})


def test_rows_have_quartiles_and_ratios_within_rounds():
    """The rounds are of very different speed for both ways alike: no ratio changes."""
    seconds = (1.0, 2.0, 4.0, 8.0, 16.0)
    result = loaded(turns(*seconds), turns(*(3 * s for s in seconds)), amplification=[1.0, 2.0, 3.0, 4.0, 5.0],
                    missing={"a": "b"})
    values = suite.values(result)
    assert values["loading.x_monai"][0] == Spread(3.0, 3.0, 3.0)
    assert values["loading.patches_per_s"][0] == Spread(0.5, 0.25, 1.0)
    assert values["loading.cpu_ms_per_patch"][0] == Spread(1000.0, 500.0, 2000.0)
    assert values["loading.patches_per_s.monai"][0].median == pytest.approx(0.5 / 3)
    assert values["loading.read_amplification"][0] == Spread(3.0, 2.0, 4.0)
    assert "a could not be run: b" in suite.screen(result)


def test_what_says_nothing_or_is_not_there_is_not_printed():
    result = loaded(turns(1.0, 1.0, 1.0), turns(0.9, 1.0, 1.2))
    assert "no difference" in suite.screen(result)
    assert "read_amplification could not be counted: a reason" in suite.screen(result)
    assert "loading.read_amplification" not in suite.values(result)
    unclear = suite.screen(loaded(turns(1.0, 1.0, 1.0), turns(1.05, 1.1, 1.6)))
    assert "unclear" in unclear
    assert "1.10 " not in unclear


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no tmpfs at /dev/shm")
def test_reading_a_tmpfs_is_not_counted():
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        store = make_store(Path(folder), (8, 8, 8), cases=1, seed=0, workers=1, edges=(24, 24))
        amplification, why = suite._amplification(store, (8, 8, 8))
    assert amplification == []
    assert "use a folder on a disk" in why


def test_a_recipe_is_compared_with_those_who_have_it(tmp_path):
    ways = {recipe: set(suite.openers(suite.LoadingConfig(recipe=recipe), place(tmp_path))) for recipe in RECIPES}
    assert ways == {"dropgen": {"ours", "monai"}, "nnunet": {"ours", "nnunet"}, "off": {"ours", "monai"}}


@pytest.mark.parametrize(("config", "threads", "says"), [
    ({"patch": (4, 32, 32)}, None, r"^--loading\.patch must be three numbers of at least 8, got \(4, 32, 32\)$"),
    ({"batch_size": 0}, None, r"^--loading\.batch-size must be at least 1, got 0$"),
    ({"recipe": "mild"}, None, r"^--loading\.recipe must be one of dropgen, nnunet, off, got 'mild'$"),
    ({"store": Path("/nowhere")}, None, "is not a prepared store"),
    ({}, 100_000, r"^--threads must be at most the \d+ cores that this process may use, got 100000$"),
])
def test_wrong_options_of_the_suite_are_told_in_one_line(config, threads, says):
    with pytest.raises(InputError, match=says) as told:
        suite.run(suite.LoadingConfig(**config), torch.device("cpu"), 0.02, threads=threads)
    assert "\n" not in str(told.value)


# ---- ways in processes of their own ---------------------------------------------------------------------------------


def beat(file: Path) -> None:
    while True:
        with file.open("a") as beats:
            beats.write(".")
        time.sleep(0.005)


def beating(where: Place) -> Source:
    """A way whose worker process never rests."""
    file = where.scratch / "beats"
    worker = multiprocessing.Process(target=beat, args=(file,), daemon=True)
    worker.start()

    def wait() -> None:
        before = file.stat().st_size
        while file.stat().st_size == before:
            time.sleep(0.001)

    while not file.exists():
        time.sleep(0.001)
    return Source(wait, 1)


def burn(done: multiprocessing.Queue, seconds: float) -> None:
    while True:
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass
        done.put(None)


def burning(where: Place, seconds: float) -> Source:
    """A way whose worker process uses `seconds` of CPU time for each batch."""
    done: multiprocessing.Queue = multiprocessing.Queue(1)
    multiprocessing.Process(target=burn, args=(done, seconds), daemon=True).start()
    return Source(done.get, 1, stock=3)


def refusing(where: Place, error: Exception) -> Source:
    raise error


def dying(where: Place) -> Source:
    os._exit(1)


def test_a_way_stands_still_but_for_its_turn_and_ends_with_its_workers(tmp_path):
    with opened({"beating": beating}, place(tmp_path), str) as (feeds, missing):
        assert not missing
        feed = feeds["beating"]
        group = feed._process.pid
        time.sleep(0.05)
        beats = (tmp_path / "beats").stat().st_size
        time.sleep(0.3)
        assert (tmp_path / "beats").stat().st_size == beats
        assert feed.turn(3).patches == 3
        assert (tmp_path / "beats").stat().st_size > beats
    assert not alive(group)


def open_and_wait(pipe, folder: Path) -> None:
    with opened({"beating": beating}, place(folder), str) as (feeds, _):
        pipe.send(feeds["beating"]._process.pid)
        time.sleep(60)


def test_ways_that_stand_still_end_when_who_started_them_is_killed(tmp_path):
    context = multiprocessing.get_context("forkserver")
    pipe, theirs = context.Pipe()
    parent = context.Process(target=open_and_wait, args=(theirs, tmp_path))
    parent.start()
    theirs.close()
    group = pipe.recv()
    assert alive(group)
    parent.kill()
    parent.join()
    until = time.monotonic() + 20
    while alive(group) and time.monotonic() < until:
        time.sleep(0.02)
    assert not alive(group)


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_cpu_time_of_workers_is_counted(tmp_path):
    seconds = 0.05
    with opened({"burning": partial(burning, seconds=seconds)}, place(tmp_path), str) as (feeds, _):
        turn = feeds["burning"].turn(6)
    # A turn begins and ends at the arrival of a batch; the queue's thread may be some ms late at either end.
    assert 0.8 * 6 * seconds < turn.cpu_seconds < turn.seconds * 1.05 + 0.02
    before, by_clock = time.process_time(), processes.process_cpu_seconds(os.getpid())
    assert before <= by_clock <= time.process_time()


def test_what_cannot_be_run_is_named_and_stops_nothing(tmp_path):
    openers = {"no": partial(refusing, error=Unavailable("a\nreason")), "dead": dying,
               "broken": partial(refusing, error=KeyError("k")), "yes": beating}
    with opened(openers, place(tmp_path), str) as (feeds, missing):
        assert set(feeds) == {"yes"}
        assert missing["no"] == "a reason"
        assert missing["dead"].startswith("dead ended abruptly")
        assert "'k'" in missing["broken"]
        turns = take_turns(feeds, rounds=3, seconds=0.0)
        assert [turn.patches for turn in turns["yes"]] == [1, 1, 1]
    with pytest.raises(InputError, match="put it right"), \
            opened({"user": partial(refusing, error=InputError("put it right"))}, place(tmp_path), str):
        pass


@pytest.mark.parametrize(("change", "says"), [
    (lambda image, label: (torch.zeros_like(image), label), "same batch twice, or a constant one"),
    (lambda image, label: (image.fill_(torch.nan), label), "not finite"),
    (lambda image, label: (image.int(), label), "not finite floating-point"),
    (lambda image, label: (image[..., 1:], label), "wanted"),
    (lambda image, label: (image, label[:, 0]), "wanted"),
])
def test_a_way_that_does_not_augment_is_refused(change, says, tmp_path):
    def batch():
        return torch.rand(1, 1, *SIZE), torch.zeros(1, 1, *SIZE, dtype=torch.uint8)

    check_augments(batch, place(tmp_path))
    with pytest.raises(Unavailable, match=says):
        check_augments(lambda: change(*batch()), place(tmp_path))
    same = batch()
    with pytest.raises(Unavailable, match="same batch twice"):
        check_augments(lambda: same, place(tmp_path))


# ---- recipes --------------------------------------------------------------------------------------------------------


def test_every_augmentation_has_its_counterpart_with_our_probability_and_range():
    config = AugmentationConfig()
    assert {"flip", "rotate90", "low_resolution", "noise", "bias_field", "gibbs", "gamma", "smooth", "sharpen", "affine"
            } <= set(recipes.PAPER)
    for name in recipes.OPERATORS:
        always = recipes.monai_transforms(config, SIZE, (name,), probability=1.0)
        assert always
        assert all(transform.prob == 1 for transform in always)
        assert getattr(recipes.only(name), f"{name}_probability") == 1
        others = {other: getattr(recipes.only(name), f"{other}_probability") for other in recipes.OPERATORS if other != name}
        assert not any(others.values())
    made = recipes.monai_transforms(config, SIZE, recipes.PAPER)
    assert [transform.prob for transform in made] == [getattr(config, f"{name}_probability") for name in recipes.PAPER]
    by_name = {type(transform).__name__: transform for transform in made}
    assert by_name["RandBiasFieldd"].rand_bias_field.coeff_range == config.bias_field_coefficient
    assert by_name["RandAdjustContrastd"].adjuster.gamma == config.gamma
    assert by_name["RandSimulateLowResolutiond"].zoom_range == config.low_resolution_zoom
    assert set(recipes.PAPER) <= set(recipes._BATCHAUG)


# ---- rows and tables ------------------------------------------------------------------------------------------------


def turns(*seconds: float) -> list[Turn]:
    return [Turn(2, s, s / 2) for s in seconds]


def test_ratios_are_taken_within_rounds():
    group = table.Group("g", "t", {"ours": "ours", "slow": "slow", "gone": "gone"},
                        {"ours": turns(1.0, 2.0, 4.0), "slow": turns(3.0, 6.0, 12.0)}, {"gone": "not here"})
    rows = {row["name"]: row for row in table.group_rows(group, {})}
    assert (rows["g.x.slow"]["low"], rows["g.x.slow"]["value"], rows["g.x.slow"]["high"]) == (3, 3, 3)
    assert rows["g.x.slow"]["claim"]
    assert rows["g.patches_s.ours"]["value"] == 1.0
    assert rows["g.cpu_ms.slow"]["value"] == 1500.0
    assert "g.x.ours" not in rows
    screen = table.group_table(group)
    assert "gone: left out, not here" in screen
    assert "3.00 (3.00-3.00)" in screen


def test_a_ratio_that_says_nothing_claims_nothing():
    group = table.Group("g", "t", {"ours": "ours", "same": "same"},
                        {"ours": turns(1.0, 1.0, 1.0), "same": turns(0.9, 1.0, 1.2)}, {})
    row = next(row for row in table.group_rows(group, {}) if row["name"] == "g.x.same")
    assert not row["claim"]
    assert "≈ 1" in table.group_table(group)


def test_operators_are_sorted_and_a_difference_in_the_scatter_gives_no_ratio():
    operators = [table.Operator("cheap", "ms", [1.0, 1.1], [5.0, 5.0], [2.0, 2.2]),
                 table.Operator("dear", "ms", [9.0, 9.0], [5.0, 5.0]),
                 table.Operator("lost", "ms", [-0.1, 0.3], [5.0, 5.0], [2.0, 2.0], {"x": "y"})]
    lines = table.operator_table(operators, "here").splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["dear", "cheap", "lost"]
    rows = {row["name"]: row for row in table.operator_rows(operators, {})}
    assert rows["operator.cheap.x.monai"]["value"] == pytest.approx(2.0)
    assert "operator.lost.x.monai" not in rows
    assert "operator.dear.ms.monai" not in rows


# ---- the page -------------------------------------------------------------------------------------------------------


def test_the_page_s_arithmetic():
    page = " ".join((ROOT / "docs" / "loading.md").read_text().split())  # wherever its lines end
    (bz, by, bx), n, voxel, read_ahead, cases = BRICK, 128, 3, 128 * 1024, 10_000
    volume = 512 * 512 * 400 * voxel
    crop = n**3 * voxel
    bricks = (n + bz - 1) * (n + by - 1) * (n + bx - 1) * voxel
    runs = (1 + (n - 1) / bz) * (1 + (n - 1) / by)
    read = bricks + runs * 2 * read_ahead
    requests = read / read_ahead
    for text in (
            f"bricks of {bz} × {by} × {bx}", f"| crop bytes | {crop / 1e6:.2f} MB |",
            f"| brick bytes | {bricks / 1e6:.2f} MB, {bricks / crop:.2f} times the crop |",
            f"| runs | {runs:.1f}, of {bricks / runs / 1e3:.0f} KB each |",
            f"| bytes read | {read / 1e6:.1f} MB, {read / crop:.2f} times the crop", f"| requests | {requests:.0f} |",
            f"{volume / 1e6:.1f} MB, {volume / crop:.0f} times the crop", f"{n * n * 400 * voxel / 1e6:.1f} MB, and read-ahead",
            f"| store | {volume / 1e6:.0f} MB a case, {cases * volume / 1e12:.2f} TB |",
            f"| an epoch | {cases * read / 1e9:.0f} GB, {100 * read / volume:.1f} % of the store |",
            f"(one NVMe disk) | {cases * read / 3e9:.0f} |", f"(NFS over 10 Gbit/s) | {cases * read / 1e9:.0f} |",
            f"20 patches/s | {20 * read / 1e6:.0f} MB/s |", f"| needed by eight | {160 * read / 1e9:.1f} GB/s |",
            f"0.1 ms a request (NVMe) | {math.ceil(20 * requests * 1e-4)} |",
            f"0.5 ms (NFS) | {math.ceil(20 * requests * 5e-4)} |",
            f"30 ms (object storage behind FUSE) | {math.ceil(20 * requests * 0.03)} |",
            f"| {cases * volume / 1e12:.2f} TB, {cases * volume / 3e9:.0f} s at 3 GB/s |",
            f"100 epochs of this cohort, {100 * cases * read / 1e12:.1f} TB read",
            f"{cases * volume / 1e9 / 60:.0f} minutes, once",
            f"from the {math.ceil(volume / read)}th epoch", f"{volume / read:.0f} times what the CPU reader fetches",
            f"256 GiB of 3.15 TB are {100 * 256 * 2**30 / (cases * volume):.0f} %", f"again after {volume / read:.0f} epochs",
            f"are {1250 * 256 * 256 * 160 * 9 / 1e9:.0f} GB"):
        assert text in page, text
