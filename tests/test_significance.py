"""Intervals and tests against enumeration, formulas written out, and values from books; two runs paired case by case."""

from __future__ import annotations

import csv
import itertools
import json
import math

import nibabel as nib
import numpy as np
import pytest
from scipy import stats

from dropgen_fast.errors import InputError
from dropgen_fast.evaluate import main, read_scores
from dropgen_fast.scoring.case import Score
from dropgen_fast.scoring.comparison import compare
from dropgen_fast.scoring.evaluation import Evaluation, table
from dropgen_fast.scoring.significance import RESAMPLES, holm, mean_interval, signed_rank_p

SKEWED = [0.95, 0.94, 0.93, 0.91, 0.88, 0.74, 0.35]


def exact_bca(values):
    """What the bootstrap estimates: every one of the n^n resamples, and Efron's formulas on their means.

    Returns the sorted means, and for each end of the 95 % interval its level, and how far the level moves with z0.
    """
    x, n, normal = np.array(values), len(values), stats.norm
    means = np.sort(np.stack(np.meshgrid(*[x] * n, indexing="ij")).reshape(n, -1).mean(0))
    z0 = normal.ppf((means < x.mean() - 1e-12).mean() + (abs(means - x.mean()) <= 1e-12).mean() / 2)
    left_out = (x.sum() - x) / (n - 1)
    u = left_out.mean() - left_out
    a = (u**3).sum() / (6 * (u**2).sum() ** 1.5)

    def level(z, z0):
        return normal.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))

    ends = [(level(z, z0), abs(level(z, z0 + 1e-4) - level(z, z0 - 1e-4)) / 2e-4) for z in normal.ppf([0.025, 0.975])]
    return means, ends, z0


def test_interval_is_bca():
    means, ends, z0 = exact_bca(SKEWED)
    # A level is estimated from B resamples twice over: through its own quantile, with standard error sqrt(p (1 - p) / B), and
    # through z0, the normal quantile of a share q, with sqrt(q (1 - q) / B) / density. Five of both together.
    q = stats.norm.cdf(z0)
    error_z0 = math.sqrt(q * (1 - q) / RESAMPLES) / stats.norm.pdf(z0)
    for found, (level, slope) in zip(mean_interval(SKEWED), ends, strict=True):
        five = 5 * (math.sqrt(level * (1 - level) / RESAMPLES) + slope * error_z0)
        assert (means < found - 1e-12).mean() <= level + five
        assert (means <= found + 1e-12).mean() >= level - five
    # The plain percentiles of the same resamples are elsewhere, by more than the estimate may be off.
    low = mean_interval(SKEWED)[0]
    assert (means <= low).mean() < 0.025 - 5 * math.sqrt(0.025 * 0.975 / RESAMPLES)


def test_interval_repeats_with_its_seed():
    assert mean_interval(SKEWED, 500, 3) == mean_interval(SKEWED, 500, 3)
    assert mean_interval(SKEWED, 500, 3) != mean_interval(SKEWED, 500, 4)
    assert mean_interval(SKEWED, 500, 3) != mean_interval(SKEWED, 600, 3)


def test_interval_of_many_cases_is_the_normal_one():
    # The mean of 3000 values is normal but for terms of order 1/n; five standard errors of a quantile of 2000 resamples.
    values = np.random.default_rng(0).beta(8, 2, 3000)
    error = values.std() / math.sqrt(3000)
    off = 5 * math.sqrt(0.025 * 0.975 / 2000) / stats.norm.pdf(1.96)
    for found, z in zip(mean_interval(list(values), 2000), (-1.96, 1.96), strict=True):
        assert abs((found - values.mean()) / error - z) < 2 * off  # of its own quantile and of z0


def test_few_or_equal_cases():
    assert [mean_interval(SKEWED[:n]) is None for n in range(8)] == [True] * 6 + [False] * 2
    assert mean_interval([0.5] * 6) == (0.5, 0.5)
    low, high = mean_interval([0.5] * 5 + [0.6])
    assert 0.5 <= low < high <= 0.6


