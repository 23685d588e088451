"""What a run leaves to look at: numbers, pictures, the page; on TensorBoard and at Weights & Biases too."""

from __future__ import annotations

import base64
import json
import re
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dropgen_fast.errors import InputError
from dropgen_fast.record.folder import RunFolder, read_metrics
from dropgen_fast.record.monitor import Monitor
from dropgen_fast.record.panels import class_colours, panel, principal_colours

SETTINGS: dict[str, Any] = {"model": {"method": "dropgen", "network": "unet"}, "seed": 3, "note": "<b>& more</b>"}


def recorded(path: Path, steps: int, *, wandb: str | None = None) -> RunFolder:
    """A run of so many steps with a validation at the end, not closed."""
    folder = RunFolder(path, SETTINGS, resume=False, wandb=wandb)
    folder.start(0)
    for step in range(1, steps + 1):
        folder.record(step, loss=1 / step, learning_rate=1e-3, skipped_steps=0, patches_per_s=4.0, step_ms=500.0,
                      waiting_for_data=0.25, peak_memory_gib=1.5)
    folder.record(steps, validation_dice=0.75, per_class={"liver": 0.75, "spleen <left>": None})
    folder.picture(steps, "case_1", np.full((40, 60, 3), 200, np.uint8))
    return folder


def events(path: Path) -> EventAccumulator:
    found = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def test_numbers_and_pictures_for_tensorboard(tmp_path: Path) -> None:
    recorded(tmp_path / "run", 3).close()
    found = events(tmp_path / "run")
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert [e.value for e in found.Scalars("per_class/liver")] == [0.75]
    assert "per_class/spleen <left>" not in found.Tags()["scalars"]  # no value is no zero
    image, = found.Images("validation/case_1")
    assert (image.height, image.width, image.step) == (40, 60, 3)


def test_what_came_after_the_checkpoint_is_taken_out(tmp_path: Path) -> None:
    recorded(tmp_path / "run", 3).close()
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # a line that a kill cut short
    (tmp_path / "run/.last.pt.abc").write_text("half of a checkpoint")
    again = RunFolder(tmp_path / "run", SETTINGS, resume=True)
    again.start(2)
    again.record(3, loss=7.0)
    again.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path / "run/metrics.jsonl")] == [(1, 1.0), (2, 0.5), (3, 7.0)]
    assert not (tmp_path / "run/.last.pt.abc").exists()
    assert [(e.step, e.value) for e in events(tmp_path / "run").Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 7.0)]


def test_a_kill_before_the_first_line_leaves_a_folder_that_can_be_used(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.x1").write_text("seed")
    (tmp_path / ".lock").write_text("")
    folder = RunFolder(tmp_path, SETTINGS, resume=False)
    folder.start(0)
    folder.close()
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith("events.")} == {".lock", "config.yaml", "metrics.jsonl"}


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "a <run>", 30)
    folder.finish()
    folder.close()
    page = (tmp_path / "a <run>/run.html").read_text()
    assert "Best mean validation Dice 0.750, after 30 steps" in page
    assert "<h1>a &lt;run&gt;</h1>" in page
    assert "spleen &lt;left&gt;" in page
    assert "&lt;b&gt;&amp; more&lt;/b&gt;" in page
    assert "<tr><th scope=\"row\">waiting for data, %</th><td>25</td></tr>" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    pictures = [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert len(pictures) == 4  # validation, the case, training, speed
    for number, png in enumerate(pictures):
        (tmp_path / f"{number}.png").write_bytes(png)
        assert imread(tmp_path / f"{number}.png").std() > 0 or number == 1


def test_a_page_of_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", SETTINGS, resume=False)
    folder.start(0)
    folder.record(1, loss=None, skipped_steps=1)
    folder.record(1, validation_dice=None, per_class={"liver": None})
    folder.finish()
    folder.close()
    page = (tmp_path / "run/run.html").read_text()
    assert "No validation has a score" in page
    assert "1 step had gradients that were not finite" in page


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, as Weights & Biases writes it: blocks of 32 KiB, checksums left aside."""
    place, record = 7, b""  # behind its header
    while place + 7 <= len(log):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", log[place + 4:place + 7])
        record += log[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last of its parts
            yield record
            record = b""


def test_weights_and_biases_gets_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package, offline: what it wrote is read back."""
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recorded(tmp_path / "run", 3, wandb="hearts").close()
    written, = (tmp_path / "run").glob("wandb/offline-run-*/*.wandb")
    records, deadline = list[Any](), time.monotonic() + 60
    while not any(record.HasField("exit") for record in records) and time.monotonic() < deadline:
        time.sleep(0.1)  # its own process writes the file
        records = [wandb_internal_pb2.Record.FromString(data) for data in leveldb_records(written.read_bytes())]
    losses, config, project = {}, {}, ""
    for record in records:
        items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if "loss" in items:
            losses[record.history.step.num] = items["loss"]
        if record.run.project:
            project = record.run.project
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            assert record.run.run_id == (tmp_path / "run/.wandb_id").read_text()
    assert losses == {1: 1.0, 2: 0.5, 3: pytest.approx(1 / 3)}
    assert project == "hearts"
    assert config["seed"] == 3


def test_without_the_package_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"--wandb needs the package wandb: install dropgen_fast\[wandb\]"):
        RunFolder(tmp_path / "run", SETTINGS, resume=False, wandb="hearts")
    assert not (tmp_path / "run").exists()


