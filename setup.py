"""Build of dropgen_fast: the Python packages, and the native libraries made by CMake.

The library has a C interface and links neither Python nor torch, so it builds in seconds, anywhere, for any torch.
Set ``DROPGEN_FAST_NO_NATIVE=1`` to install without it: the op then runs on Triton or in plain torch.

Where nvcc is found a second library is built for CUDA, for every architecture from Ampere on, whether a GPU is there or
not. ``DROPGEN_FAST_CUDA=0`` leaves it out, ``=1`` insists on it; ``DROPGEN_FAST_CUDA_ARCHITECTURES=90`` (as CMake's
CMAKE_CUDA_ARCHITECTURES) builds for those alone, in seconds.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "dropgen_fast" / "__init__.py").read_text())[1]
NATIVE = os.environ.get("DROPGEN_FAST_NO_NATIVE", "0") in ("", "0")
CUDA = {"": "AUTO", "0": "OFF"}.get(os.environ.get("DROPGEN_FAST_CUDA", ""), "ON")



class CMakeBuild(build_ext):
    """Builds kernels/**/native.* into shared libraries beside the kernels' Python files."""

    def get_ext_filename(self, fullname: str) -> str:
        """A plain shared library: its name carries no Python version."""
        return str(Path(*fullname.split(".")[:-1]) / "libdropgen_fast.so")

    def build_extension(self, ext: Extension) -> None:
        """Configure and build with CMake; one clear line when that cannot be done."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "native"
        build.mkdir(parents=True, exist_ok=True)
        # Afresh each time: what an earlier attempt cached, a compiler that was not there, must not outlive its cause.
        configure = ["cmake", "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release",
                     f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}", f"-DDROPGEN_FAST_CUDA={CUDA}",
                     f"-DDROPGEN_FAST_CUDA_ARCHITECTURES={os.environ.get('DROPGEN_FAST_CUDA_ARCHITECTURES', '')}"]
        (target.parent / "libdropgen_fast_cuda.so").unlink(missing_ok=True)  # of an earlier build, which this one may not renew
        for command in (configure, ["cmake", "--build", str(build), "--parallel"]):
            try:
                done = subprocess.run(command, capture_output=True, text=True)
            except FileNotFoundError:
                sys.exit("dropgen_fast: building the native library needs CMake, and none was found: " + WAY_OUT)
            if done.returncode:
                log = done.stdout + done.stderr
                print(log, file=sys.stderr)
                cuda = any(word in cause(log) for word in ("native.cu", "CUDA"))
                sys.exit(f"dropgen_fast: the native library did not build ({cause(log)}): " + (CUDA_WAY_OUT if cuda else WAY_OUT))
            for line in done.stdout.splitlines():
                if "dropgen_fast: " in line:  # with or without CUDA
                    print(line.removeprefix("-- "))


def cause(log: str) -> str:
    """The part of a log of CMake or a compiler that says what went wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for i, line in enumerate(lines):
        if line.startswith("CMake Error"):
            return " ".join(lines[i + 1 : i + 4]) or line  # the message begins on the next line, and is folded
        if "error:" in line:
            return line
    return lines[-1] if lines else "no output"


WAY_OUT = "install a C++17 compiler, or set DROPGEN_FAST_NO_NATIVE=1 to install without the native CPU backend"
CUDA_WAY_OUT = "set DROPGEN_FAST_CUDA=0 to install without the native CUDA backend (Triton serves GPUs without it)"


class PlatformWheel(bdist_wheel):
    """The library depends on the platform and on no Python version."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform> when the native library is inside."""
        tag: tuple[str, str, str] = super().get_tag()
        return ("py3", "none", tag[2]) if NATIVE else tag


OPS = [f"dropgen_fast.kernels.{op}" for op in ("dice_ce", "fuse_streams", "intensity_chain", "mind_ssc", "warp")]

setup(
    name="dropgen_fast",
    version=VERSION,
    description="The fastest training engine for DropGen: domain-general 3D biomedical segmentation",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=["dropgen_fast", "dropgen_fast.bench", "dropgen_fast.bench.loading", "dropgen_fast.bench.scaling",
              "dropgen_fast.data", "dropgen_fast.demo", "dropgen_fast.features", "dropgen_fast.presets",
              "dropgen_fast.record", "dropgen_fast.scoring", "dropgen_fast.kernels", *OPS],
    package_dir={"dropgen_fast": "dropgen_fast", "dropgen_fast.kernels": "kernels"},
    package_data={"dropgen_fast": ["py.typed"], "dropgen_fast.presets": ["*.yaml"],
                  "dropgen_fast.kernels": ["*.h"],
                  **{op: ["*.h", "*.cpp", "*.cu"] for op in OPS}},
    ext_modules=[Extension("dropgen_fast.kernels.native", sources=[])] if NATIVE else [],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
    install_requires=["torch>=2.10", "triton>=3.4; platform_system == 'Linux'", "numpy>=1.26", "scipy>=1.11",
                      "nibabel>=5.2", "monai>=1.4",
                      "tyro>=0.9", "pyyaml>=6", "tqdm>=4.66", "tensorboard>=2.15", "matplotlib>=3.8",
                      "safetensors>=0.4", "huggingface-hub>=0.26"],
    extras_require={  # one of cpu, cuda13 and cuda12, then what else is wanted
        "cuda13": ["nvidia-dali-cuda130>=1.50", "cupy-cuda13x>=13.6", "nvidia-ml-py>=12"],
        "cuda12": ["nvidia-dali-cuda120>=1.50", "cupy-cuda12x>=13", "nvidia-ml-py>=12"],
        "cpu": ["nvidia-dali-cuda130>=1.50"],  # DALI's CPU backend: needs no GPU and no driver
        "cluster": ["distributed>=2024.1"],  # prepare over several machines
        "wandb": ["wandb>=0.17"],  # train --wandb
        "demo": ["nilearn>=0.10.4"],  # its wheel carries the ICBM152 template
        "test": ["pytest>=8", "pytest-benchmark>=5", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.8", "mypy>=1.13",
                 "types-PyYAML", "distributed>=2024.1", "wandb>=0.17",
                 "nnunetv2>=2.8"],  # the trainer of docs/fuse_streams.md runs in the real one
    },
    entry_points={"console_scripts": ["dropgen-fast = dropgen_fast.cli:main"]},
)
