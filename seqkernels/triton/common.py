"""What the kernels share: which keys a query sees, how q·k becomes a logit, rows of any head dim, dropout.

A head dim is a sum of powers of two (80 = 64 + 16) and rows are a tuple of blocks, one for each of them, so
that nothing is padded to the next power of two. Logits are in units of log 2: the hardware has exp2, not exp.
"""
# ruff: noqa: RUF005 (Triton knows no starred expressions)

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LEAST = tl.constexpr(-3e38)  # of a finite mask, so that a logit can be added
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
FAR_LSE = tl.constexpr(1024.0)  # an LSE so far from 0 has lost digits of the logarithm of the sum
STEP = tl.constexpr(32)  # keys at a time for rows of such: tiles of 128 spilled
BOOL, FLOAT = tl.constexpr(1), tl.constexpr(2)  # kinds of masks


class Features(NamedTuple):
    """What is compiled into a kernel. Everything else, lengths above all, is read at run time."""

    D: int  # features of queries and keys
    DV: int  # features of values
    WIDEST: int = 128  # power of two that a row is cut into
    LEFT: bool = False
    RIGHT: bool = False
    BOTTOM_RIGHT: bool = False
    VARLEN: bool = False
    LEN_K: bool = False
    MASK: int = 0  # BOOL, FLOAT, or 0: none
    MASK_UNIT: bool = False  # the mask's keys lie side by side
    ALIBI: bool = False
    SOFTCAP: bool = False
    SINKS: bool = False
    DROPOUT: bool = False
    PACK: bool = False  # a tile holds rows (query, head of the group): few queries, many heads on a key head
    FOLD: bool = False  # a logit is q·k times a positive scale, which goes into the multiply-add of exp2
    SPLIT: bool = False  # several programs share the keys of a tile
    PAGE: int = 0  # keys lie in pages of so many rows, found through a table
    ALIGN: int = 1  # divides the strides of q, k, v, dout; they are passed divided by it
    MASK_ALIGN: int = 1
    PRECISION: str = "ieee"  # of float32 products: ieee, tf32x3, tf32
    UPCAST: bool = False  # bf16 under the interpreter, which takes it for uint16 in tl.dot


class Sight(NamedTuple):
    """Query i sees key j < len_k when -left <= j - i - offset <= right."""

    len_q: tl.tensor
    len_k: tl.tensor
    offset: tl.tensor
    left: tl.tensor
    right: tl.tensor


class Logit(NamedTuple):
    """How q·k becomes a logit, for one head, or for a column of heads, one for each row."""

    scale: tl.tensor  # of q·k, in units of log 2; with softcap scale / softcap
    softcap: tl.tensor
    slope: tl.tensor  # ALiBi
    mask: tl.tensor  # pointer to the first query and key
    mask_q: tl.tensor
    mask_k: tl.tensor


class Dropout(NamedTuple):
    """A weight is dropped when its 32 random bits are below threshold; the others grow by factor."""

    seed: tl.tensor
    offset: tl.tensor
    threshold: tl.tensor
    factor: tl.tensor


class Keys(NamedTuple):
    """Keys and values of one head: pointers to the first row, strides of rows and pages, the page table."""

    k: tl.tensor
    v: tl.tensor
    k_t: tl.tensor
    v_t: tl.tensor
    k_page: tl.tensor
    v_page: tl.tensor
    pages: tl.tensor


class Head(NamedTuple):
    """All that decides about the weight of query i and key j but the product itself."""

    see: Sight
    logit: Logit
    dropout: Dropout
    bh: tl.tensor  # batch * heads + head, by which dropout tells heads apart


