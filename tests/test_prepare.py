"""`prepare`: which files, what the store holds, what is refused, and that nothing half-written is ever read."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nifti_factory import blobs, make_affine, write_cohort, write_nifti

from dropgen_fast.cli import run
from dropgen_fast.data.cohort import read_cohort, read_images, split_off_validation, target_spacing_mm
from dropgen_fast.data.prepare import Settings, minmax, prepare_image
from dropgen_fast.data.store import Store
from dropgen_fast.errors import InputError
from dropgen_fast.prepare import main


def prepare(source: Path, store: Path, *options: str) -> int:
    return run("prepare", main, ["--source", str(source), "--store", str(store), "--workers", "1", *options])


def ids(store: Path, split: str = "train") -> list[str]:
    return [case.id for case in Store.open(store).cases(split)]


def rewrite(path: Path, change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray | None = None) -> None:
    image = nib.load(path)
    array = change(np.asanyarray(image.dataobj).copy())
    nib.save(nib.Nifti1Image(array, image.affine if affine is None else affine), path)


# --- what is prepared ---------------------------------------------------------------------------------------------------


def test_store_holds_the_cohort(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_cohort(tmp_path / "cohort", channels=2, spacing_mm=(1, 1.5, 2), axcodes="LIA")
    assert prepare(source, tmp_path / "store", "--spacing-mm", "1", "1", "1") == 0
    assert "5 cases (3 train, 1 val, 1 test), 5 of them prepared now" in capsys.readouterr().out
    store = Store.open(tmp_path / "store")
    assert store.classes == ("background", "tissue 1", "tissue 2")
    assert store.channels == ("channel 0", "channel 1")
    assert [len(store.cases(s)) for s in ("train", "val", "test")] == [3, 1, 1]
    case = store.cases("train")[0]
    image, label = store.load(case)
    assert image.shape == (24, 30, 44, 2) == (*case.shape, 2)
    assert image.dtype == np.float32
    assert label is not None
    assert (label.shape, label.dtype) == ((24, 30, 44, 1), np.dtype(np.uint8))
    assert image.min(axis=(0, 1, 2)).tolist() == [0, 0]
    assert image.max(axis=(0, 1, 2)).tolist() == [1, 1]
    assert case.sources == (source / "imagesTr/train_0_0000.nii.gz", source / "imagesTr/train_0_0001.nii.gz")
    assert case.label_source == source / "labelsTr/train_0.nii.gz"
    np.testing.assert_allclose(case.info["original_affine"], nib.load(case.sources[0]).affine)
    # Brighter where the label is higher, which only holds where image and label are on one grid.
    means = [image[..., 0][label[..., 0] == k].mean() for k in range(3)]
    assert means[0] < means[1] - 0.1 < means[2] - 0.2

    rows = np.load(case.foreground)
    assert rows[0].tolist() == [24, 30, 44]
    values = label[..., 0][tuple(rows[1:].T)]
    assert np.bincount(values).tolist() == [0, 4096, 4096]  # both classes alike
    statistics = case.info["intensities"][0]
    raw = nib.load(case.sources[0]).get_fdata()
    assert statistics["min"] >= raw.min()
    assert statistics["max"] <= raw.max()
    assert statistics["mean"] == pytest.approx(raw.mean(), rel=0.01)
    assert {int(k): n for k, n in case.info["label_voxels"].items()} == dict(
        zip(*np.unique(nib.load(source / "labelsTr/train_0.nii.gz").dataobj, return_counts=True), strict=True))


def test_window_clips_and_scales_and_prediction_sees_the_same(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "cohort", axcodes="LAS")
    assert prepare(source, tmp_path / "store", "--intensity-window", "200", "700", "--spacing-mm", "1", "1", "1.3") == 0
    store = Store.open(tmp_path / "store")
    case = store.cases("test")[0]
    image = prepare_image(case.sources, store.spacing_mm, store.intensity_window)
    np.testing.assert_array_equal(store.load(case)[0], image.array)
    np.testing.assert_allclose(case.info["prepared_affine"], image.affine)
    unclipped = prepare_image(case.sources, store.spacing_mm)
    low, high = image.statistics[0]["min"], image.statistics[0]["max"]
    np.testing.assert_allclose(image.array, np.clip((unclipped.array * (high - low) + low - 200) / 500, 0, 1), atol=1e-5)


def test_minmax() -> None:
    array = np.array([[3, 5], [4, 7]], np.int16)
    np.testing.assert_array_equal(minmax(array), np.array([[0, 0.5], [0.25, 1]], np.float32))
    np.testing.assert_array_equal(minmax(np.full((2, 2), 7.0)), np.zeros((2, 2)))


# Half a step of each type for numbers up to 1; int16 with two roundings to float32 near 1 on the way.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2**-12), ("int16", 0.5 / 32767 + 2 * 2**-24)])
def test_two_bytes_halve_the_images(tmp_path: Path, dtype: str, tolerance: float) -> None:
    source = write_cohort(tmp_path / "cohort", {"train": 1, "val": 1})
    for name in ("float32", dtype):
        assert prepare(source, tmp_path / name, "--dtype", name) == 0
    full, half = (Store.open(tmp_path / name) for name in ("float32", dtype))
    a, b = (s.cases("train")[0] for s in (full, half))
    assert b.layout.image_bytes * 2 == a.layout.image_bytes
    np.testing.assert_allclose(half.load(b)[0], full.load(a)[0], rtol=0, atol=tolerance)
    np.testing.assert_array_equal(half.load(b)[1], full.load(a)[1])
    assert full.identity() != half.identity()


def test_bricks_of_another_size_hold_the_same(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "cohort", {"train": 1})
    assert prepare(source, tmp_path / "usual") == 0
    assert prepare(source, tmp_path / "other", "--brick", "16", "8", "8") == 0
    usual, other = (Store.open(tmp_path / name) for name in ("usual", "other"))
    assert other.cases("train")[0].layout.brick == (16, 8, 8)
    for a, b in zip(usual.load(usual.cases("train")[0]), other.load(other.cases("train")[0]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert usual.identity() != other.identity()


def test_labels_up_to_255(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "cohort", {"train": 1, "val": 1}, dataset_json=False)
    rewrite(source / "labelsTr/train_0.nii.gz", lambda a: np.where(a == 2, 255, a).astype(np.uint8))
    assert prepare(source, tmp_path / "store") == 0
    store = Store.open(tmp_path / "store")
    assert len(store.classes) == 256
    _, label = store.load(store.cases("train")[0])
    assert label is not None
    assert set(np.unique(label)) == {0, 1, 255}


def test_spacing_comes_from_preset_or_median(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "cohort", {"train": 1, "val": 1}, axcodes="SRA", spacing_mm=(1, 1.5, 2), dataset_json=False)
    write_nifti(source / "imagesTr/a.nii.gz", blobs((9, 9, 9))[0], make_affine((3, 1.5, 1)))
    write_nifti(source / "labelsTr/a.nii.gz", blobs((9, 9, 9))[1], make_affine((3, 1.5, 1)))
    assert prepare(source, tmp_path / "median") == 0
    assert Store.open(tmp_path / "median").spacing_mm == (2, 1.5, 1.5)
    (tmp_path / "p.yaml").write_text("spacing_mm: [2, 2, 3]\nclasses: [background, one, two]\n")
    assert prepare(source, tmp_path / "preset", "--preset", str(tmp_path / "p.yaml")) == 0
    store = Store.open(tmp_path / "preset")
    assert store.spacing_mm == (2, 2, 3)
    assert store.classes == ("background", "one", "two")


def test_thick_slices_take_the_tenth_percentile() -> None:
    """nnU-Net's rule, by hand: 11 spacings of 4 to 14 mm, whose median is 9 and 10th percentile 5."""
    thick: list[tuple[float, ...]] = [(1.0, 5.0, 4.0 + i) for i in range(11)]
    few = [(300, 300, 40)] * 11
    assert target_spacing_mm([(1.0, 2.0, s[2]) for s in thick], few) == (1, 2, 5)
    assert target_spacing_mm([(1.0, 3.0, s[2]) for s in thick], few) == (1, 3, 9)  # 9 is 3 times the others, no more
    assert target_spacing_mm([(1.0, 2.0, s[2]) for s in thick], [(300, 300, 100)] * 11) == (1, 2, 9)  # slices enough
    assert target_spacing_mm([(s[2], 2.0, 1.0) for s in thick], [(40, 300, 300)] * 11) == (5, 2, 1)
    # The 10th percentile of this one is 1.1 mm: never finer than the other axes.
    assert target_spacing_mm([(1.0, 2.0, s) for s in (1.0, 1.1, *[9.0] * 9)], few) == (1, 2, 2)


