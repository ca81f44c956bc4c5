"""The recurrent kernels of each device in turn, for tests that make their tensors on the CPU.

On a GPU the ops carry their tensors there and the results back, and the tests stay what they are: the same
numbers, held to the same truth. What becomes of CUDA tensors on their way to the ops is what
test_torch_samples.py and test_cuda_device.py are for.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from seqkernels import stack, support, triton
from seqkernels.ops import gru, lstm, rnn

NEEDS_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        not support.has_cuda_kernels(), reason="this build has no CUDA kernels: no nvcc >= 12.8"
    ),
)
NEEDS_TRITON = [*NEEDS_GPU[:2], pytest.mark.skipif(not triton.INSTALLED, reason="Triton is not installed")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]
everywhere = pytest.mark.usefixtures("kernels")


@contextmanager
def other_ops(make: Callable[[torch._ops.OpOverload], Callable]) -> Iterator[None]:
    """Our layers and cells call `make(op)` where they called op."""
    with ExitStack() as patches:
        for module in (lstm, gru, rnn):
            for name in ("layer_fwd", "_layer_bwd", "_cell_fwd"):
                patches.enter_context(mock.patch.object(module, name, make(getattr(module, name))))
        for cell in (stack.LSTM, stack.GRU, *stack.RNN.values()):  # frozen
            patches.enter_context(mock.patch.dict(vars(cell), native=make(cell.native)))
        yield


def on_device(device: str, op: torch._ops.OpOverload) -> Callable:
    """The op with CPU tensors, computed on another device."""
    stays = {"batch_sizes"}  # which every device takes on the CPU
    names = [argument.name for argument in op._schema.arguments]

    def call(*args: object) -> object:
        named = zip(names, args, strict=False)
        moved = [a if n in stays else _to(device, a) for n, a in named]
        return _to("cpu", op(*moved))

    return call


def _to(device: str, values: object) -> object:
    return pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, values)
