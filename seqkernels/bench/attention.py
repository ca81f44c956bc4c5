"""Attention on the CPU: F.scaled_dot_product_attention and nn.MultiheadAttention against ours.

Of additive attention torch has no function: its contestant is what one writes in torch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seqkernels
from seqkernels.reference import attention as reference

MASKS = ("bool", "padding", "float")  # [B,1,Tq,Tk]; [B,1,1,Tk], three quarters full; [1,H,Tq,Tk]


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """One call. B rows, H query heads, G of them share a key head, Tq queries, Tk keys, D features a head."""

    cell: str = "sdpa"  # "mha": nn.MultiheadAttention on itself, E = H * D, projections included; "additive"
    B: int = 1
    H: int = 8
    G: int = 1
    Tq: int = 1024
    Tk: int = 1024
    D: int = 64
    causal: bool = False
    mask: str | None = None
    dropout: float = 0.0  # of "sdpa"
    mode: str = "forward"  # without gradients; or "train": forward, then gradients of all inputs and weights
    dtype: str = "float32"

    @property
    def title(self) -> str:
        return f"{self.cell.upper()} {self.mode} {self.dtype}"

    @property
    def name(self) -> str:
        length = f"T={self.Tq}" if self.Tq == self.Tk else f"Tq={self.Tq} Tk={self.Tk}"
        words = [self.title, f"B={self.B}", *([f"H={self.H}"] if self.H > 1 else []), length, f"D={self.D}"]
        words += [f"GQA={self.G}"] if self.G > 1 else []
        words += ["causal"] if self.causal else []
        words += [f"mask={self.mask}"] if self.mask else []
        words += [f"dropout={self.dropout}"] if self.dropout else []
        return " ".join(words)

    @property
    def tokens(self) -> int:
        return self.B * self.Tq

    @property
    def lengths(self) -> list[int]:
        """Keys of each row under the mask "padding": from half of them to all."""
        return [self.Tk - row * (self.Tk // 2) // max(1, self.B - 1) for row in range(self.B)]

    @property
    def flops(self) -> float:
        """Of the matrix products over visible pairs: two in forward, five in backward, which rebuilds one.

        Additive: for each feature an addition, a tanh counted as one and a multiply-add, and the product with
        the values; three times that with gradients.
        """
        pairs = sum(self.lengths) * self.Tq if self.mask == "padding" else self.B * self.Tq * self.Tk
        if self.causal:
            pairs = self.B * sum(min(i + 1, self.Tk) for i in range(self.Tq))
        if self.cell == "additive":
            return float(pairs * (4 * self.D + 2 * self.D) * (3 if self.mode == "train" else 1))
        attention = 4.0 * pairs * self.H * self.D * (3.5 if self.mode == "train" else 1)
        width = self.H * self.D
        projections = 8.0 * self.tokens * width**2 * (3 if self.mode == "train" else 1)
        return attention + (projections if self.cell == "mha" else 0)

    def tiny(self) -> AttentionCase:
        return replace(self, Tq=min(self.Tq, 2), Tk=2, B=min(self.B, 2))


@dataclass
class AttentionProblem:
    """A case as tensors; for "mha" x is the input of `module`, for "additive" w are the weights of tanh."""

    case: AttentionCase
    tensors: dict[str, Tensor]  # q, k, v, and w if additive, or x
    mask: Tensor | None
    module: nn.MultiheadAttention | None
    dy: Tensor

    def to(self, dtype: torch.dtype) -> AttentionProblem:
        tensors = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        mask = self.mask if self.mask is None or self.mask.dtype == torch.bool else self.mask.to(dtype)
        module = None if self.module is None else copy.deepcopy(self.module).to(dtype)
        return AttentionProblem(self.case, tensors, mask, module, self.dy.to(dtype))


def make_problem(case: AttentionCase) -> AttentionProblem:
    generator = torch.Generator().manual_seed(case.Tq + 31 * case.B + 997 * case.D)
    dtype = getattr(torch, case.dtype)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    mask = None
    if case.mask == "bool":
        mask = torch.rand(case.B, 1, case.Tq, case.Tk, generator=generator) < 0.8
    elif case.mask == "padding":
        mask = torch.arange(case.Tk) < torch.tensor(case.lengths)[:, None, None, None]
    elif case.mask == "float":
        mask = random(1, case.H, case.Tq, case.Tk)
    if case.cell == "mha":
        width = case.H * case.D
        module = nn.MultiheadAttention(width, case.H, batch_first=True)
        with torch.no_grad():
            for weight in module.parameters():
                weight.uniform_(-(width**-0.5), width**-0.5, generator=generator)
        x = random(case.B, case.Tq, width)
        return AttentionProblem(case, {"x": x}, mask, module.to(dtype), random(case.B, case.Tq, width))
    if case.cell == "additive":
        q, k, v = (random(case.B, T, case.D) for T in (case.Tq, case.Tk, case.Tk))
        return AttentionProblem(
            case, {"q": q, "k": k, "v": v, "w": random(case.D)}, mask, None, random(*q.shape)
        )
    q = random(case.B, case.H, case.Tq, case.D)
    k, v = (random(case.B, case.H // case.G, case.Tk, case.D) for _ in range(2))
    return AttentionProblem(case, {"q": q, "k": k, "v": v}, mask, None, random(*q.shape))


def runner(
    problem: AttentionProblem, ours: bool
) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[[tuple[Tensor, ...]], Mapping[str, Tensor]]]:
    """What is timed, and its result with names; of dropout, where everybody draws anew, that of seed 0."""
    case, mask = problem.case, problem.mask
    train = case.mode == "train"
    leaves = {name: t.detach().requires_grad_(train) for name, t in problem.tensors.items()}
    if case.cell == "additive":
        q, k, v, w = leaves.values()
        lengths = torch.tensor(case.lengths) if case.mask == "padding" else None

        def forward() -> Tensor:
            if ours:
                return seqkernels.additive_attention(q, k, v, w, key_lengths=lengths)
            scores = (q[:, :, None] + k[:, None]).tanh() @ w
            return (scores if mask is None else scores.masked_fill(~mask[:, 0], -torch.inf)).softmax(-1) @ v
    elif problem.module is None:
        attention = seqkernels.scaled_dot_product_attention if ours else F.scaled_dot_product_attention
        q, k, v = leaves.values()

        def forward() -> Tensor:
            return attention(q, k, v, mask, case.dropout, case.causal, enable_gqa=case.G > 1)
    else:
        holder = nn.Sequential(copy.deepcopy(problem.module)).train(train)
        if ours and not seqkernels.swap_(holder).swapped:
            raise RuntimeError("swap_ left the module as it was: torch would be compared with itself")
        module, x = holder[0], leaves["x"]
        leaves |= dict(module.named_parameters())

        def forward() -> Tensor:
            return module(x, x, x, need_weights=False)[0]

    def run(forward: Callable[[], Tensor] = forward) -> tuple[Tensor, ...]:
        out = forward()
        return (out, *torch.autograd.grad(out, list(leaves.values()), problem.dy)) if train else (out,)

    def outputs(result: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        if case.dropout:
            torch.manual_seed(0)
            result = run() if ours else run(partial(_dropped, case.dropout, q, k, v))
        return {n: t.detach() for n, t in zip(names, result, strict=False)}

    names = ["out", *(f"grad {name}" for name in leaves)]
    return run, outputs


def _dropped(dropout: float, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's arithmetic with the weights dropped that ours drops."""
    weights = (q @ k.mT * q.size(-1) ** -0.5).softmax(-1)
    return reference.dropped(weights, dropout, reference.random_state(q)) @ v


