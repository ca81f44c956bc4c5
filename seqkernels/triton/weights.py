"""Attention weights from the LSE of forward: a second pass, for those who want to look at them."""

import triton
import triton.language as tl

from .common import INF, LOG2E, dot_rows, head_of, kept, load_rows, logits, sequence, wide
from .forward import RUNTIME


@triton.jit(do_not_specialize=[*RUNTIME, "average"])
def attention_weights(
    Q, K, V, Mask, CuQ, CuK, LenK, Alibi, Sinks, Rng,
    q_b: tl.int64, q_h: tl.int64, q_t, k_b: tl.int64, k_h: tl.int64, k_t,
    v_b: tl.int64, v_h: tl.int64, v_t,
    mask_b: tl.int64, mask_h: tl.int64, mask_q: tl.int64, mask_k: tl.int64, alibi_b: tl.int64,
    heads, group, Tq, Tk, left, right, scale, softcap, threshold: tl.int64, factor,
    Lse, Weights, average,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of P [B, heads / average, Tq, Tk], a mean over `average` heads: 1 or all."""
    pid = tl.program_id(0)
    tiles_k, tiles_q = tl.cdiv(Tk, BN), tl.cdiv(Tq, BM)
    tile_k = pid % tiles_k
    tile_q = pid // tiles_k % tiles_q
    pid = pid // tiles_k // tiles_q
    planes = heads // average
    b, plane = pid // planes, pid % planes
    q_b, q_h, q_t = q_b * F.ALIGN, q_h * F.ALIGN, q_t * F.ALIGN
    k_b, k_h, k_t = k_b * F.ALIGN, k_h * F.ALIGN, k_t * F.ALIGN
    i0, j0 = tile_q * BM, tile_k * BN
    r, c = tl.arange(0, BM), tl.arange(0, BN)
    i, j = i0 + r, j0 + c
    row, _, _, see = sequence(b, Tq, Tk, CuQ, CuK, LenK, left, right, F)

    total = tl.zeros([BM, BN], tl.float32)
    for h in tl.range(plane * average, plane * average + average):
        head = head_of(
            b, h, see, heads, Mask, Alibi, Rng, mask_b, mask_h, mask_q, mask_k, alibi_b,
            scale, softcap, threshold, factor, F,
        )  # fmt: skip
        Qh = Q + row * q_b + h * q_h + wide(i0) * q_t
        Kh = K + row * k_b + h // group * k_h + wide(j0) * k_t
        q = load_rows(Qh, r * q_t, i < Tq, F, False)
        k = load_rows(Kh, c * k_t, j < see.len_k, F, False)
        s, _cap = logits(dot_rows(q, k, F), i[:, None], j[None, :], True, head, F, True)
        lse = tl.load(Lse + (row * heads + h) * Tq + i, mask=i < Tq, other=INF)
        p = tl.exp2(s - tl.where(lse == -INF, INF, lse * LOG2E)[:, None])
        if F.DROPOUT:
            p = tl.where(kept(i, j0, head, BN), p * factor, 0.0)
        total += p
    to = ((b * planes + plane).to(tl.int64) * Tq + i[:, None]) * Tk + j[None, :]
    p = (total / average).to(Weights.dtype.element_ty)
    tl.store(Weights + to, p, mask=(i < Tq)[:, None] & (j < Tk)[None, :])
