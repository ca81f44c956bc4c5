"""LSTMCell, GRUCell and RNNCell are torch.nn's."""

import copy
import pickle
import weakref

import pytest
import torch
from devices import everywhere
from test_modules import outcome
from tolerances import assert_as_exact
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import seqkernels
from seqkernels.bench.cases import Case
from seqkernels.bench.memory import MemoryMeter
from seqkernels.ops._autograd import autocast_weights

KINDS = ("LSTMCell", "GRUCell", "RNNCell")
kinds = pytest.mark.parametrize("kind", KINDS)


def cells(kind: str, *args, dtype: torch.dtype = torch.float32, **kwargs) -> tuple[nn.Module, nn.Module]:
    theirs = getattr(nn, kind)(*args, **kwargs).to(dtype)
    ours = getattr(seqkernels, kind)(*args, **kwargs).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def hidden(kind: str, *shape: int, dtype: torch.dtype = torch.float32):
    h, c = torch.randn(2, *shape).to(dtype)
    return (h, c) if kind == "LSTMCell" else h


def run(cell: nn.Module, x: Tensor, hx) -> dict[str, Tensor]:
    """States and the gradients of a linear function of them with slopes that are exact in every dtype."""
    hs = () if hx is None else hx if isinstance(hx, tuple) else (hx,)
    leaves = dict(zip(("x", "h", "c"), (x, *hs), strict=False)) | dict(cell.named_parameters())
    for leaf in leaves.values():
        leaf.requires_grad_()
    new = cell(x, hx)
    new = new if isinstance(new, tuple) else (new,)
    slopes = torch.Generator().manual_seed(1)
    loss = sum((s.double() * torch.randint(-4, 5, s.shape, generator=slopes)).sum() for s in new)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(("h'", "c'"), new, strict=False)) | {
        f"grad_{n}": g for n, g in zip(leaves, grads, strict=True)
    }


@everywhere
@kinds
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(), (0,), (1,), (3,), (17,), (64,)], ids=str)
def test_results_and_gradients_are_torchs(kind, bias, rows):
    ours, theirs = cells(kind, 6, 9, bias=bias)
    x = torch.randn(*rows, 6)
    for hx in (None, hidden(kind, *rows, 9)):
        assert_close(run(ours, x, hx), run(theirs, x, hx))
        with torch.no_grad():
            result, expected = ours(x, hx), theirs(x, hx)
        assert_close(result, expected)
        assert type(result) is type(expected)


@everywhere
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "inputs", "units"),
    [(1, 1, 1), (1, 64, 64), (5, 33, 31), (40, 17, 65), (13, 128, 96), (17, 20, 171)],
)
def test_as_exact_as_torch(kind, dtype, rows, inputs, units):
    ours, theirs = cells(kind, inputs, units, dtype=dtype)
    x, hx = torch.randn(rows, inputs).to(dtype), hidden(kind, rows, units, dtype=dtype)
    wide = tuple(s.detach().double() for s in hx) if isinstance(hx, tuple) else hx.detach().double()
    truth = run(copy.deepcopy(theirs).double(), x.detach().double(), wide)
    assert_as_exact(run(ours, x, hx), run(theirs, x, hx), truth, dtype)


@everywhere
def test_relu():
    ours, theirs = cells("RNNCell", 6, 9, nonlinearity="relu")
    x, hx = torch.randn(3, 6), torch.randn(3, 9)
    assert_close(run(ours, x, hx), run(theirs, x, hx))


@everywhere
@kinds
def test_tensors_that_do_not_lie_contiguously(kind):
    ours, theirs = cells(kind, 6, 9)
    sequence, states = torch.randn(3, 5, 6), torch.randn(2, 9, 3)
    hx = (states[0].T, states[1].T) if kind == "LSTMCell" else states[0].T
    with torch.no_grad():
        for x in (sequence[:, 2], torch.randn(6).expand(3, 6), torch.randn(3, 12)[:, ::2]):
            assert not x.is_contiguous()
            assert_close(ours(x, hx), theirs(x, hx))
        for cell in (ours, theirs):
            cell.weight_hh = nn.Parameter(torch.stack([cell.weight_hh] * 2, -1)[..., 0])
        assert_close(ours(x, hx), theirs(x, hx))
    assert_close(run(ours, x.clone(), None), run(theirs, x.clone(), None))


