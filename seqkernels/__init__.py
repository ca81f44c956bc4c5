"""Fused kernels for sequence models in PyTorch: drop-in LSTM, GRU, RNN and attention."""

from seqkernels import functional
from seqkernels.additive import additive_attention
from seqkernels.attention import decode_attention, scaled_dot_product_attention, varlen_attention
from seqkernels.nn import GRU, LSTM, RNN, AdditiveAttention, GRUCell, LSTMCell, MultiheadAttention, RNNCell
from seqkernels.swap import SwapReport, explain, patch, swap_, unswap_

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AdditiveAttention",
    "GRUCell",
    "LSTMCell",
    "MultiheadAttention",
    "RNNCell",
    "SwapReport",
    "additive_attention",
    "decode_attention",
    "explain",
    "functional",
    "patch",
    "scaled_dot_product_attention",
    "swap_",
    "unswap_",
    "varlen_attention",
]