def test_two_workers_do_what_one_does(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "cohort", {"train": 3})
    assert prepare(source, tmp_path / "one") == 0
    assert main(["--source", str(source), "--store", str(tmp_path / "two"), "--workers", "2"]) == 0
    assert Store.open(tmp_path / "one").identity() == Store.open(tmp_path / "two").identity()


# --- which files --------------------------------------------------------------------------------------------------------


def test_ids_that_end_in_four_digits(tmp_path: Path) -> None:
    """`amos_0001` with a label of the same name is a case, not channel 1; without labels in imagesTs too."""
    for i in range(3):
        for folder in ("imagesTr", "labelsTr", "imagesTs"):
            write_nifti(tmp_path / folder / f"amos_{i + (folder == 'imagesTs') * 5:04d}.nii.gz", np.ones((2, 2, 2), np.uint8),
                        np.eye(4))
    cohort = read_cohort(tmp_path)
    assert [c.id for c in cohort.cases] == [f"amos_{i:04d}" for i in (0, 1, 2, 5, 6, 7)]
    assert [c.label is None for c in cohort.cases] == [False] * 3 + [True] * 3


def test_channels_belong_to_one_case(tmp_path: Path) -> None:
    source = write_cohort(tmp_path, channels=3, dataset_json=False)
    (source / "imagesTr/.hidden_0000.nii.gz").touch()
    cohort = read_cohort(source)
    assert len(cohort.cases) == 5
    assert [p.name for p in cohort.cases[0].images] == [f"train_0_{c:04d}.nii.gz" for c in range(3)]
    assert cohort.classes is None


