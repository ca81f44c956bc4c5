"""`seqkernels info` and the command line around it."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import seqkernels


def seqkernels_command(*args: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "seqkernels", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)


@functools.cache
def info(**environment: str) -> dict[str, str]:
    result = seqkernels_command("info", "--json", **environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_info_tells_what_a_bug_report_needs():
    lowest = info()["isa supported"].split(", ")[0]  # baseline, or neon on Arm
    facts = info(SEQKERNELS_CPU_ISA=lowest, OMP_NUM_THREADS="1")
    assert facts["seqkernels"].startswith(seqkernels.__version__)
    assert facts["torch"] == torch.__version__
    assert facts["torch threads"] == "1"
    assert facts["isa active"] == lowest
    assert f"SEQKERNELS_CPU_ISA={lowest}" in facts["environment"]
    assert all(facts.values()), facts


def test_info_as_text_has_the_same_lines():
    result = seqkernels_command("info")
    assert result.returncode == 0, result.stderr
    names = [line.partition("  ")[0].strip() for line in result.stdout.splitlines()]
    assert names == list(info())


def test_the_commit_of_a_checkout():
    root = Path(seqkernels.__file__).parents[1]
    if not (root / ".git").exists():
        assert info()["commit"].startswith("none")
        return
    head = subprocess.check_output(["git", "-C", root, "rev-parse", "HEAD"], text=True)
    assert head.startswith(info()["commit"].partition("-")[0])


def test_best_supported_isa_is_the_default():
    facts = info(SEQKERNELS_CPU_ISA="")
    assert facts["isa active"] == facts["isa supported"].split(", ")[-1]


def test_every_supported_isa_can_be_forced():
    for isa in info(SEQKERNELS_CPU_ISA="")["isa supported"].split(", "):
        assert info(SEQKERNELS_CPU_ISA=isa)["isa active"] == isa


def test_unknown_isa_is_an_error_that_names_the_known():
    result = seqkernels_command("info", SEQKERNELS_CPU_ISA="avx9")
    assert result.returncode != 0
    assert 'SEQKERNELS_CPU_ISA: got "avx9", expected' in result.stderr


@pytest.mark.parametrize("verb", ["bench", "info", "selftest"])
def test_help_of_every_verb(verb):
    result = seqkernels_command(verb, "--help")
    assert result.returncode == 0, result.stderr
    assert f"seqkernels {verb}" in result.stdout


def test_unknown_verb_is_an_error():
    result = seqkernels_command("lstm")
    assert result.returncode == 2
    assert "bench" in result.stderr


def test_version():
    assert seqkernels_command("--version").stdout.strip() == f"seqkernels {seqkernels.__version__}"


@pytest.mark.skipif(sys.platform == "win32", reason="closes a pipe")
def test_who_has_read_enough_gets_no_traceback():
    command = [sys.executable, "-m", "seqkernels", "bench", "--suite", "all", "--list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
