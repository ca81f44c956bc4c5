"""Properties of additive attention in Triton, each a function of the device: single ones, and cases that
together hold every pair of features."""

import math
import mmap
from functools import partial

import torch
from tolerances import assert_as_exact
from torch import Tensor
from triton_matrix import pairwise_cases

import seqkernels
from seqkernels import support
from seqkernels.ops import additive_attention as ops
from seqkernels.reference.additive_attention import additive_attention as reference
from seqkernels.triton import decode
from seqkernels.triton.launch_additive import additive_attention_bwd as backward
from seqkernels.triton.launch_additive import additive_attention_fwd as forward

FEATURES = {
    "queries": ("1", "2", "3", "8", "19"),
    "mask": ("none", "bool", "float", "float_keys", "float_queries"),
    "lengths": ("full", "len_k"),
    "dims": ("24:40", "7:1", "40:33"),
    "dtype": ("float32", "float16", "bfloat16"),
    "layout": ("dense", "transposed", "broadcast"),
    "splits": ("1", "3"),
    "wanted": ("all", "least"),
}
CASES = pairwise_cases(FEATURES, lambda case: False)


def check(case: dict[str, str], device: str) -> None:
    generator = torch.Generator().manual_seed(len(repr(case)))
    dtype = getattr(torch, case["dtype"])
    B, Tq, Tk = 2, int(case["queries"]), 37
    D, Dv = map(int, case["dims"].split(":"))

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def rows(*shape: int) -> Tensor:
        x = randn(*shape)
        if case["layout"] == "transposed":
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        return x[:1].expand(shape) if case["layout"] == "broadcast" else x

    given = {"q": rows(B, Tq, D), "k": rows(B, Tk, D), "v": rows(B, Tk, Dv), "w": randn(D)}
    mask = {
        "none": lambda: None,
        "bool": lambda: randn(B, Tq, Tk) > -0.5,
        "float": lambda: randn(1, Tq, Tk).float().masked_fill(randn(1, Tq, Tk) > 1, -math.inf),
        "float_keys": lambda: randn(B, 1, Tk),
        "float_queries": lambda: randn(Tq, 1)[None],
    }[case["mask"]]()
    len_k = torch.tensor([0, 21]) if case["lengths"] == "len_k" else None
    everything = case["wanted"] == "all"
    dout, dweights = rows(B, Tq, Dv), randn(B, Tq, Tk) if everything else None

    def on_device(*tensors: Tensor | None) -> list[Tensor | None]:
        return [x if x is None else x.to(device) for x in tensors]

    options = on_device(*given.values(), mask, len_k)
    split, decode.key_splits = decode.key_splits, lambda *_: int(case["splits"])
    try:
        out, weights = forward(*options, everything)
        *grads, dscores = backward(*on_device(dout, dweights), *options, everything)
    finally:
        decode.key_splits = split
    ours = {"out": out} | {f"grad_{name}": x for name, x in zip(given, grads, strict=True)}
    if everything:
        ours |= {"weights": weights, "grad_scores": dscores}
    assert all(x.numel() == 0 for x in (weights, dscores)) or everything

    def torchs(exact: bool) -> dict[str, Tensor]:
        leaves = {n: (x.double() if exact else x).detach().requires_grad_() for n, x in given.items()}
        scores = torch.zeros(B, Tq, Tk, dtype=torch.float64 if exact else torch.float32, requires_grad=True)
        bias = scores
        if mask is not None:
            bias = bias + (torch.where(mask, 0.0, -math.inf) if mask.dtype == torch.bool else mask)
        out, weights = reference(**leaves, mask=bias, len_k=len_k)
        outs, douts = (out,), (dout.to(out),)
        if everything:
            outs, douts = (out, weights), (dout.to(out), dweights.to(out))
        grads = torch.autograd.grad(outs, (*leaves.values(), scores), douts)
        found = {"out": out} | {f"grad_{n}": g for n, g in zip((*leaves, "scores"), grads, strict=True)}
        found["weights"] = weights
        return {name: found[name] for name in ours}

    ours = {name: x.cpu() for name, x in ours.items()}
    assert_as_exact(ours, torchs(False), torchs(True), dtype, pooled=True)


