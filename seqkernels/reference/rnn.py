"""Elman RNN in plain torch: h' = tanh or relu (W_ih x + b_ih + W_hh h + b_hh)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from seqkernels.reference.recurrence import Cell, State, recurrence, split_weights


def _step(nonlinearity: str) -> Cell:
    activate = {"tanh": torch.tanh, "relu": torch.relu}[nonlinearity]

    def step(x: Tensor, state: State, weights: Sequence[Tensor]) -> State:
        w_ih, w_hh, b_ih, b_hh, _ = split_weights(weights)
        return (activate(linear(x, w_ih, b_ih) + linear(state[0], w_hh, b_hh)),)

    return step


def rnn_layer(
    x: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor]:
    """One layer: x [T,B,I] or packed [N,I], h0 [D,B,H] -> y [T,B,D*H] or [N,D*H], h_n [D,B,H]."""
    (y,), (hn,) = recurrence(_step(nonlinearity), x, (h0,), weights, batch_sizes, resets, bidirectional)
    return y, hn


def rnn_cell(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step: x [B,I], h [B,H] -> h'."""
    return _step(nonlinearity)(x, (h,), [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None])[0]
