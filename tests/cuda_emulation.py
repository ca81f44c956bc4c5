"""Builds the CUDA kernels and bindings for the CPU (cuda/cuda_host.h): torch.ops.seqkernels_emulated.*"""

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from devices import other_ops

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [
    ROOT / "tests/cuda/emulated.cpp",
    *sorted((ROOT / "csrc/ops").glob("*_cuda.cpp")),
    *(ROOT / "csrc/ops" / name for name in ("recurrent.cpp", "tensor.cpp", "kept.cpp")),
]
TORCH = Path(torch.__file__).parent
FLAGS = [
    *("-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *(f"-I{ROOT / folder}" for folder in ("csrc", "tests/cuda")),
    *("-isystem", str(TORCH / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000"),
    *("-DSEQKERNELS_GPU_LIBRARY=seqkernels_emulated", "-DSEQKERNELS_GPU_KEY=CPU"),
]  # fmt: skip
OPS = (
    *("lstm_layer_fwd", "lstm_layer_bwd", "lstm_cell_fwd", "gru_layer_fwd", "gru_layer_bwd", "gru_cell_fwd"),
    *("rnn_layer_fwd", "rnn_layer_bwd", "rnn_cell_fwd", "pack_weights", "cuda_plan", "cuda_blocks"),
)


def build() -> Path:
    """The library, compiled anew only when its sources changed."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    sources = [p for folder in ("csrc", "tests/cuda") for p in (ROOT / folder).rglob("*") if p.is_file()]
    names = [source.name for source in SOURCES]
    state = hashlib.sha256(f"{torch.__version__} {compiler} {FLAGS} {names}".encode())
    for path in sorted(sources):
        state.update(path.read_bytes())
    folder = ROOT / "build" / "cuda-emulation"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{state.hexdigest()[:16]}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of pytest may be at it
        if not library.is_file():
            for old in folder.glob("*.so"):
                old.unlink()
            objects = [str(folder / f"{s.stem}.o") for s in SOURCES]
            for source, obj in zip(SOURCES, objects, strict=True):
                run(compiler, *FLAGS, "-c", str(source), "-o", obj)
            linked = folder / "linked"
            run(compiler, "-shared", *objects, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ldl", "-o", str(linked))
            linked.rename(library)
    return library


def run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}:\n{result.stdout[-4000:]}\n{result.stderr[-8000:]}"


@cache
def load() -> ctypes.CDLL:
    definitions = torch.library.Library("seqkernels_emulated", "DEF")
    for name in OPS:
        schema = str(getattr(torch.ops.seqkernels, name).default._schema)
        definitions.define(re.sub("^seqkernels::", "", schema))
    path = build()
    torch.ops.load_library(str(path))
    library = ctypes.CDLL(str(path))
    library.definitions = definitions
    library.seqkernels_emulate.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_uint]
    return library


@contextmanager
def emulated_gpu(multiprocessors: int, shared: int = 227 << 10, seed: int = 1):
    """Our layers and cells run on CUDA kernels, emulated; without multiprocessors step by step."""
    load().seqkernels_emulate(multiprocessors, shared, seed)
    with other_ops(emulated):
        yield


def emulated(op: torch._ops.OpOverload) -> torch._ops.OpOverload:
    return getattr(torch.ops.seqkernels_emulated, op._schema.name.partition("::")[2]).default
