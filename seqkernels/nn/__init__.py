"""Drop-in modules for torch.nn's."""

from seqkernels.nn.gru import GRU, GRUCell
from seqkernels.nn.lstm import LSTM, LSTMCell
from seqkernels.nn.multihead_attention import MultiheadAttention
from seqkernels.nn.rnn import RNN, RNNCell

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "MultiheadAttention", "RNNCell"]
