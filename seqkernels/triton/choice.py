"""Ours or torch's on a GPU where both can: by published figures (docs/attention-gpu.md), none ours yet."""

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def why_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str | None:
    """None when our kernels are to run on q [B,Hq,Tq,D], k [B,Hk,Tk,D], v [B,Hk,Tk,Dv], else why torch's do.

    For what torch can do at all: no window, softcap, ALiBi, sinks, lengths, weights or LSE.
    """
    (B, Hq, Tq, D), (Hk, Tk), Dv = q.shape, k.shape[1:3], v.size(3)
    if D != Dv or D > 256:
        return None  # torch has no fused kernel, or (above 256) one several times slower than its others
    if mask is not None and (Hq != Hk or _trains(q, k, v, mask)):
        return None  # no fused kernel; and cuDNN's dQ is NaN for some lengths (pytorch issue 196678)
    if 1 < Tq <= 16 and Tk >= 1024:
        return None  # cuDNN reads the keys at 1 to 16 % of the memory's speed
    if 1 < Tq and Tk >= 8192 and B * Hq * -(-Tq // 128) <= 32:
        return None  # cuDNN splits no keys: tiles of queries for a quarter of an H200's multiprocessors
    if q.dtype in HALF:
        return f"cuDNN and FlashAttention are faster at dense {str(q.dtype)[6:]} with head dims up to 256"
    if Hq == Hk:
        return "torch has a fused kernel for dense float32, and nobody has measured ours against it"
    return None


def _trains(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
