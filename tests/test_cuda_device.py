"""CUDA kernels on a device: parity with the CPU ops, graph capture, the same bits every time."""

import pytest
import torch
from tolerances import assert_as_exact
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close
from twins import KINDS, run, run_exactly, states, twins

import seqkernels
from seqkernels import support

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        not support.has_cuda_kernels(), reason="this build has no CUDA kernels: no nvcc >= 12.8"
    ),
]
kinds = pytest.mark.parametrize("kind", KINDS)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = [(1, 1, 1), (20, 3, 33), (50, 8, 128), (30, 32, 512), (12, 70, 200), (10, 16, 1024)]


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def on_device(module, x, hx, **options):
    hx = tuple(h.cuda() for h in hx)
    return {n: t.cpu() for n, t in run(module.cuda(), x.to("cuda"), hx, True, **options).items()}


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "B", "H"), SIZES, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_as_exact_as_torch_on_the_cpu(kind, dtype, T, B, H, bidirectional):
    ours, theirs = twins(kind, 40, H, dtype=dtype, bidirectional=bidirectional)
    x, hx = torch.randn(T, B, 40).to(dtype), states(theirs, B)
    expected, exact = run(theirs, x, hx, True), run_exactly(theirs, x, hx, True)
    assert_as_exact(on_device(ours, x, hx), expected, exact, dtype, pooled=True)


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_sequences(kind, dtype):
    ours, theirs = twins(kind, 40, 96, 2, dtype=dtype, bidirectional=True)
    lengths = torch.randint(1, 30, (24,))
    x, hx = torch.randn(30, 24, 40).to(dtype), states(theirs, 24)
    x = pack_padded_sequence(x, lengths, enforce_sorted=False)
    expected, exact = run(theirs, x, hx, True), run_exactly(theirs, x, hx, True)
    assert_as_exact(on_device(ours, x, hx), expected, exact, dtype, pooled=True)


@kinds
@pytest.mark.parametrize("extra", ["lengths", "resets", "recompute", "return_cell_states"])
def test_extras_as_on_the_cpu(kind, extra):
    module = getattr(seqkernels, kind)(40, 200, bidirectional=True)
    x, hx = torch.randn(20, 24, 40), states(module, 24)
    options = {
        "lengths": {"lengths": torch.randint(0, 21, (24,))},
        "resets": {"resets": torch.rand(20, 24) < 0.2},
    }
    if extra == "return_cell_states" and kind == "LSTM":
        options[extra] = {extra: True}
    module.recompute = extra == "recompute"
    expected = run(module, x, hx, True, **options.get(extra, {}))
    assert_close(on_device(module, x, hx, **options.get(extra, {})), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:.*oneDNN")
def test_projections(dtype):
    ours, theirs = twins("LSTM", 40, 96, dtype=dtype, proj_size=24, bidirectional=True)
    x, hx = torch.randn(9, 7, 40).to(dtype), states(theirs, 7)
    expected, exact = run(theirs, x, hx, True), run_exactly(theirs, x, hx, True)
    assert_as_exact(on_device(ours, x, hx), expected, exact, dtype, pooled=True)


@kinds
def test_cells(kind):
    module = getattr(seqkernels, f"{kind}Cell")(40, 96)
    x, hx = torch.randn(7, 40), tuple(torch.randn(7, 96) for _ in range(2 if kind == "LSTM" else 1))
    expected = module(x, hx if kind == "LSTM" else hx[0])
    cuda = tuple(h.cuda() for h in hx)
    ours = module.cuda()(x.cuda(), cuda if kind == "LSTM" else cuda[0])
    for a, b in zip(
        ours if kind == "LSTM" else (ours,), expected if kind == "LSTM" else (expected,), strict=True
    ):
        assert_close(a.cpu(), b, rtol=1e-5, atol=1e-5)


@kinds
@pytest.mark.parametrize("H", [64, 768, 4096])  # one block, several, step by step
def test_graph_capture(kind, H):
    module = getattr(seqkernels, kind)(64, H).cuda().bfloat16().requires_grad_(False)
    x = torch.randn(6, 4, 64, device="cuda", dtype=torch.bfloat16)
    expected = module(x)[0]
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        module(x)
    stream.synchronize()
    with torch.cuda.graph(graph):
        y = module(x)[0]
    for _ in range(3):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_250_runs_give_the_same_bits(kind, dtype):
    module = getattr(seqkernels, kind)(64, 512, bidirectional=True).cuda().to(dtype)
    x = torch.randn(20, 24, 64).to(dtype)
    hx = states(module.cpu(), 24)
    first = on_device(module, x, hx)
    for _ in range(249):
        again = on_device(module, x, hx)
        assert all(torch.equal(again[name], first[name]) for name in first)


@kinds
def test_explain_says_the_plan(kind):
    module = getattr(seqkernels, kind)(64, 512).cuda().bfloat16()
    x = torch.randn(4, 8, 64, device="cuda", dtype=torch.bfloat16)
    assert "persistent in" in seqkernels.explain(module, x)
