"""The source distribution, the metadata and an installation from scratch, as a user meets them."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import seqkernels

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(seqkernels.__file__).parent
# What the stable ABI consists of: C functions. A C++ symbol of torch would tie the library to one version.
STABLE_ABI = re.compile(r"(aoti_torch_|torch_|aten_)\w+")
# Vector registers that code for an instruction set must not touch.
FORBIDDEN_REGISTERS = {"baseline": "%[yz]mm", "avx2": "%zmm|%k[1-7]"}


def run(*command: object, cwd: Path, **environment: str) -> str:
    command = [str(c) for c in command]
    result = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}:\n{result.stdout[-4000:]}\n{result.stderr[-8000:]}"
    return result.stdout


def build_meta(call: str, cwd: Path, **environment: str) -> str:
    """One hook of the build backend, in a fresh interpreter. Returns the name of the file that it made."""
    code = f"from setuptools import build_meta; print('\\n' + build_meta.{call})"
    return run(sys.executable, "-c", code, cwd=cwd, **environment).splitlines()[-1]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources, so that building leaves nothing behind."""
    copy = tmp_path_factory.mktemp("checkout") / "seqkernels"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory) -> str:
    """A PYTHONPATH on which `import torch` fails."""
    folder = tmp_path_factory.mktemp("blocked")
    (folder / "torch.py").write_text("raise ImportError('the metadata must not need torch')")
    return str(folder)


