"""GRU ops: one layer (one or two directions, all time steps, input projection included) and one step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqkernels import support
from seqkernels.ops import _autograd as ag
from seqkernels.reference import gru as reference

layer_fwd = torch.ops.seqkernels.gru_layer_fwd.default
_layer_bwd = torch.ops.seqkernels.gru_layer_bwd.default
_cell_fwd = torch.ops.seqkernels.gru_cell_fwd.default


def gru_layer(
    x: Tensor,
    h0: Tensor,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    panels: Tensor | None = None,
    bidirectional: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """x [T,B,I] or packed [N,I], h0 [D,B,H] -> y [T,B,D*H] or [N,D*H], h_n. Options as in `lstm_layer`."""
    x = ag.unit_last_stride(x)
    h0, *weights = ag.contiguous((h0, *weights))
    if ag.records(x, h0, *weights):
        args = ag.distinct(x, h0, batch_sizes, resets, bidirectional, not recompute, *weights)
        return _Layer.apply(*args)[:2]
    fwd = _exported_layer if support.is_exporting() else layer_fwd
    return fwd(x, h0, weights, batch_sizes, resets, panels, bidirectional, False)[:2]


def gru_cell(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> Tensor:
    """One step: x [B,I], h [B,H] -> h'."""
    x, h = x.contiguous(), h.contiguous()
    if ag.records(x, h, w_ih, w_hh, b_ih, b_hh):
        return _Cell.apply(*ag.distinct(x, h, *ag.present(w_ih, w_hh, b_ih, b_hh)))[0]
    fwd = _exported_cell if support.is_exporting() else _cell_fwd
    return fwd(x, h, w_ih, w_hh, b_ih, b_hh, False)[0]


class _Layer(ag.Function):
    @staticmethod
    def forward(x, h0, batch_sizes, resets, bidirectional, save_gates, *weights):
        return layer_fwd(x, h0, list(weights), batch_sizes, resets, None, bidirectional, save_gates)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, h0, batch_sizes, resets, bidirectional, _, *weights = inputs
        y, _, gates = output
        ag.keep_none_grads(ctx)
        ctx.mark_non_differentiable(gates)
        ctx.save_for_backward(y, gates, batch_sizes, resets, x, h0, *weights)
        ctx.bidirectional = bidirectional

    @staticmethod
    def backward(ctx, dy, dhn, _):
        tensors = ctx.saved_tensors  # once: non-reentrant checkpoints allow no second look
        saved, inputs = tensors[:4], tensors[4:]
        dx, dh0, *dweights = _gradients(ctx, (dy, dhn), inputs, saved, ctx.bidirectional)
        return dx, dh0, None, None, None, None, *dweights


class _Cell(ag.Function):
    @staticmethod
    def forward(x, h, *weights):
        return _cell_fwd(x, h, *ag.pad_biases(weights), True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ag.keep_none_grads(ctx)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], *inputs)  # not h', so that it may be written into

    @staticmethod
    def backward(ctx, dh, _):
        gates, x, h0, *weights = ctx.saved_tensors
        gates, x, h0, dh = ag.one_step(gates, x, h0, dh)
        saved = (h0, gates, None, None)  # h0 for y, which is read where there is a next step
        dx, dh0, *dweights = _gradients(ctx, (None, dh), (x, h0, *weights), saved)
        return *ag.no_steps(dx, dh0), *dweights


def _reference_layer(x, h0, weights, batch_sizes, resets, panels, bidirectional, save_gates):
    options = {"batch_sizes": batch_sizes, "resets": resets, "bidirectional": bidirectional}
    return *reference.gru_layer(x, h0, weights, **options), x.new_empty(0)


_exported_layer = ag.exported(
    "gru_layer_fwd",
    lambda x, h0, weights, batch_sizes, resets, panels, bidirectional, save_gates: _Layer.apply(
        x, h0, batch_sizes, resets, bidirectional, True, *weights
    ),
    _reference_layer,
    lambda dtype, x, h0, *_: [ag.blended(dtype, h0)] * 2,
)
_exported_cell = ag.exported(
    "gru_cell_fwd",
    lambda x, h, w_ih, w_hh, b_ih, b_hh, save: _Cell.apply(x, h, *ag.present(w_ih, w_hh, b_ih, b_hh)),
    lambda x, *args: (reference.gru_cell(x, *args[:-1]), x.new_empty(0)),
    lambda dtype, x, h, *_: [ag.blended(dtype, h)],
)


def _gradients(ctx, grads, inputs, saved, bidirectional=False):
    """d(x, h0, *weights) from d(y, hn); saved: y, gates, batch_sizes, resets."""
    if ag.beyond_native(*grads):

        def layer(x, h0, *weights):
            return reference.gru_layer(
                x, h0, weights, batch_sizes=saved[2], resets=saved[3], bidirectional=bidirectional
            )

        return ag.differentiate(layer, inputs, grads)
    x, h0, *weights = inputs
    need_dx = ctx.needs_input_grad[0]
    dx, dh0, dweights = _layer_bwd(*ag.contiguous(grads), x, h0, weights, *saved, bidirectional, need_dx)
    return dx if need_dx else None, dh0, *dweights


@ag.fake("gru_layer_fwd")
def _(x, h0, weights, batch_sizes, resets, panels, bidirectional, save_gates):
    ag.check_devices(x, h0, *weights, resets, panels, batch_sizes=batch_sizes)
    tokens, (D, _, H) = x.shape[:-1], h0.shape
    gates = x.new_empty((*tokens, D * 4 * H) if save_gates else 0)
    return x.new_empty(*tokens, D * H), *ag.new_like(h0), gates


@torch.library.register_fake("seqkernels::gru_layer_bwd")
def _(dy, dhn, x, h0, weights, y, gates, batch_sizes, resets, bidirectional, need_dx):
    ag.check_devices(dy, dhn, x, h0, *weights, y, gates, resets, batch_sizes=batch_sizes)
    return ag.gradient_of_x(x, need_dx), *ag.new_like(h0), ag.new_like(*weights)


@ag.fake("gru_cell_fwd")
def _(x, h, w_ih, w_hh, b_ih, b_hh, save):
    ag.check_devices(x, h, w_ih, w_hh, b_ih, b_hh)
    return *ag.new_like(h), x.new_empty((x.size(0), 4 * h.size(1)) if save else 0)
