// GRU on CPU tensors: checks, allocation, and the bridge to kernels/gru.h.
#include "kernels/gru.h"
#include "recurrent.h"

namespace seqkernels::ops {

namespace {

std::tuple<Tensor, Tensor, Tensor> gru_layer_fwd(Tensor x, Tensor h0, Tensors weights,
                                                 OptionalTensor batch_sizes, OptionalTensor resets,
                                                 OptionalTensor panels, bool bidirectional, bool save_gates) {
  const LayerCall call("gru_layer_fwd", 3, x, h0, weights, batch_sizes, resets, bidirectional);
  GruFwdParams p;
  call.fill(p, h0, weights, batch_sizes, resets);
  if (panels) p.panels = checked_panels(call, p, *panels);
  Tensor y = large_empty(x, call.tokens_by(call.D * call.H));
  Tensor hn = empty(x, h0.sizes());
  Tensor gates = save_gates ? kept_empty(x, call.tokens_by(call.D * kSavedGates * call.H)) : none_like(x);
  p.y = y.mutable_data_ptr(), p.hn = hn.mutable_data_ptr();
  if (save_gates) p.gates = gates.mutable_data_ptr();
  gru_fwd(p);
  return {y, hn, gates};
}

std::tuple<Tensor, Tensor, Tensors> gru_layer_bwd(OptionalTensor dy, OptionalTensor dhn, Tensor x, Tensor h0,
                                                  Tensors weights, Tensor y, Tensor gates,
                                                  OptionalTensor batch_sizes, OptionalTensor resets,
                                                  bool bidirectional, bool need_dx) {
  const LayerCall call("gru_layer_bwd", 3, x, h0, weights, batch_sizes, resets, bidirectional);
  GruBwdParams p;
  call.fill(p, h0, weights, batch_sizes, resets);
  call.fill_backward(p, y, &gates, dy, dhn);
  const Gradients to = new_gradients(call, p, h0, weights, need_dx);
  gru_bwd(p);
  return {to.dx, to.dh0, to.weights};
}

std::tuple<Tensor, Tensor> gru_cell_fwd(Tensor x, Tensor h, Tensor w_ih, Tensor w_hh, OptionalTensor b_ih,
                                        OptionalTensor b_hh, bool save) {
  const CellCall cell("gru_cell_fwd", 3, x, h, w_ih, w_hh, b_ih, b_hh);
  GruFwdParams p;
  cell.fill(p);
  Tensor h_new = empty(x, h.sizes());
  Tensor gates = save ? empty(x, {cell.B, kSavedGates * cell.H}) : none_like(x);
  p.y = h_new.mutable_data_ptr();
  if (save) p.gates = gates.mutable_data_ptr();
  gru_fwd(p);
  return {h_new, gates};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkernels, CPU, m) {
  impl_forward(m, "gru_layer_fwd", TORCH_BOX(&gru_layer_fwd));
  m.impl("gru_layer_bwd", TORCH_BOX(&gru_layer_bwd));
  impl_forward(m, "gru_cell_fwd", TORCH_BOX(&gru_cell_fwd));
}

}  // namespace seqkernels::ops
