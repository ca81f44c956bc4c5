// The projection of attention on CPU tensors: checks, allocation, and the bridge to kernels/linear.h.
#include "kernels/linear.h"
#include "tensor.h"

namespace seqkernels::ops {

namespace {

// Rows of `t` [M, columns], which may lie apart; returns their stride.
int64_t rows_of(const char* op, Tensor& t, const char* name, const Tensor& like, int64_t M, int64_t columns) {
  expect(op, t, name, like.scalar_type(), {M, columns}, like);
  lay_last_dimension(t);
  return t.stride(0);
}
const void* weights_of(const char* op, Tensor& w, const Tensor& like, int64_t N, int64_t K) {
  expect(op, w, "w", like.scalar_type(), {N, K}, like);
  lay_contiguously(w);
  return w.const_data_ptr();
}

Tensor linear_fwd(Tensor x, Tensor w, OptionalTensor b) {
  LinearFwdParams p;
  p.dtype = dtype_of("linear_fwd", "x", x);
  STD_TORCH_CHECK(x.dim() == 2 && w.dim() == 2 && x.size(1) == w.size(1),
                  "seqkernels::linear_fwd: expected x [M, K] and w [N, K], got ", text(x.sizes()), " and ",
                  text(w.sizes()));
  p.M = x.size(0), p.N = w.size(0), p.K = x.size(1), p.parallel = torch_threads();
  p.x_m = rows_of("linear_fwd", x, "x", w, p.M, p.K), p.x = x.const_data_ptr();
  p.w = weights_of("linear_fwd", w, x, p.N, p.K);
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

std::tuple<Tensor, Tensor, Tensor> linear_bwd(Tensor dy, OptionalTensor x, OptionalTensor w) {
  LinearBwdParams p;
  p.dtype = dtype_of("linear_bwd", "dy", dy);
  const bool fits = dy.dim() == 2 && (x || w) && (!x || x->dim() == 2) && (!w || w->dim() == 2);
  STD_TORCH_CHECK(fits, "seqkernels::linear_bwd: expected dy [M, N] and x [M, K], w [N, K] or both, got ",
                  text(dy.sizes()), ", ", x ? text(x->sizes()) : "none", " and ",
                  w ? text(w->sizes()) : "none");
  p.M = dy.size(0), p.N = dy.size(1), p.K = (x ? *x : *w).size(1), p.parallel = torch_threads();
  if (w) p.w = weights_of("linear_bwd", *w, dy, p.N, p.K);
  if (x) p.x_m = rows_of("linear_bwd", *x, "x", dy, p.M, p.K), p.x = x->const_data_ptr();
  p.dy_m = rows_of("linear_bwd", dy, "dy", dy, p.M, p.N), p.dy = dy.const_data_ptr();
  Tensor dx = w ? large_empty(dy, {p.M, p.K}) : none_like(dy);
  Tensor dw = x ? kept_empty(dy, {p.N, p.K}) : none_like(dy);
  Tensor db = x ? empty(dy, {p.N}) : none_like(dy);
  if (w) p.dx = dx.mutable_data_ptr();
  if (x) p.dw = dw.mutable_data_ptr(), p.db = db.mutable_data_ptr();
  seqkernels::linear_bwd(p);
  return {dx, dw, db};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkernels, CPU, m) {
  impl_forward(m, "linear_fwd", TORCH_BOX(&linear_fwd));
  m.impl("linear_bwd", TORCH_BOX(&linear_bwd));
}

}  // namespace seqkernels::ops
