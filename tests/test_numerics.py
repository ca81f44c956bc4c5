"""Exactness where it is hard, on all instruction sets and numbers of threads; the same bits every time."""

import copy
import gc
import resource
import statistics
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from devices import everywhere
from peak import resident
from tolerances import FORWARD, GRADIENT, assert_as_exact, error, floor
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close
from twins import KINDS, run, run_exactly, states, twins

import seqkernels

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
kinds = pytest.mark.parametrize("kind", KINDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check(kind_module: tuple[nn.Module, nn.Module], x, hx=None, grad: bool = True) -> None:
    """Ours is as exact as torch's twin of it."""
    ours, theirs = kind_module
    dtype = next(theirs.parameters()).dtype
    result = run(ours, x, hx, grad)
    # oneDNN has no training in float16; torch's loop of single ops has
    with torch.backends.mkldnn.flags(enabled=dtype != torch.float16):
        expected = run(theirs, x, hx, grad)
    assert_as_exact(result, expected, run_exactly(theirs, x, hx, grad), dtype)


def test_fresh_memory_is_full_of_nan():
    """What conftest.py promises; else tests here would miss memory that no kernel writes."""
    assert torch.empty(8).isnan().all()
    assert torch.ones(2, 2).new_empty(3, 3).isnan().all()


# ------------------------------------------------------------------------------------------ instruction sets


SHAPES = [
    # T, B, I, H, layers, bidirectional
    (7, 1, 40, 64, 2, False),
    (5, 3, 33, 47, 1, True),
    (9, 16, 64, 128, 1, False),
    (3, 70, 20, 160, 1, True),
]


@kinds
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set(isa, kind, dtype, shape):
    T, B, I, H, layers, bidirectional = shape  # noqa: E741
    pair = twins(kind, I, H, layers, bidirectional=bidirectional, dtype=dtype)
    check(pair, torch.randn(T, B, I).to(dtype), states(pair[0], B))


@kinds
def test_every_instruction_set_with_packed_sequences(isa, kind):
    pair = twins(kind, 33, 48, 2, bidirectional=True)
    lengths = torch.randint(1, 30, (40,)).sort(descending=True).values
    check(pair, pack_padded_sequence(torch.randn(30, 40, 33), lengths), states(pair[0], 40))


@kinds
def test_every_instruction_set_with_cells(isa, kind):
    ours, theirs = getattr(seqkernels, f"{kind}Cell")(33, 47), getattr(nn, f"{kind}Cell")(33, 47)
    ours.load_state_dict(theirs.state_dict())
    for rows in (1, 2, 9, 70):
        x = torch.randn(rows, 33)
        with torch.no_grad():
            assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_unknown_instruction_set():
    with pytest.raises((RuntimeError, ValueError), match="sse5"):
        torch.ops.seqkernels.set_isa("sse5")


# ------------------------------------------------------------------------------------------ threads


@kinds
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_threads(kind, count, threads):
    threads(count)
    for T, B, H, bidirectional in (
        (6, 1, 300, False),
        (6, 2, 70, True),
        (5, 40, 96, True),
        (20, 7, 128, False),
        (1, 40, 230, True),  # one step: blocks in turn, whoever asks
        (9, 70, 100, False),  # several chunks of backward
        (4, 1100, 5, True),  # a thread's rows in parts
        (1, 1100, 5, False),
    ):
        pair = twins(kind, 48, H, bidirectional=bidirectional)
        check(pair, torch.randn(T, B, 48), states(pair[0], B))
    pair = twins(kind, 33, 48, bidirectional=True)
    check(pair, pack_padded_sequence(torch.randn(9, 12, 33), [9, 9, 9, 8, 7, 7, 6, 3, 3, 2, 1, 1]))
    check(pair, pack_padded_sequence(torch.randn(3, 800, 33), [3] * 300 + [2] * 300 + [1] * 200))


@everywhere
@kinds
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_every_time(kind, count, dtype, threads):
    threads(count)
    module = getattr(seqkernels, kind)(40, 72, 2, bidirectional=True).to(dtype)
    for T, B in (12, 1), (12, 3), (12, 33), (1, 33):
        x, hx = torch.randn(T, B, 40).to(dtype), states(module, B)
        first = run(module, x, hx, True)
        for _ in range(8):
            again = run(module, x, hx, True)
            assert all(torch.equal(again[name], first[name]) for name in first)


@everywhere
@kinds
def test_calls_from_many_python_threads(kind):
    """Calls at the same time share no scratch memory."""
    module = getattr(seqkernels, kind)(24, 40, bidirectional=True)
    inputs = [torch.randn(15, B, 24) for B in (1, 3, 8, 30)]
    expected = [run(module, x, None, True) for x in inputs]

    def work(i: int) -> bool:
        results = (run(copy.deepcopy(module), inputs[i].detach(), None, True) for _ in range(20))
        return all(torch.equal(r[n], expected[i][n]) for r in results for n in r)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def faults_of(call, count: int) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@kinds
def test_threads_that_are_not_woken_take_no_memory(kind, threads):
    """A layer too small for a second thread, on a machine with many: scratch for all would be fresh pages."""
    module, x = getattr(seqkernels, kind)(32, 32), torch.randn(16, 1, 32, requires_grad=True)
    threads(256)

    def call():
        module(x)[0].sum().backward()

    faults_of(call, 20)
    assert faults_of(call, 100) < 100


def test_scratch_of_many_threads_is_kept(threads):
    """64 threads take more than 64 MiB; fresh from the system that was 42 faults a call, in huge pages."""
    module, x = seqkernels.LSTM(64, 64), torch.randn(8, 512, 64)
    threads(64)

    def call():
        with torch.no_grad():
            module(x)

    faults_of(call, 3)
    assert faults_of(call, 5) < 50


# ------------------------------------------------------------------------------------------ long and extreme


@everywhere
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 16, 256, 4096])
def test_error_does_not_grow_faster_than_torchs(kind, dtype, T):
    torch.manual_seed(T)
    pair = twins(kind, 16, 32, dtype=dtype)
    check(pair, torch.randn(T, 2, 16).to(dtype), grad=T <= 256 or dtype == torch.float32)


