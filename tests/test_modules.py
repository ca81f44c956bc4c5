"""LSTM, GRU and RNN are torch.nn's: constructors, parameters, results, errors, and all that users rely on."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from devices import everywhere
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from twins import KINDS, run, states, twins

import seqkernels

kinds = pytest.mark.parametrize("kind", KINDS)


def outcome(function, *args, **kwargs):
    """What a call does: its exception's type and text, or None."""
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)
    return None


def hx_of(module: nn.Module, hidden: tuple[torch.Tensor, ...]):
    return hidden if module.mode == "LSTM" else hidden[0]


# ---------------------------------------------------------------------------------------------- construction


CONSTRUCTORS = [
    ((3, 5), {"dropout": 1.5, "num_layers": 2}),
    ((3, 5), {"dropout": -0.1}),
    ((3, 5), {"dropout": True}),
    ((3, 5), {"dropout": "0.5"}),
    ((3, 5), {"bias": 1}),
    ((3, 5), {"batch_first": "yes"}),
    ((3.0, 5), {}),
    ((3, 5.0), {}),
    ((0, 5), {}),
    ((3, 0), {}),
    ((3, -1), {}),
    ((3, 5), {"num_layers": 0}),
    ((3, 5), {"proj_size": -1}),
    ((3, 5), {"proj_size": 5}),
    ((3, 5), {"proj_size": 2}),
    ((3, 5), {"nonlinearity": "sigmoid"}),
    ((3, 5, 1, "relu"), {}),
    ((3, 5, 1, "sin"), {}),
    ((3,), {}),
    ((3, 5), {"unknown": 1}),
]


@kinds
@pytest.mark.parametrize(("args", "kwargs"), CONSTRUCTORS, ids=str)
def test_constructor_accepts_and_refuses_like_torch(kind, args, kwargs):
    theirs = outcome(getattr(nn, kind), *args, **kwargs)
    ours = outcome(getattr(seqkernels, kind), *args, **kwargs)
    if theirs is not None and theirs[0] is TypeError and "__init__" in theirs[1]:
        assert ours is not None
        assert ours[0] is TypeError
    else:
        assert ours == theirs


@kinds
def test_constructor_positional(kind):
    args = (3, 5, 2, "relu", False, True, 0.5, True) if kind == "RNN" else (3, 5, 2, False, True, 0.5, True)
    ours, theirs = twins(kind, *args)
    assert repr(ours) == repr(theirs)
    for name in (
        "mode",
        "input_size",
        "hidden_size",
        "num_layers",
        "bias",
        "batch_first",
        "dropout",
        "bidirectional",
    ):
        assert getattr(ours, name) == getattr(theirs, name)


@kinds
def test_warns_about_useless_dropout(kind):
    texts = []
    for library in (nn, seqkernels):
        with pytest.warns(UserWarning, match="dropout option adds dropout after all but last") as told:
            getattr(library, kind)(3, 5, dropout=0.5)
        texts.append([str(warning.message) for warning in told])
    assert texts[0] == texts[1]


@kinds
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_are_torchs(kind, bias):
    options = {"num_layers": 2, "bidirectional": True, "bias": bias} | (
        {"proj_size": 2} if kind == "LSTM" else {}
    )
    parameters = []
    for library in (seqkernels, nn):
        torch.manual_seed(3)
        parameters.append(getattr(library, kind)(3, 5, **options).state_dict())
    ours, theirs = parameters
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------------------------------------- results


@everywhere
@kinds
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_results_and_strides_are_torchs(kind, batch_first, bidirectional):
    ours, theirs = twins(kind, 6, 9, 2, batch_first=batch_first, bidirectional=bidirectional)
    for x in (torch.randn(4, 7, 6), torch.randn(4, 6), torch.randn(4, 1, 6), torch.randn(1, 4, 6)):
        batch = None if x.dim() == 2 else x.size(0 if batch_first else 1)
        for hx in (None, states(ours, batch)):
            result, expected = run(ours, x, hx, True), run(theirs, x, hx, True)
            assert_close(result, expected)
            for name in ("y", "h_n"):
                assert result[name].stride() == expected[name].stride()


