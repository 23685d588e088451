"""fuse_streams' CUDA source without a GPU: compiled for one and read, loaded without a driver, and run on the CPU."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fuse_streams_cases import IMAGE_NORMS, close, definition, half_of, layouts, streams
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dropgen_fast import fuse_streams
from dropgen_fast.kernels import library
from dropgen_fast.kernels.fuse_streams import FEATURE_NORMS, backends, native

TESTS = Path(__file__).parent
ROOT = TESTS.parent
KERNELS = ROOT / "kernels"


# ---- the source, run on the CPU --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """native.cu compiled by the C++ compiler, with cuda_emulation.h in CUDA's place."""
    compiler = shutil.which(os.environ.get("CXX", "g++")) or pytest.skip("no C++ compiler")
    path = tmp_path_factory.mktemp("emulated") / "emulated.so"
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC", "-shared",
               "-fvisibility=hidden", f"-I{TESTS}", "-x", "c++", str(KERNELS / "fuse_streams" / "native.cu"), "-o", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = ctypes.CDLL(str(path))
    result.dgf_cuda_error.restype = ctypes.c_char_p
    return result


@pytest.fixture
def gpu(emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """`backend="native"` runs native.cu, in ascending order of threads."""
    def call(name: str, arguments: native.Arguments) -> None:
        library.call_cuda(name, "fuse_streams_workspace", arguments, torch.device("cpu"), emulated)

    def backward(*arguments: Any, **options: Any) -> None:
        grads = arguments[7]  # float32 on a GPU whatever the features are
        wide = grads.float() if grads is not None else None
        on_cpu(*arguments[:7], wide, **options)
        if grads is not None and grads.dtype != torch.float32:
            grads.copy_(wide)

    on_cpu: Callable[..., None] = native.backward
    monkeypatch.setattr(native.library, "call", call)
    monkeypatch.setattr(native, "backward", backward)
    emulated.dgf_emulation_descending(0)
    yield emulated
    emulated.dgf_emulation_descending(0)


def gradients_agree(
    image: Tensor, features: Tensor | None, keep: Tensor, *, grad: Tensor | None = None, scale: float = 4.0,
    memory_format: torch.memory_format = torch.contiguous_format, dtype: torch.dtype | None = None, **options: Any,
) -> Tensor:
    """The result and both gradients against the definition in float64; returns the result."""
    inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in (image, features) if t is not None]
    result = fuse_streams(*inputs, keep=keep, backend="native", memory_format=memory_format, dtype=dtype, **options)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wanted = definition(exact[0], exact[1] if len(exact) > 1 else None, keep, **options)
    close(result.detach(), wanted.detach(), scale=max(scale, float(wanted.detach().abs().max())))
    if grad is None:
        grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(3)).to(result.dtype)
    of = [i for i, t in enumerate(inputs) if t.requires_grad]
    got = torch.autograd.grad(result, [inputs[i] for i in of], grad)
    for g, w in zip(got, torch.autograd.grad(wanted, [exact[i] for i in of], grad.double()), strict=True):
        close(g, w, scale=max(1.0, float(w.abs().max())))
    return result.detach()


GRIDS = {"equal": (4, 6, 16), "half": (2, 3, 8), "odd": (3, 4, 5), "coarsest": (1, 1, 1), "along x": (4, 6, 8),
         "not x": (2, 3, 16)}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_types_grids_and_layouts(
    gpu: ctypes.CDLL, grid: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format,
) -> None:
    """Rows of 16 voxels: packets of 128 bits in every type, which the emulation would find misaligned if they were."""
    image, features = streams((2, 1, 4, 6, 16), grid, 5, dtype=dtype, image_dtype=dtype)
    keep = half_of(2, 6)
    for multiple in (1, 8):
        result = gradients_agree(image, features, keep, memory_format=memory_format, channel_multiple=multiple)
        assert result.is_contiguous(memory_format=memory_format)
        assert not result[:, 6:].any()
        assert not result[:, :6][~keep].any()


@pytest.mark.parametrize(("image_norm", "feature_norm"), list(itertools.product(IMAGE_NORMS, FEATURE_NORMS)))
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_norms(gpu: ctypes.CDLL, image_norm: str, feature_norm: str, memory_format: torch.memory_format) -> None:
    for grid in [(4, 5, 8), (2, 5, 4)]:
        image, features = streams((2, 2, 4, 5, 8), grid)
        gradients_agree(image, features, half_of(2, 7), memory_format=memory_format, image_norm=IMAGE_NORMS[image_norm],
                        feature_norm=feature_norm)


