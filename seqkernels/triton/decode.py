"""Few queries, many keys: forward with its keys split among programs, and what joins their parts.

Decoding is bound by reading k and v once, and a grid of one program for each head fills a GPU with large
batches only. The same split serves prefill with few heads.
"""

import triton
import triton.language as tl

from .common import INF, LN2, LOG2E
from .tables import Tile

PACKED_ROWS = 128  # up to here the heads of a group share a tile


def is_packed(queries: int, group: int) -> bool:
    return queries <= 16 or (group > 1 and queries * group <= PACKED_ROWS)


def packed_tile(tile: Tile, rows: int) -> Tile:
    """The smallest tile that holds the rows. Fewer rows than the table's need fewer warps, as many need them
    all: 64 rows of 512 features spill in four."""
    BM = max(16, min(1 << (rows - 1).bit_length(), tile.BM))
    return Tile(BM, tile.BN, 4 if BM <= 64 and BM < tile.BM else tile.warps, tile.stages)


def key_splits(programs: int, keys: int, multiprocessors: int, least: int = 512) -> int:
    """Two programs for each multiprocessor, of at least so many keys; 1 where there are tiles enough anyway.

    On an H100 one row of 8,192 keys took 0.045 ms in 16 parts and 0.069 ms in 32; a row of 131,072 keys takes
    3 % longer with two programs a multiprocessor than with one, 8 rows of 8 queries 3 % less.
    """
    if programs == 0 or programs >= multiprocessors:
        return 1
    return max(1, min(2 * multiprocessors // programs, keys // least, 128))


@triton.jit(do_not_specialize=["heads", "Tq", "splits", "part"])
def combine(
    Parts, Sums, Sinks, Out, Lse, heads, Tq, splits, part: tl.int64,
    SINKS: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row of out from its parts: the weight of a part is norm 2^(m - the largest m).

    An LSE would not do: that of a row that a mask of -1e9 hides has no digits left for norm.
    """
    row = tl.program_id(0).to(tl.int64)  # [B, Tq, heads]
    h = row % heads
    t = row // heads % Tq
    lse_row = (row // heads // Tq * heads + h) * Tq + t
    s, d = tl.arange(0, CHUNK), tl.arange(0, WIDTH)

    top = tl.full([], -INF, tl.float32)
    if SINKS:
        top = tl.load(Sinks + h) * LOG2E
    for s0 in tl.range(0, splits, CHUNK):
        m = tl.load(Sums + (s0 + s) * part + lse_row, mask=s0 + s < splits, other=-INF)
        top = tl.maximum(top, tl.max(m, 0))
    base = tl.where(top == -INF, 0.0, top)
    total = tl.zeros([], tl.float32)
    if SINKS:
        total = tl.exp2(tl.load(Sinks + h) * LOG2E - base)
    acc = tl.zeros([WIDTH], tl.float32)
    for s0 in tl.range(0, splits, CHUNK):
        ok = s0 + s < splits
        m = tl.load(Sums + (s0 + s) * part + lse_row, mask=ok, other=-INF)
        norm = tl.load(Sums + (splits + s0 + s) * part + lse_row, mask=ok, other=0.0)
        weight = norm * tl.exp2(m - base)
        rows = ((s0 + s) * part + row) * DV
        x = tl.load(Parts + rows[:, None] + d[None, :], mask=ok[:, None] & (d < DV)[None, :], other=0.0)
        acc += tl.sum(x * weight[:, None], 0)
        total += tl.sum(weight, 0)
    out = tl.where(total == 0.0, 0.0, acc / total)
    tl.store(Out + row * DV + d, out.to(Out.dtype.element_ty), mask=d < DV)
    tl.store(Lse + lse_row, tl.where(total == 0.0, -INF, (base + tl.log2(total)) * LN2))
