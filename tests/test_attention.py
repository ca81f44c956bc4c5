"""scaled_dot_product_attention, varlen_attention, decode_attention: torch's contract, and what is ours."""

import itertools
import math
import warnings
from functools import partial

import pytest
import torch
from peak import MIB, growth
from tolerances import FORWARD, GRADIENT, assert_as_exact
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor

import seqkernels
from seqkernels import scaled_dot_product_attention as ours
from seqkernels import support
from seqkernels.bench.attention import AttentionCase
from seqkernels.bench.memory import MemoryMeter
from seqkernels.reference import attention as reference

theirs = F.scaled_dot_product_attention
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
op_db = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db
SAMPLES = next(op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")


def qkv(*shape, keys=None, heads=None, dtype=torch.float32, grad=False):
    """q of this shape; k and v may have other numbers of keys and heads."""
    *batch, H, T, D = shape
    kv = (*batch, heads or H, T if keys is None else keys, D)
    return [torch.randn(s).to(dtype).requires_grad_(grad) for s in (shape, kv, kv)]


def with_gradients(function, leaves, *args, **kwargs) -> dict[str, Tensor]:
    """The output, and the gradients of a random linear function of it for the leaves, the first arguments."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = function(*leaves, *args, **kwargs)
    slopes = torch.randint(-4, 5, out.shape, generator=torch.Generator().manual_seed(1)) / 4
    grads = torch.autograd.grad((out.double() * slopes).sum(), leaves)
    return {"out": out} | {f"grad_{i}": g for i, g in enumerate(grads)}


def outcome(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)


# ---------------------------------------------------------------------------------------------- as in torch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("queries", "heads"), [(1, 3), (1, 1), (2, 1), (70, 3)])
def test_every_instruction_set(isa, dtype, queries, heads):
    """The kernel for few rows, with keys in parts or not, and the one for many."""
    leaves = qkv(1, 6, queries, 40, keys=530, heads=heads, dtype=dtype)
    kwargs = {"attn_mask": torch.rand(queries, 530) < 0.8, "enable_gqa": True}
    result = with_gradients(ours, leaves, **kwargs)
    torchs = with_gradients(theirs, leaves, **kwargs)
    assert_as_exact(result, torchs, with_gradients(theirs, [t.double() for t in leaves], **kwargs), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torchs_own_samples(dtype):
    count = 0
    for sample in SAMPLES.sample_inputs("cpu", dtype):
        if sample.kwargs.get("dropout_p", 0.0) == 0.0:
            count += 1
            leaves, kwargs = (sample.input, *sample.args), dict(sample.kwargs)
            mask = kwargs.pop("attn_mask", None)
            leaves = leaves if mask is None else (*leaves, mask)
            truth = with_gradients(theirs, [t.double() for t in leaves], **kwargs)
            if dtype == torch.float64:
                assert_close(with_gradients(ours, leaves, **kwargs), truth)
            else:
                out, torchs, exact = (
                    {"out": r} for r in (ours(*leaves, **kwargs), theirs(*leaves, **kwargs), truth["out"])
                )
                assert_as_exact(out, torchs, exact, dtype)
    assert count > 10


def test_gradients_of_torchs_own_samples():
    for sample in SAMPLES.sample_inputs("cpu", torch.float64, requires_grad=True):
        if sample.kwargs.get("dropout_p", 0.0) == 0.0:
            function = partial(ours, **sample.kwargs)
            inputs = (sample.input, *sample.args)
            assert gradcheck(function, inputs, fast_mode=True)
            assert gradgradcheck(function, inputs, fast_mode=True)


def seeded(seed: int, function, *args, **kwargs):
    torch.manual_seed(seed)
    return function(*args, **kwargs)


def test_dropout():
    leaves = [t.requires_grad_() for t in qkv(2, 3, 70, 8, dtype=torch.float64)]
    for p in (0.3, 1.0):
        call = partial(with_gradients, ours, leaves, dropout_p=p)
        result = seeded(3, call)
        assert all(torch.equal(a, b) for a, b in zip(result.values(), seeded(3, call).values(), strict=True))
        plain = lambda q, k, v: reference.attention(q, k, v, scale=8**-0.5, dropout=p)[0]  # noqa: B023, E731
        assert_close(result, seeded(3, partial(with_gradients, plain, leaves)))
        assert p == 1 or not torch.equal(result["out"], seeded(4, call)["out"])
    assert_close(ours(*leaves, dropout_p=1.0), theirs(*leaves, dropout_p=1.0))


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_fair(p):
    """Each weight is kept as often as every other; all of them are 1 / T."""
    T, runs = 64, 200
    q, v = torch.zeros(1, 2, T, 4), torch.eye(T).expand(1, 2, T, T)
    torch.manual_seed(0)
    kept = sum((ours(q, q, v, dropout_p=p) > 0).double() for _ in range(runs))
    sigma = (p * (1 - p) * runs) ** 0.5
    assert (kept - (1 - p) * runs).abs().max() < 5.5 * sigma  # 8192 weights
    for dims in (-1, -2, (1, 3), (2, 3)):  # rows, columns, queries of both heads, heads
        sums = kept.sum(dims)
        error = (sums - (1 - p) * runs * kept.numel() / sums.numel()).abs().max()
        assert error < 5 * sigma * (kept.numel() / sums.numel()) ** 0.5
    assert_close(ours(q, q, v, dropout_p=p).unique(), torch.tensor([0, 1 / (T * (1 - p))]))


def philox(seed: int, offset: int, b: int, h: int, i: int, j: int) -> int:
    """Philox 4x32-7 (Salmon et al. 2011), counter (key / 4, query, sequence and head, offset)."""
    word = 2**32 - 1
    n = [j // 4, i ^ (offset >> 32), b * 3 + h, offset & word]
    key = [seed & word, seed >> 32]
    for _ in range(7):
        x, y = n[0] * 0xD2511F53, n[2] * 0xCD9E8D57
        n = [y >> 32 ^ n[1] ^ key[0], y & word, x >> 32 ^ n[3] ^ key[1], x & word]
        key = [(key[0] + 0x9E3779B9) & word, (key[1] + 0xBB67AE85) & word]
    return n[j % 4]


def test_the_numbers_of_dropout():
    seed, offset = 2**61 + 2**40 + 7, 2**33 + 2**31 + 5
    kept = reference.kept(torch.tensor([seed, offset]), 0.3, (2, 3, 5, 7), first=4)
    for at in itertools.product(range(2), range(3), range(5), range(7)):
        b, *rest = at
        assert kept[at] == (philox(seed, offset, 4 + b, *rest) >= round(0.3 * 2**32))


SHAPES = {
    "2-D": ((5, 8), (7, 8), (7, 6)),
    "3-D": ((4, 5, 8), (4, 7, 8), (4, 7, 6)),
    "4-D": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 6)),
    "5-D": ((3, 2, 4, 5, 8), (3, 2, 4, 7, 8), (3, 2, 4, 7, 6)),
    "6-D": ((2, 3, 2, 1, 5, 8), (2, 3, 2, 1, 7, 8), (2, 3, 2, 1, 7, 8)),
    "one batch of keys": ((2, 4, 5, 8), (1, 4, 7, 8), (1, 4, 7, 8)),
    "one batch of queries": ((1, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "one head of keys": ((2, 4, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8)),
    "one head of queries": ((2, 1, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "one head of values": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 1, 7, 8)),
    "dims that are not there": ((5, 8), (2, 4, 7, 8), (4, 7, 8)),
    "dims that only values have not": ((2, 4, 5, 8), (2, 4, 7, 8), (4, 7, 6)),
    "five dims from two": ((5, 1, 4, 3, 8), (2, 1, 6, 8), (6, 8)),
    "no queries": ((2, 4, 0, 8), (2, 4, 7, 8), (2, 4, 7, 8)),
    "no keys": ((2, 4, 5, 8), (2, 4, 0, 8), (2, 4, 0, 8)),
    "no rows": ((0, 4, 5, 8), (0, 4, 7, 8), (0, 4, 7, 8)),
    "no heads": ((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 8)),
    "no features": ((2, 4, 5, 0), (2, 4, 7, 0), (2, 4, 7, 8)),
    "no values": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 0)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_shapes_that_torch_takes(shapes):
    leaves = [torch.randn(s, dtype=torch.float64) for s in shapes]
    with sdpa_kernel(SDPBackend.MATH):
        expected = [with_gradients(theirs, leaves, is_causal=causal) for causal in (False, True)]
    for causal, wanted in zip((False, True), expected, strict=True):
        result = with_gradients(ours, leaves, is_causal=causal)
        if leaves[0].size(-1) == 0:  # torch's path with gradients divides 0 by 0 here, its other one does not
            wanted["out"] = theirs(*leaves, is_causal=causal)
            assert_close(result["out"], wanted["out"])
        else:
            assert_close(result, wanted)


@pytest.mark.parametrize("heads", [(4, 4, 4), (4, 2, 2), (4, 1, 1), (6, 3, 2), (4, 1, 4)], ids=str)
def test_grouped_heads(heads):
    q, k, v = (torch.randn(2, h, 5, 8, dtype=torch.float64) for h in heads)
    options = {"enable_gqa": True, "is_causal": True}
    with sdpa_kernel(SDPBackend.MATH):
        expected = [with_gradients(theirs, x, **options) for x in ((q, k, v), (q[0], k[0], v[0]))]
    for x, wanted in zip(((q, k, v), (q[0], k[0], v[0])), expected, strict=True):
        assert_close(with_gradients(ours, x, **options), wanted)


MASKS = [(5, 7), (1, 7), (4, 1, 7), (4, 5, 7), (2, 1, 1, 7), (2, 4, 5, 7), (1, 4, 5, 7)]


@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "float32 for bfloat16", "expanded"])
def test_masks(shape, kind):
    dtype = torch.bfloat16 if "bfloat16" in kind else torch.float32
    q, k, v = qkv(2, 4, 5, 8, keys=7, dtype=dtype)
    mask = torch.randn(shape) if kind != "bool" else torch.rand(shape) < 0.6
    mask = mask.expand(2, 4, 5, 7) if kind == "expanded" else mask
    exact = [t.double() for t in (q, k, v)]
    if kind == "bool":
        truth, result, torchs = (
            with_gradients(f, x, mask) for f, x in ((theirs, exact), (ours, (q, k, v)), (theirs, (q, k, v)))
        )
    else:
        truth = with_gradients(theirs, (*exact, mask.double()))
        result, torchs = (with_gradients(f, (q, k, v, mask)) for f in (ours, theirs))
    assert_as_exact(result, torchs, truth, dtype, pooled=True)


@pytest.mark.parametrize("shape", [(5, 1), (2, 1, 5, 1)], ids=str)
def test_mask_that_is_the_same_for_all_keys(shape):
    """It changes nothing, and its gradient is a sum that cancels: exact as far as its terms are."""
    leaves = (*qkv(2, 4, 5, 8, keys=7), torch.randn(shape))
    exact = [t.double() for t in leaves]
    terms = with_gradients(theirs, (*exact[:3], exact[3].expand(2, 4, 5, 7)))["grad_3"].abs()
    result, torchs, truth = (
        with_gradients(f, x) for f, x in ((ours, leaves), (theirs, leaves), (theirs, exact))
    )
    (least,) = (4 * torch.finfo(torch.float32).eps * terms.sum_to_size(shape),)
    assert (result.pop("grad_3").abs() <= least).all()
    assert torchs.pop("grad_3").shape == truth.pop("grad_3").shape == shape
    assert_as_exact(result, torchs, truth, torch.float32, pooled=True)


def test_masks_of_more_dims():
    q, k, v = (torch.randn(3, 2, 4, n, 8, dtype=torch.float64) for n in (5, 7, 7))
    for shape in ((5, 7), (3, 1, 1, 5, 7), (1, 1, 4, 1, 7), (2, 1, 5, 7), (3, 2, 4, 5, 7)):
        leaves = (q, k, v, torch.randn(shape, dtype=torch.float64))
        assert_close(with_gradients(ours, leaves), with_gradients(theirs, leaves))
    assert_close(ours(q, k, v, torch.ones(3, 1, 1, 1, 7).bool()), ours(q, k, v))


@pytest.mark.parametrize(("rows", "queries", "keys"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_masks_of_nothing_on_more_dims(rows, queries, keys):
    leaves = qkv(1, rows, 2, queries, 8, keys=keys)
    for shape in ((queries, keys), (1, keys), (rows, 1, queries, 1), (1, rows, 2, queries, keys)):
        mask = torch.ones(shape, dtype=torch.bool)
        assert_close(with_gradients(ours, leaves, mask), with_gradients(theirs, leaves, mask))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)], ids=str)
def test_frozen_results_may_be_written_into(lead):
    """A view made in no_grad may not, where gradients are recorded; torch's results are none."""
    q, offset = torch.randn(*lead, 5, 8), torch.ones(1, requires_grad=True)
    with torch.no_grad():
        out = ours(q, q, q)
    expected = out + 1
    out += offset
    assert_close(out, expected)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)], ids=str)
