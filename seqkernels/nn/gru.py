"""GRU and GRUCell: torch.nn's own constructors, parameters and errors, on the kernels of seqkernels."""

import torch
from torch import Tensor

from seqkernels import stack
from seqkernels.nn._base import OfOneState, step, torchs_twin
from seqkernels.ops.gru import gru_cell


class GRU(OfOneState):
    """torch.nn.GRU, with the same constructor, parameters, state_dict and results.

    forward(input, hx=None, *, lengths=None, resets=None) -> output, h_n
    lengths, resets and the attribute `recompute`: see `seqkernels.functional.lstm`; unbatched they have the
    shapes [] and [T]. `prepack_()` serves inference with frozen weights.
    Equal to `torch.nn.GRU(...)(input, hx)`.
    """

    _torch = torch.nn.GRU

    def __init__(self, *args, **kwargs) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__("GRU", *args, **kwargs)

    def _cell(self) -> stack.Cell:
        return stack.GRU


class GRUCell(torch.nn.GRUCell):
    """torch.nn.GRUCell, with the same constructor, parameters, state_dict, errors and results.

    dtypes: float32, float64, bfloat16, float16. Equal to `torch.nn.GRUCell(...)(input, hx)`.
    """

    _torch = torch.nn.GRUCell

    __prepare_scriptable__ = torchs_twin

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The next h, [B,H] or [H] as input is."""
        return step(self, gru_cell, input, hx, None if hx is None else (hx,))
