"""The documentation: its code runs as it stands, its numbers are right, its links lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from dropgen_fast import Window, ZScore, fuse_streams
from dropgen_fast.bench.op import Case, Draw, work
from dropgen_fast.kernels import memory

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "fuse_streams.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MUST_RUN = ["What it computes", "In a loop of your own", "In a MONAI pipeline", "In an nnU-Net v2 trainer",
            "With NumPy, CuPy and JAX arrays"]


# ---- reading the page ------------------------------------------------------------------------------------------------


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)


def sections() -> dict[str, tuple[int, str]]:
    """Title → (line of the title, text down to the next title)."""
    text = PAGE.read_text()
    starts = [(found.start(), found[1]) for found in re.finditer(r"^#+ (.+)$", _blanked_code(text), re.MULTILINE)]
    ends = [start for start, _ in starts[1:]] + [len(text)]
    return {title.strip("`"): (text[:start].count("\n") + 1, text[start:end])
            for (start, title), end in zip(starts, ends, strict=True)}


def _blanked_code(text: str) -> str:
    """The text with the characters of its code replaced by spaces: a comment is no title."""
    return re.sub(r"^```.*?^```$", lambda found: re.sub(r"\S", " ", found[0]), text, flags=re.DOTALL | re.MULTILINE)


def code(title: str) -> list[str]:
    """A section's blocks of Python, each behind as many empty lines as put it on its own line numbers of the page."""
    line, text = sections()[title]
    return ["\n" * (line + text[:found.start(1)].count("\n") - 1) + found[1]
            for found in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]


def run(title: str) -> dict[str, Any]:
    """Run a section's code, block after block in one namespace."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  # what the page's code draws from
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in code(title):
        execute(block, namespace)
    return namespace


def execute(block: str, namespace: dict[str, Any]) -> None:
    exec(compile(block, str(PAGE), "exec"), namespace)


def table(title: str) -> list[list[str]]:
    """The cells of a section's last table, without its head."""
    rows = re.findall(r"^\|(.+)\|$", sections()[title][1], re.MULTILINE)
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    head = max(i for i, row in enumerate(cells) if set("".join(row)) == {"-"})
    return cells[head + 1:]


# ---- code ------------------------------------------------------------------------------------------------------------


def test_every_block_of_python_is_run() -> None:
    with_code = [title for title in sections() if code(title)]
    assert with_code == MUST_RUN
    fences = re.findall(r"^```(\w*)$", PAGE.read_text(), re.MULTILINE)
    assert set(fences[::2]) == {"python", "bash"}  # no code hides behind another name
    assert set(fences[1::2]) == {""}
    assert fences.count("python") == sum(len(code(title)) for title in MUST_RUN)


def test_definition() -> None:
    run("What it computes")  # asserts by itself


def test_loop() -> None:
    loop, schedule = code("In a loop of your own")
    page: dict[str, Any] = {"__name__": "page"}
    torch.manual_seed(0)
    execute(loop, page)
    model, image = page["model"], page["image"]
    assert all(loss.isfinite() for loss in page["losses"])
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.network.parameters())
    assert all(parameter.grad is None for parameter in model.extractor.parameters())
    assert model.extractor[1].num_batches_tracked == 0  # its batch norm never left evaluation mode
    assert page["prediction"].shape == (2, 16, 16, 16)
    assert torch.equal(model(image), model(image))

    execute(schedule, page)
    assert model.fusion.rates.tolist() == [0.75, 0.75]  # past the last knot
    assert model.fusion.training
    assert not model.extractor.training
    assert not torch.equal(model(image), model(image))


def test_monai() -> None:
    page = run("In a MONAI pipeline")
    model = page["model"]
    assert len(page["losses"]) == 2
    assert all(loss.isfinite() for loss in page["losses"])
    assert type(page["batch"]["image"]) is torch.Tensor
    assert type(model.fusion(MetaTensor(page["batch"]["image"]))) is MetaTensor
    assert page["scores"].shape == (1, 3, 24, 20, 22)
    assert page["scores"].isfinite().all()
    assert not model.fusion.training
    window = page["volumes"][0]["image"][None, ..., :16, :16, :16]
    assert torch.equal(model(window), model(window))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in model.network.parameters())


def test_arrays_share_memory() -> None:
    page = run("With NumPy, CuPy and JAX arrays")
    for tensor, array in ((page["image_tensor"], page["image"]), (page["features_tensor"], page["features"]),
                          (page["result"], page["fused"])):
        assert tensor.data_ptr() == address(array)
    assert page["fused"].shape == (2, 9, 32, 32, 32)
    assert bool(page["xp"].isfinite(page["xp"].asarray(page["fused"])).all())


