"""Attention in plain torch: P = softmax(softcap(scale Q K^T) - alibi |j - i - offset| + mask), O = P V.

Arguments as in `seqkernels.ops.attention.attention`, on any device; half types compute in float32.
"""

from itertools import pairwise

import torch
from torch import Tensor

NO_LIMIT = 2**62


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    len_k: Tensor | None = None,
    alibi: Tensor | None = None,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    first: int = 0,
    **options,
) -> tuple[Tensor, Tensor]:
    """out [B,Hq,Tq,Dv], and lse [B,Hq,Tq] in float32, or float64 for float64.

    rng [2]: seed and offset of the dropout, drawn if None. first: how many sequences there are before these.
    """
    if dropout and rng is None:
        rng = random_state(q)
    if cu_q is not None and cu_k is not None:
        spans = (pairwise([0, *cu.tolist()]) for cu in (cu_q, cu_k))  # of no rows the first
        slopes = [alibi] * cu_q.numel() if alibi is None or alibi.dim() == 1 else [None, *alibi]
        options |= {"dropout": dropout, "rng": rng}
        parts = [
            attention(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], alibi=slope, first=s, **options)
            for s, ((a, b), (c, d), slope) in enumerate(zip(*spans, slopes, strict=True), -1)
        ]
        outs, lses = zip(*parts, strict=True)
        return torch.cat(outs, 2), torch.cat(lses, 2)
    if len_k is not None:  # what lies beyond may be anything, and 0 * nan is nan
        beyond = (torch.arange(k.size(2), device=k.device) >= len_k[:, None])[:, None, :, None]
        k, v = k.masked_fill(beyond, 0), v.masked_fill(beyond, 0)
    p, lse = _softmax(*logits(q, k, len_k=len_k, alibi=alibi, **options))
    if rng is not None:
        p = dropped(p, dropout, rng, first)
    return (p @ for_each_query_head(v, q)).to(q.dtype), lse


def random_state(q: Tensor) -> Tensor:
    """Seed and offset of one dropout, from torch's generator."""
    return torch.randint(2**62, (2,), device=q.device)


def dropped(p: Tensor, dropout: float, rng: Tensor, first: int = 0) -> Tensor:
    return p * kept(rng, dropout, p.shape, first) * (1 / (1 - dropout) if dropout < 1 else 0)


def kept(rng: Tensor, dropout: float, shape: torch.Size, first: int = 0) -> Tensor:
    """Bool [B,Hq,Tq,Tk]: the weights that dropout leaves, by Philox 4x32-7 (Salmon et al. 2011).

    Counter: (key / 4, query, sequence and head, offset), key: seed; a number for each of four keys.
    """
    B, Hq, Tq, Tk = shape
    half, (seed, offset) = 0xFFFFFFFF, rng.unbind()
    b, h, i, quad = (torch.arange(n, device=rng.device) for n in (B, Hq, Tq, (Tk + 3) // 4))
    rows = ((first + b[:, None]) * Hq + h)[:, :, None, None]
    c = [quad, i[:, None] ^ (offset >> 32 & half), rows, offset & half]
    keys = [seed & half, seed >> 32 & half]
    for _ in range(7):
        x, y = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # modulo 2^64, like all integers of torch
        c = [y >> 32 & half ^ c[1] ^ keys[0], y & half, x >> 32 & half ^ c[3] ^ keys[1], x & half]
        keys = [keys[0] + 0x9E3779B9 & half, keys[1] + 0xBB67AE85 & half]
    numbers = torch.stack(torch.broadcast_tensors(*c), -1).flatten(-2)[..., :Tk]
    return numbers >= min(round(dropout * 2**32), 2**32 - 1)


def attention_weights(
    q: Tensor, k: Tensor, *, mean: bool = False, dropout: float = 0.0, rng: Tensor | None = None, **options
) -> Tensor:
    """P [B,Hq,Tq,Tk] behind the dropout, or its mean over heads [B,Tq,Tk]."""
    p = _softmax(*logits(q, k, **options))[0]
    if rng is not None:
        p = dropped(p, dropout, rng)
    return (p.mean(1) if mean else p).to(q.dtype)


def logits(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    len_k: Tensor | None = None,
    alibi: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    left: int = NO_LIMIT,
    right: int = NO_LIMIT,
    bottom_right: bool = False,
) -> tuple[Tensor, Tensor]:
    """S [B,Hq,Tq,Tk], -inf where a query does not see a key, and the sinks [Hq,1,1] or [], -inf without."""
    Tq, Tk = q.size(2), k.size(2)
    keys = for_each_query_head(k, q)
    s = scale * (q.to(keys.dtype) @ keys.mT)
    if softcap:
        s = softcap * (s / softcap).tanh()
    i, j = (torch.arange(T, device=q.device) for T in (Tq, Tk))
    lengths = j.new_full((1, 1, 1, 1), Tk) if len_k is None else len_k[:, None, None, None]
    distance = j - i[:, None] - (lengths - Tq if bottom_right else 0)
    sees = (distance >= -left) & (distance <= right) & (j < lengths)
    if alibi is not None:
        s = s - alibi[..., None, None].to(s.dtype) * distance.abs()
    if mask is not None and mask.dtype == torch.bool:
        sees = sees & mask
    elif mask is not None:
        s = s + mask
    s = s.masked_fill(~sees, -torch.inf)
    return s, s.new_full((), -torch.inf) if sinks is None else sinks[:, None, None].to(s.dtype)


def for_each_query_head(t: Tensor, q: Tensor) -> Tensor:
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    return t if t.size(1) == q.size(1) else t.repeat_interleave(q.size(1) // t.size(1), 1)


def _softmax(s: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.cat([s, sinks.expand(*s.shape[:-1], 1)], -1)
    largest = s.detach().amax(-1, keepdim=True)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    e = (s - largest).exp()
    total = e.sum(-1, keepdim=True)
    nothing = total == 0  # a query that sees no key: out 0, lse -inf, gradients 0
    total = total.masked_fill(nothing, 1)
    lse = (largest + total.log()).masked_fill(nothing, -torch.inf)
    return e[..., :-1] / total, lse.squeeze(-1)
