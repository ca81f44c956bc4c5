"""How much memory is resident, and how far it grows while something runs."""

import resource
from collections.abc import Callable

from seqkernels.bench.memory import forget_peak, peak_now

MIB = 2**20


def resident() -> int:
    """Bytes."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def growth(call: Callable[[], object]) -> int:
    """Bytes, from the size before to the highest point. What kernels keep for later calls, 256 MiB at most,
    may be there already and does not count."""
    before, method = forget_peak()
    call()
    return peak_now(method) - before
