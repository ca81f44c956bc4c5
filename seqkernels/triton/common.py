"""What the kernels share: which keys a query sees, how q·k becomes a logit, rows of any head dim, dropout.

A head dim is a sum of powers of two (80 = 64 + 16) and a row is a tuple of blocks, one for each of them, so that
nothing is padded to the next power of two. Logits are in units of log 2, because the hardware has exp2 and not exp.
"""

from typing import NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
NO_MASK, BOOL_MASK, FLOAT_MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


class Features(NamedTuple):
    """What is compiled into a kernel. Everything else, lengths above all, is read at run time."""

    D: int  # features of queries and keys, and of values
    DV: int
    QK: tuple[int, ...]  # the same as sums of powers of two
    PV: tuple[int, ...]
    LEFT: bool = False
    RIGHT: bool = False
    BOTTOM_RIGHT: bool = False
    VARLEN: bool = False
    LEN_K: bool = False
    MASK: int = 0  # NO_MASK, BOOL_MASK, FLOAT_MASK
    MASK_UNIT: bool = False  # the mask's keys lie side by side
    ALIBI: bool = False
    SOFTCAP: bool = False
    SINKS: bool = False
    DROPOUT: bool = False
    PACK: bool = (
        False  # a tile holds rows (query, head of the group): few queries, many heads on one key head
    )
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


@triton.constexpr_function
def width(chunks, c):
    return chunks[c]


@triton.constexpr_function
def start(chunks, c):
    return sum(chunks[:c])


@triton.jit
def load_rows(
    base, offsets, ok, D: tl.constexpr, CHUNKS: tl.constexpr, CHECK: tl.constexpr, UPCAST: tl.constexpr
):
    """Rows that begin at base + offsets; zeros for rows that are not ok, which only CHECK looks at."""
    rows = ()
    for c in tl.static_range(len(CHUNKS)):
        cols = start(CHUNKS, c) + tl.arange(0, width(CHUNKS, c))
        pointers = base + offsets[:, None] + cols[None, :]
        if start(CHUNKS, c) + width(CHUNKS, c) > D:
            ragged = (cols < D)[None, :]
            if CHECK:
                ragged = ragged & ok[:, None]
            x = tl.load(pointers, mask=ragged, other=0.0)
        elif CHECK:
            x = tl.load(pointers, mask=ok[:, None], other=0.0)
        else:
            x = tl.load(pointers)
        if UPCAST:
            x = x.to(tl.float32)
        rows = rows + (x,)
    return rows


@triton.jit
def store_rows(base, offsets, ok, rows, D: tl.constexpr, CHUNKS: tl.constexpr):
    for c in tl.static_range(len(CHUNKS)):
        cols = start(CHUNKS, c) + tl.arange(0, width(CHUNKS, c))
        mask = ok[:, None] & (cols < D)[None, :]
        x = rows[c].to(base.dtype.element_ty)
        tl.store(base + offsets[:, None] + cols[None, :], x, mask=mask)


@triton.jit
def zero_rows(N: tl.constexpr, CHUNKS: tl.constexpr):
    rows = ()
    for c in tl.static_range(len(CHUNKS)):
        rows = rows + (tl.zeros([N, width(CHUNKS, c)], tl.float32),)
    return rows


@triton.jit
def scale_rows(rows, factor):
    """factor: [N, 1] or a number."""
    scaled = ()
    for c in tl.static_range(len(rows)):
        scaled = scaled + (rows[c] * factor,)
    return scaled


@triton.jit
def dot_rows(a, b, PRECISION: tl.constexpr):
    """a [M, D], b [N, D] -> a bᵀ [M, N]"""
    s = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for c in tl.static_range(1, len(a)):
        s = tl.dot(a[c], tl.trans(b[c]), s, input_precision=PRECISION)
    return s


@triton.jit
def add_product(acc, p, rows, PRECISION: tl.constexpr):
    """acc + p rows: acc [M, D], p [M, N], rows [N, D]"""
    total = ()
    for c in tl.static_range(len(acc)):
        total = total + (tl.dot(p.to(rows[c].dtype), rows[c], acc[c], input_precision=PRECISION),)
    return total


@triton.jit
def sequence(b, Tq, Tk, CuQ, CuK, LenK, left, right, F: tl.constexpr):
    """Sequence b: its row of the tensors, first query, first key, and who sees whom."""
    row = b.to(tl.int64)
    first_q = tl.zeros([], tl.int64)
    first_k = tl.zeros([], tl.int64)
    len_q, len_k = Tq, Tk
    if F.VARLEN:
        row = first_q
        first_q = tl.load(CuQ + b).to(tl.int64)
        first_k = tl.load(CuK + b).to(tl.int64)
        len_q = (tl.load(CuQ + b + 1) - first_q).to(tl.int32)
        len_k = (tl.load(CuK + b + 1) - first_k).to(tl.int32)
    if F.LEN_K:
        len_k = tl.load(LenK + b).to(tl.int32)
    offset = 0
    if F.BOTTOM_RIGHT:
        offset = len_k - len_q
    return row, first_q, first_k, Sight(len_q, len_k, offset, left, right)


