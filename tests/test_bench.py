"""The benchmark engine on tiny cases: what it refuses to report, its statistics, its files, its early end."""

from __future__ import annotations

import csv
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from statistics import mean

import pytest
import torch

from seqkernels import selftest
from seqkernels.bench import (
    attention,
    cases,
    check,
    command,
    console,
    contestants,
    engine,
    gpu,
    gpu_attention,
    gpu_recurrence,
    main,
    memory,
    plots,
    report,
    timing,
)
from seqkernels.bench.cases import CELLS, SUITES, Case
from seqkernels.bench.contestants import ORT, OURS, TORCH, Contestant
from seqkernels.bench.gpu_recurrence import TORCH_TF32

TINY = Case(cell="lstm", T=5, B=3, I=8, H=16)


# --- cases


def test_names_are_unique_and_filters_find_them():
    chosen = cases.select("all")
    assert len({case.name for _, case in chosen}) == len(chosen)
    assert {suite for suite, _ in chosen} == set(SUITES) - {"quick", *cases.GPU_SUITES}
    only_gru = cases.select("train", "gru")
    assert only_gru
    assert all(case.cell == "gru" for _, case in only_gru)


def test_every_size_that_a_promise_is_made_for_is_measured():
    forward = {(c.cell, c.B, c.H) for c in SUITES["rnn"] if c.T == 128}
    training = {(c.cell, c.B, c.H) for c in SUITES["train"] if c.T == 128}
    for cell in CELLS:
        for H in (128, 256, 512, 1024):
            assert {(cell, B, H) for B in (16, 32, 64)} <= forward & training
        assert {(cell, 1, H) for H in (64, 128, 256, 512)} <= forward
        fills = {c.fill for c in SUITES["packed"] if c.cell == cell and c.layers == 2 and c.bidirectional}
        assert fills == {0.2, 0.4, 0.6, 0.8, 1.0}
        assert {(c.B, c.H) for c in SUITES["cells"] if c.cell == cell} >= {(1, 256), (192, 768)}
        assert {c.mode for c in SUITES["bf16"] if c.cell == cell} == {"forward", "train"}
        assert {c.recompute for c in SUITES["memory"] if c.cell == cell} >= {False}
    assert all(c.T == 1000 for c in SUITES["memory"])


@pytest.mark.parametrize("fill", [0.2, 0.6, 1.0])
def test_lengths_have_the_mean_they_promise(fill):
    case = Case(cell="gru", T=128, B=32, fill=fill)
    assert case.lengths == sorted(case.lengths, reverse=True)
    assert case.lengths[0] == 128
    assert mean(case.lengths) == pytest.approx(fill * 128, rel=0.05)


def test_flops_count_both_layers_and_directions():
    case = Case(cell="gru", T=2, B=3, I=5, H=7, layers=2, bidirectional=True, mode="train")
    first, second = 2 * 3 * 7 * (5 + 7) * 2, 2 * 3 * 7 * (14 + 7) * 2
    assert case.flops == 2 * 3 * (first + second) * 3


def test_a_cell_has_no_time():
    with pytest.raises(ValueError, match="one step"):
        Case(cell="gru", step=True, T=2)


# --- timing


def test_interval_covers_the_median_as_often_as_it_says():
    dice = random.Random(0)
    for n in (6, 15, 40):
        hits = 0
        for _ in range(2000):
            _, low, high = timing.median_interval([dice.expovariate(1) for _ in range(n)])
            hits += low <= math.log(2) <= high
        assert 0.94 <= hits / 2000 <= 0.985


def test_interval_of_few_values_is_their_range():
    assert timing.median_interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert timing.median_interval([float(k) for k in range(1, 7)]) == (3.5, 1.0, 6.0)
    assert timing.median_interval([float(k) for k in range(1, 10)])[1:] == (2.0, 8.0)