def test_images_alone(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "cohort", {"train": 2}, channels=2)
    cohort = read_images(source / "imagesTr")
    assert [(c.id, len(c.images), c.label) for c in cohort.cases] == [("train_0", 2, None), ("train_1", 2, None)]
    (source / "imagesTr/train_0_0000.nii.gz").unlink()
    cohort = read_images(source / "imagesTr")
    assert [c.id for c in cohort.cases] == ["train_1"]
    assert [c.id for c in cohort.left_out] == ["train_0"]
    for name in ("amos_0117", "amos_0004", "plain"):
        write_nifti(tmp_path / "amos" / f"{name}.nii", np.ones((2, 2, 2), np.uint8), np.eye(4))
    assert [c.id for c in read_images(tmp_path / "amos").cases] == ["amos_0004", "amos_0117", "plain"]
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=str(folder)):
            read_images(folder)


@pytest.mark.parametrize("labels", [{"background": 0, "b": 2, "a": 1}, {"0": "background", "1": "a", "2": "b"}])
def test_class_names_of_both_nnunet_versions(tmp_path: Path, labels: dict[str, object]) -> None:
    source = write_cohort(tmp_path)
    (source / "dataset.json").write_text(json.dumps({"labels": labels, "modality": {"0": "MR"}}))
    cohort = read_cohort(source)
    assert cohort.classes == ("background", "a", "b")
    assert cohort.channels == ("MR",)


