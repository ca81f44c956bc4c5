"""Shipped configurations: tile of queries x keys, warps, pipeline stages by architecture, dtype, head dim.

None has been timed: they are the first, from large to small, that compile without spills in loops within the
shared memory of the architecture (docs/attention-gpu.md). Rows of sm_80 also serve what is neither Hopper nor
data-centre Blackwell, so they keep to the 99 KB of sm_86, sm_89 and sm_120; float32 has one table for all.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    BM: int  # queries
    BN: int  # keys
    warps: int
    stages: int
    apart: bool = False  # dK and dV in two launches


class Row(NamedTuple):
    """For head dims up to `dim`. A mask, dropout, a softcap and ALiBi need registers of their own."""

    dim: int
    plain: Tile  # none of these
    one: Tile
    rich: Tile  # several


SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448}
TENSOR_MEMORY_LIMIT = 512  # columns, on sm_100 alone: Triton compiles what needs more into a trap

FORWARD, DKDV, DQ = "forward", "dkdv", "dq"
TILES = "tiles"  # of the weights and of the mask's gradient

HALF: dict[tuple[str, int], tuple[Row, ...]] = {
    (FORWARD, 80): (
        Row(32, Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
        Row(64, Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
        Row(128, Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 32, 4, 2)),
        Row(256, Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 16, 4, 2)),
        Row(512, Tile(32, 32, 8, 2), Tile(16, 32, 4, 2), Tile(32, 32, 4, 2)),
    ),
    (FORWARD, 90): (
        Row(32, Tile(128, 128, 8, 3), Tile(128, 128, 8, 3), Tile(128, 64, 8, 3)),
        Row(64, Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
        Row(128, Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        Row(256, Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        Row(512, Tile(64, 16, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    ),
    (FORWARD, 100): (
        Row(32, Tile(128, 128, 8, 3), Tile(128, 128, 8, 3), Tile(128, 64, 8, 3)),
        Row(64, Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
        Row(128, Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        Row(256, Tile(128, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        # 64 queries would go through tensor memory, which has 512 columns: as many as O alone needs
        Row(512, Tile(32, 64, 8, 2), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
    ),
    (DKDV, 80): (
        Row(32, Tile(64, 64, 4, 2), Tile(32, 128, 8, 3), Tile(32, 128, 8, 3, True)),
        Row(64, Tile(64, 64, 8, 3, True), Tile(32, 128, 8, 3, True), Tile(32, 64, 8, 2, True)),
        Row(128, Tile(32, 64, 4, 2, True), Tile(32, 64, 8, 2, True), Tile(32, 64, 8, 1, True)),
        Row(256, Tile(16, 64, 8, 2, True), Tile(16, 64, 8, 1, True), Tile(16, 16, 8, 2, True)),
        Row(512, Tile(16, 32, 8, 2), Tile(32, 16, 8, 1, True), Tile(16, 16, 8, 1, True)),
    ),
    (DKDV, 90): (
        Row(32, Tile(64, 128, 8, 3), Tile(64, 128, 8, 3), Tile(32, 128, 8, 3)),
        Row(64, Tile(64, 128, 8, 3), Tile(32, 128, 8, 3), Tile(32, 128, 8, 3, True)),
        Row(128, Tile(32, 128, 8, 2), Tile(32, 128, 8, 2, True), Tile(16, 64, 8, 2)),
        Row(256, Tile(32, 64, 8, 2, True), Tile(32, 64, 8, 2, True), Tile(16, 64, 8, 2, True)),
        Row(512, Tile(32, 32, 8, 2), Tile(32, 16, 8, 1, True), Tile(16, 16, 8, 2, True)),
    ),
    (DKDV, 100): (
        Row(32, Tile(64, 128, 8, 2), Tile(64, 64, 8, 3), Tile(64, 64, 8, 2, True)),
        Row(64, Tile(32, 128, 8, 3), Tile(32, 128, 8, 3), Tile(32, 64, 8, 3, True)),
        Row(128, Tile(32, 64, 8, 2, True), Tile(16, 64, 8, 2, True), Tile(32, 128, 8, 1, True)),
        Row(256, Tile(64, 64, 8, 1, True), Tile(32, 64, 8, 1, True), Tile(32, 64, 8, 1, True)),
        Row(512, Tile(32, 32, 8, 2), Tile(32, 16, 8, 1, True), Tile(16, 16, 8, 2, True)),
    ),
    (DQ, 80): (
        Row(32, Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(128, 32, 8, 3)),
        Row(64, Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(128, 32, 8, 3)),
        Row(128, Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(64, 32, 8, 2)),
        Row(256, Tile(64, 16, 8, 2), Tile(64, 16, 8, 2), Tile(64, 16, 8, 1)),
        Row(512, Tile(32, 16, 8, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
    ),
    (DQ, 90): (
        Row(32, Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
        Row(64, Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3)),
        Row(128, Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        Row(256, Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
        Row(512, Tile(64, 16, 8, 2), Tile(64, 16, 8, 2), Tile(64, 16, 8, 2)),
    ),
    (DQ, 100): (
        Row(32, Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3)),
        Row(64, Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3)),
        Row(128, Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        Row(256, Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
        Row(512, Tile(32, 32, 8, 2), Tile(16, 32, 4, 2), Tile(32, 16, 8, 2)),
    ),
    (TILES, 80): (
        Row(64, Tile(64, 128, 8, 1), Tile(64, 128, 8, 1), Tile(64, 32, 4, 1)),
        Row(128, Tile(64, 32, 4, 1), Tile(64, 32, 8, 1), Tile(64, 16, 4, 1)),
        Row(512, Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 4, 1)),
    ),
    (TILES, 90): (
        Row(64, Tile(64, 128, 8, 1), Tile(64, 64, 4, 1), Tile(64, 64, 8, 1)),
        Row(128, Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(64, 64, 8, 1)),
        Row(512, Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(64, 16, 8, 1)),
    ),
    (TILES, 100): (
        Row(64, Tile(64, 128, 8, 1), Tile(64, 128, 8, 1), Tile(64, 128, 8, 1)),
        Row(128, Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), Tile(64, 64, 8, 1)),
        Row(512, Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 8, 1)),
    ),
}

FLOAT32: dict[str, tuple[Row, ...]] = {
    FORWARD: (
        Row(32, Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        Row(64, Tile(64, 32, 8, 2), Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
        Row(128, Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(64, 32, 8, 2)),
        Row(256, Tile(32, 16, 4, 2), Tile(32, 16, 4, 2), Tile(16, 16, 4, 2)),
    ),
    DKDV: (
        Row(32, Tile(32, 64, 8, 2), Tile(32, 64, 8, 2), Tile(32, 64, 8, 2)),
        Row(64, Tile(32, 64, 8, 2, True), Tile(32, 64, 8, 2, True), Tile(16, 32, 4, 2)),
        Row(128, Tile(16, 32, 4, 2, True), Tile(16, 32, 4, 2, True), Tile(16, 16, 4, 2)),
        Row(256, Tile(16, 16, 8, 2, True), Tile(16, 16, 8, 2, True), Tile(16, 16, 8, 2, True)),
    ),
    DQ: (
        Row(32, Tile(64, 64, 8, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2)),
        Row(64, Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
        Row(128, Tile(32, 32, 4, 2), Tile(32, 16, 4, 2), Tile(32, 16, 4, 2)),
        Row(256, Tile(16, 16, 4, 2), Tile(16, 16, 8, 2), Tile(16, 16, 4, 2)),
    ),
    TILES: (
        Row(64, Tile(64, 32, 8, 1), Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
        Row(128, Tile(32, 16, 4, 1), Tile(32, 16, 4, 1), Tile(32, 16, 4, 1)),
        Row(256, Tile(16, 16, 4, 1), Tile(16, 16, 4, 1), Tile(16, 16, 4, 1)),
    ),
}


def tile_for(kernel: str, arch: int, bits: int, dim: int, extras: int) -> Tile:
    """`extras`: how many of mask, dropout, softcap and ALiBi there are."""
    rows = FLOAT32[kernel] if bits == 32 else HALF[kernel, arch]
    row = next(row for row in rows if dim <= row.dim)
    return (row.plain, row.one, row.rich)[min(extras, 2)]


# Additive attention, one table for all architectures and dtypes: for up to so many queries a tile, and how
# many features a block has. From two queries on, queries times features make one for each thread, so that no
# two share a sum.
ADDITIVE: dict[int, tuple[Tile, int]] = {
    1: (Tile(1, 32, 4, 1), 64),
    2: (Tile(2, 16, 4, 1), 64),
    4: (Tile(4, 16, 4, 1), 32),
    8: (Tile(8, 16, 4, 1), 16),
    16: (Tile(16, 16, 8, 1), 16),
}
ADDITIVE_VALUES = 32  # features of values in a block
