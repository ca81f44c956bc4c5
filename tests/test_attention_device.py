"""Attention on a device: exact, the same bits every time, in CUDA graphs, on other streams, of any length.

The pairs of features and single properties of the Triton kernels are in test_triton.py, on a GPU too.
"""

import copy
from functools import partial

import pytest
import torch
from devices import NEEDS_TRITON
from tolerances import assert_as_exact
from torch import Tensor, nn
from torch.library import opcheck
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

import seqkernels
from seqkernels import support, triton
from seqkernels.ops import attention as ops
from seqkernels.ops.attention import NO_LIMIT
from seqkernels.reference import attention as reference

pytestmark = NEEDS_TRITON
DEVICE = "cuda"
BF16 = torch.bfloat16
sdpa = seqkernels.scaled_dot_product_attention


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype).requires_grad_(grad)


def qkv(Tq=300, Tk=500, Hq=4, Hk=2, D=64, Dv=None, B=2, dtype=BF16) -> list[Tensor]:
    shapes = (B, Hq, Tq, D), (B, Hk, Tk, D), (B, Hk, Tk, Dv or D)
    return [randn(*shape, dtype=dtype) for shape in shapes]


def run(function, leaves, *args, **kwargs) -> dict[str, Tensor]:
    """Outputs, and the gradients of a random linear function of them; the LSE where it is finite."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    outs = function(*leaves, *args, **kwargs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    loss = 0.0
    for out in outs:
        slopes = torch.randint(-4, 5, out.shape, generator=torch.Generator().manual_seed(1)) / 4
        finite = out.double().masked_fill(out == -torch.inf, 0)
        loss = loss + (finite * slopes.to(DEVICE)).sum()
    grads = torch.autograd.grad(loss, leaves)
    named = {f"out_{n}": o.detach() for n, o in enumerate(outs)}
    return named | {f"grad_{n}": g for n, g in enumerate(grads)}


def exactly(values):
    """Float tensors in float64, also those in dicts."""
    if isinstance(values, dict):
        return {name: exactly(value) for name, value in values.items()}
    return values.double() if isinstance(values, Tensor) and values.is_floating_point() else values


# ------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize("dtype", triton.DTYPES, ids=str)
@pytest.mark.parametrize("D", [16, 32, 64, 72, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_dense_as_exact_as_torch(dtype, D, causal):
    leaves = qkv(D=D, dtype=dtype)
    options = {"scale": D**-0.5, "right": 0 if causal else NO_LIMIT}
    ours = run(lambda *x: ops.attention(*x, **options)[0], leaves)
    plain = partial(F.scaled_dot_product_attention, is_causal=causal, enable_gqa=True)
    with sdpa_kernel(SDPBackend.MATH):
        truth = run(plain, [t.double() for t in leaves])
    assert_as_exact(ours, run(plain, leaves), truth, dtype, pooled=True)


FEATURES = {
    "nothing": {},
    "window": {"left": 100, "right": 5},
    "causal from the bottom right": {"right": 0, "bottom_right": True},
    "softcap": {"softcap": 3.0},
    "alibi": {"alibi": "slopes"},
    "lengths": {"len_k": [0, 431], "right": 0, "bottom_right": True},
    "packed": {"cu": True, "right": 0, "bottom_right": True},
    "bool mask": {"mask": (2, 1, 300, 500)},
    "negative scale": {"scale": -0.3},
    "zero scale": {"scale": 0.0},
}
LEARNED = {"sinks": (4,), "mask of queries and keys": (1, 1, 300, 500), "mask of keys": (2, 1, 1, 500)}


def options_of(feature: dict) -> dict:
    options = {"scale": 0.2} | feature
    if options.pop("cu", False):
        options |= {"cu_q": torch.tensor([0, 7, 7, 200, 300], device=DEVICE)}
        options |= {"cu_k": torch.tensor([0, 300, 310, 310, 500], device=DEVICE)}
    if "alibi" in options:
        options["alibi"] = torch.rand(4, device=DEVICE)
    if "len_k" in options:
        options["len_k"] = torch.tensor(options["len_k"], device=DEVICE)
    if "mask" in options:
        options["mask"] = torch.rand(options["mask"], device=DEVICE) < 0.7
        options["mask"][..., 50:90, :] = False
    return options


def compare(leaves: list[Tensor], options: dict, name: str | None, dtype: torch.dtype) -> None:
    """Half types round P and dS before each product; float32 rounds sums of hundreds of numbers."""
    names = ("q", "k", "v", *([name] if name else []))
    longest = {"max_q": 300, "max_k": 500} if "cu_q" in options else {}

    def call(function, more, *leaves):
        return function(**dict(zip(names, leaves, strict=True)), **options, **more)

    ours = run(partial(call, ops.attention, longest), leaves)
    truth = run(partial(call, reference.attention, {}), [t.double() for t in leaves])
    eps = (4 if dtype == torch.float32 else 1) * torch.finfo(dtype).eps
    for key, exact in truth.items():
        found = ours[key].double()
        finite = exact.isfinite()
        assert torch.equal(found[~finite], exact[~finite]), key
        largest = max(1.0, exact[finite].abs().max().item())
        error = (found - exact)[finite].abs().max().item()
        allowed = (32 if key.startswith("grad") else 8) * eps * largest
        assert error <= allowed, (key, error, allowed)


@pytest.mark.parametrize("dtype", triton.DTYPES, ids=str)
@pytest.mark.parametrize("D", [64, 80, 128])
@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, D, dtype):
    B = 1 if feature == "packed" else 2
    compare(qkv(D=D, B=B, dtype=dtype), options_of(FEATURES[feature]), None, dtype)


@pytest.mark.parametrize("dtype", triton.DTYPES, ids=str)
@pytest.mark.parametrize("feature", ["nothing", "window", "softcap", "lengths"])
@pytest.mark.parametrize("learned", LEARNED)
def test_what_is_learned(learned, feature, dtype):
    name = "sinks" if learned == "sinks" else "mask"
    leaf = randn(*LEARNED[learned], dtype=torch.float32 if name == "sinks" else dtype)
    compare([*qkv(dtype=dtype), leaf], options_of(FEATURES[feature]), name, dtype)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize(("D", "Dv"), [(320, 320), (512, 512), (512, 64), (192, 128), (1, 33), (40, 512)])
def test_large_and_unequal_head_dims(D, Dv, dtype):
    compare(qkv(D=D, Dv=Dv, dtype=dtype), {"scale": D**-0.5, "right": 0}, None, dtype)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_of_float32(precision):
    """Exact, three in TF32, one in TF32, as torch is told."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        leaves = qkv(dtype=torch.float32)
        ours = run(lambda *x: ops.attention(*x, scale=0.125)[0], leaves)
    finally:
        torch.set_float32_matmul_precision(before)
    truth = run(lambda *x: reference.attention(*x, scale=0.125)[0], [t.double() for t in leaves])
    allowed = {"highest": 1e-5, "high": 1e-4, "medium": 2e-2}[precision]
    for name, exact in truth.items():
        assert (ours[name] - exact).abs().max() <= allowed * max(1.0, exact.abs().max()), name


