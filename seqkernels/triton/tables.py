"""Shipped configurations: tile of queries x keys, warps and pipeline stages by kernel, architecture, dtype, head dim.

Chosen by what compiles without spilled registers within the shared memory of the architecture (docs/attention-gpu.md).
Row 80 also serves what is neither Hopper nor data-centre Blackwell, so it keeps to the 99 KB of shared memory of
sm_86, sm_89 and sm_120.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    BM: int  # queries
    BN: int  # keys
    warps: int
    stages: int
    apart: bool = False  # dK and dV in two launches


class Row(NamedTuple):
    """For head dims up to `dim`. A mask, dropout or a softcap needs registers of its own: `rich`."""

    dim: int
    plain: Tile
    rich: Tile


SHARED_LIMIT = {80: 101_376, 90: 232_448, 100: 232_448}

FORWARD, DKDV, DQ, TILES = (
    "forward",
    "dkdv",
    "dq",
    "tiles",
)  # tiles: of the weights and of the mask's gradient

TABLE: dict[tuple[str, int, int], tuple[Row, ...]] = {
    (FORWARD, 90, 16): (
        Row(32, Tile(128, 128, 4, 3), Tile(128, 64, 8, 3)),
        Row(64, Tile(128, 128, 8, 3), Tile(128, 64, 8, 3)),
        Row(128, Tile(128, 128, 8, 2), Tile(128, 64, 8, 3)),
        Row(256, Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
        Row(512, Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
    ),
    (DKDV, 90, 16): (
        Row(32, Tile(64, 128, 8, 3), Tile(64, 64, 8, 3)),
        Row(64, Tile(64, 128, 8, 3), Tile(64, 64, 8, 2)),
        Row(128, Tile(64, 128, 8, 2), Tile(64, 64, 8, 2)),
        Row(256, Tile(32, 64, 8, 1), Tile(32, 64, 8, 1)),
        Row(512, Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
    ),
    (DQ, 90, 16): (
        Row(32, Tile(128, 64, 8, 3), Tile(64, 64, 8, 3)),
        Row(64, Tile(128, 64, 8, 3), Tile(64, 64, 8, 3)),
        Row(128, Tile(128, 64, 8, 2), Tile(64, 64, 8, 2)),
        Row(256, Tile(64, 64, 8, 1), Tile(64, 64, 8, 1)),
        Row(512, Tile(64, 32, 8, 1), Tile(64, 32, 8, 1)),
    ),
}


def tile_for(kernel: str, arch: int, bits: int, dim: int, rich: bool) -> Tile:
    row = next(row for row in TABLE[kernel, arch, bits] if dim <= row.dim)
    return row.rich if rich else row.plain
