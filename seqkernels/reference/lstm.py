"""LSTM in plain torch, gates i, f, g, o (g = tanh, else sigmoid): c' = f c + i g; h' = W_hr (o tanh(c'))."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import linear

from seqkernels.reference.recurrence import State, recurrence, split_weights


def _step(x: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    h, c = state
    w_ih, w_hh, b_ih, b_hh, w_hr = split_weights(weights)
    i, f, g, o = (linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh)).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if w_hr is None else linear(h, w_hr)), c


def lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer: x [T,B,I] or [N,I], h0 [D,B,P], c0 [D,B,H] -> y [T,B,D*P], h_n, c_n, cells [T,B,D*H]."""
    (y, cells), (hn, cn) = recurrence(_step, x, (h0, c0), weights, batch_sizes, resets, bidirectional)
    return y, hn, cn, cells


def lstm_cell(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step: x [B,I], h and c [B,H] -> h', c'."""
    h, c = _step(x, (h, c), [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None])
    return h, c
