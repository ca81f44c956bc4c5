"""`seqkernels selftest`: check the installed kernels on this machine, each instruction set in turn.

Every result and gradient is compared with torch in float64 on the same inputs; the yardstick is the error
that torch itself makes in the same dtype. Run it after an installation, and when a result looks wrong.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

import seqkernels
from seqkernels import _kernels
from seqkernels.bench.attention import AttentionCase, AttentionProblem
from seqkernels.bench.cases import CELLS, Case
from seqkernels.bench.check import Comparison, compare, errors
from seqkernels.bench.contestants import (
    Contestant,
    Problem,
    make_problem,
    seqkernels_contestant,
    torch_contestant,
)

ROOM = 2  # rounding differs between machines, torch's too; a broken kernel is off by far more than that
KINDS = (*CELLS, "sdpa", "mha", "additive")
DTYPES = ("float32", "float64", "bfloat16", "float16")


def cases(kind: str, dtype: str) -> list[Case] | list[AttentionCase]:
    """Small, of sizes that no vector width divides, and together they take each way through the kernels."""
    return _recurrent(kind, dtype) if kind in CELLS else _attention(kind, dtype)


def _recurrent(cell: str, dtype: str) -> list[Case]:
    return [
        Case(cell=cell, dtype=dtype, T=9, B=5, I=20, H=36, layers=2, bidirectional=True, mode="train"),
        Case(cell=cell, dtype=dtype, T=9, B=5, I=20, H=36, bidirectional=True, fill=0.5, mode="train"),
        Case(cell=cell, dtype=dtype, T=20, B=33, I=70, H=130, mode="train"),
        Case(cell=cell, dtype=dtype, T=20, B=33, I=70, H=130, mode="train", recompute=cell != "rnn"),
        Case(cell=cell, dtype=dtype, T=50, B=1, I=33, H=65),
        Case(cell=cell, dtype=dtype, T=1, B=3, I=20, H=36, step=True, mode="train"),
    ]


def _attention(kind: str, dtype: str) -> list[AttentionCase]:
    shapes = [{"B": 2, "Tq": 75, "Tk": 140}, {"B": 3, "Tq": 9, "Tk": 70}, {"B": 1, "Tq": 1, "Tk": 700}]
    if kind == "additive":
        return [
            AttentionCase(cell=kind, H=1, D=36, mask=mask, mode="train", dtype=dtype, **shape)
            for shape in shapes
            for mask in (None, "padding")
        ]
    if kind == "mha":
        return [AttentionCase(cell=kind, B=2, H=4, Tq=77, Tk=77, D=36, mode="train", dtype=dtype)]
    options = [{"mask": "bool", "G": 2}, {"mask": "float"}, {"causal": True}, {"mask": "padding", "G": 4}]
    return [
        AttentionCase(H=4, D=36, mode="train", dtype=dtype, **shape, **option)
        for shape in shapes
        for option in options
    ]


def check(kind: str, dtype: str) -> Iterator[tuple[Case | AttentionCase, Comparison]]:
    for case in cases(kind, dtype):
        with torch.set_grad_enabled(case.mode == "train"):
            problem, truth, torch_errors = reference(case)
            yield case, compare(result(seqkernels_contestant(problem)), torch_errors, truth)


@cache  # the same for every instruction set
def reference(
    case: Case | AttentionCase,
) -> tuple[Problem | AttentionProblem, dict[str, Tensor], dict[str, float]]:
    """The problem, its solution in float64, and the error that torch makes."""
    problem = make_problem(case)
    truth = result(torch_contestant(problem.to(torch.float64)))
    if case.dtype != "float64":
        return problem, truth, errors(result(torch_contestant(problem)), truth)
    # Nobody here knows the truth of float64: take the error of torch in float32, scaled.
    single = problem.to(torch.float32)
    single_truth = result(torch_contestant(single.to(torch.float64)))
    scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    single_errors = errors(result(torch_contestant(single)), single_truth)
    return problem, truth, {name: scale * error for name, error in single_errors.items()}


def result(contestant: Contestant) -> dict[str, Tensor]:
    return contestant.outputs(contestant.run())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="seqkernels selftest", description=__doc__)
    parser.parse_args(argv)
    start, wrong, chosen = time.perf_counter(), 0, torch.ops.seqkernels.get_isa()
    print(
        f"seqkernels {seqkernels.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print(f"error as a multiple of what the tests allow (over {ROOM}: wrong)")
    print(f"{'instructions':14}{'dtype':10}" + "".join(f"{kind.upper():>9}" for kind in KINDS))
    try:
        for isa in _kernels.supported_isas():
            torch.ops.seqkernels.set_isa(isa)
            for dtype in DTYPES:
                print(f"{isa:14}{dtype:10}", end="", flush=True)
                failures = []
                for kind in KINDS:
                    results = list(check(kind, dtype))
                    failures += [
                        (case, worst) for case, worst in results if not worst.error <= ROOM * worst.allowed
                    ]
                    print(
                        f"{max(worst.error / worst.allowed for _, worst in results):9.2f}", end="", flush=True
                    )
                print("   WRONG" if failures else "   ok")
                for case, worst in failures:
                    print(f"  {case.name}: {worst.output} {worst.error:.2g}, allowed {worst.allowed:.2g}")
                wrong += len(failures)
    finally:
        torch.ops.seqkernels.set_isa(chosen)
    print(f"{f'{wrong} results are WRONG' if wrong else 'all right'} ({time.perf_counter() - start:.0f} s)")
    return 1 if wrong else 0
