"""From tensors to kernels: the functions of the op schema, what is compiled in, tiles and grids.

q [B,Hq,Tq,D], k [B,Hk,Tk,D], v [B,Hk,Tk,Dv] with any strides but the last, which is 1. With cu_q and cu_k
[S+1] (on the device, never read by the host) B is 1 and T counts the rows of all sequences. dout is
[B,Tq,Hq,Dv], as out is.
"""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import DTYPES, backward, decode, forward, max_dim, weights
from .common import BOOL, FLOAT, LOG2E, Features, powers_of_two
from .tables import DKDV, DQ, FORWARD, TILES, Tile, tile_for

WIDEST = {2: 128, 4: 32}  # exact float32 products hold whole rows of both factors in registers
INTERPRETED = triton.knobs.runtime.interpret  # asked once, as @triton.jit does
OF_ROWS = Tile(32, 0, 4, 1)  # kernels that make statistics of queries
WIDEST_WINDOW = 2**29  # a window no sequence reaches; sums of two stay within int32


class Problem(NamedTuple):
    features: Features
    arguments: tuple[Any, ...]  # those every kernel begins with
    batches: int  # sequences
    heads: int
    group: int
    max_q: int
    max_k: int
    sinks: Tensor | None
    window: int  # left + right
    dtype: torch.dtype
    device: torch.device

    def tile(self, kernel: str) -> Tile:
        f = self.features
        dims = padded(f.D, f.WIDEST), padded(f.DV, f.WIDEST)
        extras = (f.MASK != 0) + f.DROPOUT + f.SOFTCAP + f.ALIBI
        bits, exact = self.dtype.itemsize * 8, f.PRECISION == "ieee"
        return tile_for(kernel, architecture(self.device), bits, dims, extras, exact)

    def longest_walk(self, tile: Tile) -> int:
        """The most keys a tile of queries may see."""
        return min(self.max_k, self.window + 1 + min(tile.BM, self.max_q))


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    len_k: Tensor | None,
    alibi: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    bottom_right: bool,
    dropout: float,
    rng: Tensor | None,
    max_q: int,
    max_k: int,
) -> tuple[Tensor, Tensor]:
    """-> out [B,Tq,Hq,Dv], LSE [B,Hq,Tq] float32, natural, sinks included."""
    problem = prepare(
        q, k, v, mask, cu_q, cu_k, len_k, alibi, sinks, scale, softcap, left, right, bottom_right, dropout,
        rng, max_q, max_k,
    )  # fmt: skip
    return run_forward(problem, q, v.size(3))


