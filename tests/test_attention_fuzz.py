"""Any combination of the features of attention is as exact as plain torch: sizes, dtypes, layouts."""

import math
from itertools import pairwise

import torch
from hypothesis import given, note
from hypothesis import strategies as st
from isas import INSTRUCTION_SETS
from tolerances import assert_as_exact
from torch import Tensor

from seqkernels.ops.attention import NO_LIMIT, attention
from seqkernels.reference import attention as reference

LENGTHS = st.sampled_from([0, 1, 1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 100, 130])
FEATURES = st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 32, 33, 64, 65, 80, 96])
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
LIMITS = st.sampled_from([NO_LIMIT, 0, 1, 5, 40])


def scattered(t: Tensor, layout: str) -> Tensor:
    """The same values, lying elsewhere."""
    if layout == "tokens first":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "in one projection":
        return torch.stack([t, torch.full_like(t, math.nan)], 3)[..., 0, :]
    if layout == "features apart":
        return torch.stack([t, torch.full_like(t, math.nan)], -1)[..., 0]
    return t


@st.composite
def problems(draw):
    """(inputs that get gradients, everything else)"""
    dtype = draw(DTYPES)
    acc = torch.promote_types(dtype, torch.float32)
    B, Hk, groups = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))
    Hq, Tq, Tk, D, Dv = Hk * groups, draw(LENGTHS), draw(LENGTHS), draw(FEATURES), draw(FEATURES)
    layouts = st.sampled_from(["as is", "as is", "tokens first", "in one projection", "features apart"])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    options = {
        "scale": draw(st.sampled_from([D**-0.5, D**-0.5, 0.0, -0.3, 1.5])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 5.0])),
        "left": draw(LIMITS),
        "right": draw(LIMITS),
    }
    kind = draw(st.sampled_from(["dense", "dense", "dense", "lengths", "packed"]))
    masks = {}
    if kind == "packed":
        counts = [(draw(LENGTHS), draw(LENGTHS)) for _ in range(draw(st.integers(0, 4)))]
        for name, column in (("q", 0), ("k", 1)):
            cu = torch.tensor([0, *(c[column] for c in counts)]).cumsum(0)
            options |= {f"cu_{name}": cu}
            if name == "q":
                Tq = int(cu[-1])
            else:
                Tk = int(cu[-1])
        B = 1
    elif kind == "lengths":
        options["len_k"] = torch.tensor([draw(st.integers(0, Tk)) for _ in range(B)], dtype=torch.int64)
    q, k, v = new(B, Hq, Tq, D), new(B, Hk, Tk, D), new(B, Hk, Tk, Dv)
    q, k, v = (scattered(t, draw(layouts)) for t in (q, k, v))
    if kind != "packed" and draw(st.booleans()):
        shape = [n if draw(st.booleans()) else 1 for n in (B, Hq, Tq, Tk)]
        sees = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.1, 0.8]))
        form = draw(st.sampled_from(["bool", "float", "float32", "-inf"]))
        if form == "bool":
            options["mask"] = sees
        elif form == "-inf":
            options["mask"] = torch.zeros(shape, dtype=dtype).masked_fill(~sees, -math.inf)
        else:
            masks["mask"] = new(*shape).to(acc if form == "float32" else dtype)
        if draw(st.booleans()) and "mask" in options:
            options["mask"] = options["mask"].expand(B, Hq, Tq, Tk)
    options["bottom_right"] = draw(st.booleans())
    if draw(st.booleans()):
        shape = (Hq,) if kind == "packed" or draw(st.booleans()) else (B, Hq)
        options["alibi"] = torch.rand(shape, generator=generator)
    few = dtype == torch.bfloat16 and Tq * groups <= 8  # rows: without dropout their kernel rounds no weights
    if not few and draw(st.booleans()):
        options["dropout"] = draw(st.sampled_from([0.1, 0.5]))
        options["rng"] = torch.randint(2**62, (2,), generator=generator)
    sinks = {"sinks": torch.randn(Hq, generator=generator).to(acc)} if draw(st.booleans()) else {}
    note(f"{dtype}, {B=} {Hq=} {Hk=} {Tq=} {Tk=} {D=} {Dv=}, {kind}")
    note({n: o.shape if isinstance(o, Tensor) and o.dim() > 1 else o for n, o in (masks | options).items()})
    return {"q": q, "k": k, "v": v} | masks | sinks, options


