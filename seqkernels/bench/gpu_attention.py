"""Attention on a GPU: cases in the configurations of NVIDIA's published tables, and who is compared.

Importing this needs neither a GPU nor Triton. TFLOP/s count 4 B H Tq Tk D operations forward (half of that if
causal with Tq = Tk) and 2.5 times as many backward; TB/s count q, k, v and out once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from seqkernels.reference import attention as reference
from seqkernels.reference.attention import NO_LIMIT

from . import gpu, timing
from .check import compare, errors


@dataclass(frozen=True, kw_only=True)
class GpuAttentionCase:
    B: int
    Hq: int
    Hk: int
    Tq: int
    Tk: int
    D: int
    Dv: int
    causal: bool = False  # aligned at the last key, as in decoding
    window: int | None = None  # keys to the left that a query sees
    dtype: str = "bfloat16"
    mode: str = "forward"  # or "train": backward too

    @property
    def title(self) -> str:
        return f"SDPA {self.mode} {self.dtype}"

    @property
    def name(self) -> str:
        heads = f"H={self.Hq}" + (f"/{self.Hk}" if self.Hk != self.Hq else "")
        dims = f"D={self.D}" + (f"/{self.Dv}" if self.Dv != self.D else "")
        words = [self.title, f"B={self.B}", heads, f"T={self.Tq}"]
        words += [f"keys={self.Tk}"] if self.Tk != self.Tq else []
        words += [dims] + ["causal"] * self.causal + ([f"window={self.window}"] if self.window else [])
        return " ".join(words)

    @property
    def pairs(self) -> float:
        """Query-key pairs of one head that are seen."""
        if not self.causal:
            return float(self.Tq * self.Tk)
        if self.window is not None:
            return float(self.Tq * min(self.window + 1, self.Tk))
        return self.Tq * self.Tk - self.Tq * (self.Tq - 1) / 2

    @property
    def flops(self) -> float:
        forward = 2 * self.B * self.Hq * self.pairs * (self.D + self.Dv)
        return forward * (3.5 if self.mode == "train" else 1)

    @property
    def bytes(self) -> float:
        rows = self.Hq * self.Tq + self.Hk * self.Tk
        return float(self.B * rows * (self.D + self.Dv) * getattr(torch, self.dtype).itemsize)


def _square(B: int, Hq: int, Hk: int, T: int, D: int, Dv: int = 0, **options) -> GpuAttentionCase:
    return GpuAttentionCase(B=B, Hq=Hq, Hk=Hk, Tq=T, Tk=T, D=D, Dv=Dv or D, **options)


def _decode(B: int, Hq: int, Hk: int, Tq: int, Tk: int, D: int) -> GpuAttentionCase:
    return GpuAttentionCase(B=B, Hq=Hq, Hk=Hk, Tq=Tq, Tk=Tk, D=D, Dv=D, causal=True)


def suite() -> tuple[GpuAttentionCase, ...]:
    dense = [
        *(_square(2, 64, 8, T, 128, causal=c) for c in (False, True) for T in (2048, 4096, 8192, 16384)),
        *(_square(4, 32, 32, T, 64, causal=c) for c in (False, True) for T in (2048, 8192)),
        *(_square(1, 32, 2, T, 256, causal=True) for T in (2048, 8192)),
        *(_square(2, 128, 128, T, 192, 128) for T in (2048, 4096)),
        _square(4, 16, 16, 4096, 80),
        _square(1, 8, 8, 8192, 512),
        *(_square(2, 128, 128, T, 64, causal=True, window=128) for T in (2048, 8192)),
        _square(2, 16, 16, 4096, 64, dtype="float32"),
    ]
    decoding = [
        *(
            _decode(B, 64, 8, Tq, Tk, 128)
            for B, Tk in ((1, 8192), (1, 131072), (8, 8192), (32, 8192))
            for Tq in (1, 8)
        ),
        _decode(1, 64, 8, 4, 131072, 64),
        *(_decode(1, Hq, Hk, 256, 131072, 128) for Hq, Hk in ((8, 1), (64, 8))),
    ]
    return (*dense, *(replace(case, mode="train") for case in dense), *decoding)


def tensors(case: GpuAttentionCase, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v that take gradients in training, and the gradient of the output [B,Hq,Tq,Dv]."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(getattr(torch, case.dtype))

    q = randn(case.B, case.Hq, case.Tq, case.D)
    k, v = randn(case.B, case.Hk, case.Tk, case.D), randn(case.B, case.Hk, case.Tk, case.Dv)
    for x in (q, k, v):
        x.requires_grad_(case.mode == "train")
    return q, k, v, randn(case.B, case.Hq, case.Tq, case.Dv)


# A contestant makes of the tensors of a case a call that gives (out,), or in training (dq, dk, dv).
Run = Callable[[], tuple[Tensor, ...]]


def seqkernels_run(case: GpuAttentionCase, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Run:
    """Our kernels themselves, whatever the dispatch would choose."""
    from seqkernels.triton import launch

    left, right = NO_LIMIT if case.window is None else case.window, 0 if case.causal else NO_LIMIT
    options = (*(None,) * 6, case.D**-0.5, 0.0, left, right, True, 0.0, None, 0, 0)
    q, k, v, dout = q.detach(), k.detach(), v.detach(), dout.transpose(1, 2)

    def run() -> tuple[Tensor, ...]:
        out, lse = launch.attention_fwd(q, k, v, *options)
        if case.mode == "forward":
            return (out.transpose(1, 2),)
        grads = launch.attention_bwd(dout, None, q, k, v, out, lse, *options, False)
        return tuple(grad.transpose(1, 2) for grad in grads[:3])

    return run


def torch_run(case: GpuAttentionCase, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Run:
    from torch.nn.attention.bias import causal_lower_right

    options: dict = {"enable_gqa": case.Hq != case.Hk}
    if case.window is not None:
        distance = torch.arange(case.Tk, device=q.device) - torch.arange(case.Tq, device=q.device)[:, None]
        distance -= case.Tk - case.Tq
        options["attn_mask"] = (distance <= 0) & (distance >= -case.window)
    elif case.causal and case.Tq == case.Tk:
        options["is_causal"] = True
    elif case.causal and case.Tq > 1:
        options["attn_mask"] = causal_lower_right(case.Tq, case.Tk)
    return _differentiated(case, lambda: F.scaled_dot_product_attention(q, k, v, **options), q, k, v, dout)


def torch_without_cudnn_run(case: GpuAttentionCase, *tensors: Tensor) -> Run:
    run = torch_run(case, *tensors)

    def without() -> tuple[Tensor, ...]:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            return run()

    return without


def flex_run(case: GpuAttentionCase, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_mask, offset = None, case.Tk - case.Tq
    if case.causal:
        left = case.Tk if case.window is None else case.window

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (j <= i + offset) & (j >= i + offset - left)

        block_mask = create_block_mask(sees, None, None, case.Tq, case.Tk, device=str(q.device))
    attend, gqa = torch.compile(flex_attention), case.Hq != case.Hk
    return _differentiated(
        case, lambda: attend(q, k, v, block_mask=block_mask, enable_gqa=gqa), q, k, v, dout
    )


def _differentiated(case: GpuAttentionCase, forward: Callable[[], Tensor], *leaves_and_dout: Tensor) -> Run:
    *leaves, dout = leaves_and_dout
    if case.mode == "forward":
        return lambda: (forward(),)
    return lambda: torch.autograd.grad(forward(), leaves, dout)


CONTESTANTS: dict[str, Callable[..., Run]] = {
    "seqkernels": seqkernels_run,
    "torch": torch_run,
    "torch without cuDNN": torch_without_cudnn_run,
    "FlexAttention": flex_run,
}


def ready(case: GpuAttentionCase, device: str = "cuda") -> tuple[dict[str, Run], dict[str, str]]:
    """The contestants whose results are right, and what is wrong with the others."""
    given = tensors(case, device)
    truth = _truth(case, *given)
    runs, wrong = {}, {}
    allowed = errors(_checked(case, torch_run(case, *given)()), truth)
    for name, make in CONTESTANTS.items():
        try:
            run = make(case, *given)
            worst = compare(_checked(case, run()), allowed, truth, peer=name != "seqkernels")
        except Exception as error:  # one that cannot run a case must not end the whole run
            wrong[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if worst.ok:
            runs[name] = run
        else:
            wrong[name] = f"error of {worst.output} {worst.error:.2g}, allowed {worst.allowed:.2g}"
    return runs, wrong


def _checked(case: GpuAttentionCase, result: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
    """The first head of the first row: float64 scores of all would fill any GPU."""
    names = ("out",) if case.mode == "forward" else ("grad q", "grad k", "grad v")
    found = {name: t[:1, :1].detach() for name, t in zip(names, result, strict=True)}
    shared = case.Hq != case.Hk  # gradients of k and v come from other heads too
    return {name: t for name, t in found.items() if not (shared and name in ("grad k", "grad v"))}


def _truth(case: GpuAttentionCase, *tensors: Tensor) -> Mapping[str, Tensor]:
    q, k, v, dout = (t[:1, :1].detach().double().requires_grad_(t.requires_grad) for t in tensors)
    left, right = NO_LIMIT if case.window is None else case.window, 0 if case.causal else NO_LIMIT
    with torch.set_grad_enabled(case.mode == "train"):
        options = {"scale": case.D**-0.5, "left": left, "right": right, "bottom_right": True}
        out, _ = reference.attention(q, k, v, **options)
        return _checked(case, (out,) if case.mode == "forward" else torch.autograd.grad(out, (q, k, v), dout))


def measure(case: GpuAttentionCase, budget: float) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds per call of each contestant, interleaved, and why others have none."""
    with torch.set_grad_enabled(case.mode == "train"):
        runs, wrong = ready(case)
        return timing.interleave(runs, budget, gpu.device_seconds) if runs else {}, wrong
