// Elman RNN layer (torch.nn.RNN): h_t = tanh or relu of (W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).
// Backward needs nothing but y: tanh' = 1 - h^2, relu' = [h > 0].
#pragma once

#include "layer.h"

namespace seqkernels {

struct RnnFwdParams : LayerFwdParams {
  bool relu = false;
};
struct RnnBwdParams : LayerBwdParams {
  bool relu = false;
};

void rnn_fwd(const RnnFwdParams&);
void rnn_bwd(const RnnBwdParams&);

}  // namespace seqkernels