def cases() -> tuple[AttentionCase, ...]:
    chosen = []
    for dtype in ("float32", "bfloat16"):
        lengths = ((2, 512), (1, 2048))
        for mode, (B, T), causal in product(("forward", "train"), lengths, (False, True)):
            chosen.append(AttentionCase(B=B, Tq=T, Tk=T, causal=causal, mode=mode, dtype=dtype))
        for mode, D in product(("forward", "train"), (32, 80, 96, 128, 256)):
            chosen.append(AttentionCase(D=D, mode=mode, dtype=dtype))
        for B, H, T in ((4, 8, 256), (1, 4, 8192)):
            chosen.append(AttentionCase(B=B, H=H, Tq=T, Tk=T, causal=True, dtype=dtype))
        for mode, G in product(("forward", "train"), (4, 8)):
            chosen.append(AttentionCase(G=G, causal=True, mode=mode, dtype=dtype))
        for mode, mask in product(("forward", "train"), MASKS):
            chosen.append(AttentionCase(B=2, Tq=512, Tk=512, mask=mask, mode=mode, dtype=dtype))
        for T, B in ((128, 8), (512, 2)):
            chosen.append(AttentionCase(B=B, Tq=T, Tk=T, dropout=0.1, mode="train", dtype=dtype))
        for B, G, Tq in ((4, 1, 1), (4, 4, 1), (1, 4, 1), (4, 1, 8)):  # decoding
            chosen.append(AttentionCase(B=B, G=G, Tq=Tq, Tk=2048, dtype=dtype))
        for mode in ("forward", "train"):
            chosen.append(AttentionCase(cell="mha", B=4, Tq=512, Tk=512, mode=mode, dtype=dtype))
    return tuple(chosen)


def additive_cases() -> tuple[AttentionCase, ...]:
    """A long and a short sequence to sequence model, and one step of their decoders."""
    chosen = []
    for dtype, mode in product(("float32", "bfloat16"), ("forward", "train")):
        for B, Tq, Tk, D in ((8, 128, 256, 256), (1, 512, 512, 512), (32, 20, 50, 256), (32, 1, 256, 512)):
            shape = {"B": B, "Tq": Tq, "Tk": Tk, "D": D}
            chosen.append(AttentionCase(cell="additive", H=1, mode=mode, dtype=dtype, **shape))
        padded = AttentionCase(
            cell="additive", B=16, H=1, Tq=64, Tk=128, D=256, mask="padding", mode=mode, dtype=dtype
        )
        chosen.append(padded)
    return tuple(chosen)
