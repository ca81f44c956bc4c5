"""Forward: a program owns a tile of queries and walks the keys they see with an online softmax.

The walk has three parts, compiled apart: blocks cut by the left edge of the window, blocks that every query sees,
where no comparison is made, and blocks cut by the diagonal or the end of the keys. Blocks nobody sees are skipped.

With PACK the rows of a tile are (query, head of the group), so that a few queries of many heads fill a tile and read
their key head once. With SPLIT the keys of a tile are shared among programs, whose parts `combine` puts together.
"""

import triton
import triton.language as tl

from .common import (
    INF,
    LN2,
    LOG2E,
    NO_MASK,
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

# Lengths, strides and all that changes from call to call must not compile another kernel.
RUNTIME = (
    "q_b q_h q_t k_b k_h k_t v_b v_h v_t mask_b mask_h mask_q mask_k alibi_b "
    "heads group Tq Tk left right scale softcap threshold factor"
).split()


@triton.jit
def attend(
    acc, l, m, q, K, V, k_t, v_t, k_b, v_b, Pages, lo, hi, i, see, rule, drop, bh,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BOUND: tl.constexpr,
):  # fmt: skip
    """Adds keys [lo, hi) to the softmax of a tile: acc = sum of e^(s - m) v, l = sum of e^(s - m), m = max of s."""
    # Where the logit is nothing but scale * q·k, scaling goes into the fused multiply-add in front of exp2.
    FOLD: tl.constexpr = not (F.SOFTCAP or F.ALIBI or F.MASK != NO_MASK)
    unit = rule.scale if FOLD else 1.0
    rows = tl.arange(0, BN)
    for j0 in tl.range(lo, hi, BN):
        j = j0 + rows
        if F.PAGE:
            page = tl.load(Pages + j // F.PAGE, mask=j < see.len_k, other=0).to(tl.int64)
            slot = j % F.PAGE
            k = load_rows(K, page * k_b + slot * k_t, j < see.len_k, F.D, F.QK, BOUND, F.UPCAST)
            v = load_rows(V, page * v_b + slot * v_t, j < see.len_k, F.DV, F.PV, BOUND, F.UPCAST)
        else:
            k = load_rows(K + j0 * k_t, rows * k_t, j < see.len_k, F.D, F.QK, BOUND, F.UPCAST)
            v = load_rows(V + j0 * v_t, rows * v_t, j < see.len_k, F.DV, F.PV, BOUND, F.UPCAST)
        s = dot_rows(q, k, F.PRECISION)
        s, _ = logits(s, i[:, None], j[None, :], see, rule, F, BOUND, not FOLD)
        m_new = tl.maximum(m, tl.max(s, 1) * unit)
        base = m_new
        if BOUND or F.MASK != NO_MASK:
            base = tl.where(m_new == -INF, 0.0, m_new)  # a row that has seen no key yet
        p = tl.exp2(s * unit - base[:, None])
        alpha = tl.exp2(m - base)
        l = l * alpha + tl.sum(p, 1)
        if F.DROPOUT:
            p = tl.where(kept(i, j0, bh, drop, BN), p, 0.0)
        acc = add_product(scale_rows(acc, alpha[:, None]), p, v, F.PRECISION)
        m = m_new
    return acc, l, m


@triton.jit(do_not_specialize=[*RUNTIME, "tiles", "splits", "part"])
def attention_forward(
    Q, K, V, Mask, CuQ, CuK, LenK, Alibi, Sinks, Rng,
    q_b: tl.int64, q_h: tl.int64, q_t: tl.int64, k_b: tl.int64, k_h: tl.int64, k_t: tl.int64,
    v_b: tl.int64, v_h: tl.int64, v_t: tl.int64,
    mask_b: tl.int64, mask_h: tl.int64, mask_q: tl.int64, mask_k: tl.int64, alibi_b: tl.int64,
    heads, group, Tq, Tk, left, right, scale, softcap, threshold: tl.int64, factor,
    Out, Lse, Table, table_b: tl.int64, tiles, splits, part: tl.int64,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """scale may have either sign; `part` is the number of rows [B, Tq, heads] between the parts of two splits."""
    pid = tl.program_id(0)
    split = pid % splits
    pid = pid // splits
    tile = tiles - 1 - pid % tiles  # with a causal mask the longest first
    pid = pid // tiles
    q_b, q_h, q_t = q_b * F.ALIGN, q_h * F.ALIGN, q_t * F.ALIGN
    k_b, k_h, k_t = k_b * F.ALIGN, k_h * F.ALIGN, k_t * F.ALIGN
    v_b, v_h, v_t = v_b * F.ALIGN, v_h * F.ALIGN, v_t * F.ALIGN

    r = tile * BM + tl.arange(0, BM)
    if F.PACK:
        key_heads = heads // group
        b, key_head = pid // key_heads, pid % key_heads
        i = r // group
        h = key_head * group + r % group
        i_first, i_last = tile * BM // group, (tile * BM + BM - 1) // group
    else:
        b, h = pid // heads, pid % heads
        key_head = h // group
        i = r
        i_first, i_last = tile * BM, tile * BM + BM - 1
    row, first_q, first_k, see = sequence(b, Tq, Tk, CuQ, CuK, LenK, left, right, F)
    if i_first >= see.len_q:
        return
    i_last = tl.minimum(i_last, see.len_q - 1)
    ok = i < see.len_q

    q = load_rows(Q, row * q_b + h * q_h + (first_q + i) * q_t, ok, F.D, F.QK, True, F.UPCAST)
    q = scale_rows(
        q, tl.where(scale < 0, -1.0, 1.0).to(q[0].dtype)
    )  # so that the largest q·k gives the largest logit
    scale = tl.abs(scale)
    Pages = Table
    if F.PAGE:  # the first dimension of k and v counts pages
        Pages = Table + b * table_b
    else:
        K += row * k_b + first_k * k_t
        V += row * v_b + first_k * v_t
    K += key_head * k_h
    V += key_head * v_h
    rule = logit_rule(
        b,
        h[:, None] if F.PACK else h,
        Mask,
        Alibi,
        mask_b,
        mask_h,
        mask_q,
        mask_k,
        alibi_b,
        scale,
        softcap,
        F,
    )
    drop = dropout_rule(Rng, threshold, factor, F)
    bh = b * heads + h
    if F.PACK:
        bh = bh[:, None]

    acc = zero_rows(BM, F.PV)
    m = tl.full([BM], -INF, tl.float32)
    l = tl.zeros([BM], tl.float32)
    if F.SINKS and not F.SPLIT:
        m = tl.zeros([BM], tl.float32) + tl.load(Sinks + h) * LOG2E
        l = tl.where(m == -INF, 0.0, 1.0)

    lo, hi, full_lo, full_hi = key_range(i_first, i_last, see, BN, F)
    if F.SPLIT:
        share = tl.cdiv(tl.cdiv(hi - lo, splits), BN) * BN
        lo = tl.minimum(lo + split * share, hi)
        hi = tl.minimum(lo + share, hi)
    full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
    full_hi = tl.minimum(tl.maximum(full_hi, full_lo), hi)
    if F.LEFT:
        acc, l, m = attend(
            acc,
            l,
            m,
            q,
            K,
            V,
            k_t,
            v_t,
            k_b,
            v_b,
            Pages,
            lo,
            full_lo,
            i,
            see,
            rule,
            drop,
            bh,
            F,
            BM,
            BN,
            True,
        )
    acc, l, m = attend(
        acc,
        l,
        m,
        q,
        K,
        V,
        k_t,
        v_t,
        k_b,
        v_b,
        Pages,
        full_lo,
        full_hi,
        i,
        see,
        rule,
        drop,
        bh,
        F,
        BM,
        BN,
        False,
    )
    acc, l, m = attend(
        acc, l, m, q, K, V, k_t, v_t, k_b, v_b, Pages, full_hi, hi, i, see, rule, drop, bh, F, BM, BN, True
    )

    none = l == 0.0
    inverse = tl.where(none, 0.0, 1.0 / l)
    if F.DROPOUT:
        inverse *= factor
    lse = tl.where(none, -INF, (m + tl.log2(l)) * LN2)
    t = first_q + i
    out = (row * Tq + t) * heads + h
    lse_at = (row * heads + h) * Tq + t
    if F.SPLIT:
        out += split * part
        lse_at += split * part
    store_rows(Out, out * F.DV, ok, scale_rows(acc, inverse[:, None]), F.DV, F.PV)
    tl.store(Lse + lse_at, lse, mask=ok)


@triton.jit(do_not_specialize=["heads", "Tq", "splits", "part"])
def combine(
    Parts, PartLse, Sinks, Out, Lse, heads, Tq, splits, part: tl.int64,
    SINKS: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row of out from its parts: the weight of a part is e^(its LSE - the LSE of all)."""
    row = tl.program_id(0).to(tl.int64)  # [B, Tq, heads]
    h = row % heads
    t = row // heads % Tq
    lse_row = (row // heads // Tq * heads + h) * Tq + t
    s, d = tl.arange(0, CHUNK), tl.arange(0, WIDTH)

    top = tl.full([], -INF, tl.float32)
    if SINKS:
        top = tl.load(Sinks + h)
    for s0 in tl.range(0, splits, CHUNK):
        lse = tl.load(PartLse + (s0 + s) * part + lse_row, mask=s0 + s < splits, other=-INF)
        top = tl.maximum(top, tl.max(lse, 0))
    base = tl.where(top == -INF, 0.0, top)
    total = tl.zeros([], tl.float32)
    if SINKS:
        total = tl.exp2((tl.load(Sinks + h) - base) * LOG2E)
    acc = tl.zeros([WIDTH], tl.float32)
    for s0 in tl.range(0, splits, CHUNK):
        ok = s0 + s < splits
        lse = tl.load(PartLse + (s0 + s) * part + lse_row, mask=ok, other=-INF)
        weight = tl.exp2((lse - base) * LOG2E)
        rows = ((s0 + s) * part + row) * DV
        x = tl.load(Parts + rows[:, None] + d[None, :], mask=ok[:, None] & (d < DV)[None, :], other=0.0)
        acc += tl.sum(x * weight[:, None], 0)
        total += tl.sum(weight, 0)
    out = tl.where(total == 0.0, 0.0, acc / total)
    tl.store(Out + row * DV + d, out.to(Out.dtype.element_ty), mask=d < DV)
    tl.store(Lse + lse_row, tl.where(total == 0.0, -INF, base + tl.log2(total) * LN2))