def address(array: Any) -> int:
    """Of an array's first element, of NumPy, CuPy or JAX."""
    if isinstance(array, np.ndarray):
        return int(array.ctypes.data)
    return int(array.data.ptr) if hasattr(array, "data") and hasattr(array.data, "ptr") else int(array.unsafe_buffer_pointer())


def test_nnunet(tmp_path: Path) -> None:
    pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed (extra: test)")
    block, = code("In an nnU-Net v2 trainer")
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "dropgen_trainer.py").write_text(block)
    command = [sys.executable, str(ROOT / "tests" / "run_nnunet.py"), str(tmp_path), str(tmp_path / "trainers")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    saw = json.loads(done.stdout.splitlines()[-1])

    # What the network was given: both streams always, drops in training only, one output where nothing is trained.
    assert {call["channels"] for call in saw["seen"]} == {13}
    training = [call for call in saw["seen"] if call["training"]]
    other = [call for call in saw["seen"] if not call["training"]]
    assert len(training) == 3
    assert all(call["dropped"] > 0 for call in training)
    assert {call["dropped"] for call in other} == {0}
    assert {call["outputs"] for call in training} == {len(saw["patch"])}  # 32 → 16 → 8 → 4: an output before each halving
    assert {call["outputs"] for call in other} == {0, len(saw["patch"])}

    assert all(key.startswith("network.") for key in saw["keys"])
    assert any(".encoder.stages.0." in key for key in saw["trained"])
    assert saw["optimized"] > 0
    assert saw["resumed_epoch"] == 1
    assert saw["resumed_equal"]
    assert "takes 3d_fullres" in saw["refuses_2d"]
    assert saw["compiled_equal"]

    fold = Path(saw["results"]) / "fold_0"
    assert Path(saw["results"]).name == "nnUNetTrainerDropGen__nnUNetPlans__3d_fullres"
    assert {"checkpoint_final.pth", "checkpoint_best.pth", "progress.png"} <= {path.name for path in fold.iterdir()}
    assert math.isfinite(json.loads((fold / "validation" / "summary.json").read_text())["foreground_mean"]["Dice"])
    first, second = (np.asanyarray(nib.load(path).dataobj) for path in saw["predictions"])
    np.testing.assert_array_equal(first, second)  # nothing is drawn at prediction


# ---- what the page states ---------------------------------------------------------------------------------------------


def test_arguments() -> None:
    parameters = inspect.signature(fuse_streams).parameters
    rows = {row[0].strip("`"): row for row in table("Arguments")}
    assert list(rows) == list(parameters)
    for name, parameter in parameters.items():
        told = rows[name][2]
        if parameter.default is inspect.Parameter.empty:
            assert told == "", name
        elif isinstance(parameter.default, torch.memory_format):
            assert f"torch.{told}_format" == str(parameter.default)
        else:
            assert ast.literal_eval(told) == parameter.default, name


def test_bytes() -> None:
    sizes, draw = {"float32": 4, "bfloat16": 2}, Draw(seed=0, images=1, features=8)
    assert [(row[0], int(row[1])) for row in table("How its bytes are counted")] == [
        (dtype, stride) for dtype in sizes for stride in (1, 2, 4)]
    for dtype, stride, *numbers in table("How its bytes are counted"):
        image, features, result, compulsory, moved = (int(number.replace(",", "")) for number in numbers)
        assert image == 1 * 96**3 * 4
        assert features == 8 * (96 // int(stride))**3 * sizes[dtype]
        assert result == 2 * 17 * 96**3 * sizes[dtype]
        counted = work(Case(2, (96, 96, 96), int(stride), 16, dtype, "contiguous", 0.75), draw, "forward")
        assert (compulsory, moved) == (image + features + result, 2 * (image + features) + result)
        assert (compulsory, moved) == (counted.compulsory_bytes, counted.bytes_moved)


def test_bytes_of_inference_and_of_the_backward_pass() -> None:
    _, text = sections()["How its bytes are counted"]
    everything = work(Case(2, (96, 96, 96), 1, 16, "float32", "contiguous", 0.0), Draw(0, 2, 32), "forward")
    backward = work(Case(2, (96, 96, 96), 2, 16, "float32", "contiguous", 0.75), Draw(0, 1, 8), "backward")
    prose = " ".join(text.split())
    assert f"{everything.compulsory_bytes:,} bytes compulsory" in prose
    assert f"{backward.compulsory_bytes:,} bytes for float32 at stride 2" in prose
    assert f"{2 * 96**3 * 4:,} bytes of image and {32 * 96**3 * 4:,} of features" in prose


def test_voxels_that_are_not_finite() -> None:
    """The table in "Statistics, NaN and Inf", row by row; voxel 0 is NaN, voxel 1 infinite, the grids are equal."""
    titles = [row[0] for row in table("Statistics, NaN and Inf")]
    assert titles == ['"minmax", "none", `ZScore`', "`Window`", '"instance", "none" (features)', '"unit"', '"standard"',
                      "dropped"]
    torch.manual_seed(0)
    image, features = torch.rand(1, 1, 4, 4, 4), torch.randn(1, 3, 4, 4, 4)
    broken, broken_features = image.clone(), features.clone()
    for volume in (broken[0, 0], broken_features[0, 1]):
        volume[0, 0, :2] = torch.tensor([torch.nan, torch.inf])

    def first(volume: torch.Tensor) -> list[float]:
        assert volume[1:].isfinite().all()
        return [float(value) for value in volume[0, 0, :2]]

    nan, inf = pytest.approx(float("nan"), nan_ok=True), float("inf")
    for norm in ("minmax", "none", ZScore(0.5, 2.0)):
        assert first(fuse_streams(broken, p=0.0, image_norm=norm)[0, 0]) == [nan, inf]
    assert first(fuse_streams(broken, p=0.0, image_norm=Window(0.0, 0.5))[0, 0]) == [nan, 1.0]
    for norm in ("instance", "none"):
        result = fuse_streams(image, broken_features, p=0.0, feature_norm=norm)[0]
        assert not result[2, 0, 0, :2].isfinite().any()
        assert first(result[2])[0] == nan
        assert result[[0, 1, 3]].isfinite().all()
    for norm, other in (("unit", 0.0), ("standard", nan)):
        result = fuse_streams(image, broken_features, p=0.0, feature_norm=norm)[0]
        assert first(result[2]) == [nan, nan]
        assert first(result[1]) == [nan, other]
        assert first(result[3]) == [nan, other]
    keep = torch.tensor([[False, True, False, True]])
    assert fuse_streams(broken, broken_features, keep=keep).isfinite().all()
    # Interpolated, only neighbours of the broken voxels are touched: coarse rows 0 and 1 along x reach x = 0 to 4 of 8.
    result = fuse_streams(torch.rand(1, 1, 8, 8, 8), broken_features, p=0.0)[0, 2]
    assert not result[0, 0, :5].isfinite().any()
    assert result[0, 0, 5:].isfinite().all()
    assert result[3:].isfinite().all()


def test_threads_do_not_change_a_bit() -> None:
    torch.manual_seed(0)
    image, features = torch.randn(2, 1, 48, 40, 44), torch.randn(2, 6, 24, 20, 22, requires_grad=True)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            result = fuse_streams(image, features, p=0.0)
            found.append((result, *torch.autograd.grad((result * result).sum(), features)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, three) for one, three in zip(*found, strict=True))


def test_memory_on_the_cpu() -> None:
    """4 MiB are enough for memory that is used again, cannot be resized and can be given back."""
    memory.release()
    image, features = torch.zeros(1, 1, 32, 32, 32), torch.zeros(1, 31, 8, 8, 8)
    result = fuse_streams(image, features)
    address = result.data_ptr()
    assert result.numel() * 4 == 4 << 20 == memory.LARGE
    assert not result.untyped_storage().resizable()
    view = result[0, 3]
    del result
    assert fuse_streams(image, features).data_ptr() != address
    assert not view.any()
    del view
    assert address in {t.data_ptr() for t in (fuse_streams(image, features), fuse_streams(image, features))}
    memory.release()
    assert memory.KEPT == 4
    assert not memory._mappings


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    text = without_code(page.read_text())
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets
    for target in targets:
        if re.match(r"[a-z]+://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert file.is_relative_to(ROOT), target
        if anchor:
            assert anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    """Of a page's titles, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_pictures_are_drawn_by_their_script(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("draw_fuse_streams", ROOT / "docs" / "draw_fuse_streams.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    drawn = {path.name for path in module.draw(tmp_path)}
    assert drawn == set(re.findall(r"\]\((fuse_streams_\w+\.png)\)", PAGE.read_text()))
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn)
