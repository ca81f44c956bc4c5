// GRU layer, linear before reset (Cho et al. 2014 as in cuDNN; torch.nn.GRU's equations and gate order r, z,
// n):
//   r = sigmoid(W_ir x + b_ir + W_hr h + b_hr),  z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
//   n = tanh(W_in x + b_in + r (W_hn h + b_hn)),  h_t = (1 - z) n + z h_{t-1}
// The saved activations are r, z, n and q = W_hn h + b_hn.
#pragma once

#include "layer.h"

namespace seqkernels {

struct GruFwdParams : LayerFwdParams {};
struct GruBwdParams : LayerBwdParams {};

void gru_fwd(const GruFwdParams&);
void gru_bwd(const GruBwdParams&);

}  // namespace seqkernels
