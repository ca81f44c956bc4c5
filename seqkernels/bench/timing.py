"""Interleaved timing: A B C, A C B, B A C, ... call by call, so a slower machine slows all alike.

Two things would spoil such a comparison and are dealt with here. Thread pools keep spinning for some
milliseconds after a call (libgomp about 4 ms) and would steal a core from whoever runs next: every turn
waits until this process is quiet. And a few microseconds are too short for a clock: where calls are short a
turn is several, as many for one as for another, as the first of them finds colder caches than the rest.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping

TURN_SECONDS = 300e-6  # a turn of the fastest lasts at least so long
WAKE_SECONDS = 20e-3  # where it is faster than that, turns start with an untimed call that wakes threads
MIN_ROUNDS, MAX_ROUNDS = 6, 400  # with fewer than six rounds the median has no 95 % interval
WIDE = 1.5  # an interval that spans such a factor says more about the machine than about anybody's speed
NARROW = 0.02  # stop early once every speed-up's interval is narrower than this (relative)
# Rounds of two and of three contestants after which everybody, itself too, came before everybody as often.
BALANCED = {2: ((0, 1), (1, 0)), 3: ((0, 1, 2), (2, 0, 1), (1, 0, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0))}


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
    a call, told roughly how long one of the fastest takes; by the clock of the CPU if None.
    """
    turn = turn or _turn
    fastest = min(_first_look(call) for call in calls.values())
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    names, start = list(calls), time.perf_counter()
    orders = itertools.cycle(BALANCED.get(len(names)) or itertools.permutations(range(len(names))))
    next_look = 2 * MIN_ROUNDS  # then twice as many: after every round 92 % of the intervals hold, not 95
    for done, order in zip(range(1, MAX_ROUNDS + 1), orders, strict=False):
        for name in (names[i] for i in order):
            seconds[name].append(turn(calls[name], fastest))
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
            spent = [int(n) for n in stat.readline().split()[1:9]]  # without guests, whom user includes
        waiting = sum(spent[3:5])  # idle, iowait
        return sum(spent) - waiting, waiting  # what a hypervisor gave to others counts as used

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


def _turn(call: Callable[[], object], fastest: float) -> float:
    repeats = math.ceil(TURN_SECONDS / fastest)
    settle()
    if fastest < WAKE_SECONDS:
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _narrow(seconds: dict[str, list[float]]) -> bool:
    first, *others = seconds.values()
    intervals = [speedup(first, other) for other in others]
    return all(high - low <= NARROW * middle for middle, low, high in intervals)
