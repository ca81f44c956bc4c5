"""The attention ops: against the reference, under gradcheck twice, under opcheck, compiled and exported."""

import pytest
import torch
from layouts import apart, with_one_on_meta
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.export import Dim, export
from torch.library import opcheck
from torch.nn import functional as F
from torch.testing import assert_close

import seqkernels
from seqkernels import scaled_dot_product_attention as ours
from seqkernels.ops import attention as ops
from seqkernels.reference import attention as reference

NO_LIMIT = ops.NO_LIMIT
cu_q, cu_k = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 1, 4, 7])
PACKED = {"cu_q": cu_q, "cu_k": cu_k, "max_q": 3, "max_k": 3}
FEATURES = {
    "plain": {},
    "causal": {"right": 0},
    "causal from the bottom right": {"right": 0, "bottom_right": True},
    "window": {"left": 2, "right": 1},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi": torch.tensor([0.5, 1.0, 0.1, 0.0])},
    "lengths": {"len_k": torch.tensor([3, 0]), "bottom_right": True},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 0.0, 2.0])},
    "mask": {"mask": torch.linspace(-1, 1, 35).view(1, 1, 5, 7)},
    "mask of keys": {"mask": torch.linspace(-1, 1, 14).view(2, 1, 1, 7)},
    "bool mask": {"mask": torch.arange(70).view(2, 1, 5, 7) % 3 > 0},
    "dropout": {"dropout": 0.3, "rng": torch.tensor([2**40 + 7, 2**33 + 5])},
    "packed": PACKED | {"right": 1},
    "packed with dropout": PACKED | {"dropout": 0.5, "rng": torch.tensor([3, 9])},
}
features = pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def problem(feature: dict, dtype=torch.float64) -> tuple[dict[str, Tensor], dict]:
    """Inputs that get gradients, and the rest."""
    B = 1 if "cu_q" in feature else 2
    shapes = {"q": (B, 4, 5, 6), "k": (B, 2, 7, 6), "v": (B, 2, 7, 3)}
    inputs = {n: torch.randn(s).to(dtype) for n, s in shapes.items()}
    options = {"scale": 0.4} | feature
    for name in ("mask", "sinks"):
        if name in options and options[name].is_floating_point():
            acc = torch.promote_types(dtype, torch.float32)
            inputs[name] = options.pop(name).to(dtype if name == "mask" else acc)
    return {n: t.requires_grad_() for n, t in inputs.items()}, options


@features
def test_equals_the_reference(feature):
    inputs, options = problem(feature)
    leaves = list(inputs.values())
    results = []
    plain = {n: o for n, o in options.items() if n not in ("max_q", "max_k")}
    for function, arguments in ((ops.attention, options), (reference.attention, plain)):
        out, lse = function(**inputs, **arguments)
        finite = lse.masked_fill(lse == -torch.inf, 0)
        both = torch.autograd.grad(out.sin().sum() + finite.sin().sum(), leaves, retain_graph=True)
        results.append((out, lse, both, torch.autograd.grad(finite.sin().sum(), leaves, allow_unused=True)))
    ours, expected = results
    assert_close(ours[:3], expected[:3])
    for grad, wanted in zip(ours[3], expected[3], strict=True):  # v has nothing to do with lse
        assert_close(grad, torch.zeros_like(grad) if wanted is None else wanted)
    with torch.no_grad():
        assert_close(ops.attention(**inputs, **options), results[1][:2])


