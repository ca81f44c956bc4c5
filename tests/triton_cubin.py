"""Compiles a kernel for a GPU that is not there; reads registers, spills and shared memory off the cubin.

`PYTHONPATH=. python tests/triton_cubin.py` prints the table of docs/attention-gpu.md.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seqkernels.triton import backward, forward, tables, weights
from seqkernels.triton.common import Features
from seqkernels.triton.launch import WIDEST
from seqkernels.triton.tables import DKDV, DQ, FORWARD, TILES, Tile

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
KERNELS = {
    FORWARD: (forward.attention_forward, {}),
    DKDV: (backward.attention_dkdv, {"WANT_DK": True, "WANT_DV": True}),
    DQ: (backward.attention_dq, {}),
    TILES: (backward.attention_dmask, {"SUM_Q": False, "SUM_K": False}),
    "weights": (weights.attention_weights, {}),
    "far": (backward.attention_far, {}),
}
# Out where there are parts
FLOAT32 = {"Out", "OutLse", "DLse", "Lse", "Statistics", "DMask", "Alibi", "Sinks"}
INT64 = {"CuQ", "CuK", "LenK", "Rng"}
LENGTHS = {"Tq", "Tk", "Tp", "D", "Dv"}
FLOATS = {"scale", "softcap", "factor", "dscale"}


@dataclass
class Resources:
    registers: int
    spilled: int  # bytes of stack
    spills_in_loops: int  # instructions
    shared: int
    tensor_memory: int  # columns
    wgmma: bool


def features(D: int, dtype: str, DV: int | None = None, **flags) -> Features:
    align = {"fp32": 4}.get(dtype, 8)
    return Features(
        D=D,
        DV=DV or D,
        **(
            {
                "ALIGN": align,
                "WIDEST": WIDEST[4 if dtype == "fp32" else 2],
                "FOLD": not flags.keys() & {"MASK", "ALIBI", "SOFTCAP"},
            }
            | flags
        ),
    )


POSITIONS = dict.fromkeys(("LEFT", "RIGHT", "BOTTOM_RIGHT", "LEN_K"), True)
MASK = {"MASK": 2, "MASK_UNIT": True, "MASK_ALIGN": 8} | POSITIONS
TIERS: dict[str, dict[str, dict]] = {
    "plain": {
        "window": POSITIONS,
        "all": {},
        "causal": {"RIGHT": True},
        "ragged": {"VARLEN": True, "RIGHT": True},
        "band": {"LEFT": True, "RIGHT": True, "BOTTOM_RIGHT": True},
    },
    "one": {
        "mask": MASK,
        "dropout": POSITIONS | {"DROPOUT": True},
        "softcap": POSITIONS | {"SOFTCAP": True},
        "alibi": POSITIONS | {"ALIBI": True},
        "bool": {"MASK": 1, "MASK_UNIT": True, "MASK_ALIGN": 8, "RIGHT": True},
    },
    "rich": {
        "everything": MASK | dict.fromkeys(("DROPOUT", "SOFTCAP", "ALIBI"), True),
        "mask_dropout": MASK | {"DROPOUT": True},
        "softcap_alibi": POSITIONS | {"SOFTCAP": True, "ALIBI": True},
    },
}


def compile_for(name: str, f: Features, dtype: str, tile: Tile, arch: int) -> Resources:
    kernel, constants = KERNELS[name]
    constants = {"F": f, "BM": tile.BM, "BN": tile.BN} | constants
    if name == DKDV and tile.apart:
        constants["WANT_DV"] = False  # dK needs all that dV needs and more
    signature, fixed, aligned = {}, {}, {}
    for at, p in enumerate(kernel.params):
        absent = absent_pointers(f)
        if p.is_constexpr or p.name in absent:
            signature[p.name] = "constexpr"
            fixed[(at,)] = constants.get(p.name)
        elif p.name[0].isupper() and p.name not in LENGTHS:
            signature[p.name] = "*" + pointer_type(p.name, f, dtype)
            aligned[(at,)] = [["tt.divisibility", 16]]
        else:
            signature[p.name] = "fp32" if p.name in FLOATS else p.annotation_type or "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return resources_of(triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options))


def resources_of(built: triton.compiler.CompiledKernel) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        text = subprocess.check_output([CUOBJDUMP, "--dump-resource-usage", file.name], text=True)
        registers, stack = (int(re.search(rf"{word}:(\d+)", text)[1]) for word in ("REG", "STACK"))
        in_loops = spills_in_loops(file.name) if stack else 0
    shared, tensor_memory = built.metadata.shared, built.metadata.tmem_size or 0
    return Resources(registers, stack, in_loops, shared, tensor_memory, "wgmma" in built.asm["ptx"])


def spills_in_loops(cubin: str) -> int:
    """Loads and stores of local memory in innermost loops, which run per block of keys or queries.

    ptxas also spills addresses from the start of a kernel to its end, a few bytes, which costs nothing.
    """
    sass = subprocess.check_output([CUOBJDUMP, "-sass", cubin], text=True)
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/ +(\S.*?);", sass)]
    branches = ((at, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for at, text in code)
    loops = [(int(to[1], 16), at) for at, to in branches if to]
    loops = [loop for loop in loops if loop[1] - loop[0] > 1024]  # 64 instructions: shorter ones only wait
    inner = [(a, b) for a, b in loops if not any(a <= c and d <= b for c, d in loops if (c, d) != (a, b))]
    local = [at for at, text in code if re.search(r"\b(LDL|STL)\b", text)]
    return sum(any(first <= at <= last for first, last in inner) for at in local)


def absent_pointers(f: Features) -> set[str]:
    present = {
        "Mask": f.MASK, "CuQ": f.VARLEN, "CuK": f.VARLEN, "LenK": f.LEN_K, "Alibi": f.ALIBI, "Sinks": f.SINKS,
        "Rng": f.DROPOUT, "Table": f.PAGE,
    }  # fmt: skip
    return {name for name, flag in present.items() if not flag}


def pointer_type(name: str, f: Features, dtype: str) -> str:
    if name == "Mask" and f.MASK == 1:
        return "u8"
    if name == "Out" and not f.SPLIT:
        return dtype
    if name == "Table":
        return "i32"
    return "i64" if name in INT64 else "fp32" if name in FLOAT32 else dtype


def resource_table() -> Iterator[str]:
    """Registers / KB of shared memory of the plain, one and rich tiles, with the first flags of each tier."""
    yield "| kernel | head dim | sm_80 | sm_90 | sm_100 | float32, sm_80 |"
    yield "|---|---|---|---|---|---|"
    for kernel in (FORWARD, DKDV, DQ, TILES):
        columns = [(arch, "bf16", tables.HALF[kernel, arch]) for arch in (80, 90, 100)]
        columns.append((80, "fp32", tables.FLOAT32[kernel]))
        for dim, total in sorted({(row.dim, row.total or 1024) for _, _, rows in columns for row in rows}):
            narrow = {"DV": total - dim} if total < 1024 else {}
            cells = [kernel, f"{dim}, {total - dim}" if narrow else str(dim)]
            for arch, dtype, rows in columns:
                row = next((row for row in rows if (row.dim, row.total or 1024) == (dim, total)), None)
                found = [
                    compile_for(
                        kernel, features(dim, dtype, **flags, **narrow), dtype, getattr(row, tier), arch
                    )
                    for tier, (flags, *_) in ((tier, [*sets.values()]) for tier, sets in TIERS.items() if row)
                ]
                cells.append(", ".join(f"{x.registers} / {x.shared / 1024:.0f}" for x in found) or "–")
            yield f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for line in resource_table():
        print(line, flush=True)