@pytest.mark.parametrize("dtype", triton.DTYPES, ids=str)
def test_huge_logits(dtype):
    q, k, v = qkv(dtype=dtype, Hk=4)
    leaves = (q * 100, k, v)
    plain = partial(F.scaled_dot_product_attention)
    with sdpa_kernel(SDPBackend.MATH):
        truth, torchs = run(plain, [t.double() for t in leaves]), run(plain, leaves)
    ours = run(lambda *x: ops.attention(*x, scale=0.125)[0], leaves)
    assert_as_exact(ours, torchs, truth, dtype, pooled=True)


def test_inf_and_nan_come_through_as_in_torch():
    q, k, v = qkv(4, 4, 1, 1, 16, B=1, dtype=torch.float32)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        for t in range(3):
            inputs = [x.clone() for x in (q, k, v)]
            inputs[t][0, 0, i, 0] = value
            with sdpa_kernel(SDPBackend.MATH):
                expected = F.scaled_dot_product_attention(*inputs)
            assert_close(ops.attention(*inputs, scale=0.25)[0], expected, equal_nan=True)


def test_more_rows_than_a_grid_has():
    leaves = qkv(2, 2, 1, 1, 16, B=65_536, dtype=torch.float32)
    ours = run(lambda *x: ops.attention(*x, scale=0.25, right=0)[0], leaves)
    assert_close(ours, run(partial(F.scaled_dot_product_attention, is_causal=True), leaves))


