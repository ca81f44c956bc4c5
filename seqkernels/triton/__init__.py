"""Attention on GPUs: Triton kernels behind torch.ops.seqkernels.attention_* for CUDA tensors.

Importing this package imports neither Triton nor CUDA; the first call does.
"""

import torch

OPS = ("attention_fwd", "attention_bwd", "attention_weights")

_registered: list[torch.library.Library] = []


def register() -> None:
    """The kernels become the CUDA implementation of the ops, whose schemas must exist. Once is enough."""
    if not _registered:
        library = torch.library.Library("seqkernels", "IMPL")
        for name in OPS:
            library.impl(name, _at_first_call(name), "CUDA")
        _registered.append(library)


def _at_first_call(name: str):
    def call(*args):
        try:
            from seqkernels.triton import launch
        except ModuleNotFoundError as error:
            raise ImportError(f"attention on GPUs needs Triton ({error}): pip install triton") from error
        return getattr(launch, name)(*args)

    return call
