"""Runs cases: check, then time, then memory. A case that fails its check gets no speed and no memory."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from . import gpu, gpu_attention, gpu_recurrence, timing
from .attention import AttentionCase
from .cases import Case
from .check import Comparison, compare, errors
from .contestants import CONTESTANTS, OURS, TORCH, Contestant, Problem, contestants_for, make_problem
from .gpu_attention import GpuAttentionCase
from .memory import MemoryMeter


@dataclass(kw_only=True)
class Row:
    """One contestant in one case: a line of results.csv. None: not measured, or it does not apply."""

    suite: str
    case: str
    cell: str
    mode: str
    dtype: str
    B: int
    H: int
    T: int | None = None
    I: int | None = None  # noqa: E741
    layers: int | None = None
    bidirectional: bool | None = None
    fill: float | None = None
    step: bool = False
    recompute: bool = False
    resets: float | None = None
    device: str = "cpu"
    G: int | None = None
    Tq: int | None = None
    Tk: int | None = None
    D: int | None = None
    causal: bool | None = None
    mask: str | None = None
    dropout: float | None = None
    tokens: int
    gflop: float
    contestant: str
    check: str  # "ok", "failed", or "error" with the message in note
    output: str | None = None  # the output with the least room between its error and what is allowed
    error: float | None = None  # of that output: max |value - float64 truth|
    torch_error: float | None = None
    allowed_error: float | None = None
    ms: float | None = None  # median
    ms_low: float | None = None  # its 95 % interval
    ms_high: float | None = None
    rounds: int | None = None
    gflops: float | None = None
    peak_gflops: float | None = None  # of this dtype: FMA of these threads, or matrix products of the GPU
    peak_share: float | None = None
    limit: str | None = None  # on a GPU: what bounds the time of a recurrence, "matrix" or "weights"
    limit_share: float | None = None  # the bound over the time
    tb_s: float | None = None  # on a GPU: q, k, v and out, each once, a second
    speedup: float | None = None  # of seqkernels over this contestant: median of paired ratios
    speedup_low: float | None = None  # its 95 % interval
    speedup_high: float | None = None
    verdict: str | None = None
    peak_mib: float | None = None
    memory_method: str | None = None
    note: str = ""


Makers = Mapping[str, Callable[[Problem], Contestant]]


def run_cases(cases: Iterable[tuple[str, Case | AttentionCase]], budget: float) -> Iterator[list[Row]]:
    """One list of rows a case, seqkernels first; `budget` is the seconds of timing a case."""
    with MemoryMeter() as meter:
        for suite, case in cases:
            makers = {name: CONTESTANTS[name] for name in contestants_for(case)}
            yield run_case(suite, case, budget, makers, meter)


def run_case(
    suite: str, case: Case | AttentionCase, budget: float, makers: Makers, meter: MemoryMeter | None = None
) -> list[Row]:
    rows = {name: _empty_row(suite, case, name) for name in makers}
    gc.collect()
    try:
        with torch.set_grad_enabled(case.mode == "train"):
            ready = _checked(case, makers, rows)
            if OURS in ready:
                _time(case, ready, rows, budget)
    except Exception as error:  # what torch cannot run, or has no memory for: the other cases go on
        return _all_failed(rows, error)
    if meter and OURS in ready:
        for name in (OURS, TORCH):
            try:
                peak, rows[name].memory_method = meter.peak(case, name)
                rows[name].peak_mib = peak / 2**20
            except MemoryError as error:
                rows[name].note = str(error)
    return list(rows.values())


def _all_failed(rows: dict[str, Row], error: Exception) -> list[Row]:
    for row in rows.values():
        row.check, row.note = "error", f"{type(error).__name__}: {error}".splitlines()[0]
    return list(rows.values())


def _checked(case: Case | AttentionCase, makers: Makers, rows: dict[str, Row]) -> dict[str, Contestant]:
    """The contestants whose results are right; their rows say so, the other rows say what is wrong."""
    problem = make_problem(case)
    exact = CONTESTANTS[TORCH](problem.to(torch.float64))
    truth = exact.outputs(exact.run())
    torch_contestant = makers[TORCH](problem)
    torch_errors = errors(torch_contestant.outputs(torch_contestant.run()), truth)
    ready = {}
    for name, make in makers.items():
        row = rows[name]
        try:
            contestant = make(problem)
            allowed = {output: error * contestant.room for output, error in torch_errors.items()}
            worst = compare(contestant.outputs(contestant.run()), allowed, truth, peer=name != OURS)
        except Exception as error:  # one contestant that cannot run a case must not end the whole run
            row.check, row.note = "error", f"{type(error).__name__}: {error}"
            continue
        _note_errors(row, worst)
        if worst.ok:
            ready[name] = contestant
    return ready


def _note_errors(row: Row, worst: Comparison) -> None:
    row.check = "ok" if worst.ok else "failed"
    row.output, row.error = worst.output, worst.error
    row.torch_error, row.allowed_error = worst.torch_error, worst.allowed


def _time(
    case: Case | AttentionCase, ready: dict[str, Contestant], rows: dict[str, Row], budget: float
) -> None:
    peaks = [_fma_peak(case.dtype)]
    seconds = timing.interleave({name: contestant.run for name, contestant in ready.items()}, budget)
    peaks.append(_fma_peak(case.dtype))
    _note_times(rows, seconds)
    for name in seconds:
        rows[name].peak_gflops = max(peaks)
        rows[name].peak_share = rows[name].gflops / max(peaks)


def run_gpu_cases(cases: Iterable[tuple[str, Case | GpuAttentionCase]], budget: float) -> Iterator[list[Row]]:
    """As `run_cases`, by the clock of the GPU, without memory."""
    for suite, case in cases:
        run = run_gpu_attention if isinstance(case, GpuAttentionCase) else run_gpu_recurrence
        yield run(suite, case, budget)


def run_gpu_recurrence(suite: str, case: Case, budget: float) -> list[Row]:
    makers = gpu_recurrence.contestants(case)
    rows = {name: _empty_row(suite, case, name) for name in makers}
    gc.collect()
    try:
        with torch.set_grad_enabled(case.mode == "train"):
            ready = _checked(case, makers, rows)
            if OURS in ready:
                runs = {name: contestant.run for name, contestant in ready.items()}
                _note_times(rows, timing.interleave(runs, budget, gpu.device_seconds))
    except Exception as error:  # what torch cannot run, or a lost device: the other rows stay
        return _all_failed(rows, error)
    for name, row in rows.items():
        if row.ms:
            tf32 = name == gpu_recurrence.TORCH_TF32
            limit = gpu_recurrence.limit(case, tf32)
            row.limit, row.limit_share = limit.by, 1e3 * limit.seconds / row.ms
            row.peak_gflops = gpu.matrix_rate(case.dtype, tf32) / 1e9
            row.peak_share = row.gflops / row.peak_gflops
    return list(rows.values())


def run_gpu_attention(suite: str, case: GpuAttentionCase, budget: float) -> list[Row]:
    shape = {"B": case.B, "H": case.Hq, "G": case.Hq // case.Hk, "Tq": case.Tq, "Tk": case.Tk, "D": case.D}
    work = {"tokens": case.B * case.Tq, "gflop": case.flops / 1e9, "causal": case.causal, "device": "cuda"}
    kind = {"suite": suite, "case": case.name, "cell": "sdpa", "mode": case.mode, "dtype": case.dtype}
    try:
        seconds, wrong = gpu_attention.measure(case, budget)
    except Exception as error:  # what torch cannot run, which says how large errors may be
        message = f"{type(error).__name__}: {error}".splitlines()[0]
        seconds, wrong = {}, dict.fromkeys(gpu_attention.CONTESTANTS, message)
    rows = {
        name: Row(
            **kind,
            **shape,
            **work,
            contestant=name,
            check="error" if name in wrong else "ok",
            note=wrong.get(name, ""),
        )
        for name in gpu_attention.CONTESTANTS
    }
    _note_times(rows, seconds)
    for name in seconds:
        rows[name].tb_s = case.bytes / rows[name].ms / 1e9
    return list(rows.values())


def _note_times(rows: dict[str, Row], seconds: dict[str, list[float]]) -> None:
    for name, values in seconds.items():
        row = rows[name]
        row.ms, row.ms_low, row.ms_high = (1e3 * value for value in timing.median_interval(values))
        row.rounds, row.gflops = len(values), row.gflop / row.ms * 1e3
        if name != OURS and OURS in seconds:
            row.speedup, row.speedup_low, row.speedup_high = timing.speedup(seconds[OURS], values)
            row.verdict = timing.verdict(row.speedup_low, row.speedup_high)


def _fma_peak(dtype: str) -> float:
    from seqkernels import _kernels

    timing.settle()
    return _kernels.fma_peak(dtype, torch.get_num_threads())


def _empty_row(suite: str, case: Case | AttentionCase, contestant: str) -> Row:
    measures = {"suite": suite, "case": case.name, "tokens": case.tokens, "gflop": case.flops / 1e9}
    return Row(**dataclasses.asdict(case), **measures, contestant=contestant, check="error")
