"""MultiheadAttention is torch.nn's: parameters, results, errors, also inside of torch.nn.Transformer."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from peak import MIB, growth
from tolerances import assert_as_exact
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.testing._internal.two_tensor import TwoTensor

import seqkernels
from seqkernels import support
from seqkernels.nn import _base, multihead_attention
from seqkernels.reference import attention as reference

E, H, N, L, S = 8, 2, 3, 4, 5
op_db = pytest.importorskip("torch.testing._internal.common_methods_invocations").op_db


@pytest.fixture(autouse=True)
def no_product_is_small(monkeypatch):
    """Ours project, though tests are small."""
    monkeypatch.setattr(_base, "SMALL_PRODUCT", -1)


@pytest.fixture
def same_dropout(monkeypatch):
    """Torch drops the attention weights that ours drops after the same seed."""

    def drop(weights: Tensor, p: float = 0.5, training: bool = True) -> Tensor:  # [N*H,L,S]
        rng = reference.random_state(weights)
        return reference.dropped(weights[None], p, rng)[0] if training else weights

    monkeypatch.setattr(F, "dropout", drop)


def twins(**options) -> tuple[nn.Module, nn.Module]:
    options = {"embed_dim": E, "num_heads": H, "dtype": torch.float64} | options
    theirs = nn.MultiheadAttention(**options)
    for name, parameter in theirs.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    ours = seqkernels.MultiheadAttention(**options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(module: nn.Module, keys: int = S, unbatched: bool = False) -> list[Tensor]:
    """query, key and value as `module` wants them."""
    tensors = []
    for tokens, features in ((L, E), (keys, module.kdim), (keys, module.vdim)):
        batched = (N, tokens, features) if module.batch_first else (tokens, N, features)
        tensors.append(torch.randn((tokens, features) if unbatched else batched, dtype=torch.float64))
    return tensors


def run(module: nn.Module, qkv, **kwargs):
    """Outputs, weights if any, and all gradients of a function of both."""
    leaves = {id(t): t.detach().requires_grad_() for t in qkv}
    out, weights = module(*(leaves[id(t)] for t in qkv), **kwargs)
    loss = out.sin().sum() + (0 if weights is None else (weights * weights).sum())
    wanted = [*leaves.values(), *module.parameters()]
    grads = torch.autograd.grad(loss, wanted)
    return out, weights, grads


def outcome(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)
    return None


def masks(kind: str | None, shape: tuple[int, ...]) -> Tensor | None:
    """No row of it masks all."""
    if kind is None:
        return None
    ignored = torch.rand(shape) < 0.4
    ignored[..., 0] = False
    return ignored if kind == "bool" else torch.zeros(shape).double().masked_fill(ignored, -torch.inf)


CONSTRUCTIONS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "bias of keys and zeros": {"add_bias_kv": True, "add_zero_attn": True},
    "zeros, batch first": {"add_zero_attn": True, "batch_first": True},
    "other features": {"kdim": 5, "vdim": 7},
    "other features, no bias": {"kdim": 5, "vdim": 7, "bias": False, "batch_first": True},
}
constructions = pytest.mark.parametrize("options", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)


@constructions
@pytest.mark.parametrize("unbatched", [False, True])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_results_are_torchs(options, unbatched):
    ours, theirs = twins(**options)
    rows = () if unbatched else (N,)
    for padding, kind, dims in itertools.product((None, "bool", "float"), (None, "bool", "float"), (2, 3)):
        heads = (N * H,) if not unbatched else (H,)
        kwargs = {
            "key_padding_mask": masks(padding, (*rows, S)),
            "attn_mask": masks(kind, (L, S) if dims == 2 else (*heads, L, S)),
        }
        qkv = inputs(ours, unbatched=unbatched)
        for need_weights, average in ((False, True), (True, True), (True, False)):
            kwargs |= {"need_weights": need_weights, "average_attn_weights": average}
            result, expected = run(ours, qkv, **kwargs), run(theirs, qkv, **kwargs)
            assert_close(result, expected)
            if not ours.batch_first:
                assert result[0].stride() == expected[0].stride()


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("lengths", [(5, 3, 1), (5, 0, 2), (4, 4, 4)], ids=str)
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_padding_at_the_end_is_not_merged_with_a_mask(kind, lengths, monkeypatch):
    """Two masks of [L,S] and [N,S] stay that small."""
    ours, theirs = twins()
    qkv, mask = inputs(ours), masks(kind, (L, S))
    mask[:, 0] = 0  # a query that sees nothing is nan in torch
    padding = torch.arange(S) >= torch.tensor(lengths)[:, None]
    seen, attention = [], multihead_attention.attention

    def spy(*args, mask, len_k, **kwargs):
        seen.append((tuple(mask.shape), len_k.tolist()))
        return attention(*args, mask=mask, len_k=len_k, **kwargs)

    monkeypatch.setattr(multihead_attention, "attention", spy)
    kwargs = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": False}
    rows = torch.tensor(lengths) > 0
    result, expected = (run(module, qkv, **kwargs)[0][:, rows] for module in (ours, theirs))
    assert_close(result, expected)
    assert seen == [((1, 1, L, S), list(lengths))]


def test_two_masks_where_tensors_are_made_on_another_device():
    module = twins()[0]
    qkv, padding = inputs(module), torch.arange(S) >= torch.tensor([5, 3, 1])[:, None]
    kwargs = {"key_padding_mask": padding, "attn_mask": masks("bool", (L, S)), "need_weights": False}
    expected = module(*qkv, **kwargs)
    with torch.device("meta"):
        assert_close(module(*qkv, **kwargs), expected)


def test_two_masks_without_looking_at_them():
    """Fake tensors have no values, and what is traced must hold for others."""
    module = twins(batch_first=True)[0].requires_grad_(False)
    qkv, mask = inputs(module), masks("bool", (L, S))
    at_the_end = torch.arange(S) >= torch.tensor([5, 3, 1])[:, None]
    attend = lambda *args: module(*args[:3], args[3], False, args[4])[0]  # noqa: E731
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        assert attend(*map(fakes.from_tensor, (*qkv, at_the_end, mask))).shape == (N, L, E)
    for mode in ("real", "fake", "symbolic"):
        traced = make_fx(attend, tracing_mode=mode, _allow_non_fake_inputs=True)(*qkv, at_the_end, mask)
        for padding in (at_the_end, masks("bool", (N, S))):
            assert_close(traced(*qkv, padding, mask), attend(*qkv, padding, mask))


@pytest.mark.parametrize("need_weights", [False, True])
def test_no_rows(need_weights):
    ours, theirs = twins(batch_first=True)
    q, k, v = (t[:0] for t in inputs(ours))
    for mask in (torch.zeros(0, L, S).double(), torch.zeros(L, S).double()):
        out, weights = ours(q, k, v, None, need_weights, mask)
        expected, torchs = theirs(q, k, v, None, True, mask)
        assert_close(out, expected)
        assert weights is None or weights.shape == torchs.shape


@constructions
@pytest.mark.parametrize("need_weights", [False, True])
def test_the_hint_of_causality(options, need_weights):
    ours, theirs = twins(**options)
    qkv = inputs(ours, keys=L)
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    for mask, padding in itertools.product((causal, causal.isinf()), (None, masks("bool", (N, L)))):
        if padding is not None and mask.is_floating_point():
            padding = torch.zeros(N, L).double().masked_fill(padding, -torch.inf)
        kwargs = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": need_weights}
        result = run(ours, qkv, **kwargs, is_causal=True)
        assert_close(result, run(theirs, qkv, **kwargs, is_causal=True))


@constructions
def test_the_hint_of_causality_beside_a_mask_that_learns(options):
    """torch goes by the hint alone, which hides the keys that bias_k and zeros add from most queries."""
    ours, theirs = twins(**options)
    qkv = inputs(ours, keys=L)
    mask = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64).requires_grad_()
    kwargs = {"attn_mask": mask, "need_weights": False, "is_causal": True}
    assert_close(run(ours, qkv, **kwargs), run(theirs, qkv, **kwargs))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_a_wrong_hint_of_causality(need_weights, padded):
    """The mask counts where torch goes by it, the hint where torch goes by that."""
    ours, theirs = twins()
    window = ~torch.ones(L, L).tril().triu(-1).bool()
    padding = (torch.arange(L) == L - 1).expand(N, L) if padded else None
    kwargs = {"attn_mask": window, "key_padding_mask": padding, "need_weights": need_weights}
    for mask in (window, torch.zeros(N * ours.num_heads, L, L).masked_fill(window, -torch.inf).double()):
        kwargs["attn_mask"] = mask
        if padded and mask.is_floating_point():
            kwargs["key_padding_mask"] = torch.zeros(N, L).double().masked_fill(padding, -torch.inf)
        qkv = inputs(ours, keys=L)
        assert_close(run(ours, qkv, **kwargs, is_causal=True), run(theirs, qkv, **kwargs, is_causal=True))


@pytest.mark.parametrize("batch_first", [False, True])
def test_shared_inputs(batch_first):
    """Self-attention projects once, attention to a memory twice."""
    ours, theirs = twins(batch_first=batch_first)
    x, memory, _ = inputs(ours)
    for qkv, products in (((x, x, x), 1), ((x, memory, memory), 2), ((x, memory, memory.clone()), 3)):
        assert_close(run(ours, qkv), run(theirs, qkv))
        with torch.profiler.profile() as profile, torch.no_grad():
            ours(*qkv)
        calls = {event.key: event.count for event in profile.key_averages()}
        assert calls["seqkernels::linear_fwd"] == products + 1  # and the one behind


@pytest.mark.parametrize("T", [16, 128])
def test_small_products_are_torchs(T, monkeypatch):
    monkeypatch.undo()
    module, x = seqkernels.MultiheadAttention(64, 4), torch.randn(T, 1, 64)
    with torch.profiler.profile() as profile, torch.no_grad():
        module(x, x, x, need_weights=False)
    calls = {event.key: event.count for event in profile.key_averages()}
    names = {16: "aten::linear", 128: "seqkernels::linear_fwd"}
    assert {name: calls.get(name, 0) for name in names.values()} == {
        n: 2 * (t == T) for t, n in names.items()
    }


def test_gradients_of_masks():
    ours, theirs = twins()
    qkv = inputs(ours)
    for shape in ((L, S), (N * H, L, S)):
        grads = []
        for module in (ours, theirs):
            generator = torch.Generator().manual_seed(0)
            leaves = [torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, (N, S))]
            leaves = [t.requires_grad_() for t in leaves]
            for need_weights in (False, True):
                out, weights = module(*qkv, leaves[1], need_weights, leaves[0])
                loss = out.sin().sum() + (weights.sin().sum() if need_weights else 0)
                grads.append(torch.autograd.grad(loss, leaves))
        assert_close(grads[:2], grads[2:])


@pytest.mark.parametrize("need_weights", [False, True])
def test_second_derivatives(need_weights):
    ours, theirs = twins()
    results = []
    for module in (ours, theirs):
        torch.manual_seed(0)
        qkv = [t.requires_grad_() for t in inputs(module)]
        with sdpa_kernel(SDPBackend.MATH) if module is theirs else warnings.catch_warnings():
            out, weights = module(*qkv, need_weights=need_weights)
            loss = out.sin().sum() + (weights.sin().sum() if need_weights else 0)
            first = torch.autograd.grad(loss, qkv, create_graph=True)
            results.append(torch.autograd.grad(sum((g * g).sum() for g in first), qkv))
    assert_close(*results)


def test_all_keys_masked_gives_the_bias():
    """Attention itself is 0 then, with need_weights too, where torch gives nan."""
    ours, theirs = twins()
    qkv, padding = inputs(ours), torch.zeros(N, S, dtype=torch.bool)
    padding[1] = True
    out, weights = ours(*qkv, padding)
    assert_close(out[:, 1], ours.out_proj.bias.expand(L, -1))
    assert (weights[1] == 0).all()
    expected, _ = theirs(*qkv, padding, need_weights=False)
    assert_close(out, expected)
    assert theirs(*qkv, padding)[0].isnan().any()


HIDING = [-1e4, -397124374.8651747, -1e9, torch.finfo(torch.bfloat16).min, torch.finfo(torch.float32).min]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hiding", HIDING)
@pytest.mark.parametrize("average", [False, True])
def test_weights_of_queries_whose_keys_a_finite_mask_hides(dtype, hiding, average, isa):
    """They sum to 1, though an LSE so far from 0 has no room for the logarithm of how many keys there are."""
    ours, theirs = twins(dtype=dtype, batch_first=True)
    q, k = torch.randn(N, 70, E, dtype=dtype), torch.randn(N, 100, E, dtype=dtype)
    mask = torch.zeros(70, 100, dtype=dtype)
    mask[3] = max(hiding, torch.finfo(dtype).min)
    results = [m(q, k, k, attn_mask=mask, average_attn_weights=average)[1] for m in (ours, theirs)]
    exact = copy.deepcopy(theirs).double()
    truth = exact(q.double(), k.double(), k.double(), None, True, mask.double(), average)[1]
    assert_as_exact(*({"weights": w} for w in (*results, truth)), dtype)
    sums = results[0].double().sum(-1)
    assert_close(sums, torch.ones_like(sums), rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_torchs_own_samples_of_the_function():
    """F.multi_head_attention_forward, by modules with the weights of the samples."""
    samples = [(s, module_of(s)) for s in MHA_SAMPLES.sample_inputs("cpu", torch.float64)]
    samples = [(s, module) for s, module in samples if not module.dropout]
    for sample, module in samples:
        expected = F.multi_head_attention_forward(sample.input, *sample.args, **sample.kwargs)
        assert_close(module(sample.input, *sample.args[:2], attn_mask=sample.kwargs["attn_mask"]), expected)
    assert len(samples) > 20
    assert not MHA_SAMPLES.error_inputs_func  # a newer torch may have some


MHA_SAMPLES = next(op for op in op_db if op.name == "nn.functional.multi_head_attention_forward")


def module_of(sample) -> nn.Module:
    """In training mode, so that the dropout of the sample counts."""
    _, _, embed_dim, heads, in_w, in_b, bias_k, bias_v, _, p, out_w, out_b = sample.args
    module = seqkernels.MultiheadAttention(embed_dim, heads, dropout=p, dtype=torch.float64)
    weights = {"in_proj_weight": in_w, "in_proj_bias": in_b, "bias_k": bias_k, "bias_v": bias_v}
    weights |= {n: sample.kwargs[n] for n in ("q_proj_weight", "k_proj_weight", "v_proj_weight")}
    for name, tensor in weights.items():
        setattr(module, name, None if tensor is None else nn.Parameter(tensor))
    module.out_proj.weight, module.out_proj.bias = nn.Parameter(out_w), nn.Parameter(out_b)
    return module


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.usefixtures("same_dropout")
def test_gradients_of_torchs_own_samples_of_the_function(dropout):
    """Once with the dropout they have, and once without."""
    count = 0
    for sample in MHA_SAMPLES.sample_inputs("cpu", torch.float64, requires_grad=True):
        count += 1
        module = module_of(sample)
        qkv, mask = (sample.input, *sample.args[:2]), sample.kwargs["attn_mask"]
        args = list(sample.args)
        if not dropout:
            module.dropout = args[9] = 0.0
        results = []
        for ours in (True, False):
            torch.manual_seed(0)
            if ours:
                out, weights = module(*qkv, attn_mask=mask)
                parameters = [module.in_proj_weight, module.bias_k, module.out_proj.weight]
            else:
                out, weights = F.multi_head_attention_forward(sample.input, *args, **sample.kwargs)
                parameters = [args[4], args[6], args[10]]
            loss = out.sin().sum() + weights.sin().sum()
            results.append((out, weights, torch.autograd.grad(loss, [*qkv, mask, *parameters])))
        assert_close(*results)
    assert count


BAD_CALLS = {
    "four dims": lambda q, k, v: ((q[None], k[None], v[None]), {}),
    "key of two dims": lambda q, k, v: ((q, k[0], v[0]), {}),
    "unbatched with batched keys": lambda q, k, v: ((q[:, 0], k, v), {}),
    "features": lambda q, k, v: ((q[..., :7], k, v), {}),
    "features of keys": lambda q, k, v: ((q, k[..., :7], v), {}),
    "lengths of keys and values": lambda q, k, v: ((q, k, v[:-1]), {}),
    "rows": lambda q, k, v: ((q, k[:, :2], v[:, :2]), {}),
    "dtype": lambda q, k, v: ((q.float(), k.float(), v.float()), {}),
    "padding of one dim": lambda q, k, v: ((q, k, v, torch.zeros(S).bool()), {}),
    "padding of other rows": lambda q, k, v: ((q, k, v, torch.zeros(N + 1, S).bool()), {}),
    "padding of other keys": lambda q, k, v: ((q, k, v, torch.zeros(N, S + 1).bool()), {}),
    "padding of integers": lambda q, k, v: ((q, k, v, torch.zeros(N, S).long()), {}),
    "mask of one dim": lambda q, k, v: ((q, k, v), {"attn_mask": torch.zeros(S).bool()}),
    "mask of other keys": lambda q, k, v: ((q, k, v), {"attn_mask": torch.zeros(L, S + 1).bool()}),
    "mask of other heads": lambda q, k, v: ((q, k, v), {"attn_mask": torch.zeros(N, L, S).bool()}),
    "mask of integers": lambda q, k, v: ((q, k, v), {"attn_mask": torch.zeros(L, S).long()}),
    "a hint without a mask": lambda q, k, v: ((q, k, v), {"is_causal": True}),
    "no key": lambda q, k, v: ((q,), {}),
    "unknown": lambda q, k, v: ((q, k, v), {"mask": None}),
}


@pytest.mark.parametrize("bad", BAD_CALLS.values(), ids=BAD_CALLS)
@pytest.mark.parametrize("need_weights", [False, True])
def test_raises_what_torch_raises(bad, need_weights):
    ours, theirs = twins()
    args, kwargs = bad(*inputs(ours))
    expected = outcome(theirs, *args, **kwargs, need_weights=need_weights)
    assert expected is not None
    result = outcome(ours, *args, **kwargs, need_weights=need_weights)
    assert result == (expected[0], expected[1].replace("nn.Multi", "Multi"))


def test_constructor_raises_what_torch_raises():
    for args in (
        (0, 1),
        (8, 0),
        (8, 3),
        (8,),
        (8, 2, 0.0, True, False, False, None, None, False, None, None, 1),
    ):
        theirs, ours = outcome(nn.MultiheadAttention, *args), outcome(seqkernels.MultiheadAttention, *args)
        assert theirs is not None
        assert ours[0] is theirs[0]
        assert ours[1] == theirs[1] or theirs[0] is TypeError


def test_warns_about_masks_of_two_kinds():
    ours, theirs = twins()
    call = (*inputs(ours), masks("bool", (N, S)), False, masks("float", (L, S)))
    results = []
    for module in (ours, theirs):
        with pytest.warns(
            UserWarning, match="Support for mismatched key_padding_mask and attn_mask is deprecated"
        ):
            results.append(module(*call)[0])
    assert_close(*results)


def test_parameters_pickles_and_repr_are_torchs():
    for options in CONSTRUCTIONS.values():
        parameters = []
        for library in (seqkernels, nn):
            torch.manual_seed(3)
            parameters.append(library.MultiheadAttention(E, H, **options).state_dict())
        assert list(parameters[0]) == list(parameters[1])
        assert_close(*parameters, rtol=0, atol=0)
        ours, theirs = twins(**options)
        assert repr(ours) == repr(theirs)
        qkv = inputs(ours)
        for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert type(twin) is seqkernels.MultiheadAttention
            assert_close(twin(*qkv), theirs(*qkv))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    for options in CONSTRUCTIONS.values():
        ours, theirs = twins(**options, dtype=torch.float32)
        qkv = [t.float() for t in inputs(ours)]
        padding = masks("float", (N, S)).float()
        with torch.autocast("cpu", dtype):
            for need_weights in (False, True):
                result, expected = (m(*qkv, padding, need_weights) for m in (ours, theirs))
                assert_close(result, expected, rtol=0.03, atol=0.03)


def test_parametrized_weights():
    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    ours, theirs = twins()
    for module in (ours, theirs):
        parametrize.register_parametrization(module, "in_proj_weight", Double())
        parametrize.register_parametrization(module.out_proj, "weight", Double())
    qkv = inputs(ours)
    assert_close(run(ours, qkv), run(theirs, qkv))


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.filterwarnings("ignore:seqkernels falls back", "error:There is a performance drop")
def test_transforms_of_functions(need_weights):
    """Batches of batches, tangents: torch's math, whose operators know both."""
    ours, _ = twins(batch_first=True)
    x = torch.randn(3, N, L, E, dtype=torch.float64)
    attend = lambda x: ours(x, x, x, need_weights=need_weights)[0]  # noqa: E731
    rows = torch.stack([attend(row) for row in x])
    assert_close(torch.func.vmap(attend)(x), rows)
    grad = torch.func.grad(lambda x: attend(x).sin().sum())
    assert_close(torch.func.vmap(grad)(x), torch.stack([grad(row) for row in x]))
    (tangent,) = torch.autograd.functional.jvp(attend, x[0], x[1])[1:]
    assert_close(torch.func.jvp(attend, (x[0],), (x[1],))[1], tangent)


