// GRU on CUDA tensors: checks and allocation; the call itself is GpuLayer.
#include "recurrent_cuda.h"

namespace seqkernels::ops {

namespace {

std::tuple<Tensor, Tensor, Tensor> gru_layer_fwd(Tensor x, Tensor h0, Tensors weights,
                                                 OptionalTensor batch_sizes, OptionalTensor resets,
                                                 OptionalTensor, bool bidirectional, bool save_gates) {
  const LayerCall call("gru_layer_fwd", 3, x, h0, weights, batch_sizes, resets, bidirectional);
  Tensor y = torch::stable::new_empty(x, call.tokens_by(call.D * call.H));
  Tensor hn = torch::stable::new_empty(x, h0.sizes());
  OptionalTensor gates;
  if (save_gates) gates = torch::stable::new_empty(x, call.tokens_by(call.D * kSavedGates * call.H));
  GpuLayer<cuda::Gru>(call, h0, {}, weights, batch_sizes, resets, false).forward(y, hn, {}, {}, gates);
  return {y, hn, gates ? *gates : none_like(x)};
}

std::tuple<Tensor, Tensor, Tensors> gru_layer_bwd(OptionalTensor dy, OptionalTensor dhn, Tensor x, Tensor h0,
                                                  Tensors weights, Tensor y, Tensor gates,
                                                  OptionalTensor batch_sizes, OptionalTensor resets,
                                                  bool bidirectional, bool need_dx) {
  const LayerCall call("gru_layer_bwd", 3, x, h0, weights, batch_sizes, resets, bidirectional);
  cuda::BwdLayer p;
  call.fill_backward(p, y, &gates, dy, dhn);
  auto gradients = new_gradients(call, h0, {}, weights, need_dx);
  GpuLayer<cuda::Gru>(call, h0, {}, weights, batch_sizes, resets, false).backward(p, dhn, {}, gradients);
  return {gradients.dx ? *gradients.dx : none_like(x), gradients.dh0, gradients.weights};
}

std::tuple<Tensor, Tensor> gru_cell_fwd(Tensor x, Tensor h, Tensor w_ih, Tensor w_hh, OptionalTensor b_ih,
                                        OptionalTensor b_hh, bool save) {
  const CellCall cell("gru_cell_fwd", 3, x, h, w_ih, w_hh, b_ih, b_hh);
  Tensor h_new = torch::stable::new_empty(x, h.sizes());
  OptionalTensor gates;
  if (save) gates = torch::stable::new_empty(x, {cell.B, kSavedGates * cell.H});
  gpu_cell<cuda::Gru>(cell, {}, h_new, {}, gates, false);
  return {h_new, gates ? *gates : none_like(x)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEQKERNELS_GPU_LIBRARY, SEQKERNELS_GPU_KEY, m) {
  impl_forward(m, "gru_layer_fwd", TORCH_BOX(&gru_layer_fwd));
  m.impl("gru_layer_bwd", TORCH_BOX(&gru_layer_bwd));
  impl_forward(m, "gru_cell_fwd", TORCH_BOX(&gru_cell_fwd));
}

}  // namespace seqkernels::ops
