"""What the terminal shows while cases run: a table that grows, and a progress bar with the time that is left.

With rich on a terminal there are colours and a moving bar; otherwise the same lines in plain text.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from . import gpu_attention
from .cases import Case
from .contestants import ORT, OURS, TORCH
from .engine import Row
from .gpu_attention import GpuAttentionCase
from .gpu_recurrence import TORCH_TF32
from .report import (
    Report,
    error_ratio,
    geometry,
    milliseconds,
    missing_packages,
    reason,
    title,
    typical_peaks,
    versus,
    wrong,
)

COLOURS = {
    "faster": "green",
    "no difference": "yellow",
    "unsure": "yellow",
    "SLOWER": "bold red",
    "failed": "bold red",
}


def speedup(row: Row | None) -> str:
    """Of ours over the contestant of this row."""
    if row is None or row.speedup is None:
        return "" if row is None else row.check
    return f"{row.speedup:5.2f}x ({row.speedup_low:.2f}-{row.speedup_high:.2f})"


def head(width: int) -> str:
    """Two lines over the table, whose first column has this width."""
    return (
        f"{'':{width}}{'torch':>9}{'seqkernels':>12}   {'against torch':<20}{'against onnxruntime':<20}"
        f"{'of peak':>8}{'error':>8}{'memory, MiB':>16}\n"
        f"{'':{width}}{'ms':>9}{'ms':>12}   {'speed-up (95 % CI)':<20}{'speed-up (95 % CI)':<20}"
        f"{'':8}{'/ torch':>8}{'torch → ours':>16}"
    )


def line(rows: list[Row], width: int) -> tuple[str, str]:
    """A case as one line of the table, and its verdict."""
    ours = next(row for row in rows if row.contestant == OURS)
    peers = {row.contestant: row for row in rows if row.contestant != OURS}
    name = f"  {geometry(ours)}"
    if ours.check != "ok":
        return f"{name:<{width}} no speed: {reason(ours)}", "failed"

    torch_ms = milliseconds(peers[TORCH].ms) if TORCH in peers and peers[TORCH].ms else ""
    memory = ""
    if ours.peak_mib is not None and peers[TORCH].peak_mib is not None:
        memory = f"{peers[TORCH].peak_mib:.1f} → {ours.peak_mib:.1f}"
    verdict = case_verdict(rows)
    text = (
        f"{name:<{width}}{torch_ms:>9}{milliseconds(ours.ms):>12}   "
        f"{speedup(peers.get(TORCH)):<20}{speedup(peers.get(ORT)):<20}"
        f"{ours.peak_share:>8.0%}{error_ratio(ours):>8}{memory:>16}  {verdict}"
    )
    return text, verdict.partition(" (")[0]


def gpu_head(width: int) -> str:
    names, columns = (OURS, TORCH, TORCH_TF32), f"{'ms':>9}{'of limit':>10}"
    return (
        f"{'':{width}}{''.join(f'{name:>19}' for name in names)}{'':11}"
        f"{'against torch':<20}{'against TF32':<20}{'error':>8}\n"
        f"{'':{width}}{columns * len(names)}   limit   "
        f"{'speed-up (95 % CI)':<20}{'speed-up (95 % CI)':<20}{'/ torch':>8}"
    )


def gpu_line(rows: list[Row], width: int) -> tuple[str, str]:
    """Recurrence on a GPU: times beside the least time that is possible."""
    found = {row.contestant: row for row in rows}
    ours = found[OURS]
    name = f"  {geometry(ours)}"
    if ours.check != "ok":
        return f"{name:<{width}} no speed: {reason(ours)}", "failed"

    def time_of(contestant: str) -> str:
        row = found.get(contestant)
        if row is None or row.ms is None:
            return f"{'' if row is None else row.check:>19}"
        return f"{milliseconds(row.ms):>9}{row.limit_share:>10.1%}"

    verdict = case_verdict(rows)
    text = (
        f"{name:<{width}}{time_of(OURS)}{time_of(TORCH)}{time_of(TORCH_TF32)}   {ours.limit:<8}"
        f"{speedup(found.get(TORCH)):<20}{speedup(found.get(TORCH_TF32)):<20}"
        f"{error_ratio(ours):>8}  {verdict}"
    )
    return text, verdict.partition(" (")[0]


def gpu_attention_head(width: int) -> str:
    columns = "".join(f"{name:>21}" for name in gpu_attention.CONTESTANTS)
    return f"{'':{width}}{columns}\n{'':{width}}" + f"{'TFLOP/s':>13}{'TB/s':>8}" * len(
        gpu_attention.CONTESTANTS
    )


def gpu_attention_line(rows: list[Row], width: int) -> tuple[str, str]:
    """Everybody's speed in two units, because some cases are bound by arithmetic and some by memory."""
    speeds = (
        f"{r.gflops / 1e3:13.1f}{r.tb_s:8.2f}" if r.gflops and r.tb_s else f"{r.check:>21}" for r in rows
    )
    verdict = case_verdict(rows)
    return f"{f'  {geometry(rows[0])}':<{width}}{''.join(speeds)}  {verdict}", verdict.partition(" (")[0]


def table(
    case: Case | GpuAttentionCase, on_gpu: bool
) -> tuple[Callable[..., str], Callable[..., tuple[str, str]]]:
    """Who writes the head and the lines of a suite with such cases."""
    if isinstance(case, GpuAttentionCase):
        return gpu_attention_head, gpu_attention_line
    return (gpu_head, gpu_line) if on_gpu else (head, line)