@everywhere
def test_one_output_alone_has_a_gradient():
    ours, theirs = cells("LSTMCell", 6, 9)
    x, hx = torch.randn(3, 6), hidden("LSTMCell", 3, 9)
    for i in (0, 1):
        grads, expected = (
            torch.autograd.grad(cell(x, hx)[i].sum(), list(cell.parameters())) for cell in (ours, theirs)
        )
        assert_close(grads, expected)


@everywhere
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_h_may_be_written_into(kind):
    """As a mask that ends episodes does it. c of an LSTMCell and h of an RNNCell belong to backward."""
    results = []
    for cell in cells(kind, 6, 9):
        torch.manual_seed(1)
        x, state = torch.randn(3, 6), hidden(kind, 3, 9)
        for _ in range(3):
            state = cell(x, state)
            h = state[0] if isinstance(state, tuple) else state
            h *= torch.tensor([[0.0], [1.0], [0.5]])
        results.append((h, torch.autograd.grad(h.sum(), list(cell.parameters()))))
    assert_close(*results)


@everywhere
@kinds
def test_gradients_flow_through_many_steps(kind):
    ours, theirs = cells(kind, 6, 9)
    xs, hx = torch.randn(20, 3, 6), hidden(kind, 3, 9)
    results = []
    for cell in (ours, theirs):
        state = hx
        for x in xs:
            state = cell(x, state)
        y = state[0] if isinstance(state, tuple) else state
        results.append((y, torch.autograd.grad(y.sum(), list(cell.parameters()))))
    assert_close(*results)


h = torch.zeros(3, 5)
BAD_CALLS = {
    "3-D input": (torch.zeros(1, 3, 4), None),
    "0-D input": (torch.zeros(()), None),
    "wrong features": (torch.zeros(3, 7), None),
    "wrong features, unbatched": (torch.zeros(7), None),
    "wrong hidden size": (torch.zeros(3, 4), torch.zeros(3, 6)),
    "another batch": (torch.zeros(3, 4), torch.zeros(2, 5)),
    "batch of one for many": (torch.zeros(3, 4), torch.zeros(1, 5)),
    "hx of one row for a batch": (torch.zeros(3, 4), torch.zeros(5)),
    "3-D hx": (torch.zeros(3, 4), torch.zeros(1, 3, 5)),
    "batched hx for one row": (torch.zeros(4), h),
    "hx in a list": (torch.zeros(3, 4), [h]),
    "hx in a tuple, unbatched": (torch.zeros(4), (h, h)),
    "an array for hx": (torch.zeros(3, 4), h.numpy()),
    "double input": (torch.zeros(3, 4).double(), None),
    "double hx": (torch.zeros(3, 4), h.double()),
    "integer input": (torch.zeros(3, 4).long(), None),
}


@kinds
@pytest.mark.parametrize("call", BAD_CALLS)
@pytest.mark.parametrize("grad", [True, False])
def test_errors_are_torchs(kind, call, grad):
    ours, theirs = cells(kind, 4, 5)
    x, state = BAD_CALLS[call]
    hx = (state, state) if kind == "LSTMCell" and state is not None else state
    with torch.set_grad_enabled(grad):
        expected = outcome(theirs, x, hx)
        assert expected is not None
        assert outcome(ours, x, hx) == expected


@pytest.mark.parametrize(
    "hx",
    [(h,), (h, torch.zeros(3, 6)), (h, torch.zeros(2, 5)), (h, torch.zeros(5)), (h, None), h.numpy()],
    ids=["one", "size", "batch", "1-D", "none", "array"],
)
def test_errors_of_cell_states_are_torchs(hx):
    ours, theirs = cells("LSTMCell", 4, 5)
    expected = outcome(theirs, torch.zeros(3, 4), hx)
    assert expected is not None
    assert outcome(ours, torch.zeros(3, 4), hx) == expected


def test_what_only_torch_understands_is_left_to_torch_with_a_warning():
    ours, theirs = cells("LSTMCell", 4, 5)
    x, hx = torch.randn(3, 4), (torch.randn(3, 5), torch.randn(3, 5).double())
    with pytest.warns(UserWarning, match="falls back to torch: lstm_cell_fwd: expected c"):
        result = ours(x, hx)
    assert_close(result, theirs(x, hx))


def test_unknown_nonlinearity():
    ours, theirs = cells("RNNCell", 4, 5)
    ours.nonlinearity = theirs.nonlinearity = "sin"
    assert (
        outcome(ours, torch.zeros(3, 4))
        == outcome(theirs, torch.zeros(3, 4))
        == (RuntimeError, "Unknown nonlinearity: sin")
    )


