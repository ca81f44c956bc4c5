"""Linear: what projects into and out of attention on the CPU."""

import torch
from torch import Tensor
from torch.nn import functional as F

from seqkernels import support
from seqkernels.ops import _autograd as ag

_fwd = torch.ops.seqkernels.linear_fwd.default
_bwd = torch.ops.seqkernels.linear_bwd.default


def linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """x [..., K], w [N, K], b [N] or None -> [..., N], on CPU tensors of one dtype.

    Equal to `torch.nn.functional.linear(x, w, b)`, at the speed of the layers' packed product.
    """
    rows = ag.unit_last_stride(x.flatten(0, -2) if x.dim() > 1 else x[None])
    w, b = ag.contiguous((w, b))
    if ag.records(x, w, b):
        y = _Linear.apply(*ag.distinct(rows, w, b))
    else:
        y = (_exported if support.is_exporting() else _fwd)(rows, w, b)
    return ag.reshape(y, (*x.shape[:-1], w.size(0)))


class _Linear(ag.Function):
    @staticmethod
    def forward(x, w, b):
        return _fwd(x, w, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, _ = inputs
        need_dx, need_dw, _ = ctx.needs_input_grad
        # What no gradient needs may change before backward, as with torch's.
        ctx.save_for_backward(x if need_dw else None, w if need_dx else None)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        need_dx, need_dw, need_db = ctx.needs_input_grad
        if ag.beyond_native(dy):
            with ag.without_autocast(dy.device.type):
                dx, dw = dy @ w if need_dx else None, dy.mT @ x if need_dw else None
            return dx, dw, dy.sum(0) if need_db else None
        dx = dw = db = None
        if need_dx or need_dw:
            dx, dw, db = _bwd(ag.unit_last_stride(dy), x, w)
        if need_db and not need_dw:  # the kernel sums db while it makes dw
            db = dy.sum(0)
        return dx if need_dx else None, dw if need_dw else None, db if need_db else None


_exported = ag.exported("linear_fwd", _Linear.apply, F.linear)


@ag.fake("linear_fwd")
def _(x, w, b):
    ag.check_devices(x, w, b)
    return x.new_empty(x.size(0), w.size(0))


@torch.library.register_fake("seqkernels::linear_bwd")
def _(dy, x, w):
    ag.check_devices(dy, x, w)
    dx = 0 if w is None else (dy.size(0), w.size(1))
    dw, db = (0, 0) if x is None else ((dy.size(1), x.size(1)), dy.size(1))
    return dy.new_empty(dx), dy.new_empty(dw), dy.new_empty(db)