def case_verdict(rows: list[Row]) -> str:
    """The least flattering of the verdicts, naming the contestant unless it holds against all."""
    judged = [row for row in rows if row.verdict]
    for verdict in ("SLOWER", "unsure", "no difference"):
        names = [row.contestant for row in judged if row.verdict == verdict]
        if names:
            return verdict if len(names) == len(judged) else f"{verdict} ({', '.join(names)})"
    return "faster" if judged else ""


class Console:
    def __init__(self) -> None:
        self.rich = None
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # "?" for what the terminal's encoding lacks
        if sys.stdout.isatty() and not missing_packages(["rich"]):
            import rich.console

            self.rich = rich.console.Console(highlight=False, soft_wrap=True)

    def print(self, text: str = "", style: str | None = None) -> None:
        if self.rich:
            self.rich.print(text, style=style, markup=False)
        else:
            print(text, flush=True)

    @contextmanager
    def progress(self, cases: list[Case], budget: float, on_gpu: bool) -> Iterator[Progress]:
        speed = 1e13 if on_gpu else 1e10
        weights = [budget + case.flops / speed for case in cases]  # what a case roughly costs, in seconds
        if not self.rich:
            yield Progress(self, cases, weights, on_gpu)
            return
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = [BarColumn(), TextColumn("{task.fields[done]}/{task.fields[cases]}"), TimeRemainingColumn()]
        columns += [TextColumn("left, now {task.description}")]
        # Drawn only between cases: a thread that draws would take time from what is measured. The estimate
        # looks at the last ten minutes, because cases are slow and few.
        options = {"auto_refresh": False, "transient": True, "speed_estimate_period": 600}
        with Bar(*columns, console=self.rich, **options) as bar:
            yield Progress(self, cases, weights, on_gpu, bar)

    def header(self, report: Report, on_gpu: bool) -> None:
        facts = report.environment
        packages = [n for n in ("seqkernels", "torch", "onnxruntime") if facts[n] != "not installed"]
        words = [f"{name} {facts[name].split(' ')[0]}" for name in packages]
        words += [facts["cpu"], facts["isa active"], f"{facts['torch threads']} threads"]
        words += [facts["gpu"], f"CUDA {facts['torch cuda']}"] if on_gpu else []
        self.print(" · ".join(words))
        if report.disturbed:
            self.print(report.disturbed, "yellow")
        self.print()

    def summary(self, report: Report) -> None:
        self.print()
        if report.disturbed:
            self.print(report.disturbed, "yellow")
        if report.interrupted:
            self.print(f"interrupted: {len(report.cases)} of {report.cases_planned} cases", "yellow")
        for one in versus(report.rows):
            worst, best = one.worst, one.best
            counts = [f"{one.count(word)} {word}" for word in ("faster", "no difference", "SLOWER")]
            counts += [f"{one.unsure} unsure and not counted"] if one.unsure else []
            cases = f"{len(one.rows)} cases ({', '.join(counts)})"
            self.print(f"against {one.peer}: geomean {one.geomean:.2f}x over {cases}")
            self.print(f"  slowest {worst.speedup:.2f}x  {worst.case}")
            self.print(f"  fastest {best.speedup:.2f}x  {best.case}")
        bad = wrong(report.rows)
        if bad:
            self.print(f"{len(bad)} results WRONG or missing (no speed is reported for them):", "bold red")
            for row in bad:
                self.print(f"  {row.contestant}: {row.case}: {reason(row)}", "bold red")
        elif report.rows:
            self.print(f"all {len(report.rows)} results are as exact as they have to be")
        for dtype, peak in typical_peaks(report.rows).items():
            self.print(f"peak measured in this run, {dtype}: {peak:.0f} GF/s")

    def changes(self, report: Report) -> None:
        for change in report.changes or []:
            old, new = change.old[0], change.new[0]
            style = {"FASTER": "green", "SLOWER": "bold red"}.get(change.verdict)
            self.print(f"{change.verdict:7} {old:6.2f}x → {new:6.2f}x  {change.case}", style)


class Progress:
    """Tells about each case as it starts and ends."""

    def __init__(
        self, console: Console, cases: list[Case], weights: list[float], on_gpu: bool, bar: object = None
    ) -> None:
        self.console, self.cases, self.weights, self.bar = console, cases, weights, bar
        self.done, self.start, self.title = 0, time.perf_counter(), ""
        self.width = 3 + max(len(case.name) - len(case.title) for case in cases)
        first, self.line = table(cases[0], on_gpu)
        console.print(first(self.width))
        if bar:
            self.task = bar.add_task(cases[0].name, total=sum(weights), done=0, cases=len(cases))
            bar.refresh()

    def case_done(self, rows: list[Row]) -> None:
        if title(rows[0]) != self.title:
            self.title = title(rows[0])
            self.console.print(self.title, "bold")
        text, verdict = self.line(rows, self.width)
        self.done += 1
        if self.bar:
            following = self.cases[self.done].name if self.done < len(self.cases) else ""
            advance = self.weights[self.done - 1]
            self.console.print(text, COLOURS.get(verdict))
            self.bar.update(self.task, advance=advance, description=following, done=self.done, refresh=True)
        else:
            self.console.print(f"{text}  [{self.done}/{len(self.cases)}{self._left()}]")

    def _left(self) -> str:
        finished, total = sum(self.weights[: self.done]), sum(self.weights)
        seconds = (time.perf_counter() - self.start) * (total - finished) / finished
        return f", {seconds // 60:.0f}:{seconds % 60:02.0f} left" if finished < total else ""
