"""The overview and what is done with rows: one screen, what limits, comparisons with noise, the page, the trace."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from dropgen_fast.bench import compare, measure, overview, step
from dropgen_fast.bench import run as bench
from dropgen_fast.bench.measure import Spread
from dropgen_fast.bench.op import OpResult
from dropgen_fast.bench.overview import OverviewResult, advice
from dropgen_fast.bench.report import Row
from dropgen_fast.cli import run
from dropgen_fast.step import PARTS


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy and a matrix that take no time."""
    monkeypatch.setattr(measure, "COPY_BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})
    monkeypatch.setattr(measure, "MATRIX_SIDE", {"cpu": 32, "cuda": 32})


def test_no_arguments_but_quick_is_one_screen_and_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"bench.{name}" for name in ("json", "html", "picture", "trace")}
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    small = ["--quick", "--rounds", "2", "--device", "cpu", "--step.patch", "16", "16", "16", "--size", "12"]
    assert bench.main([*small, *words]) == 0
    screen = capsys.readouterr().out.partition("rows appended")[0]
    assert len(screen.splitlines()) <= 60
    assert max(map(len, screen.splitlines())) <= 130
    for words_of_the_screen in ("device", "copy", "fuse_streams", "loader, alone", "extractor", "fusion", "network, forward",
                                "network, backward", "optimizer", "patches", "DropGen ÷ ERM", "× the plain recipe", "limits"):
        assert words_of_the_screen in screen
    rows = {row["name"]: row for row in map(json.loads, files["json"].read_text().splitlines())}
    assert {"device.copy_gb_s", "device.matrix_gflop_s", "op.forward.x_eager", "op.forward.share_of_bandwidth",
            "op.backward.x_eager", "step.dropgen_over_erm", "step.x_recipe", "step.ms.loader", "step.patches_per_s",
            *(f"step.ms.dropgen.{part}" for part in PARTS)} <= rows.keys()
    assert all({"name", "value", "unit", "low", "high", "device", "commit"} <= row.keys() for row in rows.values())
    ms = rows["step.ms.dropgen"]
    assert rows["step.patches_per_s"]["value"] == pytest.approx(1e3 / ms["value"])
    assert rows["step.patches_per_s"]["low"] <= rows["step.patches_per_s"]["high"]
    page = files["html"].read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "step.dropgen_over_erm" in page
    assert files["picture"].read_bytes().startswith(b"\x89PNG")
    events = json.loads(files["trace"].read_text())["traceEvents"]
    named = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert {part: named.count(part) for part in PARTS} == dict.fromkeys(PARTS, 3)


def made_up(
    parts: Mapping[str, float], *, loader_ms: float = 1.0, compiled: bool = False, precision: str = "fp32",
) -> OverviewResult:
    whole = sum(parts.values())
    of = {part: Spread(ms, ms, ms) for part, ms in parts.items()}
    config = step.StepConfig(patch=(8, 8, 8), batch=1, precision=precision, compile=compiled)
    ms = {"erm": Spread(whole, whole, whole), "dropgen": Spread(whole, whole, whole),
          "dropgen_stride2": Spread(whole / 2, 0, whole)}
    return OverviewResult(OpResult([], {}, Spread(1, 1, 1)), step.StepResult(config, ms, {"dropgen": of}, {}, {}, 5),
                          Spread(loader_ms, loader_ms, loader_ms), 2)


BALANCED = {"extractor": 5.0, "fusion": 5.0, "forward": 30.0, "backward": 50.0, "optimizer": 10.0}


@pytest.mark.parametrize(("result", "gpu", "words"), [
    (made_up(BALANCED, loader_ms=150), False,
     "loading: 150 ms a batch, and 100 ms to train on it: more --loader-threads (2 here)"),
    (made_up({**BALANCED, "extractor": 100.0}), False, "--extractor-stride 2 (the step then takes 0.50 of the time)"),
    (made_up({**BALANCED, "optimizer": 80.0}), True, "the optimizer, 47 % of the step: more patches a step"),
    (made_up(BALANCED), False, "the network, 80 % of the step, on a CPU: a GPU"),
    (made_up(BALANCED), True, "compile it"),
    (made_up(BALANCED, compiled=True), True, "--precision bf16"),
    (made_up(BALANCED, compiled=True, precision="bf16"), True, "--cuda-graph"),
])
def test_what_limits_is_named_with_what_to_change(result: OverviewResult, gpu: bool, words: str) -> None:
    told = advice(result, on_gpu=gpu)
    assert words in told
    assert "\n" not in told


