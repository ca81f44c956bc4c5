"""Attention weights from the LSE of forward: a second pass, for those who want to look at them."""

import triton
import triton.language as tl

from .common import (
    FAR_LSE,
    FLOAT,
    INF,
    LOG2E,
    dot_rows,
    head_of,
    kept,
    largest_and_sum,
    load_rows,
    logits,
    sequence,
    wide,
)
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
        Kh = K + row * k_b + h // group * k_h
        q = load_rows(Qh, r * q_t, i < Tq, F, False)
        lse = tl.load(Lse + (row * heads + h) * Tq + i, mask=i < Tq, other=INF)
        base, rest = tl.where(lse == -INF, INF, lse * LOG2E), tl.zeros([BM], tl.float32)
        # Far from 0 its rounding would be that of P, up to an LSE of -1e9, of a mask that hides all keys,
        # which has no room for log sum: the few programs with such rows take the softmax anew.
        far = (tl.abs(lse) > FAR_LSE) & (tl.abs(lse) < INF)
        if F.MASK == FLOAT and tl.max(far.to(tl.int32), 0) > 0:
            m, norm = largest_and_sum(q, Kh, k_t, i, head, F)
            base, rest = tl.where(far, m, base), tl.where(far, tl.log2(norm), rest)
        k = load_rows(Kh + wide(j0) * k_t, c * k_t, j < see.len_k, F, False)
        s, _cap = logits(dot_rows(q, k, F), i[:, None], j[None, :], True, head, F, True)
        x = s - base[:, None]
        p = tl.exp2(tl.where(x > 0.0, 0.0, x) - rest[:, None])
        if F.DROPOUT:
            p = tl.where(kept(i, j0, head, BN), p * factor, 0.0)
        total += p
    to = ((b * planes + plane).to(tl.int64) * Tq + i[:, None]) * Tk + j[None, :]
    p = (total / average).to(Weights.dtype.element_ty)
    tl.store(Weights + to, p, mask=(i < Tq)[:, None] & (j < Tk)[None, :])
