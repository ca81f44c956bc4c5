"""Interleaved timing: A B C, A C B, B A C, ... call by call, so a slower machine slows all alike.

Two things would spoil such a comparison and are dealt with here. Thread pools keep spinning for some
milliseconds after a call (libgomp about 4 ms) and would steal a core from whoever runs next: every turn
waits until this process is quiet. And a few microseconds are too short for a clock: a turn repeats a short
call until it has lasted a while.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping

TURN_SECONDS = 300e-6  # a turn of a short call lasts at least so long
WAKE_SECONDS = 20e-3  # below that, a turn starts with one untimed call that wakes threads and warms caches
MIN_ROUNDS, MAX_ROUNDS = 6, 400  # with fewer than six rounds the median has no 95 % interval
WIDE = 1.5  # an interval that spans such a factor says more about the machine than about anybody's speed
NARROW = 0.02  # stop early once every speed-up's interval is narrower than this (relative)


def median_interval(values: list[float]) -> tuple[float, float, float]:
    """Median and its 95 % interval from order statistics: no dice, no assumption about the distribution.

    The interval from the k-th smallest to the k-th largest value misses the median with probability
    2 * P(Binomial(n, 1/2) < k); k is the largest for which that is at most 5 %. Below six values: min to max.
    """
    ordered, n = sorted(values), len(values)
    missed, k = 2 * 0.5**n, 1
    while k < n // 2 and missed + 2 * math.comb(n, k) * 0.5**n <= 0.05:
        missed += 2 * math.comb(n, k) * 0.5**n
        k += 1
    middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
    return middle, ordered[k - 1], ordered[n - k]


def verdict(low: float, high: float) -> str:
    """Words for the 95 % interval of a speed-up."""
    if high < 1:
        return "SLOWER"
    if high > WIDE * low:
        return "unsure"
    return "faster" if low > 1 else "no difference"


def interleave(
    calls: Mapping[str, Callable[[], object]],
    budget: float,
    turn: Callable[[Callable[[], object], float], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each contestant, one a round, for about `budget` seconds and at least six rounds.

    The i-th values of all contestants belong together: they were measured one after the other. `turn` times
    a call whose duration is roughly known, by the clock of the CPU if None.
    """
    turn = turn or _turn
    looks = {name: _first_look(call) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    orders, start = itertools.cycle(itertools.permutations(calls)), time.perf_counter()
    next_look = 2 * MIN_ROUNDS  # then twice as many: after every round 92 % of the intervals hold, not 95
    for done, order in zip(range(1, MAX_ROUNDS + 1), orders, strict=False):
        for name in order:  # everybody comes after everybody as often, so that nobody finds warmer caches
            seconds[name].append(turn(calls[name], looks[name]))
        late = time.perf_counter() - start > budget
        if done == next_look:
            late, next_look = late or _narrow(seconds), 2 * next_look
        if done >= MIN_ROUNDS and late:
            break
    return seconds


def speedup(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """How many times faster `ours` is: median of the paired ratios, with its 95 % interval."""
    return median_interval([b / a for a, b in zip(ours, theirs, strict=True)])


def settle(longest: float = 0.05) -> None:
    """Wait until the threads of this process no longer spin (a window is longer than a scheduler tick)."""
    end = time.perf_counter() + longest
    while time.perf_counter() < end:
        cpu, wall = time.process_time(), time.perf_counter()
        time.sleep(0.005)
        if time.process_time() - cpu < 0.1 * (time.perf_counter() - wall):
            return


def busy(seconds: float = 0.3) -> float:
    """The share of the CPU time that others use while this program waits; 0 where no system tells."""

    def ticks() -> tuple[int, int]:
        with open("/proc/stat", encoding="ascii") as stat:
            user, nice, system, idle, iowait, *_ = map(int, stat.readline().split()[1:])
        return user + nice + system, idle + iowait

    settle()
    try:
        before = ticks()
        time.sleep(seconds)
        used, idle = (after - earlier for after, earlier in zip(ticks(), before, strict=True))
        return used / max(1, used + idle)
    except OSError:
        return 0.0


def _first_look(call: Callable[[], object]) -> float:
    """Warm-up (lazy initialisation, code generation, page faults), then a rough duration."""
    call()
    call()
    start = time.perf_counter()
    call()
    return max(time.perf_counter() - start, 1e-7)


def _turn(call: Callable[[], object], look: float) -> float:
    repeats = math.ceil(TURN_SECONDS / look)
    settle()
    if look < WAKE_SECONDS:
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _narrow(seconds: dict[str, list[float]]) -> bool:
    first, *others = seconds.values()
    intervals = [speedup(first, other) for other in others]
    return all(high - low <= NARROW * middle for middle, low, high in intervals)