def row(name: str, value: float, spread: float, **more: object) -> Row:
    return {"name": name, "value": value, "low": value - spread, "high": value + spread, "unit": "ratio", "device": "A",
            "threads": 2, "case": {"patch": [8, 8, 8]}, **more}


@pytest.mark.parametrize(("now", "before", "wanted"), [
    (row("op.forward.x_eager", 3.0, 0.1), row("op.forward.x_eager", 2.0, 0.1), "better"),
    (row("op.forward.x_eager", 2.0, 0.1), row("op.forward.x_eager", 3.0, 0.1), "worse"),
    (row("op.forward.x_eager", 2.0, 0.6), row("op.forward.x_eager", 3.0, 0.6), "within the noise"),
    (row("step.dropgen_over_erm", 1.1, 0.01), row("step.dropgen_over_erm", 1.3, 0.01), "better"),
    (row("loading.read_amplification", 1.1, 0.01), row("loading.read_amplification", 1.3, 0.01), "better"),
    (row("step.ms.erm", 90, 1, unit="ms"), row("step.ms.erm", 100, 1, unit="ms"), "better"),
    (row("step.patches_per_s", 90, 1, unit="patches/s"), row("step.patches_per_s", 100, 1, unit="patches/s"), "worse"),
])
def test_a_verdict_allows_for_the_noise(now: Row, before: Row, wanted: str) -> None:
    assert compare.verdict(now, before) == wanted
    assert compare.screen([now], [before]).endswith(wanted)


def test_only_like_is_compared_with_like() -> None:
    now = row("a", 2.0, 0.1)
    others = [row("a", 1.0, 0.1, device="B"), row("a", 1.0, 0.1, threads=4), row("a", 1.0, 0.1, case={"patch": [9, 8, 8]}),
              row("b", 1.0, 0.1)]
    assert "nothing to compare" in compare.screen([now], others)
    latest = compare.screen([now, row("c", 1.0, 0.1)], [row("a", 1.0, 0.1), row("a", 2.0, 0.2), *others])
    assert "within the noise" in latest  # the last row of a name is the one that counts
    assert "1 rows have no earlier one" in latest


@pytest.mark.parametrize(("text", "message"), [
    ("{", "line 1: not a row"), ('{"name": "a"}', "line 1: not a row"), (None, "cannot be read")])
def test_wrong_rows_are_one_line_before_anything_is_measured(
    text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step, "run", lambda *_: pytest.fail("measured"))
    if text is not None:
        (tmp_path / "rows.jsonl").write_text(text)
    assert run("bench", bench.main, ["--device", "cpu", "--compare", str(tmp_path / "rows.jsonl")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_preset_decides_patch_and_classes() -> None:
    config = bench._resolved(bench.BenchConfig(preset="amos"))
    assert (config.step.patch, config.step.classes, config.op.size) == ((192, 192, 128), 16, (192, 192, 128))
    quick = bench._resolved(bench.BenchConfig(quick=True))
    assert (quick.step.patch, quick.op.size, quick.op.strides) == ((32, 32, 32), (32,), (2,))
    own = dataclasses.replace(step.StepConfig(), patch=(64, 64, 64))
    assert bench._resolved(bench.BenchConfig(preset="amos", step=own)).step.patch == (64, 64, 64)


def test_the_loader_is_timed_alone() -> None:
    config = step.resolved(step.StepConfig(patch=(16, 16, 16)), torch.device("cpu"))
    spread = overview.loader_ms(config, torch.device("cpu"), 1, 0.1)
    assert 0 < spread.low <= spread.median <= spread.high < 10_000