def inputs(device, B=2, Tq=20, Tk=37, D=24, Dv=16, dtype=torch.float32):
    shapes = (B, Tq, D), (B, Tk, D), (B, Tk, Dv), (D,)
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def tiny_and_huge_sums(device):
    """tanh keeps its relative accuracy near 0, and is 1 where e^2x is infinite."""
    q, k, v, w = inputs(device, 1, 4, 20)
    for scale in (1e-6, 1.0, 100.0, 1e30):
        given = q * scale, k * scale, v, w
        leaves = [x.double().requires_grad_() for x in given]
        out, weights = forward(*given, None, None, True)
        exact = reference(*leaves)
        torch.testing.assert_close((out.double(), weights.double()), exact, rtol=1e-5, atol=1e-5)
        dout, dweights = torch.randn_like(out), torch.randn_like(weights)
        *grads, dw, _ = backward(dout, dweights, *given, None, None, False)
        *exact_grads, exact_dw = torch.autograd.grad(exact, leaves, (dout.double(), dweights.double()))
        torch.testing.assert_close([x.double() for x in grads], exact_grads, rtol=1e-5, atol=1e-4)
        assert (dw - exact_dw).abs().max() <= 1e-5 * exact_dw.abs().max(), scale


def nothing_to_add(device):
    """No queries, no keys, no sequences, and queries that see no key: 0, never NaN."""
    for B, Tq, Tk in ((2, 0, 5), (2, 5, 0), (0, 5, 5)):
        given = inputs(device, B, Tq, Tk)
        out, weights = forward(*given, None, None, True)
        assert out.shape == (B, Tq, 16)
        assert weights.shape == (B, Tq, Tk)
        grads = backward(torch.ones_like(out), torch.ones_like(weights), *given, None, None, True)
        assert all((x == 0).all() for x in (out, *grads))
    given = inputs(device, 1, 8)
    mask = torch.ones(1, 8, 37, dtype=torch.bool, device=device)
    mask[:, 3:6] = False
    for hiding in (mask, torch.where(mask, 0.0, -math.inf)):
        out, weights = forward(*given, hiding, None, True)
        dq, *others = backward(torch.ones_like(out), torch.ones_like(weights), *given, hiding, None, True)
        assert all((x[:, 3:6] == 0).all() for x in (out, weights, dq, others[-1]))
        assert all(x.isfinite().all() for x in (out, dq, *others))


