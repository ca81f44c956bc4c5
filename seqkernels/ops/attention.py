"""Attention ops: dense, or sequences of any length one after the other; the weights from a second pass."""

import torch
from torch import Tensor

from seqkernels import support, triton
from seqkernels.ops import _autograd as ag
from seqkernels.reference import attention as reference
from seqkernels.reference.attention import NO_LIMIT

triton.register()
_fwd = torch.ops.seqkernels.attention_fwd.default
_bwd = torch.ops.seqkernels.attention_bwd.default
_weights = torch.ops.seqkernels.attention_weights.default
_paged_fwd = torch.ops.seqkernels.paged_attention_fwd.default


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    len_k: Tensor | None = None,
    alibi: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    left: int = NO_LIMIT,
    right: int = NO_LIMIT,
    bottom_right: bool = False,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    max_q: int = 0,
    max_k: int = 0,
) -> tuple[Tensor, Tensor]:
    """q [B,Hq,Tq,D], k [B,Hk,Tk,D], v [B,Hk,Tk,Dv] -> out [B,Hq,Tq,Dv], lying as [B,Tq,Hq,Dv], lse [B,Hq,Tq].

    mask: bool (True: sees) or float, 4-D, broadcast to [B,Hq,Tq,Tk]. len_k [B]: number of keys, Tk if None.
    cu_q, cu_k [S+1]: sequence s has the queries cu_q[s] to cu_q[s+1] of a batch of one, its keys likewise,
    no more than max_q and max_k. alibi: slopes [Hq] or [B,Hq]. sinks [Hq]: logits that join every softmax.
    Query i sees key j when -left <= j - i - offset <= right; offset is 0, or the number of keys less that of
    queries if bottom_right. rng [2], int64: seed and offset of the dropout, drawn if None. Gradients of out
    and lse for q, k, v, a float mask and sinks.
    """
    apart = q.stride(3) != 1 or k.stride(3) != 1 or v.stride(3) != 1
    if apart or support.in_functorch():
        q, k, v = map(ag.unit_last_stride, (q, k, v))
    if mask is not None:
        mask = readable(mask, q)
    if dropout and rng is None:
        rng = reference.random_state(q)
    options = (scale, softcap, left, right, bottom_right, dropout, rng, max_q, max_k)
    if ag.records(q, k, v, mask, sinks):
        if mask is not None and mask.requires_grad:
            mask = mask.contiguous()  # each of its elements has a gradient, those that share memory too
        args = ag.distinct(q, k, v, mask, cu_q, cu_k, len_k, alibi, sinks, *options)
        out, lse = _Attention.apply(*args)
    else:
        fwd = _exported_fwd if support.is_exporting() else _fwd
        out, lse = fwd(q, k, v, mask, cu_q, cu_k, len_k, alibi, sinks, *options)
    return ag.transpose(out, 1, 2), lse


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    len_k: Tensor,
    *,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    alibi: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `attention`, aligned to the last key, with keys in pages k [pages,Hk,size,D]; CUDA, no gradients.

    block_table [B,blocks], int32 or int64: the pages of each row in their order.
    """
    visibility = (scale, softcap, left, right, True)
    out, lse = _paged_fwd(q, k, v, block_table, len_k, alibi, sinks, *visibility)
    return out.transpose(1, 2), lse


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float,
    mask: Tensor | None,
    right: int,
    mean: bool,
    dropout: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """The weights [B,Hq,Tq,Tk] that belong to lse, or their mean over heads [B,Tq,Tk]; differentiable.

    With dropout and the rng of `attention` what it left.
    """
    q, k = map(ag.unit_last_stride, (q, k))
    if mask is not None:
        mask = readable(mask, q)
    if ag.records(q, k, mask):
        return _Weights.apply(*ag.distinct(q, k, lse.detach(), mask, scale, right, dropout, rng, mean))
    weights = _exported_weights if support.is_exporting() else _weights
    return weights(q, k, lse, mask, None, None, scale, 0.0, NO_LIMIT, right, False, dropout, rng, mean)


def readable(mask: Tensor, q: Tensor) -> Tensor:
    """The kernels read masks of bool, of q's dtype, and of that in which they accumulate."""
    acc = ag.accumulation_dtype(q.dtype)
    return mask if mask.dtype in (torch.bool, q.dtype, acc) else mask.to(acc)


