// Which kernels the recurrence of a layer takes on a GPU, asked before it runs.
#include "recurrent_cuda.h"

namespace seqkernels::ops {

namespace {

// The kernels read weights as they lie: there is nothing to pack, and forward ignores it.
Tensor pack_nothing(Tensors weights, int64_t, bool) {
  STD_TORCH_CHECK(!weights.empty(), "seqkernels::pack_weights: expected w_ih, w_hh, ..., got no weights");
  return none_like(weights[0], ScalarType::Byte);
}

struct Plans {
  cuda::Plan forward, backward;
  bool tf32;
};

template <class Cell>
Plans plans_of(const cuda::Layer& layer) {
  return {cuda::Recurrence<Cell>::plan_fwd(layer), cuda::Recurrence<Cell>::plan_bwd(layer), layer.tf32};
}

// Of a layer on the device of x and of its dtype.
Plans plans_for(const char* op, const Tensor& x, int64_t gates, int64_t B, int64_t H, int64_t D,
                bool projected) {
  const DType dtype = dtype_of(op, "x", x);
  STD_TORCH_CHECK((gates == 1 || gates == 3 || gates == 4) && B >= 0 && H > 0 && (D == 1 || D == 2),
                  "seqkernels::", op, ": expected 1, 3 or 4 gates, B >= 0, H > 0 and 1 or 2 directions, got ",
                  gates, " gates, B = ", B, ", H = ", H, " and ", D, " directions");
  const OnDevice on(x);
  cuda::Layer layer;
  layer.dtype = dtype, layer.T = 1, layer.B = B, layer.H = H, layer.P = projected ? 0 : H;
  layer.D = static_cast<int>(D), layer.tf32 = allows_tf32(dtype);
  return gates == 1   ? plans_of<cuda::Rnn>(layer)
         : gates == 3 ? plans_of<cuda::Gru>(layer)
                      : plans_of<cuda::Lstm>(layer);
}

std::string cuda_plan(Tensor x, int64_t gates, int64_t B, int64_t H, int64_t D, bool projected) {
  const auto words = [](const cuda::Plan& p) {
    if (p.members == 0) return std::string("stepwise");
    return "persistent in " + std::to_string(p.grid) + " blocks, " + std::to_string(p.members) +
           " to a group, of " + std::to_string(p.units) + " units x " + std::to_string(p.rows) + " rows, " +
           std::to_string(p.tiles) + (p.tiles == 1 ? " tile a warp" : " tiles a warp") +
           (p.single ? ", weights in registers" : "");
  };
  const Plans plans = plans_for("cuda_plan", x, gates, B, H, D, projected);
  return "forward " + words(plans.forward) + ", backward " + words(plans.backward) +
         (plans.tf32 ? ", in TF32" : "");
}

std::tuple<int64_t, int64_t> cuda_blocks(Tensor x, int64_t gates, int64_t B, int64_t H, int64_t D,
                                         bool projected) {
  const Plans plans = plans_for("cuda_blocks", x, gates, B, H, D, projected);
  return {plans.forward.grid, plans.backward.grid};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(SEQKERNELS_GPU_LIBRARY, SEQKERNELS_GPU_KEY, m) {
  m.impl("pack_weights", TORCH_BOX(&pack_nothing));
  m.impl("cuda_plan", TORCH_BOX(&cuda_plan));
  m.impl("cuda_blocks", TORCH_BOX(&cuda_blocks));
}

}  // namespace seqkernels::ops
