"""GRU and GRUCell: torch.nn's own constructors, parameters and errors, on the kernels of seqkernels."""

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from seqkernels import stack
from seqkernels.nn._base import Recurrent, as_one_node, leave_to_torch, step, torchs_twin
from seqkernels.ops.gru import gru_cell


class GRU(Recurrent):
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

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ):
        extras = lengths is not None or resets is not None
        states = None if hx is None else (hx,)
        if not extras and (short := self._short_cut(input, states)):
            return short
        if isinstance(input, Proxy):
            return as_one_node(self, input, hx, lengths=lengths, resets=resets)
        if reason := self._why_torch(input, states, extras):
            return leave_to_torch(self, input, hx, reason, extras)
        (output,), (h_n,) = self._run(input, states, lengths, resets)
        return output, h_n


class GRUCell(torch.nn.GRUCell):
    """torch.nn.GRUCell, with the same constructor, parameters, state_dict and results."""

    _torch = torch.nn.GRUCell

    __prepare_scriptable__ = torchs_twin

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return step(self, gru_cell, input, hx, None if hx is None else (hx,))
