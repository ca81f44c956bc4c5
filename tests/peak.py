"""How far memory grows while something runs: the highest point of the resident set less its size before."""

from collections.abc import Callable

from seqkernels.bench.memory import forget_peak, peak_now

MIB = 2**20


def growth(call: Callable[[], object]) -> int:
    """Bytes. What kernels keep for later calls, 256 MiB at most, may be there already and does not count."""
    before, method = forget_peak()
    call()
    return peak_now(method) - before
