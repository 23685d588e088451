"""Scores against values worked out by hand and by other means, and what happens to pairs that cannot be scored."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.metrics import compute_surface_dice
from scipy import ndimage
from scipy.spatial.distance import cdist

from dropgen_fast.cli import run
from dropgen_fast.errors import InputError
from dropgen_fast.evaluate import evaluate, main, mean_foreground_dice, read_scores, resolve_classes
from dropgen_fast.scoring import cohort
from dropgen_fast.scoring.surfaces import hd95_mm, surface_dice, surfaces

SHAPE = (12, 9, 7)
SPACING_MM = (1.0, 2.0, 3.0)


def affine_of(spacing_mm=SPACING_MM, origin_mm=(-20.0, 11.0, 5.0)):
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = origin_mm
    return affine


def volume(*regions, shape=SHAPE):
    """Label map with value v in each region (v, x, y, z), where x, y, z are indices or slices."""
    out = np.zeros(shape, np.uint8)
    for value, *index in regions:
        out[tuple(index)] = value
    return out


def save(path: Path, values, affine=None, dtype=np.uint8):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(values, dtype), affine_of() if affine is None else affine), path)


@pytest.fixture
def folders(tmp_path):
    """Folders of predictions and labels with a function that adds a case to both; None leaves one of the two out."""
    def add(case, predicted, true, **geometry):
        for name, values in (("predictions", predicted), ("labels", true)):
            if values is not None:
                save(tmp_path / name / f"{case}.nii.gz", values, **geometry)

    for name in ("predictions", "labels"):
        (tmp_path / name).mkdir()
    return tmp_path / "predictions", tmp_path / "labels", add


def only(evaluation, case, value=1):
    (score,) = [s for s in evaluation.scores if (s.case, s.value) == (case, value)]
    return score


def test_dice_by_hand(folders):
    predictions, labels, add = folders
    add("a", volume((1, slice(2, 6), 4, 3)), volume((1, slice(4, 7), 4, 3)))  # 4 and 3 voxels, 2 of them shared
    score = only(evaluate(predictions, labels, {1: "organ"}), "a")
    assert score.dice == pytest.approx(2 * 2 / (4 + 3))
    assert (score.label_voxels, score.predicted_voxels, score.class_name) == (3, 4, "organ")


@pytest.mark.parametrize(("at", "distance_mm"), [((5, 4, 3), 3.0), ((2, 6, 3), 4.0), ((2, 4, 6), 9.0), ((5, 6, 3), 5.0)])
def test_hd95_follows_the_spacing_of_each_axis(folders, at, distance_mm):
    predictions, labels, add = folders
    add("a", volume((1, *at)), volume((1, 2, 4, 3)))
    score = only(evaluate(predictions, labels, {1: "organ"}), "a")
    assert score.dice == 0
    assert score.hd95_mm == pytest.approx(distance_mm, rel=1e-6)


def test_hd95_of_a_file_whose_axes_are_turned(folders):
    predictions, labels, add = folders
    turned = np.array([[0, 0, -3.0, 4], [0.5, 0, 0, 5], [0, -2.0, 0, 6], [0, 0, 0, 1]])  # spacing 0.5, 2, 3
    add("a", volume((1, 6, 4, 3)), volume((1, 2, 4, 3)), affine=turned)
    assert only(evaluate(predictions, labels, {1: "organ"}), "a").hd95_mm == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize(("line", "expected_mm"), [(20, 0.0), (10, 5.0)])
def test_hd95_is_the_95th_percentile(folders, line, expected_mm):
    # A line of voxels and one outlier 10 mm from it: of 21 distances the 95th percentile is the 20th, which is 0;
    # of 11 distances it lies halfway between the 10th (0) and the 11th (10 mm).
    predictions, labels, add = folders
    true = volume((1, slice(0, line), 2, 3), shape=(24, 9, 7))
    predicted = true.copy()
    predicted[0, 7, 3] = 1
    add("a", predicted, true)
    assert only(evaluate(predictions, labels, {1: "organ"}), "a").hd95_mm == pytest.approx(expected_mm, abs=1e-5)


def test_hd95_is_the_same_at_the_border_of_the_volume(folders):
    predictions, labels, add = folders
    add("inside", volume((1, slice(2, 9), slice(2, 7), slice(2, 5))), volume((1, slice(4, 9), slice(2, 7), slice(2, 5))))
    add("border", volume((1, slice(0, 7), slice(0, 5), slice(0, 3))), volume((1, slice(2, 7), slice(0, 5), slice(0, 3))))
    found = evaluate(predictions, labels, {1: "organ"})
    assert only(found, "inside").hd95_mm == pytest.approx(2.0, rel=1e-6)
    assert only(found, "border").hd95_mm == pytest.approx(2.0, rel=1e-6)


def test_a_perfect_prediction(folders):
    predictions, labels, add = folders
    true = volume((1, slice(1, 5), slice(1, 5), slice(1, 5)), (2, 7, 7, 2))
    add("a", true, true)
    found = evaluate(predictions, labels, {1: "x", 2: "y"})
    assert [(s.dice, s.hd95_mm) for s in found.scores] == [(1.0, 0.0), (1.0, 0.0)]
    assert found.mean_foreground_dice == 1.0


def test_absent_classes(folders):
    predictions, labels, add = folders
    one, other = (1, 2, 2, 2), (2, 5, 5, 5)
    add("both", volume(one, other), volume(one, other))
    add("neither", volume(one), volume(one))
    add("only_label", volume(one), volume(one, other))
    add("only_predicted", volume(one, other), volume(one))
    found = evaluate(predictions, labels, {1: "x", 2: "y", 3: "z"})
    cells = {case: (only(found, case, 2).dice, only(found, case, 2).hd95_mm, only(found, case, 2).hd95_undefined)
             for case in found.cases}
    assert cells == {"both": (1.0, 0.0, False), "neither": (None, None, False),
                     "only_label": (0.0, None, True), "only_predicted": (0.0, None, True)}
    rest = {case: (s.surface_dice, s.volume_error_ml, s.relative_volume_error)
            for case in found.cases for s in [only(found, case, 2)]}
    ml = pytest.approx(0.006)  # a voxel of 1 × 2 × 3 mm
    assert rest == {"both": (1.0, 0.0, 0.0), "neither": (None, None, None), "only_label": (0.0, pytest.approx(-0.006), -1.0),
                    "only_predicted": (0.0, ml, None)}
    y, z = (found.summary()["per_class"][name] for name in "yz")
    assert y["dice"]["count"] == 3
    assert y["dice"]["mean"] == pytest.approx(1 / 3)
    assert y["dice"]["median"] == 0.0
    assert y["dice"]["std"] == pytest.approx(np.std([1, 0, 0], ddof=1))
    assert (y["hd95_mm"]["count"], y["hd95_undefined"]) == (1, 2)
    assert (z["dice"]["count"], z["dice"]["mean"], z["hd95_undefined"]) == (0, None, 0)
    assert found.mean_foreground_dice == pytest.approx(np.mean([1, 1, 0.5, 0.5]))  # cases weigh alike
    assert mean_foreground_dice([s for s in found.scores if s.value == 3]) is None


def test_values_found_stand_in_for_names(folders):
    predictions, labels, add = folders
    add("a", volume((4, 1, 1, 1)), volume((4, 1, 1, 1)))
    add("b", volume((7, 1, 1, 1)), volume((9, 1, 1, 1)))
    found = evaluate(predictions, labels)
    assert found.classes == {4: "class_4", 7: "class_7", 9: "class_9"}
    assert only(found, "a", 7).dice is None
    assert only(found, "b", 7).dice == 0


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_values_beyond_a_byte(folders, dtype):
    predictions, labels, _ = folders
    save(labels / "a.nii.gz", volume((1, slice(0, 4), 1, 1)).astype(np.uint16) * 300, dtype=dtype)
    save(predictions / "a.nii.gz", volume((1, slice(0, 3), 1, 1)).astype(np.uint16) * 300, dtype=dtype)
    save(labels / "b.nii.gz", volume((44, 1, 1, 1)))  # 300 modulo 256, and a byte beside two
    save(predictions / "b.nii.gz", volume((1, 1, 1, 1)).astype(np.uint16) * 300, dtype=dtype)
    found = evaluate(predictions, labels)
    assert found.classes == {44: "class_44", 300: "class_300"}
    assert only(found, "a", 300).dice == pytest.approx(2 * 3 / (4 + 3))
    assert (only(found, "b", 44).dice, only(found, "b", 300).dice) == (0, 0)


# ---- surfaces, by other means -----------------------------------------------------------------------------------------

ANISOTROPIC_MM = (0.7, 1.3, 2.9)


def blobs(seed, shape=(23, 19, 14), classes=3):
    """Label map of smooth regions that touch each other and the border, with holes and stray voxels."""
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.standard_normal((classes + 1, *shape)), (0, 2, 2, 1.5))
    fields[1:] += 0.02 * rng.standard_normal((classes, *shape))
    return fields.argmax(0).astype(np.uint8)


def shifted(labels, seed):
    """A prediction that is off by a voxel here and by other classes there."""
    other = blobs(seed + 100, labels.shape)
    return np.where(np.random.default_rng(seed).random(labels.shape) < 0.05, other, np.roll(labels, 1, seed % 3))


@pytest.mark.parametrize("seed", range(4))
def test_hd95_equals_distance_transforms(seed):
    label = blobs(seed)
    predicted = shifted(label, seed)
    mine = surfaces(predicted, ANISOTROPIC_MM), surfaces(label, ANISOTROPIC_MM)
    for value in (1, 2, 3):
        masks = [np.pad(m == value, 1) for m in (predicted, label)]
        a, b = (mask & ~ndimage.binary_erosion(mask) for mask in masks)
        to_a, to_b = (ndimage.distance_transform_edt(~edge, sampling=ANISOTROPIC_MM) for edge in (a, b))
        expected = max(np.percentile(to_b[a], 95), np.percentile(to_a[b], 95))
        assert expected > 0
        assert hd95_mm(mine[0][value], mine[1][value]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_surface_dice_equals_monai(seed):
    # MONAI sums some thousand float32 areas in a tree: about 12 roundings of 6e-8. No distance on this grid is 1.5 mm.
    label = blobs(seed)
    predicted = shifted(label, seed)
    mine = surfaces(predicted, ANISOTROPIC_MM), surfaces(label, ANISOTROPIC_MM)
    for value in (1, 2, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = compute_surface_dice(*(torch.from_numpy(m == value)[None, None] for m in (predicted, label)), [1.5],
                                            include_background=True, spacing=ANISOTROPIC_MM, use_subvoxels=True)
        assert 0.1 < float(expected) < 0.99
        assert surface_dice(mine[0][value], mine[1][value], 1.5) == pytest.approx(float(expected), abs=1e-6)


def box_surface(low, high, spacing_mm):
    """Surface elements of a box of voxels from corner `low` to corner `high` (not of it): centres (n, 3) and areas.

    Between voxels i and i + 1 of an axis lies a cell; the box's surface passes through it where one of them is inside. Of the
    three axes one does on a face (a rectangle), two on an edge (a rectangle across the diagonal of the half cell), and three
    at a corner (the triangle between the middles of three edges).
    """
    centres, areas = [], []
    for cell in itertools.product(*(range(a - 1, b) for a, b in zip(low, high, strict=True))):
        crossed = [axis for axis in range(3) if (low[axis] <= cell[axis]) != (cell[axis] + 1 < high[axis])]
        inside = [axis for axis in range(3) if axis not in crossed]
        s = [spacing_mm[axis] for axis in crossed]
        if not crossed:
            continue
        if len(crossed) == 1:
            area = np.prod([spacing_mm[axis] for axis in inside])
        elif len(crossed) == 2:
            area = np.hypot(s[0] / 2, s[1] / 2) * spacing_mm[inside[0]]
        else:
            area = np.linalg.norm(np.cross([-s[0] / 2, s[1] / 2, 0], [-s[0] / 2, 0, s[2] / 2])) / 2
        centres.append((np.array(cell) + 0.5) * spacing_mm)
        areas.append(area)
    return np.array(centres), np.array(areas)


BOXES = {
    "inside": (((2, 2, 2), (9, 7, 5)), ((4, 2, 2), (9, 8, 6))),
    "at_the_border": (((0, 0, 0), (5, 9, 4)), ((0, 1, 0), (7, 9, 7))),
    "one_voxel": (((3, 3, 3), (4, 4, 4)), ((3, 3, 3), (5, 5, 4))),
    "apart": (((0, 0, 0), (2, 2, 2)), ((8, 5, 4), (12, 9, 7))),
}


@pytest.mark.parametrize("kind", BOXES)
@pytest.mark.parametrize("tolerance_mm", [0.0, 1.0, 1.5, 2.5])
def test_surface_dice_of_boxes_by_hand(kind, tolerance_mm):
    found, by_hand = [], []
    for low, high in BOXES[kind]:
        labels = volume((7, *(slice(a, b) for a, b in zip(low, high, strict=True))))
        found.append(surfaces(labels, ANISOTROPIC_MM)[7])
        by_hand.append(box_surface(low, high, np.array(ANISOTROPIC_MM)))
    (at_a, area_a), (at_b, area_b) = by_hand
    # The table of areas is float32.
    assert [s.areas_mm2.sum() for s in found] == pytest.approx([area_a.sum(), area_b.sum()], rel=1e-6)
    apart_mm = cdist(at_a, at_b)
    right = area_a[apart_mm.min(1) <= tolerance_mm].sum() + area_b[apart_mm.min(0) <= tolerance_mm].sum()
    assert surface_dice(*found, tolerance_mm) == pytest.approx(right / (area_a.sum() + area_b.sum()), rel=1e-6)


def test_a_distance_equal_to_the_tolerance_counts(folders):
    # The float32 of 0.8 is larger: two voxels of a file are 1.60000002 mm.
    predictions, labels, add = folders
    cube = volume((1, slice(2, 5), slice(2, 5), slice(2, 5)))
    for axis in range(3):
        for case, pair in ((f"behind{axis}", (cube, np.roll(cube, 2, axis))), (f"ahead{axis}", (np.roll(cube, 2, axis), cube))):
            add(case, *pair, affine=affine_of((0.8, 0.8, 0.8)))
    at, below = (evaluate(predictions, labels, tolerance_mm=t) for t in (1.6, 1.599))
    assert [s.surface_dice for s in at.scores] == [1.0] * 6
    assert all(0 < s.surface_dice < 1 for s in below.scores)


def test_a_tolerance_for_each_class(folders, tmp_path):
    predictions, labels, add = folders
    true = volume((1, slice(1, 4), slice(1, 4), 1), (2, slice(1, 4), slice(1, 4), 4))
    add("a", np.roll(true, 2, 0), true)
    base = ["--predictions", str(predictions), "--labels", str(labels), "--out", str(tmp_path / "out"), "--overwrite"]
    assert main([*base, "--classes", "background", "x", "y", "--tolerance-mm", "2", "0.5"]) == 0
    x, y = read_scores(tmp_path / "out" / "per_case.csv")
    assert (x.surface_dice, x.tolerance_mm, y.tolerance_mm) == (1.0, 2.0, 0.5)
    assert y.surface_dice < 1
    for extra, reason in ((["--tolerance-mm", "1", "2"], "know the classes"), (["--tolerance-mm", "-1"], "0 mm or more"),
                          (["--tolerance-mm", "nan"], "0 mm or more"), (["--workers", "0"], "--workers"),
                          (["--tolerance-mm", "1", "2", "3", "--classes", "b", "x", "y"], "one for each of the 2"),
                          (["--resamples", "99"], "at least 100"), (["--seed", "-1"], "--seed must be at least 0")):
        with pytest.raises(InputError, match=reason):
            main([*base, *extra])


# ---- side by side -----------------------------------------------------------------------------------------------------


def test_processes_give_the_same_scores(folders, monkeypatch):
    predictions, labels, add = folders
    for i in range(4):
        label = blobs(i)
        add(f"case{i}", shifted(label, i), label)
    save(predictions / "case2.nii.gz", np.ones((3, 3, 3)))
    alone = evaluate(predictions, labels, {1: "x", 2: "y", 3: "z"})
    monkeypatch.setattr(cohort, "WORTH_S", 0.0)
    assert evaluate(predictions, labels, {1: "x", 2: "y", 3: "z"}, workers=2) == alone
    assert list(alone.rejected) == ["case2"]


def test_a_process_that_dies_costs_its_case_alone(folders, monkeypatch):
    predictions, labels, add = folders
    for case in "abcde":
        add(case, volume((1, 1, 1, 1)), volume((1, 1, 1, 1)))
    pools = []

    def in_processes(work, items, workers):
        """A pool that ends with the process that takes case d, as soon as one takes it."""
        pools.append(([item.case for item in items], workers))
        for item in items:
            if item.case == "d":
                raise InputError("a worker process ended abruptly")
            yield work(item)

    monkeypatch.setattr(cohort, "in_processes", in_processes)
    monkeypatch.setattr(cohort, "WORTH_S", 0.0)
    found = evaluate(predictions, labels, workers=3)
    assert pools == [(["b", "c", "d", "e"], 3), (["d"], 1), (["e"], 1)]
    assert found.cases == ("a", "b", "c", "e")
    assert list(found.rejected) == ["d"]
    assert "ended abruptly" in found.rejected["d"]


def test_little_work_starts_no_process(folders, monkeypatch):
    predictions, labels, add = folders
    for case in "ab":
        add(case, volume((1, 1, 1, 1)), volume((1, 1, 1, 1)))
    monkeypatch.setattr(cohort, "in_processes", None)
    assert evaluate(predictions, labels, workers=8).cases == ("a", "b")


# ---- the command ------------------------------------------------------------------------------------------------------


def test_command_writes_both_files(folders, tmp_path, capsys):
    predictions, labels, add = folders
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "spleen": 2}}))
    add("a", volume((1, slice(2, 6), 4, 3)), volume((1, slice(4, 7), 4, 3), (2, 1, 1, 1)))
    assert main(["--predictions", str(predictions), "--labels", str(labels), "--out", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "per_case.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["case", "class", "class_name", "dice", "surface_dice", "hd95_mm", "volume_error_ml",
                       "relative_volume_error", "label_voxels", "predicted_voxels", "tolerance_mm"]
    # From the prediction's voxels to the label's: 2, 1, 0 and 0 mm, of which the 95th percentile is 0.15 × 1 + 0.85 × 2.
    # No part of either surface is farther than 2 mm from the other. A voxel has 1 × 2 × 3 mm³.
    assert rows[1] == ["a", "1", "liver", "0.571429", "1.000000", "1.850000", "0.006000", "0.333333", "3", "4", "2.0"]
    assert rows[2] == ["a", "2", "spleen", "0.000000", "0.000000", "", "-0.006000", "-1.000000", "1", "0", "2.0"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["mean_foreground_dice"] == pytest.approx(2 / 7)
    assert summary["cases"] == 1
    one = {"interval": None, "std": None, "count": 1}
    assert summary["per_class"]["spleen"] == {
        "value": 2, "tolerance_mm": 2.0, "hd95_undefined": 1,
        "dice": {"mean": 0.0, "median": 0.0, **one}, "surface_dice": {"mean": 0.0, "median": 0.0, **one},
        "hd95_mm": {"mean": None, "interval": None, "median": None, "std": None, "count": 0},
        "volume_error_ml": {"mean": pytest.approx(-0.006), "median": pytest.approx(-0.006), **one,
                            "mean_absolute": pytest.approx(0.006)},
        "relative_volume_error": {"mean": -1.0, "median": -1.0, **one, "mean_absolute": 1.0}}
    assert {m: of["mean"] for m, of in summary["mean_over_classes"].items()} == {
        "dice": pytest.approx(2 / 7), "surface_dice": pytest.approx(0.5), "hd95_mm": pytest.approx(1.85)}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["per_case.csv", "summary.json"]
    table = capsys.readouterr().out
    assert "liver" in table
    assert "no intervals: fewer than 6 cases" in table
    scores = read_scores(tmp_path / "out" / "per_case.csv")
    assert dataclasses.astuple(scores[0]) == ("a", 1, "liver", 0.571429, 1.85, 3, 4, 1.0, 2.0, 0.006)
    assert (scores[1].hd95_mm, scores[1].predicted_voxels, scores[1].relative_volume_error) == (None, 0, -1.0)


def test_missing_prediction_is_named_and_the_rest_scored(folders, tmp_path, capsys):
    predictions, labels, add = folders
    add("a", volume((1, 1, 1, 1)), volume((1, 1, 1, 1)))
    add("lost", None, volume((1, 1, 1, 1)))
    add("extra", volume((1, 1, 1, 1)), None)
    assert main(["--predictions", str(predictions), "--labels", str(labels), "--out", str(tmp_path / "out")]) == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["missing_predictions"] == ["lost"]
    assert summary["predictions_without_label"] == ["extra"]
    assert (summary["cases"], summary["mean_foreground_dice"]) == (1, 1.0)
    output = capsys.readouterr()
    assert "1 of 2 labels have no prediction" in output.err
    assert "lost" in output.err
    assert "extra" in output.out


BAD_PAIRS = {
    "shape": (lambda p: save(p, np.ones((12, 9, 8))), "shape"),
    "affine": (lambda p: save(p, np.ones(SHAPE), affine_of(origin_mm=(-20.0, 11.0, 5.2))), "affines"),
    "spacing": (lambda p: save(p, np.ones(SHAPE), affine_of((1.0, 2.0, 3.02))), "affines"),
    "flip": (lambda p: save(p, np.ones(SHAPE), affine_of((-1.0, 2.0, 3.0))), "affines"),
    "4d": (lambda p: save(p, np.ones((*SHAPE, 2))), "4 axes"),
    "fraction": (lambda p: save(p, np.full(SHAPE, 0.5), dtype=np.float32), "whole numbers"),
    "nan": (lambda p: save(p, np.full(SHAPE, np.nan), dtype=np.float32), "classes from 0"),
    "negative": (lambda p: save(p, np.full(SHAPE, -1), dtype=np.int16), "classes from 0"),
    "unknown_class": (lambda p: save(p, np.full(SHAPE, 5)), "no class"),
    "damaged": (lambda p: p.write_bytes(b"not a NIfTI file"), "not a readable NIfTI"),
}


@pytest.mark.parametrize("kind", BAD_PAIRS)
def test_a_pair_that_cannot_be_compared_is_left_out_and_named(folders, tmp_path, capsys, kind):
    predictions, labels, add = folders
    add("good", volume((1, 1, 1, 1)), volume((1, 1, 1, 1)))
    add("bad", None, volume((1, 1, 1, 1)))
    write, reason = BAD_PAIRS[kind]
    write(predictions / "bad.nii.gz")
    arguments = ["--predictions", str(predictions), "--labels", str(labels), "--out", str(tmp_path / "out"),
                 "--classes", "background", "organ"]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert reason in error
    assert str(predictions / "bad.nii.gz") in error
    assert error.count("\n") == 1
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert list(summary["rejected"]) == ["bad"]
    assert summary["cases"] == 1
    if kind in ("shape", "affine", "spacing", "flip"):
        assert str(labels / "bad.nii.gz") in error


def test_a_truncated_file_is_left_out(folders):
    predictions, labels, add = folders
    rng = np.random.default_rng(0)
    for case in ("good", "bad"):
        add(case, rng.integers(0, 2, SHAPE), rng.integers(0, 2, SHAPE))
    whole = (labels / "bad.nii.gz").read_bytes()
    (labels / "bad.nii.gz").write_bytes(whole[:-60])
    found = evaluate(predictions, labels)
    assert list(found.rejected) == ["bad"]
    assert str(labels / "bad.nii.gz") in found.rejected["bad"]
    assert found.cases == ("good",)


def test_rounding_of_a_header_is_no_other_geometry(folders):
    predictions, labels, add = folders
    add("a", None, volume((1, 1, 1, 1)))
    save(predictions / "a.nii.gz", volume((1, 1, 1, 1)), affine_of() + 1e-4)
    assert evaluate(predictions, labels).complete


def test_nothing_scored_is_an_error(folders, tmp_path, capsys):
    predictions, labels, add = folders
    with pytest.raises(InputError, match="holds no label map"):
        evaluate(predictions, labels)
    add("a", None, volume((1, 1, 1, 1)))
    with pytest.raises(InputError, match=r"no prediction for any of the 1 labels"):
        evaluate(predictions, labels)
    save(predictions / "a.nii.gz", np.ones((3, 3, 3)))
    with pytest.raises(InputError, match="shape"):
        evaluate(predictions, labels)
    add("a", volume(), volume())
    with pytest.raises(InputError, match="nothing to score"):
        evaluate(predictions, labels)
    with pytest.raises(InputError, match="is not a folder"):
        evaluate(tmp_path / "nowhere", labels)
    arguments = ["--predictions", str(predictions), "--labels", str(tmp_path / "no"), "--out", str(tmp_path / "out")]
    assert run("evaluate", main, arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_evaluation_is_not_overwritten(folders, tmp_path):
    predictions, labels, add = folders
    add("a", volume((1, 1, 1, 1)), volume((1, 1, 1, 1)))
    base = ["--labels", str(labels), "--out", str(tmp_path / "out")]
    assert main(["--predictions", str(predictions), *base]) == 0
    assert main(["--predictions", str(predictions), *base]) == 0  # the same again is fine
    kept = (tmp_path / "out" / "per_case.csv").read_bytes()
    save(tmp_path / "second" / "a.nii.gz", volume((1, slice(1, 3), 1, 1)))
    with pytest.raises(InputError, match="holds another evaluation"):
        main(["--predictions", str(tmp_path / "second"), *base])
    assert (tmp_path / "out" / "per_case.csv").read_bytes() == kept
    assert main(["--predictions", str(tmp_path / "second"), *base, "--overwrite"]) == 0
    assert read_scores(tmp_path / "out" / "per_case.csv")[0].predicted_voxels == 2
    (tmp_path / "out" / "summary.json").unlink()
    with pytest.raises(InputError, match="holds another evaluation"):
        main(["--predictions", str(tmp_path / "second"), *base])


def test_where_class_names_come_from(tmp_path):
    labels = tmp_path / "labelsTs"
    assert resolve_classes((), labels) is None
    v1, v2 = tmp_path / "v1.json", tmp_path / "dataset.json"
    v1.write_text(json.dumps({"labels": {"0": "background", "2": "b", "1": "a"}}))
    v2.write_text(json.dumps({"labels": {"background": 0, "c": 1, "d": 2}}))
    assert resolve_classes((), labels) == {1: "c", 2: "d"}
    assert resolve_classes((str(v1),), labels) == {1: "a", 2: "b"}
    assert resolve_classes(("background", "x", "y"), labels) == {1: "x", 2: "y"}
    preset = tmp_path / "mine.yaml"
    preset.write_text("classes: [background, p, q]\n")
    assert resolve_classes((str(preset),), labels) == {1: "p", 2: "q"}


@pytest.mark.parametrize(("labels", "reason"), [
    ({"background": 0, "whole": [1, 2]}, "regions"), ({"background": 0, "a": 1, "ignore": 2}, "ignore"),
    ({"background": 0, "a": 1, "b": 1}, "two names"), ({"background": 0, "a": 2}, "gap")])
def test_class_maps_that_cannot_be_used(tmp_path, labels, reason):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": labels}))
    with pytest.raises(InputError, match=reason):
        resolve_classes((str(path),), tmp_path)
    path.write_text(json.dumps([labels]))
    with pytest.raises(InputError, match=r"no dataset\.json"):
        resolve_classes((str(path),), tmp_path)


@pytest.mark.parametrize("classes", [("background", "a", "a"), ("no_such_preset",), ("missing.json",)])
def test_class_names_that_cannot_be_used(tmp_path, classes):
    with pytest.raises(InputError):
        resolve_classes(classes, tmp_path)


def test_read_scores_wants_its_own_table(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_scores(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="columns"):
        read_scores(tmp_path / "other.csv")
