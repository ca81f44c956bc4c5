"""Attention as functions: torch's scaled_dot_product_attention and more, packed sequences, decoding."""

import math
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from seqkernels import support
from seqkernels.ops import _autograd as ag
from seqkernels.ops import attention as ops
from seqkernels.ops.attention import NO_LIMIT
from seqkernels.reference import attention as reference

Window = tuple[int | None, int | None]

MISFIT = "query, key, value and attn_mask differ in dtype, device or size"
_PLAIN = (Tensor, torch.nn.Parameter)
_BOOLS = (bool, torch.SymBool)
_SCALES = (type(None), float, int, torch.SymFloat, torch.SymInt)
INTEGERS = {torch.int64, torch.int32}
_torchs = F.scaled_dot_product_attention  # what `patch` finds there later may be ours


def is_plain(*tensors: Tensor | None) -> bool:
    """No nested tensor and no subclass with a way of its own to attend."""
    return all(
        t is None
        or (isinstance(t, Tensor) and not t.is_nested and (type(t) in _PLAIN or not _has_own_way(type(t))))
        for t in tensors
    )


def _has_own_way(cls: type[Tensor]) -> bool:
    """By function or by dispatch. torch's fake and functional tensors dispatch too, but take any operator."""
    if cls.__torch_function__ is not torch._C._disabled_torch_function_impl:
        return True
    return cls.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl and not hasattr(
        cls, "_mode_key"
    )


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query @ key^T + attn_mask) @ value without the matrix of scores, differentiable twice.

    query [...,Hq,L,E], key [...,H,S,E], value [...,H,S,Ev], leading dims of any number that broadcast, or
    jagged nested tensors; float32, float64, bfloat16 or float16, all the same. Returns [...,Hq,L,Ev].
        attn_mask: bool (True: attends) or float (added, gets a gradient), broadcast to [...,Hq,L,S], or a
            `torch.nn.attention.bias.CausalBias`
        is_causal: query i attends to keys 0 to i; with attn_mask=causal_lower_right(L, S) the last sees all.
            A mask of 2 or 4 dims may join it where query has 4, as in torch
        enable_gqa: H may be a divisor of Hq
        window: (left, right): how many keys before and behind its own a query attends to; None: no limit
        softcap: scores become softcap * tanh(score / softcap); inf: what they are
        alibi_slopes: [Hq] or [B,Hq]: slope * distance is subtracted from the scores; float32 whatever it
            was, no gradient
        sinks: [Hq]: logits that take part in every softmax and have no value; get a gradient
        return_lse: also return the logarithm of the softmax's denominator, [...,Hq,L] in float32 (float64 for
            float64), differentiable
    A query that attends to no key gives 0. dropout_p is applied always, as in torch; the same seed drops
    other weights.
    Raises what torch raises; ValueError where arguments that torch does not know do not fit; RuntimeError
    when key and value differ in length.
    Equal to `torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p,
    is_causal, scale=scale, enable_gqa=enable_gqa)`.
    """
    extras = return_lse or not (window is softcap is alibi_slopes is sinks is None)
    plain = isinstance(is_causal, bool) and isinstance(enable_gqa, _BOOLS)
    simple = plain and attn_mask is None and isinstance(scale, _SCALES) and dropout_p == 0
    if simple and not extras and _may_go_straight_on(query, key, value, enable_gqa):
        try:
            return ops.attention(
                query,
                key,
                value,
                scale=query.size(3) ** -0.5 if scale is None else scale,
                right=0 if is_causal else NO_LIMIT,
            )[0]
        except (RuntimeError, TypeError):
            pass  # the rest finds out why, and what to do
    if simple and _are_jagged(query, key, value, enable_gqa):
        if extras or not support.forbids_flash():
            more = window, is_causal, softcap, alibi_slopes, sinks
            return _jagged(query, key, value, scale, *more, return_lse=return_lse)
    bottom_right = False
    if _is_causal_bias(bias := attn_mask):
        if is_causal:
            raise ValueError("CausalBias should not be used with causal=True")
        square = bias.seq_len_q == bias.seq_len_kv  # then both corners are one to torch, whatever the lengths
        bottom_right = bias.variant == type(bias.variant).LOWER_RIGHT and not square
        attn_mask, is_causal = None, True
        if bottom_right and (bias.seq_len_q, bias.seq_len_kv) != (query.size(-2), key.size(-2)):
            attn_mask, is_causal, bottom_right = bias._materialize(query.device), False, False

    plain = plain and all(isinstance(t, Tensor) for t in (query, key, value))
    plain = plain and is_plain(query, key, value, attn_mask)
    if extras and not plain:
        raise ValueError(_why_torchs_only(query, key, value, attn_mask, is_causal, enable_gqa))
    reason = MISFIT
    if plain:
        reason = support.why_torch_attends(query, *query.shape[-1:], *value.shape[-1:])
    dense = None
    if plain and (extras or reason is None):
        dense = _four_dims(*autocast(query, key, value, attn_mask), enable_gqa)
        reason = reason or (MISFIT if dense is None else None)
    forbidden = support.forbids_flash()
    faster = not (reason or forbidden or extras) and support.why_torch_is_faster(*dense[:4])
    both = plain and attn_mask is not None and is_causal
    drops = _is_number(dropout_p) and 0 <= dropout_p <= 1
    if extras and not drops:
        error = ValueError if _is_number(dropout_p) else TypeError
        raise error(f"dropout_p must be a number from 0 to 1, got {dropout_p!r}")
    refused = not drops or not (scale is None or _is_number(scale))  # by torch, as the next
    refused = refused or (both and (query.dim() != 4 or attn_mask.dim() not in (2, 4)))
    if not extras and (reason or forbidden or faster or refused):
        if bottom_right:  # torch has a fused kernel for the bias itself, on GPUs
            attn_mask, is_causal = bias if faster else bias._materialize(query.device), False
        with torchs_kernels():
            result = _torchs(
                query,
                key,
                value,
                attn_mask=attn_mask,
                dropout_p=dropout_p,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
            )
        if plain and reason and not forbidden:
            support.fall_back(reason)
        return result
    if dense is None:
        raise ValueError(f"{MISFIT}: got {described(query, key, value, attn_mask)}")

    q, k, v, mask, lead = dense
    options = _options(q, scale, window, is_causal, softcap, alibi_slopes, sinks)
    options |= {"mask": mask, "bottom_right": bottom_right, "dropout": dropout_p}
    if forbidden:
        out, lse = reference.attention(q, k, v, **options)
    else:
        out, lse = _attend(q, k, v, options, reason)
    if len(lead) != 2:
        out, lse = ag.reshape(out, (*lead, *out.shape[2:])), lse.reshape(*lead, lse.size(2))
    return (out, lse) if return_lse else out


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each of S sequences that lie one after the other, without padding.

    q [N,Hq,D], k [M,H,D], v [M,H,Dv] -> [N,Hq,Dv], and lse [Hq,N] if return_lse. Sequence s has the queries
    cu_seqlens_q[s] to cu_seqlens_q[s+1] and the keys cu_seqlens_k[s] to cu_seqlens_k[s+1] (int32 or int64,
    [S+1], from 0 to N and M), none longer than max_q and max_k (0: not known). The rest as in
    `scaled_dot_product_attention`, but causal and window are aligned to the last query and the last key of
    each sequence, and alibi_slopes are [Hq] or [S,Hq].
    Raises ValueError for arguments that do not fit. On a GPU nobody looks at what cu_seqlens hold, as the
    host would have to wait: rows beyond max_q would be 0.
    Equal to `scaled_dot_product_attention` on each sequence alone, with `causal_lower_right`.
    """
    if not is_plain(q, k, v) or any(t is None for t in (q, k, v)):
        raise ValueError(f"q, k and v must be [N,Hq,D], [M,H,D] and [M,H,Dv], got {described(q, k, v)}")
    q, k, v, _ = autocast(q, k, v, None)
    same = q.dtype == k.dtype == v.dtype and q.device == k.device == v.device
    if not same or not q.dim() == k.dim() == v.dim() == 3 or q.size(2) != k.size(2) or k.size(0) != v.size(0):
        raise ValueError(f"q, k and v must be [N,Hq,D], [M,H,D] and [M,H,Dv], got {described(q, k, v)}")
    if k.size(1) != v.size(1) or k.size(1) == 0 or q.size(1) % k.size(1):
        raise ValueError(f"k and v must have one number of heads that divides q's, got {described(q, k, v)}")
    cu = cu_seqlens_q, cu_seqlens_k
    if (
        not all(isinstance(c, Tensor) and c.dim() == 1 and c.dtype in INTEGERS for c in cu)
        or cu[0].shape != cu[1].shape
    ):
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must be integers [S+1], got {described(*cu)}")
    if max_q < 0 or max_k < 0:
        raise ValueError(f"max_q and max_k must be the longest sequences, got {max_q} and {max_k}")
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
    options = _options(q, scale, window, is_causal, softcap, alibi_slopes, sinks, cu[0].size(0) - 1)
    options |= {"cu_q": int64(cu[0]), "cu_k": int64(cu[1]), "bottom_right": True}
    reason = support.why_torch_attends(q, q.size(3), v.size(3))
    out, lse = _attend(q, k, v, options, reason, max_q=max_q, max_k=max_k)
    return (out[0].transpose(0, 1), lse[0]) if return_lse else out[0].transpose(0, 1)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    *,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The newest Tq queries of each row attend causally to the keys and values in a cache.

    q [B,Hq,Tq,D], k_cache [B,H,S,D], v_cache [B,H,S,Dv], of which the first cache_seqlens [B] (int32 or
    int64) count, those of the queries included; what lies beyond is never read. Returns [B,Hq,Tq,Dv], and
    lse [B,Hq,Tq] if return_lse. With block_table, integers [B,blocks], the caches are
    [pages,H,page size,D or Dv], and the keys of row b lie in the pages block_table[b], in this order. The
    rest as in `scaled_dot_product_attention`, with window aligned to the last query and the last key.
    Raises ValueError for arguments that do not fit. On a GPU nobody looks at what lengths and table hold.
    Equal to `scaled_dot_product_attention(q, k, v, causal_lower_right(Tq, n), enable_gqa=True)` on every row,
    with its first n keys and values.
    """
    k, v = k_cache, v_cache
    if not is_plain(q, k, v) or any(t is None for t in (q, k, v)) or q.dim() != 4:
        shapes = "[B,Hq,Tq,D], [B,H,S,D] and [B,H,S,Dv]"
        raise ValueError(f"q, k_cache and v_cache must be {shapes}, got {described(q, k, v)}")
    lengths = cache_seqlens
    if not isinstance(lengths, Tensor) or lengths.shape != q.shape[:1] or lengths.dtype not in INTEGERS:
        raise ValueError(f"cache_seqlens must be integers [{q.size(0)}], got {described(cache_seqlens)}")
    if block_table is not None:
        table = block_table if isinstance(block_table, Tensor) else torch.empty(0)
        if table.dim() != 2 or table.size(0) != q.size(0) or table.dtype not in INTEGERS:
            raise ValueError(
                f"block_table must be integers [{q.size(0)},blocks], got {described(block_table)}"
            )
        if not k.dim() == v.dim() == 4:
            raise ValueError(f"caches in pages must be [pages,H,page size,D or Dv], got {described(k, v)}")
        if _may_read_pages(q, k, v, sinks):
            options = _options(q, scale, window, True, softcap, alibi_slopes, sinks)
            out, lse = ops.paged_attention(q, k, v, block_table, cache_seqlens, **options)
            return (out, lse) if return_lse else out
        k, v = _without_pages(k, v, block_table, cache_seqlens)
    options = {"window": window, "softcap": softcap, "alibi_slopes": alibi_slopes, "sinks": sinks}
    result = attend_with_lengths(
        q, k, v, lengths=cache_seqlens, is_causal=True, bottom_right=True, scale=scale, **options
    )
    return result if return_lse else result[0]


def _without_pages(k: Tensor, v: Tensor, table: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """[B,H,blocks * page size,D or Dv]. The table may hold anything beyond the lengths; within, index_select
    lets no number count from the end."""
    starts = torch.arange(table.size(1), device=table.device) * k.size(2)
    table = table.masked_fill(starts >= lengths[:, None], 0)
    index = table.flatten()
    try:
        k, v = (t.index_select(0, index).unflatten(0, table.shape) for t in (k, v))
    except (IndexError, RuntimeError):  # the latter where there are no pages
        pages = min(k.size(0), v.size(0))
        wrong = index[(index < 0) | (index >= pages)].tolist()
        raise ValueError(
            f"block_table must hold numbers of pages, 0 to {pages - 1}, up to the length, got {wrong}"
        ) from None
    return k.transpose(1, 2).flatten(2, 3), v.transpose(1, 2).flatten(2, 3)


def _may_read_pages(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> bool:
    """Kernels for GPUs find keys in their pages, others want them gathered, as gradients do."""
    return (
        support.on_gpu(q)
        and q.dim() == k.dim() == v.dim() == 4
        and support.why_torch_attends(q, q.size(3), v.size(3)) is None
        and q.dtype == k.dtype == v.dtype
        and not ag.needs_grad(q, k, v, sinks)
        and not support.in_functorch()
    )


def attend_with_lengths(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    is_causal: bool = False,
    bottom_right: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    window: Window | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """q [B,Hq,Tq,D], k [B,H,Tk,D], v [B,H,Tk,Dv], of which the first lengths [B] count -> out and lse.

    Without lengths and whatever else torch has not, torch's kernels may run on a GPU, and lse is None.
    """
    q, k, v, mask = autocast(q, k, v, mask)
    dense = _four_dims(q, k, v, mask, gqa=True) if q.dim() == k.dim() == v.dim() == 4 else None
    if dense is None or q.size(0) != k.size(0):
        raise ValueError(f"{MISFIT}: got {described(q, k, v, mask)}")
    q, k, v, mask, _ = dense
    reason = support.why_torch_attends(q, q.size(3), v.size(3))
    torch_can = lengths is window is softcap is alibi_slopes is sinks is None
    is_causal = is_causal and not (bottom_right and q.size(2) == 1)  # which sees all
    torch_can = torch_can and not (
        is_causal and (mask is not None or (bottom_right and q.size(2) != k.size(2)))
    )
    if reason is None and torch_can and support.why_torch_is_faster(q, k, v, mask):
        options = {"attn_mask": mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        return _torchs(q, k, v, **options, enable_gqa=q.size(1) != k.size(1)), None
    options = _options(q, scale, window, is_causal, softcap, alibi_slopes, sinks)
    options |= {"mask": mask, "bottom_right": bottom_right, "dropout": dropout_p}
    options |= {"len_k": None if lengths is None else int64(lengths)}
    return _attend(q, k, v, options, reason)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], reason: str | None, **longest: int
) -> tuple[Tensor, Tensor]:
    if reason is None or q.is_meta:  # shapes need no kernel
        try:
            return ops.attention(q, k, v, **options, **longest)
        except RuntimeError as error:
            raise _misuse(error, options) from None
    if not q.is_floating_point():
        raise ValueError(f"query, key and value must be floating point numbers, got {q.dtype}: call float()")
    result = reference.attention(q, k, v, **options)
    support.fall_back(reason)
    return result


def _misuse(error: RuntimeError, options: dict[str, Any]) -> Exception:
    """What the op finds in arguments that are not looked at before: that would take time in every call."""
    if "Expected a value of type" in (why := str(error)):
        return TypeError(why.splitlines()[0])
    _, found, why = why.partition("seqkernels::attention_fwd: ")
    for name, given in {"cu_q": "cu_seqlens_q", "cu_k": "cu_seqlens_k", "len_k": "cache_seqlens"}.items():
        if f"expected {name} " in why:
            why = f"{why.replace(name, given)}: {given} is {options[name]}"
    return ValueError(why) if found else error


def torchs_kernels() -> AbstractContextManager:
    """Its fused ones have no forward-mode derivatives and run row by row under vmap: then its math."""
    by_math = forward_ad._current_level >= 0 or support.in_functorch()
    return sdpa_kernel(SDPBackend.MATH) if by_math else nullcontext()


def _jagged(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, *options: Any, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """[B,H,ragged,features] by the offsets of each, which are cu_seqlens."""
    q, k, v, _ = autocast(*(t.values().unsqueeze(0) for t in (query, key, value)), None)
    options = _options(q, scale, *options, query.size(0))
    options |= {"cu_q": int64(query.offsets()), "cu_k": int64(key.offsets())}
    reason = support.why_torch_attends(q, q.size(3), v.size(3))
    out, lse = _attend(q, k, v, options, reason, max_q=_longest(query), max_k=_longest(key))
    results = (
        torch.nested.nested_tensor_from_jagged(t[0], query.offsets(), jagged_dim=2) for t in (out, lse)
    )
    return tuple(results) if return_lse else next(results)


def _longest(t: Tensor) -> int:
    """Under torch.compile no length is known but the sum of all, which no sequence exceeds either."""
    return t.values().size(1) if support.is_compiling() else t._get_max_seqlen()


def _may_go_straight_on(q: Tensor, k: Tensor, v: Tensor, gqa: bool) -> bool:
    """The cheap questions that decide a simple call; all of them take 10 us, like a step of decoding."""
    return (
        type(q) is type(k) is type(v) is Tensor
        and ((q.is_cpu and k.is_cpu and v.is_cpu) or (q.is_cuda and k.is_cuda and v.is_cuda))
        and not (q.is_nested or k.is_nested or v.is_nested)
        and support.is_plain_call()
        and q.dim() == k.dim() == v.dim() == 4
        and (gqa or q.size(1) == k.size(1))
        and q.size(3) > 0
        and not support.forbids_flash()
        and (not support.on_gpu(q) or _ours_is_best(q, k, v))
    )


def _ours_is_best(q: Tensor, k: Tensor, v: Tensor) -> bool:
    reason = support.why_torch_attends(q, q.size(3), v.size(3))
    return not (reason or support.why_torch_is_faster(q, k, v))


def _are_jagged(q: Tensor, k: Tensor, v: Tensor, gqa: bool) -> bool:
    """And fit together; if not, torch raises in its own words."""
    jagged = all(
        isinstance(t, Tensor)
        and t.is_nested
        and t.layout == torch.jagged
        and t.dim() == 4
        and t._ragged_idx == 2
        and t.lengths() is None
        for t in (q, k, v)
    )
    if not jagged or not q.dtype == k.dtype == v.dtype or not q.size(0) == k.size(0) == v.size(0):
        return False
    H = k.size(1)
    heads = H == v.size(1) and (q.size(1) == H or (gqa and H > 0 and q.size(1) % H == 0))
    return heads and q.size(3) == k.size(3) and _same_lengths(k, v)


def _same_lengths(a: Tensor, b: Tensor) -> bool:
    """Of jagged tensors: sizes are equal where they share their offsets, else the offsets may still be."""
    if a.size(2) == b.size(2):
        return True
    return not support.is_compiling() and torch.equal(a.offsets(), b.offsets())


def _is_causal_bias(mask: object) -> bool:
    """Without importing torch.nn.attention.bias, and torch._dynamo with it, which takes as long as torch."""
    bias = sys.modules.get("torch.nn.attention.bias")
    return bias is not None and isinstance(mask, bias.CausalBias)


def int64(integers: Tensor) -> Tensor:
    """Contiguous; without the microsecond that it takes to find out that there is nothing to do."""
    done = integers.dtype == torch.int64 and integers.is_contiguous()
    return integers if done else integers.to(torch.int64).contiguous()


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    device = tensors[0].device.type
    if not support.autocasts(device):
        return tensors
    return tuple(ag.autocast(torch.get_autocast_dtype(device), *tensors))


def _four_dims(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, gqa: bool):
    """[B,H,T,features] each, the mask in four dims, the leading dims of the result; None if they misfit."""
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        return None
    if q.dim() == k.dim() == v.dim() == 4 and _heads_fit(*q.shape[:2], k.shape[:2], v.shape[:2], gqa):
        batch, lead = q.shape[:1], q.shape[:2]
    elif min(q.dim(), k.dim(), v.dim()) < (3 if gqa else 2):
        return None
    elif (expanded := _broadcast(q, k, v, gqa)) is None:
        return None
    else:
        q, k, v, batch, lead = expanded
    if q.size(-1) != k.size(-1):
        return None
    if k.size(-2) != v.size(-2):
        raise RuntimeError(
            f"Expected key and value to have the same length, but got {k.size(-2)} and {v.size(-2)}"
        )
    if mask is not None and (mask := _mask(mask, q, (*lead, q.size(-2), k.size(-2)), batch)) is None:
        return None
    return q, k, v, mask, lead


def _heads_fit(B: int, Hq: int, key: tuple[int, int], value: tuple[int, int], gqa: bool) -> bool:
    """As they are: there is nothing to broadcast, which takes 30 us."""
    shares = (gqa or key[1] == 1) and key[1] > 0 and Hq % key[1] == 0
    return B == key[0] and key == value and (Hq == key[1] or shares)


def _broadcast(q: Tensor, k: Tensor, v: Tensor, gqa: bool):
    """Leading dims of any number, broadcast and brought to two."""
    Hq, Hk, Hv = (1 if t.dim() == 2 else t.size(-3) for t in (q, k, v))
    gqa = gqa or Hk == Hv == 1
    try:
        batch = torch.broadcast_shapes(*(t.shape[:-3] for t in (q, k, v)))
        H = Hq if gqa else torch.broadcast_shapes((Hq,), (Hk,), (Hv,))[0]
    except RuntimeError:
        return None
    if not gqa:
        Hk = Hv = H
    elif any(h == 0 or H % h for h in (Hk, Hv)):
        return None
    elif Hk != Hv:
        k, v = (t.repeat_interleave(H // t.size(-3), -3) for t in (k, v))
        Hk = Hv = H
    lead = () if max(q.dim(), k.dim(), v.dim()) == 2 else (*batch, H)
    B = math.prod(batch)
    q, k, v = (
        t.expand(*batch, h, *t.shape[-2:]).reshape(B, h, *t.shape[-2:]) for t, h in ((q, H), (k, Hk), (v, Hv))
    )
    return q, k, v, batch, lead


def _mask(mask: Tensor, q: Tensor, scores: tuple[int, ...], batch: tuple[int, ...]) -> Tensor | None:
    """Four dims; of more, the leading ones are expanded. None if it does not broadcast to scores."""
    if mask.device != q.device or mask.dtype not in (torch.bool, torch.float32, q.dtype):
        return None
    if not 2 <= mask.dim() <= len(scores) or any(
        m not in (1, s) for m, s in zip(reversed(mask.shape), reversed(scores), strict=False)
    ):
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    if len(batch) < 2:
        return mask
    shape = mask.shape[-3:]
    if mask.shape[:-3].numel() == 1:
        return mask.reshape(1, *shape)
    return mask.expand(*batch, *shape).reshape(math.prod(batch), *shape)


def _options(
    q: Tensor,
    scale: float | None,
    window: Window | None,
    is_causal: bool,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    sequences: int | None = None,
) -> dict[str, Any]:
    """The arguments of `ops.attention` for q [B,Hq,Tq,D], of so many sequences if they are not B."""
    (B, Hq, _, D), left, right = q.shape, NO_LIMIT, NO_LIMIT
    B = B if sequences is None else sequences
    _check_number("scale", scale)
    _check_number("softcap", softcap)
    if window is not None:
        sides = window if isinstance(window, tuple | list) else ()
        if len(sides) != 2 or any(w is not None and not (_is_integer(w) and w >= 0) for w in sides):
            raise ValueError(f"window must be (left, right), each an integer >= 0 or None, got {window!r}")
        left, right = (NO_LIMIT if w is None or w > NO_LIMIT else w for w in sides)
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be > 0 or None, got {softcap!r}")
    if alibi_slopes is not None:
        shape = tuple(getattr(alibi_slopes, "shape", ()))
        if (shape != (Hq,) and shape != (B, Hq)) or alibi_slopes.requires_grad:
            learns = " that requires a gradient" if getattr(alibi_slopes, "requires_grad", False) else ""
            raise ValueError(
                f"alibi_slopes must be [{Hq}] or [{B}, {Hq}] and get no gradient, got"
                f" {described(alibi_slopes)}{learns}"
            )
        alibi_slopes = alibi_slopes.float().contiguous()
    if sinks is not None:
        if tuple(getattr(sinks, "shape", ())) != (Hq,):
            raise ValueError(f"sinks must be [{Hq}], got {described(sinks)}")
        sinks = sinks.to(ag.accumulation_dtype(q.dtype)).contiguous()
    return {
        "scale": (D or 1) ** -0.5 if scale is None else scale,
        "left": left,
        "right": min(right, 0) if is_causal else right,
        # beyond the range of float32, where the kernels would make it inf, tanh(x) is x for every score
        "softcap": 0.0 if softcap is None or softcap > torch.finfo(torch.float32).max else softcap,
        "alibi": alibi_slopes,
        "sinks": sinks,
    }


def _check_number(name: str, value: object) -> None:
    """The ops would take a tensor for a number, and its gradient would be lost."""
    if value is None or _is_number(value):
        return
    got = type(value).__name__
    if isinstance(value, Tensor):
        got += " that requires a gradient" if value.requires_grad else f" {list(value.shape)}"
    raise TypeError(f"argument '{name}' must be float, not {got}")


# torch.compile knows its symbolic numbers by isinstance, and not what attributes they have.


def _is_number(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.requires_grad
    return isinstance(value, float | int | torch.SymFloat | torch.SymInt) or hasattr(value, "__float__")


def _is_integer(value: object) -> bool:
    return isinstance(value, int | torch.SymInt) or hasattr(value, "__index__")


def _why_torchs_only(*arguments: object) -> str:
    """Why options that torch does not have cannot go with such arguments."""
    wanted = "torch.Tensor for all tensors and bool for is_causal and enable_gqa"
    if any(isinstance(a, Tensor) and a.is_nested for a in arguments):
        wanted = (
            "all tensors jagged, [B,H,ragged,features], of rows, heads and dtypes that fit, without lengths"
            " (call contiguous()), mask and dropout"
        )
    types = ", ".join(type(a).__name__ for a in arguments if a is not None)
    return f"window, softcap, alibi_slopes, sinks and return_lse need {wanted}, got {types}"


def described(*tensors: object) -> str:
    def words(t: object) -> str:
        return f"{t.dtype} {list(t.shape)}" if isinstance(t, Tensor) else type(t).__name__

    return ", ".join(words(t) for t in tensors if t is not None)
