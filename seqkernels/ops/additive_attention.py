"""The op of additive attention."""

import torch
from torch import Tensor

from seqkernels import support
from seqkernels.ops import _autograd as ag
from seqkernels.reference import additive_attention as reference

_fwd = torch.ops.seqkernels.additive_attention_fwd.default
_bwd = torch.ops.seqkernels.additive_attention_bwd.default


def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    *,
    mask: Tensor | None = None,
    len_k: Tensor | None = None,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor]:
    """q [B,Tq,D], k [B,Tk,D], v [B,Tk,Dv], w [D] -> out [B,Tq,Dv], and weights [B,Tq,Tk] or of size 0.

    mask: bool (True: sees) or float, 3-D, broadcast to [B,Tq,Tk]. len_k [B]: number of keys, Tk if None.
    Gradients of out and weights for q, k, v, w and a float mask.
    """
    q, k, v = map(ag.unit_last_stride, (q, k, v))
    w = w.contiguous()
    if mask is not None and mask.dtype not in (torch.bool, q.dtype):
        mask = mask.to(ag.accumulation_dtype(q.dtype))
    if ag.records(q, k, v, w, mask):
        return _AdditiveAttention.apply(*ag.distinct(q, k, v, w, mask, len_k, need_weights))
    return (_exported if support.is_exporting() else _fwd)(q, k, v, w, mask, len_k, need_weights)


class _AdditiveAttention(ag.Function):
    @staticmethod
    def forward(*args):
        return _fwd(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.need_weights = inputs
        ag.keep_none_grads(ctx)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, dout, dweights):
        q, k, v, w, mask, len_k = ctx.saved_tensors
        need_dmask = ctx.needs_input_grad[4]
        if not ctx.need_weights:
            dweights = None
        if ag.beyond_native(dout, dweights):
            inputs = (q, k, v, w, mask) if need_dmask else (q, k, v, w)

            def function(q, k, v, w, mask=mask):
                return reference.additive_attention(q, k, v, w, mask=mask, len_k=len_k)

            *grads, dmask = *ag.differentiate(function, inputs, (dout, dweights)), None
            if need_dmask:
                *grads, dmask = grads
        else:
            shape = (*q.shape[:2], v.size(2))
            dout = v.new_zeros(shape) if dout is None else ag.unit_last_stride(dout)
            dweights = None if dweights is None else dweights.contiguous()
            *grads, dscores = _bwd(dout, dweights, q, k, v, w, mask, len_k, need_dmask)
            dmask = dscores.sum_to_size(mask.shape).to(mask.dtype) if need_dmask else None
        return *grads, dmask, None, None


_exported = ag.exported(
    "additive_attention_fwd",
    _AdditiveAttention.apply,
    lambda q, k, v, w, mask, len_k, need_weights: reference.additive_attention(
        q, k, v, w, mask=mask, len_k=len_k
    ),
)


@ag.fake("additive_attention_fwd")
def _(q, k, v, w, mask, len_k, need_weights):
    ag.check_devices(q, k, v, w, mask, len_k)
    weights = (*q.shape[:2], k.size(1)) if need_weights else 0
    return q.new_empty(*q.shape[:2], v.size(2)), q.new_empty(weights)


@torch.library.register_fake("seqkernels::additive_attention_bwd")
def _(dout, dweights, q, k, v, w, mask, len_k, need_dscores):
    ag.check_devices(dout, dweights, q, k, v, w, mask, len_k)
    scores = (*q.shape[:2], k.size(1)) if need_dscores else 0
    acc = ag.accumulation_dtype(q.dtype)
    return *ag.new_like(q, k, v, w), q.new_empty(scores, dtype=acc)
