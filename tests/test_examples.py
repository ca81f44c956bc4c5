"""The examples run, and find out when something is wrong."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[1] / "examples" / "language_model.py"
SMALL = "--steps 4 --hidden 24 --width 16 --batch 4 --length 12 --vocabulary 50 --write 6".split()


def run_example(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *SMALL, *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return stop.value.code


def test_language_model_of_every_cell(monkeypatch, capsys):
    assert run_example(monkeypatch, "--cell", "all") == 0
    out = capsys.readouterr().out
    for cell in ("RNN", "GRU", "LSTM"):
        assert f"\n{cell}, 1 x 24" in out
    for line in re.findall(r"^ +[0-3] +([\d.]+) +([\d.]+)$", out, re.MULTILINE):
        assert float(line[0]) == pytest.approx(float(line[1]), abs=1e-3)
    assert out.count("tokens/s") == 3
    assert out.count("--- written by") == 6


def test_language_model_of_a_given_text(monkeypatch, capsys, tmp_path):
    text = tmp_path / "sea.txt"
    text.write_text("the sea, the sea, and nothing but the sea. " * 40, encoding="utf-8")
    assert run_example(monkeypatch, "--text", str(text), "--layers", "2") == 0
    assert "LSTM, 2 x 24" in capsys.readouterr().out


def test_language_model_notices_different_losses(monkeypatch, capsys):
    def swap_badly(model):
        with torch.no_grad():
            model.recurrent.weight_hh_l0.mul_(1.5)

    monkeypatch.setattr("seqkernels.swap_", swap_badly)
    assert run_example(monkeypatch) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--vocabulary", "1"], "--vocabulary must be at least 2, got 1"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--text", "/there/is/none"], "--text .*No such file"),
        (["--batch", "1000000"], "the text is too short"),
    ],
)
def test_arguments_that_cannot_be(monkeypatch, capsys, arguments, message):
    assert run_example(monkeypatch, *arguments) == 2
    assert re.search(message, capsys.readouterr().err)
