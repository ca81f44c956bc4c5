"""Forward: a program owns a tile of queries and walks the keys they see with an online softmax.

Blocks of keys that nobody sees are skipped. Of the others only those cut by an edge of the window, by the
diagonal or by the end of the keys compare positions, behind a branch that the whole program takes or not:
three loops, one for each kind of block, would each keep addresses of their own in registers.

With PACK the rows of a tile are (query, head of the group), so that a few queries of many heads fill a tile
and read their key head once. With SPLIT programs share the keys of a tile; decode.combine joins their parts.
"""

import triton
import triton.language as tl

from .common import (
    INF,
    LN2,
    LOG2E,
    Keys,
    add_product,
    dot_rows,
    head_of,
    kept,
    key_range,
    load_keys,
    load_rows,
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


@triton.jit(do_not_specialize=[*RUNTIME, "table_b", "tiles", "splits", "part"])
def attention_forward(
    Q, K, V, Mask, CuQ, CuK, LenK, Alibi, Sinks, Rng,
    q_b: tl.int64, q_h: tl.int64, q_t, k_b: tl.int64, k_h: tl.int64, k_t,
    v_b: tl.int64, v_h: tl.int64, v_t,
    mask_b: tl.int64, mask_h: tl.int64, mask_q: tl.int64, mask_k: tl.int64, alibi_b: tl.int64,
    heads, group, Tq, Tk, left, right, scale, softcap, threshold: tl.int64, factor,
    Out, Lse, Table, table_b: tl.int64, tiles, splits, part: tl.int64,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Two splits write their parts `part` rows [B, Tq, heads] apart; for an LSE all m, then all norms."""
    pid = tl.program_id(0)
    split = pid % splits
    pid = pid // splits
    tile = tiles - 1 - pid % tiles  # with a causal mask the longest first
    pid = pid // tiles
    q_b, q_h, q_t = q_b * F.ALIGN, q_h * F.ALIGN, q_t * F.ALIGN
    k_b, k_h, k_t = k_b * F.ALIGN, k_h * F.ALIGN, k_t * F.ALIGN
    v_b, v_h, v_t = v_b * F.ALIGN, v_h * F.ALIGN, v_t * F.ALIGN

    r = tile * BM + tl.arange(0, BM)
    i_first, i_last = tile * BM, tile * BM + BM - 1
    if F.PACK:
        b, key_head = pid // (heads // group), pid % (heads // group)
        i, h = r // group, key_head * group + r % group
        i_first, i_last = i_first // group, i_last // group
    else:
        b, h = pid // heads, pid % heads
        key_head = h // group
        i = r
    row, first_q, first_k, see = sequence(b, Tq, Tk, CuQ, CuK, LenK, left, right, F)
    if i_first >= see.len_q:
        return
    i_last = tl.minimum(i_last, see.len_q - 1)
    ok = i < see.len_q
    t = first_q + i

    q = load_rows(Q, row * q_b + h * q_h + t * q_t, ok, F, False)
    head = head_of(
        b, h, see, heads, Mask, Alibi, Rng, mask_b, mask_h, mask_q, mask_k, alibi_b,
        scale, softcap, threshold, factor, F,
    )  # fmt: skip
    K += key_head * k_h
    V += key_head * v_h
    if F.PAGE:  # the first dimension of k and v counts pages
        keys = Keys(K, V, k_t, v_t, k_b, v_b, Table + b * table_b)
    else:
        keys = Keys(
            K + row * k_b + first_k * k_t, V + row * v_b + first_k * v_t, k_t, v_t, k_b, v_b, K
        )  # fmt: skip

    acc = zero_rows(BM, F, True)
    m = tl.full([BM], -INF, tl.float32)
    norm = tl.zeros([BM], tl.float32)
    if F.SINKS and not F.SPLIT:
        m = tl.zeros([BM], tl.float32) + tl.load(Sinks + h) * LOG2E
        norm = tl.where(m == -INF, 0.0, 1.0)
    # m = max of s, norm = sum of e^(s - m), acc = sum of e^(s - m) v over the keys so far
    unit = scale if F.FOLD else 1.0
    lo, hi, full_lo, full_hi = key_range(i_first, i_last, split, splits, see, F, BN)
    for j0 in tl.range(lo, hi, BN):
        k, v = load_keys(keys, j0, see, F, BN)
        j = j0 + tl.arange(0, BN)
        s = dot_rows(q, k, F)
        s, _cap = logits(s, i[:, None], j[None, :], (j0 < full_lo) | (j0 + BN > full_hi), head, F, not F.FOLD)
        m_new = tl.maximum(m, tl.max(s, 1) * unit)
        base = tl.where(m_new == -INF, 0.0, m_new)  # a row that has seen no key yet
        p = tl.exp2(s * unit - base[:, None])
        alpha = tl.exp2(m - base)
        norm = norm * alpha + tl.sum(p, 1)
        if F.DROPOUT:
            p = tl.where(kept(i, j0, head, BN), p, 0.0)
        acc = add_product(scale_rows(acc, alpha[:, None]), p, v, F)
        m = m_new

    none = norm == 0.0
    inverse = tl.where(none, 0.0, 1.0 / norm)
    if F.DROPOUT:
        inverse *= factor
    to = (row * Tq + t) * heads + h
    lse_to = (row * heads + h) * Tq + t
    if F.SPLIT:
        to += split * part
        lse_to += split * part
        tl.store(Lse + lse_to, m, mask=ok)
        tl.store(Lse + splits * part + lse_to, norm, mask=ok)
    else:
        tl.store(Lse + lse_to, tl.where(none, -INF, (m + tl.log2(norm)) * LN2), mask=ok)
    store_rows(Out, to * F.DV, ok, scale_rows(acc, inverse[:, None]), F, True)
