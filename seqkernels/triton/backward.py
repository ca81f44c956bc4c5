"""Backward in two kernels, one for dK and dV by keys and one for dQ by queries, and a third for the mask.

Each recomputes P = exp(S - LSE), or exp(S - max - log sum) of rows that a finite mask hides. Every gradient
has one owner that adds in a fixed order: no atomics, the same bits every time, for two products more than a
kernel that scatters dQ. With delta = rowsum(dO * O) - dLSE

    dS = P * (dP - delta),   dP = dO Vᵀ,   dQ = scale dS K,   dK = scale dSᵀ Q,   dV = Pᵀ dO
"""
# ruff: noqa: RUF005 (Triton knows no starred expressions)

import triton
import triton.language as tl

from .common import (
    FAR_LSE,
    FLOAT,
    INF,
    LOG2E,
    Keys,
    add_product,
    dot_rows,
    head_of,
    kept,
    key_range,
    largest_and_sum,
    load_keys,
    load_rows,
    logits,
    scale_rows,
    sequence,
    store_rows,
    wide,
    zero_rows,
)
from .forward import RUNTIME

GRADIENT = [*RUNTIME, "dout_b", "dout_h", "dout_t", "dscale", "Tp"]
PAD = tl.constexpr(128)  # no tile has more queries
WIDTH = tl.constexpr(8)  # of the rows of statistics: LSE, delta, log_sum (of attention_far), and zeros


@triton.jit
def statistics_row(b, row, h, heads, first_q, Tp, F: tl.constexpr):
    """Where the statistics of a head's queries begin: at a multiple of PAD, so that tiles of keys load whole
    blocks of them without a comparison, which would cost them more registers than they have."""
    at = (row * heads + h) * Tp
    if F.VARLEN:
        at += (first_q + b * PAD) // PAD * PAD
    return at


@triton.jit
def load_statistics(statistics, i, F: tl.constexpr, COLUMNS: tl.constexpr):
    """LSE, delta and log_sum of queries i. Fewer numbers than threads would be loaded by every thread that
    needs them, in the layout of the scores and with an address for each; rows of WIDTH go through shared
    memory."""
    c = tl.arange(0, WIDTH)[None, :]
    x = tl.load(statistics + i[:, None] * WIDTH + c)
    log_sum = 0.0
    if F.MASK == FLOAT:
        log_sum = tl.sum(tl.where(c == 2, x, 0.0), 1)
        log_sum = log_sum[None, :] if COLUMNS else log_sum[:, None]
    return tl.sum(tl.where(c == 0, x, 0.0), 1), tl.sum(tl.where(c == 1, x, 0.0), 1), log_sum


@triton.jit(do_not_specialize=["heads", "Tq", "Tp", "tiles", "dout_b", "dout_h", "dout_t"])
def attention_statistics(
    Out, DOut, OutLse, DLse, CuQ, Statistics,
    dout_b: tl.int64, dout_h: tl.int64, dout_t, heads, Tq, Tp: tl.int64, tiles,
    F: tl.constexpr, BM: tl.constexpr, DLSE: tl.constexpr,
):  # fmt: skip
    """LSE in units of log 2 and delta = rowsum(dO * O) - dLSE, padded. Of queries that see no key or are not
    there the LSE is +inf, so that their P is 0."""
    pid = tl.program_id(0)
    i = pid % tiles * BM + tl.arange(0, BM)
    pid = pid // tiles
    b, h = pid // heads, pid % heads
    row, first_q, _, see = sequence(b, Tq, 0, CuQ, CuQ, CuQ, 0, 0, F)
    if pid % tiles * BM >= tl.cdiv(see.len_q, PAD) * PAD:
        return
    ok = i < see.len_q
    t = first_q + i
    dout_at = row * dout_b * F.ALIGN + h * (dout_h * F.ALIGN) + t * (dout_t * F.ALIGN)
    dout = load_rows(DOut, dout_at, ok, F, True)
    out = load_rows(Out, ((row * Tq + t) * heads + h) * F.DV, ok, F, True)
    delta = tl.zeros([BM], tl.float32)
    for c in tl.static_range(len(out)):
        delta += tl.sum(out[c].to(tl.float32) * dout[c].to(tl.float32), 1)
    at = (row * heads + h) * Tq + t
    if DLSE:
        delta -= tl.load(DLse + at, mask=ok, other=0.0)
    lse = tl.load(OutLse + at, mask=ok, other=-INF)
    to = statistics_row(b, row, h, heads, first_q, Tp, F) + i
    tl.store(Statistics + to * WIDTH, tl.where(lse == -INF, INF, lse * LOG2E))
    tl.store(Statistics + to * WIDTH + 1, delta)


