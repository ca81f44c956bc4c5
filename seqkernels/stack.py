"""Stacks layers: what LSTM, GRU and RNN share between the user's call and the ops of one layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from seqkernels import pipeline, ragged, support
from seqkernels.ops import gru as gru_ops
from seqkernels.ops import lstm as lstm_ops
from seqkernels.ops import rnn as rnn_ops
from seqkernels.ops._autograd import autocast, autocast_dtypes, autocast_weights, transpose
from seqkernels.reference import gru, lstm, rnn

States = Sequence[Tensor]


@dataclass(frozen=True)
class Cell:
    """A kind of cell. Layers take x, *states, weights and return y, *final states, *cells.

    native: the op under the layer, and flags, its last arguments where no gradient is wanted. It takes
    tensors only as they should lie; not to look at them first spares 2 us of a step of one row.
    """

    gates: int
    states: int
    layer: Callable
    native: Callable
    flags: tuple[bool, ...]
    reference: Callable
    torch: Callable


LSTM = Cell(4, 2, lstm_ops.lstm_layer, lstm_ops.layer_fwd, (False, False), lstm.lstm_layer, torch._VF.lstm)
GRU = Cell(3, 1, gru_ops.gru_layer, gru_ops.layer_fwd, (False,), gru.gru_layer, torch._VF.gru)
RNN = {
    name: Cell(
        1,
        1,
        partial(rnn_ops.rnn_layer, nonlinearity=name),
        rnn_ops.layer_fwd,
        (name == "relu",),
        partial(rnn.rnn_layer, nonlinearity=name),
        in_torch,
    )
    for name, in_torch in (("tanh", torch._VF.rnn_tanh), ("relu", torch._VF.rnn_relu))
}


@dataclass
class Config:
    """How layers are stacked. A module has the same attributes and serves as its own Config."""

    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    dropout: float = 0.0
    training: bool = False
    recompute: bool = False


def run(
    cell: Cell,
    config: Config,
    x: Tensor,
    states: States | None,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    prepacked: Sequence[Tensor] | None = None,
    return_cells: bool = False,
    why_torch: str | None = None,
) -> tuple[list[Tensor], States]:
    """x [T,B,I], [B,T,I] if batch_first, or packed [N,I] -> [output] or [output, cells], and final states.

    why_torch: the reason, if there are no kernels for x.
    """
    for name, extra in (("batch_sizes", batch_sizes), ("lengths", lengths), ("resets", resets)):
        if not (extra is None or isinstance(extra, Tensor)):
            raise TypeError(f"{name} must be a tensor, got {type(extra).__name__}")
    if sum(a is not None for a in (batch_sizes, lengths, resets)) > 1:
        raise ValueError("packed input, lengths= and resets= exclude each other, got more than one of them")
    _check_counts(cell, config, states, weights)
    _check_dims(cell, x, states, weights, batch_sizes)
    batch_first = config.batch_first and batch_sizes is None
    if batch_sizes is None and x.size(1 if batch_first else 0) == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if resets is not None:
        resets = _time_major(resets, x, batch_first)
    if states is None:
        B = x.size(0 if batch_first else 1) if batch_sizes is None else int(batch_sizes[0])
        states = zeros(cell, config, B, x, weights)

    dtypes = None
    if why_torch:
        support.fall_back(why_torch)
        prepacked = None
    elif torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        dtypes = autocast_dtypes(cell.gates, dtype, states, batch_sizes)
        x, *states = autocast(dtype, x, *states)
        weights, prepacked = autocast_weights(dtype, *weights), None

    rows = None if lengths is None else ragged.from_lengths(lengths, x, batch_first)
    if rows is not None:
        if any(s.size(1) != lengths.size(0) for s in states):
            got = [s.size(1) for s in states]
            raise ValueError(f"expected states of {lengths.size(0)} rows, as many as lengths, got {got}")
        x, states, batch_sizes = rows.pack(x), [rows.sort(s) for s in states], rows.batch_sizes
    elif batch_first:
        x = x.transpose(0, 1)

    beyond_torch = resets is not None or return_cells or (lengths is not None and support.is_transformed())
    if why_torch and not beyond_torch and _every_row_runs(batch_sizes, states):
        outputs, finals = _torch_layers(cell, config, x, states, weights, batch_sizes)
    else:
        layer, plan = cell.reference, None
        if not why_torch:
            layer = native_layer(cell, config, return_cells)
            simple = batch_sizes is None and resets is None and not config.bidirectional
            plan = pipeline.plan(x, states, weights, cell.gates, config.num_layers, simple)
        outputs, finals = _layers(layer, config, x, states, weights, batch_sizes, resets, prepacked, plan)
        outputs = outputs[: 1 + return_cells]

    if rows is not None:
        outputs, finals = [rows.pad(o) for o in outputs], [rows.unsort(s) for s in finals]
    elif batch_first:
        outputs = [transpose(o, 0, 1) for o in outputs]
    if dtypes is not None:
        outputs, finals = (
            [t.to(dtype) for t, dtype in zip(ts, dtypes, strict=False)] for ts in (outputs, finals)
        )
    return outputs, finals


def _check_counts(cell: Cell, config: Config, states: States | None, weights: Sequence[Tensor]) -> None:
    if config.num_layers < 1:
        raise ValueError(f"num_layers must be greater than zero, got {config.num_layers}")
    if isinstance(states, Tensor):
        raise TypeError(f"expected a tuple of {cell.states} initial states, got one tensor")
    if states is not None and len(states) != cell.states:
        raise ValueError(f"expected {cell.states} initial states, got {len(states)}")
    D = 2 if config.bidirectional else 1
    if len(weights) < 2 * D * config.num_layers or len(weights) % (config.num_layers * D):
        raise ValueError(
            f"expected equally many weights for {config.num_layers} x {D} layers, got {len(weights)} tensors"
        )


def _check_dims(
    cell: Cell, x: Tensor, states: States | None, weights: Sequence[Tensor], batch_sizes: Tensor | None
) -> None:
    """Other sizes are for the kernels to check, which would take those of states for right."""
    packed = batch_sizes is not None
    if x.dim() != (2 if packed else 3):
        wanted = "[N,I] with batch_sizes" if packed else "[T,B,I]"
        raise ValueError(f"expected input {wanted}, got {list(x.shape)}")
    if packed and (batch_sizes.dim() != 1 or len(batch_sizes) == 0):
        raise ValueError(f"expected batch_sizes [T] of one step or more, got {list(batch_sizes.shape)}")
    for name, given, dims in (
        ("states of 3", () if states is None else states, (3,)),
        ("weights of 1 or 2", weights, (1, 2)),
    ):
        if any(t.dim() not in dims for t in given):
            raise ValueError(f"expected {name} dimensions, got {[list(t.shape) for t in given]}")
    sizes = [weights[1].size(-1), weights[0].size(0) // cell.gates][: cell.states]
    if states is not None and any(s.size(2) != n for s, n in zip(states, sizes, strict=True)):
        got = [list(s.shape) for s in states]
        raise ValueError(f"expected states of {sizes} units, as the weights have, got {got}")


def native_layer(cell: Cell, config: Config, return_cells: bool) -> Callable:
    if cell is LSTM:
        return partial(cell.layer, recompute=config.recompute, return_cells=return_cells)
    return partial(cell.layer, recompute=config.recompute) if cell is GRU else cell.layer


def _layers(
    layer: Callable,
    config: Config,
    x: Tensor,
    states: States,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    resets: Tensor | None,
    prepacked: Sequence[Tensor] | None,
    plan: pipeline.Plan | None,
) -> tuple[list[Tensor], States]:
    def one(i: int, x: Tensor, states: States, weights: Sequence[Tensor]) -> Sequence[Tensor | None]:
        if i > 0 and config.dropout != 0 and config.training:
            x = torch.dropout(x, config.dropout, True)  # F.dropout raises another error than torch's layers
        options = {} if prepacked is None else {"panels": prepacked[i]}
        return layer(
            x,
            *states,
            weights,
            batch_sizes=batch_sizes,
            resets=resets,
            bidirectional=config.bidirectional,
            **options,
        )

    states_of, weights_of = by_layer(config, states, weights)
    if plan is not None:
        x, finals, cells = pipeline.run(one, plan, x, states_of, weights_of)
        finals = _joined(finals)
    else:
        x, finals, cells = in_turn(one, x, states_of, weights_of)
    # no cast to the same dtype: a program would insist on it, under autocast too
    cells = [c if c.dtype == x.dtype else c.to(x.dtype) for c in cells if c is not None]
    return [x, *cells], finals


def by_layer(
    config: Config, states: States, weights: Sequence[Tensor]
) -> tuple[list[States], list[Sequence[Tensor]]]:
    """The states and the weights of each layer."""
    D = 2 if config.bidirectional else 1
    L, per_layer = config.num_layers, len(weights) // config.num_layers
    if any(s.size(0) != L * D for s in states):
        rows = [s.size(0) for s in states]
        raise ValueError(f"expected states of {L} x {D} layers, got {rows}")
    states_of = [states if L == 1 else [s[i * D : (i + 1) * D] for s in states] for i in range(L)]
    weights_of = [weights[i * per_layer : (i + 1) * per_layer] for i in range(L)]
    return states_of, weights_of


def in_turn(
    one: Callable[..., Sequence[Tensor | None]],
    x: Tensor,
    states_of: Sequence[States],
    weights_of: Sequence[Sequence[Tensor]],
) -> tuple[Tensor, States, Sequence[Tensor | None]]:
    """one(i, x, states, weights) of each layer -> output, final states of all, what else the last returns."""
    finals = []
    for i, (states, weights) in enumerate(zip(states_of, weights_of, strict=True)):
        x, *rest = one(i, x, states, weights)
        finals.append(rest[: len(states)])
        others = rest[len(states) :]
    return x, _joined(finals), others


def _joined(finals: Sequence[States]) -> States:
    return finals[0] if len(finals) == 1 else [torch.cat(kind) for kind in zip(*finals, strict=True)]


def _torch_layers(
    cell: Cell,
    config: Config,
    x: Tensor,
    states: States,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
) -> tuple[list[Tensor], States]:
    hx = states if cell is LSTM else states[0]
    has_biases = len(weights) // (config.num_layers * (2 if config.bidirectional else 1)) >= 4
    settings = (has_biases, config.num_layers, config.dropout, config.training, config.bidirectional)
    if batch_sizes is None:
        y, *finals = cell.torch(x, hx, weights, *settings, False)
    else:
        y, *finals = cell.torch(x, batch_sizes, hx, weights, *settings)
    return [y], finals


def _every_row_runs(batch_sizes: Tensor | None, states: States) -> bool:
    return batch_sizes is None or int(batch_sizes[0]) == states[0].size(1)


def zeros(cell: Cell, config: Config, B: int, x: Tensor, weights: Sequence[Tensor]) -> States:
    """The initial states of B rows where none are given: an LSTM of like sizes has one for both."""
    H, P = weights[0].size(0) // cell.gates, weights[1].size(1)
    L = config.num_layers * (2 if config.bidirectional else 1)
    h0 = x.new_zeros(L, B, P)
    if cell.states == 1:
        return (h0,)
    return h0, h0 if P == H else x.new_zeros(L, B, H)


def _time_major(resets: Tensor, x: Tensor, batch_first: bool) -> Tensor:
    if resets.dtype != torch.bool or resets.shape != x.shape[:2]:
        expected, got = list(x.shape[:2]), list(resets.shape)
        raise ValueError(f"resets must be torch.bool of shape {expected}, got {resets.dtype} of shape {got}")
    return (resets.transpose(0, 1) if batch_first else resets).to(x.device).contiguous()
