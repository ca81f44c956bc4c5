// LSTM on CPU tensors: checks, allocation, and the bridge to kernels/lstm.h.
#include "kernels/lstm.h"
#include "recurrent.h"

namespace seqkernels::ops {

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lstm_layer_fwd(Tensor x, Tensor h0, Tensor c0,
                                                                  Tensors weights, OptionalTensor batch_sizes,
                                                                  OptionalTensor resets,
                                                                  OptionalTensor panels, bool bidirectional,
                                                                  bool save_cells, bool save_gates) {
  const LayerCall call("lstm_layer_fwd", 4, x, h0, weights, batch_sizes, resets, bidirectional);
  call.check(c0, "c0", {call.D, call.B, call.H});
  LstmFwdParams p;
  call.fill(p, h0, weights, batch_sizes, resets);
  if (panels) p.panels = checked_panels(call, p, *panels);
  Tensor y = large_empty(x, call.tokens_by(call.D * call.P));
  Tensor hn = empty(x, h0.sizes()), cn = empty(x, c0.sizes());
  Tensor cells = save_cells ? large_empty(x, call.tokens_by(call.D * call.H), accumulation_type(call.dtype))
                            : none_like(x, accumulation_type(call.dtype));
  Tensor gates = save_gates ? kept_empty(x, call.tokens_by(call.D * kSavedGates * call.H)) : none_like(x);
  p.c0 = c0.const_data_ptr();
  p.y = y.mutable_data_ptr(), p.hn = hn.mutable_data_ptr(), p.cn = cn.mutable_data_ptr();
  if (save_cells) p.cells = cells.mutable_data_ptr();
  if (save_gates) p.gates = gates.mutable_data_ptr();
  lstm_fwd(p);
  return {y, hn, cn, cells, gates};
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
  LstmBwdParams p;
  call.fill(p, h0, weights, batch_sizes, resets);
  call.fill_backward(p, y, &gates, dy, dhn);
  p.c0 = c0.const_data_ptr(), p.cells = cells.const_data_ptr();
  p.dcn = call.gradient(dcn, "dcn", {call.D, call.B, call.H});
  p.dcells = call.gradient(dcells, "dcells", call.tokens_by(call.D * call.H), true);
  const Gradients to = new_gradients(call, p, h0, weights, need_dx);
  Tensor dc0 = empty(x, c0.sizes());
  p.dc0 = dc0.mutable_data_ptr();
  lstm_bwd(p);
  return {to.dx, to.dh0, dc0, to.weights};
}

// A cell is a layer of one step whose output is its final state.
std::tuple<Tensor, Tensor, Tensor> lstm_cell_fwd(Tensor x, Tensor h, Tensor c, Tensor w_ih, Tensor w_hh,
                                                 OptionalTensor b_ih, OptionalTensor b_hh, bool save) {
  const CellCall cell("lstm_cell_fwd", 4, x, h, w_ih, w_hh, b_ih, b_hh);
  cell.check(c, "c", {cell.B, cell.H});
  LstmFwdParams p;
  cell.fill(p);
  Tensor h_new = empty(x, h.sizes()), c_new = empty(x, h.sizes());
  Tensor gates = save ? empty(x, {cell.B, kSavedGates * cell.H}) : none_like(x);
  p.c0 = c.const_data_ptr(), p.y = h_new.mutable_data_ptr(), p.cn = c_new.mutable_data_ptr();
  if (save) p.gates = gates.mutable_data_ptr();
  lstm_fwd(p);
  return {h_new, c_new, gates};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkernels, CPU, m) {
  impl_forward(m, "lstm_layer_fwd", TORCH_BOX(&lstm_layer_fwd));
  m.impl("lstm_layer_bwd", TORCH_BOX(&lstm_layer_bwd));
  impl_forward(m, "lstm_cell_fwd", TORCH_BOX(&lstm_cell_fwd));
}

}  // namespace seqkernels::ops
