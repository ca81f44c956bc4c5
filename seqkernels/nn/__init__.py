"""Drop-in modules for torch.nn's, and additive attention, which torch does not have."""

from seqkernels.nn.additive_attention import AdditiveAttention
from seqkernels.nn.gru import GRU, GRUCell
from seqkernels.nn.lstm import LSTM, LSTMCell
from seqkernels.nn.multihead_attention import MultiheadAttention
from seqkernels.nn.rnn import RNN, RNNCell

DROP_INS = ("GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "MultiheadAttention", "RNNCell")
__all__ = ["GRU", "LSTM", "RNN", "AdditiveAttention", "GRUCell", "LSTMCell", "MultiheadAttention", "RNNCell"]
