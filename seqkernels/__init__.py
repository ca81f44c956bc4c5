"""Fused kernels for sequence models in PyTorch: drop-in LSTM, GRU and RNN."""

from seqkernels import functional
from seqkernels.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from seqkernels.swap import SwapReport, explain, patch, swap_, unswap_

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "SwapReport",
    "explain",
    "functional",
    "patch",
    "swap_",
    "unswap_",
]
