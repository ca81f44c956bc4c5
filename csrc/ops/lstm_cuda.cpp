// LSTM on CUDA tensors: checks and allocation; the call itself is GpuLayer.
#include "recurrent_cuda.h"

namespace seqkernels::ops {

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer_fwd(Tensor x, Tensor h0, Tensor c0,
                                                                  Tensors weights, OptionalTensor batch_sizes,
                                                                  OptionalTensor resets, OptionalTensor,
                                                                  bool bidirectional, bool save_cells,
                                                                  bool save_gates) {
  const LayerCall call("lstm_layer_fwd", 4, x, h0, weights, batch_sizes, resets, bidirectional);
  call.check(c0, "c0", {call.D, call.B, call.H});
  Tensor y = torch::stable::new_empty(x, call.tokens_by(call.D * call.P));
  Tensor hn = torch::stable::new_empty(x, h0.sizes()), cn = torch::stable::new_empty(x, c0.sizes());
  OptionalTensor cells, gates;
  if (save_cells)
    cells = torch::stable::new_empty(x, call.tokens_by(call.D * call.H), accumulation_type(call.dtype));
  if (save_gates) gates = torch::stable::new_empty(x, call.tokens_by(call.D * kSavedGates * call.H));
  GpuLayer<cuda::Lstm>(call, h0, c0, weights, batch_sizes, resets, false).forward(y, hn, cn, cells, gates);
  return {y, hn, cn, cells ? *cells : none_like(x, accumulation_type(call.dtype)),
          gates ? *gates : none_like(x)};
}

std::tuple<Tensor, Tensor, Tensor, Tensors> lstm_layer_bwd(OptionalTensor dy, OptionalTensor dhn,
                                                           OptionalTensor dcn, OptionalTensor dcells,
                                                           Tensor x, Tensor h0, Tensor c0, Tensors weights,
                                                           Tensor y, Tensor cells, Tensor gates,
                                                           OptionalTensor batch_sizes, OptionalTensor resets,
                                                           bool bidirectional, bool need_dx) {
  const LayerCall call("lstm_layer_bwd", 4, x, h0, weights, batch_sizes, resets, bidirectional);
  call.check(c0, "c0", {call.D, call.B, call.H});
  call.check(cells, "cells", call.tokens_by(call.D * call.H), true);
  cuda::BwdLayer p;
  call.fill_backward(p, y, &gates, dy, dhn);
  p.cells = cells.const_data_ptr();
  p.dcn = call.gradient(dcn, "dcn", {call.D, call.B, call.H});
  p.dcells = call.gradient(dcells, "dcells", call.tokens_by(call.D * call.H), true);
  auto gradients = new_gradients(call, h0, c0, weights, need_dx);
  GpuLayer<cuda::Lstm>(call, h0, c0, weights, batch_sizes, resets, false).backward(p, dhn, dcn, gradients);
  return {gradients.dx ? *gradients.dx : none_like(x), gradients.dh0, *gradients.dc0, gradients.weights};
}

std::tuple<Tensor, Tensor, Tensor> lstm_cell_fwd(Tensor x, Tensor h, Tensor c, Tensor w_ih, Tensor w_hh,
                                                 OptionalTensor b_ih, OptionalTensor b_hh, bool save) {
  const CellCall cell("lstm_cell_fwd", 4, x, h, w_ih, w_hh, b_ih, b_hh);
  cell.check(c, "c", {cell.B, cell.H});
  Tensor h_new = torch::stable::new_empty(x, h.sizes()), c_new = torch::stable::new_empty(x, h.sizes());
  OptionalTensor gates;
  if (save) gates = torch::stable::new_empty(x, {cell.B, kSavedGates * cell.H});
  gpu_cell<cuda::Lstm>(cell, c, h_new, c_new, gates, false);
  return {h_new, c_new, gates ? *gates : none_like(x)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEQKERNELS_GPU_LIBRARY, SEQKERNELS_GPU_KEY, m) {
  impl_forward(m, "lstm_layer_fwd", TORCH_BOX(&lstm_layer_fwd));
  m.impl("lstm_layer_bwd", TORCH_BOX(&lstm_layer_bwd));
  impl_forward(m, "lstm_cell_fwd", TORCH_BOX(&lstm_cell_fwd));
}

}  // namespace seqkernels::ops
