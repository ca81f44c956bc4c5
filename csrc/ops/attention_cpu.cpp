// Attention on CPU tensors: checks, allocation, and the bridge to kernels/attention.h.
#include <algorithm>
#include <cmath>
#include <tuple>

#include "attention.h"

namespace seqkernels::ops {

namespace {

// One call, checked, its tensors laid as the kernels read them. Errors name the op, what was got and
// expected.
struct AttentionCall {
  const char* op;
  const Tensor& q;
  int64_t rows;  // of lse: B, or 1 with cu_q
  AttentionParams p;

  AttentionCall(const char* op_name, Tensor& q_, Tensor& k, Tensor* v, OptionalTensor& cu_q,
                OptionalTensor& cu_k, int64_t max_q = 0, int64_t max_k = 0)
      : op(op_name), q(q_) {
    p.dtype = dtype_of(op, "q", q);
    p.parallel = torch_threads();
    p.q = heads(q_, "q");
    p.k = heads(k, "k");
    rows = p.B = q.size(0), p.Hq = q.size(1), p.Tq = q.size(2), p.D = q.size(3);
    p.Hk = k.size(1), p.Tk = k.size(2);
    expect(k, "k", {p.B, p.Hk, p.Tk, p.D});
    if (v) {
      p.v = heads(*v, "v");
      p.Dv = v->size(3);
      expect(*v, "v", {p.B, p.Hk, p.Tk, p.Dv});
    }
    STD_TORCH_CHECK(p.Hk > 0 ? p.Hq % p.Hk == 0 : p.Hq == 0, "seqkernels::", op,
                    ": expected a number of query heads that is a multiple of the key heads, got ", p.Hq,
                    " and ", p.Hk);
    STD_TORCH_CHECK(cu_q.has_value() == cu_k.has_value(), "seqkernels::", op,
                    ": expected cu_q and cu_k both or neither, got ", cu_q ? "cu_q" : "cu_k", " alone");
    if (!cu_q) return;
    STD_TORCH_CHECK(rows == 1, "seqkernels::", op, ": expected q of one row with cu_q, got ", rows);
    p.B = cu_q->dim() == 1 ? cu_q->size(0) - 1 : -1;
    p.cu_q = offsets(*cu_q, "cu_q", p.Tq, max_q);
    p.cu_k = offsets(*cu_k, "cu_k", p.Tk, max_k);
  }

  void expect(const Tensor& t, const char* name, Shape shape) const {
    ops::expect(op, t, name, q.scalar_type(), shape, q);
  }
  ScalarType acc() const { return accumulation_type(p.dtype); }

  Heads<const void*> heads(Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == q.scalar_type() && t.dim() == 4, "seqkernels::", op,
                    ": expected ", name, " of 4 dimensions on the CPU, of the dtype of q, got ", text(t));
    lay_last_dimension(t);
    return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
  }
  // What the ops hand out: [B, T, H, features] in memory.
  Heads<void*> by_tokens(const Tensor& t) const {
    return {t.mutable_data_ptr(), t.stride(0), t.stride(2), t.stride(1)};
  }
  Heads<const void*> read_by_tokens(Tensor& t, const char* name, Shape shape) const {
    const Heads<const void*> h = heads(t, name);
    expect(t, name, shape);
    return {h.data, h.b, h.t, h.h};
  }