@everywhere
@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast(kind, dtype, input_dtype):
    ours, theirs = cells(kind, 6, 9, dtype=torch.float64 if input_dtype == torch.float64 else torch.float32)
    x = torch.randn(3, 6).to(input_dtype)
    with torch.autocast("cpu", dtype):
        for hx in (None, hidden(kind, 3, 9, dtype=x.dtype)):
            assert_close(ours(x, hx), theirs(x, hx), rtol=0.02, atol=0.02)


@everywhere
@kinds
@pytest.mark.parametrize("double", ["weights", "x", "hx"])
def test_autocast_casts_no_double(kind, double):
    """So what is double alone is an error, and torch's."""
    ours, theirs = cells(kind, 6, 9, dtype=torch.float64 if double == "weights" else torch.float32)
    x = torch.randn(3, 6).to(torch.float64 if double == "x" else torch.float32)
    hx = hidden(kind, 3, 9, dtype=torch.float64 if double == "hx" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = outcome(theirs, x, hx)
        assert expected is not None
        assert outcome(ours, x, hx) == expected


@kinds
def test_parameters_repr_and_copies(kind):
    parameters = []
    for library in (seqkernels, nn):
        torch.manual_seed(3)
        parameters.append(getattr(library, kind)(6, 9).state_dict())
    assert_close(*parameters, rtol=0, atol=0)
    ours, theirs = cells(kind, 6, 9, bias=False)
    assert repr(ours) == repr(theirs)
    assert ours.bias_ih is None
    assert isinstance(ours, getattr(nn, kind))
    x = torch.randn(3, 6)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is type(ours)
        assert_close(copied(x), theirs(x))


@everywhere
@kinds
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_weights_from_elsewhere(kind):
    x = torch.randn(3, 6)
    for norm in (parametrizations.weight_norm, torch.nn.utils.weight_norm):
        ours, theirs = cells(kind, 6, 9)
        for cell in (ours, theirs):
            norm(cell, "weight_hh")
        hx = hidden(kind, 3, 9)
        assert_close(run(ours, x, hx), run(theirs, x, hx))
    ours, theirs = cells(kind, 6, 9)
    weights = {n: p.detach() * 2 for n, p in ours.named_parameters()}
    result, expected = (torch.func.functional_call(c, weights, (x,)) for c in (ours, theirs))
    assert_close(result, expected)


@kinds
def test_training_takes_no_more_memory_than_torchs(kind):
    B, H = 192, 768
    case = Case(cell=kind.removesuffix("Cell").lower(), mode="train", step=True, T=1, B=B, I=H, H=H)
    with MemoryMeter() as meter:
        ours, torchs = (meter.peak(case, name)[0] for name in ("seqkernels", "torch"))
    if kind == "RNNCell":  # MB: torch 10.4 on AMD, 8.1 to 8.7 on Intel (MKL packs nothing), ours 8.9
        weights, rows = 2 * 4 * H * H, 4 * B * H
        torchs = max(torchs, weights + 7.5 * rows)
    assert ours <= torchs


# ------------------------------------------------------------------------------------------------- autocast


@kinds
def test_autocast_casts_weights_once(kind):
    """As torch does until autocast ends; what is written into a weight meanwhile counts."""
    cell, x = getattr(seqkernels, kind)(5, 7), torch.randn(3, 5)
    weights = [cell.weight_ih, cell.weight_hh]

    def cast() -> list[torch.Tensor]:
        return autocast_weights(torch.bfloat16, *weights)

    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            frozen = cast()
        first = cast()
        assert [w.data_ptr() for w in frozen] == [w.data_ptr() for w in first]
        assert not any(w.requires_grad for w in frozen)
        assert all(a is b for a, b in zip(cast(), first, strict=True))
        hx = None
        for _ in range(3):
            hx = cell(x, hx)
        loss = (hx[0] if kind == "LSTMCell" else hx).float().sum()
        assert all(g.abs().sum() > 0 for g in torch.autograd.grad(loss, weights))
        with torch.no_grad():
            cell.weight_hh.mul_(2)
        assert_close(cast(), [w.bfloat16() for w in weights], rtol=0, atol=0)
        seen = [weakref.ref(w) for w in first]
        del first, frozen
    assert not any(w() for w in seen)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach() * 0, lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        assert_close(cast(), [w.bfloat16() for w in weights], rtol=0, atol=0)