def scaled(module: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(factor)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [30.0, 1e-4])
def test_saturated_and_tiny_gates(kind, dtype, factor):
    pair = twins(kind, 17, 33, dtype=dtype)
    for module in pair:
        scaled(module, factor)
    check(pair, torch.randn(2, 5, 17).to(dtype), states(pair[0], 5))  # more steps would be chaos


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gates_of_a_thousand(kind, dtype):
    """Few gates are not saturated, and those multiply errors by a hundred: one draw says little, so the
    medians of 31 are compared."""
    draws = []
    for _ in range(31):
        ours, theirs = twins(kind, 17, 33, dtype=dtype)
        for module in (ours, theirs):
            scaled(module, 1e3)
        x, hx = torch.randn(2, 5, 17).to(dtype), states(ours, 5)
        truth, result = run_exactly(theirs, x, hx, True), run(ours, x, hx, True)
        with torch.backends.mkldnn.flags(enabled=dtype != torch.float16):  # as in `check`
            expected = run(theirs, x, hx, True)
        draws.append([{name: error(r[name], truth[name]) for name in truth} for r in (result, expected)])
    for name in truth:
        own, torchs = (statistics.median(draw[i][name] for draw in draws) for i in (0, 1))
        k = GRADIENT if name.startswith("grad") else FORWARD
        assert own <= k * torchs + floor(dtype, truth[name]), (name, own, torchs)


@everywhere
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logits_of_a_billion(kind, dtype):
    """Here every gate is 0, 1 or -1, and the derivatives vanish without a nan."""
    pair = twins(kind, 17, 33, dtype=dtype)
    x = 1e9 * torch.randn(6, 5, 17).to(dtype)
    assert all(value.isfinite().all() for value in run(pair[0], x, None, True).values())
    check(pair, x)


@everywhere
@kinds
def test_denormal_numbers(kind):
    pair = twins(kind, 17, 33)
    check(pair, 1e-40 * torch.randn(6, 5, 17), states(pair[0], 5, 1e-41))


BAD_NUMBERS = [float("inf"), float("-inf"), float("nan")]


@everywhere
@kinds
@pytest.mark.parametrize("bad", BAD_NUMBERS)
@pytest.mark.parametrize("where", ["x", "h_0", "weight_hh_l0", "bias_ih_l0"])
def test_inf_and_nan_go_where_torchs_go(kind, bad, where):
    ours, theirs = twins(kind, 17, 33)
    x, hx = torch.randn(6, 5, 17), states(ours, 5)
    if where in ("x", "h_0"):
        (x[2, 3] if where == "x" else hx[0][0, 3])[7] = bad
    else:
        for module in (ours, theirs):
            getattr(module, where).data.view(-1)[9] = bad
    assert_close(run(ours, x, hx), run(theirs, x, hx), equal_nan=True)


@everywhere
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays_in_its_row(kind, dtype):
    ours, _ = twins(kind, 17, 33, dtype=dtype)
    for B in (1, 2, 5, 20):
        x = torch.randn(6, B, 17).to(dtype)
        clean = run(ours, x)["y"]
        x[2, B // 2, 7] = torch.nan
        result = run(ours, x)["y"]
        assert result[2:, B // 2].isnan().all()
        result[2:, B // 2] = clean[2:, B // 2]
        assert torch.equal(result, clean)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_relu_overflows_like_torchs(dtype):
    ours, theirs = twins("RNN", 5, 8, nonlinearity="relu", dtype=dtype)
    for module in (ours, theirs):
        for parameter in module.parameters():
            parameter.data.abs_().mul_(40)
    x = torch.rand(60, 3, 5).to(dtype)
    result, expected = run(ours, x), run(theirs, x)
    assert expected["y"][-1].isinf().all()
    assert_close(result["y"], expected["y"], rtol=1e-2, atol=1e-2)


# ------------------------------------------------------------------------------------------ memory


@kinds
def test_memory_does_not_grow(kind):
    """A thousand calls of changing sizes; torch's own LSTM keeps something for every size."""
    module = getattr(seqkernels, kind)(16, 24, bidirectional=True)
    frozen = getattr(seqkernels, kind)(16, 24).requires_grad_(False)

    def calls(count: int) -> None:
        for i in range(count):
            x = torch.randn(1 + i % 10, 1 + i % 7, 16)
            output: Tensor = module(x)[0]
            output.sum().backward()
            frozen.prepack_()(x)
            module.zero_grad()
        gc.collect()

    calls(300)
    before = resident()
    calls(1000)
    assert resident() - before < 4 << 20