@pytest.mark.parametrize("need_weights", [False, True])
def test_tensors_with_a_way_of_their_own_go_torchs(need_weights, monkeypatch):
    """As torch.distributed's: they ask what to do for operators, not for functions, and know torch's only."""
    ours, theirs = twins(batch_first=True)
    qkv = inputs(ours)
    expected = theirs(*qkv, need_weights=need_weights)
    for module in (ours, ours.out_proj):
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(TwoTensor(parameter.detach(), parameter.detach())))
    for op in (seqkernels.ops.attention, seqkernels.ops.linear):
        monkeypatch.setattr(op, "_fwd", None)
    result = ours(*(TwoTensor(t, t) for t in qkv), need_weights=need_weights)
    for r, e in zip(result, expected, strict=True):
        assert r is e is None or (isinstance(r, TwoTensor) and torch.equal(r.a, e))


@constructions
@pytest.mark.usefixtures("same_dropout")
def test_dropout(options):
    ours, theirs = twins(dropout=0.5, **options)
    qkv, mask = inputs(ours), masks("float", (L, S))
    for average in (False, True):
        results = []
        for module in (ours, theirs):
            torch.manual_seed(5)
            results.append(run(module, qkv, attn_mask=mask, average_attn_weights=average))
        assert_close(*results)
    torch.manual_seed(5)
    assert_close(ours(*qkv, attn_mask=mask, need_weights=False)[0], results[0][0])
    assert_close(ours.eval()(*qkv, attn_mask=mask), theirs.eval()(*qkv, attn_mask=mask))