@pytest.mark.parametrize("image_dtype", [torch.int16, torch.uint8])
@pytest.mark.parametrize("width", [16, 9])
def test_whole_numbers(gpu: ctypes.CDLL, image_dtype: torch.dtype, width: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        image, features = streams((2, 1, 5, 6, width), (5, 6, width), image_dtype=image_dtype)
        result = gradients_agree(image, features, torch.ones(2, 6, dtype=torch.bool), p=0.0, dtype=dtype)
        assert result[:, 0].amin() == 0
        assert result[:, 0].amax() == 1


@pytest.mark.parametrize("width", [8, 7])
@pytest.mark.parametrize("grid", [(3, 4), (6, 6)])
def test_strides_of_inputs_and_gradients(gpu: ctypes.CDLL, width: int, grid: tuple[int, int]) -> None:
    image, features = streams((2, 2, 6, 6, width), (*grid, width // 2))
    keep = half_of(2, 7)
    base = torch.randn((2, 7, 6, 6, width), generator=torch.Generator().manual_seed(3))
    for i, f, g in zip(layouts(image), layouts(features), layouts(base), strict=True):
        gradients_agree(i, f, keep, grad=g)
    gradients_agree(image, features, keep, grad=torch.ones(()).expand(base.shape))


def test_views_that_begin_off_a_packet(gpu: ctypes.CDLL) -> None:
    """A slice is dense and not aligned: no packet may be read from it."""
    image, features = streams((1, 3, 2, 4, 16), (2, 4, 16), 3, dtype=torch.bfloat16, image_dtype=torch.bfloat16)
    off = [torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape) for t in (image, features)]
    assert off[0].data_ptr() % 16
    gradients_agree(*off, half_of(1, 6))


def test_image_alone(gpu: ctypes.CDLL) -> None:
    gradients_agree(streams((2, 3, 4, 5, 8))[0], None, half_of(2, 3), image_norm=IMAGE_NORMS["zscore"])
    close(fuse_streams(streams((2, 3, 4, 5, 8))[0], p=0.0, backend="native"),
          definition(streams((2, 3, 4, 5, 8))[0], None, torch.ones(2, 3, dtype=torch.bool), p=0.0))


def test_statistics_over_many_blocks(gpu: ctypes.CDLL) -> None:
    """More voxels than blocks share at once, with an offset that leaves E[x²] - E[x]² in float32 no digit."""
    image, features = streams((1, 1, 20, 72, 50), (20, 72, 50), 2)
    features += 1e4 + torch.linspace(-5, 5, 72)[:, None] + torch.linspace(0, 3, 20)[:, None, None]
    image += torch.linspace(-5, 5, 20)[:, None, None]
    keep = torch.ones(1, 3, dtype=torch.bool)
    for f in (features, layouts(features)[1], layouts(features)[2]):
        result = fuse_streams(layouts(image)[2], f, p=0.0, backend="native")
        # The inputs themselves are rounded to 1e4 · 2⁻²⁴ = 6e-4 of a standard deviation; the definition sees the same ones.
        close(result, definition(image, features, keep, p=0.0), scale=20)


def test_more_channels_than_threads_and_than_shared_memory(gpu: ctypes.CDLL) -> None:
    image, features = streams((1, 1, 2, 2, 8), (2, 2, 8), 40)
    gradients_agree(image, layouts(features)[1], half_of(1, 41), memory_format=torch.channels_last_3d)
    image, features = streams((1, 1, 1, 2, 2), (1, 1, 2), 1600)
    gradients_agree(image, features, half_of(1, 1601), memory_format=torch.channels_last_3d, feature_norm="none")


def test_dropped_channels_are_not_read(gpu: ctypes.CDLL) -> None:
    image, features = streams((2, 1, 4, 6, 8), (2, 3, 4))
    keep = half_of(2, 6)
    features[~keep[:, 1:]] = torch.nan
    for f in layouts(features)[:2]:
        assert fuse_streams(image, f, keep=keep, backend="native").isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_non_finite_voxels_stay_where_they_are(gpu: ctypes.CDLL, bad: float, memory_format: torch.memory_format) -> None:
    image, features = streams((2, 1, 4, 6, 8), (4, 6, 8))
    image[1] = 2.5  # constant: 0, but for the voxel that is none
    clean = definition(image, features, torch.ones(2, 6, dtype=torch.bool), p=0.0)
    image[0, 0, 2, 3, 4] = image[1, 0, 0, 0, 0] = bad
    features[1, 2, 3, 5, 6] = bad
    result = fuse_streams(image, features, p=0.0, backend="native", memory_format=memory_format)
    wrong = ~result.isfinite()
    assert wrong.nonzero().tolist() == [[0, 0, 2, 3, 4], [1, 0, 0, 0, 0], [1, 3, 3, 5, 6]]
    assert (result - clean)[~wrong].abs().max() < 0.2  # one voxel of hundreds is missing from two statistics


def test_order_of_threads_does_not_change_a_bit(gpu: ctypes.CDLL) -> None:
    """With threads in descending order a read that a barrier should have put off finds something else."""
    image, features = streams((2, 2, 5, 6, 24), (3, 5, 12))
    keep = torch.arange(7) < torch.tensor([[2], [5]])  # what one sample's block leaves behind does not fit the next
    found = []
    for descending, last, (image_norm, feature_norm) in itertools.product(
            (0, 1), (False, True), (("minmax", "instance"), ("none", "standard"))):
        gpu.dgf_emulation_descending(descending)
        f = layouts(features)[last].requires_grad_()
        result = fuse_streams(image, f, keep=keep, image_norm=image_norm, feature_norm=feature_norm, backend="native",
                              memory_format=torch.channels_last_3d if last else torch.contiguous_format)
        found.append((result.detach(), *torch.autograd.grad(result.square().sum(), f)))
    for ascending, turned in zip(found[:4], found[4:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ascending, turned, strict=True))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_call(emulated: ctypes.CDLL, data: st.DataObject) -> None:
    size = data.draw(st.tuples(*[st.integers(1, 9)] * 3), "size")
    grid = tuple(data.draw(st.integers(1, n), "grid") for n in size)
    n, ci, cf = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 4)), "channels")
    image_dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int16, torch.uint8]), "image dtype")
    image, features = streams((n, ci, *size), grid, cf, image_dtype=image_dtype, seed=data.draw(st.integers(0, 99), "seed"))
    keep = half_of(n, ci + cf, data.draw(st.integers(0, 99), "draw"))
    options = {"image_norm": data.draw(st.sampled_from(list(IMAGE_NORMS.values())), "image norm"),
               "feature_norm": data.draw(st.sampled_from(FEATURE_NORMS), "feature norm"),
               "channel_multiple": data.draw(st.sampled_from([1, 4]), "multiple"),
               "eps": 1e-3}  # a channel of two voxels may have next to no variance
    last = data.draw(st.booleans(), "channels last")
    lie = data.draw(st.integers(0, 3), "image layout"), data.draw(st.integers(0, 3), "features layout")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native.library, "call", lambda name, arguments: library.call_cuda(
            name, "fuse_streams_workspace", arguments, torch.device("cpu"), emulated))
        result = fuse_streams(layouts(image)[lie[0]], layouts(features)[lie[1]], keep=keep, p=0.5, backend="native",
                              memory_format=torch.channels_last_3d if last else torch.contiguous_format, **options)
    wanted = definition(image, features, keep, p=0.5, **options)
    close(result, wanted, scale=max(4.0, float(wanted.abs().max())))


