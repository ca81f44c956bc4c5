"""Additive attention in plain torch: P = softmax(w . tanh(q_i + k_j) + mask), O = P V.

Arguments as in `seqkernels.ops.additive_attention.additive_attention`, on any device; half types compute in
float32. Takes memory for all pairs of queries and keys with all their features.
"""

import torch
from torch import Tensor


def additive_attention(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, *, mask: Tensor | None = None, len_k: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """out [B,Tq,Dv] and weights [B,Tq,Tk]."""
    dtype = q.dtype
    q, k, v, w = (t.to(torch.promote_types(dtype, torch.float32)) for t in (q, k, v, w))
    if len_k is not None:  # what lies beyond may be anything, and 0 * nan is nan
        keys = torch.arange(k.size(1), device=k.device)
        beyond = (keys >= len_k[:, None])[..., None]
        k, v = k.masked_fill(beyond, 0), v.masked_fill(beyond, 0)
    s = (q[:, :, None] + k[:, None]).tanh() @ w
    if mask is not None and mask.dtype != torch.bool:
        s = s + mask
    hidden = torch.zeros_like(s, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        hidden = hidden | ~mask
    if len_k is not None:
        hidden = hidden | beyond.mT
    s = s.masked_fill(hidden, -torch.inf)
    nothing = (s == -torch.inf).all(-1, keepdim=True)  # a query that sees no key: out, weights, gradients 0
    p = s.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
    return (p @ v).to(dtype), p.to(dtype)
