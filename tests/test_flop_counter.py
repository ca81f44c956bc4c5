"""FlopCounterMode counts of our modules what it counts of torch's."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import seqkernels
from seqkernels.integrations import flop_counter


@pytest.fixture(autouse=True)
def registered():
    flop_counter.register()
    flop_counter.register()


def flops(function, *inputs, backward=True, **options):
    leaves = [t.detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in inputs]
    with FlopCounterMode(display=False) as counter:
        result = function(*leaves, **options)
        if backward:
            y = result if isinstance(result, torch.Tensor) else result[0]
            (y.data if isinstance(y, PackedSequence) else y).sum().backward()
    return counter.get_total_flops()


def products(weights, tokens):
    return 2 * tokens * sum(w.numel() for w in weights if w.dim() == 2)


@pytest.mark.parametrize("kind", ["GRU", "RNN"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_layers_count_as_torchs(kind, options, backward):
    """torch makes the gradient of its zeros h_0, in the first step, where it is not asked for either."""
    theirs, ours = getattr(nn, kind)(5, 7, **options), getattr(seqkernels, kind)(5, 7, **options)
    x = torch.randn(4, 3, 5)
    extra = (
        2 * 3 * sum(w.numel() for n, w in theirs.named_parameters() if "weight_hh" in n) if backward else 0
    )
    assert flops(ours, x, backward=backward) - flops(theirs, x, backward=backward) == extra


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_count_as_torchs(kind):
    theirs, ours = getattr(nn, kind)(5, 7), getattr(seqkernels, kind)(5, 7)
    x, h = torch.randn(3, 5), torch.randn(3, 7, requires_grad=True)
    hx = (h, h) if kind == "LSTMCell" else h
    assert flops(ours, x, hx=hx) == flops(theirs, x, hx=hx)


def test_projections_and_packed_tokens():
    module = seqkernels.LSTM(5, 7, proj_size=3, bidirectional=True)
    weights = list(module.parameters())
    packed = pack_sequence([torch.randn(n, 5) for n in (4, 2, 1)])
    assert flops(module, packed, backward=False) == products(weights, 7)
    inputs = [module.weight_ih_l0, module.weight_ih_l0_reverse]
    assert flops(module, packed) == 3 * products(weights, 7) - products(inputs, 7)  # nobody wants dx


def test_attention_counts_as_torchs():
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 7, 8)
    forward = sdpa_flop_count(q.shape, k.shape, k.shape)
    backward = sdpa_backward_flop_count(q.shape, q.shape, k.shape, k.shape)
    attend = seqkernels.scaled_dot_product_attention
    assert flops(attend, q, k, k, enable_gqa=True, backward=False) == forward
    assert flops(attend, q, k, k, enable_gqa=True) == forward + backward


def test_attention_of_packed_sequences():
    q, cu = torch.randn(9, 4, 8), torch.tensor([0, 4, 9])
    counted = flops(lambda q: seqkernels.varlen_attention(q, q, q, cu, cu, 5, 5), q)
    assert counted == 2 * 4 * (4 * 4 + 5 * 5) * 8 * (2 + 5)


def test_multihead_attention():
    """Where its projections are ours, of large calls, and where they are torch's."""
    for T, E in ((4, 8), (64, 256)):
        module, x = seqkernels.MultiheadAttention(E, 2), torch.randn(T, 1, E)
        attended = 7 * 2 * 2 * T * T * (E // 2)
        assert (
            flops(lambda x, m=module: m(x, x, x, need_weights=False), x) == 3 * 2 * T * 4 * E * E + attended
        )
        weights = 2 * 2 * T * T * (E // 2)
        counted = flops(lambda x, m=module: m(x, x, x), x, backward=False)
        assert counted == 2 * T * 4 * E * E + 2 * weights + weights


def test_additive_attention():
    q, k = torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    counted = flops(lambda q: seqkernels.additive_attention(q, k, k, torch.ones(8)), q)
    assert counted == 3 * 2 * 2 * 3 * 5 * (8 + 8)