def test_offsets_beyond_32_bits():
    T = 2**31 // 64 + 1000
    if torch.cuda.mem_get_info()[0] < 3 * T * 64 * 2:
        pytest.skip("needs 13 GB")
    keys = torch.zeros(1, 1, T, 64, device=DEVICE, dtype=BF16)
    keys[:, :, -1] = 1
    q = torch.full((1, 1, 1, 64), 10.0, device=DEVICE, dtype=BF16)
    out, _ = ops.attention(q, keys, keys, scale=1.0)
    assert_close(out, torch.ones_like(out))
    assert_close(ops.attention(q, keys, keys, scale=1.0, left=0, right=0, bottom_right=True)[0], out)


# --------------------------------------------------------------------------- the same bits, graphs, streams


def windowed(q, k, v, **options):
    return sdpa(q, k, v, enable_gqa=True, window=(200, 50), **options)


def with_a_mask(q, k, v):
    """Which has a gradient, summed over heads and queries."""
    mask = q[:, :1, :1, :1] * torch.linspace(-1, 1, k.size(2), device=DEVICE).to(q.dtype)
    return sdpa(q, k, v, mask, enable_gqa=True, softcap=5.0)


def packed(q, k, v):
    cu_q, cu_k = (torch.tensor(n, device=DEVICE) for n in ([0, 30, 30, 300], [0, 100, 400, 500]))
    rows = (t[0].transpose(0, 1) for t in (q, k, v))
    return seqkernels.varlen_attention(*rows, cu_q, cu_k, 300, 500, is_causal=True)


def with_dropout(q, k, v):
    torch.manual_seed(3)
    return windowed(q, k, v, dropout_p=0.2)


def cached(q, k, v):
    lengths = torch.tensor([500, 77], device=DEVICE)
    return seqkernels.decode_attention(q[:, :, :4], k, v, lengths)


CALLS = {f.__name__: f for f in (windowed, with_a_mask, packed, with_dropout, cached)}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@calls
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_100_runs_give_the_same_bits(call, dtype):
    leaves = qkv(dtype=dtype)
    first = run(call, leaves)
    for _ in range(99):
        again = run(call, leaves)
        assert all(torch.equal(again[name], first[name]) for name in first)


def train(call, leaves: list[Tensor]) -> list[Tensor]:
    out = call(*leaves)
    return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]


