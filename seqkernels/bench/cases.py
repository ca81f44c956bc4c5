"""What is measured. A case is one call of one module or function; a suite is a tuple of cases.

The letters are those of the whole package: T time steps, B batch rows, I input features, H hidden units.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

from . import attention, gpu_attention
from .attention import AttentionCase
from .gpu_attention import GpuAttentionCase

GATES = {"lstm": 4, "gru": 3, "rnn": 1}
CELLS = tuple(GATES)


@dataclass(frozen=True, kw_only=True)
class Case:
    cell: str  # lstm, gru or rnn (tanh)
    T: int = 128
    B: int = 32
    I: int = 256  # noqa: E741 (the field's letter for input features)
    H: int = 256
    mode: str = "forward"  # without gradients; or "train": forward, then gradients of x and all weights
    dtype: str = "float32"
    layers: int = 1
    bidirectional: bool = False
    fill: float | None = None  # a PackedSequence of mean length fill * T; None: dense [T, B, I]
    step: bool = False  # nn.LSTMCell and its kin: one step, no time loop
    recompute: bool = False  # module.recompute of ours: less memory, the gates are rebuilt in backward
    resets: float | None = None  # share of the tokens at which a row starts anew; torch.nn: segments.py
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.resets is not None and (self.step or self.bidirectional or self.fill is not None):
            raise ValueError(f"resets are measured on dense sequences in one direction, got {self}")
        if self.step and (self.T, self.layers, self.bidirectional, self.fill) != (1, 1, False, None):
            raise ValueError(f"a cell makes one step of one layer in one direction, got {self}")

    def tiny(self) -> Case:
        """The same path through everything, in no time and memory."""
        return dataclasses.replace(self, T=min(self.T, 2), B=min(self.B, 2), I=16, H=16)

    @property
    def title(self) -> str:
        return f"{self.cell.upper()}{'Cell' if self.step else ''} {self.mode} {self.dtype}"

    @property
    def name(self) -> str:
        words = [self.title] + ([] if self.step else [f"T={self.T}"])
        words += [f"B={self.B}"] + ([f"I={self.I}"] if self.I != self.H else []) + [f"H={self.H}"]
        words += [f"layers={self.layers}"] if self.layers > 1 else []
        words += ["bidirectional"] if self.bidirectional else []
        words += [f"fill={self.fill:g}"] if self.fill is not None else []
        words += ["recompute"] if self.recompute else []
        words += [f"resets={self.resets:.0%}"] if self.resets is not None else []
        return " ".join(words)

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def lengths(self) -> list[int]:
        """Longest first. T * u**p with u uniform in (0, 1) has the mean T / (p + 1) = fill * T."""
        if self.fill is None:
            return [self.T] * self.B
        p = (1 - self.fill) / self.fill
        lengths = [max(1, round(self.T * ((row + 0.5) / self.B) ** p)) for row in range(self.B)]
        return [self.T, *reversed(lengths[:-1])]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def flops(self) -> float:
        """Multiplications and additions of the matrix products alone: what any implementation has to do."""
        inputs = [self.I] + [self.H * self.directions] * (self.layers - 1)
        rows = GATES[self.cell] * self.H * self.directions
        per_token = sum(2 * rows * (width + self.H) for width in inputs)
        return float(self.tokens * per_token * (3 if self.mode == "train" else 1))


def _grid(mode: str) -> list[Case]:
    cells = product(CELLS, (128, 256, 512, 1024), (16, 32, 64))
    return [Case(cell=cell, mode=mode, B=B, I=H, H=H) for cell, H, B in cells]


def _shapes(mode: str) -> list[Case]:
    """Shapes off the beaten track: two layers both ways, sizes no vector width divides, a long sequence."""
    cases = []
    for cell in CELLS:
        cases += [
            Case(cell=cell, mode=mode, T=64, layers=2, bidirectional=True),
            Case(cell=cell, mode=mode, T=33, B=7, I=40, H=100),
            Case(cell=cell, mode=mode, T=1000, B=16, I=128, H=128),
        ]
    return cases


def _rnn() -> list[Case]:
    one_row = [Case(cell=cell, B=1, I=H, H=H) for cell, H in product(CELLS, (64, 128, 256, 512))]
    streaming = [Case(cell=cell, T=1, B=1, I=H, H=H) for cell, H in product(CELLS, (128, 512))]
    return _grid("forward") + one_row + streaming + _shapes("forward")


def _packed() -> list[Case]:
    deep = [
        Case(cell=cell, mode="train", layers=2, bidirectional=True, fill=fill)
        for cell, fill in product(CELLS, (0.2, 0.4, 0.6, 0.8, 1.0))
    ]
    flat = [Case(cell=cell, mode=mode, fill=0.6) for cell, mode in product(CELLS, ("forward", "train"))]
    return deep + flat


def _cells() -> list[Case]:
    sizes = [(1, 64), (1, 128), (1, 256), (1, 512), (1, 768), (32, 256), (192, 768)]
    forward = [Case(cell=cell, step=True, T=1, B=B, I=H, H=H) for cell, (B, H) in product(CELLS, sizes)]
    return forward + [Case(cell=cell, step=True, T=1, B=192, I=768, H=768, mode="train") for cell in CELLS]


def _bf16() -> list[Case]:
    grid = product(CELLS, ("forward", "train"), (256, 512, 1024))
    wide = [Case(cell=cell, mode=mode, I=H, H=H, dtype="bfloat16") for cell, mode, H in grid]
    return wide + [Case(cell=cell, B=1, dtype="bfloat16") for cell in CELLS]


def _memory() -> list[Case]:
    """A thousand steps, with saved gates and with recompute (an RNN saves no gates)."""
    sizes = [(32, 256), (16, 512)]
    long = [Case(cell=cell, mode="train", T=1000, B=B, I=H, H=H) for cell, (B, H) in product(CELLS, sizes)]
    return long + [dataclasses.replace(case, recompute=True) for case in long if case.cell != "rnn"]


def _quick() -> list[Case]:
    modes = ("forward", "train")
    return [
        *(Case(cell=cell, mode=mode, B=B, T=64) for cell, mode, B in product(CELLS, modes, (1, 32))),
        Case(cell="lstm", mode="train", T=64, B=16, I=128, H=128, layers=2, bidirectional=True, fill=0.6),
        Case(cell="gru", step=True, T=1, B=1),
        Case(cell="lstm", T=64, dtype="bfloat16"),
        Case(cell="lstm", mode="train", T=500, B=16, I=128, H=128, recompute=True),
    ]


def _gpu() -> list[Case]:
    """Shapes that follow what others measured: cuDNN's best, and what it has no fast kernel for."""
    two, modes, floats = ("lstm", "gru"), ("forward", "train"), ("float32", "bfloat16")

    def cases(cells: Iterable[str], dtypes: Iterable[str], **sizes: Any) -> list[Case]:
        sizes = {"I": sizes["H"]} | sizes
        kinds = product(cells, modes, dtypes)
        return [Case(cell=c, mode=mode, dtype=d, device="cuda", **sizes) for c, mode, d in kinds]

    return [
        *cases(CELLS, ("float16", *floats), T=1024, B=16, H=768),  # NX-AI/flashrnn
        *(  # lmnt-com/haste: these B and I, each with many H there
            case
            for B, I in product((1, 32, 64, 128), (64, 128, 256, 512))  # noqa: E741
            for case in cases(two, floats, T=50, B=B, I=I, H=2 * I)
        ),
        *cases(two, floats, T=128, B=128, H=256),
        *cases(two, floats, T=128, B=128, H=256, resets=0.03),  # pytorch/rl
        *(  # pytorch/pytorch#149194: lengths from 1 to T
            case
            for T in (10, 100, 1000, 4000)
            for case in cases(("lstm",), floats, T=T, B=32, H=256, layers=2, fill=0.5)
        ),
        *cases(("gru",), floats, T=100, B=64, H=512),  # flagos-ai/FlagGems
        *cases(("lstm",), floats, T=128, B=16, H=256, layers=2),
        *cases(CELLS, ("bfloat16",), T=512, B=32, H=512, layers=2, bidirectional=True),
        *(case for H in (1024, 1536) for case in cases(two, ("bfloat16",), T=256, B=32, H=H)),
        *(case for B in (256, 512) for case in cases(two, ("bfloat16",), T=128, B=B, H=1024)),
    ]


