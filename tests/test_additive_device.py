"""Additive attention on a device: as on the CPU, the same bits every time, in CUDA graphs.

The pairs of features and single properties of the Triton kernels are in test_triton.py, on a GPU too.
"""

import pytest
import torch
from devices import NEEDS_TRITON
from torch import Tensor
from torch.library import opcheck
from torch.testing import assert_close

import seqkernels
from seqkernels import triton
from seqkernels.ops import additive_attention as ops

pytestmark = NEEDS_TRITON
SHAPES = {  # B, Tq, Tk, D, Dv
    "training": (4, 100, 150, 256, 128),
    "ragged": (2, 77, 131, 50, 90),
    "one query": (3, 1, 2000, 512, 1024),
    "few queries": (2, 6, 700, 128, 64),
    "wide": (1, 20, 40, 1000, 2000),
}
MASKS = {"none": None, "bool": (0, 1, 1), "float": (1, 1, 1), "keys": (1, 0, 1), "queries": (0, 1, 0)}


def given(shape: str, mask: str = "none", lengths: bool = False) -> tuple[list[Tensor], dict]:
    """Leaves and options, on the CPU."""
    B, Tq, Tk, D, Dv = SHAPES[shape]
    leaves = [torch.randn(s) for s in ((B, Tq, D), (B, Tk, D), (B, Tk, Dv))] + [torch.randn(D) * D**-0.5]
    options: dict = {"need_weights": True}
    if lengths:
        options["len_k"] = torch.arange(B) * Tk // B
    if MASKS[mask]:
        full = [n if there else 1 for n, there in zip((B, Tq, Tk), MASKS[mask], strict=True)]
        if mask == "bool":
            options["mask"] = torch.rand(full) < 0.7
        else:
            leaves.append(torch.randn(full))
    return leaves, options


def run(leaves: list[Tensor], options: dict) -> list[Tensor]:
    """Outputs, and gradients of a random linear function of them."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    q, k, v, w, *mask = leaves
    outs = ops.additive_attention(q, k, v, w, **({"mask": mask[0]} if mask else {}), **options)
    generator = torch.Generator().manual_seed(1)
    slopes = [torch.randn(t.shape, generator=generator).to(t) for t in outs]
    return [*outs, *torch.autograd.grad(outs, leaves, slopes)]


def on_gpu(values):
    if isinstance(values, dict):
        return {name: on_gpu(value) for name, value in values.items()}
    return (
        [on_gpu(x) for x in values] if isinstance(values, list) else getattr(values, "cuda", lambda: values)()
    )


@pytest.mark.parametrize("dtype", triton.DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_on_the_cpu(shape, mask, lengths, dtype):
    """Half types round P before one product and take tanh with 11 bits."""
    leaves, options = given(shape, mask, lengths)
    leaves = [t.to(dtype) for t in leaves]
    truth = run([t.double() for t in leaves], options)
    allowed = (32 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps
    for found, exact in zip(run(on_gpu(leaves), on_gpu(options)), truth, strict=True):
        error = (found.double().cpu() - exact).abs().max()
        assert error <= allowed * max(1.0, exact.abs().max().item()), error


@pytest.mark.parametrize("dtype", triton.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_every_time(shape, dtype):
    leaves, options = on_gpu(list(given(shape, "float")))
    leaves = [t.to(dtype) for t in leaves]
    first = run(leaves, options)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run(leaves, options), strict=True))


def test_nothing_waits_for_the_device():
    leaves, options = on_gpu(list(given("few queries", "bool", True)))
    expected = run(leaves, options)
    slopes = [torch.ones_like(t) for t in expected[:2]]
    arguments = (*leaves, options["mask"], options["len_k"])
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = ops._fwd(*arguments, True)
        ops._bwd(*slopes, *arguments, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(list(found), expected[:2])


@pytest.mark.parametrize("shape", ["training", "one query"])
def test_graph_reads_new_values(shape):
    (q, k, v, _), _ = on_gpu(list(given(shape)))
    module = seqkernels.AdditiveAttention(q.size(2), k.size(2), 64, device="cuda")
    lengths = torch.full((q.size(0),), 30, device="cuda")

    def call():
        with torch.no_grad():
            return module(q, k, v, key_lengths=lengths)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for n in (1, 40):
        q.copy_(torch.randn_like(q))
        lengths.fill_(n)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, call(), strict=True))


def test_opcheck():
    (q, k, v, w, mask), _ = on_gpu(list(given("ragged", "float")))
    lengths = torch.tensor([5, 131], device="cuda")
    out, weights = ops._fwd(q, k, v, w, mask, lengths, True)
    assert set(opcheck(ops._fwd, (q, k, v, w, mask, lengths, True)).values()) == {"SUCCESS"}
    backward = (torch.ones_like(out), torch.ones_like(weights), q, k, v, w, mask, lengths, True)
    assert set(opcheck(ops._bwd, backward).values()) == {"SUCCESS"}
