"""Rows of different lengths: padded tensor to packed tokens and back, so that time goes with the tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from seqkernels import support


@dataclass(frozen=True)
class Ragged:
    """Tokens lie as in torch's PackedSequence: first steps of all rows, longest first, then second."""

    batch_sizes: Tensor  # int64 [T'] on the CPU: rows still running at each step
    order: Tensor  # int64 [B]: rows by falling length
    tokens: Tensor  # int64 [N]: where each packed token lies in the flattened padded tensor
    shape: torch.Size  # of the padded tensor without features: [T,B] or [B,T]

    def pack(self, padded: Tensor) -> Tensor:
        rows = padded.flatten(0, 1)
        if not support.is_compiling() and len(self.tokens) == 0:
            return rows[:0]  # embedding has no second derivative of nothing
        return F.embedding(self.tokens, rows)  # as index_select, whose backward is slow

    def pad(self, packed: Tensor) -> Tensor:
        """Zeros beyond each length."""
        rows = packed.new_zeros(self.shape[0] * self.shape[1], packed.size(1))  # numel() fixes dynamic sizes
        return rows.index_copy(0, self.tokens, packed).unflatten(0, self.shape)

    def sort(self, state: Tensor) -> Tensor:
        return state.index_select(1, self.order)

    def unsort(self, state: Tensor) -> Tensor:
        return state.index_select(1, self.order.argsort())


def _counts(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def from_lengths(lengths: Tensor, padded: Tensor, batch_first: bool) -> Ragged | None:
    """None when every row is as long as the padding, so that the dense path serves."""
    shape = padded.shape[:2]
    B, T = shape if batch_first else shape[::-1]
    if lengths.shape != (B,) or not _counts(lengths.dtype):
        raise ValueError(
            f"lengths must be integers of shape [{B}], got {lengths.dtype} of shape {list(lengths.shape)}"
        )
    lengths = lengths.to("cpu", torch.int64)
    steps = T
    if B > 0 and not support.is_compiling():  # reading values would break the graph
        shortest, longest = map(int, lengths.aminmax())
        if shortest < 0 or longest > T:
            raise ValueError(
                f"lengths must lie between 0 and T = {T}, got values from {shortest} to {longest}"
            )
        if shortest == T:
            return None
        steps = max(longest, 1)
    elif support.is_compiling():
        torch._assert_async(((lengths >= 0) & (lengths <= T)).all(), "lengths must lie between 0 and T")
    lengths, order = lengths.sort(descending=True, stable=True)
    running = lengths > torch.arange(steps, device="cpu").unsqueeze(1)
    step, row = running.nonzero(as_tuple=True)
    row = order[row]
    tokens = row * T + step if batch_first else step * B + row
    device = padded.device
    return Ragged(running.sum(1), order.to(device), tokens.to(device), shape)
