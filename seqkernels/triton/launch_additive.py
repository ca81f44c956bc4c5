"""Additive attention from tensors to kernels: the functions of the op schema.

q [B,Tq,D], k [B,Tk,D], v [B,Tk,Dv], w [D], of any strides but the last, which is 1; mask, which broadcasts to
[B,Tq,Tk]; len_k int64 [B], which the host never reads.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import DTYPES, additive, decode, launch
from .additive import Additive
from .common import BOOL, FLOAT
from .tables import ADDITIVE, ADDITIVE_VALUES, Tile


class Problem(NamedTuple):
    features: Additive
    arguments: tuple[Any, ...]  # those every kernel begins with
    tile: Tile
    B: int
    Tq: int
    Tk: int
    splits: int  # of the keys that a tile of queries walks

    def by_queries(self, kernel, *arguments, **constants) -> None:
        self._run(kernel, self.Tq, self.tile.BM, self.splits, arguments, constants | {"F": self.features})

    def by_keys(self, kernel, *arguments, **constants) -> None:
        by_keys = {"F": self.features._replace(BY_KEYS=True)}
        self._run(kernel, self.Tk, self.tile.BN, 1, arguments, constants | by_keys)

    def _run(self, kernel, rows: int, of_tile: int, splits: int, arguments: tuple, constants: dict) -> None:
        tiles = launch.cdiv(rows, of_tile)
        launch.launch(
            kernel, self.B * tiles * splits, self.tile,
            *self.arguments, tiles, splits, *arguments, **constants,
        )  # fmt: skip


def additive_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, mask: Tensor | None, len_k: Tensor | None, need_weights: bool
) -> tuple[Tensor, Tensor]:
    """-> out [B,Tq,Dv], weights [B,Tq,Tk] or of size 0"""
    problem = prepare(q, k, v, w, mask, len_k)
    rows = problem.splits, problem.B, problem.Tq
    parts = q.new_zeros(*rows, v.size(2), dtype=torch.float32)
    largest, norm = q.new_empty(2, *rows, dtype=torch.float32)
    shape = (*rows[1:], problem.Tk) if need_weights else (0,)
    scores = q.new_full(shape, -math.inf, dtype=torch.float32)
    with torch.cuda.device_of(q):
        problem.by_queries(additive.additive_forward, parts, largest, norm, scores, SCORES=need_weights)
    if problem.splits == 1:
        out, sees = parts[0], norm[0] != 0
    else:
        by, _, inverse = joined(largest, norm)
        out, sees = (parts * (by * norm * inverse)[..., None]).sum(0), inverse != 0
    if need_weights:
        scores = scores.softmax(-1).masked_fill_(~sees[..., None], 0)
    return out.to(q.dtype), scores.to(q.dtype)


def additive_attention_bwd(
    dout: Tensor,
    dweights: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    mask: Tensor | None,
    len_k: Tensor | None,
    need_dscores: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> dq, dk, dv, dw like q, k, v, w, dscores float32 [B,Tq,Tk] or of size 0"""
    dout = unit_rows(dout)
    problem = prepare(q, k, v, w, mask, len_k, dout, dweights)
    rows = problem.splits, problem.B, problem.Tq

    def zeros(*shape: int) -> Tensor:
        return q.new_zeros(shape, dtype=torch.float32)

    delta, largest, norm = (zeros(*rows) for _ in range(3))
    dq, dw = zeros(*rows, q.size(2)), zeros(*rows, q.size(2))
    dk, dv = zeros(*k.shape), zeros(*v.shape)
    dscores = zeros(*rows[1:], problem.Tk) if need_dscores else zeros(0)
    dweights = None if dweights is None else dweights.contiguous()
    given = dout, dweights, *(s // problem.features.ALIGN for s in dout.stride()[:2])
    flags = {"DWEIGHTS": dweights is not None}
    with torch.cuda.device_of(q):
        problem.by_queries(additive.additive_statistics, *given, delta, largest, norm, **flags)
        by, *statistics = joined(largest, norm)
        given = *given, (delta * by).sum(0) * statistics[1], *statistics
        problem.by_queries(additive.additive_dq, *given, dq, dw, dscores, **flags, DSCORES=need_dscores)
        problem.by_keys(additive.additive_dkdv, *given, dk, dv, **flags)
    return *(x.to(q.dtype) for x in (dq.sum(0), dk, dv, dw.sum((0, 1, 2)))), dscores


def joined(largest: Tensor, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of shares of the keys [splits,B,Tq] -> e^(their max - max), and max and 1 / sum of all [B,Tq], which
    are 0 where none is seen."""
    most = largest.amax(0)
    most = most.masked_fill(most == -math.inf, 0)
    by = (largest - most).exp()
    total = (norm * by).sum(0)
    return by, most, torch.where(total == 0, 0, 1 / total)


def prepare(q, k, v, w, mask, len_k, dout: Tensor | None = None, dweights: Tensor | None = None) -> Problem:
    """Refuses what these kernels cannot do; sorts the rest into what is compiled in and what is passed."""
    check(q, k, v, w, mask, len_k, dout, dweights)
    (B, Tq, D), Tk, Dv = q.shape, k.size(1), v.size(2)
    tile, BD = ADDITIVE[min(triton.next_power_of_2(max(Tq, 1)), max(ADDITIVE))]
    q, k, v, w = (*map(unit_rows, (q, k, v)), w.contiguous())
    strided = (q, k, v) if dout is None else (q, k, v, dout)
    align = math.gcd(launch.common_divisor(16 // q.itemsize, *strided), D, Dv)

    kind, mask_strides = 0, (0, 0, 0)
    if mask is not None:
        kind = (BOOL if mask.dtype == torch.bool else FLOAT).value
        mask = mask.detach().expand(B, Tq, Tk)
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        mask_strides = mask.stride()
    f = Additive(
        BD=BD,
        BV=ADDITIVE_VALUES,
        MASK=kind,
        LEN_K=len_k is not None,
        ALIGN=align,
        PRECISION=launch.float32_precision() if q.dtype == torch.float32 else "ieee",
        FAST=q.itemsize == 2 and not launch.INTERPRETED,
        UPCAST=q.dtype == torch.bfloat16 and launch.INTERPRETED,
    )
    arguments = (
        q, k, v, w, mask, None if len_k is None else len_k.contiguous(),
        *(s // align for x in (q, k, v) for s in x.stride()[:2]), *mask_strides,
        Tq, Tk, D // align, Dv // align,
    )  # fmt: skip
    programs = B * launch.cdiv(Tq, tile.BM)
    splits = decode.key_splits(programs, Tk, launch.multiprocessors(q.device), 256)
    return Problem(f, arguments, tile, B, Tq, Tk, splits)


def unit_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def check(q: Tensor, k: Tensor, v: Tensor, w: Tensor, mask, len_k, dout, dweights) -> None:
    """Kernels read what pointers and strides say, so nothing that does not fit may reach them."""
    given = {"k": k, "v": v, "w": w, "mask": mask, "len_k": len_k, "dout": dout, "dweights": dweights}
    given = {name: x for name, x in given.items() if x is not None}
    if any(x.device != q.device for x in given.values()):
        raise RuntimeError(f"additive attention on GPUs: expected all tensors on {q.device}, where q is")
    if q.dtype not in DTYPES or any(
        x.dtype != q.dtype for name, x in given.items() if name not in ("mask", "len_k")
    ):
        types = ", ".join(str(x.dtype) for x in (q, *given.values()))
        raise RuntimeError(
            f"additive attention on GPUs: expected one dtype, float16, bfloat16 or float32, got {types}"
        )
    if q.dim() != 3 or k.dim() != 3 or v.dim() != 3:
        raise RuntimeError("additive attention on GPUs: expected q, k and v of 3 dimensions")
    (B, Tq, D), Tk, Dv = q.shape, k.size(1), v.size(2)
    shapes = {"k": (B, Tk, D), "v": (B, Tk, Dv), "w": (D,), "len_k": (B,), "dout": (B, Tq, Dv)}
    shapes["dweights"] = (B, Tq, Tk)
    for name, shape in shapes.items():
        if name in given and given[name].shape != shape:
            got = list(given[name].shape)
            raise RuntimeError(f"additive attention on GPUs: expected {name} {list(shape)}, got {got}")
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise RuntimeError(
            f"additive attention on GPUs: expected a mask of bool, float32 or {q.dtype}, got {mask.dtype}"
        )
    if len_k is not None and len_k.dtype != torch.int64:
        raise RuntimeError(f"additive attention on GPUs: expected len_k as int64, got {len_k.dtype}")