@triton.jit(do_not_specialize=[*RUNTIME, "Tp", "tiles"])
def attention_far(
    Q, K, V, Mask, CuQ, CuK, LenK, Alibi, Sinks, Rng,
    q_b: tl.int64, q_h: tl.int64, q_t, k_b: tl.int64, k_h: tl.int64, k_t,
    v_b: tl.int64, v_h: tl.int64, v_t,
    mask_b: tl.int64, mask_h: tl.int64, mask_q: tl.int64, mask_k: tl.int64, alibi_b: tl.int64,
    heads, group, Tq, Tk, left, right, scale, softcap, threshold: tl.int64, factor,
    OutLse, Statistics, Tp: tl.int64, tiles,
    F: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Rows whose LSE is far from 0 get their largest logit in its place, and log2 of the sum beside: an LSE
    of -1e9, where a float mask hides a whole row, has no digits left for it. Other programs end at once."""
    pid = tl.program_id(0)
    i = pid % tiles * BM + tl.arange(0, BM)
    pid = pid // tiles
    b, h = pid // heads, pid % heads
    q_b, q_h, q_t = q_b * F.ALIGN, q_h * F.ALIGN, q_t * F.ALIGN
    k_b, k_h, k_t = k_b * F.ALIGN, k_h * F.ALIGN, k_t * F.ALIGN
    row, first_q, first_k, see = sequence(b, Tq, Tk, CuQ, CuK, LenK, left, right, F)
    ok = i < see.len_q
    t = first_q + i
    lse = tl.abs(tl.load(OutLse + (row * heads + h) * Tq + t, mask=ok, other=0.0))
    far = (lse > FAR_LSE) & (lse < INF)
    if tl.max(far.to(tl.int32), 0) == 0:
        return
    head = head_of(
        b, h, see, heads, Mask, Alibi, Rng, mask_b, mask_h, mask_q, mask_k, alibi_b,
        scale, softcap, threshold, factor, F,
    )  # fmt: skip
    q = load_rows(Q, row * q_b + h * q_h + t * q_t, ok, F, False)
    m, total = largest_and_sum(q, K + row * k_b + h // group * k_h + first_k * k_t, k_t, i, head, F)
    if F.SINKS:
        sink = tl.load(Sinks + h) * LOG2E
        top = tl.maximum(m, sink)
        total = total * tl.exp2(m - top) + tl.exp2(sink - top)
        m = top
    to = statistics_row(b, row, h, heads, first_q, Tp, F) + i
    tl.store(Statistics + to * WIDTH, m, mask=far)
    tl.store(Statistics + to * WIDTH + 2, tl.log2(total), mask=far)


@triton.jit
def weight_and_gradient(
    s, dp, i, j, cut, lse, delta, log_sum, keep, head, F: tl.constexpr
):  # fmt: skip
    """P after dropout, dS, and the gradient of scale * q·k, which is dS in front of the softcap."""
    s, cap = logits(s, i, j, cut, head, F, True)
    x = s - lse
    if F.MASK == FLOAT:
        x = tl.where(x > 0.0, 0.0, x) - log_sum
    p = tl.exp2(x)
    if F.DROPOUT:
        dp = tl.where(keep, dp * head.dropout.factor, 0.0)
    ds = p * (dp - delta)
    if F.DROPOUT:
        p = tl.where(keep, p * head.dropout.factor, 0.0)
    dqk = ds
    if F.SOFTCAP:
        dqk = ds * (1.0 - cap * cap)
    return p, ds, dqk


@triton.jit
def zero_unless(ok, rows):
    clean = ()
    for c in tl.static_range(len(rows)):
        clean = clean + (tl.where(ok[:, None], rows[c], 0.0),)
    return clean


@triton.jit(do_not_specialize=[*GRADIENT, "tiles", "splits", "part"])
def attention_dkdv(
    Q, K, V, Mask, CuQ, CuK, LenK, Alibi, Sinks, Rng,
    q_b: tl.int64, q_h: tl.int64, q_t, k_b: tl.int64, k_h: tl.int64, k_t,
    v_b: tl.int64, v_h: tl.int64, v_t,
    mask_b: tl.int64, mask_h: tl.int64, mask_q: tl.int64, mask_k: tl.int64, alibi_b: tl.int64,
    heads, group, Tq, Tk, left, right, scale, softcap, threshold: tl.int64, factor,
    DOut, Statistics, dout_b: tl.int64, dout_h: tl.int64, dout_t, dscale, Tp: tl.int64,
    DK, DV, tiles, splits, part: tl.int64,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WANT_DK: tl.constexpr, WANT_DV: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of keys of one key head and walks the queries of group / splits heads.

    Where the registers do not hold both gradients of a tile, two launches make one each.

    The parts of two splits lie `part` rows [B, Tk, key heads] apart and are added afterwards.
    """
    pid = tl.program_id(0)
    split = pid % splits
    pid = pid // splits
    j0 = pid % tiles * BN
    pid = pid // tiles
    key_heads = heads // group
    b, key_head = pid // key_heads, pid % key_heads
    q_b, q_h, q_t = q_b * F.ALIGN, q_h * F.ALIGN, q_t * F.ALIGN
    k_b, k_h, k_t = k_b * F.ALIGN, k_h * F.ALIGN, k_t * F.ALIGN
    v_b, v_h, v_t = v_b * F.ALIGN, v_h * F.ALIGN, v_t * F.ALIGN
    dout_b, dout_h, dout_t = dout_b * F.ALIGN, dout_h * F.ALIGN, dout_t * F.ALIGN

    row, first_q, first_k, see = sequence(b, Tq, Tk, CuQ, CuK, LenK, left, right, F)
    there = Tk  # rows of dK and dV to write; those behind len_k get zeros
    if F.VARLEN:
        there = see.len_k
    if j0 >= there:
        return
    j = j0 + tl.arange(0, BN)
    ok = j < see.len_k
    t = first_k + j
    k = load_rows(K, row * k_b + key_head * k_h + t * k_t, ok, F, False)
    v = load_rows(V, row * v_b + key_head * v_h + t * v_t, ok, F, True)

    # Queries [lo, hi) see some key of the tile, blocks of [full_lo, full_hi) see all of them.
    lo, hi = 0, see.len_q
    full_lo, full_hi = 0, see.len_q
    if F.RIGHT:
        lo = tl.maximum(j0 - see.offset - see.right, 0)
        full_lo = j0 + BN - 1 - see.offset - see.right
    if F.LEFT:
        hi = tl.minimum(hi, j0 + BN + see.left - see.offset)
        full_hi = j0 + see.left - see.offset + 1
    hi = tl.where(j0 < see.len_k, tl.maximum(hi, 0), 0)
    lo = tl.minimum(lo, hi) // BM * BM

    dk = zero_rows(BN, F, False)
    dv = zero_rows(BN, F, True)
    share = group // splits
    for g in tl.range(split * share, split * share + share):
        h = key_head * group + g
        head = head_of(
            b, h, see, heads, Mask, Alibi, Rng, mask_b, mask_h, mask_q, mask_k, alibi_b,
            scale, softcap, threshold, factor, F,
        )  # fmt: skip
        Qh = Q + row * q_b + h * q_h + first_q * q_t
        DOh = DOut + row * dout_b + h * dout_h + first_q * dout_t
        statistics = Statistics + statistics_row(b, row, h, heads, first_q, Tp, F) * WIDTH
        r = tl.arange(0, BM)
        for i0 in tl.range(lo, hi, BM):  # blocks of scores are [keys, queries]
            i = i0 + r
            present = i < see.len_q
            q = load_rows(Qh + wide(i0) * q_t, r * q_t, present, F, False)
            dout = load_rows(DOh + wide(i0) * dout_t, r * dout_t, present, F, True)
            lse, delta, log_sum = load_statistics(statistics, i, F, True)
            keep = True
            if F.DROPOUT:
                keep = tl.trans(kept(i, j0, head, BN))
            s = dot_rows(k, q, F)
            dp = s
            if WANT_DK:
                dp = dot_rows(v, dout, F)
            cut = False
            if F.RIGHT or F.LEFT:
                cut = (i0 < full_lo) | (i0 + BM > full_hi)
            p, _ds, dqk = weight_and_gradient(
                s, dp, i[None, :], j[:, None], cut, lse[None, :], delta[None, :], log_sum, keep, head, F
            )
            if WANT_DV:
                dv = add_product(dv, p, dout, F)
            if WANT_DK:
                dk = add_product(dk, dqk, q, F)
    # Behind the last key exp(0 - LSE) may have been infinite.
    to = (row * Tk + t) * key_heads + key_head + split * part
    if WANT_DK:
        store_rows(DK, to * F.D, j < there, zero_unless(ok, scale_rows(dk, dscale)), F, False)
    if WANT_DV:
        store_rows(DV, to * F.DV, j < there, zero_unless(ok, dv), F, True)


@triton.jit(do_not_specialize=[*GRADIENT, "tiles"])
def attention_dq(
    Q, K, V, Mask, CuQ, CuK, LenK, Alibi, Sinks, Rng,
    q_b: tl.int64, q_h: tl.int64, q_t, k_b: tl.int64, k_h: tl.int64, k_t,
    v_b: tl.int64, v_h: tl.int64, v_t,
    mask_b: tl.int64, mask_h: tl.int64, mask_q: tl.int64, mask_k: tl.int64, alibi_b: tl.int64,
    heads, group, Tq, Tk, left, right, scale, softcap, threshold: tl.int64, factor,
    DOut, Statistics, dout_b: tl.int64, dout_h: tl.int64, dout_t, dscale, Tp: tl.int64,
    DQ, tiles,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of queries and walks the keys they see, as forward does."""
    pid = tl.program_id(0)
    i_first = (tiles - 1 - pid % tiles) * BM
    pid = pid // tiles
    b, h = pid // heads, pid % heads
    key_head = h // group
    q_b, q_h, q_t = q_b * F.ALIGN, q_h * F.ALIGN, q_t * F.ALIGN
    k_b, k_h, k_t = k_b * F.ALIGN, k_h * F.ALIGN, k_t * F.ALIGN
    v_b, v_h, v_t = v_b * F.ALIGN, v_h * F.ALIGN, v_t * F.ALIGN
    dout_b, dout_h, dout_t = dout_b * F.ALIGN, dout_h * F.ALIGN, dout_t * F.ALIGN

    row, first_q, first_k, see = sequence(b, Tq, Tk, CuQ, CuK, LenK, left, right, F)
    if i_first >= see.len_q:
        return
    i = i_first + tl.arange(0, BM)
    ok = i < see.len_q
    t = first_q + i
    q = load_rows(Q, row * q_b + h * q_h + t * q_t, ok, F, False)
    dout = load_rows(DOut, row * dout_b + h * dout_h + t * dout_t, ok, F, True)
    statistics = Statistics + statistics_row(b, row, h, heads, first_q, Tp, F) * WIDTH
    lse, delta, log_sum = load_statistics(statistics, i, F, False)
    head = head_of(
        b, h, see, heads, Mask, Alibi, Rng, mask_b, mask_h, mask_q, mask_k, alibi_b,
        scale, softcap, threshold, factor, F,
    )  # fmt: skip
    keys = Keys(
        K + row * k_b + key_head * k_h + first_k * k_t, V + row * v_b + key_head * v_h + first_k * v_t,
        k_t, v_t, k_b, v_b, K,
    )  # fmt: skip

    dq = zero_rows(BM, F, False)
    i_last = tl.minimum(i_first + BM, see.len_q) - 1
    lo, hi, full_lo, full_hi = key_range(i_first, i_last, 0, 1, see, F, BN)
    for j0 in tl.range(lo, hi, BN):
        k, v = load_keys(keys, j0, see, F, BN)
        j = j0 + tl.arange(0, BN)
        keep = True
        if F.DROPOUT:
            keep = kept(i, j0, head, BN)
        s = dot_rows(q, k, F)
        dp = dot_rows(dout, v, F)
        cut = (j0 < full_lo) | (j0 + BN > full_hi)
        _p, _ds, dqk = weight_and_gradient(
            s, dp, i[:, None], j[None, :], cut, lse[:, None], delta[:, None], log_sum, keep, head, F
        )
        dq = add_product(dq, dqk, k, F)
    store_rows(DQ, ((row * Tq + t) * heads + h) * F.D, ok, scale_rows(dq, dscale), F, False)


@triton.jit(do_not_specialize=[*GRADIENT, "mask_heads", "sum_b", "sum_h", "rows", "cols"])
def attention_dmask(
    Q, K, V, Mask, CuQ, CuK, LenK, Alibi, Sinks, Rng,
    q_b: tl.int64, q_h: tl.int64, q_t, k_b: tl.int64, k_h: tl.int64, k_t,
    v_b: tl.int64, v_h: tl.int64, v_t,
    mask_b: tl.int64, mask_h: tl.int64, mask_q: tl.int64, mask_k: tl.int64, alibi_b: tl.int64,
    heads, group, Tq, Tk, left, right, scale, softcap, threshold: tl.int64, factor,
    DOut, Statistics, dout_b: tl.int64, dout_h: tl.int64, dout_t, dscale, Tp: tl.int64,
    DMask, mask_heads, sum_b, sum_h, rows, cols,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SUM_Q: tl.constexpr, SUM_K: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of the mask [*, mask_heads, rows, cols] and walks all that it is broadcast over:
    sum_b sequences and sum_h heads, and with SUM_Q or SUM_K all tiles of queries or keys. Dense only."""
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

    total = tl.zeros([BM, BN], tl.float32)
    for n in tl.range(0, sum_b * sum_h * walk_q * walk_k):
        b = mask_batch + n // walk_k // walk_q // sum_h
        h = mask_head + n // walk_k // walk_q % sum_h
        i0, j0 = (tile_q + n // walk_k % walk_q) * BM, (tile_k + n % walk_k) * BN
        r, c = tl.arange(0, BM), tl.arange(0, BN)
        i, j = i0 + r, j0 + c
        row, first_q, _first_k, see = sequence(b, Tq, Tk, CuQ, CuK, LenK, left, right, F)
        ok, there = i < see.len_q, j < see.len_k
        q = load_rows(Q + row * q_b + h * q_h + wide(i0) * q_t, r * q_t, ok, F, False)
        dout = load_rows(DOut + row * dout_b + h * dout_h + wide(i0) * dout_t, r * dout_t, ok, F, True)
        k = load_rows(K + row * k_b + h // group * k_h + wide(j0) * k_t, c * k_t, there, F, False)
        v = load_rows(V + row * v_b + h // group * v_h + wide(j0) * v_t, c * v_t, there, F, True)
        statistics = Statistics + statistics_row(b, row, h, heads, first_q, Tp, F) * WIDTH
        lse, delta, log_sum = load_statistics(statistics, i, F, False)
        head = head_of(
            b, h, see, heads, Mask, Alibi, Rng, mask_b, mask_h, mask_q, mask_k, alibi_b,
            scale, softcap, threshold, factor, F,
        )  # fmt: skip
        keep = True
        if F.DROPOUT:
            keep = kept(i, j0, head, BN)
        s = dot_rows(q, k, F)
        dp = dot_rows(dout, v, F)
        _p, ds, _dqk = weight_and_gradient(
            s, dp, i[:, None], j[None, :], True, lse[:, None], delta[:, None], log_sum, keep, head, F
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
