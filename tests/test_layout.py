"""Rules about the native sources that no compiler checks."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "kernels"
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)

# What an ISA file may take from outside: C headers, intrinsics, and C++ headers without inline functions that
# the compiler emits as weak symbols: one compiled for AVX-512 may be the copy that the linker keeps for all.
LIGHT_HEADERS = {
    *("immintrin.h", "sched.h"),
    *("cstdint", "type_traits", "utility"),
}


def native_sources(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})


def includes(source: Path) -> list[tuple[str, str]]:
    return INCLUDE.findall(source.read_text())


def reached(source: Path) -> tuple[set[Path], set[str]]:
    """Our own files and the system headers that `source` includes, directly or not."""
    ours, system, todo = set(), set(), [source]
    while todo:
        file = todo.pop()
        if file in ours:
            continue
        ours.add(file)
        for bracket, name in includes(file):
            near = (file.parent / name).resolve(), (ROOT / "csrc" / name).resolve()
            found = next((p for p in near if bracket == '"' and p.is_file()), None)
            if found:
                todo.append(found)
            else:
                system.add(name)
    return ours, system


def isa_sources() -> list[Path]:
    sources = sorted((KERNELS / "cpu").glob("isa_*.cpp"))
    assert sources, "no ISA file found"
    return sources


def test_kernels_are_torch_free():
    sources = native_sources(KERNELS)
    assert sources
    for source in sources:
        foreign = [n for _, n in includes(source) if re.match(r"(torch|ATen|c10|pybind11)\b|Python\.h", n)]
        assert not foreign, f"{source.relative_to(ROOT)}: kernels use neither torch nor Python, got {foreign}"


@pytest.mark.parametrize("source", isa_sources(), ids=lambda p: p.stem)
def test_isa_files_include_light_headers_only(source: Path):
    ours, system = reached(source)
    assert len(ours) > 1, "the ISA file includes no kernel"
    assert system <= LIGHT_HEADERS, f"{source.name} reaches {sorted(system - LIGHT_HEADERS)}"


def test_nothing_is_built_for_the_build_machine_alone():
    build_files = [ROOT / name for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile")]
    for file in [*build_files, *native_sources(ROOT / "csrc")]:
        text = re.sub(r"(#|//).*", "", file.read_text())
        assert not re.search(r"-m(arch|cpu|tune)=native|-flto|-ffast-math", text), file


def test_every_isa_has_its_flags_and_its_file():
    listed = re.search(r"set\(isas (baseline [^)]+)\)", (ROOT / "CMakeLists.txt").read_text())
    assert listed
    assert {p.stem.removeprefix("isa_") for p in isa_sources()} == set(listed[1].split())
