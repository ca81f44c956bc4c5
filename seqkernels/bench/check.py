"""Is it right? Error against error: ours may be at most k times as far from the truth as torch is.

The truth is torch.nn in float64 on the same inputs and weights, already rounded to the dtype under test.
Why not a fixed tolerance: gated recurrences damp or amplify, so a fixed one is too wide for one T and too
narrow for another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR_FORWARD, FACTOR_GRADIENT = 2.0, 3.0
FACTOR_PEER = 16.0  # other libraries only have to compute the same function


@dataclass(frozen=True)
class Comparison:
    """The output that comes nearest to (or goes furthest over) what is allowed."""

    output: str
    error: float  # max |value - truth|
    torch_error: float
    allowed: float  # factor * torch_error + 4 eps max(1, |truth|)

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for nan too


def max_error(value: Tensor, truth: Tensor) -> float:
    """max |value - truth|; inf for a wrong shape or a value that is not a number where the truth is one."""
    if value.shape != truth.shape:
        return float("inf")
    if value.numel() == 0:
        return 0.0
    error = (value.double() - truth).abs()
    return error.nan_to_num(nan=float("inf")).max().item()


def errors(value: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    if value.keys() != truth.keys():
        raise ValueError(f"outputs to compare: got {sorted(value)}, expected {sorted(truth)}")
    return {name: max_error(value[name], exact.double()) for name, exact in truth.items()}


def compare(
    value: Mapping[str, Tensor],
    torch_errors: Mapping[str, float],
    truth: Mapping[str, Tensor],
    peer: bool = False,
) -> Comparison:
    """Compare all outputs; names that start with "grad" are gradients. Returns the worst one."""
    results = []
    for name, error in errors(value, truth).items():
        factor = FACTOR_PEER if peer else FACTOR_GRADIENT if name.startswith("grad") else FACTOR_FORWARD
        scale = max(1.0, max_error(truth[name], torch.zeros_like(truth[name])))
        usual = torch_errors[name]
        if not math.isfinite(usual):  # that torch is wrong excuses nobody
            usual = 0.0
        allowed = factor * usual + 4 * torch.finfo(value[name].dtype).eps * scale
        results.append(Comparison(name, error, torch_errors[name], allowed))
    return max(results, key=lambda result: result.error / result.allowed)