@pytest.mark.parametrize("need_weights", [False, True])
def test_differentiates_twice_behind_dropout(need_weights):
    module = twins(dropout=0.5)[0]
    leaves = [t.requires_grad_() for t in inputs(module)]

    def call(*leaves):
        torch.manual_seed(5)
        return [t for t in module(*leaves, need_weights=need_weights) if t is not None]

    assert gradcheck(call, leaves, fast_mode=True)
    assert gradgradcheck(call, leaves, fast_mode=True)


def test_what_torch_runs_is_said(monkeypatch):
    monkeypatch.setattr(support, "_told", set())
    ours, theirs = twins()
    qkv = inputs(ours)
    call = torch.vmap(lambda x: ours(x, *qkv[1:])[0])
    with pytest.warns(UserWarning, match="the kernels do not know torch.vmap"):
        call(qkv[0][None])
    monkeypatch.setenv("SEQKERNELS_STRICT", "1")
    with pytest.raises(RuntimeError, match="SEQKERNELS_STRICT=1 forbids"):
        call(qkv[0][None])
    with sdpa_kernel(SDPBackend.MATH):  # torch runs because the user wants it
        assert_close(ours.eval()(*qkv), theirs.eval()(*qkv))


def test_memory_does_not_grow_with_the_scores():
    """Padding stays [N, S]: 8192 x 8192 scores of one head would take 256 MiB."""
    T = 8192
    module, x = seqkernels.MultiheadAttention(16, 2, batch_first=True), torch.randn(1, T, 16)
    padding = torch.zeros(1, T, dtype=torch.bool)
    causal = torch.ones(T, T, dtype=torch.bool).triu(1)

    def train():
        for kwargs in ({}, {"attn_mask": causal, "is_causal": True}):
            module(x, x, x, key_padding_mask=padding, need_weights=False, **kwargs)[0].sum().backward()

    assert growth(train) < 100 * MIB