@everywhere
@kinds
@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_sequences(kind, enforce_sorted, batch_first):
    ours, theirs = twins(kind, 6, 9, 2, batch_first=batch_first, bidirectional=True)
    lengths = [7, 5, 5, 1] if enforce_sorted else [2, 7, 1, 5]
    x = pack_sequence([torch.randn(n, 6) for n in lengths], enforce_sorted)
    for hx in (None, states(ours, 4)):
        assert_close(run(ours, x, hx, True), run(theirs, x, hx, True))
    output, expected = ours(x)[0], theirs(x)[0]
    assert isinstance(output, PackedSequence)
    for ours_index, theirs_index in zip(output[1:], expected[1:], strict=True):
        assert ours_index is theirs_index or torch.equal(ours_index, theirs_index)
    padded, padded_lengths = pad_packed_sequence(output, batch_first)
    assert padded_lengths.tolist() == lengths
    assert_close(padded, pad_packed_sequence(expected, batch_first)[0])


@everywhere
@kinds
def test_hx_in_any_form(kind):
    ours, theirs = twins(kind, 6, 9)
    x = torch.randn(5, 4, 6)
    row = states(ours, 1)
    expanded = tuple(s.expand(-1, 4, -1) for s in row)
    apart = tuple(torch.stack([s, s], -1)[..., 0] for s in states(ours, 4))
    for hidden in (expanded, apart):
        assert not hidden[0].is_contiguous()
        hx = hx_of(ours, hidden)
        for form in (hx, list(hx)) if kind == "LSTM" else (hx,):
            assert_close(ours(x, form), theirs(x, form))


@pytest.mark.parametrize("form", ["unbatched", "packed"])
def test_hx_as_one_tensor(form):
    """Where torch does not look at what kind of sequence it unpacks."""
    ours, theirs = twins("LSTM", 6, 9)
    x, hx = torch.randn(5, 6), torch.randn(2, 1, 9)
    if form == "packed":
        x, hx = pack_sequence([torch.randn(2, 6), torch.randn(5, 6)], False), torch.randn(2, 1, 2, 9)
    assert_close(ours(x, hx), theirs(x, hx))


@everywhere
@kinds
def test_expanded_and_sliced_inputs(kind):
    ours, theirs = twins(kind, 6, 9)
    base = torch.randn(10, 8, 12)
    for x in (
        base[:1, :, :6].expand(5, -1, -1),
        base[::2, ::3, 1:7],
        base[..., ::2],
        base[0, 0, :6].expand(3, 2, 6),
    ):
        assert_close(run(ours, x.clone(), None, True), run(theirs, x.clone(), None, True))
        assert_close(ours(x), theirs(x))


@everywhere
@kinds
def test_batch_of_zero_rows(kind):
    ours, theirs = twins(kind, 6, 9, 2, bidirectional=True)
    x = torch.randn(5, 0, 6)
    assert_close(run(ours, x, states(ours, 0), True), run(theirs, x, states(ours, 0), True))
    assert_close(run(ours, x), run(theirs, x))


@everywhere
@kinds
def test_more_steps_than_cudnn_can(kind):
    ours, theirs = twins(kind, 2, 3)
    x = torch.randn(70_000, 1, 2)
    with torch.no_grad():
        assert_close(ours(x)[0][-1], theirs(x[-1000:])[0][-1])  # a recurrence forgets


@everywhere
@kinds
def test_gradients_in_eval_mode(kind):
    ours, theirs = (m.eval() for m in twins(kind, 6, 9, 2))
    x = torch.randn(5, 4, 6)
    assert_close(run(ours, x, None, True), run(theirs, x, None, True))


@kinds
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(kind, use_reentrant):
    ours, theirs = twins(kind, 6, 9, 2)
    x = torch.randn(5, 4, 6, requires_grad=True)
    y = checkpoint(lambda x: ours(x)[0], x, use_reentrant=use_reentrant)
    leaves = [x, *ours.parameters()]
    expected = torch.autograd.grad(theirs(x)[0].sum(), [x, *theirs.parameters()])
    y.sum().backward()
    assert_close([leaf.grad for leaf in leaves], list(expected))


