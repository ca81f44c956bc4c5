"""The pictures of report.html: SVG with the colours of the page, so one drawing serves light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from .contestants import ORT, OURS, TORCH
from .engine import Row

# Matplotlib draws with these stand-ins; in the SVG they become CSS variables of the page.
INK, MUTED, LINE = "#010101", "#020202", "#030303"
COLOURS = {OURS: "#040404", TORCH: "#050505", ORT: "#060606"}
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line"} | {c: f"--{name}" for name, c in COLOURS.items()}
MARKERS = {OURS: "o", TORCH: "s", ORT: "D"}  # shapes too, for those who cannot tell the colours apart
TITLES = {
    "lstm": "LSTM",
    "gru": "GRU",
    "rnn": "RNN (tanh)",
    "sdpa": "SDPA",
    "mha": "MultiheadAttention",
    "additive": "Additive attention",
}

STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "ytick.left": False,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.transparent": True,
}


def speedups(rows: list[Row]) -> str:
    """How many times faster than each other contestant, with the 95 % interval."""

    def value(row: Row) -> tuple[float, float, float] | None:
        return (row.speedup, row.speedup_low, row.speedup_high) if row.speedup else None

    def dress(axis: Any) -> None:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.2g}x"))
        axis.axvline(1, color=INK, linewidth=1)

    return _dots(rows, value, dress, "speed-up", (TORCH, ORT))


def shares(rows: list[Row]) -> str:
    """Arithmetic speed as a share of what the cores can do."""

    # Beyond 100 % where others have faster units.
    most = max([1.0, *(1.05 * row.peak_share for row in rows if row.peak_share)])

    def dress(axis: Any) -> None:
        axis.set(xlim=(0, most), xticks=(0.25, 0.5, 0.75) if most == 1 else (0.5, 1.0, 1.5))
        axis.xaxis.set_major_formatter(PercentFormatter(1))

    return _dots(rows, lambda row: row.peak_share, dress, "share of the FMA peak", (OURS, TORCH, ORT))


def memory(rows: list[Row]) -> str:
    def dress(axis: Any) -> None:
        axis.set_xscale("log", base=10)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())

    return _dots(rows, lambda row: row.peak_mib or None, dress, "peak memory of one call, MiB", (OURS, TORCH))


def tokens(rows: list[Row]) -> str:
    """Time per token against the number of tokens, for cases that differ only in how full they are."""
    series: dict[tuple, dict[float, Row]] = {}
    for row in rows:
        if row.fill is not None and row.ms:
            same = (row.cell, row.contestant, row.mode, row.T, row.B, row.H, row.layers, row.bidirectional)
            series.setdefault(same, {})[row.fill] = row
    sweeps = {key: points.values() for key, points in series.items() if len(points) > 2}
    cells = [cell for cell in TITLES if any(key[0] == cell for key in sweeps)]
    if not cells:
        return ""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.0), layout="constrained")
        for axis, cell in zip(
            figure.subplots(1, len(cells), sharey=True, squeeze=False)[0], cells, strict=True
        ):
            for (key_cell, name, *_), sweep in sweeps.items():
                if key_cell == cell:
                    points = sorted((row.tokens, 1e3 * row.ms / row.tokens) for row in sweep)
                    style = {"marker": MARKERS[name], "color": COLOURS[name], "markersize": 5}
                    axis.plot(*zip(*points, strict=True), **style)
            axis.set(xlim=(0, None), yscale="log", xlabel="tokens in the batch")
            axis.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(True)
            axis.set_title(TITLES[cell], loc="left")
        figure.axes[0].set_ylabel("µs per token")
        return _svg(figure, "tokens")


def errors(rows: list[Row]) -> str:
    """Error of each result against torch's error on the same output."""
    rows = [row for row in rows if row.contestant != TORCH and row.error and row.torch_error]
    rows = [row for row in rows if math.isfinite(row.error) and math.isfinite(row.torch_error)]  # for an axis
    if not rows:
        return ""
    every = [e for row in rows for e in (row.error, row.torch_error)]
    low, high = min(every) / 2, max(every) * 2
    with matplotlib.rc_context(STYLE | {"axes.spines.left": True}):
        figure = Figure(figsize=(5.2, 4.2), layout="constrained")
        axis = figure.subplots()
        axis.plot([low, high], [low, high], color=INK, linewidth=1)
        axis.text(high, high, " as exact", va="center", color=MUTED)
        axis.plot([low, high / 2], [2 * low, high], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axis.text(high / 2, high, " 2x", va="bottom", ha="center", color=MUTED)
        for name in (ORT, OURS):
            chosen = [row for row in rows if row.contestant == name]
            x, y = [row.torch_error for row in chosen], [row.error for row in chosen]
            axis.scatter(x, y, s=18, marker=MARKERS[name], color=COLOURS[name], linewidths=0, alpha=0.8)
        axis.loglog()
        axis.set(xlim=(low, high), ylim=(low, high), xlabel="error of torch", ylabel="error")
        axis.grid(True)
        return _svg(figure, "errors")


def _dots(
    rows: list[Row],
    value: Callable[[Row], float | tuple[float, float, float] | None],
    dress: Callable[[Any], None],
    label: str,
    contestants: tuple[str, ...],
) -> str:
    """Small multiples: a column a cell, a line a shape (the same in every column), a dot a contestant."""
    points = {(row.cell, _shape(row), row.contestant): value(row) for row in rows}
    points = {key: p for key, p in points.items() if p is not None and key[2] in contestants}
    if not points:
        return ""
    shapes = list(dict.fromkeys(shape for _, shape, _ in points))
    cells = [cell for cell in TITLES if any(key[0] == cell for key in points)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 0.75 + 0.21 * len(shapes)), layout="constrained")
        axes = figure.subplots(1, len(cells), sharex=True, sharey=True, squeeze=False)[0]
        for axis, cell in zip(axes, cells, strict=True):
            for (key_cell, shape, name), point in points.items():
                if key_cell == cell:
                    _dot(axis, shapes.index(shape), name, point)
            dress(axis)
            axis.set_yticks(range(len(shapes)), shapes)
            axis.set_ylim(len(shapes) - 0.4, -0.6)
            axis.grid(True, axis="both")
            axis.set_title(TITLES[cell], loc="left")
            axis.set_xlabel(label)
        return _svg(figure, label)


def _dot(axis: Any, y: int, name: str, point: float | tuple[float, float, float]) -> None:
    middle, low, high = point if isinstance(point, tuple) else (point, point, point)
    axis.plot([low, high], [y, y], color=COLOURS[name], linewidth=2, alpha=0.6, solid_capstyle="butt")
    axis.plot([middle], [y], marker=MARKERS[name], markersize=5, color=COLOURS[name], markeredgewidth=0)


def _shape(row: Row) -> str:
    """The case without its cell and without what is so in most cases."""
    words = row.case.split(" ")[1:]
    words[0] = ("cell " if row.step else "") + words[0]
    return " ".join(word for word in words if word != "float32")


def _svg(figure: Figure, salt: str) -> str:
    """SVG text without fixed size and colours; the salt keeps the ids of the pictures on a page apart."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    text = buffer.getvalue()
    head, body = text[text.index("<svg") :].split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)
    body = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", body)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', body))  # not axes_1, which all pictures have
    body = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", body)
    for stand_in, variable in VARIABLES.items():
        body = body.replace(stand_in, f"var({variable})")
    return f"{head}>{body}"