@pytest.mark.parametrize("call", [windowed, with_a_mask], ids=lambda f: f.__name__)
def test_graph_of_training_reads_new_values(call):
    leaves = [t.requires_grad_() for t in qkv()]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        train(call, leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = train(call, leaves)
    for _ in range(3):
        with torch.no_grad():
            for t in leaves:
                t.copy_(torch.randn_like(t))
        graph.replay()
        for found, expected in zip(captured, train(call, leaves), strict=True):
            assert torch.equal(found, expected)


def captured_call(function):
    """(graph, what it writes)"""
    with torch.no_grad():
        function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            return graph, function()


@pytest.mark.parametrize("paged", [False, True])
def test_graph_of_decoding_follows_the_lengths(paged):
    q, k, v = qkv(Tq=1, Tk=512, Hq=8)
    lengths, table = torch.tensor([3, 40], device=DEVICE), None
    if paged:
        k, v = (t.unflatten(2, (32, 16)).transpose(1, 2).flatten(0, 1).contiguous() for t in (k, v))
        table = torch.randperm(64, device=DEVICE).view(2, 32)

    def call():
        return seqkernels.decode_attention(q, k, v, lengths, block_table=table)

    graph, out = captured_call(call)
    for step in (1, 100, 372):
        lengths += step
        q.copy_(torch.randn_like(q))
        graph.replay()
        assert torch.equal(out, call())


def test_graph_of_packed_sequences_follows_their_lengths():
    q, k, v = (randn(500, H, 64, dtype=BF16) for H in (4, 2, 2))
    cu = torch.tensor([0, 100, 500], device=DEVICE)

    def call():
        return seqkernels.varlen_attention(q, k, v, cu, cu, 500, 500, is_causal=True)

    graph, out = captured_call(call)
    for middle in (1, 499, 250):
        cu[1] = middle
        graph.replay()
        assert torch.equal(out, call())


def test_each_replay_drops_other_weights():
    q, k, v = qkv()
    graph, out = captured_call(lambda: windowed(q, k, v, dropout_p=0.5))
    graph.replay()
    first = out.clone()
    graph.replay()
    assert (first != out).any()


@calls
def test_other_streams(call):
    """The kernels run on the current stream: behind a long wait, what they read is there."""
    leaves = qkv()
    expected = call(*leaves)
    late = [torch.zeros_like(t) for t in leaves]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        for t, value in zip(late, leaves, strict=True):
            t.copy_(value)
        out = call(*late)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)


def test_nothing_waits_for_the_device():
    leaves = [t.requires_grad_() for t in qkv()]
    lengths = torch.tensor([500, 77], device=DEVICE)

    def work():
        return train(windowed, leaves), seqkernels.decode_attention(leaves[0][:, :, :1], *leaves[1:], lengths)

    expected = work()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_close(result, expected)


# ------------------------------------------------------------------------------- variable lengths, decoding


