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
Tensor pack_nothing(Tensors weights, int64_t, bool) {
  STD_TORCH_CHECK(!weights.empty(), "seqkernels::pack_weights: expected w_ih, w_hh, ..., got no weights");
  return none_like(weights[0], ScalarType::Byte);
}

template <class Cell>
std::string plan_of(const cuda::Layer& layer) {
  const auto words = [](const cuda::Plan& p) {
    if (p.members == 0) return std::string("stepwise");
    return "persistent in " + std::to_string(p.grid) + " blocks, " + std::to_string(p.members) +
           " to a group, of " + std::to_string(p.units) + " units x " + std::to_string(p.rows) + " rows, " +
           std::to_string(p.tiles) + (p.tiles == 1 ? " tile a warp" : " tiles a warp") +
           (p.single ? ", weights in registers" : "");
  };
  return "forward " + words(cuda::Recurrence<Cell>::plan_fwd(layer)) + ", backward " +
         words(cuda::Recurrence<Cell>::plan_bwd(layer)) + (layer.tf32 ? ", in TF32" : "");
}

std::string cuda_plan(Tensor x, int64_t gates, int64_t B, int64_t H, int64_t D, bool projected) {
  const DType dtype = dtype_of("cuda_plan", "x", x);
  STD_TORCH_CHECK((gates == 1 || gates == 3 || gates == 4) && B >= 0 && H > 0 && (D == 1 || D == 2),
                  "seqkernels::cuda_plan: expected 1, 3 or 4 gates, sizes and 1 or 2 directions");
  const OnDevice on(x);
  cuda::Layer layer;
  layer.dtype = dtype, layer.T = 1, layer.B = B, layer.H = H, layer.P = projected ? 0 : H;
  layer.D = static_cast<int>(D), layer.tf32 = allows_tf32(dtype);
  return gates == 1   ? plan_of<cuda::Rnn>(layer)
         : gates == 3 ? plan_of<cuda::Gru>(layer)
                      : plan_of<cuda::Lstm>(layer);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEQKERNELS_GPU_LIBRARY, SEQKERNELS_GPU_KEY, m) {
  m.impl("rnn_layer_fwd", TORCH_BOX(&rnn_layer_fwd));
  m.impl("rnn_layer_fwd.exported", TORCH_BOX(&rnn_layer_fwd));
  m.impl("rnn_layer_bwd", TORCH_BOX(&rnn_layer_bwd));
  m.impl("rnn_cell_fwd", TORCH_BOX(&rnn_cell_fwd));
  m.impl("rnn_cell_fwd.exported", TORCH_BOX(&rnn_cell_fwd));
  m.impl("pack_weights", TORCH_BOX(&pack_nothing));
  m.impl("cuda_plan", TORCH_BOX(&cuda_plan));
}

}  // namespace seqkernels::ops
