// RNN on CPU tensors: checks, allocation, and the bridge to kernels/rnn.h.
#include "kernels/rnn.h"
#include "recurrent.h"

namespace seqkernels::ops {

namespace {

std::tuple<Tensor, Tensor> rnn_layer_fwd(Tensor x, Tensor h0, Tensors weights, OptionalTensor batch_sizes,
                                         OptionalTensor resets, OptionalTensor panels, bool bidirectional,
                                         bool relu) {
  const LayerCall call("rnn_layer_fwd", 1, x, h0, weights, batch_sizes, resets, bidirectional);
  RnnFwdParams p;
  call.fill(p, h0, weights, batch_sizes, resets);
  if (panels) p.panels = checked_panels(call, p, *panels);
  p.relu = relu;
  Tensor y = large_empty(x, call.tokens_by(call.D * call.H));
  Tensor hn = empty(x, h0.sizes());
  p.y = y.mutable_data_ptr(), p.hn = hn.mutable_data_ptr();
  rnn_fwd(p);
  return {y, hn};
}

std::tuple<Tensor, Tensor, Tensors> rnn_layer_bwd(OptionalTensor dy, OptionalTensor dhn, Tensor x, Tensor h0,
                                                  Tensors weights, Tensor y, OptionalTensor batch_sizes,
                                                  OptionalTensor resets, bool bidirectional, bool relu,
                                                  bool need_dx) {
  const LayerCall call("rnn_layer_bwd", 1, x, h0, weights, batch_sizes, resets, bidirectional);
  RnnBwdParams p;
  call.fill(p, h0, weights, batch_sizes, resets);
  p.relu = relu;
  call.fill_backward(p, y, nullptr, dy, dhn);
  const Gradients to = new_gradients(call, p, h0, weights, need_dx);
  rnn_bwd(p);
  return {to.dx, to.dh0, to.weights};
}

Tensor rnn_cell_fwd(Tensor x, Tensor h, Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                    bool relu) {
  const CellCall cell("rnn_cell_fwd", 1, x, h, w_ih, w_hh, b_ih, b_hh);
  RnnFwdParams p;
  cell.fill(p);
  p.relu = relu;
  Tensor h_new = empty(x, h.sizes());
  p.y = h_new.mutable_data_ptr();
  rnn_fwd(p);
  return h_new;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkernels, CPU, m) {
  impl_forward(m, "rnn_layer_fwd", TORCH_BOX(&rnn_layer_fwd));
  m.impl("rnn_layer_bwd", TORCH_BOX(&rnn_layer_bwd));
  impl_forward(m, "rnn_cell_fwd", TORCH_BOX(&rnn_cell_fwd));
}

}  // namespace seqkernels::ops
