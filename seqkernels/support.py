"""Where no kernel runs, torch does, and the user hears why: a warning, or an error if SEQKERNELS_STRICT=1."""

import os
import sys
import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad

from seqkernels import triton
from seqkernels.triton import choice

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

GRADIENTS_IN_A_GRAPH = "in torch.compile the gradients that torch.func takes of our kernels have no gradients"

_told: set[str] = set()


def has_cuda_kernels() -> bool:
    """This build has the recurrent kernels for CUDA tensors; says nothing about devices."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("seqkernels::lstm_layer_fwd", "CUDA")


# Switches of torch that it has no public names for.


def in_functorch() -> bool:
    return torch._C._are_functorch_transforms_active()


def is_dispatched() -> bool:
    """Under a dispatch mode: FakeTensorMode, AOTAutograd, torch.export."""
    return torch._C._len_torch_dispatch_stack() > 0


def forbids_flash() -> bool:
    """By torch.nn.attention.sdpa_kernel."""
    return not torch._C._get_flash_sdp_enabled()


def is_compiling() -> bool:
    """torch.compile or torch.export looks on, and not in another thread: torch's flag is of the process."""
    return torch.compiler.is_compiling() and _is_traced()


def is_exporting() -> bool:
    return torch.compiler.is_exporting() and _is_traced()


def _is_traced() -> bool:
    """By Dynamo, for which is_dynamo_compiling() is true, or under a dispatch mode, as AOTAutograd and
    torch.export have one."""
    return torch.compiler.is_dynamo_compiling() or is_dispatched()


def autocasts(device: str) -> bool:
    """Autocast is on there; where there is none torch.is_autocast_enabled raises."""
    return _knows_autocast(device) and torch.is_autocast_enabled(device)


def _knows_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)  # which torch.compile of torch 2.11 cannot trace


def why_torch(x: Tensor) -> str | None:
    """None when the kernels run on inputs like `x`, else the reason, in words, why torch runs instead."""
    if x.device.type == "cuda":
        if reason := _why_not_cuda(x.device.index):
            return reason
    elif x.device.type != "cpu":
        return f"there are kernels for cpu and cuda tensors, not for {x.device.type}"
    if type(x).__module__.startswith("torch.distributed"):
        return "the kernels have no strategy for the shards of a DTensor"
    if x.dtype not in DTYPES:
        return f"there are no kernels for {x.dtype}"
    return _why_torch_alone()


def _why_torch_alone() -> str | None:
    """What looks on and knows torch's operators only."""
    if is_compiling():
        return "ONNX has no operators for our kernels" if _exports_to_onnx() else _why_not_transformed()
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace, and the ONNX export on top of it, know torch's operators only"
    return _why_not_transformed()


def _why_not_transformed() -> str | None:
    if forward_ad._current_level >= 0:
        return "the kernels have no forward-mode derivatives"
    if _inside("Vmap"):
        return "the kernels do not know torch.vmap"
    if torch.is_grad_enabled() and _inside("Functionalize"):
        return "torch.func.functionalize does not know the gradients of our kernels"
    if torch.compiler.is_compiling() and _inside("Grad"):  # Dynamo calls this function and does not trace it
        return GRADIENTS_IN_A_GRAPH
    return None


def on_gpu(x: Tensor) -> bool:
    """Whether the kernels for GPUs serve x. Tests answer for a GPU that is not there."""
    return x.is_cuda


def why_torch_attends(query: Tensor, *head_dims: int) -> str | None:
    """`why_torch` for attention, which has kernels for GPUs too; their head dims, if any, have a limit."""
    if on_gpu(query):
        return triton.why_not(query, *head_dims) or _why_torch_alone()
    return why_torch(query)


def why_torch_is_faster(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> str | None:
    """None when our attention kernels are the better ones, as always on a CPU; [B,H,T,D] each."""
    return choice.why_torch(q, k, v, mask) if on_gpu(q) else None


def _inside(transform: str) -> bool:
    """transform: a name in torch._C._functorch.TransformType."""
    if not in_functorch():
        return False
    kind = getattr(torch._C._functorch.TransformType, transform)
    return any(level.key() == kind for level in torch._C._functorch.get_interpreter_stack())


def is_transformed() -> bool:
    """torch.func or forward-mode AD looks on, neither of which knows all of torch's own layers."""
    return in_functorch() or forward_ad._current_level >= 0


def is_plain_call() -> bool:
    """Nothing but the arguments decides: neither autocast nor anything of `is_eager` looks on."""
    return is_eager() and not torch._C._is_any_autocast_enabled()


def is_eager() -> bool:
    """No compiler, tracer, vmap, torch.func.grad or forward-mode AD looks on."""
    return not (
        is_compiling()
        or in_functorch()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    )


def _why_not_cuda(index: int) -> str | None:
    if not has_cuda_kernels():
        return "this build has no CUDA kernels: there was no nvcc >= 12.8, or SEQKERNELS_CUDA was off"
    major, minor = torch.cuda.get_device_capability(index)
    return f"CUDA kernels need compute capability 8.0, this device has {major}.{minor}" if major < 8 else None


def _exports_to_onnx() -> bool:
    """Without importing torch.onnx, which torch itself does only when somebody asks for it."""
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def fall_back(reason: str) -> None:
    """Say, once per reason, that torch runs and why; raise RuntimeError if SEQKERNELS_STRICT=1."""
    if os.environ.get("SEQKERNELS_STRICT", "0") not in ("", "0"):
        raise RuntimeError(f"seqkernels: {reason}, and SEQKERNELS_STRICT=1 forbids falling back to torch")
    if reason not in _told:
        _told.add(reason)
        warnings.warn(f"seqkernels falls back to torch: {reason}", stacklevel=4)


# What torch.compiler.assume_constant_result sets, so that these speak while torch.compile traces.
# The decorator itself imports torch._dynamo, which takes as long as importing torch.
_knows_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]
_why_not_cuda._dynamo_marked_constant = True  # type: ignore[attr-defined]
_exports_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]
_why_not_transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]
fall_back._dynamo_marked_constant = True  # type: ignore[attr-defined]
