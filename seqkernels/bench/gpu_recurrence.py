"""LSTM, GRU and RNN on a GPU: who is compared with cuDNN, and what limits a case.

cuDNN computes float32 in TF32 unless told otherwise, our kernels if told so: in float32 it takes part both
ways, and it is the exact one that says how large our errors may be. It has no resets: there it runs the
segments between them as a packed sequence, whose indices it gets for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from . import gpu
from .cases import GATES, Case
from .contestants import CONTESTANTS, OURS, TORCH, Contestant, Problem

TORCH_TF32 = "torch in TF32"
TF32_ROOM = 2.0**13  # TF32 has 13 bits fewer than float32


def contestants(case: Case) -> dict[str, Callable[[Problem], Contestant]]:
    both = {OURS: CONTESTANTS[OURS], TORCH: _torch(tf32=False)}
    return both | ({TORCH_TF32: _torch(tf32=True)} if case.dtype == "float32" else {})


def _torch(tf32: bool) -> Callable[[Problem], Contestant]:
    def make(problem: Problem) -> Contestant:
        contestant = CONTESTANTS[TORCH](problem)

        def run() -> object:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
                return contestant.run()

        return replace(contestant, run=run, room=TF32_ROOM if tf32 else 1.0)

    return make


@dataclass(frozen=True)
class Limit:
    """Less time is impossible, but for weights in registers; `by` says what all would wait for."""

    by: str  # "matrix": multiplications; "weights": reading the recurrent weights at every step
    seconds: float


def limit(case: Case, tf32: bool = False) -> Limit:
    """The longer of two times, each as if there were nothing else to do."""
    matrix = case.flops / gpu.matrix_rate(case.dtype, tf32)
    size = case.directions * GATES[case.cell] * case.H**2 * getattr(torch, case.dtype).itemsize
    readings = case.T * case.layers * (2 if case.mode == "train" else 1)
    weights = readings * size / gpu.reread_rate(size)
    return Limit("matrix", matrix) if matrix >= weights else Limit("weights", weights)