class _Attention(ag.Function):
    @staticmethod
    def forward(q, k, v, *args):
        return _fwd(q, k, v, *args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, scale, softcap, left, right, bottom_right, dropout, rng, max_q, max_k = inputs
        ag.keep_none_grads(ctx)
        ctx.save_for_backward(*tensors, rng, *output)
        ctx.visibility = scale, softcap, left, right, bottom_right
        ctx.options = dropout, max_q, max_k

    @staticmethod
    def backward(ctx, dout, dlse):
        *tensors, rng, out, lse = ctx.saved_tensors
        q, k, v, mask, cu_q, cu_k, len_k, alibi, sinks = tensors
        dropout, max_q, max_k = ctx.options
        need_dmask = ctx.needs_input_grad[3]
        if ag.beyond_native(dout, dlse):
            drop = dropout, rng
            dq, dk, dv, dmask, dsinks = _differentiate(ctx, tensors, drop, (dout, dlse), need_dmask)
        else:
            dout = torch.zeros_like(out) if dout is None else ag.unit_last_stride(dout)
            dlse = None if dlse is None else dlse.contiguous()
            options = (*ctx.visibility, dropout, rng, max_q, max_k)
            dq, dk, dv, dmask, dsinks = _bwd(
                dout, dlse, q, k, v, out, lse, mask, cu_q, cu_k, len_k, alibi, sinks, *options, need_dmask
            )
            dq, dk, dv = (g.transpose(1, 2) for g in (dq, dk, dv))
            dmask = dmask.to(mask.dtype) if need_dmask else None
        dsinks = None if sinks is None else dsinks
        return dq, dk, dv, dmask, None, None, None, None, dsinks, *[None] * 9


def _differentiate(ctx, tensors, drop, grads, need_dmask):
    q, k, v, mask, cu_q, cu_k, len_k, alibi, sinks = tensors

    def function(q, k, v, *rest):
        rest = list(rest)
        added = rest.pop(0) if need_dmask else mask
        joining = rest.pop(0) if rest else None
        return _reference(q, k, v, added, cu_q, cu_k, len_k, alibi, joining, *ctx.visibility, *drop)

    inputs = [q, k, v, *([mask] if need_dmask else []), *([] if sinks is None else [sinks])]
    dq, dk, dv, *rest = ag.differentiate(function, inputs, grads)
    return dq, dk, dv, rest.pop(0) if need_dmask else None, rest.pop(0) if rest else None


class _Weights(ag.Function):
    @staticmethod
    def forward(q, k, lse, mask, scale, right, dropout, rng, mean):
        return _weights(q, k, lse, mask, None, None, scale, 0.0, NO_LIMIT, right, False, dropout, rng, mean)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, _, mask, scale, right, dropout, rng, mean = inputs
        ctx.options = {"scale": scale, "right": right, "dropout": dropout, "mean": mean}
        ctx.save_for_backward(q, k, mask, rng)

    @staticmethod
    def backward(ctx, dweights):
        q, k, mask, rng = ctx.saved_tensors

        def function(q, k, mask=mask):
            return (reference.attention_weights(q, k, mask=mask, rng=rng, **ctx.options),)

        inputs = (q, k, mask) if ctx.needs_input_grad[3] else (q, k)
        dq, dk, *dmask = ag.differentiate(function, inputs, (dweights,))
        return dq, dk, None, *(dmask or [None]), *[None] * 5


def _reference(q, k, v, mask, cu_q, cu_k, len_k, alibi, sinks, *options):
    scale, softcap, left, right, bottom_right, dropout, rng, *_ = options
    out, lse = reference.attention(
        q,
        k,
        v,
        mask=mask,
        cu_q=cu_q,
        cu_k=cu_k,
        len_k=len_k,
        alibi=alibi,
        sinks=sinks,
        scale=scale,
        softcap=softcap,
        left=left,
        right=right,
        bottom_right=bottom_right,
        dropout=dropout,
        rng=rng,
    )
    return out.transpose(1, 2).contiguous(), lse  # programs may view it as the op's


_exported_fwd = ag.exported("attention_fwd", _Attention.apply, _reference)
_exported_weights = ag.exported(
    "attention_weights",
    lambda q, k, lse, mask, len_k, alibi, scale, softcap, left, right, bottom_right, dropout, rng, mean: (
        _Weights.apply(q, k, lse.detach(), mask, scale, right, dropout, rng, mean)
    ),
    lambda q, k, lse, mask, len_k, alibi, scale, softcap, left, right, bottom_right, dropout, rng, mean: (
        reference.attention_weights(
            q, k, mask=mask, scale=scale, right=right, dropout=dropout, rng=rng, mean=mean
        )
    ),
)


@ag.fake("attention_fwd")
@torch.library.register_fake("seqkernels::paged_attention_fwd")
def _(q, k, v, *args):
    _check_devices(q, k, v, *args)
    B, Hq, Tq, _ = q.shape
    return q.new_empty(B, Tq, Hq, v.size(3)), _accumulated(q, (B, Hq, Tq))


@torch.library.register_fake("seqkernels::attention_bwd")
def _(dout, dlse, q, k, v, out, lse, mask, cu_q, cu_k, len_k, alibi, sinks, *options):
    _check_devices(dout, dlse, q, k, v, out, lse, mask, cu_q, cu_k, len_k, alibi, sinks, *options)
    grads = [t.new_empty([t.size(d) for d in (0, 2, 1, 3)]) for t in (q, k, v)]
    dmask = _accumulated(q, mask.shape if options[-1] else 0)
    return *grads, dmask, _accumulated(q, 0 if sinks is None else sinks.shape)


@ag.fake("attention_weights")
def _(q, k, lse, *options):
    _check_devices(q, k, lse, *options)
    B, Hq, Tq, _ = q.shape
    return q.new_empty(*((B,) if options[-1] else (B, Hq)), Tq, k.size(2))


def _check_devices(*args: object) -> None:
    ag.check_devices(*(a for a in args if isinstance(a, Tensor)))


def _accumulated(like: Tensor, shape) -> Tensor:
    return like.new_empty(shape, dtype=ag.accumulation_dtype(like.dtype))
