"""LSTM ops: one layer (one or two directions, all time steps, input projection included) and one step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqkernels import support
from seqkernels.ops import _autograd as ag
from seqkernels.reference import lstm as reference

layer_fwd = torch.ops.seqkernels.lstm_layer_fwd.default
_layer_bwd = torch.ops.seqkernels.lstm_layer_bwd.default
_cell_fwd = torch.ops.seqkernels.lstm_cell_fwd.default


def lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    resets: Tensor | None = None,
    panels: Tensor | None = None,
    bidirectional: bool = False,
    recompute: bool = False,
    return_cells: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x [T,B,I] or packed [N,I], h0 [D,B,P], c0 [D,B,H] -> y [T,B,D*P], h_n, c_n, cells [T,B,D*H] or None.

    weights: the layer's slice of torch's flat weights. batch_sizes: int64 [T] on the CPU, with packed x.
    resets: bool [T,B], with dense x. panels: the weights by pack_weights, used where no gradient is wanted.
    recompute: backward rebuilds the gates instead of keeping them. cells: every c_t, float32 for half types.
    """
    x = ag.unit_last_stride(x)
    h0, c0, *weights = ag.contiguous((h0, c0, *weights))
    if ag.records(x, h0, c0, *weights):
        args = ag.distinct(x, h0, c0, batch_sizes, resets, bidirectional, not recompute, *weights)
        y, hn, cn, cells, _ = _Layer.apply(*args)
    else:
        fwd = _exported_layer if support.is_exporting() else layer_fwd
        y, hn, cn, cells, _ = fwd(
            x, h0, c0, weights, batch_sizes, resets, panels, bidirectional, return_cells, False
        )
    return y, hn, cn, cells if return_cells else None


