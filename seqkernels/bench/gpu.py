"""What the suites for GPUs share: the clock of the device, and how fast the one at hand can be.

Importing this needs no GPU. Rates are measured once a run, on random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from statistics import median

import torch

L2_CACHE = 2**28  # bytes: more than any GPU has
SHARED_BYTES_A_CLOCK = 128  # that a multiprocessor reads from its shared memory
USUAL_CLOCK = 1_755_000  # kHz, of an H100, where torch does not tell


def device_seconds(run: Callable[[], object], _fastest: float = 0.0) -> float:
    """Of one call, with nothing of it in the L2 cache; filling that gives the host time to launch."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(L2_CACHE, dtype=torch.uint8, device="cuda").zero_()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@cache
def matrix_rate(dtype: str, tf32: bool = False) -> float:
    """Operations a second of torch's product of two large matrices."""
    kind = getattr(torch, dtype)
    n = 8192 if kind.itemsize == 2 or tf32 else 4096
    a, b = (torch.randn(n, n, device="cuda").to(kind) for _ in range(2))
    out = torch.empty_like(a)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        return 2.0 * n**3 / _typical_seconds(lambda: torch.mm(a, b, out=out))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def reread_rate(size: int) -> float:
    """Bytes a second at which all multiprocessors together read the same `size` bytes again and again.

    From shared memory where that holds them all, else from the L2 cache, else from memory.
    """
    gpu = torch.cuda.get_device_properties("cuda")
    if size <= gpu.multi_processor_count * gpu.shared_memory_per_multiprocessor:
        clock = getattr(gpu, "clock_rate", USUAL_CLOCK)
        return gpu.multi_processor_count * SHARED_BYTES_A_CLOCK * clock * 1e3
    return copy_rate(gpu.L2_cache_size // 4 if size <= gpu.L2_cache_size else 2**30)


@cache
def copy_rate(size: int) -> float:
    """Bytes a second, read and written, of copies of `size` bytes."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
    target, copies = torch.empty_like(source), max(1, 2**30 // size)

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source)

    return 2.0 * copies * size / _typical_seconds(copy)


def _typical_seconds(run: Callable[[], object]) -> float:
    for _ in range(3):
        run()
    return median(device_seconds(run) for _ in range(7))
