"""Additive attention: S = w · tanh(q + k), O = softmax(S) V, for all pairs of queries and keys.

The tanh of every pair and feature is the work, and all else may be plain. A program owns rows, of queries or
of keys, and walks those of the other kind; a block of both is a tile [walked, owned, features]. Threads share
out its last two dimensions, so that the gradients, sums over what is walked, need no exchange between them;
scores do, but once a block, after the last feature. What is owned, O or a gradient, lies in float32 in global
memory, and each block adds to it: D and Dv have no limit, and none of them compiles a kernel of its own.

Backward computes the scores again, and every gradient has one owner that adds in a fixed order. With
delta = sum of P dP over the keys,

    dS = P (dP - delta),   dP = dO Vᵀ + dweights,   dV = Pᵀ dO,
    dq = w sum over keys of dS (1 - tanh²),   dk: over queries,   dw = sum of dS tanh
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .common import BOOL, INF, LOG2E, tanh, wide


class Additive(NamedTuple):
    """What is compiled in, besides the queries and keys of a block."""

    BD: int  # features of a block
    BV: int  # features of values in a block
    BY_KEYS: bool = False  # programs own keys, not queries
    MASK: int = 0  # BOOL, FLOAT, or 0: none
    LEN_K: bool = False
    ALIGN: int = 1  # divides D, Dv and the strides of q, k, v, dout; they are passed divided by it
    PRECISION: str = "ieee"  # of float32 products: ieee, tf32x3, tf32
    FAST: bool = False  # tanh with 11 bits, which half types round to anyway
    UPCAST: bool = False  # bf16 under the interpreter, which takes it for uint16 in tl.dot


class Operands(NamedTuple):
    """One sequence: pointers to its first rows, strides of rows, sizes."""

    q: tl.tensor
    k: tl.tensor
    v: tl.tensor
    w: tl.tensor
    mask: tl.tensor
    q_t: tl.tensor
    k_t: tl.tensor
    v_t: tl.tensor
    mask_q: tl.tensor
    mask_k: tl.tensor
    len_q: tl.tensor
    len_k: tl.tensor
    D: tl.tensor
    Dv: tl.tensor


RUNTIME = "q_b q_t k_b k_t v_b v_t mask_b mask_q mask_k Tq Tk D Dv tiles splits".split()
GRADIENT = [*RUNTIME, "dout_b", "dout_t"]


@triton.jit
def operands(
    b, Q, K, V, W, Mask, LenK, q_b, q_t, k_b, k_t, v_b, v_t, mask_b, mask_q, mask_k, Tq, Tk, D, Dv,
    F: tl.constexpr,
):  # fmt: skip
    mask, len_k = 0, Tk
    if F.MASK:
        mask = Mask + b * mask_b
    if F.LEN_K:
        len_k = tl.minimum(tl.maximum(tl.load(LenK + b), 0), Tk).to(tl.int32)
    A: tl.constexpr = F.ALIGN
    return Operands(
        Q + b * q_b * A, K + b * k_b * A, V + b * v_b * A, W, mask, q_t * A, k_t * A, v_t * A, mask_q, mask_k,
        Tq, len_k, D * A, Dv * A,
    )  # fmt: skip


@triton.jit
def place(tiles, splits, T, N: tl.constexpr):
    """(sequence, share of the keys, rows of the tile, the same as rows of [splits, B, T])"""
    pid = tl.program_id(0)
    b, split = wide(pid // splits // tiles), pid % splits
    r = pid // splits % tiles * N + tl.arange(0, N)
    batches = tl.num_programs(0) // splits // tiles
    return b, split, r, (split * batches + b) * T + r


@triton.jit
def block(base, rows, stride, ok, c0, size, N: tl.constexpr, F: tl.constexpr):
    """Columns c0 .. c0 + N of rows, zeros for what is not ok or not there."""
    c = c0 + tl.arange(0, N)
    at = base + wide(rows)[:, None] * stride + c[None, :]
    x = tl.load(at, mask=ok[:, None] & (c < size)[None, :], other=0.0)
    if F.UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def add(base, rows, ok, c0, size, x):
    """To a block of a contiguous float32 matrix that nobody else writes."""
    c = c0 + tl.arange(0, x.shape[1])
    at = base + wide(rows)[:, None] * size + c[None, :]
    there = ok[:, None] & (c < size)[None, :]
    tl.store(at, tl.load(at, mask=there, other=0.0) + x, mask=there)


@triton.jit
def crossed(i, j, F: tl.constexpr):
    """Queries and keys, to be broadcast to [walked, owned]."""
    if F.BY_KEYS:
        return i[:, None], j[None, :]
    else:
        return i[None, :], j[:, None]


@triton.jit
def tanh_of_pairs(x, i, j, d0, F: tl.constexpr):
    """tanh(q + k) [walked, owned, BD], and w [BD], which is 0 behind the last feature."""
    q = block(x.q, i, x.q_t, i < x.len_q, d0, x.D, F.BD, F).to(tl.float32)
    k = block(x.k, j, x.k_t, j < x.len_k, d0, x.D, F.BD, F).to(tl.float32)
    d = d0 + tl.arange(0, F.BD)
    w = tl.load(x.w + d, mask=d < x.D, other=0.0).to(tl.float32)
    if F.BY_KEYS:
        pair = q[:, None, :] + k[None, :, :]
    else:
        pair = k[:, None, :] + q[None, :, :]
    if F.FAST:
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [pair], tl.float32, True, 1)
    else:
        t = tanh(pair)
    return t, w


@triton.jit
def scores(x, i, j, F: tl.constexpr):
    """S [walked, owned], -inf for keys that are hidden or not there."""
    WALKED: tl.constexpr = i.shape[0] if F.BY_KEYS else j.shape[0]
    OWNED: tl.constexpr = j.shape[0] if F.BY_KEYS else i.shape[0]
    BD: tl.constexpr = F.BD
    total = tl.zeros([WALKED, OWNED, BD], tl.float32)
    for d0 in tl.range(0, x.D, F.BD):
        t, w = tanh_of_pairs(x, i, j, d0, F)
        total += w[None, None, :] * t
    s = tl.sum(total, 2)
    i, j = crossed(i, j, F)
    ok = j < x.len_k
    if F.MASK:
        at = x.mask + wide(i) * x.mask_q + wide(j) * x.mask_k
        mask = tl.load(at, mask=(i < x.len_q) & ok, other=0)
        if F.MASK == BOOL:
            s = tl.where(mask != 0, s, -INF)
        else:
            s += mask.to(tl.float32)
    return tl.where(ok, s, -INF)


@triton.jit
def softmax_step(s, m, norm):
    """For s [keys, queries]: e^(s - m), and the new maximum m and sum norm so far; what was summed with the
    old maximum shrinks by alpha."""
    m_new = tl.maximum(m, tl.max(s, 0))
    base = tl.where(m_new == -INF, 0.0, m_new)  # a query that has seen no key yet
    e = tl.exp2((s - base[None, :]) * LOG2E)
    alpha = tl.exp2((m - base) * LOG2E)
    return e, alpha, m_new, norm * alpha + tl.sum(e, 0)


@triton.jit
def share_of_keys(split, splits, x, BN: tl.constexpr):
    share = tl.cdiv(tl.cdiv(x.len_k, splits), BN) * BN
    lo = tl.minimum(split * share, x.len_k)
    return lo, tl.minimum(lo + share, x.len_k)


@triton.jit(do_not_specialize=RUNTIME)
def additive_forward(
    Q, K, V, W, Mask, LenK,
    q_b: tl.int64, q_t: tl.int64, k_b: tl.int64, k_t: tl.int64, v_b: tl.int64, v_t: tl.int64,
    mask_b: tl.int64, mask_q: tl.int64, mask_k: tl.int64, Tq, Tk, D, Dv, tiles, splits,
    Out, Max, Norm, Scores,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of queries and walks its share of the keys. Out [splits, B, Tq, Dv], float32, is
    zeros to begin with; Max and Norm [splits, B, Tq]: the largest score of the share, the sum of e^(S - max).
    An LSE would not do: where a mask hides a row by a number like -1e9 it has no digits left for the sum.
    Scores [B, Tq, Tk] are written up to the last key only."""
    b, split, i, row = place(tiles, splits, Tq, BM)
    x = operands(
        b, Q, K, V, W, Mask, LenK, q_b, q_t, k_b, k_t, v_b, v_t, mask_b, mask_q, mask_k, Tq, Tk, D, Dv, F
    )  # fmt: skip
    ok = i < Tq
    m = tl.full([BM], -INF, tl.float32)
    norm = tl.zeros([BM], tl.float32)
    lo, hi = share_of_keys(split, splits, x, BN)
    for j0 in tl.range(lo, hi, BN):
        j = j0 + tl.arange(0, BN)
        s = scores(x, i, j, F)
        if SCORES:
            to = Scores + (b * Tq + i)[None, :] * Tk + j[:, None]
            tl.store(to, s, mask=ok[None, :] & (j < x.len_k)[:, None])
        e, alpha, m, norm = softmax_step(s, m, norm)
        for c0 in tl.range(0, x.Dv, F.BV):
            v = block(x.v, j, x.v_t, j < x.len_k, c0, x.Dv, F.BV, F)
            c = c0 + tl.arange(0, F.BV)
            at = Out + row[:, None] * x.Dv + c[None, :]
            there = ok[:, None] & (c < x.Dv)[None, :]
            o = tl.load(at, mask=there, other=0.0) * alpha[:, None]
            tl.store(at, tl.dot(tl.trans(e.to(v.dtype)), v, o, input_precision=F.PRECISION), mask=there)
        tl.debug_barrier()  # the next block may read in one thread what this one wrote in another

    none = norm == 0.0
    inverse = tl.where(none, 0.0, 1.0 / norm)
    for c0 in tl.range(0, x.Dv, F.BV):
        c = c0 + tl.arange(0, F.BV)
        at = Out + row[:, None] * x.Dv + c[None, :]
        there = ok[:, None] & (c < x.Dv)[None, :]
        tl.store(at, tl.load(at, mask=there, other=0.0) * inverse[:, None], mask=there)
    tl.store(Max + row, m, mask=ok)
    tl.store(Norm + row, norm, mask=ok)


