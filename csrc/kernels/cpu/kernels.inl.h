// The body of every ISA file: included inside its anonymous namespace, so that each instruction set has its
// own copies.

#include "additive_attention.inl.h"
#include "attention_bwd.inl.h"
#include "attention_fwd.inl.h"
#include "gru.inl.h"
#include "linear.inl.h"
#include "lstm.inl.h"
#include "rnn.inl.h"
#include "step_fwd.inl.h"

// What the products of storage type S are made of, on registers only. 24 independent chains
// where there are 32 vector registers (AVX-512, NEON), else 12: as many as a tile has accumulators, more than
// enough for two units of 4 cycles latency. AMX has 4 tiles of sums. Returns the flops done.
template <class S>
static double fma_peak(int64_t n) {
  using T = Acc<S>;
  constexpr int kChains = 2 * MR;
#if defined(__AMX_BF16__)
  if constexpr (kDepth<Operand<S>> == 32) {
    shape_tiles(16, 16);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t k = 0; k < n; k++) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    release_tiles();
    return 4.0 * double(n) * (2 * 16 * 16 * 32);
  }
#endif
#if defined(__AVX512BF16__)
  if constexpr (kPair<Operand<S>> == 2) {
    __m512 sums[kChains];
    __m512bh ones = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    __asm__ volatile("" : "+v"(ones));
    SEQ_UNROLL for (int i = 0; i < kChains; i++) {  // or the compiler sees that all chains are the same one
      sums[i] = _mm512_setzero_ps();
      __asm__ volatile("" : "+v"(sums[i]));
    }
    for (int64_t k = 0; k < n; k++) {
      SEQ_UNROLL for (int i = 0; i < kChains; i++) sums[i] = _mm512_dpbf16_ps(sums[i], ones, ones);
    }
    SEQ_UNROLL for (int i = 0; i < kChains; i++) __asm__ volatile("" : : "v"(sums[i]));
    return 2.0 * double(n) * kChains * 2 * kLanes<T>;
  }
#endif
  Vec<T> a[kChains], b = splat(T(1) - T(1) / 1024), c = splat(T(1) / 1024);
  SEQ_UNROLL for (int i = 0; i < kChains; i++) a[i] = splat(T(i));
  for (int64_t k = 0; k < n; k++) {
    SEQ_UNROLL for (int i = 0; i < kChains; i++) a[i] = a[i] * b + c;
  }
  Vec<T> sum{};
  SEQ_UNROLL for (int i = 0; i < kChains; i++) sum += a[i];
  volatile T sink = sum[0];
  (void)sink;
  return 2.0 * double(n) * kChains * kLanes<T>;
}

template <class T>
static void activation(int f, const T* x, T* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vec<T> v = load(x + i, n - i);
    store(y + i, f == 0 ? sigmoid<T>(v) : tanh<T>(v), n - i);
  }
}

// Calls fn.template operator()<S>() with the storage type of `dtype`. Instruction sets that add bf16 have
// kernels of no other type: those are AVX-512's (dispatch.cpp).
template <class Fn>
static auto with_storage([[maybe_unused]] DType dtype, const Fn& fn) {
#if defined(__AVX512BF16__)
  return fn.template operator()<bf16>();
#else
  switch (dtype) {
    case DType::f64:
      return fn.template operator()<double>();
    case DType::bf16:
      return fn.template operator()<bf16>();
    case DType::f16:
      return fn.template operator()<f16>();
    default:
      return fn.template operator()<float>();
  }
#endif
}

template <class Cell>
static void fwd_entry(const typename Cell::FwdParams& p) {
  with_storage(p.dtype, [&]<class S>() {
    if (StepFwd<Cell, S>::fits(p))
      StepFwd<Cell, S>(p).run();
    else
      layer_fwd<Cell, S>(p);
  });
}
template <class Cell>
static void bwd_entry(const typename Cell::BwdParams& p) {
  with_storage(p.dtype, [&]<class S>() { layer_bwd<Cell, S>(p); });
}

// Weights packed ahead of time, for LayerParams::panels. Returns the bytes; writes unless out is null.
template <class Cell>
static int64_t pack_entry(const LayerParams& p, void* out) {
  return with_storage(p.dtype, [&]<class S>() {
    using O = Operand<S>;
    ForwardWeights<Cell, S> weights(p);
    for (int d = 0; out && d < p.D; d++) {
      weights.panels[d] = static_cast<O*>(out) + d * weights.size();
      weights.pack_panels(d, 0, 1);
    }
    return int64_t(sizeof(O)) * p.D * weights.size();
  });
}

static double fma_peak_entry(DType dtype, int64_t n) {
  return with_storage(dtype, [&]<class S>() { return fma_peak<S>(n); });
}

static void activation_entry(int f, DType dtype, const void* x, void* y, int64_t n) {
  if (dtype == DType::f64)
    activation(f, static_cast<const double*>(x), static_cast<double*>(y), n);
  else
    activation(f, static_cast<const float*>(x), static_cast<float*>(y), n);
}

static const KernelTable kTable = {
    .lstm_fwd = fwd_entry<Lstm>,
    .lstm_bwd = bwd_entry<Lstm>,
    .gru_fwd = fwd_entry<Gru>,
    .gru_bwd = bwd_entry<Gru>,
    .rnn_fwd = fwd_entry<Rnn>,
    .rnn_bwd = bwd_entry<Rnn>,
    .attention_fwd = [](const auto& p) { with_storage(p.dtype, [&]<class S>() { attention_fwd<S>(p); }); },
    .attention_bwd = [](const auto& p) { with_storage(p.dtype, [&]<class S>() { attention_bwd<S>(p); }); },
    .attention_weights =
        [](const auto& p) { with_storage(p.dtype, [&]<class S>() { attention_weights<S>(p); }); },
    .additive_attention_fwd =
        [](const auto& p) { with_storage(p.dtype, [&]<class S>() { additive_attention_fwd<S>(p); }); },
    .additive_attention_bwd =
        [](const auto& p) { with_storage(p.dtype, [&]<class S>() { additive_attention_bwd<S>(p); }); },
    .linear_fwd = [](const auto& p) { with_storage(p.dtype, [&]<class S>() { linear_fwd<S>(p); }); },
    .linear_bwd = [](const auto& p) { with_storage(p.dtype, [&]<class S>() { linear_bwd<S>(p); }); },
    .lstm_pack = pack_entry<Lstm>,
    .gru_pack = pack_entry<Gru>,
    .rnn_pack = pack_entry<Rnn>,
    .fma_peak = fma_peak_entry,
    .activation = activation_entry,
};