@pytest.fixture(scope="module")
def unpacked(checkout, without_torch, tmp_path_factory) -> Path:
    """The source distribution, made without torch, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    name = build_meta(f"build_sdist({str(folder)!r})", checkout, PYTHONPATH=without_torch)
    assert name == f"seqkernels-{seqkernels.__version__}.tar.gz"
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder)
    return folder / name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def installed(unpacked, tmp_path_factory) -> Path:
    """The package built from the source distribution and installed into an empty folder, offline: without
    CUDA, as on most machines, and without optimisation, which took a third of the suite's time and shows
    nothing here. What the compiler makes of the kernels is read off the objects of this tree."""
    target = tmp_path_factory.mktemp("target")
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-build-isolation", "--no-deps"]
    cmake = "-DCMAKE_COMPILE_WARNING_AS_ERROR=ON -DCMAKE_BUILD_TYPE=Debug"
    run(*pip, "--target", target, unpacked, cwd=unpacked, CMAKE_ARGS=cmake, SEQKERNELS_CUDA="off")
    return target


def objects(pattern: str) -> list[Path]:
    folder = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    found = sorted(folder.glob(f"CMakeFiles/*.dir/csrc/**/{pattern}.o"))
    assert found, f"no object {pattern}.o in {folder}: run make build"
    return found


def isa(obj: Path) -> str:
    return obj.name.removeprefix("isa_").removesuffix(".cpp.o")


def test_metadata_needs_no_torch(checkout, without_torch, tmp_path):
    call = f"prepare_metadata_for_build_wheel({str(tmp_path)!r})"
    name = build_meta(call, checkout, PYTHONPATH=without_torch)
    lines = (tmp_path / name / "METADATA").read_text().splitlines()
    for line in (
        "Name: seqkernels",
        f"Version: {seqkernels.__version__}",
        "Requires-Python: >=3.10",
        "Requires-Dist: torch>=2.11",
        "Provides-Extra: bench",
        "License-Expression: Apache-2.0",
    ):
        assert line in lines


def test_sdist_has_all_sources(unpacked, checkout):
    def files(root: Path) -> set[str]:
        folders = ("csrc", "docs", "examples", "seqkernels", "tests")
        found = (p.relative_to(root) for folder in folders for p in (root / folder).rglob("*") if p.is_file())
        return {str(p) for p in found if p.suffix not in {".so", ".pyc"}}

    assert files(unpacked) == files(checkout)
    for name in (
        "CMakeLists.txt",
        "LICENSE",
        "Makefile",
        "README.md",
        "pyproject.toml",
        "requirements-dev.txt",
    ):
        assert (unpacked / name).is_file(), name


def test_installation_from_sdist_runs(installed, tmp_path):
    call = "seqkernels.LSTM(3, 4)(torch.ones(5, 2, 3))[0].shape"
    code = f"import seqkernels, torch; print(seqkernels.__file__, {call})"
    output = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert output.split(maxsplit=1) == [
        str(installed / "seqkernels" / "__init__.py"),
        "torch.Size([5, 2, 4])\n",
    ]


def test_installation_has_what_runs_and_nothing_else(installed, checkout):
    def files(package: Path) -> set[str]:
        found = (p for p in package.rglob("*") if p.is_file() and p.suffix not in {".so", ".pyc"})
        return {str(p.relative_to(package)) for p in found}

    package = installed / "seqkernels"
    assert files(package) == files(checkout / "seqkernels")
    assert sorted(p.name.partition(".")[0] for p in package.glob("*.so")) == ["_kernels", "_ops"]
    folders = {p.name for p in installed.iterdir()}
    assert folders - {"seqkernels", "bin"} == {f"seqkernels-{seqkernels.__version__}.dist-info"}


def test_op_library_uses_the_stable_abi_only():
    symbols = run("nm", "-D", "--undefined-only", "_ops.so", cwd=PACKAGE).split()
    torch = [
        s
        for s in symbols
        if "torch" in s or "c10" in s or s.startswith(("_ZN2at", "_ZNK2at", "aoti_", "aten_"))
    ]
    assert torch
    assert [s for s in torch if not STABLE_ABI.fullmatch(s)] == []


def test_ops_build_with_the_oldest_torch(checkout):
    """These are in headers of newer torch whatever TORCH_TARGET_VERSION says, and in those of 2.11 not."""
    newer = re.compile(r"\bSTABLE_TORCH_ERROR_CODE_CHECK\b")
    assert [p.name for p in (checkout / "csrc/ops").iterdir() if newer.search(p.read_text())] == []


def test_libraries_depend_on_nothing_by_path(installed):
    for library in (*PACKAGE.glob("*.so"), *(installed / "seqkernels").glob("*.so")):
        dynamic = run("readelf", "-d", library, cwd=ROOT)
        assert "NEEDED" in dynamic
        assert not re.search(r"RPATH|RUNPATH|NEEDED.*/", dynamic), library.name


def test_isa_objects_export_their_table_and_nothing_else():
    """A weak symbol (an inline function of the C++ library, say) compiled for AVX-512 may be the copy the
    linker keeps for everyone, and crash older processors."""
    for obj in objects("isa_*.cpp"):
        symbols = run("nm", "-C", "--defined-only", "--extern-only", obj, cwd=ROOT).splitlines()
        assert [s.split(maxsplit=2)[2] for s in symbols] == [f"seqkernels::kernels_{isa(obj)}()"], obj.name


def test_only_isa_objects_use_wide_registers():
    for obj in objects("*.cpp"):
        name = isa(obj) if obj.name.startswith("isa_") else "baseline"
        if name in FORBIDDEN_REGISTERS:
            code = run("objdump", "-d", "--no-show-raw-insn", obj, cwd=ROOT)
            assert not re.search(FORBIDDEN_REGISTERS[name], code), obj.name


@pytest.mark.parametrize("target", ["aarch64", "x86_64"])
def test_clang_compiles_the_kernels(target, tmp_path):
    """For Arm too, whose baseline has NEON. Only as far as its own intermediate code: that is quick."""
    pytest.importorskip("ziglang", reason="the Clang of requirements-dev.txt is not installed")
    source, *options = {"aarch64": ["baseline"], "x86_64": ["amx", "-mcpu=sapphirerapids"]}[target]
    flags = f"-target {target}-linux-gnu -std=c++20 -O0 -Wall -Wextra -Werror -c".split()
    middle = "-emit-llvm -Xclang -disable-llvm-passes".split()
    file, bitcode = ROOT / f"csrc/kernels/cpu/isa_{source}.cpp", tmp_path / "kernels.bc"
    clang = (sys.executable, "-m", "ziglang", "c++")
    run(*clang, *flags, *middle, *options, "-I", ROOT / "csrc", file, "-o", bitcode, cwd=tmp_path)
    assert f"kernels_{source}".encode() in bitcode.read_bytes()