@pytest.mark.parametrize("dtype", triton.DTYPES, ids=str)
def test_packed_sequences_as_each_alone(dtype):
    lengths_q, lengths_k = [130, 0, 1, 169], [40, 17, 200, 243]
    cu_q, cu_k = (torch.tensor([0, *n], device=DEVICE).cumsum(0) for n in (lengths_q, lengths_k))
    leaves = [randn(n, H, 64, dtype=dtype) for n, H in ((300, 4), (500, 2), (500, 2))]

    def alone(q, k, v):
        rows = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
        options = {"scale": 0.125, "right": 0, "bottom_right": True}
        outs = [ops.attention(*(t.transpose(0, 1)[None] for t in row), **options)[0] for row in rows]
        return torch.cat([out[0].transpose(0, 1) for out in outs])

    ours = run(
        lambda q, k, v: seqkernels.varlen_attention(q, k, v, cu_q, cu_k, 169, 243, is_causal=True), leaves
    )
    eps = 16 * torch.finfo(dtype).eps
    assert_close(ours, run(alone, leaves), rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype", triton.DTYPES, ids=str)
@pytest.mark.parametrize("Tq", [1, 2, 5, 16])
@pytest.mark.parametrize(("Hq", "Hk"), [(8, 8), (8, 2), (8, 1)])
@pytest.mark.parametrize("page", [0, 1, 16, 128])
def test_decoding(Tq, Hq, Hk, page, dtype):
    q, k, v = qkv(Tq=Tq, Tk=2048, Hq=Hq, Hk=Hk, B=3, dtype=dtype)
    lengths = torch.tensor([Tq, 2048, 1111], device=DEVICE)
    options = {"window": (700, 0), "softcap": 4.0, "alibi_slopes": torch.rand(Hq, device=DEVICE)}
    options |= {"sinks": randn(Hq)}
    truth, lse = seqkernels.decode_attention(
        *(t.double().cpu() for t in (q, k, v)),
        lengths.cpu(),
        **{n: o.double().cpu() if isinstance(o, Tensor) else o for n, o in options.items()},
        return_lse=True,
    )
    table = None
    if page:
        pages = 3 * 2048 // page
        order = torch.randperm(pages, device=DEVICE)
        table = order.view(3, -1)
        scattered = []
        for t in (k, v):
            rows = t.unflatten(2, (-1, page)).transpose(1, 2).flatten(0, 1)
            scattered.append(torch.empty_like(rows).index_copy_(0, order, rows))
        k, v = scattered
    out, found_lse = seqkernels.decode_attention(
        q, k, v, lengths, block_table=table, **options, return_lse=True
    )
    eps = 8 * torch.finfo(dtype).eps
    assert_close(out.double().cpu(), truth, rtol=eps, atol=eps)
    assert_close(found_lse.double().cpu(), lse, rtol=eps, atol=eps)


# ---------------------------------------------------------------------------------------- what stands above


def test_opcheck():
    q, k, v = qkv(30, 50)
    visibility = (0.125, 0.0, NO_LIMIT, 0, True)
    rest = (None,) * 6
    library = torch.ops.seqkernels
    forward = (q, k, v, *rest, *visibility, 0.0, None, 0, 0)
    out, lse = library.attention_fwd(*forward)
    backward = (torch.ones_like(out), None, q, k, v, out, lse, *rest, *visibility, 0.0, None, 0, 0, False)
    weights = (q, k, lse, None, None, None, *visibility, 0.0, None, True)
    pages = randn(20, 2, 4, 64, dtype=BF16)
    table, lengths = torch.arange(20, device=DEVICE).view(2, 10), torch.tensor([37, 40], device=DEVICE)
    paged = (q, pages, pages, table, lengths, None, None, *visibility)
    for name, args in (
        ("attention_fwd", forward),
        ("attention_bwd", backward),
        ("attention_weights", weights),
        ("paged_attention_fwd", paged),
    ):
        assert set(opcheck(getattr(library, name).default, args).values()) == {"SUCCESS"}


def test_double_backward():
    leaves = [randn(1, 2, 5, 16, dtype=torch.float32, grad=True) for _ in range(3)]
    results = []
    for function in (windowed, partial(F.scaled_dot_product_attention)):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if function is windowed else SDPBackend.MATH):
            first = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
            results.append((first, torch.autograd.grad(sum((g * g).sum() for g in first), leaves)))
    assert_close(*results, rtol=1e-3, atol=1e-3)


@calls
def test_one_graph_of_the_compiler(call):
    torch.compiler.reset()
    if call is with_dropout:
        pytest.skip("other random numbers")
    leaves = qkv()
    compiled = torch.compile(call, fullgraph=True)
    assert_close(run(compiled, leaves), run(call, leaves), rtol=1e-2, atol=1e-2)


def test_autocast():
    q, k, v = qkv(dtype=torch.float32)
    with torch.autocast(DEVICE, BF16):
        out = windowed(q, k, v)
    assert out.dtype == BF16
    assert_close(out, windowed(q.bfloat16(), k.bfloat16(), v.bfloat16()))