def arguments_of(image: Tensor, monkeypatch: pytest.MonkeyPatch) -> native.Arguments:
    """What a call hands to the library, with the tensors that it points to kept alive."""
    caught: list[native.Arguments] = []
    out, stats = torch.zeros(1, 1, *image.shape[2:]), torch.zeros(1, 2)
    monkeypatch.setattr(native.library, "call", lambda name, arguments: caught.append(arguments))
    native.forward(image, None, torch.ones(1, 1), out, stats, torch.zeros(0), image_norm=("minmax", 0.0, 0.0),
                   feature_norm="none", eps=1e-5)
    caught[0].keep_alive = image, out, stats  # type: ignore[attr-defined]
    return caught[0]


def refuses_wrong_calls(lib: ctypes.CDLL, arguments: native.Arguments) -> None:
    """A struct of another size, an unknown type, a workspace that is too small."""
    assert lib.dgf_fuse_streams_workspace(ctypes.byref(arguments)) > 0
    for name in ("dgf_fuse_streams_forward", "dgf_fuse_streams_backward"):
        arguments.bytes += 8
        assert getattr(lib, name)(ctypes.byref(arguments), None, ctypes.c_int64(0)) == 3
        arguments.bytes -= 8
    assert lib.dgf_fuse_streams_forward(ctypes.byref(arguments), None, ctypes.c_int64(0)) == 4
    arguments.out.type = library.TYPES[torch.int16]
    assert lib.dgf_fuse_streams_forward(ctypes.byref(arguments), None, ctypes.c_int64(0)) == 2
    assert lib.dgf_fuse_streams_backward(ctypes.byref(arguments), None, ctypes.c_int64(0)) == 2
    arguments.out.type = 0
    arguments.size[2] = 40_000
    assert lib.dgf_fuse_streams_forward(ctypes.byref(arguments), None, ctypes.c_int64(1 << 20)) == 5


