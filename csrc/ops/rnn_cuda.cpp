// RNN on CUDA tensors: checks and allocation; the call itself is GpuLayer.
#include "recurrent_cuda.h"

namespace seqkernels::ops {

namespace {

std::tuple<Tensor, Tensor> rnn_layer_fwd(Tensor x, Tensor h0, Tensors weights, OptionalTensor batch_sizes,
                                         OptionalTensor resets, OptionalTensor, bool bidirectional,
                                         bool relu) {
  const LayerCall call("rnn_layer_fwd", 1, x, h0, weights, batch_sizes, resets, bidirectional);
  Tensor y = torch::stable::new_empty(x, call.tokens_by(call.D * call.H));
  Tensor hn = torch::stable::new_empty(x, h0.sizes());
  GpuLayer<cuda::Rnn>(call, h0, {}, weights, batch_sizes, resets, relu).forward(y, hn, {}, {}, {});
  return {y, hn};
}

std::tuple<Tensor, Tensor, Tensors> rnn_layer_bwd(OptionalTensor dy, OptionalTensor dhn, Tensor x, Tensor h0,
                                                  Tensors weights, Tensor y, OptionalTensor batch_sizes,
                                                  OptionalTensor resets, bool bidirectional, bool relu,
                                                  bool need_dx) {
  const LayerCall call("rnn_layer_bwd", 1, x, h0, weights, batch_sizes, resets, bidirectional);
  cuda::BwdLayer p;
  call.fill_backward(p, y, nullptr, dy, dhn);
  auto gradients = new_gradients(call, h0, {}, weights, need_dx);
  GpuLayer<cuda::Rnn>(call, h0, {}, weights, batch_sizes, resets, relu).backward(p, dhn, {}, gradients);
  return {gradients.dx ? *gradients.dx : none_like(x), gradients.dh0, gradients.weights};
}

Tensor rnn_cell_fwd(Tensor x, Tensor h, Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                    bool relu) {
  const CellCall cell("rnn_cell_fwd", 1, x, h, w_ih, w_hh, b_ih, b_hh);
  Tensor h_new = torch::stable::new_empty(x, h.sizes());
  gpu_cell<cuda::Rnn>(cell, {}, h_new, {}, {}, relu);
  return h_new;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEQKERNELS_GPU_LIBRARY, SEQKERNELS_GPU_KEY, m) {
  impl_forward(m, "rnn_layer_fwd", TORCH_BOX(&rnn_layer_fwd));
  m.impl("rnn_layer_bwd", TORCH_BOX(&rnn_layer_bwd));
  impl_forward(m, "rnn_cell_fwd", TORCH_BOX(&rnn_cell_fwd));
}

}  // namespace seqkernels::ops
