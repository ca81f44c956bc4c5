"""Additive attention as a function."""

import torch
from torch import Tensor

from seqkernels import support
from seqkernels.attention import INTEGERS, autocast, described, int64, is_plain
from seqkernels.ops import additive_attention as ops
from seqkernels.reference import additive_attention as reference


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    need_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax_j(v . tanh(query_i + key_j + bias) + attn_mask_ij) @ value, without a tensor of all the tanh.

    query [B,Tq,D], key [B,Tk,D], value [B,Tk,Dv], or each without B; v [D], bias [D]; float32, float64,
    bfloat16 or float16, all the same. Differentiable twice.
        key_lengths: integers [B] on any device: how many keys of each row count, from 0 to Tk; what lies
            beyond is never read
        attn_mask: bool (True: attends) or float (added, gets a gradient), broadcast to [B,Tq,Tk]
        need_weights: also return the weights, [B,Tq,Tk], differentiable
    Returns [B,Tq,Dv]. A query that attends to no key gives 0. Memory beyond inputs and results grows with
    Tq + Tk, but with Tq * Tk for the gradient of attn_mask.
    Raises ValueError for arguments that do not fit.
    Equal to `((query[:, :, None] + key[:, None] + bias).tanh() @ v + attn_mask).softmax(-1) @ value`, with
    -inf where a bool attn_mask is False.
    Bahdanau, Cho & Bengio 2015, Neural Machine Translation by Jointly Learning to Align and Translate, A.1.2.
    """
    given = query, key, value, v, bias, attn_mask
    if _may_go_straight_on(*given, key_lengths):
        try:
            out, weights = ops.additive_attention(
                query if bias is None else query + bias,
                key,
                value,
                v,
                len_k=key_lengths,
                need_weights=need_weights,
            )
            return (out, weights) if need_weights else out
        except RuntimeError:
            pass  # the rest finds out why, and what to do
    if not is_plain(*given, key_lengths) or any(t is None for t in given[:4]):
        types = ", ".join(type(t).__name__ for t in given)
        raise ValueError(f"additive_attention takes torch.Tensor, dense and not nested, got {types}")
    query, key, value, v, bias, mask = autocast(*given)
    unbatched = query.dim() == key.dim() == value.dim() == 2
    if unbatched:
        query, key, value = (t.unsqueeze(0) for t in (query, key, value))
    if mask is not None and mask.dim() in (1, 2):
        mask = mask[(None,) * (3 - mask.dim())]
    if not _fit(query, key, value, v, bias, mask, key_lengths):
        lengths = "" if key_lengths is None else f", key_lengths {described(key_lengths)}"
        raise ValueError(
            "query, key, value and v must be [B,Tq,D], [B,Tk,D], [B,Tk,Dv] and [D], bias [D], attn_mask bool"
            " or float that broadcasts to [B,Tq,Tk], key_lengths integers [B]; floating point numbers of one"
            f" dtype, all on one device; got {described(*given)}{lengths}"
        )
    if bias is not None:
        query = query + bias
    lengths = None if key_lengths is None else int64(key_lengths.to(query.device))
    reason = support.why_torch_attends(query)
    if reason is None or query.is_meta:  # shapes need no kernel
        out, weights = _attend(query, key, value, v, mask, lengths, need_weights)
    else:
        out, weights = reference.additive_attention(query, key, value, v, mask=mask, len_k=lengths)
        support.fall_back(reason)
    if unbatched:
        out, weights = out.squeeze(0), weights.squeeze(0) if need_weights else weights
    return (out, weights) if need_weights else out


def _may_go_straight_on(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
) -> bool:
    """A step of a decoder waits longer for all questions than for the kernel."""
    return (
        mask is None
        and type(query) is type(key) is type(value) is Tensor
        and all(t is None or isinstance(t, Tensor) for t in (v, bias))
        and v is not None
        and query.dim() == 3
        and query.is_cpu
        and not support.on_gpu(query)
        and (bias is None or (bias.shape == query.shape[2:] and bias.dtype == query.dtype))  # no broadcast
        and (lengths is None or (type(lengths) is Tensor and lengths.dtype == torch.int64 and lengths.is_cpu))
        and not query.is_nested
        and support.is_plain_call()
    )


def _fit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
) -> bool:
    if not query.dim() == key.dim() == value.dim() == 3 or not query.is_floating_point():
        return False
    vectors = [v] if bias is None else [v, bias]
    if any(t.dtype != query.dtype or t.device != query.device for t in (key, value, *vectors)):
        return False
    B, Tq, D = query.shape
    Tk = key.size(1)
    if (
        tuple(key.shape) != (B, Tk, D)
        or value.shape[:2] != key.shape[:2]
        or any(t.shape != (D,) for t in vectors)
    ):
        return False
    if lengths is not None and (lengths.shape != (B,) or lengths.dtype not in INTEGERS):
        return False
    return mask is None or (
        mask.dim() == 3
        and mask.device == query.device
        and mask.dtype in (torch.bool, torch.float32, query.dtype)
        and all(m in (1, s) for m, s in zip(mask.shape, (B, Tq, Tk), strict=True))
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    weights: bool,
) -> tuple[Tensor, Tensor]:
    try:
        return ops.additive_attention(query, key, value, v, mask=mask, len_k=lengths, need_weights=weights)
    except RuntimeError as error:  # to look at lengths before would take time in every call
        _, _found, why = str(error).partition("seqkernels::additive_attention_fwd: ")
        if "expected len_k " in why:
            raise ValueError(why.replace("len_k", "key_lengths")) from None
        raise
