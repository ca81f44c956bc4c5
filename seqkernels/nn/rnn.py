"""RNN and RNNCell: torch.nn's own constructors, parameters and errors, on the kernels of seqkernels."""

import torch
from torch import Tensor

from seqkernels import stack
from seqkernels.nn._base import OfOneState, step, torchs_twin
from seqkernels.ops.rnn import rnn_cell

_CELLS = {"RNN_TANH": stack.RNN["tanh"], "RNN_RELU": stack.RNN["relu"]}


class RNN(OfOneState):
    """torch.nn.RNN, with the same constructor, parameters, state_dict and results.

    forward(input, hx=None, *, lengths=None, resets=None) -> output, h_n
    lengths and resets: see `seqkernels.functional.lstm`; unbatched they have the shapes [] and [T].
    `prepack_()` serves inference with frozen weights. `recompute` changes nothing: no gates are kept.
    Equal to `torch.nn.RNN(...)(input, hx)`.
    """

    _torch = torch.nn.RNN

    def __init__(self, *args, **kwargs) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if len(args) > 3:
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in stack.RNN:
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__("RNN_" + self.nonlinearity.upper(), *args, **kwargs)

    def _cell(self) -> stack.Cell:
        return _CELLS[self.mode]


class RNNCell(torch.nn.RNNCell):
    """torch.nn.RNNCell, with the same constructor, parameters, state_dict, errors and results.

    dtypes: float32, float64, bfloat16, float16. Equal to `torch.nn.RNNCell(...)(input, hx)`.
    """

    _torch = torch.nn.RNNCell

    __prepare_scriptable__ = torchs_twin

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """The next h, [B,H] or [H] as input is."""
        return step(self, rnn_cell, input, hx, None if hx is None else (hx,), self.nonlinearity)
