"""LSTM, GRU and RNN as functions of their weights: all layers, both directions, any batch of sequences."""

from collections.abc import Sequence

from torch import Tensor

from seqkernels import stack, support


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
    return_cell_states: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]] | tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """A multi-layer LSTM (Hochreiter & Schmidhuber 1997, with forget gate), differentiable twice.

    T steps, B rows, I inputs, H hidden units, P outputs (H if not projected), L layers, D directions:
        input [T,B,I], [B,T,I] if batch_first, or packed [N,I] with batch_sizes [T], int64 on the CPU
        hx: h_0 [L*D,B,P] and c_0 [L*D,B,H], zeros if None
        weights: as `torch.nn.LSTM`'s flat weights, for each layer and direction
            w_ih [4*H,I or D*P], w_hh [4*H,P], maybe b_ih [4*H] and b_hh [4*H], maybe w_hr [P,H]
        lengths: integers [B] from 0 to T on any device; output is zero beyond, states are those at the length
        resets: bool like input without features; where True, the state becomes hx's before that step
    Returns output [T,B,D*P] (laid out as input is), (h_n [L*D,B,P], c_n [L*D,B,H]), and if return_cell_states
    every c_t of the last layer, [T,B,D*H].

    dtypes: float32, float64, bfloat16, float16, all tensors the same one. Half types accumulate in float32.
    recompute: backward rebuilds the gates from states and inputs: less memory in training for more time.
    Raises ValueError or RuntimeError for sizes and dtypes that do not fit, no time steps, or more than one of
    batch_sizes, lengths and resets; TypeError for arguments that are no tensors.
    Equal to `torch._VF.lstm(input, hx, weights, has_biases, num_layers, dropout, training, bidirectional,
    batch_first)`, or with batch_sizes after input and no batch_first.
    """
    config = stack.Config(num_layers, bidirectional, batch_first, dropout, training, recompute)
    outputs, states = stack.run(
        stack.LSTM,
        config,
        input,
        hx,
        weights,
        batch_sizes=batch_sizes,
        lengths=lengths,
        resets=resets,
        return_cells=return_cell_states,
        why_torch=support.why_torch(input),
    )
    return outputs[0], tuple(states), *outputs[1:]


def gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """A multi-layer GRU (Cho et al. 2014; reset gate after the matrix product), differentiable twice.

    Arguments and errors as in `lstm`, with hx h_0 [L*D,B,H] and for each layer and direction the weights
    w_ih [3*H,I or D*H], w_hh [3*H,H], maybe b_ih [3*H] and b_hh [3*H].
    Returns output [T,B,D*H] (laid out as input is) and h_n [L*D,B,H].
    Equal to `torch._VF.gru(input, hx, weights, has_biases, num_layers, dropout, training, bidirectional,
    batch_first)`, or with batch_sizes after input and no batch_first.
    """
    config = stack.Config(num_layers, bidirectional, batch_first, dropout, training, recompute)
    states = None if hx is None else (hx,)
    (output,), (h_n,) = stack.run(
        stack.GRU,
        config,
        input,
        states,
        weights,
        batch_sizes=batch_sizes,
        lengths=lengths,
        resets=resets,
        why_torch=support.why_torch(input),
    )
    return output, h_n


def rnn(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A multi-layer RNN (Elman 1990) with nonlinearity "tanh" or "relu", differentiable twice.

    Arguments and errors as in `lstm`, with hx h_0 [L*D,B,H] and for each layer and direction the weights
    w_ih [H,I or D*H], w_hh [H,H], maybe b_ih [H] and b_hh [H].
    Returns output [T,B,D*H] (laid out as input is) and h_n [L*D,B,H].
    Equal to `torch._VF.rnn_tanh(input, hx, weights, has_biases, num_layers, dropout, training, bidirectional,
    batch_first)`, or `rnn_relu`, or with batch_sizes after input and no batch_first.
    """
    if nonlinearity not in stack.RNN:
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    config = stack.Config(num_layers, bidirectional, batch_first, dropout, training)
    states = None if hx is None else (hx,)
    (output,), (h_n,) = stack.run(
        stack.RNN[nonlinearity],
        config,
        input,
        states,
        weights,
        batch_sizes=batch_sizes,
        lengths=lengths,
        resets=resets,
        why_torch=support.why_torch(input),
    )
    return output, h_n
