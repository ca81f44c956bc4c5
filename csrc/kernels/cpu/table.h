// One table of entry points for each instruction set; kernels.inl.h fills it, dispatch.h picks it.
#pragma once

#include "../additive_attention.h"
#include "../attention.h"
#include "../gru.h"
#include "../linear.h"
#include "../lstm.h"
#include "../rnn.h"

namespace seqkernels {

struct KernelTable {
  void (*lstm_fwd)(const LstmFwdParams&);
  void (*lstm_bwd)(const LstmBwdParams&);
  void (*gru_fwd)(const GruFwdParams&);
  void (*gru_bwd)(const GruBwdParams&);
  void (*rnn_fwd)(const RnnFwdParams&);
  void (*rnn_bwd)(const RnnBwdParams&);
  void (*attention_fwd)(const AttentionFwdParams&);
  void (*attention_bwd)(const AttentionBwdParams&);
  void (*attention_weights)(const AttentionWeightsParams&);
  void (*additive_attention_fwd)(const AdditiveAttentionFwdParams&);
  void (*additive_attention_bwd)(const AdditiveAttentionBwdParams&);
  void (*linear_fwd)(const LinearFwdParams&);
  void (*linear_bwd)(const LinearBwdParams&);
  // One layer's weights in panels, for LayerParams::panels: returns the bytes, writes unless out is null.
  int64_t (*lstm_pack)(const LayerParams&, void* out);
  int64_t (*gru_pack)(const LayerParams&, void* out);
  int64_t (*rnn_pack)(const LayerParams&, void* out);
  // Multiply-adds on registers only, n * 2 flops times the lanes; returns flops done. For the roofline of
  // reports.
  double (*fma_peak)(DType, int64_t n);
  // y[i] = f(x[i]) for f32 and f64, f: 0 sigmoid, 1 tanh. For tests of the vector functions.
  void (*activation)(int f, DType, const void* x, void* y, int64_t n);
};

// 64-byte aligned scratch; throws std::bad_alloc. Lives outside the ISA files, which must not pull in the C++
// library.
void* scratch_alloc(int64_t bytes);
void scratch_free(void*) noexcept;

}  // namespace seqkernels