def rows_hidden_by_numbers(device):
    """Numbers like -1e9 show all keys alike in float32, and a share of few keys counts as many as it has."""
    given = inputs(device, 1, 3)
    for number in (-1e9, torch.finfo(torch.float32).min):
        mask = torch.zeros(1, 3, 37, device=device)
        mask[:, 1] = number
        leaves = [x.clone().requires_grad_() for x in given]
        exact = reference(*leaves, mask=mask)
        slopes = [torch.randn_like(x) for x in exact]
        exact_grads = torch.autograd.grad(exact, leaves, slopes)
        split = decode.key_splits
        for splits in (1, 3):
            decode.key_splits = lambda *_, splits=splits: splits
            try:
                found = forward(*given, mask, None, True)
                *grads, _ = backward(*slopes, *given, mask, None, False)
            finally:
                decode.key_splits = split
            torch.testing.assert_close(list(found), list(exact), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(grads, list(exact_grads), rtol=1e-4, atol=1e-4)


def lengths_that_lie(device):
    """What lies behind the keys is not read, whatever len_k says, and its gradients are 0."""
    q, k, v, w = inputs(device, B=3)
    outer = [torch.full((3, 60, x.size(2)), math.nan, device=device) for x in (k, v)]
    lengths = torch.tensor([7, 10**12, -3], device=device)
    inside = torch.tensor([7, 37, 0], device=device)
    for x, wide in zip((k, v), outer, strict=True):
        wide[1, :37], wide[0, :7] = x[1], x[0, :7]
    given = q, *(x[:, :37] for x in outer), w
    out, weights = forward(*given, None, lengths, True)
    exact = reference(*(x.double() for x in (q, k, v, w)), len_k=inside)
    torch.testing.assert_close((out.double(), weights.double()), exact, rtol=1e-5, atol=1e-5)
    _, dk, dv, *others = backward(torch.ones_like(out), weights, *given, None, lengths, True)
    assert all((x[0, 7:] == 0).all() and (x[2] == 0).all() for x in (dk, dv))
    assert all(x.isfinite().all() for x in (dk, dv, *others))


def additive_rows_far_apart(device):
    """Their offsets pass 2^31. They lie in memory that nobody touches otherwise."""
    T, D, row, size = 20, 16, 2**27 - 16, 5 * 2**29
    if device == "cpu":
        lazy = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        memory = torch.frombuffer(mmap.mmap(-1, 2 * size, lazy), dtype=torch.float16)
    else:
        memory = torch.empty(size, dtype=torch.float16, device=device)
    far = memory.as_strided((2, T, D), (D, row, 1))
    near, w = torch.randn(2, T, D, device=device).half(), torch.randn(D, device=device).half()
    far.copy_(near)
    results = []
    for x in (near, far):
        out, weights = forward(x[:, :3], x, x, w, None, None, True)
        results.append((out, weights, *backward(x[:, :3], None, x[:, :3], x, x, w, None, None, False)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def what_additive_refuses(device):
    q, k, v, w = inputs(device)
    double = [x.double() for x in (q, k, v, w)]
    for given, mask, len_k, words in (
        (double, None, None, "float64"),
        ((q, k.half(), v, w), None, None, "one dtype"),
        ((q, k, v[:, :5], w), None, None, "v"),
        ((q, k, v, w[:5]), None, None, "w"),
        ((q[0], k, v, w), None, None, "3 dimensions"),
        ((q, k, v, w), torch.zeros(2, 20, 37, dtype=torch.int32, device=device), None, "mask"),
        ((q, k, v, w), torch.zeros(2, 20, 3, device=device), None, "expand"),
        ((q, k, v, w), None, torch.zeros(3, dtype=torch.int64, device=device), "len_k"),
        ((q, k, v, w), None, torch.zeros(2, device=device), "int64"),
        ((q, k, v, w), None, torch.zeros(2, dtype=torch.int64, device="meta"), "where q is"),
    ):
        try:
            forward(*given, mask, len_k, False)
        except RuntimeError as error:
            assert words in str(error), (words, error)  # noqa: PT017 (no pytest in this process)
        else:
            raise AssertionError(words)


def public_additive_function(device):
    """From the function that users call to these kernels and back, twice."""
    if device == "cpu":
        support.on_gpu = lambda x: True
        ops._fwd, ops._bwd = forward, backward
    bias, mask = torch.randn(24, device=device), torch.randn(5, 37, device=device)
    tensors = (*inputs(device, Tq=5), bias, mask)
    lengths = torch.tensor([30, 9], device=device)

    def call(q, k, v, w, bias, mask):
        given = {"bias": bias, "attn_mask": mask, "key_lengths": lengths.to(q.device), "need_weights": True}
        return seqkernels.additive_attention(q, k, v, w, **given)

    leaves = [x.clone().requires_grad_() for x in tensors]
    truths = [x.double().cpu().requires_grad_() for x in tensors]
    found, exact = call(*leaves), call(*truths)
    torch.testing.assert_close([x.double().cpu() for x in found], list(exact), rtol=1e-5, atol=1e-5)
    results = []
    for outs, of in ((found, leaves), (exact, truths)):
        loss = sum(x.sin().sum() for x in outs)
        once = torch.autograd.grad(loss, of, retain_graph=True)
        first = torch.autograd.grad(loss, of, create_graph=True)
        second = torch.autograd.grad(sum((g * g).sum() for g in first), of)
        results.append([x.detach().double().cpu() for x in (*once, *first, *second)])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


ALL = (
    tiny_and_huge_sums,
    nothing_to_add,
    rows_hidden_by_numbers,
    lengths_that_lie,
    additive_rows_far_apart,
    what_additive_refuses,
    public_additive_function,
)
UNITS = {f.__name__: f for f in ALL}
UNITS |= {f"additive-{name}": partial(check, case) for name, case in CASES.items()}
