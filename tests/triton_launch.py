"""Calls of the launcher compiled for a GPU that is not there, with the arguments that a GPU would get.

What no table of tiles says is decided in the launcher: which pointers are None, of what type a number is,
whether heads are packed and keys split. Nothing runs.

`PYTHONPATH=. python tests/triton_launch.py` prints the table of additive attention in docs/attention-gpu.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from unittest import mock

import torch
import triton_cubin
import triton_matrix
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton_matrix import NO_LIMIT

from seqkernels.triton import launch, launch_additive, tables

MULTIPROCESSORS = 132
KERNELS = ("forward", "statistics", "dq", "dkdv")
CASES = triton_matrix.pairwise_cases()
SHAPES = {  # queries, query heads, key heads, keys, each with what lets heads be packed and keys be split
    "one query": (1, 8, 2, 4096),
    "16 queries": (16, 16, 2, 4096),
    "prefill of few heads": (128, 4, 4, 16_384),
}


class Absent:
    """What Triton asks of a driver in order to compile; kernels are cached by device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 1000 + self.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def absent_gpu(arch: int) -> Iterator[dict[str, CompiledKernel]]:
    """Inside, launches compile; gives the kernels by name and number."""
    built: dict[str, CompiledKernel] = {}
    run = JITFunction.run

    def compile_only(self: JITFunction, *args, grid, warmup, **kwargs) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        built.setdefault(f"{self.__name__}-{len(built)}", kernel)

    with (
        mock.patch.object(driver, "_active", Absent(arch)),  # reset_active looks for a real one
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(launch, "architecture", return_value=arch),
        mock.patch.object(launch, "multiprocessors", return_value=MULTIPROCESSORS),
    ):
        yield built


def train(name: str) -> None:
    """Forward, backward and weights of a case of triton_matrix."""
    problem = triton_matrix.Problem(CASES[name], "cpu")
    triton_matrix.ours(problem, problem.dlse)


def decode(shape: str, dtype: str, D: int, rich: bool, page: int) -> None:
    """Few queries at the end of many keys, in pages or not."""
    Tq, Hq, Hk, Tk = SHAPES[shape]

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=getattr(torch, dtype))

    alibi, sinks, softcap = (torch.zeros(Hq), torch.zeros(Hq), 3.0) if rich else (None, None, 0.0)
    q, len_k, visibility = zeros(1, Hq, Tq, D), torch.tensor([Tk - 3]), (NO_LIMIT, 0, True)
    if page:
        pages = [zeros(Tk // page, Hk, page, D) for _ in range(2)]
        table = torch.zeros(1, Tk // page, dtype=torch.int32)
        launch.paged_attention_fwd(q, *pages, table, len_k, alibi, sinks, 0.3, softcap, *visibility)
    else:
        k, v = (zeros(1, Hk, Tk, D) for _ in range(2))
        rest = (None, None, None, len_k, alibi, sinks, 0.3, softcap, *visibility, 0.0, None, 0, 0)
        launch.attention_fwd(q, k, v, *rest)


def additive(Tq: int, rich: bool, dtype: str) -> None:
    """Additive attention and its gradients; rich: with a mask, lengths and all that can be asked for."""
    B, Tk, D, Dv = 2, 600, 128, 64
    q, k, v, w, dout = (
        torch.zeros(shape, dtype=getattr(torch, dtype))
        for shape in ((B, Tq, D), (B, Tk, D), (B, Tk, Dv), (D,), (B, Tq, Dv))
    )
    mask, len_k, dweights = (
        (torch.zeros(B, Tq, Tk), torch.tensor([0, 9]), q.new_zeros(B, Tq, Tk)) if rich else (None,) * 3
    )
    launch_additive.additive_attention_fwd(q, k, v, w, mask, len_k, bool(rich))
    launch_additive.additive_attention_bwd(dout, dweights, q, k, v, w, mask, len_k, bool(rich))


def compiled(arch: int, call: Callable[..., None], *args) -> dict[str, triton_cubin.Resources]:
    with absent_gpu(arch) as built:
        call(*args)
    return {name: triton_cubin.resources_of(kernel) for name, kernel in built.items()}


def additive_table() -> Iterator[str]:
    """Registers / KB of shared memory of every tile, plain and rich."""
    yield "| kernel | queries a tile | sm_80 | sm_90 | sm_100 | float32, sm_80 |"
    yield "|---|---|---|---|---|---|"
    columns = [(arch, "bfloat16") for arch in (80, 90, 100)] + [(80, "float32")]
    rows: dict[tuple[str, int], list[str]] = {}
    for (arch, dtype), Tq in product(columns, sorted(tables.ADDITIVE)):
        found = [compiled(arch, additive, Tq, rich, dtype) for rich in (False, True)]
        for names in zip(*found, strict=True):
            pair = (kernels[name] for kernels, name in zip(found, names, strict=True))
            cell = ", ".join(f"{x.registers} / {x.shared / 1024:.0f}" for x in pair)
            kernel = names[0].removeprefix("additive_").split("-")[0]
            rows.setdefault((kernel, Tq), []).append(cell)
    for (kernel, Tq), cells in sorted(rows.items(), key=lambda row: KERNELS.index(row[0][0])):
        yield f"| {kernel} | {Tq} | {' | '.join(cells)} |"


if __name__ == "__main__":
    for line in additive_table():
        print(line, flush=True)