def test_wrong_calls_of_the_library(emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses_wrong_calls(emulated, arguments_of(streams((1, 1, 2, 2, 8))[0], monkeypatch))


def test_cpu_library_knows_the_struct(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of(streams((1, 1, 2, 2, 8))[0], monkeypatch)
    lib = library.load("cpu")[0]
    assert lib is not None
    arguments.bytes += 8
    assert lib.dgf_fuse_streams_forward(ctypes.byref(arguments)) == 3


# ---- the source, compiled for a GPU that need not be here ------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libdropgen_fast_cuda.so for sm_90, built by the project's CMake."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc: the CUDA source cannot be compiled here")
    build = tmp_path_factory.mktemp("cuda")
    for command in (["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), "-DDROPGEN_FAST_CUDA=ON",
                     "-DDROPGEN_FAST_CUDA_ARCHITECTURES=90-real"],
                    ["cmake", "--build", str(build), "--target", "dropgen_fast_cuda"]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "warning" not in done.stdout + done.stderr
    return build / "libdropgen_fast_cuda.so"


@pytest.fixture(scope="module")
def machine_code(compiled: Path) -> dict[str, str]:
    """Each kernel's name, as ``fuse_rows<BFloat16, 8>``, and its SASS."""
    tool = shutil.which("cuobjdump")
    if not tool:
        backend = pytest.importorskip("triton.backends.nvidia")
        tool = str(Path(backend.__path__[0]) / "bin" / "cuobjdump")
    # What it calls is beside it.
    environment = os.environ | {"PATH": f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"}
    sass = subprocess.run([tool, "--dump-sass", str(compiled)], capture_output=True, text=True, check=True,
                          env=environment).stdout
    names = shutil.which("c++filt") or pytest.skip("no c++filt")
    sass = subprocess.run([names], input=sass, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*Function : (.*)$", sass.replace("(anonymous namespace)::", ""), flags=re.MULTILINE)
    return {name.split("(")[0].removeprefix("void "): code for name, code in zip(parts[1::2], parts[2::2], strict=True)}


def test_library_without_a_driver(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads, knows the struct, and says what is missing."""
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    lib = ctypes.CDLL(str(compiled))
    lib.dgf_cuda_error.restype = ctypes.c_char_p
    arguments = arguments_of(streams((1, 1, 2, 2, 8))[0], monkeypatch)
    with pytest.raises(RuntimeError, match=r"fuse_streams_forward: .*(driver|no CUDA-capable device)"):
        library.call_cuda("fuse_streams_forward", "fuse_streams_workspace", arguments, torch.device("cpu"), lib)
    refuses_wrong_calls(lib, arguments)


KERNELS_OF = {f"{kernel}<{out}, {count}>" for kernel in ("fuse_rows", "fuse_voxels", "image_gradients")
              for out, wide in (("float", 4), ("Half", 8), ("BFloat16", 8)) for count in (1, wide)} | {
    "statistics", "gather_gradients", "instance_gradients", "voxel_gradients"}


def test_nothing_is_spilled(machine_code: dict[str, str]) -> None:
    assert set(machine_code) == KERNELS_OF
    for name, code in machine_code.items():
        assert not re.search(r"\b(LDL|STL)\b", code), name


def test_hot_paths_move_128_bits(machine_code: dict[str, str]) -> None:
    for out, count in (("float", 4), ("Half", 8), ("BFloat16", 8)):
        for kernel in ("fuse_rows", "fuse_voxels", "image_gradients"):
            code = machine_code[f"{kernel}<{out}, {count}>"]
            assert re.search(r"\bSTG\.E\.128\b", code), (kernel, out)
            assert re.search(r"\bLDG\.E\.128\b", code), (kernel, out)
    assert re.search(r"\bLDG\.E\.128\b", machine_code["statistics"])


# ---- which backend takes a call --------------------------------------------------------------------------------------


def test_missing_cuda_half_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "CUDA_MISSING", library.ABSENT["cuda"])
    image = streams()[0]
    assert not native.refuses([image])
    on_gpu = type("OnGpu", (), {"device": torch.device("cuda:0"), "is_cuda": True})()
    assert "built without CUDA (no nvcc" in native.refuses([on_gpu])
    monkeypatch.setattr(native, "CUDA_MISSING", "")
    on_gpu.dtype, on_gpu.shape, on_gpu.dim = torch.float32, (1, 1, 2, 2, 1 << 16), lambda: 5
    assert "32 bits" in native.refuses([on_gpu])


def test_gpu_calls_go_to_the_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext(calls.append(device)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 1234 + device.index}))
    monkeypatch.setattr(native.library, "call_cuda", lambda *arguments: calls.append(arguments))
    tensor: Any = type("OnGpu", (), {"device": torch.device("cuda:1"), "is_cuda": True})
    native._call("fuse_streams_forward", native.Arguments(), tensor)
    device, (name, _, arguments, where) = calls
    assert device == where == tensor.device
    assert name == "fuse_streams_forward"
    assert arguments.stream == 1235


@pytest.mark.parametrize(("missing", "wanted"), [((), "triton"), (("triton",), "native"), (("triton", "native"), "reference")])
def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], wanted: str) -> None:
    for module in (backends.triton, backends.native):
        name = module.__name__.rsplit(".", 1)[1]
        monkeypatch.setattr(module, "MISSING", "not here" if name in missing else "")
        monkeypatch.setattr(module, "refuses", lambda tensors: "")
    on_gpu: Any = type("OnGpu", (), {"is_cuda": True, "dtype": torch.float32})()
    assert backends.choose("auto", on_gpu, None) == wanted


def test_fastest_is_measured_once_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "FASTEST", {})
    image, features = streams((2, 1, 8, 8, 8), (4, 4, 4))
    keep = half_of(2, 6)
    runs: list[str] = []

    def candidates(*slow: str) -> dict[str, Callable[[], object]]:
        def run(name: str) -> Tensor:
            runs.append(name)
            time.sleep(0.05 * (name in slow))
            return fuse_streams(image, features, keep=keep, backend=name)
        return {name: lambda name=name: run(name) for name in ("reference", "native")}

    def clock(run: Callable[[], object]) -> float:
        run()  # compiled, allocated
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin

    kind = backends.kind_of(image, features, ("minmax", torch.float32))
    assert backends.fastest(kind, candidates("reference"), clock) == "native"
    assert runs == ["reference", "reference", "native", "native"]
    assert backends.fastest(kind, candidates("native"), clock) == "native"  # remembered
    assert len(runs) == 4
    assert backends.fastest("other", {"triton": lambda: 0, "native": lambda: 1}, lambda run: 0.0) == "triton"


def test_kinds_of_calls() -> None:
    image, features = streams((2, 1, 8, 8, 8), (4, 4, 4))
    kind = backends.kind_of(image, features, ("minmax",))
    assert kind == backends.kind_of(*streams((2, 1, 8, 8, 8), (4, 4, 4), seed=5), ("minmax",))
    others = [(image, None, ("minmax",)), (image.bfloat16(), features, ("minmax",)), (image, features, ("none",)),
              (image, features[..., :2], ("minmax",)), (torch.cat([image] * 3), torch.cat([features] * 3), ("minmax",)),
              (image, features.contiguous(memory_format=torch.channels_last_3d), ("minmax",))]
    assert kind not in [backends.kind_of(*other) for other in others]


def test_measurements_are_for_eager_calls_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "FASTEST", {})
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    run = pytest.fail
    assert backends.measured("native", streams()[0], None, (), run) == "native"  # on the CPU
    fake: Any = type("OnGpu", (), {"is_cuda": True})()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert backends.measured("triton", fake, None, (), run) == "triton"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    torch.use_deterministic_algorithms(True)
    try:
        assert backends.measured("triton", fake, None, (), run) == "triton"
    finally:
        torch.use_deterministic_algorithms(False)
    compiled = torch.compile(lambda x: x * (backends.measured("native", x, None, (), run) == "native"), fullgraph=True,
                             backend="eager")
    assert compiled(torch.ones(2)).sum() == 2
