"""What goes beyond torch.nn: lengths, resets, all cell states, recompute, packed weights."""

import copy
import pickle
import sys
from dataclasses import replace

import pytest
import torch
from devices import everywhere
from peak import resident
from tolerances import assert_as_exact
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close
from twins import KINDS, run, run_exactly, states, torch_instead, twins

import seqkernels

kinds = pytest.mark.parametrize("kind", KINDS)
B, T, I, H = 4, 6, 5, 7  # noqa: E741
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def module_of(kind: str, **options) -> nn.Module:
    return getattr(seqkernels, kind)(I, H, 2, **options).double()


def padded(batch_first: bool) -> Tensor:
    return torch.randn((B, T, I) if batch_first else (T, B, I), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- lengths


@everywhere
@kinds
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("lengths", [[3, 6, 1, 4], [6, 6, 6, 6], [2, 2, 2, 2], [6, 5, 4, 1]], ids=str)
def test_lengths_equal_a_packed_sequence(kind, bidirectional, batch_first, lengths):
    module = module_of(kind, bidirectional=bidirectional, batch_first=batch_first)
    x, hx, lengths = padded(batch_first), states(module, B), torch.tensor(lengths)
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    result, expected = run(module, x, hx, lengths=lengths), run(module, packed, hx)
    packed_output = PackedSequence(expected["y"], *packed[1:])
    expected["y"] = pad_packed_sequence(packed_output, batch_first, total_length=T)[0]
    assert_close(result, expected)


@everywhere
@kinds
def test_rows_of_length_zero_keep_their_state_and_give_zeros(kind):
    module = module_of(kind, bidirectional=True)
    x, hx = padded(False), states(module, B)
    result = run(module, x, hx, True, lengths=torch.tensor([0, 3, 0, 6]))
    x, *hx = (t.detach() for t in (x, *hx))
    alone = run(module, x[:, 1::2], tuple(s[:, 1::2] for s in hx), lengths=torch.tensor([3, 6]))
    assert_close(result["y"][:, 1::2], alone["y"])
    assert (result["y"][:, ::2] == 0).all()
    for name, state in zip(("h_n", "c_n"), hx, strict=False):
        assert torch.equal(result[name][:, ::2], state[:, ::2])
        assert_close(result[name][:, 1::2], alone[name])
    assert (result["grad_x"][:, ::2] == 0).all()
    assert (result["grad_x"][3:, 1] == 0).all()


@everywhere
@kinds
def test_all_rows_of_length_zero(kind):
    module = module_of(kind)
    result = run(module, padded(False), states(module, B), True, lengths=torch.zeros(B, dtype=torch.int64))
    assert (result["y"] == 0).all()
    assert all((g == 0).all() for n, g in result.items() if n.startswith("grad_weight"))


@kinds
@pytest.mark.parametrize("lengths", [[3, 0, 6, 1], [0, 0, 0, 0]], ids=str)
def test_second_derivatives_with_lengths(kind, lengths):
    module, lengths = getattr(seqkernels, kind)(2, 3).double(), torch.tensor(lengths)
    x = torch.randn(T, B, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: module(x, lengths=lengths)[0], x)


@kinds
@pytest.mark.parametrize("lengths", [[3, 6, 1, 4], [6, 6, 6, 6], [0, 6, 0, 2]], ids=str)
@pytest.mark.filterwarnings("ignore:seqkernels falls back", "ignore:.*torch.jit.* is deprecated")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_lengths_under_transforms(kind, lengths):
    """torch.func cannot transform torch's own packed layers, nor all of the dense ones."""
    module = getattr(seqkernels, kind)(2, 3, 2, bidirectional=True).double().requires_grad_(False)
    x, lengths = torch.randn(2, T, B, 2, dtype=torch.float64), torch.tensor(lengths)

    def y(x: Tensor) -> Tensor:
        return module(x, lengths=lengths)[0]

    def loss(x: Tensor) -> Tensor:
        return y(x).sin().sum()

    assert_close(torch.vmap(y)(x), torch.stack([y(x[0]), y(x[1])]))
    jacobian = torch.autograd.functional.jacobian(y, x[0])
    for transform in (torch.func.jacfwd, torch.func.jacrev):
        assert_close(transform(y)(x[0]), jacobian)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(y(forward_ad.make_dual(x[0], x[1]))).tangent
    assert_close(tangent, (jacobian * x[1]).sum((3, 4, 5)))
    assert_close(torch.func.hessian(loss)(x[0]), torch.autograd.functional.hessian(loss, x[0]))


@everywhere
@kinds
@pytest.mark.parametrize("batch_first", [False, True])
def test_what_lies_beyond_the_lengths_is_never_read(kind, batch_first):
    module = module_of(kind, bidirectional=True, batch_first=batch_first)
    x, lengths = padded(batch_first), torch.tensor([3, 0, 6, 1])
    beyond = torch.arange(T) >= lengths[:, None]
    dirty = x.clone()
    dirty[beyond if batch_first else beyond.T] = torch.nan
    result, clean = (run(module, v, None, True, lengths=lengths) for v in (dirty, x))
    assert_close(result, clean)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_lengths_of_any_integer_type(dtype):
    module, x = module_of("GRU"), padded(False)
    lengths = torch.tensor([3, 6, 1, 4])
    assert_close(run(module, x, lengths=lengths.to(dtype)), run(module, x, lengths=lengths))


def test_lengths_where_tensors_are_made_on_another_device():
    module, x, lengths = module_of("GRU"), padded(False), torch.tensor([3, 6, 1, 4])
    expected = module(x, lengths=lengths)
    with torch.device("meta"):
        assert_close(module(x, lengths=lengths), expected)


@everywhere
@kinds
def test_lengths_of_an_unbatched_input(kind):
    module, x = module_of(kind), torch.randn(T, I, dtype=torch.float64)
    result, alone = run(module, x, lengths=torch.tensor(4)), run(module, x[:4])
    assert_close(result["y"][:4], alone["y"])
    assert (result["y"][4:] == 0).all()
    assert_close(result["h_n"], alone["h_n"])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([1, 2, 3]), r"lengths must be integers of shape \[4\], got torch.int64 of shape \[3\]"),
        (torch.tensor([[1, 2, 3, 4]]), r"got torch.int64 of shape \[1, 4\]"),
        (torch.tensor([1.0, 2.0, 3.0, 4.0]), r"got torch.float32"),
        (torch.ones(4, dtype=torch.bool), r"got torch.bool"),
        (torch.ones(4, dtype=torch.complex64), r"got torch.complex64"),
        (torch.tensor([1, 2, 7, 3]), r"lengths must lie between 0 and T = 6, got values from 1 to 7"),
        (torch.tensor([1, -2, 3, 3]), r"got values from -2 to 3"),
    ],
    ids=["too few", "2-D", "float", "bool", "complex", "too long", "negative"],
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_bad_lengths(lengths, message, batch_first):
    with pytest.raises(ValueError, match=message):
        module_of("LSTM", batch_first=batch_first)(padded(batch_first), lengths=lengths)


