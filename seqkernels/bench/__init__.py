"""`seqkernels bench`: how fast, how exact and how frugal the kernels are on this machine."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    from .command import main  # late: `python -m seqkernels.bench.memory` has to be lean

    return main(argv)
