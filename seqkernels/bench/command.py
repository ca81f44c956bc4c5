"""The command line of `seqkernels bench`."""

from __future__ import annotations

import argparse
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from seqkernels import info

from . import timing
from .cases import GPU_SUITES, SUITES, select
from .console import Console
from .contestants import OURS
from .engine import run_cases, run_gpu_cases
from .report import Report, changes, missing_packages, read_older, write, wrong

EXTRAS = {
    "rich": "the progress bar and colours",
    "jinja2": "report.html",
    "matplotlib": "report.html",
    "onnx": "ONNX Runtime in the comparison",
    "onnxruntime": "ONNX Runtime in the comparison",
}
MOST = 10_000  # threads, or seconds a case; nan and inf are more


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="seqkernels bench",
        description="Time seqkernels, torch and (when installed) ONNX Runtime in turn on the same inputs, "
        "check every result against float64, and write results.csv, results.json and report.html. "
        "Ctrl-C ends early and keeps what is done.",
    )
    parser.add_argument("--suite", choices=[*SUITES, "all"], default="quick", help="what to measure (quick)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of results (bench-reports/<time>)")
    parser.add_argument("--threads", type=positive(int), metavar="N", help="CPU threads (torch's number)")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="say what changed since that run")
    parser.add_argument("--filter", default="", metavar="SUBSTR", help='only cases whose name has it ("GRU")')
    parser.add_argument("--budget", type=positive(float), metavar="SECONDS", help="per case (3; gpu: 0.5)")
    parser.add_argument("--list", action="store_true", help="only print the names of the cases")
    args = parser.parse_args(argv)
    args.budget = args.budget or (0.5 if args.suite == "gpu" else 3.0)
    return args


def positive(kind: type) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not 0 < value <= MOST:
            number = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {number} above 0, at most {MOST}, got {text!r}")
        return value

    return convert


def complain(text: str) -> int:
    """The exit status."""
    print(text, file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    cases = select(args.suite, args.filter)
    if not cases:
        return complain(
            f'no case of suite {args.suite} has "{args.filter}" in its name; --list shows the names'
        )
    if args.list:
        print("\n".join(case.name for _, case in cases))
        return 0
    on_gpu = args.suite in GPU_SUITES
    if on_gpu and not torch.cuda.is_available():
        return complain(f"suite {args.suite} needs a CUDA device, and torch sees none")
    try:
        older = read_older(args.compare) if args.compare else None
    except (OSError, ValueError) as error:  # before hours of measuring, not after
        return complain(f"--compare {args.compare}: {error}")
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    folder = args.out or Path("bench-reports") / started.replace(":", "").replace(" ", "-")
    if args.threads:
        torch.set_num_threads(args.threads)

    console = Console()
    command = (
        f"seqkernels bench --suite {args.suite} --threads {torch.get_num_threads()} --budget {args.budget:g}"
    )
    command += f' --filter "{args.filter}"' if args.filter else ""
    report = Report(info.collect(), command, started, cases_planned=len(cases), busy=timing.busy())
    try:
        write(report, folder, page=False)
    except OSError as error:
        return complain(f"--out {folder}: {error}")
    console.header(report, on_gpu)
    interrupted = False
    start = time.perf_counter()
    try:
        with console.progress([case for _, case in cases], args.budget, on_gpu) as progress:
            for rows in (run_gpu_cases if on_gpu else run_cases)(cases, args.budget):
                report.rows += rows
                report.seconds = time.perf_counter() - start
                write(report, folder, page=False)  # whatever ends this run, what is done is kept
                progress.case_done(rows)
    except KeyboardInterrupt:
        interrupted = True
    with deaf():
        return finish(console, report, older, folder, on_gpu, interrupted)


@contextmanager
def deaf() -> Iterator[None]:
    """Without ear for Ctrl-C, which many press twice. Only the main thread hears it anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def finish(
    console: Console, report: Report, older: dict | None, folder: Path, on_gpu: bool, interrupted: bool
) -> int:
    """Say and write what was found; returns the exit status."""
    report.busy = max(report.busy, timing.busy())
    report.changes = changes(older, report.rows) if older else None
    console.summary(report)
    console.changes(report)

    console.print()
    for file in write(report, folder, page=not on_gpu):
        console.print(f"wrote {file}")
    if missing := missing_packages(list(EXTRAS)):
        lost = ", ".join(dict.fromkeys(EXTRAS[name] for name in missing))
        console.print(
            f'not installed: {", ".join(missing)}; without: {lost}. pip install "seqkernels[bench]"'
        )
    if interrupted:
        return 130
    return 1 if any(row.contestant == OURS for row in wrong(report.rows)) else 0