def write_csv(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_csv(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "data", {"train": 2, "val": 1, "test": 1}, channels=2)
    rows: list[dict[str, object]] = [
        {"case": name, "image_0000": f"data/{folder}/{name}_0000.nii.gz", "image_0001": source / folder / f"{name}_0001.nii.gz",
         "label": "" if split == "test" else f"data/{folder.replace('images', 'labels')}/{name}.nii.gz", "split": split}
        for name, folder, split in (("train_0", "imagesTr", "train"), ("train_1", "imagesTr", "Train"),
                                    ("val_0", "imagesVal", "val"), ("test_0", "imagesTs", "test"))]
    assert prepare(write_csv(tmp_path / "split.csv", rows), tmp_path / "store") == 0
    store = Store.open(tmp_path / "store")
    assert store.classes == ("background", "class_1", "class_2")
    assert [c.id for s in ("train", "val", "test") for c in store.cases(s)] == ["train_0", "train_1", "val_0", "test_0"]
    assert store.cases("test")[0].label_source is None
    assert store.load(store.cases("test")[0])[1] is None


def test_val_fraction(tmp_path: Path) -> None:
    cohort = read_cohort(write_cohort(tmp_path, {"train": 10}, shape=(4, 4, 4)))
    split = split_off_validation(cohort, 0.3, seed=1)
    moved = {c.id for c in split.split("val")}
    assert len(moved) == 3
    assert {c.id for c in split.split("train")} | moved == {c.id for c in cohort.cases}
    assert {c.id for c in split_off_validation(cohort, 0.3, seed=1).split("val")} == moved
    assert {c.id for c in split_off_validation(cohort, 0.3, seed=2).split("val")} != moved
    reordered = dataclasses.replace(cohort, cases=cohort.cases[::-1])
    assert {c.id for c in split_off_validation(reordered, 0.3, seed=1).split("val")} == moved
    with pytest.raises(InputError, match="has 3 val cases"):
        split_off_validation(split, 0.3, seed=1)


# --- bad cases: reported, counted, left out, and the others prepared ----------------------------------------------------

IMAGE, LABEL = "imagesTr/train_1_0000.nii.gz", "labelsTr/train_1.nii.gz"


def nan(array: np.ndarray) -> np.ndarray:
    array[3, 4, 5] = np.nan
    return array


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


BAD_CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing label": (lambda s: (s / LABEL).unlink(), "missing label"),
    "missing channel": (lambda s: (s / "imagesTr/train_1_0001.nii.gz").unlink(), "missing channel"),
    "surplus channel": (lambda s: (s / IMAGE).rename(s / "imagesTr/train_1_0002.nii.gz"), "missing channel"),
    "label shape": (lambda s: rewrite(s / LABEL, lambda a: a[:-1]), "shapes differ"),
    "label affine": (lambda s: rewrite(s / LABEL, lambda a: a, make_affine(origin_mm=(-19.8, -25, -30))), "affines differ"),
    "channel affine": (lambda s: rewrite(s / "imagesTr/train_1_0001.nii.gz", lambda a: a, make_affine((1, 1, 1.01))),
                       "affines differ"),
    "label outside": (lambda s: rewrite(s / LABEL, lambda a: np.where(a == 2, 7, a).astype(np.uint8)), "outside the class map"),
    "label negative": (lambda s: rewrite(s / LABEL, lambda a: a.astype(np.int16) - 1), "outside the class map"),
    "label 256": (lambda s: rewrite(s / LABEL, lambda a: a.astype(np.int16) * 128), "outside the class map"),
    "label fractions": (lambda s: rewrite(s / LABEL, lambda a: a * np.float32(0.5)), "not whole numbers"),
    "label NaN": (lambda s: rewrite(s / LABEL, lambda a: nan(a.astype(np.float32))), "1 voxels that are NaN"),
    "NaN": (lambda s: rewrite(s / IMAGE, nan), "1 voxels that are NaN"),
    "infinite": (lambda s: rewrite(s / IMAGE, lambda a: np.where(a > 900, np.inf, a).astype(np.float32)), "NaN or infinite"),
    "constant": (lambda s: rewrite(s / IMAGE, lambda a: np.full_like(a, 3)), "constant"),
    "4D": (lambda s: rewrite(s / IMAGE, lambda a: np.stack([a, a], -1)), "4 axes"),
    "truncated": (lambda s: truncate(s / IMAGE), "truncated"),
    "truncated label": (lambda s: (s / LABEL).write_bytes((s / LABEL).read_bytes()[:400]),
                        "truncated"),
    "garbage": (lambda s: (s / IMAGE).write_bytes(gzip.compress(b"0" * 999)), "not a readable NIfTI"),
    "used twice": (lambda s: (s / IMAGE).rename(s / "imagesTr/train_1_0000.nii") and [
        os.link(s / "imagesTr/train_1_0000.nii", s / IMAGE)], "two files for channel 0"),
    "in two splits": (lambda s: [os.link(p, s / p.parent.name.replace("Tr", "Val") / p.name) for p in
                                 (s / IMAGE, s / LABEL, s / "imagesTr/train_1_0001.nii.gz")], "used 2 times"),
}


