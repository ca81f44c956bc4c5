"""RNN ops: one layer (one or two directions, all time steps, input projection included) and one step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqkernels import support
from seqkernels.ops import _autograd as ag
from seqkernels.reference import rnn as reference

layer_fwd = torch.ops.seqkernels.rnn_layer_fwd.default
_layer_bwd = torch.ops.seqkernels.rnn_layer_bwd.default
_cell_fwd = torch.ops.seqkernels.rnn_cell_fwd.default


def rnn_layer(
    x: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    panels: Tensor | None = None,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor]:
    """x [T,B,I] or packed [N,I], h0 [D,B,H] -> y [T,B,D*H] or [N,D*H], h_n. Options as in `lstm_layer`."""
    x = ag.unit_last_stride(x)
    h0, *weights = ag.contiguous((h0, *weights))
    relu = _is_relu(nonlinearity)
    if ag.records(x, h0, *weights):
        return _Layer.apply(*ag.distinct(x, h0, batch_sizes, resets, bidirectional, relu, *weights))
    fwd = _exported_layer if support.is_exporting() else layer_fwd
    return fwd(x, h0, weights, batch_sizes, resets, panels, bidirectional, relu)


def rnn_cell(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step: x [B,I], h [B,H] -> h'."""
    relu = _is_relu(nonlinearity)
    x, h = x.contiguous(), h.contiguous()
    if ag.records(x, h, w_ih, w_hh, b_ih, b_hh):
        return _Cell.apply(*ag.distinct(x, h, relu, *ag.present(w_ih, w_hh, b_ih, b_hh)))
    fwd = _exported_cell if support.is_exporting() else _cell_fwd
    return fwd(x, h, w_ih, w_hh, b_ih, b_hh, relu)


def _is_relu(nonlinearity: str) -> bool:
    if nonlinearity not in ("tanh", "relu"):
        raise RuntimeError(f"Unknown nonlinearity: {nonlinearity}")  # the words of torch.nn.RNNCell
    return nonlinearity == "relu"


class _Layer(ag.Function):
    @staticmethod
    def forward(x, h0, batch_sizes, resets, bidirectional, relu, *weights):
        return layer_fwd(x, h0, list(weights), batch_sizes, resets, None, bidirectional, relu)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, h0, batch_sizes, resets, bidirectional, relu, *weights = inputs
        ag.keep_none_grads(ctx)
        ctx.save_for_backward(output[0], batch_sizes, resets, x, h0, *weights)
        ctx.bidirectional, ctx.relu = bidirectional, relu

    @staticmethod
    def backward(ctx, dy, dhn):
        tensors = ctx.saved_tensors  # once: non-reentrant checkpoints allow no second look
        saved, inputs = tensors[:3], tensors[3:]
        dx, dh0, *dweights = _gradients(ctx, (dy, dhn), inputs, saved, ctx.relu, ctx.bidirectional)
        return dx, dh0, None, None, None, None, *dweights


class _Cell(ag.Function):
    @staticmethod
    def forward(x, h, relu, *weights):
        return _cell_fwd(x, h, *ag.pad_biases(weights), relu)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, h0, relu, *weights = inputs
        ctx.save_for_backward(output, x, h0, *weights)
        ctx.relu = relu

    @staticmethod
    def backward(ctx, dh):
        h, x, h0, *weights = ctx.saved_tensors
        y, x, h0, dh = ag.one_step(h, x, h0, dh)
        dx, dh0, *dweights = _gradients(ctx, (None, dh), (x, h0, *weights), (y, None, None), ctx.relu)
        return *ag.no_steps(dx, dh0), None, *dweights


def _nonlinearity(relu: bool) -> str:
    return "relu" if relu else "tanh"


def _reference_layer(x, h0, weights, batch_sizes, resets, panels, bidirectional, relu):
    options = {"batch_sizes": batch_sizes, "resets": resets, "bidirectional": bidirectional}
    return reference.rnn_layer(x, h0, weights, nonlinearity=_nonlinearity(relu), **options)


_exported_layer = ag.exported(
    "rnn_layer_fwd",
    lambda x, h0, weights, batch_sizes, resets, panels, bidirectional, relu: _Layer.apply(
        x, h0, batch_sizes, resets, bidirectional, relu, *weights
    ),
    _reference_layer,
)
_exported_cell = ag.exported(
    "rnn_cell_fwd",
    lambda x, h, w_ih, w_hh, b_ih, b_hh, relu: _Cell.apply(x, h, relu, *ag.present(w_ih, w_hh, b_ih, b_hh)),
    lambda *args: reference.rnn_cell(*args[:-1], _nonlinearity(args[-1])),
)


def _gradients(ctx, grads, inputs, saved, relu, bidirectional=False):
    """d(x, h0, *weights) from d(y, hn); saved: y, batch_sizes, resets."""
    if ag.beyond_native(*grads):

        def layer(x, h0, *weights):
            return _reference_layer(x, h0, weights, *saved[1:], None, bidirectional, relu)

        return ag.differentiate(layer, inputs, grads)
    x, h0, *weights = inputs
    need_dx = ctx.needs_input_grad[0]
    dx, dh0, dweights = _layer_bwd(
        *ag.contiguous(grads), x, h0, weights, *saved, bidirectional, relu, need_dx
    )
    return dx if need_dx else None, dh0, *dweights


@ag.fake("rnn_layer_fwd")
def _(x, h0, weights, batch_sizes, resets, panels, bidirectional, relu):
    ag.check_devices(x, h0, *weights, resets, panels, batch_sizes=batch_sizes)
    return x.new_empty(*x.shape[:-1], h0.size(0) * h0.size(2)), *ag.new_like(h0)


@torch.library.register_fake("seqkernels::rnn_layer_bwd")
def _(dy, dhn, x, h0, weights, y, batch_sizes, resets, bidirectional, relu, need_dx):
    ag.check_devices(dy, dhn, x, h0, *weights, y, resets, batch_sizes=batch_sizes)
    return ag.gradient_of_x(x, need_dx), *ag.new_like(h0), ag.new_like(*weights)


@ag.fake("rnn_cell_fwd")
def _(x, h, w_ih, w_hh, b_ih, b_hh, relu):
    ag.check_devices(x, h, w_ih, w_hh, b_ih, b_hh)
    return x.new_empty(h.shape)
