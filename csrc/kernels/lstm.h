// LSTM layer (Hochreiter & Schmidhuber 1997, with forget gate; torch.nn.LSTM's equations and gate order i, f,
// g, o):
//   [i f g o] = [sigmoid sigmoid tanh sigmoid](W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)
//   c_t = f c_{t-1} + i g,   m_t = o tanh(c_t),   h_t = m_t, or W_hr m_t with projection
#pragma once

#include "layer.h"

namespace seqkernels {

struct LstmFwdParams : LayerFwdParams {
  const void* c0 = nullptr;  // [D, B, H]
  void* cn = nullptr;        // [D, B, H]
  void* cells = nullptr;     // acc [tokens, D, H]: every c_t; needed by backward, or null: not saved
};

struct LstmBwdParams : LayerBwdParams {
  const void* c0 = nullptr;      // [D, B, H]
  const void* cells = nullptr;   // acc [tokens, D, H]
  const void* dcn = nullptr;     // [D, B, H] or null: zero
  const void* dcells = nullptr;  // acc [tokens, D, H] or null: zero
  void* dc0 = nullptr;           // [D, B, H]
};

void lstm_fwd(const LstmFwdParams&);
void lstm_bwd(const LstmBwdParams&);

}  // namespace seqkernels