@pytest.mark.parametrize("kind", BAD_CASES)
def test_a_bad_case_is_left_out_and_stops_nothing(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = BAD_CASES[kind]
    source = write_cohort(tmp_path / "cohort", channels=2)
    spoil(source)
    assert prepare(source, tmp_path / "store") == 1
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith("left out: ")]
    assert len(lines) == 1
    assert "case train_1: " in lines[0]
    assert message in lines[0]
    assert str(source) in lines[0]  # the file at fault, or its folder
    assert "4 cases (2 train, 1 val, 1 test)" in output.out
    assert "1 left out" in output.out
    assert ids(tmp_path / "store") == ["train_0", "train_2"]
    assert not [p for p in (tmp_path / "store" / "cases").iterdir() if "train_1" in p.name]

    assert prepare(source, tmp_path / "strict", "--strict") == 2
    assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="not a prepared store"):
        Store.open(tmp_path / "strict")


def test_tiny_differences_of_affines_are_no_error(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "cohort", {"train": 2, "val": 1})
    rewrite(source / LABEL, lambda a: a, make_affine(origin_mm=(-20 + 1e-4, -25, -30)))
    assert prepare(source, tmp_path / "store") == 0


def test_a_label_with_a_scale_factor_is_whole(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "cohort", {"train": 2, "val": 1})
    image = nib.load(source / LABEL)
    scaled = nib.Nifti1Image(np.asanyarray(image.dataobj).astype(np.float32), image.affine)
    scaled.set_data_dtype(np.int16)
    nib.save(scaled, source / LABEL)
    assert nib.load(source / LABEL).dataobj.slope != 1
    assert prepare(source, tmp_path / "store") == 0


def test_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_cohort(tmp_path / "cohort", {"train": 2}, classes=4)
    for i in range(2):
        rewrite(source / f"labelsTr/train_{i}.nii.gz", lambda a: np.where(a == 3, 0, a).astype(np.uint8))
    rewrite(source / LABEL, np.zeros_like)
    write_nifti(source / "labelsTr/nobody.nii.gz", np.zeros((2, 2, 2), np.uint8), np.eye(4))
    assert prepare(source, tmp_path / "store") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 4
    for fragment in ("nobody.nii.gz", "train_1.nii.gz is all background", "class 3 (tissue 3) occurs in no training label",
                     "no val split"):
        assert sum(fragment in w for w in warnings) == 1, fragment


# --- bad cohorts and bad settings: one line, status 2 -------------------------------------------------------------------


def dataset_json(source: Path, **entries: object) -> None:
    (source / "dataset.json").write_text(json.dumps(entries))


BAD_COHORTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no training images": (lambda s: [p.unlink() for p in (s / "imagesTr").iterdir()], "has no training images"),
    "no folder": (lambda s: (s / "imagesTr").rename(s / "elsewhere"), "has no folder imagesTr"),
    "no case left": (lambda s: [truncate(p) for p in (s / "imagesTr").iterdir()], "no training case could be prepared"),
    "no label at all": (lambda s: [p.unlink() for p in (s / "labelsTr").iterdir()], "no training case is usable"),
    "gap": (lambda s: dataset_json(s, labels={"background": 0, "a": 1, "b": 3}), "without a gap"),
    "no background": (lambda s: dataset_json(s, labels={"a": 1, "b": 2}), "numbered 0 to 1"),
    "twice": (lambda s: dataset_json(s, labels={"background": 0, "a": 1, "b": 1}), "two names"),
    "regions": (lambda s: dataset_json(s, labels={"background": 0, "whole": [1, 2]}), "regions"),
    "ignore": (lambda s: dataset_json(s, labels={"background": 0, "a": 1, "ignore": 2}), "ignore"),
    "no numbers": (lambda s: dataset_json(s, labels={"background": 0, "a": 1.5}), "no whole number"),
    "broken JSON": (lambda s: (s / "dataset.json").write_text("{"), "not readable JSON"),
    "other format": (lambda s: dataset_json(s, file_ending=".mha"), ".mha"),
}