def test_verdicts():
    assert timing.verdict(1.01, 1.2) == "faster"
    assert timing.verdict(0.9, 1.2) == "no difference"
    assert timing.verdict(0.8, 0.99) == "SLOWER"
    assert timing.verdict(1.1, 90.0) == timing.verdict(0.1, 9.0) == "unsure"
    assert timing.verdict(0.1, 0.9) == "SLOWER"  # which no width excuses


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_everybody_comes_after_everybody_as_often(monkeypatch, names):
    monkeypatch.setattr(timing, "settle", lambda: None)
    monkeypatch.setattr(
        timing, "_first_look", lambda call: 1.0
    )  # long: one call a turn, none of them untimed
    calls = []
    seconds = timing.interleave({n: lambda n=n: calls.append(n) for n in names}, budget=0)
    assert [len(values) for values in seconds.values()] == [timing.MIN_ROUNDS] * len(names)
    pairs = Counter(itertools.pairwise([*calls, calls[0]]))  # the next rounds begin as the first did
    assert set(pairs.values()) == {timing.MIN_ROUNDS // len(names)}
    assert len(pairs) == len(names) ** 2


def test_turns_are_of_as_many_calls_for_all(monkeypatch):
    """The first call of a turn finds colder caches: who made fewer calls seemed slower by a fifth."""
    monkeypatch.setattr(timing, "settle", lambda: None)
    calls = []

    def fast():
        calls.append("fast")

    def slow():
        calls.append("slow")

    looks = {fast: timing.TURN_SECONDS / 7, slow: 2 * timing.WAKE_SECONDS}
    monkeypatch.setattr(timing, "_first_look", looks.get)
    timing.interleave({"fast": fast, "slow": slow}, budget=0)
    assert Counter(calls) == dict.fromkeys(("fast", "slow"), timing.MIN_ROUNDS * (1 + 7))  # one untimed


def test_speedup_is_paired():
    ours, theirs = [1.0, 10.0, 2.0, 4.0, 1.0, 3.0], [2.0, 20.0, 4.0, 8.0, 2.0, 6.0]
    assert timing.speedup(ours, theirs) == (2.0, 2.0, 2.0)  # although both vary by a factor of ten


# --- check


def compare(value, torch_error=1e-6, truth=None, name="y"):
    truth = torch.zeros(4, dtype=torch.float64) if truth is None else truth
    return check.compare({name: value}, {name: torch_error}, {name: truth})


def test_error_may_be_twice_that_of_torch_and_thrice_for_gradients():
    room = 4 * torch.finfo(torch.float32).eps
    for name, factor in (("y", 2), ("grad x", 3)):
        assert compare(torch.full((4,), factor * 1e-6 + 0.9 * room), name=name).ok
        assert not compare(torch.full((4,), factor * 1e-6 + 1.1 * room), name=name).ok


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.full((4,), math.nan), torch.full((4,), math.inf)])
def test_wrong_shape_nan_and_inf_are_wrong(bad):
    assert not compare(bad).ok


def test_a_wrong_torch_excuses_nothing():
    assert not compare(torch.full((4,), math.nan), torch_error=math.inf).ok
    assert not compare(torch.ones(4), torch_error=math.inf).ok
    assert compare(torch.zeros(4), torch_error=math.inf).ok


def test_the_worst_output_is_the_one_that_counts():
    truth = {"y": torch.zeros(2, dtype=torch.float64), "grad x": torch.zeros(2, dtype=torch.float64)}
    value = {"y": torch.zeros(2), "grad x": torch.ones(2)}
    worst = check.compare(value, dict.fromkeys(truth, 1e-6), truth)
    assert worst.output == "grad x"
    assert not worst.ok


def test_a_missing_output_is_an_error():
    with pytest.raises(ValueError, match="expected"):
        check.compare({}, {}, {"y": torch.zeros(1)})


# --- contestants


FORWARD = [
    {},
    {"layers": 2, "bidirectional": True},
    {"fill": 0.6},
    {"fill": 0.6, "layers": 2, "bidirectional": True},
    {"step": True, "T": 1},
]


@pytest.mark.parametrize("options", FORWARD, ids=str)
@pytest.mark.parametrize("cell", CELLS)
@torch.no_grad()
def test_onnxruntime_computes_what_torch_computes(cell, options):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    case = Case(**({"cell": cell, "T": 7, "B": 4, "I": 10, "H": 12} | options))
    problem = contestants.make_problem(case)
    theirs, ours = contestants.torch_contestant(problem), contestants.onnxruntime_contestant(problem)
    expected = theirs.outputs(theirs.run())
    got = ours.outputs(ours.run())
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-5)


def test_a_module_that_was_not_swapped_does_not_compete(monkeypatch):
    monkeypatch.setattr("seqkernels.swap_", lambda model: None)
    with pytest.raises(RuntimeError, match="compared with itself"):
        contestants.seqkernels_contestant(contestants.make_problem(TINY))


def test_a_training_case_checks_the_gradient_of_every_weight():
    problem = contestants.make_problem(dataclasses.replace(TINY, mode="train"))
    contestant = contestants.torch_contestant(problem)
    names = contestant.outputs(contestant.run()).keys()
    gradients = {"grad x"} | {f"grad {name}" for name, _ in problem.module.named_parameters()}
    assert names == {"y", "hn", "cn"} | gradients


# --- engine


def wrong_by(error):
    """seqkernels, but with one number off."""

    def make(problem):
        honest = contestants.torch_contestant(problem)

        def outputs(result):
            values = {name: value.clone() for name, value in honest.outputs(result).items()}
            values["hn"].view(-1)[0] += error
            return values

        return Contestant(honest.run, outputs)

    return make


