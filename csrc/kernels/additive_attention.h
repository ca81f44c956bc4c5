// Additive attention (Bahdanau, Cho & Bengio 2015) without a Tq x Tk x D tensor in memory:
//   S[i, j] = sum over h of w[h] tanh(q[i, h] + k[j, h]) + mask[i, j]
//   P = softmax(S) over the keys that a query sees,   O = P V
//
//   B sequences, Tq queries, Tk keys, D features of queries and keys, Dv of values. Of AttentionParams
//   there is one head, Hq = Hk = 1, and no scale, softcap, alibi, sinks, limits or cu. A query that sees no
//   key gets O = 0, P = 0 and no gradient. `acc` below means float, or double for f64.
#pragma once

#include "attention.h"

namespace seqkernels {

struct AdditiveAttentionParams : AttentionParams {
  const void* w = nullptr;  // [D]
};

struct AdditiveAttentionFwdParams : AdditiveAttentionParams {
  Heads<void*> out{};       // [B, 1, Tq, Dv]
  void* weights = nullptr;  // P [B, Tq, Tk] of `dtype`, or null: not wanted
};

struct AdditiveAttentionBwdParams : AdditiveAttentionParams {
  Heads<const void*> dout{};
  const void* dweights = nullptr;  // `dtype` [B, Tq, Tk], or null: zero
  Heads<void*> dq{}, dk{}, dv{};
  void* dw = nullptr;     // `dtype` [D]
  void* dmask = nullptr;  // dS: acc [B, Tq, Tk], or null: not wanted
};

void additive_attention_fwd(const AdditiveAttentionFwdParams&);
void additive_attention_bwd(const AdditiveAttentionBwdParams&);

}  // namespace seqkernels