@triton.jit
def logit_rule(b, h, Mask, Alibi, mask_b, mask_h, mask_q, mask_k, alibi_b, scale, softcap, F: tl.constexpr):
    """h: a number, or a column [M, 1] of heads."""
    slope = 0.0
    if F.ALIBI:
        slope = tl.load(Alibi + b * alibi_b + h) * LOG2E
    mask = Mask
    if F.MASK != NO_MASK:
        mask = Mask + b * mask_b * F.MASK_ALIGN + h * (mask_h * F.MASK_ALIGN)
    return Logit(scale, softcap, slope, mask, mask_q * F.MASK_ALIGN, mask_k)


@triton.jit
def dropout_rule(Rng, threshold, factor, F: tl.constexpr):
    seed, offset = 0, 0
    if F.DROPOUT:
        seed, offset = tl.load(Rng), tl.load(Rng + 1)
    return Dropout(seed, offset, threshold, factor)


@triton.jit
def tanh(x):
    """1 - 2 / (e^2x + 1) cancels near 0, where the series has an error below 1e-7 of the value."""
    y = x * x
    series = 0.021869489 + y * -0.0088632355
    series = 0.13333334 + y * (-0.05396825 + y * series)
    series = x + x * y * (-0.33333334 + y * series)
    return tl.where(y < 0.09, series, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0))


@triton.jit
def logits(s, i, j, see, rule, F: tl.constexpr, BOUND: tl.constexpr, SCALE: tl.constexpr):
    """q·k of queries i and keys j (a row and a column, either way round) -> logits, and tanh of the softcap.

    Hidden keys get -inf; without BOUND the caller knows that all keys are in sight.
    """
    cap = s
    if F.SOFTCAP:
        cap = tanh(s * rule.scale)
        s = cap * rule.softcap
    elif SCALE:
        s = s * rule.scale
    if F.ALIBI:
        s -= rule.slope * tl.abs(j - i - see.offset).to(tl.float32)
    if F.MASK != NO_MASK:
        stride_k = rule.mask_k
        if F.MASK_UNIT:
            stride_k = 1
        pointers = rule.mask + tl.minimum(i, see.len_q - 1) * rule.mask_q + j * stride_k
        if BOUND:
            bias = tl.load(pointers, mask=(j < see.len_k) & (i < see.len_q), other=0)
        else:
            bias = tl.load(pointers)
        if F.MASK == BOOL_MASK:
            s = tl.where(bias != 0, s, -INF)
        else:
            s += bias.to(tl.float32) * LOG2E
    if BOUND:
        ok = j < see.len_k
        if F.RIGHT:
            ok = ok & (j - i <= see.offset + see.right)
        if F.LEFT:
            ok = ok & (j - i >= see.offset - see.left)
        s = tl.where(ok, s, -INF)
    return s, cap


@triton.jit
def kept(i, j0, bh, drop, N: tl.constexpr):
    """Which weights of queries i [M] and keys j0.. [N] dropout keeps.

    Philox counter: (key / 4, query, batch and head, offset), so that forward, backward and the weights agree
    whatever their tiles are. One call gives the bits of four neighbouring keys.
    """
    like = tl.zeros([i.shape[0], N // 4], tl.int32)
    quad = (j0 // 4 + tl.arange(0, N // 4))[None, :] + like
    high = (drop.offset >> 32).to(tl.int32)
    a, b, c, d = tl.philox(
        drop.seed,
        quad,
        (i[:, None] + like) ^ high,
        bh.to(tl.int32) + like,
        drop.offset.to(tl.int32) + like,
        7,
    )
    threshold = drop.threshold.to(tl.uint32)
    even = tl.join((a >= threshold).to(tl.int8), (c >= threshold).to(tl.int8))
    odd = tl.join((b >= threshold).to(tl.int8), (d >= threshold).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [i.shape[0], N]) != 0


@triton.jit
def key_range(i_first, i_last, see, BLOCK: tl.constexpr, F: tl.constexpr):
    """Keys [lo, hi) are seen by some query of i_first..i_last, blocks within [full_lo, full_hi) by all."""
    lo, hi = 0, see.len_k
    full_lo, full_hi = 0, see.len_k
    if F.LEFT:
        lo = tl.maximum(i_first + see.offset - see.left, 0)
        full_lo = tl.maximum(i_last + see.offset - see.left, 0)
    if F.RIGHT:
        hi = tl.minimum(hi, i_last + see.offset + see.right + 1)
        full_hi = tl.minimum(full_hi, i_first + see.offset + see.right + 1)
    hi = tl.maximum(hi, 0)
    return (
        tl.minimum(lo, hi) // BLOCK * BLOCK,
        hi,
        tl.cdiv(full_lo, BLOCK) * BLOCK,
        tl.maximum(full_hi, 0) // BLOCK * BLOCK,
    )