def test_work_goes_with_the_tokens(monkeypatch):
    """The native op sees the tokens that exist, not the padding."""
    from seqkernels import stack

    seen = []

    def spy(x, *args, layer=stack.GRU.layer, **kwargs):
        seen.append(tuple(x.shape))
        return layer(x, *args, **kwargs)

    monkeypatch.setattr(seqkernels.GRU, "_cell", lambda self: replace(stack.GRU, layer=spy))
    module_of("GRU")(padded(False), lengths=torch.tensor([1, 0, 2, 1]))
    assert seen == [(4, I), (4, H)]


# ---------------------------------------------------------------------------------------------- resets


@everywhere
@kinds
@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_equal_separate_sequences(kind, batch_first):
    """A row that is reset at step t is two sequences, both starting from hx."""
    module = getattr(seqkernels, kind)(I, H, batch_first=batch_first).double()
    x, hx = padded(batch_first), states(module, B)
    resets = torch.zeros(x.shape[:2], dtype=torch.bool)
    (resets[:, 2] if batch_first else resets[2]).fill_(True)
    result = run(module, x, hx, resets=resets)
    time = 1 if batch_first else 0
    first, second = (run(module, part.clone(), hx) for part in x.split([2, T - 2], time))
    assert_close(result["y"], torch.cat([first["y"], second["y"]], time))
    assert_close(result["h_n"], second["h_n"])


@everywhere
@kinds
@pytest.mark.parametrize("recompute", [False, True])
def test_resets_equal_the_reference(kind, recompute):
    module = module_of(kind, bidirectional=True)
    module.recompute = recompute
    x, hx, resets = padded(False), states(module, B), torch.rand(T, B) < 0.4
    result = run(module, x, hx, True, resets=resets)
    with torch_instead():
        assert_close(result, run(module, x, hx, True, resets=resets))