def off_by_one(problem):
    honest = contestants.torch_contestant(problem)
    return Contestant(honest.run, lambda result: {name: v + 1 for name, v in honest.outputs(result).items()})


def run(makers, case=TINY):
    rows = engine.run_case("test", case, budget=0.02, makers=makers)
    return {row.contestant: row for row in rows}


def speeds(row):
    return [row.ms, row.gflops, row.peak_share, row.speedup, row.peak_mib]


def test_no_speed_for_a_wrong_result():
    rows = run({OURS: wrong_by(1e-3), TORCH: contestants.torch_contestant})
    assert rows[OURS].check == "failed"
    assert rows[OURS].output == "hn"
    assert speeds(rows[OURS]) == [None] * 5
    assert speeds(rows[TORCH]) == [None] * 5  # nothing to compare with


def test_a_wrong_peer_is_left_out_and_the_others_are_timed():
    rows = run({OURS: contestants.torch_contestant, TORCH: contestants.torch_contestant, ORT: wrong_by(1e-3)})
    assert rows[ORT].check == "failed"
    assert speeds(rows[ORT]) == [None] * 5
    assert rows[TORCH].speedup_low <= rows[TORCH].speedup <= rows[TORCH].speedup_high
    assert rows[OURS].ms > 0
    assert rows[OURS].gflops == pytest.approx(TINY.flops / rows[OURS].ms / 1e6)


def test_a_contestant_that_raises_is_an_error_with_its_message():
    def broken(problem):
        raise RuntimeError("no such kernel")

    row = run({OURS: broken, TORCH: contestants.torch_contestant})[OURS]
    assert (row.check, row.note) == ("error", "RuntimeError: no such kernel")
    assert report.reason(row) == row.note


def test_an_error_within_rounding_is_timed():
    assert run({OURS: wrong_by(1e-8), TORCH: contestants.torch_contestant})[OURS].check == "ok"


# --- memory


def test_peak_memory_is_that_of_the_call():
    case = Case(cell="rnn", T=500, B=16, I=8, H=512)
    with memory.MemoryMeter() as meter:
        peak, method = meter.peak(case, TORCH)
        output = 4 * case.T * case.B * case.H
        assert output <= peak <= 8 * output
        if sys.platform == "linux":
            assert method == memory.VMHWM
        with pytest.raises(MemoryError, match="KeyError"):
            meter.peak(case, "nobody")
        assert meter.peak(case, TORCH)[0] >= output  # and the server lives on


# --- report


def made_up_rows(suite="quick"):
    """A run of a whole suite without the waiting."""
    rows = []
    for number, (name, case) in enumerate(cases.select(suite)):
        for contestant, ms in ((OURS, 1.0), (TORCH, 2.0), (ORT, 0.5)):
            row = engine._empty_row(name, case, contestant)
            rows.append(row)
            if number == 1:
                row.check, row.output, row.error, row.torch_error, row.allowed_error = (
                    "failed",
                    "hn",
                    0.1,
                    1e-7,
                    1e-6,
                )
                continue
            row.check, row.output, row.error, row.torch_error, row.allowed_error = "ok", "y", 2e-7, 1e-7, 1e-6
            row.ms = row.ms_low = row.ms_high = ms + number / 8
            row.rounds, row.gflops, row.peak_gflops, row.peak_share = 9, row.gflop / row.ms, 470.0, 0.5
            row.peak_mib, row.memory_method = 12.0 * ms, memory.VMHWM
            if contestant != OURS:
                row.speedup, row.speedup_low, row.speedup_high = ms, 0.9 * ms, 1.1 * ms
                row.verdict = timing.verdict(row.speedup_low, row.speedup_high)
    return rows


def made_up_report(suite="quick"):
    environment = {"seqkernels": "9.9 (here)", "torch": "2.13.0", "onnxruntime": "1.0", "cpu": "Some <CPU>"}
    environment |= {"isa active": "avx2", "torch threads": "2"}
    rows = made_up_rows(suite)
    planned = len(rows) // 3
    return report.Report(environment, "seqkernels bench", "2026-01-01 00:00:00", 60.0, planned, rows=rows)


def test_an_unsure_case_does_not_count():
    rows = made_up_rows()
    rows[1].speedup, rows[1].verdict = 1000.0, "unsure"
    one = report.versus(rows)[0]
    assert one.geomean == pytest.approx(2.0)
    assert (one.unsure, len(one.rows)) == (1, len(SUITES["quick"]) - 2)
    assert report.versus([rows[1]]) == []


def test_summary_names_mean_worst_and_best():
    torch_versus, ort_versus = report.versus(made_up_rows())
    assert torch_versus.geomean == pytest.approx(2.0)
    assert ort_versus.count("SLOWER") == len(SUITES["quick"]) - 1
    rows = made_up_rows()
    rows[1].speedup = 0.25
    assert report.versus(rows)[0].worst is rows[1]


