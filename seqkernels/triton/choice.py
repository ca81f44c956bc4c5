"""Ours or torch's on a GPU where both can: the faster one on an H100 (docs/attention-gpu.md)."""

import functools

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)

# Where few queries are ours. cuDNN walks all keys of a head and of 128 queries in one multiprocessor, 7 ns a
# key, and many of them one after the other; ours read each key once, but need the host for 60 us.
FEW_QUERIES = 16
FEW_TILES = 32  # batches x heads x tiles of 128 queries: a quarter of an H100's multiprocessors
LONG = 16_384  # keys of such calls
SOME = 1024  # keys of few queries, if batches x heads x keys are MANY
MANY = 2**20


def why_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str | None:
    """None when our kernels are to run on q [B,Hq,Tq,D], k [B,Hk,Tk,D], v [B,Hk,Tk,Dv], else why torch's do.

    For what torch can do at all: no window, softcap, ALiBi, sinks, lengths, weights or LSE.
    """
    (B, Hq, Tq, D), (Hk, Tk), Dv = q.shape, k.shape[1:3], v.size(3)
    if max(D, Dv) > 256:
        return None  # torch's fused kernel is several times slower than its others
    if D != Dv and (mask is not None or _trains(q, k, v) or not _cudnn_takes(q.device, q.dtype, D, Dv)):
        return None  # no fused kernel, or (in training) one as slow as ours
    if mask is not None and (Hq != Hk or _trains(q, k, v, mask)):
        return None  # no fused kernel; and cuDNN's dQ is NaN for some lengths (pytorch issue 196678)
    if 1 < Tq <= FEW_QUERIES and (Tk >= LONG or (Tk >= SOME and B * Hq * Tk >= MANY)):
        return None
    if 1 < Tq and Tk >= LONG and B * Hq * -(-Tq // 128) <= FEW_TILES:
        return None
    if q.dtype in HALF:
        return f"cuDNN and FlashAttention are faster at dense {str(q.dtype)[6:]} with head dims up to 256"
    if Hq == Hk:
        return "torch's fused kernel is faster at dense float32"
    return None


def _trains(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _cudnn_takes(device: torch.device, dtype: torch.dtype, *dims: int) -> bool:
    """Values of another width than keys. torch asks cuDNN first from Hopper on."""
    return dtype in HALF and not any(dim % 8 for dim in dims) and _major(device) in (9, 10)


@functools.lru_cache
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
