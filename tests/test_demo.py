"""The demonstration's cohort, its order of work and its report; training itself is tested where it lives."""

from __future__ import annotations

import html
import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from matplotlib.image import imread

from dropgen_fast.cli import run as run_cli
from dropgen_fast.demo import cohort, results, run
from dropgen_fast.errors import InputError
from dropgen_fast.evaluate import PER_CASE, Score, read_scores
from dropgen_fast.evaluate import main as evaluate_main

pytest.importorskip("nilearn", reason="the template is in the demo extra")

QUICK = {"training": 2, "validation": 1, "test": 1}
SMALL = cohort.CohortConfig(**QUICK)


@pytest.fixture(scope="module")
def template():
    return cohort.load_template()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A cohort of four subjects on disk."""
    folder = tmp_path_factory.mktemp("cohort")
    assert cohort.write_cohort(folder, SMALL) == 2 + 1 + len(cohort.DOMAINS)
    return folder


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_cohort_is_an_nnunet_folder(small):
    domains = list(cohort.DOMAINS)
    assert sorted(files(small)) == sorted([
        "dataset.json", *[f"{kind}{split}/{case}{ending}" for split, cases in {
            "Tr": ["sub01_t1", "sub02_t1"], "Val": ["sub03_t1"], "Ts": [f"sub04_{d}" for d in domains]}.items()
            for case in cases for kind, ending in (("images", "_0000.nii.gz"), ("labels", ".nii.gz"))]])
    dataset = json.loads((small / "dataset.json").read_text())
    assert dataset["labels"] == {"background": 0, "CSF": 1, "grey matter": 2, "white matter": 3}
    assert (dataset["numTraining"], dataset["file_ending"], len(dataset["channel_names"])) == (2, ".nii.gz", 1)


def test_files_have_the_geometry_of_the_template(small, template):
    for path in [small / "imagesTr" / "sub01_t1_0000.nii.gz", small / "labelsTs" / "sub04_pd.nii.gz"]:
        image = nib.load(path)
        assert image.shape == cohort.SHAPE
        np.testing.assert_allclose(image.header.get_zooms(), [3.0] * 3)
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
        assert image.header.get_xyzt_units()[0] == "mm"
        middle = nib.affines.apply_affine(image.affine, (np.array(cohort.SHAPE) - 1) / 2)
        np.testing.assert_allclose(middle, template.centre_mm, atol=1e-3)
    assert voxels(small / "imagesTr" / "sub01_t1_0000.nii.gz").dtype == np.int16
    assert voxels(small / "labelsTr" / "sub01_t1.nii.gz").dtype == np.uint8


def test_cohort_is_its_seeds_and_nothing_else(small, tmp_path):
    cohort.write_cohort(tmp_path / "again", SMALL)
    assert files(tmp_path / "again") == files(small)
    cohort.write_cohort(tmp_path / "fewer", cohort.CohortConfig(training=1, validation=0, test=0))
    name = "imagesTr/sub01_t1_0000.nii.gz"
    assert (tmp_path / "fewer" / name).read_bytes() == (small / name).read_bytes()


def test_seeds_of_anatomy_and_of_scanner_are_apart(template):
    def subject(anatomy_seed):
        return cohort.make_subject(template, np.random.default_rng([anatomy_seed, 1]))

    one, other = subject(0), subject(1)
    assert (one.label != other.label).mean() > 0.02
    first, second = (cohort.render(one, "t1", template, np.random.default_rng(seed)).astype(float) for seed in (0, 1))
    assert not np.array_equal(first, second)
    inside = one.label > 0
    assert np.corrcoef(first[inside], second[inside])[0, 1] > 0.6  # the same head


def test_labels_look_like_a_head(small):
    shares = []
    for path in sorted((small / "labelsTr").iterdir()):
        label = voxels(path)
        brain = label > 0
        assert set(np.unique(label)) == {0, 1, 2, 3}
        assert 0.9 < brain.sum() * cohort.SPACING_MM ** 3 / 1e6 < 2.8  # litres
        shares.append([(label == value).sum() / brain.sum() for value in (1, 2, 3)])
    for csf, grey, white in shares:
        assert 0.02 < csf < 0.12
        assert 0.5 < grey < 0.75
        assert 0.25 < white < 0.45


def test_subjects_differ_and_never_fold(small, template):
    one, two = (voxels(small / "labelsTr" / f"sub0{n}_t1.nii.gz") for n in (1, 2))
    assert (one != two).mean() > 0.02
    for number in range(1, 5):
        points_mm = cohort._sample_points_mm(template, np.random.default_rng([7, number]))
        assert cohort.jacobian(points_mm).min() > 0


def test_jacobian_of_a_known_map():
    grid = np.moveaxis(np.indices((4, 5, 6), dtype=float), 0, -1) * cohort.SPACING_MM
    matrix = np.array([[1.1, 0.2, 0.0], [0.0, 0.9, 0.1], [0.3, 0.0, 1.2]])
    np.testing.assert_allclose(cohort.jacobian(grid @ matrix.T), np.linalg.det(matrix))
    assert cohort.jacobian(grid * [1, 1, -1]).max() == pytest.approx(-1)


def test_a_test_subject_has_one_anatomy_and_several_contrasts(small):
    labels = [voxels(small / "labelsTs" / f"sub04_{d}.nii.gz") for d in cohort.DOMAINS]
    for other in labels[1:]:
        np.testing.assert_array_equal(other, labels[0])
    order = {"t1": (1, 2, 3), "t2": (3, 2, 1), "pd": (3, 1, 2), "inv": (3, 2, 1)}  # darkest tissue first
    for domain, expected in order.items():
        image = voxels(small / "imagesTs" / f"sub04_{domain}_0000.nii.gz")
        medians = {value: np.median(image[labels[0] == value]) for value in (1, 2, 3)}
        assert tuple(sorted(medians, key=lambda value: medians[value])) == expected
        assert np.median(image[labels[0] == 0]) < 0.3 * min(medians.values())


def test_no_template_is_one_clear_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cohort.importlib.util, "find_spec", lambda name: None)
    assert run_cli("demo", run.main, ["--out", str(tmp_path / "demo"), "--quick"]) == 2
    error = capsys.readouterr().err
    assert "nilearn" in error
    assert error.count("\n") == 1


def option(arguments, name):
    return Path(arguments[arguments.index(name) + 1])


class Commands:
    """Stands in for the commands: training writes made-up curves, prediction spoils the labels; evaluation is the real one."""

    def __init__(self):
        self.calls = []
        self.fail_at = None

    def __call__(self, arguments):
        self.calls.append(list(arguments))
        name = arguments[0].rsplit(".", 1)[1]
        if self.fail_at == len(self.calls):
            raise run.StageError(f"{name} ended with status 2")
        if name == "train":
            self.train(option(arguments, "--out"))
        elif name == "predict":
            self.predict(option(arguments, "--images"), option(arguments, "--out"))
        elif name == "evaluate":
            assert evaluate_main(arguments[1:]) == 0

    def train(self, out):
        out.mkdir(parents=True, exist_ok=True)
        rows = [{"step": 10, "loss": 1.5, "learning_rate": 1e-3}, {"step": 10, "validation_dice": 0.5, "per_class": {}},
                {"step": 20, "loss": 1.0, "learning_rate": 0.0}]
        (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def predict(self, images, out):
        out.mkdir(parents=True, exist_ok=True)
        for path in sorted((images.parent / "labelsTs").iterdir()):
            label = voxels(path)
            predicted = label.copy()
            if "erm" in str(out) and not path.name.endswith("_t1.nii.gz"):
                predicted[label == 2], predicted[label == 3] = 3, 2  # ERM takes grey for white in every target
            if "dropgen" in str(out):
                predicted[::4][label[::4] == 2] = 3
            nib.save(nib.Nifti1Image(predicted, nib.load(path).affine), out / path.name)


@pytest.fixture
def commands(monkeypatch, small):
    """Stand-ins for the commands, and the cohort that is there already."""
    stand_in = Commands()
    monkeypatch.setattr(run, "run_command", stand_in)
    monkeypatch.setattr(run, "QUICK_COHORT", QUICK)
    monkeypatch.setattr(run, "write_cohort", lambda folder, config: shutil.copytree(small, folder))
    return stand_in


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished demo, its predictions made up here."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "run_command", Commands())
        patch.setattr(run, "QUICK_COHORT", QUICK)
        assert run.main(["--out", str(out), "--quick", "--seed", "3"]) == 0
    return out


def test_results(finished):
    found = json.loads((finished / "results.json").read_text())
    assert {"source", "target", "per_domain", "minutes", "seed", "steps", "variant", "versions"} <= set(found)
    assert set(found["per_domain"]) == set(cohort.DOMAINS)
    assert found["source"] == found["per_domain"]["t1"]
    assert (found["seed"], found["steps"], found["quick"]) == (3, run.QUICK_STEPS, True)
    assert "stream dropout" in found["variant"]
    assert found["source"]["erm"] == 1.0
    assert found["per_tissue"]["t2"]["CSF"] == {"erm": 1.0, "dropgen": 1.0}
    assert found["per_tissue"]["t2"]["grey matter"]["erm"] == 0.0
    assert found["target"]["erm"] == pytest.approx(1 / 3)
    targets = [found["per_domain"][d]["dropgen"] for d in cohort.TARGETS]
    assert found["target"]["dropgen"] == pytest.approx(np.mean(targets))
    scores = [s for s in read_scores(finished / "dropgen" / "evaluation" / PER_CASE) if s.case.endswith("_pd")]
    assert found["per_domain"]["pd"]["dropgen"] == pytest.approx(np.mean([s.dice for s in scores]))
    assert found["minutes"] == pytest.approx(sum(found["seconds_per_stage"].values()) / 60, abs=0.01)
    assert found["versions"]["torch"]


def test_report_needs_nothing_but_itself(finished):
    page = (finished / "report.html").read_text()
    text_alone = re.sub(r"data:image/png;base64,[\w+/=]*", "", page)
    assert len(text_alone) < 20_000
    assert "//" not in text_alone
    sources = re.findall(r'\b(?:src|href)\s*=\s*"([^"]*)"', page)
    assert len(sources) == 4 * len(cohort.DOMAINS) + 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in page
    images = re.findall(r"<img [^>]*>", page)
    assert all(re.search(r'alt="[^"]+"', image) for image in images)
    found = json.loads((finished / "results.json").read_text())
    for text in (results.sentence(found), found["variant"], "seed 3", "smoke test", *cohort.CLASSES[1:],
                 *(d.title for d in cohort.DOMAINS.values())):
        assert html.escape(text) in page
    assert str(found["per_domain"]["pd"]["dropgen"])[:4] in page


def test_report_picture(finished):
    picture = imread(finished / "report.png")
    assert picture.shape[0] > 500
    assert picture.shape[1] > 1000
    assert picture.std() > 0.1


def test_the_same_demo_again_does_nothing_twice(finished, commands):
    before = files(finished / "cohort")
    assert run.main(["--out", str(finished), "--quick", "--seed", "3"]) == 0
    assert commands.calls == []
    assert files(finished / "cohort") == before


def test_a_folder_with_something_else_is_refused(finished, commands, tmp_path, capsys):
    def refused(arguments, reason):
        assert run_cli("demo", run.main, arguments) == 2
        error = capsys.readouterr().err
        assert reason in error
        assert error.count("\n") == 1
        assert commands.calls == []

    kept = files(finished)
    refused(["--out", str(finished), "--quick", "--seed", "4"], "seed was 3, is now 4")
    assert files(finished) == kept
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for extra in ([], ["--overwrite"]):
        refused(["--out", str(tmp_path / "mine"), "--quick", *extra], "no demo")
    refused(["--out", str(tmp_path / "mine" / "thesis.txt")], "is a file")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_failed_command_stops_and_is_gone_on_with(commands, tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "demo"), "--quick"]
    commands.fail_at = 3  # training DropGen
    assert run.main(arguments) == 1
    error = capsys.readouterr().err
    assert "train ended with status 2" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "demo" / "results.json").exists()
    commands.fail_at, commands.calls = None, []
    assert run.main(arguments) == 0
    modules = [call[0].rsplit(".", 1)[1] for call in commands.calls]
    assert modules == ["train", "predict", "evaluate", "predict", "evaluate"]
    assert "--resume" in commands.calls[0]
    assert not any("--resume" in call for call in commands.calls[1:])


def test_overwrite_removes_the_demo_and_nothing_else(commands, tmp_path):
    out = tmp_path / "demo"
    commands.fail_at = 1
    assert run.main(["--out", str(out), "--quick"]) == 1
    assert (out / "cohort" / "dataset.json").exists()
    (out / "notes.txt").write_text("keep")
    (out / "store").mkdir()
    (out / "store" / "old").write_text("x")
    commands.fail_at = 2
    assert run.main(["--out", str(out), "--quick", "--seed", "1", "--overwrite"]) == 1
    assert (out / "notes.txt").read_text() == "keep"
    assert not (out / "store").exists()
    assert json.loads((out / "demo.json").read_text())["settings"]["seed"] == 1


def test_both_methods_get_the_same_but_for_the_method():
    config = run.DemoConfig(out=Path("d"), steps=80, seed=5, p=(0.5,), mode="channel", device="cpu")
    by_name = {stage.name: list(stage.arguments) for stage in run.stages(config)}
    erm, dropgen = by_name["train erm"], by_name["train dropgen"]
    extra = ["--extractor", "mind", "--fusion.p", "0.5"]
    at = dropgen.index("--extractor")
    assert dropgen[at:at + len(extra)] == extra
    del dropgen[at:at + len(extra)]
    assert [a.replace("dropgen", "erm") for a in dropgen] == [a.replace("dropgen", "erm") for a in erm]
    for arguments in (erm, by_name["predict erm"]):
        assert arguments[arguments.index("--device") + 1] == "cpu"
    assert erm[erm.index("--steps") + 1] == "80"
    assert erm[erm.index("--seed") + 1] == "5"


@pytest.mark.parametrize(("mode", "method"), [("stream", "stream-dropout"), ("channel", "dropgen")])
def test_the_kind_of_dropout_is_a_method(mode, method):
    config = run.DemoConfig(out=Path("d"), p=(0.5, 0.25), mode=mode)
    found = next(list(stage.arguments) for stage in run.stages(config) if stage.name == "train dropgen")
    assert found[found.index("--method") + 1] == method
    at = found.index("--fusion.p")
    assert found[at + 1:at + 4] == ["0.5", "0.25", "--patch"]


def test_a_real_command_is_printed_and_its_status_told(capfd):
    run.run_command(["json.tool", "--help"])
    assert "$ python -m json.tool --help" in capfd.readouterr().out
    with pytest.raises(run.StageError, match="ended with status"):
        run.run_command(["json.tool", "/no/such/file"])


@pytest.mark.parametrize("bad", [["--steps", "0"], ["--seed", "-1"], ["--p", "1.0"], ["--p", "0.1", "0.1", "0.1"],
                                 ["--learning-rate", "0"]])
def test_bad_options(bad, tmp_path, capsys):
    assert run_cli("demo", run.main, ["--out", str(tmp_path / "demo"), *bad]) == 2
    assert not (tmp_path / "demo").exists()
    error = capsys.readouterr().err
    assert bad[0] in error
    assert error.count("\n") == 1


def made_up(source, target):
    return {"source": dict(zip(("erm", "dropgen"), source, strict=True)),
            "target": dict(zip(("erm", "dropgen"), target, strict=True))}


@pytest.mark.parametrize(("source", "target", "expected"), [
    ((0.88, 0.80), (0.28, 0.66),
     "DropGen costs 0.08 Dice on the source contrast (0.80 against ERM's 0.88) "
     "and gains 0.38 Dice on contrasts never seen in training (0.66 against ERM's 0.28)."),
    ((0.80, 0.82), (0.50, 0.40),
     "DropGen gains 0.02 Dice on the source contrast (0.82 against ERM's 0.80) "
     "and costs 0.10 Dice on contrasts never seen in training (0.40 against ERM's 0.50)."),
    ((0.80, 0.80), (0.50, 0.502),
     "DropGen makes no difference on the source contrast (0.80 against ERM's 0.80) "
     "and makes no difference on contrasts never seen in training (0.50 against ERM's 0.50)."),
])
def test_the_sentence_follows_the_numbers(source, target, expected):
    assert results.sentence(made_up(source, target)) == expected


@pytest.mark.parametrize(("mode", "p", "words"), [
    ("stream", (0.75, 0.0), "image dropped 75 %, features never"),
    ("stream", (0.5, 0.25), "image dropped 50 %, features dropped 25 %"),
    ("channel", (0.75,), "as in the paper (p = 0.75)"), ("channel", (0.5, 0.75), "p = 0.5 for the image, 0.75 for the features")])
def test_the_variant_is_named(mode, p, words):
    assert words in results.variant_name(mode, p)


def test_a_tissue_that_is_never_found_has_no_hd95():
    def scores(hd95_mm):
        return [Score(f"sub01_{domain}", value, name, 0.0 if hd95_mm is None else 0.5, hd95_mm, 5, 0 if hd95_mm is None else 5)
                for domain in cohort.DOMAINS for value, name in enumerate(cohort.CLASSES) if value]

    found = results.collect({"erm": scores(None), "dropgen": scores(4.0)})
    assert found["hd95_mm"]["t2"] == {"erm": None, "dropgen": 4.0}
    assert found["hd95_undefined"]["t2"] == {"erm": 3, "dropgen": 0}
    with pytest.raises(InputError, match="no score"):
        results.collect({"erm": [], "dropgen": scores(4.0)})
