"""Ours or torch's on a GPU, by published measurements (docs/attention-gpu.md) until there are our own."""

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def why_torch(q: Tensor, v: Tensor, mask: Tensor | None, gqa: bool, beyond_torch: bool) -> str | None:
    """None when our kernels are to run on q [B,Hq,Tq,D], v [B,Hk,Tk,Dv], else why torch's serve better.

    beyond_torch: a window, softcap, ALiBi, sinks, lengths, or a wish for the LSE.
    """
    Tq, D, Dv = q.size(-2), q.size(-1), v.size(-1)
    if beyond_torch or Dv != D or D > 256:
        return None  # torch has no fused kernel, or (above 256) one several times slower than its others
    if mask is not None and (gqa or mask.requires_grad):
        return None
    if 1 < Tq <= 16:
        return None  # cuDNN reads the keys at 1 to 16 % of the memory's speed
    if q.dtype in HALF:
        return f"cuDNN and FlashAttention are faster at dense {str(q.dtype)[6:]} with head dims up to 256"
    if q.dtype == torch.float32 and not gqa:
        return "torch has a fused kernel for dense float32, and nobody has measured ours against it"
    return None