@pytest.mark.parametrize("kind", BAD_COHORTS)
def test_a_bad_cohort_is_one_line(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, message = BAD_COHORTS[kind]
    source = write_cohort(tmp_path / "cohort")
    spoil(source)
    options = ["--spacing-mm", "1", "1", "1"] if kind == "no case left" else []
    assert prepare(source, tmp_path / "store", *options) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert str(source) in error[0]


@pytest.mark.parametrize(("options", "message"), [
    (["--spacing-mm", "1", "0", "1"], "three positive numbers"), (["--intensity-window", "5", "5"], "low < high"),
    (["--classes", "background"], "at least two names"), (["--classes", "a", "b"], "they must agree"),
    (["--preset", "brats"], "they must agree"), (["--preset", "nothing"], "no preset"), (["--val-fraction", "0.5"], "val split"),
    (["--intensity-window", "5000", "6000"], "constant")])
def test_bad_settings(tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_cohort(tmp_path / "cohort")
    assert prepare(source, tmp_path / "store", *options) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]


@pytest.mark.parametrize(("change", "message"), [
    ({"split": "training"}, "line 2: split must be train, val or test"), ({"label": None}, "needs the columns label"),
    ({"split": None}, "needs the columns split"), ({"image": None}, "needs a column image"), ({"image_0000": "x"}, "has both"),
    ({"split": "val"}, "no row whose split is train"), ({"label": ""}, "missing label"),
    ({"image": "no.nii.gz"}, "missing image")])
def test_bad_csv(tmp_path: Path, change: dict[str, str | None], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_cohort(tmp_path, {"train": 1})
    row = {"image": "imagesTr/train_0_0000.nii.gz", "label": LABEL.replace("1", "0"), "split": "train", **change}
    source = write_csv(tmp_path / "split.csv", [{k: v for k, v in row.items() if v is not None}])
    assert prepare(source, tmp_path / "store") == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]
    assert str(source) in error[0]


def test_duplicate_ids_in_csv_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_cohort(tmp_path, {"train": 2})
    rows: list[dict[str, object]] = [{"case": case, "image": f"imagesTr/train_{i}_0000.nii.gz",
                                      "label": f"labelsTr/train_{i}.nii.gz", "split": "train"}
                                     for case, i in (("a", 0), ("b", 0), ("b", 1), ("../c", 1))]
    assert prepare(write_csv(tmp_path / "split.csv", rows), tmp_path / "store") == 1
    error = capsys.readouterr().err
    assert "case b: the id is used 2 times" in error
    assert "'../c' cannot name a folder" in error
    assert ids(tmp_path / "store") == ["a"]


def test_another_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_cohort(tmp_path / "cohort")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("years of work")
    assert prepare(source, tmp_path / "other") == 2
    assert "not a prepared store" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "other").iterdir()] == ["thesis.tex"]
    assert prepare(source, tmp_path / "other" / "thesis.tex") == 2
    assert (tmp_path / "other" / "thesis.tex").read_text() == "years of work"


# --- content addressing, kills, damage ----------------------------------------------------------------------------------


def snapshot(store: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(store)): (p.stat().st_mtime_ns, p.stat().st_ino) for p in store.rglob("*.*")
            if p.is_file() and p.parent != store}