  // [S + 1] from 0 to the number of tokens, never falling; `longest` in: tokens, out: of one sequence, no
  // more than `most` if that is given, as on a GPU rows beyond would have no program.
  const int64_t* offsets(Tensor& t, const char* name, int64_t& longest, int64_t most) const {
    STD_TORCH_CHECK(
        t.is_cpu() && t.scalar_type() == ScalarType::Long && t.dim() == 1 && t.size(0) == p.B + 1 && p.B >= 0,
        "seqkernels::", op, ": expected ", name, " as int64 [",
        p.B >= 0 ? std::to_string(p.B + 1) : "sequences + 1", "] on the CPU, got ", text(t));
    lay_contiguously(t);
    const int64_t *at = t.const_data_ptr<int64_t>(), tokens = longest;
    STD_TORCH_CHECK(at[0] == 0 && at[p.B] == tokens, "seqkernels::", op, ": expected ", name,
                    " to rise from 0 to the ", tokens, " tokens, got ", at[0], " to ", at[p.B]);
    longest = 0;
    for (int64_t i = 0; i < p.B; i++) {
      STD_TORCH_CHECK(at[i] <= at[i + 1], "seqkernels::", op, ": expected ", name, " to rise, got ", at[i],
                      " before ", at[i + 1], " at ", i + 1);
      longest = std::max(longest, at[i + 1] - at[i]);
    }
    STD_TORCH_CHECK(most == 0 || longest <= most, "seqkernels::", op, ": expected ", name,
                    " of sequences no longer than max_", name[3], " = ", most, ", got one of ", longest);
    return at;
  }

  const void* read(Tensor& t, const char* name, Shape shape) const {
    ops::expect(op, t, name, acc(), shape, q);
    lay_contiguously(t);
    return t.const_data_ptr();
  }

  void visibility(double scale, double softcap, int64_t left, int64_t right, bool bottom_right) {
    p.scale = scale, p.softcap = softcap, p.left = left, p.right = right, p.bottom_right = bottom_right;
  }
  // rng: seed and offset.
  void dropout(double probability, OptionalTensor& rng) {
    STD_TORCH_CHECK(probability >= 0 && probability <= 1, "seqkernels::", op,
                    ": expected a dropout between 0 and 1, got ", probability);
    if (probability == 0) return;
    STD_TORCH_CHECK(rng && rng->is_cpu() && rng->scalar_type() == ScalarType::Long && rng->numel() == 2,
                    "seqkernels::", op, ": expected rng as int64 [2] on the CPU with dropout, got ",
                    rng ? text(*rng) : "none");
    lay_contiguously(*rng);
    const int64_t* state = rng->const_data_ptr<int64_t>();
    constexpr double kNumbers = 4294967296.0;  // of 32 bits
    p.dropout.threshold =
        static_cast<uint64_t>(std::min(std::nearbyint(probability * kNumbers), kNumbers - 1));
    p.dropout.factor = probability < 1 ? 1 / (1 - probability) : 0;
    p.dropout.seed = static_cast<uint64_t>(state[0]), p.dropout.offset = static_cast<uint64_t>(state[1]);
  }