@pytest.mark.parametrize("dtype", triton.DTYPES, ids=str)
def test_whoever_attends_the_result_is_the_same(dtype):
    """Dense calls may go to torch's kernels, those with an LSE are ours."""
    for shape in ({}, {"Tq": 8, "Tk": 2048}, {"Tq": 1}, {"D": 320, "Hk": 4}):
        leaves = qkv(dtype=dtype, **shape)
        if support.why_torch_attends(leaves[0], leaves[0].size(3)):
            continue
        dense = sdpa(*leaves, enable_gqa=True)
        ours, _ = sdpa(*leaves, enable_gqa=True, return_lse=True)
        eps = 16 * torch.finfo(dtype).eps
        assert_close(dense, ours, rtol=eps, atol=eps)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_multihead_attention(need_weights, masked, average):
    theirs = nn.MultiheadAttention(64, 4, batch_first=True, device=DEVICE)
    ours = copy.deepcopy(theirs)
    seqkernels.swap_(holder := nn.Sequential(ours))
    x = randn(3, 100, 64)
    lengths = torch.tensor([[100], [3], [70]], device=DEVICE)
    padding = torch.arange(100, device=DEVICE) >= lengths if masked else None
    options = {
        "key_padding_mask": padding,
        "need_weights": need_weights,
        "average_attn_weights": average,
    }
    results = []
    for module in (holder[0], theirs):
        out, weights = module(x, x, x, **options)
        loss = out.sin().sum() + (0 if weights is None else weights.sin().sum())
        results.append((out, weights, torch.autograd.grad(loss, list(module.parameters()))))
    assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_swapped_transformers():
    model = nn.Transformer(64, 4, 2, 2, 128, 0.0, batch_first=True, device=DEVICE)
    src, tgt = randn(3, 70, 64), randn(3, 50, 64)
    padding = torch.arange(70, device=DEVICE) >= torch.tensor([[70], [9], [33]], device=DEVICE)
    causal = nn.Transformer.generate_square_subsequent_mask(50, device=DEVICE)
    options = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding, "tgt_mask": causal}

    def results():
        out = model.train()(src, tgt, **options)
        grads = torch.autograd.grad(out.sin().sum(), list(model.parameters()))
        with torch.no_grad():
            return out, grads, model.eval()(src, tgt, **options)

    expected = results()
    seqkernels.swap_(model)
    assert_close(results(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "mistral", "t5"])
@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
def test_hugging_face_models(kind, padding):
    models = pytest.importorskip("test_transformers")
    models.integration.register()
    inputs = {name: t.to(DEVICE) for name, t in models.arguments(kind, padding).items()}
    results = []
    for model in models.models(kind):
        model = model.float().to(DEVICE)
        logits = model(**inputs).logits
        rows = slice(None) if kind == "t5" else inputs["attention_mask"].bool()
        grads = torch.autograd.grad(logits[rows].sin().sum(), list(model.parameters()), allow_unused=True)
        tokens = None
        if kind != "bert" and padding in ("none", "left"):
            ids = {n: t for n, t in inputs.items() if n != "decoder_input_ids"}
            tokens = model.generate(**ids, max_new_tokens=5, do_sample=False, disable_compile=True)
        results.append((logits[rows], [g for g in grads if g is not None], tokens))
    assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_torchs_registry(dtype, causal):
    if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
        pytest.skip("this torch has no registry")
    from seqkernels.integrations import flash_attention

    flash_attention.register()
    leaves = qkv(Tk=300, Hk=4, dtype=dtype)
    plain = partial(F.scaled_dot_product_attention, is_causal=causal)
    with sdpa_kernel(SDPBackend.MATH):
        truth = run(plain, [t.double() for t in leaves])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torchs = run(plain, leaves)
        torch.nn.attention.activate_flash_attention_impl("seqkernels")
        try:
            with torch.profiler.profile() as profile:
                ours = run(plain, leaves)
            again = run(torch.compile(plain, fullgraph=True), leaves)
        finally:
            torch.nn.attention.restore_flash_attention_impl()
    assert any(event.key == "seqkernels::attention_fwd" for event in profile.key_averages())
    assert_as_exact(ours, torchs, truth, dtype, pooled=True)
    assert_close(again, ours)


def test_jagged_tensors():
    offsets = torch.tensor([0, 70, 71, 300], device=DEVICE)
    values = randn(300, 4, 64, dtype=BF16)
    x = torch.nested.nested_tensor_from_jagged(values, offsets).transpose(1, 2)
    out = sdpa(x, x, x, is_causal=True)
    for row, part in zip(out.unbind(), x.unbind(), strict=True):
        alone, _ = ops.attention(*[part[None]] * 3, scale=0.125, right=0)
        assert_close(row, alone[0], rtol=1e-2, atol=1e-2)