# ---------------------------------------------------------------------------------------------- Transformers


def transformer(**options) -> nn.Transformer:
    options = {"d_model": 16, "nhead": 2, "num_encoder_layers": 2, "num_decoder_layers": 2} | options
    return nn.Transformer(dim_feedforward=32, dropout=0.0, **options).double()


def transformer_calls(batch_first: bool, grad: bool):
    """Arguments with and without padding and causal masks."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 7, 16), (3, 5, 16)) if batch_first else ((7, 3, 16), (5, 3, 16))
    src, tgt = (torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=grad) for s in shapes)
    padding = torch.arange(7) >= torch.tensor([[7], [4], [5]])
    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    yield (src, tgt), {}
    yield (src, tgt), {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    yield (src, tgt), {"src_key_padding_mask": padding, "tgt_mask": causal, "tgt_is_causal": True}
    yield (src, tgt), {"tgt_mask": causal, "tgt_key_padding_mask": padding[:, :5]}


@pytest.fixture
def attended(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that our attention gets."""
    shapes = []

    def spy(q, *args, attention=multihead_attention.attention, **kwargs):
        shapes.append(tuple(q.shape))
        return attention(q, *args, **kwargs)

    monkeypatch.setattr(multihead_attention, "attention", spy)
    return shapes