  void modifiers(const OptionalTensor& mask, OptionalTensor& len_k, OptionalTensor& alibi, Tensor* sinks) {
    STD_TORCH_CHECK(!p.cu_q || (!mask && !len_k), "seqkernels::", op,
                    ": expected no mask and no len_k with cu_q");
    if (mask) set_mask(op, q, *mask, p);
    if (len_k) set_lengths(op, *len_k, p);
    if (alibi) {
      if (alibi->dim() == 1)
        ops::expect(op, *alibi, "alibi", ScalarType::Float, {p.Hq}, q);
      else
        ops::expect(op, *alibi, "alibi", ScalarType::Float, {p.B, p.Hq}, q), p.alibi_b = p.Hq;
      lay_contiguously(*alibi);
      p.alibi = alibi->const_data_ptr<float>();
    }
    if (sinks) p.sinks = read(*sinks, "sinks", {p.Hq});
  }
};

std::tuple<Tensor, Tensor> attention_fwd(Tensor q, Tensor k, Tensor v, OptionalTensor mask,
                                         OptionalTensor cu_q, OptionalTensor cu_k, OptionalTensor len_k,
                                         OptionalTensor alibi, OptionalTensor sinks, double scale,
                                         double softcap, int64_t left, int64_t right, bool bottom_right,
                                         double dropout, OptionalTensor rng, int64_t max_q, int64_t max_k) {
  AttentionCall call("attention_fwd", q, k, &v, cu_q, cu_k, max_q, max_k);
  call.visibility(scale, softcap, left, right, bottom_right);
  call.dropout(dropout, rng);
  call.modifiers(mask, len_k, alibi, sinks ? &*sinks : nullptr);
  Tensor out = large_empty(q, {call.rows, q.size(2), call.p.Hq, call.p.Dv});
  Tensor lse = empty(q, {call.rows, call.p.Hq, q.size(2)}, call.acc());
  AttentionFwdParams p{call.p};
  p.out = call.by_tokens(out);
  p.lse = lse.mutable_data_ptr();
  seqkernels::attention_fwd(p);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    Tensor dout, OptionalTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    OptionalTensor mask, OptionalTensor cu_q, OptionalTensor cu_k, OptionalTensor len_k, OptionalTensor alibi,
    OptionalTensor sinks, double scale, double softcap, int64_t left, int64_t right, bool bottom_right,
    double dropout, OptionalTensor rng, int64_t max_q, int64_t max_k, bool need_dmask) {
  if (mask && need_dmask) lay_contiguously(*mask);  // a gradient for each element, those of one place too
  AttentionCall call("attention_bwd", q, k, &v, cu_q, cu_k, max_q, max_k);
  call.visibility(scale, softcap, left, right, bottom_right);
  call.dropout(dropout, rng);
  call.modifiers(mask, len_k, alibi, sinks ? &*sinks : nullptr);
  const int64_t tokens_q = q.size(2), tokens_k = k.size(2);
  AttentionBwdParams p{call.p};
  p.out = call.read_by_tokens(out, "out", {call.rows, tokens_q, p.Hq, p.Dv});
  p.dout = call.read_by_tokens(dout, "dout", {call.rows, tokens_q, p.Hq, p.Dv});
  p.lse = call.read(lse, "lse", {call.rows, p.Hq, tokens_q});
  if (dlse) p.dlse = call.read(*dlse, "dlse", {call.rows, p.Hq, tokens_q});
  STD_TORCH_CHECK(!need_dmask || (mask && p.mask_kind != MaskKind::boolean), "seqkernels::attention_bwd",
                  ": expected a float mask where its gradient is wanted");
  Tensor dq = large_empty(q, {call.rows, tokens_q, p.Hq, p.D});
  Tensor dk = large_empty(q, {call.rows, tokens_k, p.Hk, p.D});
  Tensor dv = large_empty(q, {call.rows, tokens_k, p.Hk, p.Dv});
  Tensor dmask = need_dmask ? large_empty(q, mask->sizes(), call.acc()) : none_like(q, call.acc());
  Tensor dsinks = sinks ? empty(*sinks, {p.Hq}) : none_like(q, call.acc());
  p.dq = call.by_tokens(dq), p.dk = call.by_tokens(dk), p.dv = call.by_tokens(dv);
  if (need_dmask) p.dmask = dmask.mutable_data_ptr();
  if (sinks) p.dsinks = dsinks.mutable_data_ptr();
  seqkernels::attention_bwd(p);
  return {dq, dk, dv, dmask, dsinks};
}

// The LSE is for GPUs, where a program sees one tile of the keys.
Tensor attention_weights(Tensor q, Tensor k, Tensor /*lse*/, OptionalTensor mask, OptionalTensor len_k,
                         OptionalTensor alibi, double scale, double softcap, int64_t left, int64_t right,
                         bool bottom_right, double dropout, OptionalTensor rng, bool mean) {
  OptionalTensor none;
  AttentionCall call("attention_weights", q, k, nullptr, none, none);
  call.visibility(scale, softcap, left, right, bottom_right);
  call.dropout(dropout, rng);
  call.modifiers(mask, len_k, alibi, nullptr);
  AttentionWeightsParams p{call.p};
  std::vector<int64_t> shape{p.B, p.Tq, p.Tk};
  if (!mean) shape.insert(shape.begin() + 1, p.Hq);
  Tensor weights = large_empty(q, shape);
  p.weights = weights.mutable_data_ptr();
  p.mean = mean;
  seqkernels::attention_weights(p);
  return weights;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(seqkernels, CPU, m) {
  impl_forward(m, "attention_fwd", TORCH_BOX(&attention_fwd));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd));
  impl_forward(m, "attention_weights", TORCH_BOX(&attention_weights));
}

}  // namespace seqkernels::ops
