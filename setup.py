"""Native build: `build_ext` runs CMake and Ninja. The rest about the package is in pyproject.toml, and the
native targets are in CMakeLists.txt."""

import importlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def package_dir(name: str) -> Path:
    """Where an installed package lies. The package is not imported: its headers are all that is needed, and
    importing torch takes seconds."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(
            f"seqkernels: building needs {name}, which this Python ({sys.executable}) does not have. "
            f"Install it (pip install -r requirements-dev.txt), or leave out --no-build-isolation."
        )
    return Path(spec.origin).parent


def tool(name: str) -> str:
    """cmake or ninja: the package in this environment, which need not be activated, else the one on PATH."""
    if importlib.util.find_spec(name):
        package = importlib.import_module(name)
        return str(Path(package.CMAKE_BIN_DIR if name == "cmake" else package.BIN_DIR, name))
    path = shutil.which(name)
    if path is None:
        raise SystemExit(f"seqkernels: building needs {name}: pip install {name}")
    return path


class CMakeBuild(build_ext):
    def run(self) -> None:
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        target = ROOT if self.inplace else Path(self.build_lib).resolve()
        configure = [
            f"-DTORCH_DIR={package_dir('torch')}",
            f"-Dpybind11_DIR={package_dir('pybind11') / 'share' / 'cmake' / 'pybind11'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DSEQKERNELS_SANITIZE={os.environ.get('SEQKERNELS_SANITIZE', '')}",
            f"-DSEQKERNELS_CUDA={os.environ.get('SEQKERNELS_CUDA', 'auto')}",
            f"-DTORCH_CUDA_ARCH_LIST={os.environ.get('TORCH_CUDA_ARCH_LIST', '')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        self.cmake("-G", "Ninja", "-S", ROOT, "-B", build_dir, *configure)
        self.cmake("--build", build_dir, *jobs)
        self.cmake("--install", build_dir, "--prefix", target, "--component", "python")

    def cmake(self, *args: str | Path) -> None:
        subprocess.run([tool("cmake"), *map(str, args)], check=True)

    def get_outputs(self) -> list[str]:
        names = ["_ops.so", self.get_ext_filename("_kernels")]
        return [str(Path(self.build_lib, "seqkernels", name)) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {built: str(ROOT / "seqkernels" / Path(built).name) for built in self.get_outputs()}


setup(ext_modules=[Extension("seqkernels._kernels", sources=[])], cmdclass={"build_ext": CMakeBuild})