@triton.jit
def value_gradient(x, i, j, dout, dout_t, DWeights, first, Tk, F: tl.constexpr, DWEIGHTS: tl.constexpr):
    """dP [walked, owned]; `first`: the first row of the sequence in dweights [B * Tq, Tk]."""
    WALKED: tl.constexpr = i.shape[0] if F.BY_KEYS else j.shape[0]
    OWNED: tl.constexpr = j.shape[0] if F.BY_KEYS else i.shape[0]
    dp = tl.zeros([WALKED, OWNED], tl.float32)
    for c0 in tl.range(0, x.Dv, F.BV):
        do = block(dout, i, dout_t, i < x.len_q, c0, x.Dv, F.BV, F)
        v = block(x.v, j, x.v_t, j < x.len_k, c0, x.Dv, F.BV, F)
        if F.BY_KEYS:
            dp = tl.dot(do, tl.trans(v), dp, input_precision=F.PRECISION)
        else:
            dp = tl.dot(v, tl.trans(do), dp, input_precision=F.PRECISION)
    if DWEIGHTS:
        i, j = crossed(i, j, F)
        at = DWeights + (first + i) * Tk + j
        dp += tl.load(at, mask=(i < x.len_q) & (j < x.len_k), other=0.0).to(tl.float32)
    return dp