def test_writing_into_results_is_noticed(lead):
    """Backward reads them again."""
    q = torch.randn(*lead, 5, 8, requires_grad=True)
    out = ours(q, q, q)
    out += q
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_queries_that_see_no_key_give_zero():
    q, k, v = qkv(2, 4, 5, 8, grad=True)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    for m in (mask, torch.zeros(5, 5).masked_fill(~mask, -torch.inf)):
        out, lse = ours(q, k, v, m, return_lse=True)
        assert (out[:, :, 2] == 0).all()
        assert (lse[:, :, 2] == -torch.inf).all()
        dq, dk, dv = torch.autograd.grad(out.sin().sum(), (q, k, v))
        assert (dq[:, :, 2] == 0).all()
        assert dk.isfinite().all()
        assert dv.isfinite().all()


HIDING = [-1e4, -397124374.8651747, -772323417.8225791, -1079102346.3582563, torch.finfo(torch.bfloat16).min]


def by_math(*args, **kwargs) -> Tensor:
    """torch's flash kernel takes weights from a rounded LSE: rows that are hidden by -1e9 get gradients times
    the number of keys."""
    with sdpa_kernel(SDPBackend.MATH):
        return theirs(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("hiding", HIDING)
@pytest.mark.parametrize("queries", [2, 70])
def test_queries_whose_keys_a_finite_mask_hides(dtype, hiding, queries):
    """They see all keys alike, and so do gradients, though their LSE has no digits left for log sum."""
    leaves = qkv(1, 1, queries, 16, keys=133, dtype=dtype)
    mask = torch.zeros(queries, 133, dtype=dtype)
    mask[0] = hiding
    leaves = (*leaves, mask)
    result, torchs = (with_gradients(f, leaves) for f in (ours, by_math))
    truth = with_gradients(by_math, [t.double() for t in leaves])
    assert_as_exact(result, torchs, truth, dtype)
    _, lse = ours(*leaves, return_lse=True)
    assert_close(lse[0, 0, 0].double(), torch.tensor(hiding).double(), rtol=0.01, atol=0)


@pytest.mark.parametrize("extra", ["groups", "sinks", "causal", "LSE"])
def test_what_a_finite_mask_hides_with(extra, isa):
    """Far rows beside others in a block of queries, and of several heads that share a key head."""
    kwargs = {"enable_gqa": extra == "groups"} | ({"is_causal": True} if extra == "causal" else {})
    heads, sinks = (2 if extra == "groups" else 4), torch.randn(4, dtype=torch.float64)
    mask = torch.randn(4, 70, 70, dtype=torch.float64)
    mask[:, 3::7] -= 1e9

    def call(attend, q, k, v, sinks):
        more = {"sinks": sinks} if extra == "sinks" else {}
        out, lse = attend(q, k, v, mask.to(q.dtype), return_lse=True, **kwargs, **more)
        return out + lse[..., None] / 64 if extra == "LSE" else out

    def checked(q, k, v, mask, *, is_causal=False, enable_gqa=False, return_lse, **more):
        right = 0 if is_causal else 1 << 60
        return reference.attention(q, k, v, mask=mask, scale=8**-0.5, right=right, **more)

    leaves = [*qkv(2, 4, 70, 8, heads=heads, dtype=torch.float64), sinks]
    used = leaves if extra == "sinks" else leaves[:3]
    result, truth = (
        with_gradients(lambda *x, f=f: call(f, *x, *leaves[len(x) :]), used) for f in (ours, checked)
    )
    for name, exact in truth.items():
        assert_close(result[name], exact, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("queries", [9, 70])
@pytest.mark.parametrize("peak", [1, 100, 1000])
def test_peaked_rows_of_bfloat16(isa, queries, peak):
    """One weight near 1: its rounding must not be that of its value, nor of what gradients subtract."""
    q, k, v = qkv(2, 4, queries, 32, keys=200, dtype=torch.bfloat16)
    leaves = (q * peak, k, v)
    result, torchs = (with_gradients(f, leaves) for f in (ours, theirs))
    for name, exact in with_gradients(theirs, [t.double() for t in leaves]).items():
        far = (result[name].double() - exact).norm(), (torchs[name].double() - exact).norm()
        assert far[0] <= (GRADIENT if name.startswith("grad") else FORWARD) * far[1], name


@pytest.mark.parametrize("scale", [0.0, -0.7, 3, None])
def test_any_scale(scale):
    leaves = qkv(2, 4, 5, 8)
    expected = with_gradients(theirs, [t.double() for t in leaves], scale=scale)
    result = {n: t.double() for n, t in with_gradients(ours, leaves, scale=scale).items()}
    assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("L", "S"), [(5, 5), (5, 7), (7, 5), (1, 9)])
@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")
def test_causal_biases(L, S):
    q, k, v = qkv(2, 4, L, 8, keys=S)
    for bias, diagonal in ((causal_upper_left(L, S), 0), (causal_lower_right(L, S), S - L)):
        mask = torch.ones(L, S, dtype=torch.bool).tril(diagonal)
        assert_close(ours(q, k, v, bias), theirs(q, k, v, mask))
        assert_close(ours(q, k, v, bias, softcap=1e6), theirs(q, k, v, mask), rtol=1e-4, atol=1e-5)
        with sdpa_kernel(SDPBackend.MATH):
            assert_close(ours(q, k, v, bias), theirs(q, k, v, mask))
        with pytest.raises(ValueError, match="CausalBias should not be used with causal=True"):
            ours(q, k, v, bias, is_causal=True)
    if L != S:
        with pytest.raises(RuntimeError, match="match"):
            ours(q, k, v, causal_lower_right(L + 1, S))
    assert_close(ours(q, k, v, causal_lower_right(3, 3)), theirs(q, k, v, causal_lower_right(3, 3)))


def test_a_mask_and_is_causal():
    """Both count where torch takes both."""
    q, k, v = qkv(2, 4, 5, 8)
    for mask in (torch.randn(5, 5), torch.rand(2, 1, 5, 5) < 0.7):
        assert_close(ours(q, k, v, mask, is_causal=True), theirs(q, k, v, mask, is_causal=True))


BAD_CALLS = {
    "one dim": lambda q, k, v: ((q[0, 0, 0], k, v), {}),
    "dtypes": lambda q, k, v: ((q, k.double(), v), {}),
    "devices": lambda q, k, v: ((q, k.to("meta"), v), {}),
    "integers": lambda q, k, v: ((q.long(), k.long(), v.long()), {}),
    "no tensor": lambda q, k, v: ((None, k, v), {}),
    "a list": lambda q, k, v: ((q, k, [1.0]), {}),
    "features": lambda q, k, v: ((q, k[..., :7], v), {}),
    "batches": lambda q, k, v: ((q, torch.cat([k, k]), torch.cat([v, v])), {}),
    "heads": lambda q, k, v: ((q, k[:, :2], v[:, :2]), {}),
    "groups": lambda q, k, v: ((q, k[:, :3], v[:, :3]), {"enable_gqa": True}),
    "groups of two dims": lambda q, k, v: ((q[0, 0], k[0, 0], v[0, 0]), {"enable_gqa": True}),
    "mask of integers": lambda q, k, v: ((q, k, v, torch.ones(5, 7).long()), {}),
    "mask of float64": lambda q, k, v: ((q, k, v, torch.ones(5, 7).double()), {}),
    "mask of one dim": lambda q, k, v: ((q, k, v, torch.ones(7)), {}),
    "mask of five dims": lambda q, k, v: ((q, k, v, torch.ones(1, 1, 1, 5, 7)), {}),
    "mask with too many rows": lambda q, k, v: ((q, k, v, torch.ones(6, 7)), {}),
    "mask with too many heads": lambda q, k, v: ((q[:, :1], k[:, :1], v[:, :1], torch.ones(1, 4, 5, 7)), {}),
    "dropout": lambda q, k, v: ((q, k, v), {"dropout_p": 1.5}),
    "no dropout": lambda q, k, v: ((q, k, v), {"dropout_p": None}),
    "is_causal": lambda q, k, v: ((q, k, v), {"is_causal": 1}),
    "enable_gqa": lambda q, k, v: ((q, k, v), {"enable_gqa": 1}),
    "no enable_gqa": lambda q, k, v: ((q, k, v), {"enable_gqa": None}),
    "scale": lambda q, k, v: ((q, k, v), {"scale": "x"}),
    "dropout that is no number": lambda q, k, v: ((q, k, v), {"dropout_p": "x"}),
    "mask that is a list": lambda q, k, v: ((q, k, v), {"attn_mask": [1.0]}),
    "causal mask of three dims": lambda q, k, v: ((q, k, v, torch.ones(4, 5, 7)), {"is_causal": True}),
    "causal mask, three dims": lambda q, k, v: ((q[0], k[0], v[0], torch.ones(5, 7)), {"is_causal": True}),
    "unknown": lambda q, k, v: ((q, k, v), {"causal": True}),
}


@pytest.mark.parametrize("bad", BAD_CALLS.values(), ids=BAD_CALLS)
def test_raises_what_torch_raises(bad):
    args, kwargs = bad(*qkv(2, 4, 5, 8, keys=7))
    expected = outcome(theirs, *args, **kwargs)
    assert isinstance(expected, tuple)
    result = outcome(ours, *args, **kwargs)
    if expected[0] is TypeError and "unexpected keyword" in expected[1]:
        assert result[0] is TypeError
    else:
        assert result == expected


@pytest.mark.parametrize("name", ["scale", "softcap"])
def test_numbers_have_no_gradient(name):
    """The op would take the tensor for a number and lose the gradient; torch raises for scale."""
    q, k, v = qkv(2, 4, 5, 8)
    number = torch.tensor(0.5)
    assert_close(ours(q, k, v, **{name: number}), ours(q, k, v, **{name: 0.5}))
    for extras in ({}, {"return_lse": True}):
        with pytest.raises(TypeError, match=f"'{name}' must be float, not Tensor"):
            ours(q, k, v, **{name: number.requires_grad_()}, **extras)


def test_keys_and_values_of_different_lengths():
    """torch reads beyond the values here."""
    q, k, v = qkv(2, 4, 5, 8, keys=7)
    for kwargs in ({}, {"softcap": 2.0}):
        with pytest.raises(
            RuntimeError, match="Expected key and value to have the same length, but got 7 and 6"
        ):
            ours(q, k, v[:, :, :6], **kwargs)


def test_obeys_sdpa_kernel(monkeypatch):
    q, k, v = qkv(2, 4, 5, 8)
    expected = ours(q, k, v)
    monkeypatch.setattr(seqkernels.ops.attention, "_fwd", None)
    monkeypatch.setenv("SEQKERNELS_STRICT", "1")  # what the user forbids is no fallback
    with sdpa_kernel(SDPBackend.MATH):
        assert_close(ours(q, k, v), expected)
        assert_close(ours(q, k, v, window=(None, None)), expected)
    with pytest.raises(TypeError):
        ours(q, k, v, window=(None, None))


def test_autocast():
    q, k, v = qkv(2, 4, 5, 8)
    mask = torch.randn(5, 5)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert ours(q, k, v).dtype == dtype
            assert_close(ours(q, k, v, mask), theirs(q, k, v, mask), rtol=0.02, atol=0.02)
            assert ours(q.bfloat16(), k, v.half()).dtype == dtype
            assert ours(q.double(), k.double(), v.double()).dtype == torch.float64
            lengths, rows = torch.tensor([3, 5]), [t[0].transpose(0, 1) for t in (q, k, v)]
            decoded = seqkernels.decode_attention(q, k, v, lengths)
            packed = seqkernels.varlen_attention(*rows, torch.tensor([0, 5]), torch.tensor([0, 5]), 5, 5)
            assert decoded.dtype == packed.dtype == dtype
            assert_close(packed.transpose(0, 1), ours(q[0], k[0], v[0]))
            assert_close(decoded[1:], ours(q[1:], k[1:], v[1:], is_causal=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shapes_without_memory(dtype, monkeypatch):
    """Of meta tensors, which no kernel and no fallback has to see."""
    monkeypatch.setenv("SEQKERNELS_STRICT", "1")
    q, k, v = (t.to("meta") for t in qkv(2, 4, 5, 8, heads=2, dtype=dtype))
    cu, lengths = torch.tensor([0, 2, 5], device="meta"), torch.tensor([3, 5], device="meta")
    tokens, table = [t[0].transpose(0, 1) for t in (q, k, v)], torch.zeros(2, 3, dtype=int, device="meta")
    results = [
        ours(q, k, v, enable_gqa=True, window=(1, 1)),
        seqkernels.varlen_attention(*tokens, cu, cu, 3, 3),
        seqkernels.decode_attention(q, k, v, lengths),
        seqkernels.decode_attention(q, k, v, lengths, block_table=table),
    ]
    assert [t.shape for t in results] == [q.shape, tokens[0].shape, q.shape, q.shape]
    assert all(t.is_meta and t.dtype == dtype for t in results)


@pytest.mark.parametrize("name", ["sinks", "alibi_slopes"])
def test_tensors_without_memory_are_refused(name):
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(RuntimeError, match="expected one device for all tensors, got"):
        ours(q, q, q, **{name: torch.zeros(2, device="meta")})


def test_double_backward_matches_torchs_math():
    leaves = [torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    results = []
    for function in (ours, theirs):
        with sdpa_kernel(SDPBackend.MATH) if function is theirs else warnings.catch_warnings():
            out = function(*leaves, is_causal=True)
            first = torch.autograd.grad(out.sin().sum(), leaves, create_graph=True)
            results.append((first, torch.autograd.grad(sum((g * g).sum() for g in first), leaves)))
    assert_close(*results)


@pytest.mark.filterwarnings("ignore:seqkernels falls back", "error:There is a performance drop")
def test_transforms_of_functions(monkeypatch):
    """vmap takes torch's math, whose operators have batching rules: torch's kernels would run row by row."""
    x, y = torch.randn(3, 2, 4, 5, 8), torch.randn(3, 2, 4, 5, 8)
    attend = lambda x, f: f(x, x.sin(), x.cos(), is_causal=True)  # noqa: E731
    a, b = partial(attend, f=ours), partial(attend, f=theirs)
    assert_close(torch.func.vmap(a)(x), b(x))
    grads = [torch.func.vmap(torch.func.grad(lambda x: a(x).sin().sum()))(x)]
    grads += [torch.func.grad(lambda x: b(x).sin().sum())(x)]
    assert_close(*grads)
    assert_close(*(torch.func.grad(lambda x, f=f: f(x).sin().sum())(x[0]) for f in (a, b)))
    tangent = torch.func.jvp(a, (x[0],), (y[0],))
    with sdpa_kernel(SDPBackend.MATH):
        assert_close(tangent, torch.func.jvp(b, (x[0],), (y[0],)))
    for options in ({"softcap": 2.0, "window": (2, 1)}, {"return_lse": True}):
        one = lambda x, options=options: ours(x, x.sin(), x.cos(), **options)  # noqa: E731
        assert_close(torch.func.vmap(one)(x), one(x))
    few = torch.tensor([3, 5])
    decode = lambda x: seqkernels.decode_attention(x[:, :, :1], x, x.sin(), few)  # noqa: E731
    assert_close(torch.func.vmap(decode)(x), torch.stack([decode(row) for row in x]))
    monkeypatch.setattr(support, "_told", set())
    with pytest.warns(UserWarning, match="the kernels do not know torch.vmap"):
        torch.func.vmap(a)(x)


@pytest.mark.filterwarnings("ignore:seqkernels falls back", "ignore:.*torch.jit.* is deprecated")
def test_second_derivatives_of_functions():
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    a, b = (lambda x, f=f: f(x, x.sin(), x.cos()).sin().sum() for f in (ours, theirs))
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jacrev(torch.func.jacrev(b))(x)
    assert_close(torch.func.hessian(a)(x), expected)
    assert_close(torch.func.jacrev(torch.func.jacrev(a))(x), expected)
    nested = torch.func.grad(lambda x: (torch.func.grad(a)(x) ** 2).sum())(x)
    first = torch.func.grad(a)(x)
    assert_close(nested, 2 * torch.einsum("abcdef,abc->def", expected, first))


@pytest.mark.filterwarnings("ignore:seqkernels falls back", "ignore:.*torch.jit.* is deprecated")
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_tracing_records_torchs_operator():
    q, k, v = qkv(2, 4, 5, 8)
    traced = torch.jit.trace(lambda q, k, v: ours(q, k, v), (q, k, v))
    assert "aten::scaled_dot_product_attention" in {n.kind() for n in traced.graph.nodes()}
    assert_close(traced(q, k, v), ours(q, k, v))


@pytest.mark.parametrize("is_causal", [False, True])
def test_jagged_tensors(is_causal):
    lengths = (3, 5, 1)
    q, k, v = (
        torch.nested.nested_tensor(
            [torch.randn(n, 4, 8, dtype=torch.float64) for n in lengths],
            layout=torch.jagged,
            requires_grad=True,
        )
        for _ in range(3)
    )
    k, v = (torch.nested.nested_tensor_from_jagged(t.values(), q.offsets()) for t in (k, v))
    out = ours(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=is_causal).transpose(1, 2)
    assert (out + q).shape == q.shape
    rows = zip(*(t.unbind() for t in (q, k, v)), strict=True)
    expected = torch.cat(
        [theirs(*(t.transpose(0, 1) for t in row), is_causal=is_causal).transpose(0, 1) for row in rows]
    )
    assert_close(out.values(), expected)
    grads = [torch.autograd.grad(o.sin().sum(), q)[0].values() for o in (out.values(), expected)]
    assert_close(*grads)


def jagged(*lengths: int, H: int = 4, like: Tensor | None = None) -> Tensor:
    """[B,H,ragged,8]; with the offsets of another, as torch wants keys and values to have them."""
    values = torch.randn(sum(lengths), H, 8, dtype=torch.float64)
    offsets = torch.tensor([0, *lengths]).cumsum(0) if like is None else like.offsets()
    return torch.nested.nested_tensor_from_jagged(values, offsets).transpose(1, 2)


def test_jagged_tensors_with_everything_else():
    q, k = jagged(3, 5, 1), jagged(4, 2, 7, H=2)
    v = jagged(4, 2, 7, H=2, like=k)
    options = {"enable_gqa": True, "is_causal": True, "window": (2, None), "softcap": 3.0}
    options |= {"alibi_slopes": torch.rand(4), "sinks": torch.randn(4, dtype=torch.float64)}
    out, lse = ours(q, k, v, return_lse=True, **options)
    rows = zip(*(t.unbind() for t in (q, k, v, out, lse)), strict=True)
    for a, b, c, row_out, row_lse in rows:
        assert_close((row_out, row_lse), ours(a, b, c, return_lse=True, **options))
    with sdpa_kernel(SDPBackend.MATH):
        assert_close(ours(q, k, v, **options).values(), out.values())


def test_jagged_tensors_with_other_offsets_and_slopes():
    """int32, and slopes of each row."""
    q = jagged(3, 5, 1)
    same = torch.nested.nested_tensor_from_jagged(
        q.transpose(1, 2).values(), torch.tensor([0, 3, 8, 9], dtype=torch.int32)
    ).transpose(1, 2)
    assert torch.equal(ours(same, same, same).values(), ours(q, q, q).values())
    slopes = torch.rand(3, 4)
    for row, out, slope in zip(q.unbind(), ours(q, q, q, alibi_slopes=slopes).unbind(), slopes, strict=True):
        assert_close(out, ours(row, row, row, alibi_slopes=slope))


def test_jagged_tensors_that_do_not_fit_raise_what_torch_raises():
    q, k = jagged(3, 5, 1), jagged(4, 2, 3)
    of_other_lengths, same = jagged(2, 4, 3), jagged(4, 2, 3, like=k)
    two_rows, two_heads = jagged(4, 5), jagged(4, 2, 3, H=2, like=k)
    for bad in (
        (q, k, of_other_lengths),
        (q, two_rows, two_rows),
        (q, two_heads, two_heads),
        (q, k.float(), same),
        (q, torch.randn(3, 4, 4, 8).double(), same),
    ):
        expected = outcome(theirs, *bad)
        assert isinstance(expected, tuple)
        assert outcome(ours, *bad)[0] is expected[0]
    assert_close(ours(q, k, jagged(4, 2, 3)).offsets(), q.offsets())  # equal, and not the same tensor


def test_jagged_tensors_in_one_graph():
    torch.compiler.reset()
    q, k = jagged(3, 5, 1), jagged(4, 2, 3)
    v = jagged(4, 2, 3, like=k)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_close(compiled(q, k, v).values(), ours(q, k, v).values())


def test_subclasses_go_their_own_way():
    class Loud(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return "my own" if func is theirs else super().__torch_function__(func, types, args, kwargs or {})

    q, k, v = qkv(2, 4, 5, 8)
    assert ours(q.as_subclass(Loud), k, v) == "my own"
    parameters = [torch.nn.Parameter(t) for t in (q, k, v)]
    assert_close(ours(*parameters), ours(q, k, v))


def test_subclasses_with_operators_of_their_own(monkeypatch):
    """As torch.distributed's: functions mean nothing to them, and of operators they know torch's."""
    q, k, v = qkv(2, 4, 5, 8)
    monkeypatch.setattr(seqkernels.ops.attention, "_fwd", None)
    mask = torch.randn(5, 5)
    for args in ((q, k, v), (q, k, v, mask)):
        result = ours(*(TwoTensor(t, t) for t in args))
        assert isinstance(result, TwoTensor)
        assert torch.equal(result.a, theirs(*args))


def test_inputs_are_not_modified():
    q, k, v = qkv(2, 4, 5, 8, grad=True)
    mask = torch.randn(5, 5, requires_grad=True)
    before = [(t.detach().clone(), t._version) for t in (q, k, v, mask)]
    ours(q, k, v, mask).sum().backward()
    for tensor, (value, version) in zip((q, k, v, mask), before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == version


def test_more_rows_than_a_grid_has():
    q, k, v = qkv(65_536, 1, 2, 4)
    result, expected = (with_gradients(f, (q, k, v), is_causal=True) for f in (ours, theirs))
    assert_close(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_huge_logits_as_exact_as_torch(dtype, is_causal):
    q, k, v = qkv(2, 4, 70, 32, dtype=dtype)
    leaves = (q * 100, k, v)
    truth = with_gradients(theirs, [t.double() for t in leaves], is_causal=is_causal)
    result, torchs = (with_gradients(f, leaves, is_causal=is_causal) for f in (ours, theirs))
    assert_as_exact(result, torchs, truth, dtype, pooled=True)


def test_inf_and_nan_come_through_as_in_torch():
    q, k, v = qkv(1, 1, 4, 8)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        for t in range(3):
            inputs = [x.clone() for x in (q, k, v)]
            inputs[t][0, 0, i, 0] = value
            with sdpa_kernel(SDPBackend.MATH):
                expected = theirs(*inputs)
            assert_close(ours(*inputs), expected, equal_nan=True)


def test_memory_does_not_grow_with_the_scores(tmp_path):
    """A mask of [B,1,1,S] stays one; forward and backward of 16384 x 16384 scores would take a GiB each."""
    T = 16_384
    q, k, v = qkv(1, 1, T, 8, grad=True)
    mask = torch.zeros(1, 1, 1, T, requires_grad=True)
    assert growth(lambda: ours(q, k, v, mask, is_causal=False).sum().backward()) < 200 * MIB
    assert mask.grad.shape == mask.shape


def test_memory_of_many_rows_with_one_query():
    """Not many times the 16 MiB of the result."""
    q, k, v = qkv(8192, 8, 1, 64, keys=2)
    assert growth(lambda: ours(q, k, v)) < 64 * MIB


def test_memory_of_long_bfloat16():
    """Where products read pairs, keys and values are packed, but not those of all heads at once."""
    case = AttentionCase(H=16, Tq=4096, Tk=4096, dtype="bfloat16")
    with MemoryMeter() as meter:
        assert meter.peak(case, "seqkernels")[0] < 16 << 20  # 8 MiB of it the result


# ---------------------------------------------------------------------------------------------- beyond torch


def visible(L: int, S: int, left: int | None, right: int | None, offset: int = 0) -> Tensor:
    distance = torch.arange(S) - torch.arange(L)[:, None] - offset
    ones = torch.ones(L, S, dtype=torch.bool)
    return ones & (left is None or distance >= -left) & (right is None or distance <= right)


@pytest.mark.parametrize("window", [(2, 1), (None, 2), (3, None), (0, 0), (None, None)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")
def test_window(window, is_causal):
    left, right = window
    for L, S in ((9, 9), (5, 9), (9, 5)):
        q, k, v = qkv(2, 4, L, 8, keys=S)
        mask = visible(L, S, left, 0 if is_causal else right)
        assert_close(ours(q, k, v, is_causal=is_causal, window=window), theirs(q, k, v, mask))
        if is_causal:
            lower_right = visible(L, S, left, 0, S - L)
            assert_close(ours(q, k, v, causal_lower_right(L, S), window=window), theirs(q, k, v, lower_right))


def test_alibi_is_a_mask_of_distances():
    q, k, v = qkv(2, 4, 5, 8, keys=7)
    distance = (torch.arange(7) - torch.arange(5)[:, None]).abs()
    for slopes in (torch.rand(4), torch.rand(2, 4), torch.rand(4, dtype=torch.float64)):
        mask = -slopes.float()[..., None, None] * distance
        assert_close(ours(q, k, v, alibi_slopes=slopes), theirs(q, k, v, mask.expand(2, 4, 5, 7)))


def test_slopes_are_float32_in_second_derivatives_too():
    q, k, v = (t.double().requires_grad_() for t in qkv(1, 3, 20, 8))
    loss = ours(q, k, v, alibi_slopes=torch.rand(3).double() / 3).sin().sum()
    first, again = (torch.autograd.grad(loss, q, create_graph=c, retain_graph=True) for c in (False, True))
    assert_close(again, first, rtol=1e-12, atol=1e-13)


def test_softcap():
    q, k, v = (t.double() for t in qkv(2, 4, 5, 8, keys=7))
    p = (3 * (q @ k.mT * 8**-0.5 / 3).tanh()).softmax(-1)
    assert_close(ours(q, k, v, softcap=3.0), p @ v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [1e30, 3e38, 1e39, math.inf])
def test_a_softcap_that_caps_nothing(softcap, dtype):
    q, k, v = qkv(2, 4, 5, 8, dtype=dtype)
    assert_close(ours(q, k, v, softcap=softcap), ours(q, k, v))


def test_sinks_are_keys_without_a_value():
    leaves = [t.double() for t in qkv(2, 4, 5, 8, keys=7)]
    sinks = torch.randn(4, dtype=torch.float64)

    def with_a_key_more(q, k, v, sinks):
        scores = torch.cat([q @ k.mT * 8**-0.5, sinks[:, None, None].expand(2, 4, 5, 1)], -1)
        return scores.softmax(-1)[..., :-1] @ v

    ours_with_sinks = lambda q, k, v, sinks: ours(q, k, v, sinks=sinks)  # noqa: E731
    leaves = (*leaves, sinks)
    assert_close(with_gradients(ours_with_sinks, leaves), with_gradients(with_a_key_more, leaves))


@pytest.mark.parametrize("shape", [(5, 8), (4, 5, 8), (2, 4, 5, 8), (3, 2, 4, 5, 8)], ids=str)
def test_lse(shape):
    q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))

    def our_lse(q, k):
        out, lse = ours(q, k, v, return_lse=True)
        assert out.shape == q.shape
        return lse

    plain = lambda q, k: (q @ k.mT * 8**-0.5).logsumexp(-1)  # noqa: E731
    assert_close(with_gradients(our_lse, (q, k)), with_gradients(plain, (q, k)))
    for dtype in (torch.float32, torch.bfloat16):
        assert ours(q.to(dtype), k.to(dtype), v.to(dtype), return_lse=True)[1].dtype == torch.float32


def test_everything_at_once_on_any_leading_dims():
    options = {
        "window": (3, 2),
        "softcap": 4.0,
        "alibi_slopes": torch.rand(4),
        "sinks": torch.randn(4, dtype=torch.float64, requires_grad=True),
    }
    q, k, v = (torch.randn(2, 3, h, 6, 8, dtype=torch.float64) for h in (4, 2, 2))
    mask = torch.randn(3, 1, 6, 6, dtype=torch.float64)
    out = ours(q, k, v, mask, enable_gqa=True, **options)
    for i in range(2):
        for j in range(3):
            row = ours(q[i, j], k[i, j], v[i, j], mask[j], enable_gqa=True, **options)
            assert_close(out[i, j], row)


def test_what_runs_without_kernels_is_the_reference(monkeypatch):
    q, k, v = qkv(2, 4, 5, 8)
    cu, lengths = torch.tensor([0, 2, 5]), torch.tensor([3, 5])
    calls = [
        lambda: ours(q, k, v, softcap=2.0, window=(2, 1)),
        lambda: ours(q, k, v, causal_lower_right(5, 5), return_lse=True),
        lambda: seqkernels.varlen_attention(*(t[0].mT.mT.transpose(0, 1) for t in (q, k, v)), cu, cu, 3, 3),
        lambda: seqkernels.decode_attention(q, k, v, lengths),
    ]
    expected = [call() for call in calls]
    monkeypatch.setattr(support, "why_torch", lambda x: "a test wants it")
    monkeypatch.setattr(support, "_told", set())
    with pytest.warns(UserWarning, match="falls back to torch: a test wants it"):
        assert_close([call() for call in calls], expected)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_packed_sequences(is_causal, dtype):
    lengths_q, lengths_k = [3, 0, 5, 1, 2], [4, 2, 5, 0, 1]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).to(dtype) for n in (lengths_q, lengths_k))
    q, k, v = (torch.randn(n, h, f, dtype=torch.float64) for n, h, f in ((11, 4, 8), (12, 2, 8), (12, 2, 6)))

    def packed(q, k, v):
        out, lse = seqkernels.varlen_attention(
            q, k, v, cu_q, cu_k, 5, 5, is_causal=is_causal, return_lse=True
        )
        assert lse.shape == (4, 11)
        return out

    def each_alone(q, k, v):
        rows = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
        outs = []
        for row in rows:
            a, b, c = (t.transpose(0, 1) for t in row)
            mask = visible(a.size(1), b.size(1), None, 0 if is_causal else None, b.size(1) - a.size(1))
            outs.append(theirs(a, b, c, mask, enable_gqa=True).transpose(0, 1))
        return torch.cat(outs)

    assert_close(with_gradients(packed, (q, k, v)), with_gradients(each_alone, (q, k, v)))


def test_packed_sequences_with_slopes_of_each(monkeypatch):
    cu, slopes, sequences = (
        torch.tensor([0, 3, 3, 8]),
        torch.rand(3, 4),
        (slice(0, 3), slice(3, 3), slice(3, 8)),
    )
    q, k, v = (torch.randn(8, h, 8) for h in (4, 2, 2))

    def packed(q, k, v):
        return seqkernels.varlen_attention(q, k, v, cu, cu, 5, 5, alibi_slopes=slopes)

    def each_alone(q, k, v):
        rows = [[t[s].transpose(0, 1) for t in (q, k, v)] for s in sequences]
        outs = [ours(*r, enable_gqa=True, alibi_slopes=slope) for r, slope in zip(rows, slopes, strict=True)]
        return torch.cat(outs, 1).transpose(0, 1)

    expected = with_gradients(each_alone, (q, k, v))
    assert_close(with_gradients(packed, (q, k, v)), expected)
    monkeypatch.setattr(support, "why_torch", lambda x: "a test wants it")
    monkeypatch.setattr(support, "_told", {"a test wants it"})
    assert_close(with_gradients(packed, (q, k, v)), expected)


def test_heads_in_several_passes():
    """bfloat16 packs a few key heads at a time; of each sequence and head the result is what it is alone."""
    lengths = [700, 40, 0, 1500, 300]
    cu = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = (torch.randn(2540, h, 64, dtype=torch.bfloat16) for h in (10, 5, 5))
    out = seqkernels.varlen_attention(q, k, v, cu, cu, 1500, 1500, is_causal=True)
    rows = zip(*(t.split(lengths) for t in (out, q, k, v)), strict=True)
    for result, *row in rows:
        alone = [t.transpose(0, 1) for t in row]
        assert torch.equal(result, ours(*alone, is_causal=True, enable_gqa=True).transpose(0, 1))

    q, k, v = qkv(2, 8, 2048, 64, dtype=torch.bfloat16)
    for result, *head in zip(*(t.flatten(0, 1) for t in (ours(q, k, v), q, k, v)), strict=True):
        assert torch.equal(result, ours(*head))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_lengths_that_lie_apart(dtype):
    """Expanded, or a column of something."""
    q, k, v = qkv(3, 4, 1, 8, keys=9)
    column = torch.tensor([[0, 1], [5, 1], [9, 1]], dtype=dtype)[:, 0]
    for lengths in (column, torch.tensor([5], dtype=dtype).expand(3)):
        result = seqkernels.decode_attention(q, k, v, lengths)
        assert torch.equal(result, seqkernels.decode_attention(q, k, v, lengths.clone()))
    x = torch.randn(9, 4, 8)
    packed = [seqkernels.varlen_attention(x, x, x, cu, cu, 5, 5) for cu in (column, column.clone())]
    assert torch.equal(*packed)


@pytest.mark.parametrize("Tq", [1, 3])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_decoding_from_a_cache(Tq, dtype):
    q, k, v = qkv(3, 4, Tq, 8, keys=40, heads=2)
    lengths = torch.tensor([3, 40, 17], dtype=dtype)
    rows = [(q[i], k[i, :, :n], v[i, :, :n]) for i, n in enumerate(lengths.tolist())]
    expected = torch.stack(
        [
            theirs(*row, visible(Tq, row[1].size(1), None, 0, row[1].size(1) - Tq), enable_gqa=True)
            for row in rows
        ]
    )
    for cache in (k, v):  # what lies beyond is never read
        cache[0, :, 3:] = torch.nan
        cache[2, :, 17:] = torch.nan
    result, lse = seqkernels.decode_attention(q, k, v, lengths, return_lse=True)
    assert_close(result, expected)
    assert lse.shape == (3, 4, Tq)
    by_token = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (k, v)]
    assert_close(seqkernels.decode_attention(q, *by_token, lengths), expected)
    table = torch.randperm(12).view(3, 4)
    pages = [torch.full((12, 2, 10, 8), torch.nan) for _ in range(2)]
    for page, cache in zip(pages, (k, v), strict=True):
        page[table] = cache.unflatten(2, (4, 10)).transpose(1, 2)
    assert_close(seqkernels.decode_attention(q, *pages, lengths, block_table=table), expected)
    table[0, 1:], table[2, 2:] = 999, -1  # what lies beyond is never read
    assert_close(seqkernels.decode_attention(q, *pages, lengths, block_table=table), expected)
    windowed = seqkernels.decode_attention(q, k, v, lengths, window=(4, None), softcap=5.0)
    row = [t[2:, :, :17] for t in (k, v)]
    mask = causal_lower_right(Tq, 17)
    assert_close(windowed[2:], ours(q[2:], *row, mask, enable_gqa=True, window=(4, None), softcap=5.0))


q, k, v = qkv(2, 4, 5, 8)
tokens = [t[0].transpose(0, 1) for t in (q, k, v)]
cu, lengths = torch.tensor([0, 2, 5]), torch.tensor([3, 5])
packed = partial(seqkernels.varlen_attention, *tokens, max_q=5, max_k=5)
starts = torch.tensor([0, 1, 2])
with_lengths = torch.nested.narrow(torch.randn(3, 6, 2, 8), 1, starts, starts + 2, layout=torch.jagged)
with_lengths = with_lengths.transpose(1, 2)


class Same(Tensor):
    pass


decode = partial(seqkernels.decode_attention, q, k, v)
BAD_EXTRAS = {
    "a window of one": (lambda: ours(q, k, v, window=(1,)), r"window must be \(left, right\)"),
    "a window of floats": (lambda: ours(q, k, v, window=(1.5, 0)), r"each an integer .*got \(1.5, 0\)"),
    "a window that is a number": (lambda: ours(q, k, v, window=5), r"window must be \(left, right\).*got 5"),
    "slopes in a list": (lambda: ours(q, k, v, alibi_slopes=[1.0]), r"alibi_slopes must be .*got list"),
    "sinks in a list": (lambda: ours(q, k, v, sinks=[1.0]), r"sinks must be \[4\], got list"),
    "sequences in a list": (lambda: packed([0, 5], [0, 5]), r"must be integers \[S\+1\], got list, list"),
    "lengths in a list": (lambda: decode([1, 2]), r"cache_seqlens must be integers \[2\], got list"),
    "a query of three dims": (
        lambda: seqkernels.decode_attention(q[0], k, v, lengths),
        r"must be \[B,Hq,Tq,D\], \[B,H,S,D\] and \[B,H,S,Dv\], got torch.float32 \[4,",
    ),
    "a negative window": (lambda: ours(q, k, v, window=(-1, 0)), r"window must be .*got \(-1, 0\)"),
    "no softcap": (lambda: ours(q, k, v, softcap=0.0), "softcap must be > 0 or None, got 0.0"),
    "slopes": (lambda: ours(q, k, v, alibi_slopes=torch.rand(3)), r"alibi_slopes must be \[4\] or \[2, 4\]"),
    "softcap below zero": (lambda: ours(q, k, v, softcap=-1.0), "softcap must be > 0 or None, got -1.0"),
    "softcap that is no number": (lambda: ours(q, k, v, softcap=math.nan), "softcap must be > 0 .* got nan"),
    "slopes of other sequences": (
        lambda: packed(cu, cu, alibi_slopes=torch.rand(1, 4)),
        r"alibi_slopes must be \[4\] or \[2, 4\] and get no gradient, got torch.float32 \[1, 4\]",
    ),
    "slopes of other rows": (
        lambda: ours(*[jagged(2, 3)] * 3, alibi_slopes=torch.rand(1, 4)),
        r"alibi_slopes must be \[4\] or \[2, 4\]",
    ),
    "subclasses": (
        lambda: ours(*[q.as_subclass(Same)] * 3, window=(1, 1)),
        "need torch.Tensor for all tensors .* got Same, Same, Same, bool, bool",
    ),
    "a list": (lambda: ours(q, k, [1.0], window=(1, 1)), "need torch.Tensor .* got Tensor, Tensor, list"),
    "dropout below zero": (
        lambda: ours(q, k, v, dropout_p=-0.1, return_lse=True),
        "dropout_p must be a number from 0 to 1, got -0.1",
    ),
    "dropout above one": (
        lambda: sdpa_kernel(SDPBackend.MATH)(ours)(q, k, v, dropout_p=1.5, softcap=1.0),
        "dropout_p must be a number from 0 to 1, got 1.5",
    ),
    "no bool": (lambda: ours(q, k, v, is_causal=1, softcap=1.0), "bool for is_causal .* got .*, int, bool"),
    "jagged with lengths": (
        lambda: ours(*[with_lengths] * 3, window=(1, 1)),
        r"need all tensors jagged, .* without lengths \(call contiguous\(\)\)",
    ),
    "integers": (
        lambda: ours(q.long(), k.long(), v.long(), softcap=1.0),
        "floating point .* got torch.int64",
    ),
    "packed integers": (
        lambda: seqkernels.varlen_attention(*(t.long() for t in tokens), cu, cu, 5, 5),
        "floating point .* got torch.int64",
    ),
    "slopes with gradients": (
        lambda: ours(q, k, v, alibi_slopes=torch.rand(4, requires_grad=True)),
        "no gradient",
    ),
    "sinks": (
        lambda: ours(q, k, v, sinks=torch.rand(2, 4)),
        r"sinks must be \[4\], got torch.float32 \[2, 4\]",
    ),
    "sizes": (
        lambda: ours(q, k[..., :7], v, softcap=1.0),
        "differ in dtype, device or size: got torch.float32",
    ),
    "packed in four dims": (lambda: seqkernels.varlen_attention(q, k, v, cu, cu, 5, 5), "q, k and v must be"),
    "packed heads": (
        lambda: seqkernels.varlen_attention(tokens[0], tokens[1][:, :3], tokens[2][:, :3], cu, cu, 5, 5),
        "one number of heads that divides q's",
    ),
    "float offsets": (lambda: packed(cu.float(), cu), r"must be integers \[S\+1\]"),
    "offsets of two shapes": (lambda: packed(cu, cu[:2]), r"must be integers \[S\+1\]"),
    "offsets that fall": (
        lambda: packed(torch.tensor([0, 6, 5]), cu),
        "cu_seqlens_q to rise, got 6 before 5 at 2",
    ),
    "offsets that end too early": (lambda: packed(torch.tensor([0, 2, 4]), cu), "to rise from 0 to the 5"),
    "offsets that end too late": (lambda: packed(cu, torch.tensor([0, 2, 6])), "to rise from 0 to the 5"),
    "offsets below zero": (lambda: packed(torch.tensor([-1, 2, 5]), cu), "to rise from 0 to the 5"),
    "no offsets": (lambda: packed(cu[:0], cu[:0]), "offsets|sequences"),
    "longer than the longest query": (
        lambda: seqkernels.varlen_attention(*tokens, cu, cu, 2, 5),
        r"expected cu_seqlens_q of sequences no longer than max_q = 2, got one of 3",
    ),
    "longer than the longest key": (
        lambda: seqkernels.varlen_attention(*tokens, cu, cu, 5, 1),
        r"expected cu_seqlens_k of sequences no longer than max_k = 1, got one of 3",
    ),
    "the longest below zero": (
        lambda: seqkernels.varlen_attention(*tokens, cu, cu, -1, 5),
        "max_q and max_k must be the longest sequences, got -1 and 5",
    ),
    "lengths of one row": (lambda: decode(lengths[:1]), r"cache_seqlens must be integers \[2\]"),
    "float lengths": (lambda: decode(lengths.float()), r"cache_seqlens must be integers \[2\]"),
    "lengths beyond the cache": (
        lambda: decode(torch.tensor([3, 6])),
        "^expected cache_seqlens from 0 to the 5 keys, got 6",
    ),
    "lengths beyond the pages": (
        lambda: decode(torch.tensor([3, 6]), block_table=torch.zeros(2, 1).long()),
        "from 0 to the 5 keys, got 6",
    ),
    "lengths below zero": (lambda: decode(torch.tensor([-3, 5])), "from 0 to the 5 keys, got -3"),
    "a cache of three dims": (lambda: seqkernels.decode_attention(q, k[0], v[0], lengths), "differ in dtype"),
    "a cache of other rows": (
        lambda: seqkernels.decode_attention(q, k[:1], v[:1], lengths),
        "differ in dtype",
    ),
    "a table of one dim": (lambda: decode(lengths, block_table=lengths), r"block_table must be integers"),
    "a table of other rows": (
        lambda: decode(lengths, block_table=torch.zeros(3, 1).long()),
        r"block_table must be integers \[2,blocks\], got torch.int64 \[3, 1\]",
    ),
    "a table of bytes": (
        lambda: decode(lengths, block_table=torch.zeros(2, 1).byte()),
        r"block_table must be integers \[2,blocks\], got torch.uint8",
    ),
    "pages of three dims": (
        lambda: seqkernels.decode_attention(q, k[0], v[0], lengths, block_table=torch.zeros(2, 1).long()),
        r"caches in pages must be \[pages,H,page size,D or Dv\]",
    ),
    "no cache": (
        lambda: seqkernels.decode_attention(q, k, None, lengths),
        r"q, k_cache and v_cache must be \[B,Hq,Tq,D\]",
    ),
    "a table in a list": (
        lambda: decode(lengths, block_table=[[0], [1]]),
        r"block_table must be integers \[2,blocks\], got list",
    ),
    "no values": (
        lambda: seqkernels.varlen_attention(q[0], q[0], None, cu, cu, 3, 3),
        r"q, k and v must be \[N,Hq,D\]",
    ),
    "no pages at all": (
        lambda: seqkernels.decode_attention(q, k[:0], v[:0], lengths, block_table=torch.zeros(2, 1).long()),
        r"block_table must hold numbers of pages",
    ),
    "pages that are not there": (
        lambda: decode(lengths, block_table=torch.tensor([[0], [7]])),
        r"block_table must hold numbers of pages, 0 to 1, up to the length, got \[7\]",
    ),
    "pages below zero": (
        lambda: decode(lengths, block_table=torch.tensor([[0], [-1]])),
        r"block_table must hold numbers of pages, 0 to 1, up to the length, got \[-1\]",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD_EXTRAS.values(), ids=BAD_EXTRAS)
def test_bad_arguments_get_an_error(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert ".cpp" not in str(error.value)


def test_options_of_a_wrong_type():
    for options, message in (
        ({"scale": "x"}, "argument 'scale' must be float, not str"),
        ({"softcap": "x"}, "argument 'softcap' must be float, not str"),
        ({"dropout_p": None}, "dropout_p must be a number from 0 to 1, got None"),
    ):
        with pytest.raises(TypeError, match=message) as error:
            ours(q, k, v, return_lse=True, **options)
        assert "\n" not in str(error.value)
    assert_close(ours(q, k, v, window=(2**70, 1)), ours(q, k, v, window=(None, 1)))