@kinds
def test_gradients_of_gradients_in_checkpoints(kind):
    def penalty(module, x):
        (grad,) = torch.autograd.grad(module(x)[0].pow(2).sum(), x, create_graph=True)
        return grad.pow(2).sum()

    x, grads = torch.randn(5, 4, 6, requires_grad=True), []
    for module in twins(kind, 6, 9, 2, bidirectional=True):
        loss = checkpoint(penalty, module, x, use_reentrant=False)
        grads.append(torch.autograd.grad(loss, [x, *module.parameters()], allow_unused=True))
    assert_close(*grads)


class LeavesNothing(torch.autograd.Function):
    """Whose backward gives no gradient to what it was made of."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, _):
        return None


@kinds
def test_gradients_of_gradients_of_nothing(kind):
    x, grads = torch.randn(5, 4, 6, requires_grad=True), []
    for module in twins(kind, 6, 9):
        loss = LeavesNothing.apply(module(x)[0]).sum() + x.square().sum()
        grads.append(
            torch.autograd.grad(loss, [x, *module.parameters()], create_graph=True, allow_unused=True)
        )
    assert_close(grads[0][0], grads[1][0])
    assert all(g is None or not g.any() for g in (*grads[0][1:], *grads[1][1:]))


@kinds
@pytest.mark.parametrize("looks_on", ["compile", "export"])
def test_gradients_while_another_thread_is_traced(kind, looks_on):
    """torch's flags are of the process: gradients were lost in an export, second ones in a compilation."""
    begun, done = threading.Event(), threading.Event()

    def wait(graph, _):
        begun.set()
        done.wait(60)
        return graph.forward

    class Waits(nn.Module):
        def forward(self, x):
            begun.set()
            done.wait(60)
            return x + 1

    def trace():
        if looks_on == "compile":
            torch.compile(lambda x: x.sin(), backend=wait)(torch.ones(3))
        else:
            torch.export.export(Waits(), (torch.ones(3),))

    thread = threading.Thread(target=trace)
    thread.start()
    try:
        assert begun.wait(60)
        modules, x = twins(kind, 6, 9), torch.randn(5, 4, 6)
        results = [run(module, x, None, True) for module in modules]
        hessians = [torch.autograd.functional.hessian(lambda x, m=m: m(x)[0].sin().sum(), x) for m in modules]
    finally:
        done.set()
        thread.join()
    assert_close(*results)
    assert_close(*hessians)


