"""From rows to figures and files: the summary, results.csv, results.json and report.html."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from .contestants import ORT, OURS, TORCH
from .engine import Row

SCHEMA = 1  # of results.json; a higher number means that older readers would misunderstand it
SPEEDUP = ("speedup", "speedup_low", "speedup_high")


@dataclass
class Report:
    environment: Mapping[str, str]
    command: str
    started: str
    seconds: float = 0.0
    cases_planned: int = 0
    busy: float = 0.0  # share of the CPUs that other programs used before or after
    rows: list[Row] = field(default_factory=list)
    changes: list[Change] | None = None  # against an older run

    @property
    def cases(self) -> list[list[Row]]:
        """The rows of each case together, in order."""
        grouped: dict[str, list[Row]] = {}
        for row in self.rows:
            grouped.setdefault(row.case, []).append(row)
        return list(grouped.values())

    @property
    def suites(self) -> dict[str, list[Row]]:
        grouped: dict[str, list[Row]] = {}
        for row in self.rows:
            grouped.setdefault(row.suite, []).append(row)
        return grouped

    @property
    def peers(self) -> list[str]:
        return list(dict.fromkeys(row.contestant for row in self.rows if row.speedup is not None))

    @property
    def disturbed(self) -> str:
        """A warning when the figures say more about other programs than about these."""
        share = f"{self.busy:.0%} of the CPUs were busy with other programs"
        return (
            f"{share}: do not trust these times, run it again on a quiet machine" if self.busy > 0.1 else ""
        )

    @property
    def interrupted(self) -> bool:
        return len(self.cases) < self.cases_planned


@dataclass
class Versus:
    """seqkernels against one other contestant."""

    peer: str
    rows: list[Row]  # with a speed-up that can be trusted
    unsure: int  # how many more have none

    @property
    def geomean(self) -> float:
        return math.exp(sum(math.log(row.speedup) for row in self.rows) / len(self.rows))

    @property
    def worst(self) -> Row:
        return min(self.rows, key=lambda row: row.speedup)

    @property
    def best(self) -> Row:
        return max(self.rows, key=lambda row: row.speedup)

    def count(self, verdict: str) -> int:
        return sum(row.verdict == verdict for row in self.rows)


@dataclass
class Change:
    """A case now and in an older run: speed-up over torch, in which the mood of the machine cancels out."""

    case: str
    old: tuple[float, float, float]
    new: tuple[float, float, float]

    @property
    def verdict(self) -> str:
        (_, old_low, old_high), (_, new_low, new_high) = self.old, self.new
        if new_low > old_high:
            return "FASTER"
        if new_high < old_low:
            return "SLOWER"
        # Overlapping intervals mean "the same" only when they are narrow enough to show a difference of 5 %.
        widest = max((high - low) / middle for middle, low, high in (self.old, self.new))
        return "SAME" if widest <= 0.05 else "UNSURE"


def versus(rows: Iterable[Row]) -> list[Versus]:
    peers: dict[str, list[Row]] = {}
    for row in rows:
        if row.speedup is not None:
            peers.setdefault(row.contestant, []).append(row)
    sure = {peer: [row for row in found if row.verdict != "unsure"] for peer, found in peers.items()}
    return [Versus(peer, found, len(peers[peer]) - len(found)) for peer, found in sure.items() if found]


def wrong(rows: Iterable[Row]) -> list[Row]:
    """Rows whose result was not right, or that could not be computed."""
    return [row for row in rows if row.check != "ok"]


def typical_peaks(rows: Iterable[Row]) -> dict[str, float]:
    """Median of the FMA peaks measured for each dtype, GF/s."""
    peaks: dict[str, list[float]] = {}
    for row in rows:
        if row.contestant == OURS and row.peak_gflops:
            peaks.setdefault(row.dtype, []).append(row.peak_gflops)
    return {dtype: median(values) for dtype, values in peaks.items()}


def read_older(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8"))
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"expected a results.json of schema {SCHEMA}, got {schema}: make it anew")
    needed, rows = {"case", "contestant", *SPEEDUP}, content.get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise ValueError(f"expected rows with {', '.join(sorted(needed))}: make it anew")
    return content


def changes(old: Mapping[str, Any], rows: Iterable[Row]) -> list[Change]:
    """Compare with the contents of an older results.json, over the cases that both have."""
    before = {row["case"]: row for row in old["rows"] if row["contestant"] == TORCH and row["speedup"]}
    after = {row.case: row for row in rows if row.contestant == TORCH and row.speedup}
    found = [
        Change(case, tuple(before[case][f] for f in SPEEDUP), tuple(getattr(row, f) for f in SPEEDUP))
        for case, row in after.items()
        if case in before
    ]
    return sorted(found, key=lambda change: ("SLOWER", "FASTER", "UNSURE", "SAME").index(change.verdict))


def write(report: Report, folder: Path, page: bool = True) -> list[Path]:
    """Write what can be written; returns the files. report.html needs the extra packages, and CPU cases."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.html").unlink(missing_ok=True)  # of another run, or this one's so far
    files = [write_csv(report, folder / "results.csv"), write_json(report, folder / "results.json")]
    if page and not missing_packages(("jinja2", "matplotlib")):
        files.append(write_html(report, folder / "report.html"))
    return files


