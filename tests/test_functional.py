"""The functions are what the modules compute, given the weights."""

import pytest
import torch
from devices import everywhere
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close
from twins import KINDS, states

import seqkernels
from seqkernels import functional

kinds = pytest.mark.parametrize("kind", [*KINDS, "RELU"])


def function(kind: str, x: Tensor, hx, weights, **options):
    if kind == "RELU":
        return functional.rnn(x, hx, weights, nonlinearity="relu", **options)
    return getattr(functional, kind.lower())(x, hx, weights, **options)


def torch_module(kind: str, *args, **kwargs) -> nn.Module:
    return (
        nn.RNN(*args, nonlinearity="relu", **kwargs) if kind == "RELU" else getattr(nn, kind)(*args, **kwargs)
    )


@everywhere
@kinds
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_equals_the_module(kind, bias, batch_first):
    options = {"num_layers": 2, "bidirectional": True, "batch_first": batch_first}
    theirs = torch_module(kind, 5, 7, bias=bias, **options)
    x, weights = torch.randn(4, 3, 5), theirs._flat_weights
    hidden = states(theirs, x.size(0 if batch_first else 1))
    hx = hidden if kind == "LSTM" else hidden[0]
    assert_close(function(kind, x, None, weights, **options), theirs(x))
    assert_close(function(kind, x, hx, weights, **options), theirs(x, hx))
    B, T = x.shape[:2] if batch_first else x.shape[1::-1]
    packed = pack_padded_sequence(x, [T] * (B - 1) + [1], batch_first)
    result = function(kind, packed.data, None, weights, **options, batch_sizes=packed.batch_sizes)
    expected = theirs(packed)
    assert_close((result[0], result[1]), (expected[0].data, expected[1]))


@everywhere
@pytest.mark.parametrize("proj_size", [0, 3])
def test_lstm_extras_equal_the_module(proj_size):
    module = seqkernels.LSTM(5, 7, proj_size=proj_size)
    x, resets, lengths = torch.randn(4, 3, 5), torch.rand(4, 3) < 0.5, torch.tensor([2, 0, 4])
    for kwargs in ({"resets": resets}, {"lengths": lengths}):
        result = functional.lstm(
            x, None, module._flat_weights, return_cell_states=True, recompute=True, **kwargs
        )
        assert_close(result, module(x, return_cell_states=True, **kwargs))


@everywhere
@kinds
def test_dropout_acts_in_training_between_layers(kind):
    theirs = torch_module(kind, 5, 7, 2, dropout=0.5)
    x, weights, options = torch.randn(4, 3, 5), theirs._flat_weights, {"num_layers": 2, "dropout": 0.5}
    torch.manual_seed(1)
    result = function(kind, x, None, weights, training=True, **options)[0]
    torch.manual_seed(1)
    assert_close(result, theirs(x)[0])
    assert_close(function(kind, x, None, weights, **options)[0], theirs.eval()(x)[0])


@kinds
def test_dropout_out_of_range_is_told_as_torch_tells_it(kind):
    theirs = torch_module(kind, 5, 7, 2)
    x, options = torch.randn(4, 3, 5), {"num_layers": 2, "training": True}
    for p in (-0.5, 1.5, float("nan")):
        theirs.dropout = p
        with pytest.raises(RuntimeError) as expected:
            theirs(x)
        with pytest.raises(RuntimeError) as told:
            function(kind, x, None, theirs._flat_weights, dropout=p, **options)
        assert str(told.value) == str(expected.value)


@everywhere
@kinds
def test_gradients_reach_weights(kind):
    theirs = torch_module(kind, 5, 7)
    x, weights = torch.randn(4, 3, 5), list(theirs.parameters())
    grads, expected = (
        torch.autograd.grad((y * y).sum(), weights)
        for y in (function(kind, x, None, weights)[0], theirs(x)[0])
    )
    assert_close(grads, expected)


def narrow_dims(hx):
    return tuple(h[0] for h in hx) if isinstance(hx, tuple) else hx[0]