@kinds
def test_layouts_that_torch_alone_makes_sense_of(kind):
    ours, theirs = twins(kind, 6, 9)
    nested = torch.nested.nested_tensor([torch.ones(4, 6)] * 2)
    hx = [torch.ones(1, 4, 9)] * (2 if kind == "LSTM" else 1)
    hidden = tuple(h.to_sparse() for h in hx) if kind == "LSTM" else hx[0].to_sparse()
    for arguments in ((nested,), (torch.ones(5, 4, 6), hidden)):
        expected = outcome(theirs, *arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert outcome(ours, *arguments) == expected
            if expected is None:
                assert_close(ours(*arguments), theirs(*arguments))


@everywhere
@kinds
def test_inference_mode(kind):
    ours, theirs = twins(kind, 6, 9)
    x = torch.randn(5, 4, 6)
    with torch.inference_mode():
        assert_close(ours(x), theirs(x))


# ---------------------------------------------------------------------------------------------- dropout


@everywhere
@kinds
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_draws_the_masks_that_torch_draws(kind, packed, p):
    ours, theirs = twins(kind, 6, 9, 3, dropout=p)
    x = torch.randn(5, 4, 6)
    x = pack_padded_sequence(x, [5, 4, 2, 2]) if packed else x
    results = []
    for module in (ours, theirs):
        torch.manual_seed(11)
        results.append(run(module, x, None, True))
    assert_close(*results)
    assert_close(run(ours.eval(), x), run(theirs.eval(), x))


@kinds
def test_dropout_obeys_the_random_state(kind):
    module = getattr(seqkernels, kind)(6, 9, 2, dropout=0.5)
    x = torch.randn(5, 4, 6)
    state = torch.get_rng_state()
    first, second = module(x)[0], module(x)[0]
    torch.set_rng_state(state)
    assert torch.equal(module(x)[0], first)
    assert not torch.equal(first, second)


@everywhere
@kinds
def test_dropout_can_change(kind):
    ours, theirs = twins(kind, 6, 9, 2)
    x = torch.randn(5, 4, 6)
    for p in (0.5, 0.0, 1.0):
        ours.dropout = theirs.dropout = p
        results = []
        for module in (ours, theirs):
            torch.manual_seed(5)
            results.append(module(x)[0])
        assert_close(*results)


# ---------------------------------------------------------------------------------------------- errors

h, c = torch.zeros(1, 2, 5), torch.zeros(1, 2, 5)
BAD_CALLS = {
    "4-D input": (torch.zeros(4, 2, 3, 1),),
    "1-D input": (torch.zeros(3),),
    "wrong features": (torch.zeros(4, 2, 7),),
    "no steps": (torch.zeros(0, 2, 3),),
    "double input": (torch.zeros(4, 2, 3).double(),),
    "half input": (torch.zeros(4, 2, 3).half(),),
    "integer input": (torch.zeros(4, 2, 3).long(),),
    "3-D hx for 2-D input": (torch.zeros(4, 3), h),
    "2-D hx for 3-D input": (torch.zeros(4, 2, 3), h[0]),
    "hx of another batch": (torch.zeros(4, 2, 3), h[:, :1]),
    "hx of another size": (torch.zeros(4, 2, 3), h[..., :4]),
    "hx of other layers": (torch.zeros(4, 2, 3), torch.zeros(2, 2, 5)),
    "unbatched hx of another size": (torch.zeros(4, 3), torch.zeros(1, 4)),
    "packed: wrong features": (PackedSequence(torch.zeros(6, 7), torch.tensor([2, 2, 2])),),
    "packed: hx of another batch": (PackedSequence(torch.zeros(6, 3), torch.tensor([2, 2, 2])), h[:, :1]),
}


@kinds
@pytest.mark.parametrize("call", BAD_CALLS)
def test_errors_are_torchs(kind, call):
    ours, theirs = twins(kind, 3, 5)
    x, *hidden = BAD_CALLS[call]
    args = (x, *((tuple(hidden * 2) if kind == "LSTM" else hidden[0],) if hidden else ()))
    if call.startswith("packed") and kind == "LSTM":  # torch checks nothing here and computes something
        assert outcome(ours, *args)[0] is RuntimeError
    else:
        expected = outcome(theirs, *args)
        assert expected is not None
        assert outcome(ours, *args) == expected


SEVERAL = [
    h,
    torch.zeros(4, 2, 5),
    torch.zeros(2, 1, 5),
    torch.zeros(2, 2, 4),
    torch.zeros(0, 2, 5),
    h[0],
    h[0, 0, 0],
]


@kinds
@pytest.mark.parametrize("hx", SEVERAL, ids=lambda t: str(tuple(t.shape)))
def test_errors_of_several_layers_are_torchs(kind, hx):
    ours, theirs = twins(kind, 3, 5, 2)
    args = torch.zeros(1, 2, 3), (hx, hx) if kind == "LSTM" else hx
    expected = outcome(theirs, *args)
    assert expected is not None
    assert outcome(ours, *args) == expected


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("hx", [(), [], (h,), (h, h, h)], ids=len)
def test_errors_of_how_many_states_are_torchs(layers, hx):
    ours, theirs = twins("LSTM", 3, 5, layers)
    expected = outcome(theirs, torch.zeros(1, 2, 3), hx)
    assert expected is not None
    assert outcome(ours, torch.zeros(1, 2, 3), hx) == expected


@pytest.mark.parametrize(
    "hx",
    [h, (h,), (h, c[:, :1]), (h, c[..., :4]), (h, c[0]), (h[0], c[0]), (h.double(), c), (h, c.double())],
    ids=lambda hx: str([tuple(t.shape) for t in hx]),
)
def test_errors_of_lstm_states_are_torchs(hx):
    ours, theirs = twins("LSTM", 3, 5)
    x = torch.zeros(4, 2, 3)
    expected = outcome(theirs, x, hx)
    assert expected is not None
    assert outcome(ours, x, hx) == expected


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_two_states_in_one_tensor_are_no_pair(kind):
    ours, theirs = (getattr(library, kind)(3, 5) for library in (seqkernels, nn))
    x, hx = (
        (torch.zeros(2, 3), torch.zeros(2, 2, 5)) if kind == "LSTMCell" else (torch.zeros(4, 2, 3), h[None])
    )
    hx = hx.expand(2, *hx.shape[1:])
    assert outcome(ours, x, hx) == outcome(theirs, x, hx)
    with pytest.raises(TypeError):
        ours(x, hx)


@kinds
@pytest.mark.parametrize(
    "call",
    [
        ([1, 2],),
        (torch.zeros(4, 2, 3).numpy(),),
        (torch.zeros(4, 2, 3), "states"),
        (PackedSequence(torch.zeros(6, 3), torch.tensor([[2, 2, 2]])),),
        (PackedSequence(torch.zeros(6, 3), torch.tensor([2.0, 2, 2])),),
    ],
    ids=[
        "a list",
        "an array",
        "states in words",
        "2-D batch_sizes",
        "float batch_sizes",
    ],
)
def test_errors_of_what_is_none_of_it_are_torchs(kind, call):
    ours, theirs = twins(kind, 3, 5)
    x, *hx = call
    args = (x, *((hx * 2 if kind == "LSTM" and torch.is_tensor(hx[0]) else hx[0],) if hx else ()))
    expected = outcome(theirs, *args)
    assert expected is not None
    assert outcome(ours, *args) == expected


@kinds
def test_an_order_of_too_few_rows_is_refused(kind):
    """torch's LSTM writes beyond its memory here."""
    x = PackedSequence(torch.zeros(6, 3), torch.tensor([2, 2, 2]), torch.tensor([0]))
    assert outcome(getattr(seqkernels, kind)(3, 5), x, (h, c) if kind == "LSTM" else h)[0] is RuntimeError


@pytest.mark.parametrize("proj_size", [0, 2])
def test_errors_of_projected_states_are_torchs(proj_size):
    ours, theirs = twins("LSTM", 3, 5, 2, proj_size=proj_size)
    x = torch.zeros(4, 2, 3)
    for P, H in ((5, 5), (2, 2), (2, 5), (5, 2)):
        hx = (torch.zeros(2, 2, P), torch.zeros(2, 2, H))
        assert outcome(ours, x, hx) == outcome(theirs, x, hx)


@everywhere
@kinds
@pytest.mark.parametrize(
    "batch_sizes", [[2, 2, 2], [1, 2, 2], [2, 2], [3, 1, 2], [2, -1, 4], [5, 0, 0, 0]], ids=str
)
def test_malformed_packed_sequences_are_refused(kind, batch_sizes):
    module = getattr(seqkernels, kind)(3, 5)
    x = PackedSequence(torch.randn(5, 3), torch.tensor(batch_sizes))
    if sum(batch_sizes) == 5 and sorted(batch_sizes, reverse=True) == batch_sizes:
        assert module(x)[0].data.isfinite().all()
    else:
        with pytest.raises(RuntimeError, match="batch_sizes"):
            module(x)


@pytest.mark.parametrize("kind", [*KINDS, *(f"{kind}Cell" for kind in KINDS)])
@pytest.mark.parametrize("grad", [True, False])
def test_weights_without_memory_are_refused(kind, grad):
    """On the meta device, as where nobody has loaded them; inputs too may be elsewhere than weights."""
    ours, theirs = (getattr(library, kind)(3, 5, device="meta") for library in (seqkernels, nn))
    here = getattr(seqkernels, kind)(3, 5)
    x = torch.zeros((2, 3) if "Cell" in kind else (4, 2, 3))
    hidden = (torch.zeros(2, 5, device="meta") if "Cell" in kind else h.to("meta"),) * 2
    hx = hidden if "LSTM" in kind else hidden[0]
    with torch.set_grad_enabled(grad):
        assert outcome(ours, x) == outcome(theirs, x) != None  # noqa: E711
        assert outcome(here, x, hx)[0] is RuntimeError


@everywhere
@kinds
def test_wrong_weights_are_refused(kind):
    module = getattr(seqkernels, kind)(3, 5)
    module.weight_hh_l0 = nn.Parameter(torch.randn(4, 5))
    with pytest.raises(RuntimeError, match=r"w_hh|weights"):
        module(torch.randn(4, 2, 3))


# ---------------------------------------------------------------------------------------------- weights


@everywhere
@kinds
@pytest.mark.parametrize("layers", [1, 2])
def test_flat_weights_written_by_hand(kind, layers):
    """Whichever way a call goes; weights that are assigned or loaded later count again, as in torch."""
    ours, theirs = twins(kind, 6, 9, layers)
    x = torch.randn(3, 1, 6)
    for change in (
        lambda m: setattr(m, "_flat_weights", [w * 2 for w in m._flat_weights]),
        lambda m: m._flat_weights.__setitem__(1, m._flat_weights[1] * 3),
        lambda m: m.double().float(),
    ):
        for module in (ours, theirs):
            change(module)
        for form in (x, x[:, 0], pack_sequence([x[:, 0]])):
            assert_close(run(ours, form), run(theirs, form))


def test_weight_assignment_reaches_flat_weights():
    module = seqkernels.GRU(3, 5)
    weight = nn.Parameter(torch.randn(15, 5))
    module.weight_hh_l0 = weight
    assert module._flat_weights[1] is weight
    assert [p.shape for p in module.all_weights[0]] == [w.shape for w in module._flat_weights]


@kinds
def test_partial_flat_weights(kind):
    """A weight can go and come back, as weight dropping does it."""
    ours, theirs = twins(kind, 6, 9, 2)
    x = torch.randn(3, 2, 6)
    weight = ours.weight_hh_l0
    del ours.weight_hh_l0
    assert not hasattr(ours, "weight_hh_l0")
    ours.double()
    ours.weight_hh_l0 = weight
    ours.float()
    assert_close(ours(x), theirs(x))


@everywhere
@kinds
def test_plain_tensor_as_weight(kind):
    """DropConnect as users write it: the parameter makes way for a tensor computed from it."""
    ours, theirs = twins(kind, 6, 9)
    x = torch.randn(3, 2, 6)
    for module in (ours, theirs):
        raw = module.weight_hh_l0
        del module._parameters["weight_hh_l0"]
        module.register_parameter("weight_hh_l0_raw", raw)
        module.weight_hh_l0 = raw * 0.5
        module(x)[0].sum().backward()
    assert_close(ours(x), theirs(x))
    assert_close(ours.weight_hh_l0_raw.grad, theirs.weight_hh_l0_raw.grad)


@everywhere
@kinds
@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, torch.nn.utils.weight_norm], ids=["parametrization", "hook"]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weight_norm(kind, norm):
    ours, theirs = twins(kind, 6, 9)
    x = torch.randn(3, 2, 6)
    for module in (ours, theirs):
        norm(module, "weight_hh_l0")
        norm(module, "weight_ih_l0")
        with torch.no_grad():
            next(p for n, p in module.named_parameters() if n.endswith(("_g", "original0"))).mul_(2)
    assert_close(run_grads(ours, x), run_grads(theirs, x))
    if norm is parametrizations.weight_norm:
        for module in (ours, theirs):
            parametrize.remove_parametrizations(module, "weight_hh_l0")
        assert_close(run_grads(ours, x), run_grads(theirs, x))