@pytest.mark.parametrize("suite", ["quick", "packed"])
def test_html_is_whole_and_needs_nothing_from_outside(tmp_path, suite):
    pytest.importorskip("matplotlib")
    run_report = made_up_report(suite)
    page = report.write_html(run_report, tmp_path / "report.html").read_text(encoding="utf-8")
    for rows in run_report.cases:
        assert report.geometry(rows[0]) in page
    assert page.count("<svg") == page.count("</svg>") >= 4
    assert not re.search(r'(src|href)="(?!#)', re.sub(r'xlink:href="#[^"]*"', "", page))
    assert "url(http" not in page
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', page)) <= set(ids)
    assert "Some &lt;CPU&gt;" in page
    assert "#040404" not in page  # every stand-in colour became one of the page
    assert "SLOWER" in page  # against the made-up ONNX Runtime
    wrong_row = next(row for row in run_report.rows if row.check == "failed")
    assert report.reason(wrong_row) in page


def test_a_busy_machine_is_told(tmp_path):
    pytest.importorskip("matplotlib")
    run_report = made_up_report()
    assert "quiet machine" not in report.write_html(run_report, tmp_path / "report.html").read_text()
    run_report.busy = 0.4
    assert "40% of the CPUs" in report.write_html(run_report, tmp_path / "report.html").read_text()


def test_a_failed_case_shows_no_number_in_the_html(tmp_path):
    pytest.importorskip("matplotlib")
    page = report.write_html(made_up_report(), tmp_path / "report.html").read_text(encoding="utf-8")
    failed = re.search(r"<tr><td>[^<]*</td>\s*<td colspan[^>]*>no speed[^<]*</td>\s*</tr>", page)
    assert failed


def test_pictures_of_nothing_are_nothing():
    rows = [row for row in made_up_rows() if row.check == "failed"]
    for picture in (plots.speedups, plots.shares, plots.memory, plots.tokens):
        assert picture(rows) == ""
    assert plots.errors(rows) != ""  # a wrong result shows how wrong it is
    assert plots.errors([]) == ""