def paged_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    len_k: Tensor,
    alibi: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    bottom_right: bool,
) -> tuple[Tensor, Tensor]:
    """As attention_fwd, with keys in pages k [pages,Hk,rows,D], v [pages,Hk,rows,Dv], and no gradients.

    Row j of sequence b lies in page block_table[b, j / rows], int32 or int64 [B, pages of the longest].
    """
    integers = block_table.dtype in (torch.int32, torch.int64) and block_table.device == q.device
    if not integers or block_table.dim() != 2 or block_table.size(0) != q.size(0):
        raise RuntimeError(
            f"attention on GPUs: expected block_table as int32 or int64 [{q.size(0)}, pages] on {q.device}, "
            f"got {block_table.dtype} {list(block_table.shape)} on {block_table.device}"
        )
    problem = prepare(
        q, k, v, None, None, None, len_k, alibi, sinks, scale, softcap, left, right, bottom_right, 0.0, None,
        0, block_table.size(1) * k.size(2), page=k.size(2),
    )  # fmt: skip
    return run_forward(problem, q, v.size(3), block_table.contiguous())


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    len_k: Tensor | None,
    alibi: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    bottom_right: bool,
    dropout: float,
    rng: Tensor | None,
    max_q: int,
    max_k: int,
    need_dmask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> dq [B,Tq,Hq,D], dk [B,Tk,Hk,D], dv [B,Tk,Hk,Dv], dmask float32 in the mask's shape, dsinks [Hq]."""
    dout = dout if dout.stride(-1) == 1 and dout.stride(1) < 2**24 else dout.contiguous()
    out, lse = out.contiguous(), lse.contiguous()
    problem = prepare(
        q, k, v, mask, cu_q, cu_k, len_k, alibi, sinks, scale, softcap, left, right, bottom_right, dropout,
        rng, max_q, max_k, dout,
    )  # fmt: skip
    f, heads, group = problem.features, problem.heads, problem.group
    B, Tq, Tk, D, DV = q.size(0), q.size(2), k.size(2), q.size(3), v.size(3)
    key_heads = heads // group
    new = q.new_zeros if f.VARLEN else q.new_empty  # rows behind the last sequence belong to nobody
    dq, dk, dv = new(B, Tq, heads, D), new(B, Tk, key_heads, D), new(B, Tk, key_heads, DV)
    dmask = q.new_empty(mask.shape if need_dmask and mask is not None else 0, dtype=torch.float32)
    strides = [dout.stride(n) // f.ALIGN for n in (0, 2, 1)]
    PAD = backward.PAD.value
    Tp = cdiv(Tq + (problem.batches * PAD if f.VARLEN else 0), PAD) * PAD
    statistics = q.new_zeros(B, heads, Tp, backward.WIDTH.value, dtype=torch.float32)
    statistics[..., 0] = math.inf

    with torch.cuda.device_of(q):
        tile = OF_ROWS
        tiles = cdiv(problem.max_q, PAD) * (PAD // tile.BM)
        launch(
            backward.attention_statistics, problem.batches * heads * tiles, tile,
            out, dout, lse, dlse if dlse is None else dlse.contiguous(), cu_q, statistics,
            *strides, heads, Tq, Tp, tiles, F=f._replace(LEN_K=False), DLSE=dlse is not None,
        )  # fmt: skip
        gradient = (*problem.arguments, dout, statistics, *strides, scale, Tp)
        if f.MASK == FLOAT.value:
            tiles = cdiv(problem.max_q, tile.BM)
            programs = problem.batches * heads * tiles
            launch(
                backward.attention_far, programs, tile, *problem.arguments, lse, statistics, Tp, tiles, F=f
            )

        tile = problem.tile(DKDV)
        tiles = cdiv(problem.max_k, tile.BN)
        splits = group_splits(problem.batches * key_heads * tiles, group, multiprocessors(q.device))
        parts = dk, dv
        if splits > 1:
            parts = [q.new_zeros(splits, *x.shape, dtype=torch.float32) for x in parts]
        for want_dk, want_dv in ((True, False), (False, True)) if tile.apart else ((True, True),):
            launch(
                backward.attention_dkdv, problem.batches * key_heads * tiles * splits, tile,
                *gradient, *parts, tiles, splits, B * Tk * key_heads, F=f, WANT_DK=want_dk, WANT_DV=want_dv,
            )  # fmt: skip
        if splits > 1:
            for total, part in zip((dk, dv), parts, strict=True):
                total.copy_(part.sum(0))

        tile = problem.tile(DQ)
        tiles = cdiv(problem.max_q, tile.BM)
        launch(backward.attention_dq, problem.batches * heads * tiles, tile, *gradient, dq, tiles, F=f)

        if dmask.numel():
            tile = problem.tile(TILES)
            mask_b, mask_h, rows, cols = mask.shape
            sum_q, sum_k = rows == 1 != Tq, cols == 1 != Tk  # over no rows too
            own = (1 if sum_q else cdiv(Tq, tile.BM)) * (1 if sum_k else cdiv(Tk, tile.BN))
            launch(
                backward.attention_dmask, mask_b * mask_h * own, tile,
                *gradient, dmask, mask_h, B // mask_b, heads // mask_h, rows, cols,
                F=f, SUM_Q=sum_q, SUM_K=sum_k,
            )  # fmt: skip

    dsinks = q.new_empty(0, dtype=torch.float32)
    if sinks is not None:  # a key without value: dP = 0, so dS = -P delta
        p = torch.exp2(sinks[:, None] * LOG2E.value - statistics[..., 0] - statistics[..., 2])
        dsinks = -(p * statistics[..., 1]).sum((0, 2))
    return dq, dk, dv, dmask, dsinks


def attention_weights(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    len_k: Tensor | None,
    alibi: Tensor | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    bottom_right: bool,
    dropout: float,
    rng: Tensor | None,
    mean: bool,
) -> Tensor:
    """-> P after dropout, in q's dtype: [B,Hq,Tq,Tk], or its mean over heads [B,Tq,Tk]."""
    problem = prepare(
        q, k, k, mask, None, None, len_k, alibi, None, scale, softcap, left, right, bottom_right, dropout,
        rng, 0, 0,
    )  # fmt: skip
    B, heads, Tq, Tk = *q.shape[:3], k.size(2)
    average = max(heads, 1) if mean else 1
    p = q.new_empty((B, Tq, Tk) if mean else (B, heads, Tq, Tk))
    tile = problem.tile(TILES)
    programs = B * (heads // average) * cdiv(Tq, tile.BM) * cdiv(Tk, tile.BN)
    with torch.cuda.device_of(q):
        launch(
            weights.attention_weights, programs, tile,
            *problem.arguments, lse.contiguous(), p, average, F=problem.features,
        )  # fmt: skip
    return p


def prepare(
    q, k, v, mask, cu_q, cu_k, len_k, alibi, sinks, scale, softcap, left, right, bottom_right, dropout, rng,
    max_q, max_k, *others: Tensor, page: int = 0,
) -> Problem:  # fmt: skip
    """Refuses what these kernels cannot do; sorts the rest into what is compiled in and what is passed."""
    batches = q.size(0) if cu_q is None else cu_q.numel() - 1
    check(q, k, v, mask, cu_q, cu_k, len_k, alibi, sinks, rng, *others, batches=batches, paged=page > 0)
    (_, heads, Tq, D), (_, key_heads, Tk, DV) = q.shape, v.shape
    group = max(heads // max(key_heads, 1), 1)
    q, k, v = rows_of(q), rows_of(k, page), rows_of(v, page)
    align = common_divisor(16 // q.itemsize, q, k, v, *others)

    kind, mask_strides, mask_align, mask_unit = 0, (0, 0, 0, 0), 1, False
    if mask is not None:
        kind = (BOOL if mask.dtype == torch.bool else FLOAT).value
        mask = mask.detach().expand(q.size(0), heads, Tq, Tk)
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        mask_align = common_divisor(16 // mask.itemsize, mask)
        mask_unit = mask.stride(3) == 1
        mask_strides = (*(s // mask_align for s in mask.stride()[:3]), mask.stride(3))
    cu_q, cu_k, len_k, rng = (x if x is None else x.contiguous() for x in (cu_q, cu_k, len_k, rng))
    alibi, sinks = (x if x is None else x.to(torch.float32).contiguous() for x in (alibi, sinks))
    if not 0 <= dropout <= 1:
        raise RuntimeError(f"attention on GPUs: expected a dropout between 0 and 1, got {dropout}")
    if dropout > 0 and rng is None:
        raise RuntimeError("attention on GPUs: expected rng, an int64 tensor (seed, offset), with dropout")

    f = Features(
        D=D,
        DV=DV,
        WIDEST=WIDEST[q.itemsize],
        LEFT=left < WIDEST_WINDOW,
        RIGHT=right < WIDEST_WINDOW,
        BOTTOM_RIGHT=bottom_right,
        VARLEN=cu_q is not None,
        LEN_K=len_k is not None,
        MASK=kind,
        MASK_UNIT=mask_unit,
        MASK_ALIGN=mask_align,
        ALIBI=alibi is not None,
        SOFTCAP=softcap > 0,
        SINKS=sinks is not None,
        DROPOUT=dropout > 0,
        PAGE=page,
        FOLD=scale >= 0 and mask is None and alibi is None and softcap == 0,
        ALIGN=align,
        PRECISION=float32_precision() if q.dtype == torch.float32 else "ieee",
        UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
    )
    # For 0 a scale that leaves nothing of any product: 0 times the -inf of a hidden key would be NaN.
    to_log2 = 1 / softcap if softcap > 0 else LOG2E.value
    arguments = (
        q, k, v, mask, cu_q, cu_k, len_k, alibi, sinks, rng,
        *[s // align for x in (q, k, v) for s in x.stride()[:3]], *mask_strides,
        heads if alibi is not None and alibi.numel() > heads else 0,
        heads, group, Tq, max_k if page else Tk,
        max(min(left, WIDEST_WINDOW), -WIDEST_WINDOW), max(min(right, WIDEST_WINDOW), -WIDEST_WINDOW),
        float(scale * to_log2) or 1e-30, float(softcap * LOG2E.value),
        min(round(dropout * 2**32), 2**32 - 1), 0.0 if dropout >= 1 else 1 / (1 - dropout),
    )  # fmt: skip
    max_q = Tq if cu_q is None else max_q or Tq
    return Problem(
        f, arguments, batches, heads, group, max_q, max_k or Tk, sinks, left + right, q.dtype, q.device
    )


def check(
    q: Tensor, k: Tensor, v: Tensor, mask, cu_q, cu_k, len_k, alibi, sinks, *others, batches: int, paged: bool
):
    """Kernels read what pointers and strides say, so nothing that does not fit may reach them."""
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise RuntimeError(
            f"attention on GPUs: expected q, k and v of one dtype, float16, bfloat16 or float32, got "
            f"{q.dtype}, {k.dtype} and {v.dtype}"
        )
    (B, heads, _, D), (_, key_heads, _, DV) = q.shape, v.shape
    dims, limit = (D, DV), max_dim(q.dtype)
    if not (0 < D <= limit and 0 < DV <= limit):
        raise RuntimeError(
            f"attention on GPUs: expected head dims from 1 to {limit} in {q.dtype}, got {dims}"
        )
    small, device = (cu_q, cu_k, len_k, alibi, sinks), q.device
    for x in (k, v, mask, *small, *others):
        if x is not None and x.device != device:
            raise RuntimeError(f"attention on GPUs: expected all tensors on {device}, where q is")
    fits = k.shape == (*v.shape[:3], D) and (paged or k.size(0) == B)
    fits = fits and (cu_q is None) == (cu_k is None) and (cu_q is None or B == 1)
    if not fits or (heads % key_heads if key_heads else heads):
        raise RuntimeError(
            "attention on GPUs: expected q [B,Hq,Tq,D], k [B,Hk,Tk,D] and v [B,Hk,Tk,Dv], Hq a multiple of "
            f"Hk, got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}"
        )
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, q.dtype):
        raise RuntimeError(
            f"attention on GPUs: expected a mask of bool, float32 or {q.dtype}, got {mask.dtype}"
        )
    sizes = batches + 1, batches + 1, batches, heads, heads
    for name, size, x in zip(("cu_q", "cu_k", "len_k", "alibi", "sinks"), sizes, small, strict=True):
        if (
            x is not None
            and x.shape != (size,)
            and (name != "alibi" or x.shape not in {(1, heads), (batches, heads)})
        ):
            raise RuntimeError(f"attention on GPUs: expected {name} [{size}], got {list(x.shape)}")


def rows_of(x: Tensor, page: int = 0) -> Tensor:
    """Rows with their features side by side, near enough for the kernels to count those of a tile, at most
    128, or of a page in 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(2) < 2**31 // max(128, page) else x.contiguous()


def run_forward(
    problem: Problem, q: Tensor, DV: int, block_table: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    B, heads, Tq = q.shape[:3]
    tile, rows, tiled_heads = problem.tile(FORWARD), problem.max_q, heads
    pack = decode.is_packed(problem.max_q, problem.group)
    if pack:
        rows, tiled_heads = rows * problem.group, heads // problem.group
        tile = decode.packed_tile(tile, rows)
    tiles = cdiv(rows, tile.BM)
    programs = problem.batches * tiled_heads * tiles
    splits = decode.key_splits(programs, problem.longest_walk(tile), multiprocessors(q.device))
    f = problem.features._replace(PACK=pack, SPLIT=splits > 1)

    new = q.new_zeros if f.VARLEN else q.new_empty
    out = new(B, Tq, heads, DV)
    lse = new(B, heads, Tq, dtype=torch.float32)
    parts = out, lse
    if splits > 1:
        parts = [new(n, *x.shape, dtype=torch.float32) for n, x in ((splits, out), (2 * splits, lse))]
    part = B * Tq * heads
    with torch.cuda.device_of(q):
        launch(
            forward.attention_forward, programs * splits, tile,
            *problem.arguments, *parts, block_table, 0 if block_table is None else block_table.stride(0),
            tiles, splits, part, F=f,
        )  # fmt: skip
        if splits > 1 and part:
            width = 1 << (DV - 1).bit_length()
            launch(
                decode.combine, part, Tile(0, 0, 1 if width <= 128 else 4, 3),
                *parts, problem.sinks, out, lse, heads, Tq, splits, part,
                SINKS=f.SINKS, DV=DV, WIDTH=width, CHUNK=16,
            )  # fmt: skip
    return out, lse


def launch(kernel, programs: int, tile: Tile, *arguments, **constants) -> None:
    """Runs a kernel on the device of its first argument, a tensor, which is the current device.

    Triton takes 50 us to find which of its compiled kernels fits arguments like ours. Those of one kernel
    differ in constants and in pointers: which there are, to what, and whether 16 bytes divide them.
    """
    if not programs:
        return
    if tile.BM:
        constants["BM"] = tile.BM
    if tile.BN:
        constants["BN"] = tile.BN
    pointers, compiled = known(kernel)
    device = arguments[0].get_device()
    key, values = [device, tile.warps, tile.stages, *constants.values()], list(arguments)
    for n in pointers:
        if (x := arguments[n]) is not None:
            values[n] = address = x.data_ptr()
            key += n, x.dtype, address % 16 == 0
    found = compiled.get(key := tuple(key))
    if found is None or launches_are_watched():  # under the interpreter nothing is ever found
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        compiled[key] = kernel[(programs,)](*arguments, **constants, **options)
    else:
        stream = triton.runtime.driver.active.get_current_stream(device)
        which = found.function, found.packed_metadata, None, None, None
        found.run(programs, 1, 1, stream, *which, *values, *constants.values())


@functools.cache
def known(kernel) -> tuple[list[int], dict]:
    """Places of a kernel's pointers, which alone are specialised; what has been compiled, by key."""
    parameters = getattr(kernel, "params", ())  # the interpreter's have none
    return [p.num for p in parameters if not (p.is_constexpr or p.do_not_specialize)], {}


def group_splits(programs: int, group: int, multiprocessors: int) -> int:
    """The smallest divisor of the group that gives every multiprocessor a program."""
    enough = (n for n in range(1, group + 1) if group % n == 0 and programs * n >= multiprocessors)
    return next(enough, group)


def common_divisor(largest: int, *tensors: Tensor) -> int:
    """The largest power of two up to `largest` that divides all strides but the last: loads are that wide."""
    strides = [s for x in tensors for s in x.stride()[:-1]]
    if math.gcd(largest, *strides) < largest:  # maybe for a dimension of one row, where none is used
        strides = [s for x in tensors for s, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1]
    return math.gcd(largest, *strides)


def launches_are_watched() -> bool:
    """By a profiler, who is to be told more than we know."""
    before, after = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def cdiv(a: int, b: int) -> int:
    """triton.cdiv, which takes 3 us outside a kernel."""
    return -(-a // b)


@functools.cache
def padded(dim: int, widest: int) -> int:
    return sum(powers_of_two(dim, widest))


def float32_precision() -> str:
    """Exact where torch's own products on GPUs are; else three products in TF32, or one if it says medium."""
    if torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "ieee"
    try:
        medium = torch.get_float32_matmul_precision() == "medium"
    except RuntimeError:  # who has set fp32_precision gets no answer to the older question
        medium = False
    return "tf32" if medium else "tf32x3"


@functools.lru_cache
def architecture(device: torch.device) -> int:
    if device.type == "cpu":
        return 80
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