def enumerated_p(differences):
    """Both tails of the signed-rank sum over all 2^n signs; zeros left out."""
    d = np.array([x for x in differences if x])
    ranks = stats.rankdata(abs(d))
    sums = np.array(list(itertools.product((0, 1), repeat=len(d)))) @ ranks
    middle = ranks.sum() / 2
    return float((abs(sums - middle) >= abs(ranks[d > 0].sum() - middle) - 1e-9).mean())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("zeros", [0, 3])
def test_signed_rank_equals_enumeration(seed, zeros):
    rng = np.random.default_rng(seed)
    differences = [*(rng.standard_normal(11) + 0.4 * seed), *[0.0] * zeros]
    assert signed_rank_p(differences) == pytest.approx(enumerated_p(differences), rel=1e-12)


def test_signed_rank_of_few_and_of_none():
    assert signed_rank_p([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    assert signed_rank_p([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == 2 / 2**6
    assert signed_rank_p([1.0, 2.0, 3.0, 4.0, 5.0, 0.0]) == 2 / 2**5  # the zero adds nothing
    assert signed_rank_p([0.0] * 6) == 1.0


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4, 0.6, 0.001]) == pytest.approx([0.8, 0.8, 0.003])
    assert holm([0.9, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


# ---- two runs ---------------------------------------------------------------------------------------------------------


def score(case, value, dice, hd95=None, label_voxels=100, tolerance_mm=2.0, name=None):
    return Score(case, value, name or f"class_{value}", dice, hd95, label_voxels, 0 if dice is None else 90,
                 None if dice is None else dice / 2, tolerance_mm, None if dice is None else 0.1)


HERE = [0.91, 0.80, 0.75, 0.93, 0.66, 0.83, 0.71, 0.95]
THERE = [0.90, 0.78, 0.78, 0.89, 0.61, 0.77, 0.64, 0.87]


def run_of(dices, **options):
    """A run of two classes, of which the second has the Dice of the first squared."""
    return [s for i, dice in enumerate(dices)
            for s in (score(f"c{i}", 1, dice, 10 * (1 - dice), **options), score(f"c{i}", 2, dice**2, None, **options))]


def test_differences_by_hand():
    found = compare(run_of(HERE), run_of(THERE), "other").measures
    first = [a - b for a, b in zip(HERE, THERE, strict=True)]
    second = [a * a - b * b for a, b in zip(HERE, THERE, strict=True)]
    both = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    dice = found["dice"]
    for row, differences in ((dice["mean_over_classes"], both), (dice["per_class"]["class_1"], first),
                             (dice["per_class"]["class_2"], second)):
        assert (row["pairs"], row["higher"], row["lower"]) == (8, 7, 1)
        assert row["mean_difference"] == pytest.approx(np.mean(differences))
        assert row["interval"][0] < row["mean_difference"] < row["interval"][1]
        assert row["p"] == pytest.approx(enumerated_p(differences), rel=1e-12)
    assert dice["per_class"]["class_1"]["mean_here"] == pytest.approx(np.mean(HERE))
    assert dice["per_class"]["class_1"]["mean_there"] == pytest.approx(np.mean(THERE))
    assert [row["p_holm"] for row in dice["per_class"].values()] == holm([row["p"] for row in dice["per_class"].values()])
    assert found["surface_dice"]["per_class"]["class_1"]["mean_difference"] == pytest.approx(np.mean(first) / 2)
    hd95 = found["hd95_mm"]
    assert hd95["mean_over_classes"]["mean_difference"] == pytest.approx(-10 * np.mean(first))
    nothing = hd95["per_class"]["class_2"]
    assert (nothing["pairs"], nothing["mean_difference"], nothing["p"], nothing["p_holm"]) == (0, None, None, None)
    assert hd95["per_class"]["class_1"]["p_holm"] == hd95["per_class"]["class_1"]["p"]  # the only one tested


def test_the_order_of_the_runs_turns_the_sign_alone():
    one, other = (compare(*pair, "other").measures["dice"]["mean_over_classes"]
                  for pair in ((run_of(HERE), run_of(THERE)), (run_of(THERE), run_of(HERE))))
    assert (one["p"], one["mean_difference"]) == (other["p"], pytest.approx(-other["mean_difference"]))
    same = compare(run_of(HERE), run_of(HERE), "other").measures["dice"]["mean_over_classes"]
    assert (same["mean_difference"], same["interval"], same["p"]) == (0.0, [0.0, 0.0], 1.0)


def test_values_in_one_run_only():
    here, there = run_of(HERE), run_of(THERE)
    # Class 3 is in no label; the other run invents it in case c0, this one in none.
    here += [score(f"c{i}", 3, None, label_voxels=0) for i in range(8)]
    there += [score("c0", 3, 0.0, label_voxels=0), *(score(f"c{i}", 3, None, label_voxels=0) for i in range(1, 8))]
    dice = compare(here, there, "other").measures["dice"]
    assert (dice["per_class"]["class_3"]["pairs"], dice["per_class"]["class_3"]["only_there"]) == (0, 1)
    invented = (THERE[0] + THERE[0] ** 2) / 3
    others = [(a + a * a - b - b * b) / 2 for a, b in zip(HERE[1:], THERE[1:], strict=True)]
    expected = (sum(others) + (HERE[0] + HERE[0] ** 2) / 2 - invented) / 8
    assert dice["mean_over_classes"]["mean_difference"] == pytest.approx(expected)


def test_hd95_is_compared_where_both_have_one():
    # This run misses class 2 in the even cases, where the other is 50 mm off: missing it must not look like a gain.
    here = [s for i in range(12) for s in (score(f"c{i}", 1, 0.9, 3.0 + i / 10),
                                           score(f"c{i}", 2, 0.5, 5.0 + i / 10) if i % 2 else score(f"c{i}", 2, 0.0))]
    there = [s for i in range(12) for s in (score(f"c{i}", 1, 0.9, 2.0), score(f"c{i}", 2, 0.5, 5.0 if i % 2 else 50.0))]
    hd95 = compare(here, there, "other").measures["hd95_mm"]
    expected = np.mean([(1 + i / 10 + i / 10) / 2 if i % 2 else 1 + i / 10 for i in range(12)])
    assert hd95["mean_over_classes"]["mean_difference"] == pytest.approx(expected)
    assert {key: hd95["per_class"]["class_2"][key] for key in ("pairs", "only_here", "only_there")} == {
        "pairs": 6, "only_here": 0, "only_there": 6}


def test_what_is_in_one_run_only_is_named():
    here = [*run_of(HERE), score("mine", 1, 0.5), score("c0", 4, 0.5)]
    there = [*run_of(THERE), score("theirs", 1, 0.5), score("c0", 5, 0.5)]
    found = compare(here, there, "runs/b")
    assert (found.cases, found.cases_only_here, found.cases_only_there) == (8, ("mine",), ("theirs",))
    assert (found.classes_only_here, found.classes_only_there) == (("class_4",), ("class_5",))
    assert found.measures["dice"]["mean_over_classes"]["mean_difference"] == pytest.approx(
        compare(run_of(HERE), run_of(THERE), "other").measures["dice"]["mean_over_classes"]["mean_difference"])
    text = found.table()
    for line in ("this run minus runs/b, 8 cases in both", "case only in this run: mine", "case only in the other: theirs",
                 "class only in this run: class_4", "class only in the other: class_5"):
        assert line in text.splitlines()


@pytest.mark.parametrize(("there", "reason"), [
    (run_of(THERE[:5]), "at least 6 cases that have a Dice in both runs, this run and other share 5"),
    (run_of(THERE, label_voxels=101), "100 voxels in the label of this run and 101"),
    (run_of(THERE, tolerance_mm=3.0), "--tolerance-mm 2 in this run and 3"),
    (run_of(THERE, name="liver"), "'class_1' in this run and 'liver'")], ids=["few", "label", "tolerance", "name"])
def test_runs_that_cannot_be_compared(there, reason):
    with pytest.raises(InputError, match=reason) as refused:
        compare(run_of(HERE), there, "other")
    assert "\n" not in str(refused.value)


def test_intervals_of_a_summary():
    scores = [score(f"c{i}", 1, dice, 10 * (1 - dice)) for i, dice in enumerate(SKEWED)]
    summary = Evaluation(tuple(scores), {1: "class_1"}).summary(resamples=500, seed=3)
    expected = list(mean_interval(SKEWED, 500, 3))
    assert summary["per_class"]["class_1"]["dice"]["interval"] == expected
    assert summary["mean_over_classes"]["dice"]["interval"] == expected
    assert (summary["interval"]["resamples"], summary["interval"]["seed"]) == (500, 3)
    row = next(line for line in table(summary).splitlines() if line.startswith("class_1"))
    assert f"{np.mean(SKEWED):.4f} [{expected[0]:.4f}, {expected[1]:.4f}]" in row


# ---- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def cohort(tmp_path):
    """Eight cases of a bar of 20 voxels; a function scores predictions that find some voxels of each, and more."""
    def save(path, length):
        voxels = np.zeros((24, 4, 4), np.uint8)
        voxels[1 : 1 + length, 1:3, 1:3] = 1
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1.0, 2.0, 1.0])), path)

    for i in range(8):
        save(tmp_path / "labels" / f"c{i}.nii.gz", 20)

    def evaluate(name, lengths, *more):
        for i, length in enumerate(lengths):
            save(tmp_path / name / f"c{i}.nii.gz", length)
        out = tmp_path / "scores" / name
        return main(["--predictions", str(tmp_path / name), "--labels", str(tmp_path / "labels"), "--out", str(out),
                     "--resamples", "500", *more]), out

    return evaluate