def test_csv_and_json_hold_the_same_rows(tmp_path):
    run_report = made_up_report()
    run_report.rows[0].error = math.inf
    with open(report.write_csv(run_report, tmp_path / "r.csv"), encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    content = json.loads(report.write_json(run_report, tmp_path / "r.json").read_text(encoding="utf-8"))
    fields = [field.name for field in dataclasses.fields(engine.Row)]
    assert list(lines[0]) == fields == list(content["rows"][0])
    assert content["schema"] == report.SCHEMA
    assert len(lines) == len(content["rows"]) == len(run_report.rows)
    assert "Infinity" not in (tmp_path / "r.json").read_text(encoding="utf-8")  # which is no JSON
    for line, row in zip(lines, content["rows"], strict=True):
        assert line["case"] == row["case"]
        assert line["ms"] == ("" if row["ms"] is None else str(row["ms"]))


def test_changes_against_an_older_run():
    def change(old, new):
        return report.Change("case", old, new).verdict

    assert change((1.0, 0.99, 1.01), (1.2, 1.1, 1.3)) == "FASTER"
    assert change((1.0, 0.99, 1.01), (0.9, 0.8, 0.98)) == "SLOWER"
    assert change((1.0, 0.99, 1.01), (1.0, 0.98, 1.02)) == "SAME"
    assert change((1.0, 0.7, 1.4), (1.0, 0.98, 1.02)) == "UNSURE"
    rows = made_up_rows()
    old = {"schema": report.SCHEMA, "rows": [dataclasses.asdict(row) for row in rows]}
    found = report.changes(old, rows)
    assert len(found) == len(SUITES["quick"]) - 1  # not the failed one


# --- the command


def arguments(folder, *more):
    return ["--filter", "GRUCell", "--budget", "0.05", "--out", str(folder), *more]


def test_the_whole_command(tmp_path, capsys):
    assert main(arguments(tmp_path / "first")) == 0
    out = capsys.readouterr().out
    (case,) = [case for _, case in cases.select("quick", "GRUCell")]
    assert case.title in out
    assert "geomean" in out or "unsure" in out  # a busy machine: intervals too wide to count the case
    assert {file.name for file in (tmp_path / "first").iterdir()} >= {"results.csv", "results.json"}
    content = json.loads((tmp_path / "first" / "results.json").read_text(encoding="utf-8"))
    ours = content["rows"][0]
    assert (ours["contestant"], ours["case"], ours["check"]) == (OURS, case.name, "ok")
    assert ours["ms"] > 0
    assert ours["peak_gflops"] > 0
    assert content["rows"][1]["speedup"] > 0

    main(arguments(tmp_path / "second", "--compare", str(tmp_path / "first" / "results.json")))
    assert re.search(r"(FASTER|SLOWER|SAME|UNSURE) .*GRUCell", capsys.readouterr().out)


def test_a_wrong_result_makes_the_command_fail(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(contestants.CONTESTANTS, OURS, off_by_one)
    assert main(arguments(tmp_path)) == 1
    out = capsys.readouterr().out
    assert "no speed" in out
    assert "WRONG" in out


def test_ctrl_c_keeps_what_is_done(tmp_path):
    command_line = [sys.executable, "-m", "seqkernels", "bench", "--filter", "forward", "--budget", "0.05"]
    process = subprocess.Popen(
        [*command_line, "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run behind "&"
    )
    seen = ""
    for line in process.stdout:
        seen += line
        if "[1/" in line:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
            break
    seen += process.stdout.read()
    assert process.wait(timeout=60) == 130, seen
    assert "interrupted" in seen
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    done = {row["case"] for row in content["rows"]}
    assert 1 <= len(done) < content["cases_planned"]
    assert all(row["check"] == "ok" for row in content["rows"])


def test_without_the_extra_packages(tmp_path, capsys, monkeypatch):
    def find_spec(name):
        return None

    monkeypatch.setattr(report, "find_spec", find_spec)
    monkeypatch.setattr(contestants, "find_spec", find_spec)
    (tmp_path / "report.html").write_text("of another run")
    assert main(arguments(tmp_path)) == 0
    out = capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"results.csv", "results.json"}
    assert 'pip install "seqkernels[bench]"' in out
    assert "report.html" in out


@pytest.mark.parametrize("content", [None, "not json", "[]", '{"schema": 0, "rows": []}'])
def test_an_older_run_that_cannot_be_read_is_told_before_measuring(tmp_path, capsys, content):
    older = tmp_path / "older.json"
    if content is not None:
        older.write_text(content)
    assert main(arguments(tmp_path / "new", "--compare", str(older))) == 2
    assert "--compare" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_told_before_measuring(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(command, "run_cases", None)
    assert main(arguments(tmp_path / "file")) == 2
    assert f"--out {tmp_path / 'file'}: " in capsys.readouterr().err


def test_an_empty_choice_says_so(capsys):
    assert main(["--filter", "transformer"]) == 2
    assert "transformer" in capsys.readouterr().err
    assert main(["--list", "--suite", "all"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(cases.select("all"))


@pytest.mark.parametrize(
    "bad",
    [
        ["--threads", "0"],
        ["--threads", "99999999999"],
        ["--budget", "-1"],
        ["--budget", "nan"],
        ["--budget", "inf"],
        ["--suite", "everything"],
    ],
    ids=" ".join,
)
def test_bad_arguments(bad, capsys):
    with pytest.raises(SystemExit) as stop:
        command.parse(bad)
    assert stop.value.code == 2
    assert bad[0] in capsys.readouterr().err


# --- suites for GPUs, on CPU tensors here


@pytest.fixture
def no_gpu(monkeypatch):
    """CPU tensors and the CPU's clock in place of the device's, rates of an imaginary GPU."""
    monkeypatch.setattr(gpu, "device_seconds", timing._turn)
    monkeypatch.setattr(gpu, "matrix_rate", lambda dtype, tf32=False: 8e14 if tf32 else 1e14)
    monkeypatch.setattr(gpu, "reread_rate", lambda size: 3e13)
    monkeypatch.setattr(gpu_attention, "ready", functools.partial(gpu_attention.ready, device="cpu"))
    monkeypatch.delitem(gpu_attention.CONTESTANTS, "FlexAttention")  # whose compiler takes its time
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def on_cpu(case):
    return dataclasses.replace(case, device="cpu")


def test_the_gpu_suite_has_the_shapes_that_others_published():
    suite = SUITES["gpu"]
    assert len({case.name for case in suite}) == len(suite) <= 220  # half a second each, and the checks
    assert {case.device for case in suite} == {"cuda"}
    modes = {"forward", "train"}
    for cell in CELLS:
        flash = {
            (c.dtype, c.mode) for c in suite if (c.cell, c.T, c.B, c.I, c.H) == (cell, 1024, 16, 768, 768)
        }
        assert flash == {(d, m) for d in ("float16", "bfloat16", "float32") for m in modes}
        assert {c.mode for c in suite if c.cell == cell and c.bidirectional and c.layers == 2} == modes
    for cell in ("lstm", "gru"):
        haste = {(c.dtype, c.mode, c.B, c.I) for c in suite if c.cell == cell and c.T == 50}
        assert len(haste) == 2 * 2 * 4 * 4
        assert {c.resets for c in suite if (c.cell, c.T, c.B, c.H) == (cell, 128, 128, 256)} == {None, 0.03}
        assert {c.H for c in suite if c.cell == cell} >= {512, 768, 1024, 1536}
        assert {c.B for c in suite if c.cell == cell} >= {1, 256, 512}
    assert {c.T for c in suite if c.fill is not None} == {10, 100, 1000, 4000}
    assert {(c.T, c.B) for c in suite if (c.cell, c.H, c.layers) == ("gru", 512, 1)} >= {(100, 64)}


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("cell", CELLS)
def test_torch_computes_resets_by_segments(cell, mode):
    case = Case(cell=cell, T=9, B=5, I=6, H=7, mode=mode, resets=0.3)
    problem = contestants.make_problem(case)
    assert 0 < problem.resets.sum() < problem.resets.numel()
    with torch.set_grad_enabled(mode == "train"):
        theirs, ours = contestants.torch_contestant(problem), contestants.seqkernels_contestant(problem)
        torch.testing.assert_close(ours.outputs(ours.run()), theirs.outputs(theirs.run()))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_segments_of_no_resets_and_of_nothing_else(share):
    problem = contestants.make_problem(Case(cell="gru", T=4, B=3, I=6, H=7, resets=share))
    theirs, ours = contestants.torch_contestant(problem), contestants.seqkernels_contestant(problem)
    with torch.no_grad():
        torch.testing.assert_close(ours.outputs(ours.run()), theirs.outputs(theirs.run()))


def test_resets_are_measured_where_torch_can_compute_them():
    with pytest.raises(ValueError, match="one direction"):
        Case(cell="gru", resets=0.1, bidirectional=True)


@pytest.mark.parametrize(
    "options", [{}, {"mode": "train"}, {"fill": 0.5, "layers": 2}, {"resets": 0.2}], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recurrent_gpu_case(no_gpu, dtype, options):
    case = dataclasses.replace(TINY, dtype=dtype, **options)
    rows = engine.run_gpu_recurrence("gpu", case, 0.02)
    names = [OURS, TORCH] + [TORCH_TF32] * (dtype == "float32")
    assert [(row.contestant, row.check) for row in rows] == [(name, "ok") for name in names]
    for row in rows:
        assert row.limit in ("matrix", "weights")
        limit = gpu_recurrence.limit(case, row.contestant == TORCH_TF32)
        assert row.limit_share == pytest.approx(1e3 * limit.seconds / row.ms)
    assert rows[0].peak_gflops == 1e5


def test_a_limit_is_the_longer_of_two_times(no_gpu):
    few, many = (Case(cell="lstm", T=10, B=B, I=512, H=512, dtype="bfloat16") for B in (1, 4096))
    assert gpu_recurrence.limit(few) == gpu_recurrence.Limit("weights", 10 * 4 * 512 * 512 * 2 / 3e13)
    assert gpu_recurrence.limit(many) == gpu_recurrence.Limit("matrix", many.flops / 1e14)
    twice = dataclasses.replace(few, mode="train", bidirectional=True)
    assert gpu_recurrence.limit(twice).seconds == pytest.approx(4 * gpu_recurrence.limit(few).seconds)


def test_weights_are_read_again_from_where_they_fit(monkeypatch):
    device = types.SimpleNamespace(
        multi_processor_count=10, shared_memory_per_multiprocessor=100, L2_cache_size=4000, clock_rate=7
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda which: device)
    monkeypatch.setattr(gpu, "copy_rate", lambda size: {1000: 2.0, 2**30: 1.0}[size])
    assert gpu.reread_rate(1000) == 10 * 128 * 7e3
    assert gpu.reread_rate(1001) == gpu.reread_rate(4000) == 2.0
    assert gpu.reread_rate(4001) == 1.0


@pytest.mark.parametrize("room", [1.0, gpu_recurrence.TF32_ROOM])
def test_who_computes_in_tf32_is_given_room(room):
    def roughly(problem):
        return dataclasses.replace(wrong_by(1e-4)(problem), room=room)

    makers = {OURS: contestants.torch_contestant, TORCH: contestants.torch_contestant, "rough": roughly}
    assert run(makers)["rough"].check == ("ok" if room > 1 else "failed")


def test_cudnn_takes_part_in_both_precisions(monkeypatch):
    seen = []

    def spy(problem):
        honest = contestants.torch_contestant(problem)

        def run():
            seen.append(torch.backends.cudnn.allow_tf32)
            return honest.run()

        return Contestant(run, honest.outputs)

    monkeypatch.setitem(contestants.CONTESTANTS, TORCH, spy)
    before = torch.backends.cudnn.allow_tf32
    makers = gpu_recurrence.contestants(TINY)
    for name in (TORCH, TORCH_TF32):
        makers[name](contestants.make_problem(TINY)).run()
    assert seen == [False, True]
    assert torch.backends.cudnn.allow_tf32 == before


def test_a_wrong_gpu_result_has_no_speed(no_gpu, monkeypatch):
    monkeypatch.setitem(contestants.CONTESTANTS, OURS, off_by_one)
    rows = engine.run_gpu_recurrence("gpu", TINY, 0.02)
    assert rows[0].check == "failed"
    assert [row.ms for row in rows] == [None] * 3
    assert "no speed: error of" in console.gpu_line(rows, 40)[0]


def test_a_lost_device_does_not_lose_the_other_rows(no_gpu, monkeypatch):
    def lost(run, fastest):
        raise RuntimeError("CUDA error: unspecified launch failure\nand many lines of advice")

    monkeypatch.setattr(gpu, "device_seconds", lost)
    rows = engine.run_gpu_recurrence("gpu", TINY, 0.02)
    assert {(row.check, row.note) for row in rows} == {
        ("error", "RuntimeError: CUDA error: unspecified launch failure")
    }
    assert "unspecified launch failure" in console.gpu_line(rows, 40)[0]


def test_an_attention_case_of_the_gpu_suite(no_gpu):
    case = gpu_attention._square(1, 2, 2, 16, 8, dtype="float32")
    rows = {row.contestant: row for row in engine.run_gpu_attention("gpu-attention", case, 0.02)}
    assert rows[TORCH].check == rows["torch without cuDNN"].check == "ok"
    assert rows[TORCH].tb_s > 0
    assert rows[OURS].check == "error"  # Triton's kernels want a GPU
    assert console.gpu_attention_line(list(rows.values()), 40)[1] == ""


def test_attention_that_torch_cannot_run_on_a_gpu_ends_no_run(monkeypatch):
    def no_memory(*args):
        raise RuntimeError("no memory\nfor scores")

    monkeypatch.setattr(gpu_attention, "ready", no_memory)
    cases = [("gpu-attention", gpu_attention._square(1, 2, 2, 16, 8))] * 2
    for rows in engine.run_gpu_cases(cases, 0.02):
        assert {row.contestant for row in rows} == gpu_attention.CONTESTANTS.keys()
        assert {(row.check, row.note) for row in rows} == {("error", "RuntimeError: no memory")}


def test_the_whole_command_on_a_gpu(no_gpu, tmp_path, capsys, monkeypatch):
    small = [Case(cell="gru", T=5, B=3, I=8, H=16, mode=mode, resets=0.2) for mode in ("forward", "train")]
    monkeypatch.setitem(cases.SUITES, "gpu", tuple(small))
    assert main(["--suite", "gpu", "--budget", "0.05", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(case.title in out for case in small)
    assert out.count("resets=20%") >= 2
    assert re.search(r"seqkernels +torch +torch in TF32", out)
    assert re.search(r"\d% +(matrix|weights) ", out)
    assert {file.name for file in tmp_path.iterdir()} == {"results.csv", "results.json"}
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["rows"]
    assert [row["contestant"] for row in rows] == [OURS, TORCH, TORCH_TF32] * 2


@pytest.mark.parametrize("suite", cases.GPU_SUITES)
def test_a_gpu_suite_without_a_gpu_says_so(suite, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(["--suite", suite]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_budgets(capsys):
    assert command.parse(["--suite", "gpu"]).budget == 0.5
    assert command.parse(["--suite", "gpu-attention"]).budget == command.parse([]).budget == 3.0


# --- what ends a run, or does not


def test_a_result_that_is_no_number_does_not_end_the_report(tmp_path):
    pytest.importorskip("matplotlib")
    rows = made_up_rows()
    rows[3].error = math.inf
    assert plots.errors(rows) != ""
    assert plots.errors(rows[3:4]) == ""


def test_a_case_that_torch_cannot_run_does_not_end_the_run():
    def broken(problem):
        raise RuntimeError("can't allocate memory")

    def late(problem):
        honest, calls = contestants.torch_contestant(problem), []

        def run():
            calls.append(1)
            if len(calls) > 2:
                raise RuntimeError("can't allocate memory")
            return honest.run()

        return Contestant(run, honest.outputs)

    for makers in (
        {OURS: contestants.torch_contestant, TORCH: broken},
        {OURS: late, TORCH: contestants.torch_contestant},
    ):
        rows = run(makers)
        assert {(row.check, row.note) for row in rows.values()} == {
            ("error", "RuntimeError: can't allocate memory")
        }


def test_a_measuring_process_that_has_ended_is_told_each_time():
    with memory.MemoryMeter() as meter:
        meter._server.kill()
        meter._server.wait()
        for _ in range(2):
            with pytest.raises(MemoryError, match="has ended"):
                meter.peak(TINY, TORCH)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_leaving_the_meter_leaves_no_process():
    case = cases.Case(cell="lstm", T=1500, B=64, I=512, H=512, mode="train")
    with memory.MemoryMeter() as meter:
        meter._server.stdin.write(
            json.dumps({"case": dataclasses.asdict(case), "contestant": TORCH, "threads": 1}) + "\n"
        )
        meter._server.stdin.flush()
        children = f"/proc/{meter._server.pid}/task/{meter._server.pid}/children"
        while not (child := open(children).read().split()):
            time.sleep(0.05)
    time.sleep(0.3)
    stat = f"/proc/{child[0]}/stat"
    alive = os.path.exists(stat) and open(stat).read().rpartition(")")[2].split()[0] != "Z"
    if alive:
        os.kill(int(child[0]), signal.SIGKILL)
    assert not alive


@pytest.mark.parametrize(
    "content", ['{"schema": 1}', '{"schema": 1, "rows": null}', '{"schema": 1, "rows": [{"case": "x"}]}']
)
def test_an_older_run_without_rows_is_told_before_measuring(tmp_path, capsys, content, monkeypatch):
    (tmp_path / "older.json").write_text(content)
    monkeypatch.setattr(command, "run_cases", None)
    assert main(arguments(tmp_path / "new", "--compare", str(tmp_path / "older.json"))) == 2
    assert "--compare" in capsys.readouterr().err


def test_a_folder_that_takes_no_files_is_told_before_measuring(tmp_path, capsys, monkeypatch):
    (tmp_path / "results.csv").mkdir()
    monkeypatch.setattr(command, "run_cases", None)
    assert main(arguments(tmp_path)) == 2
    assert f"--out {tmp_path}: " in capsys.readouterr().err


def test_what_is_done_is_kept_whatever_ends_the_run(tmp_path, monkeypatch):
    def two(cases, budget):
        yield made_up_rows()[:3]
        raise SystemExit(9)

    monkeypatch.setattr(command, "run_cases", two)
    with pytest.raises(SystemExit):
        main(["--filter", "forward", "--out", str(tmp_path)])
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 3


def test_ctrl_c_twice_keeps_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "busy", lambda: os.kill(os.getpid(), signal.SIGINT) or 0.0 if armed else 0.0)
    armed = []

    def one(cases, budget):
        yield made_up_rows()[:3]
        armed.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_cases", one)
    before = signal.getsignal(signal.SIGINT)
    assert main(["--filter", "forward", "--out", str(tmp_path)]) == 130
    assert (tmp_path / "results.json").exists()
    assert signal.getsignal(signal.SIGINT) == before


def test_nothing_measured_is_not_all_right(tmp_path, capsys):
    empty = dataclasses.replace(made_up_report(), rows=[])
    console.Console().summary(empty)
    assert "as exact as" not in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    assert "all right" not in report.write_html(empty, tmp_path / "r.html").read_text()


def test_the_legend_names_a_peer_whose_cases_are_all_unsure():
    run_report = made_up_report()
    for row in run_report.rows:
        if row.contestant == TORCH and row.verdict:
            row.verdict = "unsure"
    assert run_report.peers == [TORCH, ORT]


def test_the_header_leaves_out_what_is_not_installed(capsys):
    run_report = made_up_report()
    run_report.environment |= {"onnxruntime": "not installed"}
    console.Console().header(run_report, on_gpu=False)
    assert "onnxruntime" not in capsys.readouterr().out


def test_a_terminal_without_arrows(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-c", "from seqkernels.bench.console import Console; Console().print('1 → 2')"],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
    )
    assert (ran.returncode, ran.stdout) == (0, b"1 ? 2\n"), ran.stderr


# --- selftest


def test_selftest_passes_and_names_every_instruction_set(capsys):
    from seqkernels import _kernels

    before = torch.ops.seqkernels.get_isa()
    assert selftest.main([]) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^{isa} ", out, re.MULTILINE) for isa in _kernels.supported_isas())
    assert "all right" in out
    assert torch.ops.seqkernels.get_isa() == before


def test_selftest_finds_a_broken_kernel(capsys, monkeypatch):
    monkeypatch.setattr(selftest, "DTYPES", ("float32",))
    monkeypatch.setattr(selftest, "seqkernels_contestant", off_by_one)
    assert selftest.main([]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_selftest_finds_broken_attention(capsys, monkeypatch):
    honest = attention.runner

    def broken(problem, ours):
        run, outputs = honest(problem, ours)
        return run, (lambda r: {n: t + 1 for n, t in outputs(r).items()}) if ours else outputs

    monkeypatch.setattr(selftest, "DTYPES", ("float32",))
    monkeypatch.setattr(attention, "runner", broken)
    selftest.reference.cache_clear()
    assert selftest.main([]) == 1
    assert "SDPA" in capsys.readouterr().out
