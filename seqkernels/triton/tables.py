"""Shipped configurations: tile of queries x keys, warps, pipeline stages by architecture, dtype, head dim.

Timed, on an H100, are the plain tiles of sm_90 for head dims 64 to 256 and of EXACT for 64: the fastest of 5
to 11 candidates (docs/attention-gpu.md). Those with extras beside them follow their pattern, untimed. All
others are the first, from large to small, that compile without spills in loops within the shared memory of
the architecture. Rows of sm_80 also serve what is neither Hopper nor data-centre Blackwell, so they keep to
the 99 KB of sm_86, sm_89 and sm_120, as float32 does, which has one table for all.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    BM: int  # queries
    BN: int  # keys
    warps: int
    stages: int
    apart: bool = False  # dK and dV in two launches


class Row(NamedTuple):
    """For head dims up to `dim`, of keys and values together up to `total`, if given. A mask, dropout, a
    softcap and ALiBi need registers of their own."""

    dim: int
    plain: Tile  # none of these
    one: Tile
    rich: Tile  # several
    total: int = 0


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
        Row(64, Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
        Row(80, Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
        Row(128, Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 3)),
        Row(192, Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 32, 8, 3)),
        Row(256, Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
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
        Row(64, Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 128, 8, 3)),
        Row(80, Tile(64, 64, 4, 3), Tile(64, 128, 8, 3), Tile(32, 128, 8, 2, True)),
        Row(128, Tile(32, 64, 4, 3), Tile(32, 128, 8, 3), Tile(32, 128, 8, 2, True)),
        Row(192, Tile(32, 128, 8, 2), Tile(32, 128, 8, 2, True), Tile(16, 128, 8, 2, True), 192 + 128),
        Row(192, Tile(64, 128, 8, 2, True), Tile(32, 128, 8, 2, True), Tile(16, 128, 8, 2, True)),
        Row(256, Tile(32, 128, 8, 2, True), Tile(32, 128, 8, 2, True), Tile(16, 128, 8, 2, True)),
        Row(512, Tile(32, 32, 8, 2), Tile(32, 16, 8, 1, True), Tile(16, 16, 8, 2, True)),
    ),
    (DKDV, 100): (
        Row(32, Tile(64, 128, 8, 2), Tile(64, 64, 8, 3), Tile(64, 64, 8, 2, True)),
        Row(64, Tile(32, 128, 8, 3), Tile(32, 128, 8, 3), Tile(32, 64, 8, 3, True)),
        Row(128, Tile(32, 64, 8, 2, True), Tile(16, 64, 8, 2, True), Tile(32, 128, 8, 1, True)),
        Row(256, Tile(64, 64, 8, 1, True), Tile(32, 64, 8, 1, True), Tile(32, 64, 8, 1, True)),
        Row(512, Tile(32, 32, 8, 2), Tile(32, 16, 8, 1, True), Tile(32, 16, 8, 1, True)),
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
        Row(64, Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 3)),
        Row(80, Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 32, 4, 3)),
        Row(128, Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3)),
        Row(192, Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2), 192 + 128),
        Row(192, Tile(128, 32, 8, 3), Tile(128, 64, 8, 2), Tile(64, 32, 8, 2)),
        Row(256, Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
        Row(512, Tile(64, 16, 8, 2), Tile(64, 16, 8, 2), Tile(64, 16, 8, 2)),
    ),
    (DQ, 100): (
        Row(32, Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3)),
        Row(64, Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(128, 32, 8, 3)),
        Row(128, Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
        Row(256, Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(64, 32, 8, 2)),
        Row(512, Tile(32, 32, 8, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
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


# The same for exact products (precision highest): three of TF32 spill in these tiles.
EXACT = FLOAT32 | {
    kernel: tuple(Row(64, plain, *row[2:]) if row.dim == 64 else row for row in FLOAT32[kernel])
    for kernel, plain in (
        (FORWARD, Tile(64, 64, 4, 2)),
        (DKDV, Tile(32, 64, 8, 2)),
        (DQ, Tile(64, 64, 4, 2)),
    )
}


def tile_for(
    kernel: str, arch: int, bits: int, dims: tuple[int, int], extras: int, exact: bool = False
) -> Tile:
    """dims: of keys and values. extras: how many of mask, dropout, softcap and ALiBi there are."""
    rows = HALF[kernel, arch] if bits != 32 else EXACT[kernel] if exact else FLOAT32[kernel]
    row = next(row for row in rows if max(dims) <= row.dim and sum(dims) <= (row.total or 2 * row.dim))
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
