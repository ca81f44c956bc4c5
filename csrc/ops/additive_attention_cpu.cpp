// Additive attention on CPU tensors: checks, allocation, and the bridge to kernels/additive_attention.h.
#include <tuple>

#include "attention.h"
#include "kernels/additive_attention.h"

namespace seqkernels::ops {

namespace {

// One call, checked, its tensors laid as the kernels read them. Errors name the op, what was got and
// expected.
struct AdditiveCall {
  const char* op;
  const Tensor& q;
  AdditiveAttentionParams p;

  AdditiveCall(const char* op_name, Tensor& q_, Tensor& k, Tensor& v, Tensor& w, const OptionalTensor& mask,
               OptionalTensor& len_k)
      : op(op_name), q(q_) {
    p.dtype = dtype_of(op, "q", q);
    STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, "seqkernels::", op,
                    ": expected q, k and v of 3 dimensions, got ", text(q.sizes()), ", ", text(k.sizes()),
                    " and ", text(v.sizes()));
    p.parallel = torch_threads();
    p.Hq = p.Hk = 1;
    p.B = q.size(0), p.Tq = q.size(1), p.D = q.size(2), p.Tk = k.size(1), p.Dv = v.size(2);
    p.q = rows(q_, "q", {p.B, p.Tq, p.D});
    p.k = rows(k, "k", {p.B, p.Tk, p.D});
    p.v = rows(v, "v", {p.B, p.Tk, p.Dv});
    p.w = whole(w, "w", {p.D});
    // What threads keep, scores of 128 queries and sums of dk and dv, has to be countable.
    STD_TORCH_CHECK(contiguous({16, p.parallel.threads, p.Tk, p.D + p.Dv + 128, 8}).has_value(),
                    "seqkernels::", op, ": there is no memory for ", p.Tk, " keys; use shorter sequences");
    if (mask) set_mask(op, q, *mask, p);
    if (len_k) set_lengths(op, *len_k, p);
  }

  ScalarType acc() const { return accumulation_type(p.dtype); }

  void expect(const Tensor& t, const char* name, Shape shape) const {
    ops::expect(op, t, name, q.scalar_type(), shape, q);
  }
  const void* whole(Tensor& t, const char* name, Shape shape) const {
    expect(t, name, shape);
    lay_contiguously(t);
    return t.const_data_ptr();
  }
  Heads<const void*> rows(Tensor& t, const char* name, Shape shape) const {
    expect(t, name, shape);
    lay_last_dimension(t);
    return {t.const_data_ptr(), t.stride(0), 0, t.stride(1)};
  }
  static Heads<void*> written(const Tensor& t) { return {t.mutable_data_ptr(), t.stride(0), 0, t.stride(1)}; }
};

std::tuple<Tensor, Tensor> additive_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor w, OptionalTensor mask,
                                                  OptionalTensor len_k, bool need_weights) {
  const AdditiveCall call("additive_attention_fwd", q, k, v, w, mask, len_k);
  AdditiveAttentionFwdParams p{call.p};
  Tensor out = large_empty(q, {p.B, p.Tq, p.Dv});
  Tensor weights = need_weights ? large_empty(q, {p.B, p.Tq, p.Tk}) : none_like(q);
  p.out = call.written(out);
  if (need_weights) p.weights = weights.mutable_data_ptr();
  seqkernels::additive_attention_fwd(p);
  return {out, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> additive_attention_bwd(
    Tensor dout, OptionalTensor dweights, Tensor q, Tensor k, Tensor v, Tensor w, OptionalTensor mask,
    OptionalTensor len_k, bool need_dscores) {
  const AdditiveCall call("additive_attention_bwd", q, k, v, w, mask, len_k);
  AdditiveAttentionBwdParams p{call.p};
  p.dout = call.rows(dout, "dout", {p.B, p.Tq, p.Dv});
  if (dweights) p.dweights = call.whole(*dweights, "dweights", {p.B, p.Tq, p.Tk});
  Tensor dq = large_empty(q, q.sizes()), dk = large_empty(k, k.sizes()), dv = large_empty(v, v.sizes());
  Tensor dw = empty(w, w.sizes());
  Tensor dscores = need_dscores ? large_empty(q, {p.B, p.Tq, p.Tk}, call.acc()) : none_like(q, call.acc());
  p.dq = call.written(dq), p.dk = call.written(dk), p.dv = call.written(dv);
  p.dw = dw.mutable_data_ptr();
  if (need_dscores) p.dmask = dscores.mutable_data_ptr();
  seqkernels::additive_attention_bwd(p);
  return {dq, dk, dv, dw, dscores};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkernels, CPU, m) {
  impl_forward(m, "additive_attention_fwd", TORCH_BOX(&additive_attention_fwd));
  m.impl("additive_attention_bwd", TORCH_BOX(&additive_attention_bwd));
}

}  // namespace seqkernels::ops