@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"batch_first": True, "norm_first": True}], ids=str
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_swapped_transformers(options, training, attended):
    model = transformer(**options).train(training)
    batch_first = options.get("batch_first", False)

    def results():
        for args, kwargs in transformer_calls(batch_first, grad=True):
            out = model(*args, **kwargs)
            yield out, torch.autograd.grad(out.sin().sum(), [*args, *model.parameters()])
        for args, kwargs in transformer_calls(batch_first, grad=False):
            with torch.no_grad():
                yield model(*args, **kwargs)

    expected = list(results())
    assert not attended
    assert len(seqkernels.swap_(model)) == 6
    assert_close(list(results()), expected)
    assert len(attended) == 6 * 8
    seqkernels.unswap_(model)
    assert_close(list(results()), expected, rtol=0, atol=0)
    assert len(attended) == 6 * 8


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_padding_is_left_out_in_inference(attended):
    """torch's encoder makes nested tensors of padded ones; they stay what they are."""
    model = transformer(batch_first=True).encoder.eval()
    (src, _), kwargs = list(transformer_calls(True, grad=False))[1]
    padding = kwargs["src_key_padding_mask"]
    seqkernels.swap_(model)
    with torch.no_grad():
        out = model(src, src_key_padding_mask=padding)
    assert attended == [(1, 2, 7 + 4 + 5, 8)] * 2
    expected = model(src, src_key_padding_mask=padding)
    assert_close(out[~padding], expected[~padding])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_in_training_are_torchs():
    """Which refuses them; ours would have left out the dropout."""
    ours = seqkernels.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    with torch.no_grad(), pytest.raises(AssertionError, match="fast path was not hit because training"):
        ours(x, x, x, need_weights=False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_patched_transformers(attended):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with seqkernels.patch():
            model = transformer(batch_first=True).eval()
    plain = transformer(batch_first=True).eval()
    plain.load_state_dict(model.state_dict())
    assert model.encoder.use_nested_tensor
    for args, kwargs in transformer_calls(True, grad=False):
        with torch.no_grad():
            assert_close(model(*args, **kwargs), plain(*args, **kwargs))
    assert len(attended) == 6 * 4


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_layers_of_torch_keep_their_fast_path(attended):
    """In a model with both, only those whose attention is ours take the path in Python."""
    model = transformer(batch_first=True).encoder.eval()
    (src, _), kwargs = list(transformer_calls(True, grad=False))[1]
    padding = kwargs["src_key_padding_mask"]
    with torch.no_grad():
        expected = model(src, src_key_padding_mask=padding)
        for swapped, kept in ((0, 1), (1, 0)):
            seqkernels.swap_(model, lambda name, _, swapped=swapped: name.startswith(f"layers.{swapped}"))
            assert model.layers[swapped].activation_relu_or_gelu == 0
            assert model.layers[kept].activation_relu_or_gelu == 1
            attended.clear()
            with torch.profiler.profile() as profile:
                out = model(src, src_key_padding_mask=padding)
            calls = {event.key: event.count for event in profile.key_averages()}
            assert calls["aten::_transformer_encoder_layer_fwd"] == len(attended) == 1
            assert_close(out[~padding], expected[~padding])
            seqkernels.unswap_(model)


def test_activations_keep_their_fast_path_after_unswapping():
    for activation, code in (
        (F.relu, 1),
        (nn.ReLU(), 1),
        (F.gelu, 2),
        (nn.GELU(), 2),
        (torch.tanh, 0),
        ("gelu", 2),
    ):
        layer = nn.TransformerEncoderLayer(16, 2, 32, activation=activation)
        seqkernels.swap_(layer)
        assert layer.activation_relu_or_gelu == 0
        seqkernels.unswap_(layer)
        assert layer.activation_relu_or_gelu == code


def test_explain():
    model = transformer(batch_first=True)
    seqkernels.swap_(model, lambda name, _: not name.startswith("decoder.layers.1"))
    lines = dict(line.split(": ", 1) for line in seqkernels.explain(model).splitlines())
    isa, threads = torch.ops.seqkernels.get_isa(), torch.get_num_threads()
    ours = f"seqkernels.MultiheadAttention on {isa}, float64, {threads} threads"
    assert lines["encoder.layers.1.self_attn"] == lines["decoder.layers.0.multihead_attn"] == ours
    assert lines["decoder.layers.1.self_attn"].startswith("torch's MultiheadAttention, not swapped yet")
    args, kwargs = list(transformer_calls(True, grad=False))[1]
    lines = dict(
        line.split(": ", 1) for line in seqkernels.explain(model.eval(), *args, **kwargs).splitlines()
    )
    assert lines["encoder.layers.0.self_attn"] == ours


def test_patched_functions():
    q = torch.randn(2, 4, 5, 8)
    expected = F.scaled_dot_product_attention(q, q, q)
    plain = F.scaled_dot_product_attention
    with seqkernels.patch():
        assert F.scaled_dot_product_attention is seqkernels.scaled_dot_product_attention
        assert_close(F.scaled_dot_product_attention(q, q, q), expected)
        with seqkernels.patch():
            pass
        assert F.scaled_dot_product_attention is seqkernels.scaled_dot_product_attention
    assert F.scaled_dot_product_attention is plain


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_one_graph(need_weights, batch_first):
    torch.compiler.reset()
    ours, _ = twins(batch_first=batch_first)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for keys in (5, 6, 9):
        kwargs = {"key_padding_mask": masks("bool", (N, keys)), "need_weights": need_weights}
        qkv = inputs(ours, keys=keys)
        assert_close(run(compiled, qkv, **kwargs), run(ours, qkv, **kwargs))


class Padded(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention, need_weights: bool) -> None:
        super().__init__()
        self.attention, self.need_weights = attention, need_weights

    def forward(self, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.attention(x, x, x, padding, self.need_weights)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_export_with_dynamic_sizes(strict, need_weights):
    rows, tokens = Dim("rows", min=1, max=32), Dim("tokens", min=2, max=64)
    module = Padded(twins(batch_first=True)[0], need_weights).eval()
    sizes = {0: rows, 1: tokens}
    example = torch.randn(N, L, E).double(), torch.zeros(N, L, dtype=torch.bool)
    program = export(module, example, dynamic_shapes={"x": sizes, "padding": sizes}, strict=strict)
    x, padding = torch.randn(2, 9, E).double(), torch.arange(9) >= torch.tensor([[4], [9]])
    assert_close(program.module()(x, padding), module(x, padding))
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = {str(node.target) for graph in graphs for node in graph.nodes}
    assert {"seqkernels.attention_fwd.exported"} <= targets


def test_export_of_a_swapped_encoder():
    model = transformer(batch_first=True).encoder.eval()
    seqkernels.swap_(model)
    sizes = {0: Dim("rows", min=1, max=32), 1: Dim("tokens", min=2, max=64)}
    program = export(model, (torch.randn(3, 5, 16).double(),), dynamic_shapes=(sizes,))
    x = torch.randn(2, 9, 16).double()
    assert_close(program.module()(x), model(x))


def test_swapped_transformers_in_one_graph():
    torch.compiler.reset()
    model = transformer(batch_first=True)
    seqkernels.swap_(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for args, kwargs in transformer_calls(True, grad=True):
        assert_close(compiled(*args, **kwargs), model(*args, **kwargs))


class Wrapped(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(q, k, v)[0]


@pytest.mark.filterwarnings("ignore:seqkernels falls back", "ignore:.*torch.jit.* is deprecated")
def test_scripting_takes_torchs_module():
    ours, theirs = twins()
    qkv = inputs(ours)
    scripted = torch.jit.script(Wrapped(ours))
    assert_close(scripted(*qkv), theirs(*qkv)[0])


@pytest.mark.parametrize("size", [4, 64], ids=["small", "large"])
def test_frozen_results_may_be_written_into(size):
    """A view made in no_grad may not, where gradients are recorded; torch's encoder path gives none."""
    module = seqkernels.MultiheadAttention(size, 2, batch_first=True).eval()
    x, offset = torch.randn(2, 200, size), torch.ones(1, requires_grad=True)
    with torch.no_grad():
        y = module(x, x, x, need_weights=False)[0]
    expected = y + 1
    y += offset
    assert_close(y, expected)


def test_another_number_of_heads():
    ours, theirs = seqkernels.MultiheadAttention(16, 4), nn.MultiheadAttention(16, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(7, 3, 16)
    for heads in (8, 1, 3):
        ours.num_heads = theirs.num_heads = heads
        if heads == 3:
            for module in (ours, theirs):
                with pytest.raises(AssertionError, match="embed_dim 16 not divisible by num_heads 3"):
                    module(x, x, x)
        else:
            assert_close(ours(x, x, x), theirs(x, x, x))