@everywhere
@kinds
def test_resets_of_an_unbatched_input(kind):
    module, x = module_of(kind), torch.randn(T, I, dtype=torch.float64)
    resets = torch.tensor([False, False, True, False, True, False])
    assert_close(
        run(module, x, resets=resets)["y"], run(module, x[:, None], resets=resets[:, None])["y"][:, 0]
    )


@pytest.mark.parametrize(
    "resets",
    [torch.zeros(B, T, dtype=torch.bool), torch.zeros(T, B), torch.zeros(T, dtype=torch.bool)],
    ids=["transposed", "float", "1-D"],
)
def test_bad_resets(resets):
    with pytest.raises(ValueError, match=r"resets must be torch.bool of shape \[6, 4\], got"):
        module_of("LSTM")(padded(False), resets=resets)


@pytest.mark.parametrize("extra", [{"lengths": [6, 5, 4, 1]}, {"lengths": 3}, {"resets": [[True]]}], ids=str)
def test_extras_are_tensors(extra):
    name, value = next(iter(extra.items()))
    for x in (padded(False), padded(False)[:, 0]):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got {type(value).__name__}"):
            module_of("GRU")(x, **extra)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"lengths": torch.tensor([3])},
            r"lengths of an unbatched input must have the shape \[\], got \[1\]",
        ),
        ({"resets": torch.tensor(True)}, r"resets of an unbatched input must have the shape \[6\], got \[\]"),
        ({"resets": torch.zeros(T, 1, dtype=torch.bool)}, r"must have the shape \[6\], got \[6, 1\]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_bad_extras_of_an_unbatched_input(extra, message, batch_first):
    with pytest.raises(ValueError, match=message):
        module_of("GRU", batch_first=batch_first)(padded(False)[:, 0], **extra)


@kinds
def test_extras_that_exclude_each_other(kind):
    module, x = module_of(kind), padded(False)
    lengths, resets = torch.full((B,), 3), torch.zeros(T, B, dtype=torch.bool)
    packed = pack_padded_sequence(x, [6, 5, 4, 3])
    for args, kwargs in (
        ((x,), {"lengths": lengths, "resets": resets}),
        ((packed,), {"lengths": lengths}),
        ((packed,), {"resets": resets}),
    ):
        with pytest.raises(ValueError, match="exclude each other"):
            module(*args, **kwargs)


@kinds
def test_extras_do_not_hide_other_mistakes(kind):
    resets = torch.zeros(T, B, dtype=torch.bool)
    with pytest.raises(
        RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 5, got 6"
    ):
        module_of(kind)(torch.randn(T, B, I + 1, dtype=torch.float64), resets=resets)


# ---------------------------------------------------------------------------------------------- cell states


OPTIONS = [{}, {"bidirectional": True}, {"proj_size": 3}, {"batch_first": True}]


@everywhere
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_cell_states(options):
    module = module_of("LSTM", **options)
    x, hx = padded(module.batch_first), states(module, B)
    result = run(module, x, hx, True, return_cell_states=True)
    with torch_instead():
        assert_close(result, run(module, x, hx, True, return_cell_states=True))
    cells = result["cells"].transpose(0, 1) if module.batch_first else result["cells"]
    assert torch.equal(cells[-1, :, :H], result["c_n"][-2 if module.bidirectional else -1])


@everywhere
def test_all_cell_states_of_a_packed_sequence():
    module = module_of("LSTM")
    x, lengths = padded(False), torch.tensor([2, 6, 1, 4])
    cells = module(pack_padded_sequence(x, lengths, enforce_sorted=False), return_cell_states=True)[2]
    assert isinstance(cells, PackedSequence)
    expected = module(x, lengths=lengths, return_cell_states=True)[2]
    assert_close(pad_packed_sequence(cells)[0], expected)


@everywhere
def test_cell_states_have_the_dtype_of_the_output():
    module = seqkernels.LSTM(I, H).bfloat16()
    output, _, cells = module(torch.randn(T, B, I).bfloat16(), return_cell_states=True)
    assert cells.dtype == output.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------- recompute


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Memory that backward keeps, without parameters and input."""
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    for tensor in (x, *module.parameters()):
        seen.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(seen.values())


@everywhere
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_recompute_gives_the_same_with_less_memory(kind, dtype, packed):
    module, theirs = twins(kind, 16, 32, 2, bidirectional=True, dtype=dtype)
    x = torch.randn(50, 8, 16).to(dtype)
    data = pack_padded_sequence(x, [50, 50, 40, 30, 20, 10, 5, 1]) if packed else x
    plain, bytes_plain = run(module, data, None, True), saved_bytes(module, x)
    module.recompute = True
    recomputed, bytes_recomputed = run(module, data, None, True), saved_bytes(module, x)
    expected, exact = run(theirs, data, None, True), run_exactly(theirs, data, None, True)
    assert_as_exact(recomputed, expected, exact, dtype, pooled=True)
    assert torch.equal(recomputed["y"], plain["y"])
    assert bytes_recomputed < 0.5 * bytes_plain


# --------------------------------------------------------------------------------------- saved activations


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_activations_saved_by_two_calls_lie_apart(kind):
    """8 MiB each: the memory of freed ones is kept for later calls."""
    module = getattr(seqkernels, kind)(8, 256)
    xs = [torch.randn(64, 32, 8) for _ in range(3)]
    alone = [torch.autograd.grad(module(x)[0].sum(), list(module.parameters())) for x in xs]
    ys = [module(x)[0] for x in xs]
    for y, expected in zip(ys, alone, strict=True):
        gradients = torch.autograd.grad(y.sum(), list(module.parameters()))
        assert all(map(torch.equal, gradients, expected))


@kinds
def test_gradients_that_keep_their_memory_are_written_whole(kind):
    """Those of 2 MiB and more take the memory of freed ones, which torch does not fill with NaN."""
    module, x = getattr(seqkernels, kind)(730, 730), torch.randn(5, 3, 730)
    first, second = (torch.autograd.grad(module(x)[0].sum(), list(module.parameters())) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert {t.data_ptr() for t in first}.isdisjoint(t.data_ptr() for t in second)
    for t in first:
        t.fill_(torch.nan)
    where = {t.data_ptr() for t in first if t.nbytes >= 2 << 20}
    del first, t
    again = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    assert all(map(torch.equal, again, second))
    assert where & {t.data_ptr() for t in again}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_kept_for_activations_has_a_limit():
    module, before = seqkernels.GRU(4, 64), resident()
    for B in (1000, 1300, 1700, 2200, 1000):  # 62, 81, 106, 138 MiB, none of which fits another
        module(torch.randn(64, B, 4))[0].sum().backward()
    assert resident() - before < 320 << 20


# -------------------------------------------------------------------------------------------- packed weights


@kinds
def test_weights_on_meta_are_not_packed(kind):
    with pytest.raises(RuntimeError, match="weights that hold numbers, got weights on meta"):
        getattr(seqkernels, kind)(3, 4, device="meta").prepack_()


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_weights_give_the_same(kind, dtype):
    module = getattr(seqkernels, kind)(I, 33, 2, bidirectional=True).to(dtype)
    x = torch.randn(T, B, I).to(dtype)
    with torch.no_grad():
        plain = module(x)[0]
        assert module.prepack_() is module
        assert_close(module(x)[0], plain)
        lengths = torch.tensor([2, 0, 6, 4])
        packed = module(x, lengths=lengths)[0]
        assert module._prepacked is not None
        assert_close(module.unprepack_()(x, lengths=lengths)[0], packed)
        assert module._prepacked is None


def changes():
    def in_place(module):
        with torch.no_grad():
            module.weight_hh_l0.mul_(2)

    def optimizer(module):
        sgd = torch.optim.SGD(module.parameters(), 0.5)
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        sgd.step()

    def state(module):
        module.load_state_dict({n: p * 3 for n, p in module.state_dict().items()})

    def assigned(module):
        module.load_state_dict({n: p * 3 for n, p in module.state_dict().items()}, assign=True)

    def elsewhere(module):
        module.weight_hh_l0.data = torch.randn_like(module.weight_hh_l0)

    def elsewhere_and_back(module):  # the second tensor gets the memory of the first, were that free
        for _ in range(2):
            module.weight_hh_l0.data = module.weight_hh_l0.data * 2

    def parameter(module):
        module.weight_ih_l1 = nn.Parameter(torch.randn_like(module.weight_ih_l1))

    def dtype(module):
        module.bfloat16().float()

    def reset(module):
        module.reset_parameters()

    return [in_place, optimizer, state, assigned, elsewhere, elsewhere_and_back, parameter, dtype, reset]


@kinds
@pytest.mark.parametrize("change", changes(), ids=lambda f: f.__name__)
def test_packed_weights_are_dropped_when_weights_change(kind, change):
    module = getattr(seqkernels, kind)(I, H, 2)
    x = torch.randn(T, B, I)
    with torch.no_grad():
        before = module.prepack_()(x)[0]
    change(module)
    fresh = copy.deepcopy(module)
    with torch.no_grad():
        after = module(x)[0]
        assert not torch.equal(after, before)
        assert torch.equal(after, fresh(x)[0])
    assert module._prepacked is None


@kinds
def test_packed_weights_are_dropped_by_training(kind):
    module = getattr(seqkernels, kind)(I, H).prepack_()
    module(torch.randn(T, B, I))[0].sum().backward()
    assert module._prepacked is None
    frozen = getattr(seqkernels, kind)(I, H).requires_grad_(False).prepack_()
    x = torch.randn(T, B, I, requires_grad=True)
    expected = torch.autograd.grad(copy.deepcopy(frozen)(x)[0].sum(), x)
    assert_close(torch.autograd.grad(frozen(x)[0].sum(), x), expected)
    assert frozen._prepacked is not None


@kinds
def test_packed_weights_are_left_out_of_calls_that_cannot_use_them(kind):
    module = getattr(seqkernels, kind)(I, H).requires_grad_(False).prepack_()
    x = torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(module(x)[0], copy.deepcopy(module)(x)[0])
    weights = {n: p * 2 for n, p in module.named_parameters()}
    with torch.no_grad():
        result = torch.func.functional_call(module, weights, (x,))[0]
        module.load_state_dict(weights)
        assert_close(module(x)[0], result)


def test_weights_that_do_not_lie_contiguously_are_packed():
    module, x = seqkernels.GRU(I, H), torch.randn(T, B, I)
    module.weight_hh_l0 = nn.Parameter(torch.stack([module.weight_hh_l0.detach()] * 2, -1)[..., 0])
    with torch.no_grad():
        expected = module(x)[0]
        assert torch.equal(module.prepack_()(x)[0], expected)
    assert module._prepacked is not None


def test_copies_are_without_packed_weights():
    module = seqkernels.GRU(I, H).prepack_()
    assert copy.deepcopy(module)._prepacked is None
    assert pickle.loads(pickle.dumps(module))._prepacked is None
    assert module._prepacked is not None


def test_packs_for_another_instruction_set_are_refused_not_misread():
    module, x = seqkernels.GRU(I, H).prepack_(), torch.randn(T, B, I)
    isa = torch.ops.seqkernels.get_isa()
    if isa == "baseline":
        pytest.skip("there is no other instruction set here")
    torch.ops.seqkernels.set_isa("baseline")
    try:
        with torch.no_grad(), pytest.raises(RuntimeError, match="pack the weights again"):
            module(x)
    finally:
        torch.ops.seqkernels.set_isa(isa)


@kinds
def test_truncated_packs_are_refused(kind):
    weights = [p.detach() for p in getattr(seqkernels, kind)(I, H).parameters()]
    panels = torch.ops.seqkernels.pack_weights(weights, {"LSTM": 4, "GRU": 3, "RNN": 1}[kind], False)
    x, hx = torch.randn(T, B, I), [torch.zeros(1, B, H)] * (2 if kind == "LSTM" else 1)
    forward = getattr(torch.ops.seqkernels, f"{kind.lower()}_layer_fwd")
    rest = {"LSTM": (False, False, False), "GRU": (False, False), "RNN": (False, False)}[kind]
    forward(x, *hx, weights, None, None, panels, *rest)
    with pytest.raises(RuntimeError, match="pack the weights again"):
        forward(x, *hx, weights, None, None, panels[:-64].clone(), *rest)


@everywhere
@kinds
def test_twins_are_not_disturbed(kind):
    """Extras leave the module what it was."""
    ours, theirs = twins(kind, I, H, dtype=torch.float64)
    x = padded(False)
    ours(x, lengths=torch.tensor([1, 2, 3, 4]))
    ours(x, resets=torch.ones(T, B, dtype=torch.bool))
    assert_close(ours(x), theirs(x))