@kinds
def test_mistakes_are_told(kind):
    weights = torch_module(kind, 5, 7)._flat_weights
    x, h = torch.randn(4, 3, 5), torch.zeros(1, 3, 7)
    hx = (h, h) if kind == "LSTM" else h
    twice = (h.repeat(2, 1, 1),) * 2 if kind == "LSTM" else h.repeat(2, 1, 1)
    narrow = (h[..., :6], h[..., :6]) if kind == "LSTM" else h[..., :6]
    counts = "expected equally many weights for {} x 1 layers, got {} tensors".format
    for error, match, args, kwargs in (
        (ValueError, counts(1, 0), (x, hx, []), {}),
        (ValueError, counts(3, len(weights)), (x, hx, weights), {"num_layers": 3}),
        (ValueError, "num_layers must be greater than zero, got 0", (x, hx, weights), {"num_layers": 0}),
        (ValueError, r"expected states of 1 x 1 layers, got \[2", (x, twice, weights), {}),
        (RuntimeError, "larger than 0", (x[:0], hx, weights), {}),
        (RuntimeError, "same batch size", (x[:, :2], hx, weights), {}),
        (
            ValueError,
            r"states of 2 rows, as many as lengths, got \[3",
            (x[:, :2], hx, weights),
            {"lengths": torch.tensor([1, 2])},
        ),
        (TypeError, "batch_sizes must be a tensor, got list", (x[0], hx, weights), {"batch_sizes": [3]}),
        (ValueError, r"states of \[7.* units, as the weights have, got .*, 6\]", (x, narrow, weights), {}),
        (RuntimeError, "expected", (x[..., :4], hx, weights), {}),
        (
            RuntimeError,
            r"expected h0 as float64 \[1, 3, 7\] on cpu, got float32",
            (x.double(), hx, weights),
            {},
        ),
        (ValueError, r"input \[N,I\] with batch_sizes", (x, hx, weights), {"batch_sizes": torch.tensor([3])}),
        (ValueError, "batch_sizes .* one step", (x[0], hx, weights), {"batch_sizes": torch.tensor([])}),
        (ValueError, "batch_sizes .* one step", (x[0], hx, weights), {"batch_sizes": torch.tensor([[3]])}),
        (ValueError, r"input \[T,B,I\], got \[5\]", (x[0, 0], hx, weights), {}),
        (ValueError, "weights of 1 or 2 dimensions", (x, hx, [w[None] for w in weights]), {}),
        (ValueError, "states of 3 dimensions", (x, narrow_dims(hx), weights), {}),
    ):
        with pytest.raises(error, match=match):
            function(kind, *args, **kwargs)


@pytest.mark.parametrize("count", [1, 3])
def test_wrong_number_of_states(count):
    hx = (torch.zeros(1, 3, 7),) * count
    with pytest.raises(ValueError, match=f"expected 2 initial states, got {count}"):
        functional.lstm(torch.randn(4, 3, 5), hx, nn.LSTM(5, 7)._flat_weights)


def test_states_of_one_tensor():
    with pytest.raises(TypeError, match="expected a tuple of 2 initial states, got one tensor"):
        functional.lstm(torch.randn(4, 3, 5), torch.zeros(2, 1, 3, 7), nn.LSTM(5, 7)._flat_weights)


def test_unknown_nonlinearity():
    with pytest.raises(ValueError, match="Unknown nonlinearity 'sin'"):
        functional.rnn(torch.randn(4, 3, 5), None, nn.RNN(5, 7)._flat_weights, nonlinearity="sin")


@kinds
@pytest.mark.filterwarnings("ignore:seqkernels falls back")
def test_other_devices_fall_back_to_torch(kind):
    theirs = torch_module(kind, 5, 7, 2, bidirectional=True, batch_first=True, device="meta")
    x = torch.randn(4, 3, 5, device="meta")
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True}
    output, _ = function(kind, x, None, theirs._flat_weights, **options)
    assert (output.shape, output.device.type) == (theirs(x)[0].shape, "meta")
