"""Fused kernels for sequence models in PyTorch: drop-in LSTM, GRU and RNN."""

__version__ = "0.1.0"
