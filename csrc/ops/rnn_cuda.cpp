#include "recurrent_cuda.h"

namespace seqkernels::ops {

namespace {

std::tuple<Tensor, Tensor> rnn_layer_fwd(Tensor x, Tensor h0, Tensors weights, OptionalTensor batch_sizes,
                                         OptionalTensor resets, OptionalTensor, bool bidirectional, bool relu) {
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
  call.check(y, "y", call.tokens_by(call.D * call.H));
  cuda::BwdLayer p;
  p.y = y.const_data_ptr();
  p.dy = call.gradient(dy, "dy", call.tokens_by(call.D * call.H));
  p.dhn = call.gradient(dhn, "dhn", {call.D, call.B, call.H});
  auto gradients = new_gradients(call, h0, {}, weights, need_dx);
  GpuLayer<cuda::Rnn>(call, h0, {}, weights, batch_sizes, resets, relu).backward(p, {}, dhn, {}, gradients);
  return {gradients.dx ? *gradients.dx : none_like(x, x.scalar_type()), gradients.dh0, gradients.weights};
}

Tensor rnn_cell_fwd(Tensor x, Tensor h, Tensor w_ih, Tensor w_hh, OptionalTensor b_ih, OptionalTensor b_hh,
                    bool relu) {
  const CellCall cell("rnn_cell_fwd", 1, x, h, w_ih, w_hh, b_ih, b_hh);
  Tensor h_new = torch::stable::new_empty(x, h.sizes());
  gpu_cell<cuda::Rnn>(cell, {}, h_new, {}, {}, relu);
  return h_new;
}

// The kernels read weights as they lie: there is nothing to pack, and forward ignores it.
Tensor rnn_pack_nothing(Tensors weights, int64_t, bool) {
  STD_TORCH_CHECK(!weights.empty(), "seqkernels::rnn_pack: expected w_ih, w_hh, ..., got no weights");
  return none_like(weights[0], ScalarType::Byte);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEQKERNELS_GPU_LIBRARY, SEQKERNELS_GPU_KEY, m) {
  m.impl("rnn_layer_fwd", TORCH_BOX(&rnn_layer_fwd));
  m.impl("rnn_layer_bwd", TORCH_BOX(&rnn_layer_bwd));
  m.impl("rnn_cell_fwd", TORCH_BOX(&rnn_cell_fwd));
  m.impl("rnn_pack", TORCH_BOX(&rnn_pack_nothing));
}

}  // namespace seqkernels::ops