def missing_packages(names: Sequence[str]) -> list[str]:
    return [name for name in names if find_spec(name) is None]


def write_csv(report: Report, path: Path) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(dataclasses.asdict(row) for row in report.rows)
    return path


def write_json(report: Report, path: Path) -> Path:
    content = {
        "schema": SCHEMA,
        "started": report.started,
        "seconds": round(report.seconds, 1),
        "command": report.command,
        "cases_planned": report.cases_planned,
        "busy": round(report.busy, 3),
        "environment": dict(report.environment),
        "rows": [dataclasses.asdict(row, dict_factory=_finite) for row in report.rows],
    }
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def _finite(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON has neither infinity nor nan, which the error of a wrong result may be."""
    return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in items}


def write_html(report: Report, path: Path) -> Path:
    import jinja2

    from . import check, plots, timing

    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    filters = {"ms": milliseconds, "geometry": geometry, "error_ratio": error_ratio, "reason": reason}
    templates.filters |= filters
    groups = [
        (name, [{row.contestant: row for row in rows} for rows in cases])
        for name, cases in itertools.groupby(report.cases, key=lambda rows: title(rows[0]))
    ]
    page = templates.get_template("report.html").render(
        report=report,
        versus=versus(report.rows),
        by_cell=[
            (cell, versus(row for row in report.rows if row.cell == cell))
            for cell in dict.fromkeys(row.cell for row in report.rows)
        ],
        wrong=wrong(report.rows),
        wrong_ours=[row for row in wrong(report.rows) if row.contestant == OURS],
        groups=groups,
        peaks=typical_peaks(report.rows),
        methods=sorted({row.memory_method for row in report.rows if row.memory_method}),
        plots=plots,
        check=check,
        timing=timing,
        OURS=OURS,
        TORCH=TORCH,
        ORT=ORT,
    )
    path.write_text(page, encoding="utf-8")
    return path


def milliseconds(value: float) -> str:
    """Three significant digits at every size: 0.00612, 4.10, 123."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def title(row: Row) -> str:
    """What a group of cases has in common: module, mode and dtype."""
    return " ".join(row.case.split(" ")[:3])


def geometry(row: Row) -> str:
    """The rest of the case's name."""
    return " ".join(row.case.split(" ")[3:])


def reason(row: Row) -> str:
    """Why a row has no speed."""
    return row.note or f"error of {row.output} {row.error:.2g}, allowed {row.allowed_error:.2g}"


def error_ratio(row: Row) -> str:
    """The error as a multiple of torch's."""
    if row.error == row.torch_error:
        return "1.0x"
    return f"{row.error / row.torch_error:.1f}x" if row.torch_error else "> 0"