def test_second_run_touches_nothing_and_a_changed_source_is_redone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_cohort(tmp_path / "cohort")
    assert prepare(source, tmp_path / "store") == 0
    before, identity = snapshot(tmp_path / "store"), Store.open(tmp_path / "store").identity()
    assert len(before) == 15
    assert prepare(source, tmp_path / "store") == 0
    assert "0 of them prepared now, 5 unchanged" in capsys.readouterr().out
    assert snapshot(tmp_path / "store") == before
    assert Store.open(tmp_path / "store").identity() == identity

    stat = (source / LABEL).stat()
    rewrite(source / LABEL, lambda a: a[::-1])
    os.utime(source / LABEL, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # not even the time gives it away
    assert prepare(source, tmp_path / "store") == 0
    output = capsys.readouterr().out
    assert "1 of them prepared now, 4 unchanged" in output
    assert "1 case folders of older sources" in output
    after = snapshot(tmp_path / "store")
    assert {name: after[name] for name in before} == before
    store = Store.open(tmp_path / "store")
    assert store.identity() != identity
    np.testing.assert_array_equal(store.load(store.cases("train")[1])[1][..., 0], np.asarray(nib.load(source / LABEL).dataobj))

    assert prepare(source, tmp_path / "store", "--prune") == 0
    assert len(snapshot(tmp_path / "store")) == 15
    assert Store.open(tmp_path / "store").identity() == store.identity()


def test_sources_may_move(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_cohort(tmp_path / "cohort")
    assert prepare(source, tmp_path / "store") == 0
    identity = Store.open(tmp_path / "store").identity()
    source.rename(tmp_path / "moved")
    capsys.readouterr()
    assert prepare(tmp_path / "moved", tmp_path / "store") == 0
    assert "0 of them prepared now" in capsys.readouterr().out
    store = Store.open(tmp_path / "store")
    assert store.identity() == identity
    assert store.cases("train")[0].sources[0].is_file()


def test_other_settings_make_other_content(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "cohort", {"train": 1, "val": 1})
    identities = set()
    for options in ([], ["--spacing-mm", "2", "1", "1"], ["--intensity-window", "0", "900"], ["--classes", "a", "b", "c"]):
        assert prepare(source, tmp_path / "store", *options) == 0
        identities.add(Store.open(tmp_path / "store").identity())
    assert len(identities) == 4


KILLED = """
import os, sys
from dropgen_fast.data import prepare
from dropgen_fast.prepare import main

rename, renamed = os.rename, []

def rename_then_die(*names):
    if len(renamed) == 2:
        os._exit(9)
    renamed.append(rename(*names))

prepare.os.rename = rename_then_die
main(sys.argv[1:])
"""


def test_killed_run_leaves_no_half_read_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_cohort(tmp_path / "cohort")
    killed = subprocess.run([sys.executable, "-c", KILLED, "--source", source, "--store", tmp_path / "store", "--workers", "1"],
                            check=False, capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    with pytest.raises(InputError, match="not a prepared store"):
        Store.open(tmp_path / "store")
    hidden = [p for p in (tmp_path / "store" / "cases").iterdir() if p.name.startswith(".")]
    assert len(hidden) == 1  # the case that was being written
    assert prepare(source, tmp_path / "store") == 0
    assert "3 of them prepared now, 2 unchanged" in capsys.readouterr().out
    assert not [p for p in (tmp_path / "store" / "cases").iterdir() if p.name.startswith(".")]
    assert len(ids(tmp_path / "store")) == 3


def test_a_damaged_store_is_named_and_mended(tmp_path: Path) -> None:
    source = write_cohort(tmp_path / "cohort", {"train": 2, "val": 1})
    store_path = tmp_path / "store"
    assert prepare(source, store_path) == 0
    identity = Store.open(store_path).identity()

    def damage(file: str, content: Callable[[bytes], bytes | None]) -> None:
        path = Store.open(store_path).cases("train")[0].folder / file
        new = content(path.read_bytes())
        path.unlink()
        if new is not None:
            path.write_bytes(new)
        with pytest.raises(InputError, match=rf"train_0.*{file}"):
            Store.open(store_path)
        assert prepare(source, store_path) == 0
        assert Store.open(store_path).identity() == identity

    damage("volume.npy", lambda content: content[:-1])
    damage("volume.npy", lambda content: None)
    damage("volume.npy", lambda content: b"nonsense")
    damage("foreground.npy", lambda content: content.replace(b"(8193, 3)", b"(8192, 3)"))
    damage("case.json", lambda content: content[:50])
    index = store_path / "store.json"
    index.write_text(index.read_text().replace('"format_version": 2', '"format_version": 99'))
    with pytest.raises(InputError, match="format 99"):
        Store.open(store_path)


def test_two_runs_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dropgen_fast.data.store import locked

    source = write_cohort(tmp_path / "cohort", {"train": 1})
    with locked(tmp_path / "store"):
        assert prepare(source, tmp_path / "store") == 2
    assert "another process is preparing" in capsys.readouterr().err


def test_settings_are_checked() -> None:
    with pytest.raises(InputError, match="one of float32"):
        Settings((1, 1, 1), dtype="int8")
    with pytest.raises(InputError, match="three numbers of voxels"):
        Settings((1, 1, 1), brick=(32, 32, 2))
