"""Backward in two kernels, one for dK and dV by keys and one for dQ by queries, and a third for the mask.

Each recomputes P = exp(S - LSE). Every gradient has one owner that adds in a fixed order: no atomics, the same bits
every time, for two products more than a kernel that scatters dQ. With delta = rowsum(dO * O) - dLSE

    dS = P * (dP - delta),   dP = dO Vᵀ,   dQ = scale dS K,   dK = scale dSᵀ Q,   dV = Pᵀ dO
"""

import triton
import triton.language as tl

from .common import (
    INF,
    LOG2E,
    add_product,
    dot_rows,
    dropout_rule,
    kept,
    key_range,
    load_rows,
    logit_rule,
    logits,
    scale_rows,
    sequence,
    store_rows,
    zero_rows,
)
from .forward import RUNTIME


@triton.jit(do_not_specialize=["rows", "heads", "Tq", "dout_b", "dout_h", "dout_t"])
def attention_delta(
    Out, DOut, DLse, Delta, dout_b: tl.int64, dout_h: tl.int64, dout_t: tl.int64, rows: tl.int64, heads, Tq,
    DV: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    """delta [B, heads, Tq] from out [B, Tq, heads, DV] and the gradients of out and LSE."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [B, Tq, heads]
    d = tl.arange(0, WIDTH)
    h, t, b = row % heads, row // heads % Tq, row // heads // Tq
    mask = (row < rows)[:, None] & (d < DV)[None, :]
    at = (b * dout_b + h * dout_h + t * dout_t) * ALIGN
    out = tl.load(Out + row[:, None] * DV + d[None, :], mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(DOut + at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    lse_row = (b * heads + h) * Tq + t
    if DLSE:
        delta -= tl.load(DLse + lse_row, mask=row < rows, other=0.0)
    tl.store(Delta + lse_row, delta, mask=row < rows)


@triton.jit
def weight_and_gradient(
    s, dp, i, j, lse, delta, keep, see, rule, drop, F: tl.constexpr, BOUND: tl.constexpr
):  # fmt: skip
    """Pᵈ = P after dropout, dS, and the gradient of scale * q·k, in front of the softcap."""
    s, cap = logits(s, i, j, see, rule, F, BOUND, True)
    p = tl.exp2(s - lse)
    if F.DROPOUT:
        dp = tl.where(keep, dp * drop.factor, 0.0)
    ds = p * (dp - delta)
    if F.DROPOUT:
        p = tl.where(keep, p * drop.factor, 0.0)
    dqk = ds
    if F.SOFTCAP:
        dqk = ds * (1.0 - cap * cap)
    return p, ds, dqk


@triton.jit
def load_statistics(Lse, Delta, at, ok):
    """LSE in units of log 2, +inf (so that P = 0) for queries that see no key or are not there; delta."""
    lse = tl.load(Lse + at, mask=ok, other=-INF)
    return tl.where(lse == -INF, INF, lse * LOG2E), tl.load(Delta + at, mask=ok, other=0.0)


@triton.jit
def walk_queries(
    dk, dv, k, v, Q, DOut, Lse, Delta, q_t, dout_t, lo, hi, j0, j, see, rule, drop, bh,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys from queries [lo, hi) of one head. Tiles are [keys, queries]."""
    rows = tl.arange(0, BM)
    for i0 in tl.range(lo, hi, BM):
        i = i0 + rows
        ok = i < see.len_q
        q = load_rows(Q + i0 * q_t, rows * q_t, ok, F.D, F.QK, True, F.UPCAST)
        dout = load_rows(DOut + i0 * dout_t, rows * dout_t, ok, F.DV, F.PV, True, F.UPCAST)
        lse, delta = load_statistics(Lse, Delta, i, ok)
        keep = True
        if F.DROPOUT:
            keep = tl.trans(kept(i, j0, bh, drop, BN))
        s = dot_rows(k, q, F.PRECISION)
        dp = dot_rows(v, dout, F.PRECISION)
        p, _, dqk = weight_and_gradient(
            s, dp, i[None, :], j[:, None], lse[None, :], delta[None, :], keep, see, rule, drop, F, BOUND
        )
        dv = add_product(dv, p, dout, F.PRECISION)
        dk = add_product(dk, dqk, q, F.PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=[*RUNTIME, "dscale", "dout_b", "dout_h", "dout_t", "tiles", "splits", "part"])
def attention_dkdv(
    Q, K, V, Mask, CuQ, CuK, LenK, Alibi, Sinks, Rng,
    q_b: tl.int64, q_h: tl.int64, q_t: tl.int64, k_b: tl.int64, k_h: tl.int64, k_t: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_t: tl.int64,
    mask_b: tl.int64, mask_h: tl.int64, mask_q: tl.int64, mask_k: tl.int64, alibi_b: tl.int64,
    heads, group, Tq, Tk, left, right, scale, softcap, threshold: tl.int64, factor,
    DOut, Lse, Delta, dout_b: tl.int64, dout_h: tl.int64, dout_t: tl.int64, dscale,
    DK, DV, tiles, splits, part: tl.int64,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of keys of one key head and walks the queries of heads / splits of its group.

    The parts of several splits lie `part` rows [B, Tk, key heads] apart and are added afterwards.
    """
    pid = tl.program_id(0)
    split = pid % splits
    pid = pid // splits
    tile = pid % tiles
    pid = pid // tiles
    key_heads = heads // group
    b, key_head = pid // key_heads, pid % key_heads
    q_b, q_h, q_t = q_b * F.ALIGN, q_h * F.ALIGN, q_t * F.ALIGN
    k_b, k_h, k_t = k_b * F.ALIGN, k_h * F.ALIGN, k_t * F.ALIGN
    v_b, v_h, v_t = v_b * F.ALIGN, v_h * F.ALIGN, v_t * F.ALIGN
    dout_b, dout_h, dout_t = dout_b * F.ALIGN, dout_h * F.ALIGN, dout_t * F.ALIGN

    row, first_q, first_k, see = sequence(b, Tq, Tk, CuQ, CuK, LenK, left, right, F)
    there = Tk  # rows of dK and dV to write, those behind len_k with zeros
    if F.VARLEN:
        there = see.len_k
    j0 = tile * BN
    if j0 >= there:
        return
    j = j0 + tl.arange(0, BN)
    ok = j < see.len_k
    t = first_k + j
    k = load_rows(K, row * k_b + key_head * k_h + t * k_t, ok, F.D, F.QK, True, F.UPCAST)
    v = load_rows(V, row * v_b + key_head * v_h + t * v_t, ok, F.DV, F.PV, True, F.UPCAST)

    # Queries [lo, hi) see some key of the tile, blocks within [full_lo, full_hi) all of them.
    lo, hi = 0, see.len_q
    full_lo, full_hi = 0, see.len_q
    if F.RIGHT:
        lo = tl.maximum(j0 - see.offset - see.right, 0)
        full_lo = tl.maximum(j0 + BN - 1 - see.offset - see.right, 0)
    if F.LEFT:
        hi = tl.minimum(hi, j0 + BN + see.left - see.offset)
        full_hi = tl.maximum(tl.minimum(hi, j0 + see.left - see.offset + 1), 0) // BM * BM
    hi = tl.where(j0 < see.len_k, tl.maximum(hi, 0), 0)
    lo = tl.minimum(lo, hi) // BM * BM
    full_lo = tl.minimum(tl.cdiv(full_lo, BM) * BM, hi)
    if F.MASK:  # a mask must be read within its bounds
        full_lo = tl.where(j0 + BN > see.len_k, hi, full_lo)
        full_hi = full_hi // BM * BM
    full_hi = tl.minimum(tl.maximum(full_hi, full_lo), hi)

    dk = zero_rows(BN, F.QK)
    dv = zero_rows(BN, F.PV)
    drop = dropout_rule(Rng, threshold, factor, F)
    share = group // splits
    for g in tl.range(split * share, split * share + share):
        h = key_head * group + g
        bh = b * heads + h
        rule = logit_rule(b, h, Mask, Alibi, mask_b, mask_h, mask_q, mask_k, alibi_b, scale, softcap, F)
        Qh = Q + row * q_b + h * q_h + first_q * q_t
        DOh = DOut + row * dout_b + h * dout_h + first_q * dout_t
        at = (row * heads + h) * Tq + first_q
        if F.RIGHT or F.MASK:
            dk, dv = walk_queries(
                dk, dv, k, v, Qh, DOh, Lse + at, Delta + at, q_t, dout_t, lo, full_lo, j0, j, see, rule, drop, bh,
                F, BM, BN, True,
            )  # fmt: skip
        dk, dv = walk_queries(
            dk, dv, k, v, Qh, DOh, Lse + at, Delta + at, q_t, dout_t, full_lo, full_hi, j0, j, see, rule, drop, bh,
            F, BM, BN, False,
        )  # fmt: skip
        if F.LEFT or F.MASK:
            dk, dv = walk_queries(
                dk, dv, k, v, Qh, DOh, Lse + at, Delta + at, q_t, dout_t, full_hi, hi, j0, j, see, rule, drop, bh,
                F, BM, BN, True,
            )  # fmt: skip
    to = (row * Tk + t) * key_heads + key_head + split * part
    store_rows(DK, to * F.D, j < there, zero_where_not(ok, scale_rows(dk, dscale)), F.D, F.QK)
    store_rows(DV, to * F.DV, j < there, zero_where_not(ok, dv), F.DV, F.PV)


@triton.jit
def zero_where_not(ok, rows):
    """Products with the zeros behind the last key may be infinite."""
    clean = ()
    for c in tl.static_range(len(rows)):
        clean = clean + (tl.where(ok[:, None], rows[c], 0.0),)
    return clean


@triton.jit
def walk_keys(
    dq, q, dout, K, V, k_t, v_t, lse, delta, lo, hi, i, see, rule, drop, bh,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, BN)
    for j0 in tl.range(lo, hi, BN):
        j = j0 + rows
        k = load_rows(K + j0 * k_t, rows * k_t, j < see.len_k, F.D, F.QK, BOUND, F.UPCAST)
        v = load_rows(V + j0 * v_t, rows * v_t, j < see.len_k, F.DV, F.PV, BOUND, F.UPCAST)
        keep = True
        if F.DROPOUT:
            keep = kept(i, j0, bh, drop, BN)
        s = dot_rows(q, k, F.PRECISION)
        dp = dot_rows(dout, v, F.PRECISION)
        _, _, dqk = weight_and_gradient(
            s, dp, i[:, None], j[None, :], lse[:, None], delta[:, None], keep, see, rule, drop, F, BOUND
        )
        dq = add_product(dq, dqk, k, F.PRECISION)
    return dq


@triton.jit(do_not_specialize=[*RUNTIME, "dscale", "dout_b", "dout_h", "dout_t", "tiles"])
def attention_dq(
    Q, K, V, Mask, CuQ, CuK, LenK, Alibi, Sinks, Rng,
    q_b: tl.int64, q_h: tl.int64, q_t: tl.int64, k_b: tl.int64, k_h: tl.int64, k_t: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_t: tl.int64,
    mask_b: tl.int64, mask_h: tl.int64, mask_q: tl.int64, mask_k: tl.int64, alibi_b: tl.int64,
    heads, group, Tq, Tk, left, right, scale, softcap, threshold: tl.int64, factor,
    DOut, Lse, Delta, dout_b: tl.int64, dout_h: tl.int64, dout_t: tl.int64, dscale,
    DQ, tiles,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of queries and walks the keys they see, as forward does."""
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles
    pid = pid // tiles
    b, h = pid // heads, pid % heads
    key_head = h // group
    q_b, q_h, q_t = q_b * F.ALIGN, q_h * F.ALIGN, q_t * F.ALIGN
    k_b, k_h, k_t = k_b * F.ALIGN, k_h * F.ALIGN, k_t * F.ALIGN
    v_b, v_h, v_t = v_b * F.ALIGN, v_h * F.ALIGN, v_t * F.ALIGN
    dout_b, dout_h, dout_t = dout_b * F.ALIGN, dout_h * F.ALIGN, dout_t * F.ALIGN

    row, first_q, first_k, see = sequence(b, Tq, Tk, CuQ, CuK, LenK, left, right, F)
    i_first = tile * BM
    if i_first >= see.len_q:
        return
    i = i_first + tl.arange(0, BM)
    ok = i < see.len_q
    t = first_q + i
    q = load_rows(Q, row * q_b + h * q_h + t * q_t, ok, F.D, F.QK, True, F.UPCAST)
    dout = load_rows(DOut, row * dout_b + h * dout_h + t * dout_t, ok, F.DV, F.PV, True, F.UPCAST)
    at = (row * heads + h) * Tq + t
    lse, delta = load_statistics(Lse, Delta, at, ok)
    K += row * k_b + key_head * k_h + first_k * k_t
    V += row * v_b + key_head * v_h + first_k * v_t
    rule = logit_rule(b, h, Mask, Alibi, mask_b, mask_h, mask_q, mask_k, alibi_b, scale, softcap, F)
    drop = dropout_rule(Rng, threshold, factor, F)
    bh = b * heads + h

    dq = zero_rows(BM, F.QK)
    i_last = tl.minimum(i_first + BM, see.len_q) - 1
    lo, hi, full_lo, full_hi = key_range(i_first, i_last, see, BN, F)
    full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
    full_hi = tl.minimum(tl.maximum(full_hi, full_lo), hi)
    if F.LEFT:
        dq = walk_keys(
            dq, q, dout, K, V, k_t, v_t, lse, delta, lo, full_lo, i, see, rule, drop, bh, F, BM, BN, True
        )
    dq = walk_keys(
        dq, q, dout, K, V, k_t, v_t, lse, delta, full_lo, full_hi, i, see, rule, drop, bh, F, BM, BN, False
    )
    dq = walk_keys(
        dq, q, dout, K, V, k_t, v_t, lse, delta, full_hi, hi, i, see, rule, drop, bh, F, BM, BN, True
    )
    store_rows(DQ, ((row * Tq + t) * heads + h) * F.D, ok, scale_rows(dq, dscale), F.D, F.QK)


@triton.jit(
    do_not_specialize=[*RUNTIME, "dout_b", "dout_h", "dout_t", "mask_batches", "mask_heads", "rows", "cols"]
    + ["batches", "sum_b", "sum_h"]
)
def attention_dmask(
    Q, K, V, Mask, CuQ, CuK, LenK, Alibi, Sinks, Rng,
    q_b: tl.int64, q_h: tl.int64, q_t: tl.int64, k_b: tl.int64, k_h: tl.int64, k_t: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_t: tl.int64,
    mask_b: tl.int64, mask_h: tl.int64, mask_q: tl.int64, mask_k: tl.int64, alibi_b: tl.int64,
    heads, group, Tq, Tk, left, right, scale, softcap, threshold: tl.int64, factor,
    DOut, Lse, Delta, dout_b: tl.int64, dout_h: tl.int64, dout_t: tl.int64,
    DMask, mask_heads, sum_b, sum_h, rows, cols,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SUM_Q: tl.constexpr, SUM_K: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of the mask [mask_b, mask_heads, rows, cols] and walks all that is broadcast over it:
    sum_b sequences and sum_h heads, and with SUM_Q or SUM_K all tiles of queries or keys."""
    pid = tl.program_id(0)
    tiles_k, tiles_q = tl.cdiv(Tk, BN), tl.cdiv(Tq, BM)
    own_k = 1 if SUM_K else tiles_k
    own_q = 1 if SUM_Q else tiles_q
    walk_k = tiles_k if SUM_K else 1
    walk_q = tiles_q if SUM_Q else 1
    tile_k = pid % own_k
    tile_q = pid // own_k % own_q
    mask_head = pid // own_k // own_q % mask_heads
    mask_batch = pid // own_k // own_q // mask_heads
    q_b, q_h, q_t = q_b * F.ALIGN, q_h * F.ALIGN, q_t * F.ALIGN
    k_b, k_h, k_t = k_b * F.ALIGN, k_h * F.ALIGN, k_t * F.ALIGN
    v_b, v_h, v_t = v_b * F.ALIGN, v_h * F.ALIGN, v_t * F.ALIGN
    dout_b, dout_h, dout_t = dout_b * F.ALIGN, dout_h * F.ALIGN, dout_t * F.ALIGN
    drop = dropout_rule(Rng, threshold, factor, F)

    total = tl.zeros([BM, BN], tl.float32)
    for n in tl.range(0, sum_b * sum_h * walk_q * walk_k):
        b = mask_batch + n // walk_k // walk_q // sum_h
        h = mask_head + n // walk_k // walk_q % sum_h
        i = (tile_q + n // walk_k % walk_q) * BM + tl.arange(0, BM)
        j0 = (tile_k + n % walk_k) * BN
        j = j0 + tl.arange(0, BN)
        row, _, _, see = sequence(b, Tq, Tk, CuQ, CuK, LenK, left, right, F)
        ok, there = i < see.len_q, j < see.len_k
        q = load_rows(Q, row * q_b + h * q_h + i * q_t, ok, F.D, F.QK, True, F.UPCAST)
        dout = load_rows(DOut, row * dout_b + h * dout_h + i * dout_t, ok, F.DV, F.PV, True, F.UPCAST)
        k = load_rows(K, row * k_b + h // group * k_h + j * k_t, there, F.D, F.QK, True, F.UPCAST)
        v = load_rows(V, row * v_b + h // group * v_h + j * v_t, there, F.DV, F.PV, True, F.UPCAST)
        lse, delta = load_statistics(Lse, Delta, (row * heads + h) * Tq + i, ok)
        rule = logit_rule(b, h, Mask, Alibi, mask_b, mask_h, mask_q, mask_k, alibi_b, scale, softcap, F)
        keep = True
        if F.DROPOUT:
            keep = kept(i, j0, b * heads + h, drop, BN)
        s = dot_rows(q, k, F.PRECISION)
        dp = dot_rows(dout, v, F.PRECISION)
        _, ds, _ = weight_and_gradient(
            s, dp, i[:, None], j[None, :], lse[:, None], delta[:, None], keep, see, rule, drop, F, True
        )
        total += ds

    i = tile_q * BM + tl.arange(0, BM)
    j = tile_k * BN + tl.arange(0, BN)
    if SUM_Q:
        total = tl.sum(total, 0)[None, :]
        i = tl.arange(0, 1)
    if SUM_K:
        total = tl.sum(total, 1)[:, None]
        j = tl.arange(0, 1)
    to = ((mask_batch * mask_heads + mask_head).to(tl.int64) * rows + i[:, None]) * cols + j[None, :]
    tl.store(DMask + to, total, mask=(i < rows)[:, None] & (j < cols)[None, :])
