"""Which instruction sets this machine has."""

import torch

import seqkernels  # noqa: F401


def instruction_sets() -> list[str]:
    active, found = torch.ops.seqkernels.get_isa(), []
    for name in ("baseline", "neon", "avx2", "avx512", "avx512_bf16", "amx"):
        try:
            torch.ops.seqkernels.set_isa(name)
        except (RuntimeError, ValueError):
            continue
        found.append(name)
    torch.ops.seqkernels.set_isa(active)
    return found


INSTRUCTION_SETS = instruction_sets()