@triton.constexpr_function
def powers_of_two(dim: int, widest: int) -> tuple[int, ...]:
    """(112, 128) -> (64, 32, 16). Each part is at least 16, as tl.dot wants, and at most `widest`. What is
    left beside whole ones is padded until it makes at most two, without any at most three: 72 -> (64, 16),
    240 -> (128, 128)."""
    whole, rest = divmod(dim, widest)
    sixteens = -(-rest // 16)
    while sixteens.bit_count() > 2 + (whole == 0):
        sixteens += sixteens & -sixteens
    parts = [16 << bit for bit in reversed(range(sixteens.bit_length())) if sixteens >> bit & 1]
    return (*[widest] * whole, *parts)


@triton.constexpr_function
def blocks(dim, widest):
    return len(powers_of_two(dim, widest))


@triton.constexpr_function
def width(dim, widest, c):
    return powers_of_two(dim, widest)[c]


@triton.constexpr_function
def start(dim, widest, c):
    return sum(powers_of_two(dim, widest)[:c])


@triton.jit
def wide(n):
    return tl.zeros([], tl.int64) + n  # a loop counter is a plain int under the interpreter


@triton.jit
def load_rows(base, offsets, ok, F: tl.constexpr, VALUES: tl.constexpr):
    """Rows that begin at base + offsets; zeros for rows that are not ok."""
    DIM: tl.constexpr = F.DV if VALUES else F.D
    rows = ()
    for c in tl.static_range(blocks(DIM, F.WIDEST)):
        cols = start(DIM, F.WIDEST, c) + tl.arange(0, width(DIM, F.WIDEST, c))
        mask = ok[:, None]
        if start(DIM, F.WIDEST, c) + width(DIM, F.WIDEST, c) > DIM:
            mask = mask & (cols < DIM)[None, :]
        x = tl.load(base + offsets[:, None] + cols[None, :], mask=mask, other=0.0)
        if F.UPCAST:
            x = x.to(tl.float32)
        rows = rows + (x,)
    return rows


@triton.jit
def store_rows(base, offsets, ok, rows, F: tl.constexpr, VALUES: tl.constexpr):
    DIM: tl.constexpr = F.DV if VALUES else F.D
    for c in tl.static_range(blocks(DIM, F.WIDEST)):
        cols = start(DIM, F.WIDEST, c) + tl.arange(0, width(DIM, F.WIDEST, c))
        mask = ok[:, None] & (cols < DIM)[None, :]
        tl.store(base + offsets[:, None] + cols[None, :], rows[c].to(base.dtype.element_ty), mask=mask)


@triton.jit
def zero_rows(N: tl.constexpr, F: tl.constexpr, VALUES: tl.constexpr):
    DIM: tl.constexpr = F.DV if VALUES else F.D
    rows = ()
    for c in tl.static_range(blocks(DIM, F.WIDEST)):
        rows = rows + (tl.zeros([N, width(DIM, F.WIDEST, c)], tl.float32),)
    return rows


@triton.jit
def scale_rows(rows, factor):
    """factor: [N, 1] or a number."""
    scaled = ()
    for c in tl.static_range(len(rows)):
        scaled = scaled + (rows[c] * factor,)
    return scaled


@triton.jit
def load_keys(keys, j0, see, F: tl.constexpr, BN: tl.constexpr):
    """k [BN, D] and v [BN, DV] from row j0 on."""
    r = tl.arange(0, BN)
    ok = j0 + r < see.len_k
    if F.PAGE:
        page = tl.load(keys.pages + (j0 + r) // F.PAGE, mask=ok, other=0).to(tl.int64)
        slot = (j0 + r) % F.PAGE
        k = load_rows(keys.k, page * keys.k_page + slot * keys.k_t, ok, F, False)
        v = load_rows(keys.v, page * keys.v_page + slot * keys.v_t, ok, F, True)
    else:
        k = load_rows(keys.k + wide(j0) * keys.k_t, r * keys.k_t, ok, F, False)
        v = load_rows(keys.v + wide(j0) * keys.v_t, r * keys.v_t, ok, F, True)
    return k, v


@triton.jit
def dot_rows(a, b, F: tl.constexpr):
    """a [M, D], b [N, D] -> a bᵀ [M, N]"""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=F.PRECISION)
    for c in tl.static_range(1, len(a)):
        s = tl.dot(a[c], tl.trans(b[c]), s, input_precision=F.PRECISION)
    return s


@triton.jit
def add_product(acc, p, rows, F: tl.constexpr):
    """acc + p rows: acc [M, D], p [M, N], rows [N, D]"""
    total = ()
    for c in tl.static_range(len(acc)):
        total = total + (tl.dot(p.to(rows[c].dtype), rows[c], acc[c], input_precision=F.PRECISION),)
    return total


@triton.jit
def span(Cu, b, rows):
    """First row and length of sequence b, within the rows whatever the offsets say."""
    first = tl.minimum(tl.maximum(tl.load(Cu + b).to(tl.int64), 0), rows)
    last = tl.minimum(tl.maximum(tl.load(Cu + b + 1).to(tl.int64), first), rows)
    return first, (last - first).to(tl.int32)


@triton.jit
def sequence(b, Tq, Tk, CuQ, CuK, LenK, left, right, F: tl.constexpr):
    """Sequence b: its row of the tensors, first query, first key, and who sees whom."""
    row = b.to(tl.int64)
    first_q = tl.zeros([], tl.int64)
    first_k = tl.zeros([], tl.int64)
    len_q, len_k = Tq, Tk
    if F.VARLEN:
        row = first_q
        first_q, len_q = span(CuQ, b, Tq)
        first_k, len_k = span(CuK, b, Tk)
    if F.LEN_K:
        len_k = tl.minimum(tl.maximum(tl.load(LenK + b), 0), Tk).to(tl.int32)
    offset = 0
    if F.BOTTOM_RIGHT:
        offset = len_k - len_q
    return row, first_q, first_k, Sight(len_q, len_k, offset, left, right)


@triton.jit
def head_of(
    b, h, see, heads, Mask, Alibi, Rng, mask_b, mask_h, mask_q, mask_k, alibi_b,
    scale, softcap, threshold, factor, F: tl.constexpr,
):  # fmt: skip
    """h: a number, or [M] heads, one for each row of a tile."""
    bh = b * heads + h
    slope, mask, seed, offset = 0.0, 0, 0, 0
    if F.ALIBI:
        slope = tl.load(Alibi + b * alibi_b + h) * LOG2E
    if F.MASK:
        mask = Mask + b * mask_b * F.MASK_ALIGN + h * (mask_h * F.MASK_ALIGN)
    if F.DROPOUT:
        seed, offset = tl.load(Rng), tl.load(Rng + 1)
    if F.PACK:
        bh = bh[:, None]
        if F.ALIBI:
            slope = slope[:, None]
        if F.MASK:
            mask = mask[:, None]
    return Head(
        see,
        Logit(scale, softcap, slope, mask, mask_q * F.MASK_ALIGN, mask_k),
        Dropout(seed, offset, threshold, factor),
        bh,
    )


@triton.jit
def tanh(x):
    """1 - 2 / (e^2x + 1) cancels near 0, where the series has an error below 1e-7 of the value."""
    y = x * x
    series = 0.021869489 + y * -0.0088632355
    series = 0.13333334 + y * (-0.05396825 + y * series)
    series = x + x * y * (-0.33333334 + y * series)
    return tl.where(y < 0.09, series, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0))