@features
def test_passes_gradcheck_twice(feature):
    inputs, options = problem(feature)

    def function(*leaves):
        out, lse = ops.attention(**dict(zip(inputs, leaves, strict=True)), **options)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert gradcheck(function, list(inputs.values()))
    assert gradgradcheck(function, list(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("right", [NO_LIMIT, 0])
def test_weights(mean, right):
    q, k, mask = (
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in ((2, 4, 5, 6), (2, 2, 7, 6), (2, 1, 5, 7))
    )

    def weights(q, k, mask):
        _, lse = ops.attention(q, k, k, scale=0.4, mask=mask, right=right)
        return ops.attention_weights(q, k, lse, scale=0.4, mask=mask, right=right, mean=mean)

    expected = reference.attention_weights(q, k, scale=0.4, mask=mask, right=right, mean=mean)
    assert_close(weights(q, k, mask), expected)
    assert gradcheck(weights, (q, k, mask))
    assert gradgradcheck(weights, (q, k, mask), fast_mode=True)


def native_arguments(feature: dict, dtype: torch.dtype) -> tuple[list, list]:
    inputs, options = problem(feature, dtype)
    given = {n: t.detach() for n, t in inputs.items()} | options
    tensors = [given.get(n) for n in ("q", "k", "v", "mask", "cu_q", "cu_k", "len_k", "alibi", "sinks")]
    numbers = [given["scale"], given.get("softcap", 0.0)]
    numbers += [given.get("left", NO_LIMIT), given.get("right", NO_LIMIT), given.get("bottom_right", False)]
    numbers += [given.get("dropout", 0.0), given.get("rng")]
    return tensors, [*numbers, given.get("max_q", 0), given.get("max_k", 0)]


@features
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(feature, dtype):
    tensors, numbers = native_arguments(feature, dtype)
    forward, backward = torch.ops.seqkernels.attention_fwd, torch.ops.seqkernels.attention_bwd
    assert set(opcheck(forward.default, (*tensors, *numbers)).values()) == {"SUCCESS"}
    out, lse = forward(*tensors, *numbers)
    additive = tensors[3] is not None and tensors[3].is_floating_point()
    for dlse in (None, torch.ones_like(lse)):
        args = (torch.ones_like(out), dlse, *tensors[:3], out, lse, *tensors[3:], *numbers, additive)
        assert set(opcheck(backward.default, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("mean", [False, True])
def test_opcheck_weights(mean):
    tensors, numbers = native_arguments(FEATURES["bool mask"], torch.float32)
    _, lse = torch.ops.seqkernels.attention_fwd(*tensors, *numbers)
    args = (*tensors[:2], lse, tensors[3], None, None, *numbers[:7], mean)
    result = opcheck(torch.ops.seqkernels.attention_weights.default, args)
    assert set(result.values()) == {"SUCCESS"}


def gathered(q, k, v, table, lengths, alibi, sinks, *visibility):
    """What the kernel for GPUs does with pages, on the CPU."""
    k, v = (t[table].transpose(1, 2).flatten(2, 3) for t in (k, v))
    rest = (None, None, None, lengths, alibi, sinks, *visibility, 0.0, None, 0, 0)
    return torch.ops.seqkernels.attention_fwd(q, k, v, *rest)


def test_opcheck_pages():
    """The op has kernels for GPUs only; its fake and its schema are checked around another for the CPU."""
    library = torch.library.Library("seqkernels", "FRAGMENT")
    library.impl("paged_attention_fwd", gathered, "CPU")
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(6, 2, 4, 8), torch.randn(6, 2, 4, 6)
    table, lengths = torch.tensor([[2, 1, 5], [0, 3, 4]]), torch.tensor([7, 12])
    try:
        for alibi, sinks in ((None, None), (torch.rand(4), torch.randn(4))):
            args = (q, k, v, table, lengths, alibi, sinks, 0.3, 0.0, NO_LIMIT, 0, True)
            op = torch.ops.seqkernels.paged_attention_fwd.default
            assert set(opcheck(op, args).values()) == {"SUCCESS"}
    finally:
        library._destroy()


q, k, v = torch.zeros(2, 4, 5, 6), torch.zeros(2, 2, 7, 6), torch.zeros(2, 2, 7, 3)
BAD = {
    "q of three dims": {"q": q[0]},
    "keys of other features": {"k": k[..., :5]},
    "values of other keys": {"v": v[:, :, :6]},
    "keys of another batch": {"k": k[:1]},
    "another dtype": {"k": k.double()},
    "integers": {"q": q.long(), "k": k.long(), "v": v.long()},
    "heads that do not divide": {"q": q[:, :3]},
    "no heads of keys": {"k": k[:, :0], "v": v[:, :0]},
    "a mask of three dims": {"mask": torch.zeros(4, 5, 7)},
    "a mask of other keys": {"mask": torch.zeros(1, 1, 5, 6)},
    "a mask of another dtype": {"mask": torch.zeros(1, 1, 5, 7, dtype=torch.int64)},
    "lengths of three rows": {"len_k": torch.tensor([1, 2, 3])},
    "lengths too long": {"len_k": torch.tensor([1, 8])},
    "lengths in float": {"len_k": torch.tensor([1.0, 2.0])},
    "slopes for other heads": {"alibi": torch.zeros(3)},
    "slopes in float64": {"alibi": torch.zeros(4).double()},
    "sinks for other heads": {"sinks": torch.zeros(5)},
    "one of two offsets": {"cu_q": torch.tensor([0, 5])},
    "offsets of a batch": {"cu_q": cu_q, "cu_k": cu_k},
    "dropout without rng": {"dropout": 0.5},
    "dropout of more than all": {"dropout": 1.5},
    "dropout of nan": {"dropout": float("nan")},
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_native_errors(bad):
    names = ("q", "k", "v", "mask", "cu_q", "cu_k", "len_k", "alibi", "sinks")
    tensors = [({"q": q, "k": k, "v": v} | bad).get(n) for n in names]
    numbers = (1.0, 0.0, NO_LIMIT, NO_LIMIT, False, bad.get("dropout", 0.0), None, 0, 0)
    with pytest.raises(RuntimeError, match="seqkernels::attention_fwd: expected"):
        torch.ops.seqkernels.attention_fwd(*tensors, *numbers)


def test_gradient_of_an_expanded_mask():
    """Each of its elements has one, those that share memory too."""
    tensors, numbers = native_arguments(FEATURES["mask"], torch.float32)
    results = []
    for mask in (tensors[3].expand(2, 4, 5, 7), tensors[3].repeat(2, 4, 1, 1)):
        tensors[3] = mask
        out, lse = torch.ops.seqkernels.attention_fwd(*tensors, *numbers)
        arguments = (torch.ones_like(out), None, *tensors[:3], out, lse, *tensors[3:], *numbers, True)
        results.append(torch.ops.seqkernels.attention_bwd(*arguments))
    assert_close(*results)


def native_calls(feature: dict):
    """(op, args) of forward, backward and, where they know the feature, weights."""
    tensors, numbers = native_arguments(feature, torch.float32)
    forward, backward = torch.ops.seqkernels.attention_fwd, torch.ops.seqkernels.attention_bwd
    yield forward, (*tensors, *numbers)
    out, lse = forward(*tensors, *numbers)
    additive = tensors[3] is not None and tensors[3].is_floating_point()
    grads = torch.ones_like(out), torch.ones_like(lse)
    yield backward, (*grads, *tensors[:3], out, lse, *tensors[3:], *numbers, additive)
    q, k, _, mask, cu, _, len_k, alibi, sinks = tensors
    if cu is None and sinks is None:
        yield torch.ops.seqkernels.attention_weights, (q, k, lse, mask, len_k, alibi, *numbers[:7], False)


@features
def test_native_ops_take_any_strides(feature):
    for op, args in native_calls(feature):
        assert_close(op(*apart(args)), op(*args), rtol=0, atol=0, equal_nan=True)


@features
def test_no_results_from_tensors_on_two_devices(feature):
    for op, args in native_calls(feature):
        for mixed in with_one_on_meta(args):
            with pytest.raises(RuntimeError, match="expected one device for all tensors"):
                op(*mixed)


def test_sizes_whose_product_overflows():
    n = 2**20
    q, k, v = (torch.zeros(1, 1, 1, f).expand(n, n, t, f) for t, f in ((n, 1), (1, 1), (1, 16)))
    with pytest.raises(RuntimeError, match="no memory for a tensor of shape"):
        ops.attention(q, k, v, scale=1.0)


def in_one_graph(function, dynamic=None):
    """Compiled by all of torch.compile but Inductor, which is slow and adds nothing here."""
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)


def results(function, *leaves):
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    return outs, torch.autograd.grad(sum(o.sin().sum() for o in outs), [t for t in leaves if t.requires_grad])


def leaves(L: int, S: int) -> list[Tensor]:
    return [torch.randn(2, 4, T, 8, requires_grad=True) for T in (L, S, S)]


CALLS = {
    "plain": lambda q, k, v: ours(q, k, v),
    "causal": lambda q, k, v: ours(q, k, v, is_causal=True),
    "masked": lambda q, k, v: ours(q, k, v, (q @ k.mT)[:, :1].detach() > 0),
    "a mask with gradients": lambda q, k, v: ours(q, k, v, (q @ k.mT).mean(1, keepdim=True)),
    "three dims": lambda q, k, v: ours(q[0], k[0], v[0]),
    "features": lambda q, k, v: ours(q, k, v, window=(3, 2), softcap=3.0, return_lse=True),
    "grouped": lambda q, k, v: ours(q, k[:, :2], v[:, :2], enable_gqa=True),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_trains_in_one_graph(call):
    compiled = in_one_graph(call)
    for L, S in ((5, 7), (6, 9), (8, 4)):
        inputs = leaves(L, S)
        assert_close(results(compiled, *inputs), results(call, *inputs))
        with torch.no_grad():
            assert_close(compiled(*inputs), call(*inputs))


@pytest.mark.parametrize("name", ["scale", "dropout_p", "softcap", "window"])
def test_numbers_that_change_in_one_graph(name):
    """torch.compile makes symbols of them at their second value."""

    def call(q, k, v, number):
        value = (number, 0) if name == "window" else 0.0 * number if name == "dropout_p" else number
        return ours(q, k, v, **{name: value})

    compiled, inputs = in_one_graph(call), leaves(5, 7)
    for number in (2, 3, 4) if name == "window" else (0.3, 0.4, 0.5):
        assert_close(compiled(*inputs, number), call(*inputs, number))


def test_dynamic_sizes_in_one_graph():
    slopes = torch.linspace(0.1, 1, 4)

    def call(q, k, v):
        return ours(q, k, v), ours(q, k, v, alibi_slopes=slopes)

    inputs = leaves(5, 7)
    assert_close(results(in_one_graph(call, dynamic=True), *inputs), results(call, *inputs))


def test_sinks_and_packed_sequences_in_one_graph():
    def call(q, k, v, sinks):
        dense = ours(q, k, v, sinks=sinks)
        packed = seqkernels.varlen_attention(
            q[0].mT.permute(2, 0, 1), *[t[0].transpose(0, 1) for t in (k, v)], cu_q, cu_k, 3, 3
        )
        return dense, packed

    inputs = [*leaves(5, 7), torch.randn(4, requires_grad=True)]
    assert_close(results(in_one_graph(call), *inputs), results(call, *inputs))


def test_decoding_in_one_graph():
    q, k, v = (t.detach() for t in leaves(1, 9))
    compiled = in_one_graph(seqkernels.decode_attention)
    for lengths in (torch.tensor([3, 9]), torch.tensor([1, 2])):
        assert_close(compiled(q, k, v, lengths), seqkernels.decode_attention(q, k, v, lengths))


def test_autocast_in_one_graph():
    inputs = leaves(5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(in_one_graph(CALLS["plain"])(*inputs), CALLS["plain"](*inputs))


def test_a_compiled_model_with_inductor():
    compiled, inputs = torch.compile(CALLS["causal"], fullgraph=True), leaves(5, 5)
    assert_close(results(compiled, *inputs), results(CALLS["causal"], *inputs))


def test_patched_functions_compile():
    def call(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    inputs = leaves(5, 7)
    expected = results(call, *inputs)
    with seqkernels.patch():
        explained = torch._dynamo.explain(call)(*inputs)
        assert_close(results(in_one_graph(call), *inputs), expected)
    targets = [str(n.target) for g in explained.graphs for n in g.graph.nodes]
    assert not any("scaled_dot_product_attention" in t for t in targets)


class Attend(torch.nn.Module):
    def forward(self, q, k, v):
        return ours(q, k, v, is_causal=True)


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_lengths(strict):
    L, S = Dim("L", min=2, max=64), Dim("S", min=2, max=64)
    dynamic = {"q": {2: L}, "k": {2: S}, "v": {2: S}}
    example = tuple(t.detach() for t in leaves(5, 7))
    program = export(Attend(), example, dynamic_shapes=dynamic, strict=strict)
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert any("seqkernels.attention_fwd" in t for t in targets)
    q, k, v = (t.detach() for t in leaves(9, 12))
    assert_close(program.module()(q, k, v), Attend()(q, k, v))


class Decode(torch.nn.Module):
    def forward(self, q, k, v, lengths):
        return seqkernels.decode_attention(q, k, v, lengths)


class Packed(torch.nn.Module):
    def forward(self, q, k, v, cu):
        return seqkernels.varlen_attention(q, k, v, cu, cu, 64, 64, is_causal=True)


def test_export_of_decoding_and_packed_sequences_with_dynamic_lengths():
    S, rows = Dim("S", min=2, max=64), Dim("rows", min=2, max=64)

    def cache(S: int) -> tuple[Tensor, ...]:
        return torch.randn(2, 4, 1, 8), torch.randn(2, 2, S, 8), torch.randn(2, 2, S, 8), torch.tensor([3, S])

    def packed(n: int) -> tuple[Tensor, ...]:
        return torch.randn(n, 4, 8), torch.randn(n, 2, 8), torch.randn(n, 2, 8), torch.tensor([0, 3, n])

    dynamic_cache, dynamic_rows = ({}, {2: S}, {2: S}, {}), ({0: rows}, {0: rows}, {0: rows}, {})
    for module, inputs, dynamic in (
        (Decode(), cache, dynamic_cache),
        (Packed(), packed, dynamic_rows),
    ):
        program = export(module, inputs(9), dynamic_shapes=dynamic)
        new = inputs(17)
        assert_close(program.module()(*new), module(*new))


class Weights(torch.nn.Module):
    def forward(self, q, k, v):
        lse = ours(q, k, v, return_lse=True)[1]
        return ops.attention_weights(q, k, lse, scale=8**-0.5, mask=None, right=5, mean=False) @ v


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs_train(strict):
    rows = [torch.randn(9, 4, 8, requires_grad=True) for _ in range(3)]
    modules = {
        "attention": (Attend(), leaves(5, 7)),
        "weights": (Weights(), leaves(5, 5)),
        "packed": (Packed(), (*rows, torch.tensor([0, 3, 9]))),
    }
    for module, example in modules.values():
        program = export(module, tuple(t.detach() for t in example), strict=strict).module()
        inputs = [t for t in example if t.requires_grad]
        grads = [torch.autograd.grad(f(*example).sin().sum(), inputs) for f in (program, module)]
        assert_close(*grads)


def test_one_tensor_twice_in_one_graph():
    torch.compiler.reset()
    x, y = (torch.randn(2, 4, n, 8, requires_grad=True) for n in (5, 7))
    rows, cu = torch.randn(9, 4, 8, requires_grad=True), torch.tensor([0, 3, 9])
    calls = {
        "itself": (lambda x: ours(x, x, x, window=(2, 1)), (x,)),
        "another": (lambda x, y: ours(x, y, y), (x, y)),
        "packed": (lambda x, cu: seqkernels.varlen_attention(x, x, x, cu, cu, 6, 6), (rows, cu)),
        "cache": (lambda x, y, n: seqkernels.decode_attention(x, y, y, n), (x, y, torch.tensor([5, 7]))),
    }
    for call, args in calls.values():
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        inputs = [t for t in args if t.requires_grad]
        results = [(f(*args), torch.autograd.grad(f(*args).sin().sum(), inputs)) for f in (compiled, call)]
        assert_close(*results)
