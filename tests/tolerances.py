"""How exact is exact enough: at most k times as far from the truth as torch in the same dtype, plus a floor.

The truth is computed in float64 from the same inputs, already rounded to the dtype under test.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

FORWARD, GRADIENT = 2.0, 3.0


def error(value: Tensor, truth: Tensor) -> float:
    """The largest deviation; infinite unless inf and nan stand where they stand in the truth."""
    value = value.detach().double()
    finite = truth.isfinite()
    if value.shape != truth.shape or not torch.equal(value.isfinite(), finite):
        return float("inf")
    if not torch.equal(value[~finite].nan_to_num(nan=0.5), truth[~finite].nan_to_num(nan=0.5)):
        return float("inf")
    return (value - truth)[finite].abs().max().item() if finite.any() else 0.0


def floor(dtype: torch.dtype, truth: Tensor) -> float:
    """In float64 the truth is torch's own result and no better than ours, so that more has to be allowed."""
    largest = truth[truth.isfinite()].abs().max().item() if truth.isfinite().any() else 0.0
    return (64 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps * max(1.0, largest)


def assert_as_exact(
    ours: Mapping[str, Tensor],
    torchs: Mapping[str, Tensor],
    truth: Mapping[str, Tensor],
    dtype: torch.dtype,
    pooled: bool = False,
    room: float = 1.0,
) -> None:
    """Every tensor by name; those whose names begin with "grad" are gradients.

    room: how many times as large errors may be, of products in a type less exact than dtype.

    pooled: torch's error is its worst, relative to size, among all outputs or all gradients, because a tensor
    of one or two numbers can be exact by luck.
    """
    assert ours.keys() == torchs.keys() == truth.keys()
    worst = {True: 0.0, False: 0.0}
    for name, exact in truth.items():
        relative = error(torchs[name], exact) / floor(dtype, exact)
        worst[name.startswith("grad")] = max(worst[name.startswith("grad")], relative)
    for name, exact in truth.items():
        gradient, least = name.startswith("grad"), floor(dtype, exact)
        torchs_error = worst[gradient] * least if pooled else error(torchs[name], exact)
        ours_error, allowed = (
            error(ours[name], exact),
            room * ((GRADIENT if gradient else FORWARD) * torchs_error + least),
        )
        assert ours_error <= allowed, (
            f"{name}: error {ours_error:.3g}, torch's {torchs_error:.3g}, allowed {allowed:.3g}"
        )