LONG, SHORT = [19, 18, 17, 19, 16, 18, 20, 15], [18, 16, 18, 15, 11, 12, 13, 14]


def test_compare_by_the_command(cohort, capsys):
    _, other = cohort("short", SHORT)
    status, out = cohort("long", LONG, "--compare", str(other))
    assert status == 0
    written = json.loads((out / "comparison.json").read_text())
    dice = []
    for folder in (out, other):
        with (folder / "per_case.csv").open(newline="") as file:
            dice.append([float(row["dice"]) for row in csv.DictReader(file)])
    by_hand = [[2 * n / (n + 20) for n in lengths] for lengths in (LONG, SHORT)]
    assert dice == [pytest.approx(by_hand[0], abs=5e-7), pytest.approx(by_hand[1], abs=5e-7)]  # of 6 decimals
    found = written["dice"]["mean_over_classes"]
    assert found["mean_difference"] == pytest.approx(np.subtract(*dice).mean(), abs=1e-9)
    assert found["p"] == pytest.approx(enumerated_p(np.round(np.subtract(*dice), 9)), rel=1e-12)
    assert (written["compared_with"], written["cases"]) == (str(other), 8)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["interval"]["resamples"], summary["interval"]["seed"]) == (500, 0)
    assert summary["comparison"]["dice"] == {key: found[key] for key in ("mean_difference", "interval", "p")}
    assert f"this run minus {other}, 8 cases in both" in capsys.readouterr().out


def test_an_old_comparison_does_not_outlive_its_scores(cohort):
    _, other = cohort("short", SHORT)
    _, out = cohort("long", LONG, "--compare", str(other))
    cohort("long", LONG[::-1])
    assert not (out / "comparison.json").exists()
    assert "comparison" not in json.loads((out / "summary.json").read_text())


def test_a_comparison_that_is_refused_leaves_the_scores(cohort, tmp_path):
    _, other = cohort("short", SHORT[:5])
    with pytest.raises(InputError, match="at least 6 cases"):
        cohort("long", LONG, "--compare", str(other))
    assert len(read_scores(tmp_path / "scores" / "long" / "per_case.csv")) == 8
    for folder, reason in ((tmp_path, "cannot be read"), (tmp_path / "scores" / "again", "--out itself")):
        with pytest.raises(InputError, match=reason):
            cohort("again", LONG, "--compare", str(folder))
    assert not (tmp_path / "scores" / "again").exists()  # told before the work