@triton.jit
def logits(s, i, j, cut, head, F: tl.constexpr, SCALE: tl.constexpr):
    """q·k of queries i and keys j (a row and a column, either way round) -> logits, and tanh of the softcap.

    Hidden keys get -inf if cut, one answer for the whole block: most are seen by all and compare nothing.
    """
    see, rule = head.see, head.logit
    cap = s
    if F.SOFTCAP:
        cap = tanh(s * rule.scale)
        s = cap * rule.softcap
    elif SCALE:
        s = s * rule.scale
    if F.ALIBI:
        s -= rule.slope * tl.abs(j - i - see.offset).to(tl.float32)
    if F.MASK:
        stride_k = rule.mask_k
        if F.MASK_UNIT:
            stride_k = 1
        there = (i < see.len_q) & (j < see.len_k)
        bias = tl.load(rule.mask + i * rule.mask_q + j * stride_k, mask=there, other=0)
        if F.MASK == BOOL:
            s = tl.where(bias != 0, s, -INF)
        else:  # the least numbers stay finite: a row of them has the mean for its output, though no gradients
            bias = bias.to(tl.float32)
            shift = bias * LOG2E
            s += tl.where(bias > -INF, tl.maximum(shift, LEAST), shift)
    if cut:
        ok = j < see.len_k
        if F.RIGHT:
            ok = ok & (j - i <= see.offset + see.right)
        if F.LEFT:
            ok = ok & (j - i >= see.offset - see.left)
        s = tl.where(ok, s, -INF)
    return s, cap


