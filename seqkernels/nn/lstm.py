"""LSTM and LSTMCell: torch.nn's own constructors, parameters and errors, on the kernels of seqkernels."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence

from seqkernels import stack
from seqkernels.nn._base import Recurrent, as_one_node, leave_to_torch, step, torchs_twin
from seqkernels.ops.lstm import lstm_cell


class LSTM(Recurrent):
    """torch.nn.LSTM, with the same constructor, parameters, state_dict and results.

    forward(input, hx=None, *, lengths=None, resets=None, return_cell_states=False)
        -> output, (h_n, c_n), and if return_cell_states every c_t of the last layer, laid out as output is
    lengths, resets and the attribute `recompute`: see `seqkernels.functional.lstm`; unbatched they have the
    shapes [] and [T]. `prepack_()` serves inference with frozen weights.
    Equal to `torch.nn.LSTM(...)(input, hx)`.
    """

    _torch = torch.nn.LSTM
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args
    permute_hidden = torch.nn.LSTM.permute_hidden

    def __init__(self, *args, **kwargs) -> None:
        super().__init__("LSTM", *args, **kwargs)

    def _cell(self) -> stack.Cell:
        return stack.LSTM

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_cell_states: bool = False,
    ) -> tuple[Any, ...]:
        """output, (h_n, c_n), and the last layer's c_t if return_cell_states; arguments: see the class."""
        extras = lengths is not None or resets is not None or return_cell_states
        if not extras and (short := self._short_cut(input, hx)):
            return short[0], short[1:]
        if isinstance(input, Proxy):
            return as_one_node(
                self, input, hx, lengths=lengths, resets=resets, return_cell_states=return_cell_states
            )
        if reason := self._why_torch(input, hx, extras):
            return leave_to_torch(self, input, hx, reason, extras)
        (output, *cells), states = self._run(input, hx, lengths, resets, return_cell_states)
        return output, tuple(states), *cells


class LSTMCell(torch.nn.LSTMCell):
    """torch.nn.LSTMCell, with the same constructor, parameters, state_dict, errors and results.

    dtypes: float32, float64, bfloat16, float16. Equal to `torch.nn.LSTMCell(...)(input, hx)`.
    """

    _torch = torch.nn.LSTMCell

    __prepare_scriptable__ = torchs_twin

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The next h and c, [B,H] or [H] as input is."""
        return step(self, lstm_cell, input, hx, hx)
