"""Additive attention: as exact as torch, differentiable twice, one graph, and errors that say what to do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import apart, with_one_on_meta
from peak import MIB, growth
from tolerances import assert_as_exact
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.export import Dim, export
from torch.library import opcheck
from torch.testing import assert_close

import seqkernels
from seqkernels import additive_attention as ours
from seqkernels.nn import _base
from seqkernels.reference import additive_attention as reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Decoding, few queries and many, tiles of queries, blocks of keys, features that fill no vector.
SIZES = [
    (2, 1, 300, 33, 7),
    (1, 1, 1000, 64, 64),
    (3, 7, 20, 16, 5),
    (2, 9, 70, 40, 24),
    (1, 130, 65, 24, 33),
    (5, 8, 1, 1, 1),
]
NAMES = ("query", "key", "value", "v", "bias")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def problem(B, Tq, Tk, D, Dv, dtype=torch.float32, scale=1.0) -> dict[str, Tensor]:
    shapes = ((B, Tq, D), (B, Tk, D), (B, Tk, Dv), (D,), (D,))
    tensors = {n: torch.randn(s) for n, s in zip(NAMES, shapes, strict=True)}
    return {n: (t * scale if n in ("query", "key") else t).to(dtype) for n, t in tensors.items()}


def torchs(query, key, value, v, *, bias=None, attn_mask=None, key_lengths=None, need_weights=False):
    """What one writes in torch."""
    scores = ((query[:, :, None] + key[:, None] + (0 if bias is None else bias)).tanh() * v).sum(-1)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask
    elif attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    if key_lengths is not None:
        scores = scores.masked_fill(torch.arange(key.size(1)) >= key_lengths[:, None, None], -torch.inf)
    weights = scores.softmax(-1)
    return (weights @ value, weights) if need_weights else weights @ value


def run(function, tensors: dict[str, Tensor], dtype: torch.dtype, **options) -> dict[str, Tensor]:
    """Output, weights, and all gradients of a random linear function of both."""
    leaves = {n: t.detach().to(dtype).requires_grad_() for n, t in tensors.items()}
    if (mask := options.get("attn_mask")) is not None and mask.is_floating_point():
        leaves["attn_mask"] = options["attn_mask"] = mask.detach().to(dtype).requires_grad_()
    given = {n: t for n, t in leaves.items() if n != "attn_mask"}
    out, weights = function(**given, **options, need_weights=True)
    generator = torch.Generator().manual_seed(1)
    slopes = [torch.randint(-4, 5, t.shape, generator=generator) / 4 for t in (out, weights)]
    loss = sum((t.double() * s).sum() for t, s in zip((out, weights), slopes, strict=True))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    results = {"out": out, "weights": weights} | {f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)}
    return {n: t.detach() for n, t in results.items()}


def check(tensors, dtype, **options) -> None:
    results = run(ours, tensors, dtype, **options)
    theirs = run(torchs, tensors, dtype, **options)
    assert_as_exact(results, theirs, run(torchs, tensors, torch.float64, **options), dtype, pooled=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_as_exact_as_torch(size, dtype, isa):
    check(problem(*size, dtype), dtype)


@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0, 30.0])
def test_small_and_large_arguments(scale, isa):
    """Sums near 0 of numbers that are not, saturation, and numbers whose exponentials would overflow."""
    tensors = problem(2, 40, 90, 64, 16, scale=scale)
    tensors["key"][:, ::2] = tensors["query"][:, :1].mul(-1) + 0.01 * tensors["key"][:, ::2]
    check(tensors, torch.float32)


def test_numbers_beyond_the_range_of_exponentials(isa):
    tensors = problem(2, 12, 70, 20, 4)
    tensors["query"][0, 3, 5], tensors["key"][1, 9, 0] = 5000.0, -torch.inf
    tensors["query"][1, 2], tensors["key"][1, 66] = 50.0, -49.0
    check(tensors, torch.float32)
    tensors["key"][1, 66, 2] = torch.nan
    out, weights = ours(**tensors, need_weights=True)
    assert out[1].isnan().all()
    assert weights[1].isnan().all()
    assert out[0].isfinite().all()


MASKS = {
    "bool": lambda B, Tq, Tk: torch.rand(B, Tq, Tk) < 0.7,
    "of keys": lambda B, Tq, Tk: torch.arange(Tk).flip(0)[None, None] > Tk // 3,
    "float": lambda B, Tq, Tk: torch.randn(B, Tq, Tk),
    "float, of two dims": lambda B, Tq, Tk: torch.randn(Tq, Tk),
    "float, of rows": lambda B, Tq, Tk: torch.randn(B, Tq, 1),
    "float, transposed": lambda B, Tq, Tk: torch.randn(Tk, Tq, B).permute(2, 1, 0),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks(mask, dtype, isa):
    for size in ((3, 1, 150, 20, 8), (2, 10, 70, 20, 8)):
        mask_here = mask(*size[:3])
        if mask_here.dtype == torch.bool:
            mask_here[..., 0] = True  # torch gives nan for a query that sees no key
        check(problem(*size, dtype), dtype, attn_mask=mask_here)


def test_half_types_take_float32_masks():
    tensors, mask = problem(2, 5, 40, 20, 8, torch.bfloat16), torch.randn(2, 5, 40)
    exact = torchs(**{n: t.double() for n, t in tensors.items()}, attn_mask=mask.double())
    assert_close(ours(**tensors, attn_mask=mask).double(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("Tq", [1, 10])
def test_lengths(Tq, isa):
    tensors, lengths = problem(4, Tq, 200, 20, 8), torch.tensor([200, 1, 77, 64])
    check(tensors, torch.float32, key_lengths=lengths)
    expected = ours(**tensors, key_lengths=lengths, need_weights=True)
    for name in ("key", "value"):  # what lies beyond is never read
        for row, length in enumerate(lengths):
            tensors[name][row, length:] = torch.nan
    for got, wanted in zip(
        ours(**tensors, key_lengths=lengths.int(), need_weights=True), expected, strict=True
    ):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("Tq", [1, 10])
def test_queries_that_see_no_key(Tq, isa):
    tensors = {n: t.requires_grad_() for n, t in problem(2, Tq, 20, 12, 8).items()}
    mask = torch.ones(2, Tq, 20, dtype=torch.bool)
    mask[0, 0] = False
    for options in ({"attn_mask": mask}, {"key_lengths": torch.tensor([0, 20])}):
        out, weights = ours(**tensors, **options, need_weights=True)
        assert not out[0, 0].any()
        assert not weights[0, 0].any()
        assert out[1].all()
        grads = torch.autograd.grad(out.sum() + weights.square().sum(), list(tensors.values()))
        assert all(g.isfinite().all() for g in grads)
        assert not grads[0][0, 0].any()


@pytest.mark.parametrize(
    "size", [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6), (2, 3, 0, 5, 6), (2, 3, 4, 0, 6), (2, 3, 4, 5, 0)], ids=str
)
def test_nothing(size):
    tensors = problem(*size, torch.float64)
    results, expected = (run(f, tensors, torch.float64) for f in (ours, torchs))
    assert_close(results, expected)


@pytest.mark.parametrize("size", [(3, 1, 500, 20, 8), (1, 20, 300, 64, 16), (2, 300, 40, 16, 8)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_threads(size, count, threads):
    threads(count)
    tensors = problem(*size)
    check(tensors, torch.float32)
    first, again = (run(ours, tensors, torch.float32) for _ in range(2))
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_strides():
    """Nothing is copied that the kernel can walk through, and nothing is written to."""
    tensors = problem(3, 10, 20, 24, 16)
    expected = run(ours, tensors, torch.float32)
    by_time = {
        n: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() == 3 else t for n, t in tensors.items()
    }
    gaps = {n: torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0] for n, t in tensors.items()}
    wide = {n: torch.cat([t, t], -1)[..., : t.size(-1)] for n, t in tensors.items()}
    for views in (by_time, gaps, wide):
        before = {n: t.clone() for n, t in views.items()}
        for name, result in run(ours, views, torch.float32).items():
            assert torch.equal(result, expected[name]), name
        assert all(torch.equal(t, before[n]) for n, t in views.items())
    one = {n: t[:1].expand_as(t) if t.dim() == 3 else t for n, t in tensors.items()}
    assert_close(ours(**one), torchs(**one))
    slope = torch.ones(1, 1, 1).expand(3, 10, 16)
    leaves = [t.requires_grad_() for t in tensors.values()]
    ours_grads, theirs = (
        torch.autograd.grad(f(*leaves[:4], bias=leaves[4]), leaves, slope) for f in (ours, torchs)
    )
    assert_close(ours_grads, theirs, rtol=1e-4, atol=1e-4)


@given(
    st.tuples(
        st.integers(1, 3), st.integers(1, 20), st.integers(1, 150), st.integers(1, 40), st.integers(1, 40)
    ),
    st.sampled_from(DTYPES),
    st.sampled_from([None, *MASKS]),
    st.booleans(),
    st.integers(0, 2**20),
)
def test_random_calls(size, dtype, mask, lengths, seed):
    torch.manual_seed(seed)
    options = {}
    if mask is not None:
        options["attn_mask"] = MASKS[mask](*size[:3])
        if options["attn_mask"].dtype == torch.bool:
            options["attn_mask"] = options["attn_mask"] | (torch.arange(size[2]) == 0)
    if lengths:
        options["key_lengths"] = torch.randint(1, size[2] + 1, size[:1])
    check(problem(*size, dtype), dtype, **options)


@pytest.mark.parametrize("Tq", [3, 9])
@pytest.mark.parametrize("feature", ["plain", "bool mask", "float mask", "mask of keys", "lengths"])
def test_gradcheck(Tq, feature):
    inputs = [t.requires_grad_() for t in problem(2, Tq, 6, 5, 4, torch.float64).values()]
    options = {
        "bool mask": {"attn_mask": torch.arange(12).view(2, 1, 6) % 5 > 0},
        "lengths": {"key_lengths": torch.tensor([4, 0])},
    }.get(feature, {})
    if feature.endswith("mask") and not options:
        inputs.append(torch.randn(Tq, 6, dtype=torch.float64, requires_grad=True))
    elif feature == "mask of keys":
        inputs.append(torch.randn(2, 1, 6, dtype=torch.float64, requires_grad=True))

    def function(query, key, value, v, bias, *mask):
        given = {"attn_mask": mask[0]} if mask else options
        return ours(query, key, value, v, bias=bias, **given, need_weights=True)

    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs, fast_mode=True)
    assert gradcheck(lambda *inputs: function(*inputs)[0], inputs)
    assert gradcheck(lambda *inputs: function(*inputs)[1], [*inputs[:2], inputs[2].detach(), *inputs[3:]])


def test_the_reference_is_what_one_writes():
    tensors = problem(2, 5, 7, 6, 4, torch.float64)
    q = tensors["query"] + tensors["bias"]
    for options in (
        {},
        {"mask": torch.rand(2, 1, 7) < 0.6},
        {"mask": torch.randn(1, 5, 7).double()},
        {"len_k": torch.tensor([7, 3])},
    ):
        results = reference.additive_attention(q, tensors["key"], tensors["value"], tensors["v"], **options)
        options = {{"mask": "attn_mask", "len_k": "key_lengths"}[n]: o for n, o in options.items()}
        assert_close(results, torchs(**tensors, **options, need_weights=True))


def test_takes_no_memory_for_pairs():
    """The features of all pairs would take a GiB, forward and backward each."""
    tensors = {n: t.requires_grad_() for n, t in problem(1, 1024, 1024, 256, 64).items()}
    assert growth(lambda: ours(**tensors).sum().backward()) < 32 * MIB


q, k, v, w = torch.zeros(2, 3, 6), torch.zeros(2, 5, 6), torch.zeros(2, 5, 4), torch.zeros(6)


def opcheck_arguments(mask, lengths, dtype):
    tensors = [t.to(dtype) for t in (torch.randn_like(q), torch.randn_like(k), torch.randn_like(v), w + 1)]
    mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    return [*tensors, mask, lengths]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize(
    ("mask", "lengths"),
    [
        (None, None),
        (torch.ones(2, 3, 5) > 0, None),
        (torch.ones(1, 3, 5), None),
        (None, torch.tensor([5, 2])),
    ],
)
def test_opcheck(mask, lengths, weights, dtype):
    args = opcheck_arguments(mask, lengths, dtype)
    forward, backward = (
        torch.ops.seqkernels.additive_attention_fwd,
        torch.ops.seqkernels.additive_attention_bwd,
    )
    assert set(opcheck(forward.default, (*args, weights)).values()) == {"SUCCESS"}
    out, _ = forward(*args, weights)
    dweights = torch.ones(2, 3, 5, dtype=dtype) if weights else None
    additive = mask is not None and mask.is_floating_point()
    assert set(opcheck(backward.default, (torch.ones_like(out), dweights, *args, additive)).values()) == {
        "SUCCESS"
    }


@pytest.mark.parametrize("mask", [None, torch.rand(2, 1, 5)])
def test_native_ops_look_where_tensors_are(mask):
    """Any strides, but one device."""
    tensors, ops = opcheck_arguments(mask, torch.tensor([5, 2]), torch.float32), torch.ops.seqkernels
    backward = (torch.rand(2, 3, 4), torch.rand(2, 3, 5), *tensors, mask is not None)
    calls = (ops.additive_attention_fwd, (*tensors, True)), (ops.additive_attention_bwd, backward)
    for op, args in calls:
        assert_close(op(*apart(args)), op(*args), rtol=0, atol=0)
        for mixed in with_one_on_meta(args):
            with pytest.raises(RuntimeError, match="expected one device for all tensors"):
                op(*mixed)


BAD = {
    "q of two dims": {"q": q[0]},
    "keys of other features": {"k": k[..., :5]},
    "values of other keys": {"v": v[:, :4]},
    "keys of another batch": {"k": k[:1]},
    "another dtype": {"k": k.double()},
    "integers": {"q": q.long(), "k": k.long(), "v": v.long(), "w": w.long()},
    "w of other features": {"w": w[:5]},
    "w of two dims": {"w": w[None]},
    "a mask of two dims": {"mask": torch.zeros(3, 5)},
    "a mask of other keys": {"mask": torch.zeros(1, 3, 4)},
    "a mask of integers": {"mask": torch.zeros(1, 3, 5, dtype=torch.int64)},
    "lengths of three rows": {"len_k": torch.tensor([1, 2, 3])},
    "lengths too long": {"len_k": torch.tensor([1, 6])},
    "lengths below zero": {"len_k": torch.tensor([1, -1])},
    "lengths in float": {"len_k": torch.tensor([1.0, 2.0])},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_native_errors(bad):
    args = [({"q": q, "k": k, "v": v, "w": w} | bad).get(n) for n in ("q", "k", "v", "w", "mask", "len_k")]
    with pytest.raises(RuntimeError, match="seqkernels::additive_attention_fwd: expected"):
        torch.ops.seqkernels.additive_attention_fwd(*args, True)
    with pytest.raises(RuntimeError, match="seqkernels::additive_attention_bwd: expected"):
        torch.ops.seqkernels.additive_attention_bwd(torch.zeros(2, 3, 4), None, *args, False)


@pytest.mark.parametrize(
    "grads",
    [
        (q[..., :4][:1], None),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)),
        (torch.zeros(2, 3, 4).double(), None),
    ],
)
def test_gradients_that_do_not_fit(grads):
    with pytest.raises(RuntimeError, match="seqkernels::additive_attention_bwd: expected"):
        torch.ops.seqkernels.additive_attention_bwd(*grads, q, k, v, w, None, None, False)


MISUSES = {
    "no tensor": {"value": None},
    "a nested tensor": {"query": torch.nested.nested_tensor([q[0], q[1]], layout=torch.jagged)},
    "rows of another batch": {"query": q[:1]},
    "two dims among three": {"query": q[0]},
    "dtypes": {"key": k.double()},
    "integers": {"query": q.int(), "key": k.int(), "value": v.int(), "v": w.int()},
    "a bias of another size": {"bias": w[:3]},
    "a query that the bias would widen": {"query": q[..., :1], "bias": w},
    "a query that the bias would promote": {"query": q.half(), "bias": w},
    "a mask of other keys": {"attn_mask": torch.zeros(3, 4)},
    "a mask of four dims": {"attn_mask": torch.zeros(1, 1, 3, 5)},
    "lengths of another batch": {"key_lengths": torch.tensor([1])},
    "lengths in float": {"key_lengths": torch.tensor([1.0, 2.0])},
    "lengths too long": {"key_lengths": torch.tensor([1, 6])},
}


@pytest.mark.parametrize("misuse", MISUSES.values(), ids=MISUSES)
def test_errors(misuse):
    arguments = {"query": q, "key": k, "value": v, "v": w} | misuse
    with pytest.raises(ValueError, match=r"additive_attention takes|must be \[B,Tq,D\]|expected key_lengths"):
        ours(**arguments)


@pytest.mark.parametrize("name", ["key_lengths", "attn_mask", "bias"])
def test_one_graph(name):
    tensors = {n: t.requires_grad_() for n, t in problem(2, 5, 7, 6, 4).items() if n != "bias"}
    option = {"key_lengths": torch.tensor([7, 3]), "attn_mask": torch.randn(5, 7), "bias": torch.randn(6)}[
        name
    ]

    def function(*leaves):
        out, weights = ours(*leaves, **{name: option}, need_weights=True)
        return out.sin().sum() + weights.square().sum()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = list(tensors.values())
    results = [(value := f(*leaves), torch.autograd.grad(value, leaves)) for f in (compiled, function)]
    assert_close(*results)


def test_one_tensor_for_all():
    """torch.compile wants the inputs of a Function distinct."""
    x, w = torch.randn(2, 5, 6, requires_grad=True), torch.randn(6)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    ours_grad, theirs = (torch.autograd.grad(f(x, x, x, w).sin().sum(), x)[0] for f in (compiled, torchs))
    assert_close(ours_grad, theirs)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = seqkernels.AdditiveAttention(6, 8, 16)

    def forward(self, query, key):
        return self.attention(query, key)


def test_export_and_train():
    decoder, sizes = Decoder(), {"B": Dim("B", min=2), "Tq": Dim("Tq", min=2), "Tk": Dim("Tk", min=2)}
    dynamic = ({0: sizes["B"], 1: sizes["Tq"]}, {0: sizes["B"], 1: sizes["Tk"]})
    program = export(decoder, (torch.randn(2, 3, 6), torch.randn(2, 4, 8)), dynamic_shapes=dynamic).module()
    query, key = torch.randn(3, 5, 6), torch.randn(3, 9, 8, requires_grad=True)
    results = []
    for module in (decoder, program):
        context, weights = module(query, key)
        loss = context.sin().sum() + weights.square().sum()
        grads = torch.autograd.grad(loss, [key, *module.parameters()])
        results.append((context, weights, *sorted(grads, key=lambda g: (g.dim(), g.shape, g.sum().item()))))
    assert_close(*results)


@pytest.mark.filterwarnings("ignore:seqkernels falls back")
def test_transforms_and_forward_mode():
    tensors = problem(2, 3, 4, 5, 6, torch.float64)
    args = tuple(tensors.values())[:4]
    rows = torch.vmap(lambda q, k, v: ours(q, k, v, args[3]))(*args[:3])
    assert_close(rows, torchs(*args))
    assert_close(torch.func.jvp(ours, args, args)[1], torch.func.jvp(torchs, args, args)[1])
    grads = (torch.func.grad(lambda *a, f=f: f(*a).sin().sum(), (0, 1, 2, 3))(*args) for f in (ours, torchs))
    assert_close(*grads)


def test_autocast_and_fakes():
    tensors = problem(2, 3, 4, 5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(**tensors).dtype == torch.bfloat16
    meta = {n: t.to("meta") for n, t in tensors.items()}
    out, weights = ours(**meta, need_weights=True)
    assert (out.shape, weights.shape) == ((2, 3, 6), (2, 3, 4))


# The module
# ----------------------------------------------------------------------------------------------------------


def module_as_written(m: seqkernels.AdditiveAttention, query, key, value, **options):
    v = m.v if m.g is None else m.g * m.v / m.v.norm()
    return torchs(
        query @ m.q_proj_weight.T,
        key @ m.k_proj_weight.T,
        value,
        v,
        bias=m.bias,
        need_weights=True,
        **options,
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_module(bias, normalize):
    module = seqkernels.AdditiveAttention(6, 8, 16, bias, normalize, dtype=torch.float64)
    nn.init.normal_(module.v)
    query, key, value = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 6), (2, 5, 8), (2, 5, 4)))
    lengths = torch.tensor([5, 2])
    expected = module_as_written(module, query, key, value, key_lengths=lengths)
    results = module(query, key, value, key_lengths=lengths)
    assert_close(results, expected)
    parameters = list(module.parameters())
    assert len(parameters) == 3 + bias + normalize
    grads = (
        torch.autograd.grad(r[0].sin().sum() + r[1].square().sum(), parameters) for r in (results, expected)
    )
    assert_close(*grads)
    context, weights = module(query, key, value, key_lengths=lengths, need_weights=False)
    assert weights is None
    assert_close(context, results[0])


def test_module_in_a_decoder():
    """One query of each row a step, the keys projected once; without rows; keys are values by default."""
    module = seqkernels.AdditiveAttention(6, 8, 16)
    query, key = torch.randn(2, 3, 6), torch.randn(2, 5, 8)
    context, weights = module(query, key)
    keys = module.project_keys(key)
    for step in range(3):
        assert_close(module(query[:, step], key, projected_keys=keys), (context[:, step], weights[:, step]))
    assert_close(module(query[0], key[0]), (context[0], weights[0]))
    assert_close(module(query, None, key, projected_keys=keys), (context, weights))
    for arguments in ((query, None), (query, None, key)):
        with pytest.raises(ValueError, match="key may be None only where"):
            module(*arguments)
    with pytest.raises(ValueError, match=r"query must be \[...,6\], got \[2, 3, 8\]"):
        module(torch.randn(2, 3, 8), key)
    with pytest.raises(ValueError, match=r"key must be \[...,8\], got \[2, 3, 6\]"):
        module(query, query)


def test_module_starts_as_it_says_and_stays_itself():
    torch.manual_seed(3)
    module = seqkernels.AdditiveAttention(4, 9, 100, normalize=True)
    assert not module.bias.any()
    assert module.g.item() == pytest.approx(0.1)
    for weight, fan_in in ((module.q_proj_weight, 4), (module.k_proj_weight, 9), (module.v, 100)):
        assert weight.detach().abs().max() <= fan_in**-0.5
        assert weight.detach().std() == pytest.approx(fan_in**-0.5 / 3**0.5, rel=0.2)
    assert "4, 9, hidden_size=100, bias=True, normalize=True" in repr(module)
    twin = seqkernels.AdditiveAttention(4, 9, 100, normalize=True)
    twin.load_state_dict(module.state_dict())
    query, key = torch.randn(2, 3, 4), torch.randn(2, 5, 9)
    assert_close(twin(query, key), module(query, key))
    for wrong in (0, -1, 2.5, None):
        with pytest.raises(ValueError, match="hidden_size must be an integer > 0"):
            seqkernels.AdditiveAttention(4, 9, wrong)


class Wrapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = seqkernels.AdditiveAttention(6, 8, 16).double()

    def forward(self, query, key):
        return self.attention(query, key, need_weights=False)[0]


@pytest.mark.filterwarnings("ignore:seqkernels falls back", "ignore:.*torch.jit.* is deprecated")
def test_module_under_transforms_and_tracers(monkeypatch):
    monkeypatch.setattr(_base, "SMALL_PRODUCT", -1)  # ours would project
    model = Wrapped()
    args = torch.randn(2, 3, 6).double(), torch.randn(2, 5, 8).double()

    def written(query, key):
        return module_as_written(model.attention, query, key, key)[0]

    assert_close(torch.vmap(model)(*args), written(*args))
    assert_close(torch.func.jvp(model, args, args)[1], torch.func.jvp(written, args, args)[1])
    of_rows = torch.vmap(torch.func.grad(lambda *row: model(*row).sum()))(*args)
    assert_close(of_rows, torch.func.grad(lambda *batch: written(*batch).sum())(*args))
    hessians = [torch.func.hessian(lambda q, f=f: f(q, args[1]).sum())(args[0]) for f in (model, written)]
    assert_close(*hessians)
    traced = torch.jit.trace(model, args)
    assert "seqkernels::" not in str(traced.inlined_graph)
    assert_close(traced(*args), model(*args))
    graph = torch.fx.symbolic_trace(model)
    assert "self.attention(" in graph.code
    assert "need_weights = False" in graph.code
    assert_close(graph(*args), model(*args))
    with pytest.raises(RuntimeError, match="script knows torch's operators only"):
        torch.jit.script(model)


def test_masks_of_one_step():
    module, mask = seqkernels.AdditiveAttention(6, 8, 16), torch.arange(10).view(2, 5) % 3 > 0
    query, key = torch.randn(2, 6), torch.randn(2, 5, 8)
    context, weights = module(query, key, attn_mask=mask)
    assert not weights[~mask].any()
    assert_close(context.unsqueeze(1), module(query.unsqueeze(1), key, attn_mask=mask[:, None])[0])


def test_nothing_hidden_comes_back():
    """NaN in the gradient of a query that sees no key; keys beyond 2^24, which float32 cannot count."""
    tensors = {n: t.requires_grad_() for n, t in problem(1, 9, 20, 6, 4).items()}
    dout = torch.ones(1, 9, 4)
    dout[0, 3] = torch.nan
    mask = torch.ones(1, 9, 20, dtype=torch.bool)
    mask[0, 3] = False
    out = ours(**tensors, attn_mask=mask)
    dq, dk, _, dv, dbias = torch.autograd.grad(out, list(tensors.values()), dout)
    assert all(g.isfinite().all() for g in (dq, dk, dv, dbias))


def test_more_keys_than_float32_counts(threads):
    threads(1)
    n = 2**24 + 1
    one = torch.zeros(1, 1, 1)
    mask, value = torch.full((1, 1, n), -1e4), torch.zeros(1, n, 1)
    mask[..., -1], value[:, -1] = 0, 1
    assert ours(one, one.expand(1, n, 1), value, one[0, 0], attn_mask=mask).item() == 1


def test_keys_without_number_are_refused():
    n, one = 2**58, torch.zeros(1, 1, 1)
    with pytest.raises(RuntimeError, match="no memory"):
        ours(torch.zeros(1, 8, 1), one.expand(1, n, 1), one.expand(1, n, 1), one[0, 0])


def test_gradients_of_keys_stay_exact_with_many_queries():
    """One chain of 4096 additions had six times torch's error."""
    tensors = problem(1, 4096, 64, 16, 8)
    results, theirs, exact = (
        run(f, tensors, dtype)
        for f, dtype in ((ours, torch.float32), (torchs, torch.float32), (torchs, torch.float64))
    )
    for name in ("grad_key", "grad_v"):
        error, torchs_error = ((r[name] - exact[name]).norm() for r in (results, theirs))
        assert error <= 3 * torchs_error, name


def test_memory_with_many_threads(threads):
    """Parts of forward and backward keep what is theirs; the gradients take 70 MiB."""
    threads(64)
    tensors = {n: t.requires_grad_() for n, t in problem(33, 128, 1024, 256, 256).items()}
    assert growth(lambda: ours(**tensors).sum().backward()) < 250 * MIB
