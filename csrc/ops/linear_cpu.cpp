// The projection of attention on CPU tensors: checks, allocation, and the bridge to kernels/linear.h.
#include "kernels/linear.h"
#include "tensor.h"

namespace seqkernels::ops {

namespace {

// x [M, K] by strides, w [N, K]: what both ops take, checked.
LinearParams params_of(const char* op, const Tensor& x, Tensor& w) {
  const DType dtype = dtype_of(op, "x", x);
  STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1), "seqkernels::", op,
                  ": expected x [M, K] and w [N, K], got ", text(x.sizes()), " and ", text(w.sizes()));
  expect(op, w, "w", x.scalar_type(), {w.size(0), x.size(1)}, x);
  lay_contiguously(w);
  LinearParams p;
  p.dtype = dtype, p.M = x.size(0), p.N = w.size(0), p.K = w.size(1);
  p.w = w.const_data_ptr();
  p.parallel = torch_threads();
  return p;
}
// Rows of `t` [M, columns], which may lie apart; returns their stride.
int64_t rows_of(const char* op, Tensor& t, const char* name, const Tensor& like, int64_t M, int64_t columns) {
  expect(op, t, name, like.scalar_type(), {M, columns}, like);
  lay_last_dimension(t);
  return t.stride(0);
}

Tensor linear_fwd(Tensor x, Tensor w, OptionalTensor b) {
  LinearFwdParams p{params_of("linear_fwd", x, w)};
  p.x_m = rows_of("linear_fwd", x, "x", w, p.M, p.K), p.x = x.const_data_ptr();
  if (b) {
    expect("linear_fwd", *b, "b", x.scalar_type(), {p.N}, x);
    lay_contiguously(*b);
    p.b = b->const_data_ptr();
  }
  Tensor y = large_empty(x, {p.M, p.N});
  p.y = y.mutable_data_ptr();
  seqkernels::linear_fwd(p);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_bwd(Tensor dy, Tensor x, Tensor w, bool need_dx, bool need_dw) {
  LinearBwdParams p{params_of("linear_bwd", x, w)};
  p.x_m = rows_of("linear_bwd", x, "x", w, p.M, p.K), p.x = x.const_data_ptr();
  p.dy_m = rows_of("linear_bwd", dy, "dy", w, p.M, p.N), p.dy = dy.const_data_ptr();
  const auto type = x.scalar_type();
  Tensor dx = need_dx ? large_empty(x, {p.M, p.K}) : none_like(x, type);
  Tensor dw = need_dw ? kept_empty(x, {p.N, p.K}) : none_like(x, type);
  Tensor db = need_dw ? empty(x, {p.N}) : none_like(x, type);
  if (need_dx) p.dx = dx.mutable_data_ptr();
  if (need_dw) p.dw = dw.mutable_data_ptr(), p.db = db.mutable_data_ptr();
  seqkernels::linear_bwd(p);
  return {dx, dw, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkernels, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&linear_fwd));
  m.impl("linear_fwd.exported", TORCH_BOX(&linear_fwd));
  m.impl("linear_bwd", TORCH_BOX(&linear_bwd));
}

}  // namespace seqkernels::ops
