#include "kernels/linear.h"
#include "tensor.h"

namespace seqkernels::ops {

namespace {

// x [M, K] by strides, w [N, K]: what both ops take, checked.
LinearParams params_of(const char* op, const Tensor& x, Tensor& w) {
  const DType dtype = dtype_of(op, "x", x);
  STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1), "seqkernels::", op,
                  ": expected x [M, K] and w [N, K], got ", text(x.sizes()), " and ", text(w.sizes()));
  STD_TORCH_CHECK(w.scalar_type() == x.scalar_type() && w.is_cpu(), "seqkernels::", op,
                  ": expected w on the CPU and of the dtype of x");
  lay_contiguously(w);
  LinearParams p;
  p.dtype = dtype, p.M = x.size(0), p.N = w.size(0), p.K = w.size(1);
  p.w = w.const_data_ptr();
  p.parallel = torch_threads();
  return p;
}
// Rows of `t` [M, columns], which may lie apart; returns their stride.
int64_t rows_of(const char* op, Tensor& t, const char* name, const Tensor& like, int64_t M, int64_t columns) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == M && t.size(1) == columns && t.is_cpu() &&
                      t.scalar_type() == like.scalar_type(),
                  "seqkernels::", op, ": expected ", name, " of [", M, ", ", columns,
                  "] on the CPU, of the dtype of w, got ", text(t.sizes()));
  lay_last_dimension(t);
  return t.stride(0);
}

Tensor linear_fwd(Tensor x, Tensor w, OptionalTensor b) {
  LinearFwdParams p{params_of("linear_fwd", x, w)};
  p.x_m = rows_of("linear_fwd", x, "x", w, p.M, p.K), p.x = x.const_data_ptr();
  if (b) {
    STD_TORCH_CHECK(b->dim() == 1 && b->size(0) == p.N && b->is_cpu() && b->scalar_type() == x.scalar_type(),
                    "seqkernels::linear_fwd: expected b [", p.N, "] on the CPU, of the dtype of x, got ",
                    text(b->sizes()));
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
