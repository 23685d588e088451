"""Scores against values worked out by hand, and what happens to pairs that cannot be scored."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from dropgen_fast.cli import run
from dropgen_fast.errors import InputError
from dropgen_fast.evaluate import evaluate, main, mean_foreground_dice, read_scores, resolve_classes

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


def test_command_writes_both_files(folders, tmp_path, capsys):
    predictions, labels, add = folders
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "liver": 1, "spleen": 2}}))
    add("a", volume((1, slice(2, 6), 4, 3)), volume((1, slice(4, 7), 4, 3), (2, 1, 1, 1)))
    assert main(["--predictions", str(predictions), "--labels", str(labels), "--out", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "per_case.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["case", "class", "class_name", "dice", "hd95_mm", "label_voxels", "predicted_voxels"]
    # From the prediction's voxels to the label's: 2, 1, 0 and 0 mm, of which the 95th percentile is 0.15 × 1 + 0.85 × 2.
    assert rows[1] == ["a", "1", "liver", "0.571429", "1.850000", "3", "4"]
    assert rows[2] == ["a", "2", "spleen", "0.000000", "", "1", "0"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["mean_foreground_dice"] == pytest.approx(2 / 7)
    assert summary["cases"] == 1
    assert summary["per_class"]["spleen"] == {
        "value": 2, "dice": {"mean": 0.0, "median": 0.0, "std": None, "count": 1},
        "hd95_mm": {"mean": None, "median": None, "std": None, "count": 0}, "hd95_undefined": 1}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["per_case.csv", "summary.json"]
    assert "liver" in capsys.readouterr().out
    scores = read_scores(tmp_path / "out" / "per_case.csv")
    assert (scores[0].dice, scores[1].hd95_mm, scores[1].predicted_voxels) == (0.571429, None, 0)


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