def run_grads(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    y = module(x)[0]
    return y, torch.autograd.grad((y * y).sum(), list(module.parameters()))


@everywhere
@kinds
def test_tied_weights(kind):
    ours, theirs = twins(kind, 9, 9, bidirectional=True)
    x = torch.randn(3, 2, 9)
    for module in (ours, theirs):
        module.weight_hh_l0_reverse = module.weight_hh_l0
        module.bias_ih_l0_reverse = module.bias_hh_l0
    assert_close(run_grads(ours, x), run_grads(theirs, x))


@everywhere
@kinds
def test_functional_call(kind):
    ours, theirs = twins(kind, 6, 9)
    x = torch.randn(3, 2, 6)
    weights = {n: p.detach() * 2 for n, p in ours.named_parameters()}
    assert_close(
        torch.func.functional_call(ours, weights, (x,)), torch.func.functional_call(theirs, weights, (x,))
    )
    assert_close(ours(x), theirs(x))


@everywhere
@kinds
def test_weights_that_do_not_lie_contiguously(kind):
    ours, theirs = twins(kind, 6, 9)
    x = torch.randn(3, 2, 6)
    for module in (ours, theirs):
        module.weight_hh_l0 = nn.Parameter(torch.stack([module.weight_hh_l0.detach()] * 2, -1)[..., 0])
        assert not module.weight_hh_l0.is_contiguous()
    assert_close(run_grads(ours, x), run_grads(theirs, x))


@kinds
def test_state_dict_goes_both_ways(kind):
    ours, theirs = getattr(seqkernels, kind)(6, 9, 2), getattr(nn, kind)(6, 9, 2)
    x = torch.randn(3, 2, 6)
    theirs.load_state_dict(ours.state_dict())
    assert_close(ours(x), theirs(x))
    ours.load_state_dict(getattr(nn, kind)(6, 9, 2).state_dict(), assign=True)
    theirs.load_state_dict(ours.state_dict())
    assert_close(ours(x), theirs(x))


@everywhere
@kinds
def test_copies_and_pickles_work_on(kind):
    ours, theirs = twins(kind, 6, 9, 2)
    x = torch.randn(3, 2, 6)
    for copied in (copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours))):
        assert_close(run_grads(copied, x), run_grads(theirs, x))
        assert torch.equal(copied.double().weight_ih_l0, copied._flat_weights[0])
        ours.float()