def lstm_cell(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step: x [B,I], h and c [B,H] -> h', c'."""
    x, h, c = x.contiguous(), h.contiguous(), c.contiguous()
    if ag.records(x, h, c, w_ih, w_hh, b_ih, b_hh):
        return _Cell.apply(*ag.distinct(x, h, c, *ag.present(w_ih, w_hh, b_ih, b_hh)))[:2]
    fwd = _exported_cell if support.is_exporting() else _cell_fwd
    return fwd(x, h, c, w_ih, w_hh, b_ih, b_hh, False)[:2]


class _Layer(ag.Function):
    @staticmethod
    def forward(x, h0, c0, batch_sizes, resets, bidirectional, save_gates, *weights):
        return layer_fwd(x, h0, c0, list(weights), batch_sizes, resets, None, bidirectional, True, save_gates)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, h0, c0, batch_sizes, resets, bidirectional, _, *weights = inputs
        y, _, _, cells, gates = output
        ag.keep_none_grads(ctx)
        ctx.mark_non_differentiable(gates)
        ctx.save_for_backward(y, cells, gates, batch_sizes, resets, x, h0, c0, *weights)
        ctx.bidirectional = bidirectional

    @staticmethod
    def backward(ctx, dy, dhn, dcn, dcells, _):
        tensors = ctx.saved_tensors  # once: non-reentrant checkpoints allow no second look
        saved, inputs = tensors[:5], tensors[5:]
        dx, dh0, dc0, *dweights = _gradients(ctx, (dy, dhn, dcn, dcells), inputs, saved, ctx.bidirectional)
        return dx, dh0, dc0, None, None, None, None, *dweights


class _Cell(ag.Function):
    @staticmethod
    def forward(x, h, c, *weights):
        return _cell_fwd(x, h, c, *ag.pad_biases(weights), True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ag.keep_none_grads(ctx)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*output[1:], *inputs)  # not h', so that it may be written into

    @staticmethod
    def backward(ctx, dh, dc, _):
        c, gates, x, h0, c0, *weights = ctx.saved_tensors
        cells = c.to(ag.accumulation_dtype(c.dtype))
        *saved, x, h0, c0, dh, dc = ag.one_step(cells, gates, x, h0, c0, dh, dc)
        dx, dh0, dc0, *dweights = _gradients(  # h0 for y, which is read where there is a next step
            ctx, (None, dh, dc, None), (x, h0, c0, *weights), (h0, *saved, None, None)
        )
        return *ag.no_steps(dx, dh0, dc0), *dweights


def _reference_layer(x, h0, c0, weights, batch_sizes, resets, panels, bidirectional, save_cells, save_gates):
    options = {"batch_sizes": batch_sizes, "resets": resets, "bidirectional": bidirectional}
    *results, cells = reference.lstm_layer(x, h0, c0, weights, **options)
    return *results, cells.to(ag.accumulation_dtype(x.dtype)), x.new_empty(0)


_exported_layer = ag.exported(
    "lstm_layer_fwd",
    lambda x, h0, c0, weights, batch_sizes, resets, panels, bidirectional, save_cells, save_gates: (
        _Layer.apply(x, h0, c0, batch_sizes, resets, bidirectional, True, *weights)
    ),
    _reference_layer,
    # packed rows are those of lengths=, for which modules say nothing of batch_sizes either
    lambda dtype, x, h0, c0, *_: [d for d in ag.autocast_dtypes(4, dtype, (h0, c0), None) for _ in range(2)],
)
_exported_cell = ag.exported(
    "lstm_cell_fwd",
    lambda x, h, c, w_ih, w_hh, b_ih, b_hh, save: _Cell.apply(x, h, c, *ag.present(w_ih, w_hh, b_ih, b_hh)),
    lambda x, *args: (*reference.lstm_cell(x, *args[:-1]), x.new_empty(0)),
    lambda dtype, x, h, c, *_: [ag.blended(dtype, c)] * 2,
)


def _gradients(ctx, grads, inputs, saved, bidirectional=False):
    """d(x, h0, c0, *weights) from d(y, hn, cn, cells); saved: y, cells, gates, batch_sizes, resets."""
    if ag.beyond_native(*grads):

        def layer(x, h0, c0, *weights):
            return reference.lstm_layer(
                x, h0, c0, weights, batch_sizes=saved[3], resets=saved[4], bidirectional=bidirectional
            )

        return ag.differentiate(layer, inputs, grads)
    x, h0, c0, *weights = inputs
    need_dx = ctx.needs_input_grad[0]
    dx, dh0, dc0, dweights = _layer_bwd(
        *ag.contiguous(grads), x, h0, c0, weights, *saved, bidirectional, need_dx
    )
    return dx if need_dx else None, dh0, dc0, *dweights


@ag.fake("lstm_layer_fwd")
def _(x, h0, c0, weights, batch_sizes, resets, panels, bidirectional, save_cells, save_gates):
    ag.check_devices(x, h0, c0, *weights, resets, panels, batch_sizes=batch_sizes)
    tokens, D, H = x.shape[:-1], h0.size(0), c0.size(2)
    hn, cn = ag.new_like(h0, c0)
    cells = x.new_empty((*tokens, D * H) if save_cells else 0, dtype=ag.accumulation_dtype(x.dtype))
    gates = x.new_empty((*tokens, D * 4 * H) if save_gates else 0)
    return x.new_empty(*tokens, D * h0.size(2)), hn, cn, cells, gates


@torch.library.register_fake("seqkernels::lstm_layer_bwd")
def _(
    dy,
    dhn,
    dcn,
    dcells,
    x,
    h0,
    c0,
    weights,
    y,
    cells,
    gates,
    batch_sizes,
    resets,
    bidirectional,
    need_dx,
):
    given = dy, dhn, dcn, dcells, x, h0, c0, *weights, y, cells, gates, resets
    ag.check_devices(*given, batch_sizes=batch_sizes)
    return ag.gradient_of_x(x, need_dx), *ag.new_like(h0, c0), ag.new_like(*weights)


@ag.fake("lstm_cell_fwd")
def _(x, h, c, w_ih, w_hh, b_ih, b_hh, save):
    ag.check_devices(x, h, c, w_ih, w_hh, b_ih, b_hh)
    return *ag.new_like(h, c), x.new_empty((x.size(0), 4 * h.size(1)) if save else 0)