@triton.jit(do_not_specialize=GRADIENT)
def additive_statistics(
    Q, K, V, W, Mask, LenK,
    q_b: tl.int64, q_t: tl.int64, k_b: tl.int64, k_t: tl.int64, v_b: tl.int64, v_t: tl.int64,
    mask_b: tl.int64, mask_q: tl.int64, mask_k: tl.int64, Tq, Tk, D, Dv, tiles, splits,
    DOut, DWeights, dout_b: tl.int64, dout_t: tl.int64,
    Delta, Max, Norm,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DWEIGHTS: tl.constexpr,
):  # fmt: skip
    """Max and Norm as additive_forward makes them, and delta, not yet divided by the sum of all shares."""
    b, split, i, row = place(tiles, splits, Tq, BM)
    x = operands(
        b, Q, K, V, W, Mask, LenK, q_b, q_t, k_b, k_t, v_b, v_t, mask_b, mask_q, mask_k, Tq, Tk, D, Dv, F
    )  # fmt: skip
    dout = DOut + b * dout_b * F.ALIGN
    m = tl.full([BM], -INF, tl.float32)
    norm = tl.zeros([BM], tl.float32)
    delta = tl.zeros([BM], tl.float32)
    lo, hi = share_of_keys(split, splits, x, BN)
    for j0 in tl.range(lo, hi, BN):
        j = j0 + tl.arange(0, BN)
        e, alpha, m, norm = softmax_step(scores(x, i, j, F), m, norm)
        dp = value_gradient(x, i, j, dout, dout_t * F.ALIGN, DWeights, b * Tq, Tk, F, DWEIGHTS)
        delta = delta * alpha + tl.sum(e * dp, 0)
    tl.store(Delta + row, delta, mask=i < Tq)
    tl.store(Max + row, m, mask=i < Tq)
    tl.store(Norm + row, norm, mask=i < Tq)


@triton.jit
def weight_and_gradient(
    x, i, j, dout, dout_t, DWeights, Delta, Max, Inverse, first, Tk, F: tl.constexpr, DWEIGHTS: tl.constexpr
):  # fmt: skip
    """P and dS [walked, owned]; of a query that sees no key Max and Inverse are 0."""
    ok = i < x.len_q
    m = tl.load(Max + first + i, mask=ok, other=INF)
    inverse = tl.load(Inverse + first + i, mask=ok, other=0.0)
    delta = tl.load(Delta + first + i, mask=ok, other=0.0)
    dp = value_gradient(x, i, j, dout, dout_t, DWeights, first, Tk, F, DWEIGHTS)
    s = scores(x, i, j, F)
    m, _j = crossed(m, j, F)
    inverse, _j = crossed(inverse, j, F)
    delta, _j = crossed(delta, j, F)
    p = tl.exp2((s - m) * LOG2E) * inverse
    return p, p * (dp - delta)


