"""Our kernels as the flash attention of torch itself, for code that calls F.scaled_dot_product_attention.

    seqkernels.integrations.flash_attention.register()
    torch.nn.attention.activate_flash_attention_impl("seqkernels")

From then on torch's operators are ours wherever torch chooses flash attention. On a GPU it does so in float16
and bfloat16, and where it prefers cuDNN only under `torch.nn.attention.sdpa_kernel` with FLASH_ATTENTION;
`torch.nn.attention.varlen.varlen_attn` calls one of them. Autograd, torch.compile and all else stay torch's.
`torch.nn.attention.restore_flash_attention_impl()` undoes it.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.attention
from torch import Tensor
from torch.library import Library

from seqkernels.ops import _autograd as ag
from seqkernels.ops import attention as ops
from seqkernels.reference.attention import NO_LIMIT, random_state


def register(name: str = "seqkernels") -> None:
    """Make `torch.nn.attention.activate_flash_attention_impl(name)` known.

    Raises RuntimeError where this torch has no such registry.
    """
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        raise RuntimeError(
            f"torch {torch.__version__} has no registry of flash attention; seqkernels.patch() or "
            "seqkernels.swap_(model) bring the kernels to it"
        )
    torch.nn.attention.register_flash_attention_impl(name, register_fn=_Active)


class _Active:
    """Torch's operators are ours until `remove`."""

    def __init__(self) -> None:
        self._library: Library | None = Library("aten", "IMPL")
        functions = [("CPU", f) for f in _ON_CPU] + [("CUDA", f) for f in _ON_CUDA]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "[\\s\\S]*Overriding a previously registered kernel")
            for key, function in functions:
                if hasattr(torch.ops.aten, function.__name__):
                    self._library.impl(function.__name__, function, key)

    def remove(self) -> None:
        if self._library is not None:
            self._library._destroy()
            self._library = None


def _scaled_dot_product_flash_attention_for_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    options = _options(query, scale, right=0 if is_causal else NO_LIMIT)
    out, lse = _forward(query, key, value, options, dropout_p, mask=_four_dims(attn_mask, query))
    return _lying_like(query, out.transpose(1, 2)), lse.transpose(1, 2).contiguous().transpose(1, 2)


def _scaled_dot_product_flash_attention_for_cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    options = _options(query, scale, right=0 if is_causal else NO_LIMIT)
    outs = (out.transpose(1, 2), logsumexp)
    mask = _four_dims(attn_mask, query)
    return _backward(grad_out.transpose(1, 2), query, key, value, *outs, options, dropout_p, mask=mask)


def _scaled_dot_product_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
):
    """Causal is aligned to the last query and key, as torch's `causal_lower_right` asks for by this name."""
    _refuse(return_debug_mask=return_debug_mask)
    rng = _rng(query, dropout_p)
    options = _options(query, scale, *_limits(is_causal, None, None), True)
    out, lse = _forward(query, key, value, options, dropout_p, rng=rng)
    out = _lying_like(query, out.transpose(1, 2))
    return out, lse, None, None, query.size(2), key.size(2), *_rest(query, rng)


def _scaled_dot_product_flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    options = _options(query, scale, *_limits(is_causal, None, None), True)
    outs = (out.transpose(1, 2), logsumexp)
    rng = philox_seed.view(torch.int64)
    grads = _backward(grad_out.transpose(1, 2), query, key, value, *outs, options, dropout_p, rng=rng)
    return tuple(_lying_like(x, g) for x, g in zip((query, key, value), grads, strict=True))


def _flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,  # which torch does not hand to backward
    block_table: Tensor | None = None,
    num_splits: int | None = None,  # a hint
):
    """[B,T,H,D], or [N,H,D] with cum_seq; causal and windows are aligned to the last query and key."""
    _refuse(return_debug_mask=return_debug_mask, alibi_slopes=alibi_slopes is not None)
    options = _options(query, scale, *_limits(is_causal, window_size_left, window_size_right), True)
    q, k, v = (_heads_first(t, cum_seq_q) for t in (query, key, value))
    rng = _rng(query, dropout_p)
    if block_table is None:
        sequences = {"cu_q": cum_seq_q, "cu_k": cum_seq_k, "len_k": seqused_k, "longest": (max_q, max_k)}
        out, lse = _forward(q, k, v, options, dropout_p, rng=rng, **sequences)
    else:
        _refuse(
            block_table_without_seqused_k=seqused_k is None,
            block_table_with_cum_seq_q=cum_seq_q is not None,
            dropout_in_pages=dropout_p > 0,
        )
        pages = (ag.unit_last_stride(t) for t in (q, k, v))
        out, lse = ops._paged_fwd(*pages, block_table, seqused_k, None, None, *options)
    if cum_seq_q is not None:
        out, lse = out[0], lse[0]
    return _lying_like(query, out), lse, *_rest(query, rng)


