// Scaled dot-product attention without a Tq x Tk matrix in memory (online softmax: Milakov & Gimelshein 2018;
// tiles and backward: Dao et al. 2022):
//   S = softcap(scale Q K^T) - alibi |j - i - offset| + mask,   softcap(s) = cap tanh(s / cap)
//   P = softmax(S) over the keys that a query sees,   O = dropout(P) V,   LSE = log sum exp S
//
//   B sequences, Hq query heads share Hk key heads (head h reads h / (Hq / Hk)), Tq queries, Tk keys, D
//   features of queries and keys, Dv of values. Query i sees key j when -left <= j - i - offset <= right;
//   offset is 0, or Tk - Tq of that sequence when bottom_right. A query that sees no key gets O = 0, LSE =
//   -inf and no gradient. `acc` below means float, or double for f64.
#pragma once

#include "parallel.h"
#include "types.h"

namespace seqkernels {

// [B, H, T, features] by strides in elements; features lie side by side.
template <class Ptr>
struct Heads {
  Ptr data{};
  int64_t b = 0, h = 0, t = 0;
};

// Of P, behind the softmax: what stays is multiplied by 1 / (1 - probability), LSE knows nothing of it.
struct Dropout {
  uint64_t threshold = 0;  // of 2^32 numbers, those below take their weight away; 0: no dropout
  double factor = 1;
  uint64_t seed = 0, offset = 0;
  explicit operator bool() const { return threshold > 0; }
};

enum class MaskKind { none, boolean, additive, additive_acc };  // additive: `dtype`; additive_acc: acc

struct AttentionParams {
  DType dtype = DType::f32;
  int64_t B = 0, Hq = 0, Hk = 0, Tq = 0, Tk = 0, D = 0, Dv = 0;
  Heads<const void*> q, k, v;

  // Sequences of any length one after the other: sequence b has queries [cu_q[b], cu_q[b + 1]) and keys
  // [cu_k[b], cu_k[b + 1]) of row 0. Both or neither; Tq and Tk are then the longest.
  const int64_t *cu_q = nullptr, *cu_k = nullptr;  // [B + 1]
  const int64_t* len_k = nullptr;                  // [B] keys that are there, or null: all Tk (dense only)

  double scale = 1, softcap = 0;  // softcap 0: none
  int64_t left = INT64_MAX, right = INT64_MAX;
  bool bottom_right = false;

  MaskKind mask_kind = MaskKind::none;  // boolean: uint8, not zero where a query sees a key; dense only
  const void* mask = nullptr;           // [B, Hq, Tq, Tk] by strides in elements, 0 where it is broadcast
  int64_t mask_b = 0, mask_h = 0, mask_q = 0, mask_k = 0;
  const float* alibi = nullptr;  // slopes [B, Hq], or null
  int64_t alibi_b = 0;           // 0: the same for every sequence
  // acc [Hq]: a logit that takes part in every softmax and has no value, or null.
  const void* sinks = nullptr;
  Dropout dropout;

  Parallel parallel;
};

struct AttentionFwdParams : AttentionParams {
  Heads<void*> out{};   // [B, Hq, Tq, Dv]
  void* lse = nullptr;  // acc [B, Hq, Tq]; with cu_q [Hq, total queries]
};

struct AttentionBwdParams : AttentionParams {
  Heads<const void*> out{}, dout{};
  const void* lse = nullptr;   // from forward
  const void* dlse = nullptr;  // acc like lse, or null: zero
  Heads<void*> dq{}, dk{}, dv{};
  void* dmask = nullptr;   // acc, contiguous, the mask's own shape (1 where broadcast), or null: not wanted
  void* dsinks = nullptr;  // acc [Hq], or null
};

// dropout(P) [B, Hq, Tq, Tk], or its mean over heads [B, Tq, Tk]. Dense only, and without sinks.
struct AttentionWeightsParams : AttentionParams {
  void* weights = nullptr;  // `dtype`, contiguous
  bool mean = false;
};

void attention_fwd(const AttentionFwdParams&);
void attention_bwd(const AttentionBwdParams&);
void attention_weights(const AttentionWeightsParams&);

}  // namespace seqkernels
