"""The cases of `seqkernels bench` for pytest-benchmark, as a gate against getting slower:

    pytest bench -k train-seqkernels --benchmark-save=before
    pytest bench -k train-seqkernels --benchmark-compare --benchmark-compare-fail=median:5%

Names are <suite>-<contestant>-<case>. To compare with torch and ONNX Runtime use `seqkernels bench`, which
calls them all in turn; here each runs alone, and a machine that slows down in between is unfair to somebody.
"""

import pytest
import torch

from seqkernels.bench.cases import GPU_SUITES, SUITES
from seqkernels.bench.contestants import CONTESTANTS, contestants_for, make_problem

RUNS = [
    pytest.param(case, name, id=f"{suite}-{name}-{case.name}")
    for suite, cases in SUITES.items()
    if suite not in GPU_SUITES
    for case in cases
    for name in contestants_for(case)
]


@pytest.mark.parametrize(("case", "name"), RUNS)
def test_speed(benchmark, case, name):
    benchmark.group = case.name
    benchmark.extra_info["gflop"] = case.flops / 1e9
    with torch.set_grad_enabled(case.mode == "train"):
        benchmark(CONTESTANTS[name](make_problem(case)).run)
