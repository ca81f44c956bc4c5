"""Attention on GPUs: Triton kernels behind torch.ops.seqkernels.attention_* and additive_attention_* for CUDA
tensors.

Importing this package imports neither Triton nor CUDA; the first call does.
"""

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

OPS = ("attention_fwd", "attention_bwd", "attention_weights", "paged_attention_fwd")
ADDITIVE_OPS = ("additive_attention_fwd", "additive_attention_bwd")
# What exported programs call is an overload.
EXPORTED = ("attention_fwd", "attention_weights", "additive_attention_fwd")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INSTALLED = find_spec("triton") is not None

_library: list[torch.library.Library] = []


def register() -> None:
    """The kernels become the CUDA implementation of the ops, whose schemas must exist. Once is enough."""
    if _library:
        return
    library = torch.library.Library("seqkernels", "IMPL")
    for module, names in (("launch", OPS), ("launch_additive", ADDITIVE_OPS)):
        for name in names:
            overloads = (name, f"{name}.exported") if name in EXPORTED else (name,)
            for overload in overloads:
                library.impl(overload, _at_first_call(module, name), "CUDA")
    _library.append(library)


def _at_first_call(module: str, name: str):
    def call(*args):
        try:
            functions = import_module(f"seqkernels.triton.{module}")
        except ModuleNotFoundError as error:
            raise ImportError(f"attention on GPUs needs Triton ({error}): pip install triton") from error
        return getattr(functions, name)(*args)

    return call


def max_dim(dtype: torch.dtype) -> int:
    """Rows of 512 float32 numbers leave no shared memory of 99 KB for a second tile."""
    return 256 if dtype == torch.float32 else 512


def why_not(q: Tensor, *head_dims: int) -> str | None:
    """None when the kernels know what lies on the device of q, in its dtype, else the reason in words."""
    if not INSTALLED:
        return "attention on GPUs needs Triton, which is not installed (pip install triton)"
    if q.dtype not in DTYPES:
        return f"there are no attention kernels for {q.dtype} on GPUs"
    if not all(0 < dim <= max_dim(q.dtype) for dim in head_dims):
        return f"the attention kernels for GPUs have head dims from 1 to {max_dim(q.dtype)}, not {head_dims}"
    return _why_not_device(q.device.index)


def _why_not_device(index: int | None) -> str | None:
    if torch.version.hip:
        return "the attention kernels for GPUs are for NVIDIA's"
    if not torch.cuda.is_available():  # tensors without data, for compilers
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"the attention kernels need compute capability 8.0, not {major}.{minor}"


_why_not_device._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in support.py
