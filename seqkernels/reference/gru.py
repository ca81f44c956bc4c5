"""GRU in plain torch, gates r, z, n: n = tanh(W_in x + b_in + r * (W_hn h + b_hn)); h' = (1 - z) n + z h."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import linear

from seqkernels.reference.recurrence import State, recurrence, split_weights


def _step(x: Tensor, state: State, weights: Sequence[Tensor]) -> State:
    (h,) = state
    w_ih, w_hh, b_ih, b_hh, _ = split_weights(weights)
    r_x, z_x, n_x = linear(x, w_ih, b_ih).chunk(3, 1)
    r_h, z_h, n_h = linear(h, w_hh, b_hh).chunk(3, 1)
    r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
    n = (n_x + r * n_h).tanh()
    return ((1 - z) * n + z * h,)


def gru_layer(
    x: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor]:
    """One layer: x [T,B,I] or packed [N,I], h0 [D,B,H] -> y [T,B,D*H] or [N,D*H], h_n [D,B,H]."""
    (y,), (hn,) = recurrence(_step, x, (h0,), weights, batch_sizes, resets, bidirectional)
    return y, hn


def gru_cell(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> Tensor:
    """One step: x [B,I], h [B,H] -> h'."""
    return _step(x, (h,), [w for w in (w_ih, w_hh, b_ih, b_hh) if w is not None])[0]
