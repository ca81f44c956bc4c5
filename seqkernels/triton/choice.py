"""Ours or torch's on a GPU where both can: the faster one on an H100 (docs/attention-gpu.md)."""

import functools

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)

# Forward in bfloat16; in brackets torch's time over ours (bench/results/h100). Queries were the last ones and
# causal, which torch gives FlashAttention; cuDNN, which takes them if they see all keys, was not measured.
FEW_QUERIES = 16  # as many were measured
GROUP = 4  # query heads a key head, or 8. torch's time doubles from 4 to 8 (0.407, 0.794 ms), ours does not
HEADS = 256  # batches x heads, from SOME keys on (1.54 to 1.79); 64 lose with 8,192 keys (0.62)
SOME = 2048  # keys (1.03 to 1.69); 1,024 lose (0.59 to 0.64)
LONG = 32_768  # keys, with 8 heads of 512 queries (1.16); 8,192 tie (1.02). 131,072, 64 heads of 8: 3.16
FEW_TILES = 128  # batches x heads x tiles of 128 queries: 64 heads of 256 (1.73). More fill a GPU unsplit


def why_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str | None:
    """None when our kernels are to run on q [B,Hq,Tq,D], k [B,Hk,Tk,D], v [B,Hk,Tk,Dv], else why torch's do.

    For what torch can do at all: no window, softcap, ALiBi, sinks, lengths, weights or LSE.
    """
    (B, Hq, Tq, D), (Hk, Tk), Dv = q.shape, k.shape[1:3], v.size(3)
    if D != Dv and (mask is not None or _trains(q, k, v) or not _cudnn_takes(q.device, q.dtype, D, Dv)):
        return None  # no fused kernel, or (in training) one slower than ours (192, 128: 1.10)
    if mask is not None and (Hq != Hk or _trains(q, k, v, mask)):
        return None  # no fused kernel; and cuDNN's dQ is NaN for some lengths (pytorch issue 196678)
    if q.dtype not in HALF and Hq != Hk and not _trains(q, k, v):
        return None  # no fused kernel (1.20)
    if q.dtype not in HALF or Tq == 1 or _trains(q, k, v):
        ours = False
    elif Tq <= FEW_QUERIES:
        ours = Hq >= GROUP * Hk and (Tk >= LONG or (Tk >= SOME and B * Hq >= HEADS))
    else:
        ours = Tk >= LONG and B * Hq * -(-Tq // 128) <= FEW_TILES
    return None if ours else f"torch's kernels are faster at dense {str(q.dtype)[6:]}"


def _trains(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _cudnn_takes(device: torch.device, dtype: torch.dtype, *dims: int) -> bool:
    """Values of another width than keys. torch asks cuDNN first from Hopper on."""
    return dtype in HALF and not any(dim % 8 or dim > 256 for dim in dims) and _major(device) in (9, 10)


@functools.lru_cache
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