def _flash_attention_forward_no_dropout_inplace(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    **options,
) -> Tensor:
    sequences = cum_seq_q, cum_seq_k, max_q, max_k
    arguments = dropout_p, is_causal, return_debug_mask
    result, lse, *_ = _flash_attention_forward(query, key, value, *sequences, *arguments, **options)
    out.copy_(result)
    return lse


def _flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    packed = cum_seq_q is not None
    if packed:
        grad_out, out, logsumexp = (t.unsqueeze(0) for t in (grad_out, out, logsumexp))
    options = _options(query, scale, *_limits(is_causal, window_size_left, window_size_right), True)
    heads = (_heads_first(t, cum_seq_q) for t in (query, key, value))
    sequences = {"cu_q": cum_seq_q, "cu_k": cum_seq_k, "longest": (max_q, max_k)}
    rng = rng_state.view(torch.int64)
    grads = _backward(grad_out, *heads, out, logsumexp, options, dropout_p, rng=rng, **sequences)
    grads = (g.transpose(1, 2).squeeze(0) if packed else g.transpose(1, 2) for g in grads)
    return tuple(_lying_like(x, g) for x, g in zip((query, key, value), grads, strict=True))


_ON_CPU = (_scaled_dot_product_flash_attention_for_cpu, _scaled_dot_product_flash_attention_for_cpu_backward)
_ON_CUDA = (
    _scaled_dot_product_flash_attention,
    _scaled_dot_product_flash_attention_backward,
    _flash_attention_forward,
    _flash_attention_forward_no_dropout_inplace,
    _flash_attention_backward,
)

Options = tuple[float, float, int, int, bool]  # scale, softcap, left, right, bottom_right


def _options(
    q: Tensor, scale: float | None, left: int = NO_LIMIT, right: int = NO_LIMIT, bottom_right: bool = False
) -> Options:
    return (q.size(-1) or 1) ** -0.5 if scale is None else scale, 0.0, left, right, bottom_right


def _limits(is_causal: bool, left: int | None, right: int | None) -> tuple[int, int]:
    left, right = (NO_LIMIT if x is None or x < 0 else x for x in (left, right))
    return left, 0 if is_causal else right


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    dropout: float,
    *,
    mask: Tensor | None = None,
    rng: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    len_k: Tensor | None = None,
    longest: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor]:
    """[B,H,T,D] each -> out [B,T,H,D], lse [B,H,T]"""
    q, k, v = (ag.unit_last_stride(t) for t in (q, k, v))
    sequences = (x if x is None else x.to(torch.int64) for x in (cu_q, cu_k, len_k))
    return ops._fwd(q, k, v, mask, *sequences, None, None, *options, dropout, rng, *longest)


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    options: Options,
    dropout: float,
    *,
    mask: Tensor | None = None,
    rng: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    longest: tuple[int, int] = (0, 0),
) -> tuple[Tensor, ...]:
    """grad_out and out [B,T,H,D], the others as in `_forward` -> gradients [B,H,T,D]"""
    q, k, v, grad_out = (ag.unit_last_stride(t) for t in (q, k, v, grad_out))
    sequences = (x if x is None else x.to(torch.int64) for x in (cu_q, cu_k))
    saved = out.contiguous(), lse.contiguous(), mask, *sequences
    rest = None, None, None, *options, dropout, rng if dropout else None, *longest
    dq, dk, dv, _, _ = ops._bwd(grad_out, None, q, k, v, *saved, *rest, False)
    return tuple(g.transpose(1, 2) for g in (dq, dk, dv))


def _heads_first(x: Tensor, packed: Tensor | None) -> Tensor:
    return x.transpose(1, 2) if packed is None else x.transpose(0, 1).unsqueeze(0)


def _four_dims(mask: Tensor | None, q: Tensor) -> Tensor | None:
    return None if mask is None else ops.readable(mask[(None,) * (4 - mask.dim())], q)


def _lying_like(x: Tensor, result: Tensor) -> Tensor:
    """torch.compile takes for granted that results lie in memory as torch's do."""
    like = torch.empty_like(x)
    return result if result.stride() == like.stride() else like.copy_(result)


def _rng(like: Tensor, dropout: float) -> Tensor | None:
    return random_state(like) if dropout else None


def _rest(like: Tensor, rng: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The state of the generator, what is unused, and weights for debugging."""
    state = torch.zeros(2, dtype=torch.int64, device=like.device) if rng is None else rng
    unused = torch.zeros((), dtype=torch.uint64, device=like.device)
    return state.view(torch.uint64), unused, like.new_empty(0)


def _refuse(**conditions: bool) -> None:
    for name, holds in conditions.items():
        if holds:
            raise NotImplementedError(f"flash attention by seqkernels does not support {name}")