@kinds
def test_state_of_old_versions_loads(kind):
    """Before torch 1.8 there was no proj_size, and all_weights held names under another key."""
    ours, theirs = twins(kind, 6, 9)
    state = ours.__getstate__()
    del state["proj_size"]
    state["all_weights"] = state.pop("_all_weights")
    loaded = type(ours).__new__(type(ours))
    loaded.__setstate__(state)
    x = torch.randn(3, 2, 6)
    assert_close(loaded(x), theirs(x))


@everywhere
@kinds
def test_moves_between_dtypes(kind):
    ours, theirs = twins(kind, 6, 9)
    for move in ("double", "bfloat16", "float"):
        getattr(ours, move)()
        getattr(theirs, move)()
        x = torch.randn(3, 2, 6).to(ours.weight_ih_l0.dtype)
        assert_close(ours(x), theirs(x), rtol=0.02, atol=0.02)
        assert ours._flat_weights[0].dtype == ours.weight_ih_l0.dtype


@everywhere
@kinds
def test_replicas_of_data_parallel(kind):
    """nn.DataParallel copies a module without its parameters and puts tensors in their place."""
    ours, theirs = twins(kind, 6, 9)
    replica = ours._replicate_for_data_parallel()
    for name, parameter in ours.named_parameters():
        setattr(replica, name, parameter * 2)
    scaled = {n: p * 2 for n, p in theirs.named_parameters()}
    x = torch.randn(3, 2, 6)
    assert_close(replica(x), torch.func.functional_call(theirs, scaled, (x,)))
    assert_close(ours(x), theirs(x))


