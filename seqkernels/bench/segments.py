"""Resets for torch.nn, which has none: every row is cut where it is reset, and the segments are packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


class Segments:
    """The rows of bool [T,B] between their resets, longest first. All indices are made here, once."""

    def __init__(self, resets: Tensor) -> None:
        T, B = resets.shape
        starts = resets.clone()
        starts[0] = True
        row, first = starts.T.nonzero().unbind(1)  # row by row, in the order of time
        last_of_row = torch.cat([row[1:] != row[:-1], row.new_ones(1, dtype=torch.bool)])
        end = torch.where(last_of_row, T, first.roll(-1))
        lengths, order = (end - first).sort(descending=True, stable=True)
        row, first = row[order], first[order]
        steps = torch.arange(int(lengths[0]), device=resets.device)[:, None]
        runs = steps < lengths
        self.T, self.B, self.row = T, B, row
        self.token = ((first + steps) * B + row)[runs]  # of each packed token: its place in [T*B]
        self.place = self.token.argsort()
        self.batch_sizes = runs.sum(1).cpu()
        self.final = order.argsort()[last_of_row]  # the last segment of each row

    def call(self, module: torch.nn.Module) -> Callable[[Tensor, object], tuple[Tensor, object]]:
        """The module, with x [T,B,I] and states of the rows -> y [T,B,H] and final states of the rows."""

        def run(x: Tensor, hx: Tensor | Sequence[Tensor]) -> tuple[Tensor, object]:
            tokens = PackedSequence(x.flatten(0, 1).index_select(0, self.token), self.batch_sizes)
            y, finals = module(tokens, _each(hx, lambda h: h[:, self.row]))
            y = y.data.index_select(0, self.place).view(self.T, self.B, -1)
            return y, _each(finals, lambda h: h[:, self.final])

        return run


def _each(states: Tensor | Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> object:
    return function(states) if isinstance(states, Tensor) else tuple(function(state) for state in states)