def test_the_monitor_tells_training_from_waiting_and_from_the_rest() -> None:
    monitor = Monitor(torch.device("cpu"))
    assert monitor.take() == {}
    for _ in range(4):
        with monitor.waiting():
            time.sleep(0.03)
        time.sleep(0.01)
        monitor.step(patches=3)
    with monitor.exclude(), monitor.exclude():  # as a checkpoint within a validation
        time.sleep(0.5)
    values = monitor.take()
    assert set(values) == {"patches_per_s", "step_ms", "waiting_for_data", "peak_memory_gib"}
    # Sleeping takes the time that was asked for, or longer on a busy machine; never the half second that was excluded.
    assert 40 <= values["step_ms"] < 125
    assert values["patches_per_s"] == pytest.approx(3e3 / values["step_ms"])
    assert 0.12 / (4e-3 * values["step_ms"]) <= values["waiting_for_data"] + 1e-9 <= 1
    assert values["peak_memory_gib"] > 0.05
    assert monitor.take() == {}
    monitor.close()


def test_principal_colours_are_the_components() -> None:
    """Three independent patterns of falling size, mixed by a rotation, come back as red, green and blue."""
    rng = np.random.default_rng(0)
    patterns = np.stack([np.sign(rng.standard_normal((6, 6, 6))) for _ in range(2)])
    features = np.stack([patterns[0], patterns[0], patterns[0], patterns[1], np.zeros((6, 6, 6))]).astype(np.float32)
    colours = principal_colours(features)
    assert colours.shape == (6, 6, 6, 3)
    assert abs(np.corrcoef(colours[..., 0].ravel(), patterns[0].ravel())[0, 1]) > 0.99
    assert abs(np.corrcoef(colours[..., 1].ravel(), patterns[1].ravel())[0, 1]) > 0.9
    assert not colours[..., 2].any()  # there is no third component
    assert not principal_colours(np.ones((2, 3, 3, 3), np.float32)).any()


def test_a_panel_shows_what_it_is_given() -> None:
    """Colours of each class are there where they should be, in the plane that has most of the label, right side up."""
    image = np.zeros((30, 20, 10), np.float32)
    image[5:25, 3:17, 2:8] = np.random.default_rng(0).random((20, 14, 6))
    label = np.zeros(image.shape, np.uint8)
    label[20:25, 12:16, 6:8] = 1  # right, in front, above
    found = np.zeros_like(label)
    found[6:10, 12:16, 6:8] = 2  # left, in front, above
    shown = panel(image, None, label, found, ("background", "a", "b"), spacing_mm=(1, 1, 3))
    assert shown.dtype == np.uint8
    assert shown.shape[2] == 3
    height, width = shown.shape[:2]
    plane = height * (2 / 3) / (2 / 3 + 1 + 1.5)  # extents of 30, 20 and 30 mm: so high are the planes, in their widths

    def places(colour: np.ndarray) -> np.ndarray:
        """(row, column) of the axial plane's pixels of that hue."""
        pixels = shown[:int(plane)].astype(float)
        pixels, hue = pixels - pixels.mean(2, keepdims=True), colour - colour.mean()
        alike = (pixels * hue).sum(2) / (np.linalg.norm(pixels, axis=2) * np.linalg.norm(hue) + 1e-9)
        return np.argwhere((alike > 0.97) & (np.linalg.norm(pixels, axis=2) > 40))

    for colour, column, side in ((class_colours(3)[1], 1, 0.75), (class_colours(3)[2], 2, 0.27)):
        rows, columns = places(255 * colour).T
        assert len(rows)
        assert abs(columns.mean() / width * 3 - (column + side)) < 0.12
        assert columns.max() - columns.min() < width / 3  # in one of the three columns only
        assert rows.mean() < 0.55 * plane  # what lies in front is above (below the title)
    features = np.random.default_rng(1).random((5, 15, 10, 5)).astype(np.float32)
    assert panel(image, features, label, found, ("background", "a", "b"), spacing_mm=(1, 1, 3)).shape[1] > 1.2 * width


@pytest.mark.gpu
def test_waiting_on_a_gpu_is_what_the_gpu_waits() -> None:
    """Data that come while earlier work is still computed cost nothing; data that come late do."""
    device = torch.device("cuda:0")
    x = torch.rand(4096, 4096, device=device)
    for late, check in ((False, lambda share: share < 0.5), (True, lambda share: share > 0.5)):
        monitor = Monitor(device)
        (x @ x).sum()
        torch.cuda.synchronize()
        monitor.take()
        for _ in range(4):
            if not late:
                torch.cuda._sleep(400_000_000)
            with monitor.waiting():
                time.sleep(0.05)
            monitor.step(patches=1)
        assert check(monitor.take()["waiting_for_data"])
        monitor.close()