@everywhere
@kinds
def test_hooks_run(kind):
    module, seen = getattr(seqkernels, kind)(6, 9), []
    module.register_forward_pre_hook(lambda m, args: seen.append("before"))
    module.register_forward_hook(lambda m, args, output: seen.append("after"))
    module.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    module(torch.randn(3, 2, 6, requires_grad=True))[0].sum().backward()
    assert seen == ["before", "after", "backward"]


# ---------------------------------------------------------------------------------------------- autocast


@everywhere
@pytest.mark.parametrize("kind", [*KINDS, "projected LSTM"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["dense", "ragged", "even", "with hx"])
def test_autocast(kind, dtype, input_dtype, form):
    kind, options = kind.rpartition(" ")[2], {"proj_size": 4} if "projected" in kind else {}
    ours, theirs = twins(kind, 6, 9, 2, **options)
    x = torch.randn(5, 3, 6).to(input_dtype)
    if form in ("ragged", "even"):
        x = pack_padded_sequence(x, [5, 3, 3] if form == "ragged" else [5, 5, 5])
    hx = states(ours, 3) if form == "with hx" else None
    with torch.autocast("cpu", dtype):
        result = run(ours, x, hx)
        try:
            expected, exact_dtypes = run(theirs, x, hx), True
            if (kind, form, options) == ("LSTM", "even", {}) and torch.__version__ < (2, 12):
                expected = {name: t.to(dtype) for name, t in expected.items()}  # torch 2.11 leaves float32
        except RuntimeError:  # oneDNN has a 16-bit LSTM on some processors only, torch asks for it on all
            with torch.backends.mkldnn.flags(enabled=False):
                expected, exact_dtypes = run(theirs, x, hx), False
        by_onednn = (kind, options) == ("LSTM", {}) and form != "ragged"
        if by_onednn and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            # without AVX-512 a loop of single ops, where the states' dtype may win; oneDNN gives this one
            expected = {name: t.to(dtype) for name, t in expected.items()}
        assert_close(result, expected, rtol=0.03, atol=0.03, check_dtype=exact_dtypes)
        gradients = run(ours, x, hx, True)
    with torch.autocast("cpu", enabled=False):
        exact = run(theirs, x, hx, True) if input_dtype == torch.float32 else None
    if exact is not None:
        assert_close(gradients, exact, rtol=0.1, atol=0.1, check_dtype=False)
        assert all(gradients[name].dtype == torch.float32 for name in gradients if name.startswith("grad"))


@everywhere
@kinds
def test_autocast_leaves_double_alone(kind):
    ours, theirs = twins(kind, 6, 9, dtype=torch.float64)
    x = torch.randn(5, 3, 6).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(run(ours, x), run(theirs, x))


@everywhere
@kinds
@pytest.mark.parametrize("double", ["weights", "x", "hx"])
@pytest.mark.parametrize("form", ["dense", "packed", "lengths"])
def test_autocast_casts_no_double(kind, double, form):
    """So what is double alone is an error, and torch's."""
    ours, theirs = twins(kind, 6, 9, dtype=torch.float64 if double == "weights" else torch.float32)
    x, hidden = torch.randn(5, 3, 6), torch.randn(1, 3, 9)
    x, hidden = x.double() if double == "x" else x, hidden.double() if double == "hx" else hidden
    hx = hx_of(ours, (hidden, hidden))
    extras = {"lengths": torch.tensor([5, 3, 1])} if form == "lengths" else {}
    x = pack_padded_sequence(x, [5, 3, 1]) if form == "packed" else x
    with torch.autocast("cpu", torch.bfloat16):
        expected = outcome(theirs, x, hx)
        assert expected is not None
        assert outcome(ours, x, hx, **extras) == expected


@everywhere
@kinds
def test_autocast_casts_no_double_of_the_weights(kind):
    ours, theirs = twins(kind, 6, 9)
    function, x = getattr(seqkernels.functional, kind.lower()), torch.randn(5, 3, 6)
    for module in (ours, theirs):
        module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert outcome(theirs, x)[0] is RuntimeError
        for call in (lambda: ours(x), lambda: function(x, None, ours._flat_weights)):
            with pytest.raises(RuntimeError, match="expected w_hh"):
                call()


@pytest.mark.parametrize("kind", ["GRU", "RNN"])
@pytest.mark.filterwarnings("ignore:seqkernels falls back")
def test_distributed_tensors_are_left_to_torch(kind):
    """torch's LSTM refuses them on a CPU."""
    tensor = pytest.importorskip("torch.distributed.tensor", reason="this torch has no DTensor")
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        ours, theirs = (tensor.distribute_module(m, mesh) for m in twins(kind, 5, 7))
        x, hx = (
            tensor.distribute_tensor(t, mesh, [tensor.Replicate()])
            for t in (torch.randn(4, 3, 5), torch.zeros(1, 3, 7))
        )
        for got, expected in zip(ours(x, hx), theirs(x, hx), strict=True):
            assert isinstance(got, tensor.DTensor)
            assert_close(got.full_tensor(), expected.full_tensor())
    finally:
        torch.distributed.destroy_process_group()


def test_importing_and_running_warns_nothing():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for kind in KINDS:
            run(getattr(seqkernels, kind)(3, 5, 2, bidirectional=True), torch.randn(4, 2, 3), None, True)
    assert told == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_frozen_results_may_be_written_into(kind, options):
    """A view made in no_grad may not, where gradients are recorded; torch's results are none."""
    module, offset = (
        getattr(seqkernels, kind)(4, 4, batch_first=True, **options),
        torch.ones(1, requires_grad=True),
    )
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        y = module(x)[0]
    expected = y + 1
    y += offset
    assert_close(y, expected)
    y = module(x)[0].sum()
    y.backward()