GPU_SUITES = ("gpu", "gpu-attention")  # need a CUDA device
SUITES: dict[str, tuple[Case | AttentionCase | GpuAttentionCase, ...]] = {
    "quick": tuple(_quick()),
    "rnn": tuple(_rnn()),
    "train": tuple(_grid("train") + _shapes("train")),
    "packed": tuple(_packed()),
    "cells": tuple(_cells()),
    "bf16": tuple(_bf16()),
    "memory": tuple(_memory()),
    "attention": attention.cases(),
    "additive": attention.additive_cases(),
    "gpu": tuple(_gpu()),
    "gpu-attention": gpu_attention.suite(),
}


def select(suite: str, name_contains: str = "") -> list[tuple[str, Case | AttentionCase | GpuAttentionCase]]:
    """(suite, case) pairs, each case once, those of one title together. "all": on the CPU, without quick."""
    suites = [name for name in SUITES if name not in ("quick", *GPU_SUITES)] if suite == "all" else [suite]
    chosen: dict[Case | AttentionCase | GpuAttentionCase, str] = {}
    for name in suites:
        titles = list(dict.fromkeys(case.title for case in SUITES[name]))
        for case in sorted(SUITES[name], key=lambda case: titles.index(case.title)):
            if name_contains.lower() in case.name.lower():
                chosen.setdefault(case, name)
    return [(name, case) for case, name in chosen.items()]
