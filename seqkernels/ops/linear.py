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
    return y.view(*x.shape[:-1], w.size(0))


class _Linear(ag.Function):
    @staticmethod
    def forward(x, w, b):
        return _fwd(x, w, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, b = inputs
        ctx.save_for_backward(x, w, b)

    @staticmethod
    def backward(ctx, dy):
        x, w, b = ctx.saved_tensors
        if ag.beyond_native(dy):
            inputs = [t for t in (x, w, b) if t is not None]
            grads = ag.differentiate(lambda *inputs: (F.linear(*inputs),), inputs, (dy,))
            return *grads, *[None] * (3 - len(inputs))
        need_dx, need_dw, need_db = ctx.needs_input_grad
        if not need_dw:  # the kernel sums db while it makes dw
            dx = _bwd(ag.unit_last_stride(dy), x, w, True, False)[0] if need_dx else None
            return dx, None, dy.sum(0) if need_db else None
        dx, dw, db = _bwd(ag.unit_last_stride(dy), x, w, need_dx, True)
        return dx if need_dx else None, dw, db if need_db else None


_exported = ag.exported("linear_fwd", _Linear.apply, F.linear)


@torch.library.register_fake("seqkernels::linear_fwd")
@torch.library.register_fake("seqkernels::linear_fwd.exported")
def _(x, w, b):
    ag.check_devices(x, w, b)
    return x.new_empty(x.size(0), w.size(0))


@torch.library.register_fake("seqkernels::linear_bwd")
def _(dy, x, w, need_dx, need_dw):
    ag.check_devices(dy, x, w)
    dw, db = (w.shape, w.size(0)) if need_dw else (0, 0)
    return ag.gradient_of_x(x, need_dx), x.new_empty(dw), x.new_empty(db)