@triton.jit(do_not_specialize=GRADIENT)
def additive_dq(
    Q, K, V, W, Mask, LenK,
    q_b: tl.int64, q_t: tl.int64, k_b: tl.int64, k_t: tl.int64, v_b: tl.int64, v_t: tl.int64,
    mask_b: tl.int64, mask_q: tl.int64, mask_k: tl.int64, Tq, Tk, D, Dv, tiles, splits,
    DOut, DWeights, dout_b: tl.int64, dout_t: tl.int64,
    Delta, Max, Inverse, DQ, DW, DScores,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DWEIGHTS: tl.constexpr, DSCORES: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of queries and walks its share of the keys. DQ and DW [splits, B, Tq, D] and
    DScores are zeros to begin with; dw is the sum of the rows of DW."""
    b, split, i, row = place(tiles, splits, Tq, BM)
    x = operands(
        b, Q, K, V, W, Mask, LenK, q_b, q_t, k_b, k_t, v_b, v_t, mask_b, mask_q, mask_k, Tq, Tk, D, Dv, F
    )  # fmt: skip
    dout = DOut + b * dout_b * F.ALIGN
    ok = i < Tq
    lo, hi = share_of_keys(split, splits, x, BN)
    for j0 in tl.range(lo, hi, BN):
        j = j0 + tl.arange(0, BN)
        _p, ds = weight_and_gradient(
            x, i, j, dout, dout_t * F.ALIGN, DWeights, Delta, Max, Inverse, b * Tq, Tk, F, DWEIGHTS
        )  # fmt: skip
        if DSCORES:
            to = DScores + (b * Tq + i)[None, :] * Tk + j[:, None]
            tl.store(to, ds, mask=ok[None, :] & (j < x.len_k)[:, None])
        for d0 in tl.range(0, x.D, F.BD):
            t, w = tanh_of_pairs(x, i, j, d0, F)
            dst = ds[:, :, None] * t
            add(DQ, row, ok, d0, x.D, w[None, :] * tl.sum(ds[:, :, None] - dst * t, 0))
            add(DW, row, ok, d0, x.D, tl.sum(dst, 0))
        tl.debug_barrier()


@triton.jit(do_not_specialize=GRADIENT)
def additive_dkdv(
    Q, K, V, W, Mask, LenK,
    q_b: tl.int64, q_t: tl.int64, k_b: tl.int64, k_t: tl.int64, v_b: tl.int64, v_t: tl.int64,
    mask_b: tl.int64, mask_q: tl.int64, mask_k: tl.int64, Tq, Tk, D, Dv, tiles, splits,
    DOut, DWeights, dout_b: tl.int64, dout_t: tl.int64,
    Delta, Max, Inverse, DKey, DValue,
    F: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DWEIGHTS: tl.constexpr,
):  # fmt: skip
    """A program owns a tile of keys and walks the queries. DKey [B, Tk, D] and DValue [B, Tk, Dv] are
    zeros to begin with."""
    b, _split, j, row = place(tiles, splits, Tk, BN)
    x = operands(
        b, Q, K, V, W, Mask, LenK, q_b, q_t, k_b, k_t, v_b, v_t, mask_b, mask_q, mask_k, Tq, Tk, D, Dv, F
    )  # fmt: skip
    dout = DOut + b * dout_b * F.ALIGN
    ok = j < x.len_k
    for i0 in tl.range(0, Tq, BM):
        i = i0 + tl.arange(0, BM)
        p, ds = weight_and_gradient(
            x, i, j, dout, dout_t * F.ALIGN, DWeights, Delta, Max, Inverse, b * Tq, Tk, F, DWEIGHTS
        )  # fmt: skip
        for d0 in tl.range(0, x.D, F.BD):
            t, w = tanh_of_pairs(x, i, j, d0, F)
            add(DKey, row, ok, d0, x.D, w[None, :] * tl.sum(ds[:, :, None] * (1.0 - t * t), 0))
        for c0 in tl.range(0, x.Dv, F.BV):
            do = block(dout, i, dout_t * F.ALIGN, i < Tq, c0, x.Dv, F.BV, F)
            if BM < 16:  # too few for tl.dot
                dv = tl.sum(p[:, :, None] * do.to(tl.float32)[:, None, :], 0)
            else:
                dv = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=F.PRECISION)
            add(DValue, row, ok, c0, x.Dv, dv)
        tl.debug_barrier()