def run(function, inputs: dict[str, Tensor], options: dict, grad: bool) -> dict[str, Tensor]:
    leaves = {n: t.detach().requires_grad_(grad) for n, t in inputs.items()}
    out, lse = function(**leaves, **options)
    results = {"out": out, "lse": lse}
    if not grad:
        return results
    slopes = torch.Generator().manual_seed(1)
    some = {"out": out, "lse": lse.masked_fill(lse == -math.inf, 0)}
    loss = sum(
        (o.double() * torch.randint(-4, 5, o.shape, generator=slopes) / 4).sum() for o in some.values()
    )
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return results | {f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}


LN_2 = math.log(2)


def p_of(s: Tensor, lse: Tensor) -> Tensor:
    return (s / LN_2 - (lse / LN_2).nan_to_num(neginf=0)[..., None]).exp2()


class Flash(torch.autograd.Function):
    """What every flash attention computes, step by step: P twice from S and LSE, delta from O and dO.

    Powers are those of 2, LSE is natural.
    """

    @staticmethod
    def forward(ctx, s, sinks, v, drop, out_dtype):
        joined = torch.cat([s, sinks.expand(*s.shape[:-1], 1)], -1)
        lse = LN_2 * (torch.logsumexp(joined, -1) / LN_2)
        out = (p_of(s, lse) * drop @ v).to(out_dtype)
        ctx.save_for_backward(s, sinks, v, drop, lse, out)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        s, sinks, v, drop, lse, out = ctx.saved_tensors
        p, dout = p_of(s, lse), dout.to(s.dtype)
        minus_delta = dlse[..., None] - (dout * out).sum(-1, keepdim=True)
        ds = p * (dout @ v.mT * drop + minus_delta)
        dsinks = p_of(sinks.expand(*s.shape[:-1], 1), lse) * minus_delta
        return ds, dsinks.sum_to_size(sinks.shape), (p * drop).mT @ dout, None, None


def plain_flash(q, k, v, *, cu_q=None, cu_k=None, first=0, **options) -> tuple[Tensor, Tensor]:
    """The yardstick in the dtype of the inputs."""
    if cu_q is not None:
        spans = zip(pairwise([0, *cu_q.tolist()]), pairwise([0, *cu_k.tolist()]), strict=True)
        parts = [
            plain_flash(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], first=s, **options)
            for s, ((a, b), (c, d)) in enumerate(spans, -1)
        ]
        return tuple(torch.cat(p, 2) for p in zip(*parts, strict=True))
    dropout, rng, drop = options.pop("dropout", 0), options.pop("rng", None), torch.ones(())
    s, sinks = reference.logits(q, k, **options)
    if dropout:
        drop = reference.kept(rng, dropout, s.shape, first) * (1 / (1 - dropout))
    return Flash.apply(s, sinks, reference.for_each_query_head(v, q), drop.to(s.dtype), q.dtype)


def exactly(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@given(problems(), st.booleans(), st.sampled_from([1, 2, 3]), st.sampled_from(INSTRUCTION_SETS))
def test_as_exact_as_plain_torch(problem, grad, threads, isa):
    inputs, options = problem
    dtype = inputs["q"].dtype
    before = torch.get_num_threads(), torch.ops.seqkernels.get_isa()
    torch.set_num_threads(threads)
    torch.ops.seqkernels.set_isa(isa)
    note(f"{grad=}, {threads=}, {isa=}")
    try:
        ours = run(attention, inputs, options, grad)
    finally:
        torch.set_num_threads(before[0])
        torch.ops.seqkernels.set_isa(before[1])
    torchs = run(plain_flash, inputs, options, grad)
    truth = run(
        reference.attention,
        {n: exactly(t) for n, t in inputs.items()},
        {n: exactly(o) for n, o in options.items()},
        grad,
    )
    assert_as_exact(ours, torchs, truth, dtype, pooled=True)