@triton.jit
def largest_and_sum(q, K, k_t, i, head, F: tl.constexpr):
    """Of queries i over all keys of a head: the largest logit m and the sum of 2^(logit - m)."""
    m, total = tl.full([i.shape[0]], -INF, tl.float32), tl.zeros([i.shape[0]], tl.float32)
    n = tl.arange(0, STEP)
    for j0 in tl.range(0, head.see.len_k, STEP):
        k = load_rows(K + wide(j0) * k_t, n * k_t, j0 + n < head.see.len_k, F, False)
        x, _cap = logits(dot_rows(q, k, F), i[:, None], j0 + n[None, :], True, head, F, True)
        m_new = tl.maximum(m, tl.max(x, 1))
        shift = tl.where(m_new == -INF, 0.0, m_new)
        total = total * tl.exp2(m - shift) + tl.sum(tl.exp2(x - shift[:, None]), 1)
        m = m_new
    return m, total


@triton.jit
def kept(i, j0, head, N: tl.constexpr):
    """Which weights of queries i [M] and keys j0.. [N] dropout keeps.

    Philox counter: (key / 4, query, batch and head, offset), so that forward, backward and the weights agree
    whatever their tiles are. One call gives the bits of four neighbouring keys.
    """
    drop = head.dropout
    like = tl.zeros([i.shape[0], N // 4], tl.int32)
    quad = (j0 // 4 + tl.arange(0, N // 4))[None, :] + like
    high = (drop.offset >> 32).to(tl.int32)
    a, b, c, d = tl.philox(
        drop.seed,
        quad,
        (i[:, None] + like) ^ high,
        head.bh.to(tl.int32) + like,
        drop.offset.to(tl.int32) + like,
        7,
    )
    threshold = drop.threshold.to(tl.uint32)
    even = tl.join((a >= threshold).to(tl.int8), (c >= threshold).to(tl.int8))
    odd = tl.join((b >= threshold).to(tl.int8), (d >= threshold).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [i.shape[0], N]) != 0


@triton.jit
def key_range(i_first, i_last, split, splits, see, F: tl.constexpr, BLOCK: tl.constexpr):
    """Keys [lo, hi) are seen by some query of i_first..i_last, blocks of [full_lo, full_hi) by all."""
    lo, hi = 0, see.len_k
    full_lo, full_hi = 0, see.len_k
    if F.LEFT:
        lo = tl.maximum(i_first + see.offset - see.left, 0)
        full_lo = tl.maximum(i_last + see.offset - see.left, 0)
    if F.RIGHT:
        hi = tl.minimum(hi, i_last + see.offset + see.right + 1)
        full_hi = tl.minimum(full_hi, i_first + see.offset + see.right + 1)
    hi = tl.maximum(hi, 0)
    lo = tl.minimum(lo, hi) // BLOCK * BLOCK
    if F.SPLIT:
        share = tl.cdiv(tl.cdiv(hi - lo, splits), BLOCK) * BLOCK
        lo = tl.minimum(lo + split * share, hi)
        hi = tl.minimum(lo + share, hi)
    return lo, hi, full_lo, full_hi
