// Calls of recurrent ops, checked: sizes, types, devices, and the kernels' parameters from them.
#include "recurrent.h"

namespace seqkernels::ops {

namespace {

template <class Data>
auto pointers(const Weights<const Tensor*>& w, const Data& data) {
  const auto at = [&](const Tensor* t) { return t ? data(*t) : nullptr; };
  return Weights<decltype(at(nullptr))>{at(w.w_ih), at(w.w_hh), at(w.b_ih), at(w.b_hh), at(w.w_hr)};
}

}  // namespace

LayerCall::LayerCall(const char* op_name, int gates, Tensor& x_, Tensor& h0, Tensors& weights,
                     OptionalTensor& batch_sizes, OptionalTensor& resets, bool bidirectional)
    : op(op_name), G(gates), D(bidirectional ? 2 : 1) {
  dtype = dtype_of(op, "x", x_);
  const int64_t dims = batch_sizes ? 2 : 3;
  STD_TORCH_CHECK(x_.dim() == dims, "seqkernels::", op, ": expected x of ", dims, " dimensions (",
                  batch_sizes ? "packed: [tokens, I]" : "[T, B, I]", "), got ", text(x_.sizes()));
  const int64_t count = static_cast<int64_t>(weights.size()), per = count % D ? 0 : count / D;
  STD_TORCH_CHECK(per == 2 || per == 4 || (G == 4 && (per == 3 || per == 5)), "seqkernels::", op,
                  ": expected for each of ", D, " directions w_ih, w_hh (, b_ih, b_hh)",
                  G == 4 ? " (, w_hr)" : "", ", got ", count, " weights");
  has_bias = per >= 4;
  projected = per % 2 == 1;
  STD_TORCH_CHECK(h0.dim() == 3 && weights[0].dim() == 2 && weights[1].dim() == 2, "seqkernels::", op,
                  ": expected h0 [D, B, P], w_ih [", G, "*H, I], w_hh [", G, "*H, P], got ", text(h0.sizes()),
                  ", ", text(weights[0].sizes()), ", ", text(weights[1].sizes()));
  I = x_.size(dims - 1);
  B = h0.size(1);
  P = h0.size(2);
  H = weights[0].size(0) / G;
  STD_TORCH_CHECK(I > 0 && H > 0 && P > 0, "seqkernels::", op,
                  ": expected at least one input and one hidden unit, got x ", text(x_.sizes()), ", w_ih ",
                  text(weights[0].sizes()), ", h0 ", text(h0.sizes()));
  lay_last_dimension(x_);
  x = x_;
  if (batch_sizes) {
    Tensor& sizes = *batch_sizes;
    STD_TORCH_CHECK(sizes.is_cpu() && sizes.scalar_type() == ScalarType::Long && sizes.dim() == 1,
                    "seqkernels::", op, ": expected batch_sizes as int64 [T] on the CPU, got ", text(sizes));
    lay_contiguously(sizes);
    T = sizes.size(0);
    const int64_t* n = sizes.const_data_ptr<int64_t>();
    N = 0;
    for (int64_t t = 0; t < T; t++) {
      STD_TORCH_CHECK(n[t] >= 0 && n[t] <= (t ? n[t - 1] : B), "seqkernels::", op,
                      ": expected batch_sizes that never increase and start at or below B = ", B, ", got ",
                      n[t], " at step ", t);
      N += n[t];
    }
    STD_TORCH_CHECK(N == x_.size(0), "seqkernels::", op, ": expected x of sum(batch_sizes) = ", N,
                    " tokens, got ", x_.size(0));
    STD_TORCH_CHECK(!resets, "seqkernels::", op, ": resets need a dense sequence, got a packed one");
    leading = {N};
  } else {
    T = x_.size(0);
    STD_TORCH_CHECK(x_.size(1) == B, "seqkernels::", op, ": expected x and h0 of the same batch size, got ",
                    x_.size(1), " and ", B);
    N = T * B;
    leading = {T, B};
    if (resets) {
      expect(op, *resets, "resets", ScalarType::Bool, leading, x_);
      lay_contiguously(*resets);
    }
  }
  STD_TORCH_CHECK(T > 0, "seqkernels::", op, ": Expected sequence length to be larger than 0 in RNN");
  check(h0, "h0", {D, B, P});
  for (int64_t d = 0; d < D; d++) {
    Tensor* w = &weights[d * per];
    check(w[0], "w_ih", {G * H, I});
    check(w[1], "w_hh", {G * H, P});
    if (has_bias) check(w[2], "b_ih", {G * H}), check(w[3], "b_hh", {G * H});
    if (projected) check(w[per - 1], "w_hr", {P, H});
  }
  STD_TORCH_CHECK(projected || P == H, "seqkernels::", op, ": expected h0 of ", H, " units, got ", P);
}

Weights<const Tensor*> LayerCall::direction(const Tensors& weights, int64_t d) const {
  const size_t per = weights.size() / D;
  const Tensor* w = &weights[d * per];
  return {w, w + 1, has_bias ? w + 2 : nullptr, has_bias ? w + 3 : nullptr,
          projected ? w + per - 1 : nullptr};
}

void LayerCall::check(Tensor& t, const char* name, Shape shape, bool accumulation) const {
  expect(op, t, name, accumulation ? accumulation_type(dtype) : x->scalar_type(), shape, *x);
  lay_contiguously(t);
}

const void* LayerCall::gradient(OptionalTensor& t, const char* name, Shape shape, bool accumulation) const {
  if (!t) return nullptr;
  check(*t, name, shape, accumulation);
  return t->const_data_ptr();
}

std::vector<int64_t> LayerCall::tokens_by(int64_t columns) const {
  std::vector<int64_t> shape = leading;
  shape.push_back(columns);
  return shape;
}

void LayerCall::fill(LayerParams& p, const Tensor& h0, const Tensors& weights,
                     const OptionalTensor& batch_sizes, const OptionalTensor& resets) const {
  p.dtype = dtype;
  p.T = T, p.B = B, p.I = I, p.H = H, p.P = P, p.D = static_cast<int>(D);
  if (batch_sizes) p.batch_sizes = batch_sizes->const_data_ptr<int64_t>();
  if (resets) p.resets = static_cast<const uint8_t*>(resets->const_data_ptr());
  p.x = x->const_data_ptr();
  p.x_t = batch_sizes ? 0 : x->stride(0);
  p.x_b = x->stride(batch_sizes ? 0 : 1);
  p.h0 = h0.const_data_ptr();
  for (int64_t d = 0; d < D; d++)
    p.w[d] = pointers(direction(weights, d), [](const Tensor& w) { return w.const_data_ptr(); });
  p.parallel = torch_threads();
}

CellCall::CellCall(const char* op_name, int gates, Tensor& x_, Tensor& h_, Tensor& w_ih_, Tensor& w_hh_,
                   OptionalTensor& b_ih_, OptionalTensor& b_hh_)
    : op(op_name), G(gates), x(x_), h(h_), w_ih(w_ih_), w_hh(w_hh_), b_ih(b_ih_), b_hh(b_hh_) {
  dtype = dtype_of(op, "x", x);
  STD_TORCH_CHECK(x.dim() == 2 && h.dim() == 2, "seqkernels::", op, ": expected x [B, I] and h [B, H], got ",
                  text(x.sizes()), " and ", text(h.sizes()));
  B = x.size(0), I = x.size(1), H = h.size(1);
  STD_TORCH_CHECK(I > 0 && H > 0, "seqkernels::", op,
                  ": expected at least one input and one hidden unit, got x ", text(x.sizes()), " and h ",
                  text(h.sizes()));
  STD_TORCH_CHECK(b_ih.has_value() == b_hh.has_value(), "seqkernels::", op,
                  ": expected both biases or neither, got ", b_ih ? "b_ih" : "b_hh", " alone");
  check(x_, "x", {B, I});
  check(h_, "h", {B, H});
  check(w_ih_, "w_ih", {G * H, I});
  check(w_hh_, "w_hh", {G * H, H});
  if (b_ih) check(*b_ih_, "b_ih", {G * H}), check(*b_hh_, "b_hh", {G * H});
}

void CellCall::check(Tensor& t, const char* name, Shape shape) const {
  expect(op, t, name, x.scalar_type(), shape, x);
  lay_contiguously(t);
}

void CellCall::fill(LayerParams& p) const {
  p.dtype = dtype;
  p.T = 1, p.B = B, p.I = I, p.H = H, p.P = H;
  p.x = x.const_data_ptr(), p.x_t = B * I, p.x_b = I;
  p.h0 = h.const_data_ptr();
  p.w[0].w_ih = w_ih.const_data_ptr(), p.w[0].w_hh = w_hh.const_data_ptr();
  if (b_ih) p.w[0].b_ih = b_ih->const_data_ptr(), p.w[0].b_hh = b_hh->const_data_ptr();
  p.parallel = torch_threads();
}

Gradients new_gradients(const LayerCall& call, LayerBwdParams& p, const Tensor& h0, const Tensors& weights,
                        bool need_dx) {
  const Tensor& x = *call.x;
  Gradients to{need_dx ? large_empty(x, call.tokens_by(call.I)) : none_like(x), empty(x, h0.sizes()), {}};
  for (const Tensor& w : weights) to.weights.push_back(kept_empty(w, w.sizes()));
  if (need_dx) p.dx = to.dx.mutable_data_ptr();
  p.dh0 = to.dh0.mutable_data_ptr();
  for (int64_t d = 0; d < call.D; d++)
    p.dw[d] = pointers(call.direction(to.weights, d), [](const Tensor& w) { return w.mutable_data_ptr(); });
  return to;
}

}  // namespace seqkernels::ops
