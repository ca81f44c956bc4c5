// Products x w^T for a handful of rows of x: packing w would cost more than the product, so weights and keys
// are read as they lie.
//
// W dot products at a time, of `rows` rows of x with W / rows rows of w, and W sums by one tree of
// interleaved additions. The rows of w pass by in the order of memory, which is what hardware prefetches.
// With AVX-512 part of x stays in registers for eight of them: 210 to 260 GB/s from L2 and 120 to 130 from L3
// (Zen 5), the limit of one row; with one vector of eight rows in turn it was 125 and 105. Registers of 32
// bytes hold too little of x: one row of w after the other, x from L1 each time, is 1.4 to 1.6 times as fast
// from memory, 1.1 to 1.3 from L2 and L3 (Zen 4, LSTM of 512 units, 1 to 4 rows; by now it reads memory at
// 70 % of what a loop of nothing but loads reaches). Four rows share what is read; 16 cost as much as
// packing.
#pragma once

#include "gemm.inl.h"

// The elements of one product.
template <class S>
constexpr int64_t kStep = kLanes<Acc<S>> * kPair<Operand<S>>;
template <class S>
SEQ_INLINE auto factors(const S* x) {
  return load(x);
}
template <class V>
SEQ_INLINE void multiply_add(V& acc, V a, V b) {
  acc += a * b;
}
#if defined(__AVX512BF16__)
SEQ_INLINE auto factors(const bf16* x) { return (__m512bh)_mm512_loadu_si512(x); }
SEQ_INLINE void multiply_add(Vec<float>& acc, __m512bh a, __m512bh b) {
  acc = (Vec<float>)_mm512_dpbf16_ps((__m512)acc, a, b);
}
#endif

// Rows of w at a time: as many addresses as the processor has registers for.
template <class S, int rows>
constexpr int kGroup = kLanes<Acc<S>> / rows < 8 ? kLanes<Acc<S>> / rows : 8;

// acc[r * W / rows + i] += x[r] w[i] along N * kStep elements from k on; w + ahead is read soon.
template <int rows, int N, class S, class X>
SEQ_INLINE void dots_part(const S* const (&w)[kGroup<S, rows>], int64_t ahead, const X* x, int64_t ldx,
                          int64_t k, Vec<Acc<S>>* acc) {
  decltype(factors(x)) v[rows][N];
  SEQ_UNROLL for (int r = 0; r < rows; r++) SEQ_UNROLL for (int n = 0; n < N; n++) v[r][n] =
      factors(x + r * ldx + k + n * kStep<S>);
  SEQ_UNROLL for (int i = 0; i < kGroup<S, rows>; i++) SEQ_UNROLL for (int n = 0; n < N; n++) {
    const S* from = w[i] + k + n * kStep<S>;
    const auto one = factors(from);
    __builtin_prefetch(from + ahead);
    SEQ_UNROLL for (int r = 0; r < rows; r++)
        multiply_add(acc[r * (kLanes<Acc<S>> / rows) + i], one, v[r][n]);
  }
}

// The same along what is left of K.
template <int rows, int N, class S, class X>
SEQ_INLINE void dots_along(const S* const (&w)[kGroup<S, rows>], int64_t ahead, const X* x, int64_t ldx,
                           int64_t k, int64_t K, Vec<Acc<S>>* acc) {
  for (; k + N * kStep<S> <= K; k += N * kStep<S>) dots_part<rows, N>(w, ahead, x, ldx, k, acc);
  if constexpr (N > 1) return dots_along<rows, N / 2>(w, ahead, x, ldx, k, K, acc);
  constexpr int W = kLanes<Acc<S>>;
  for (; k < K; k += W) SEQ_UNROLL for (int i = 0; i < kGroup<S, rows>; i++) {
      const Vec<Acc<S>> one = load(w[i] + k, K - k);
      SEQ_UNROLL for (int r = 0; r < rows; r++) acc[r * (W / rows) + i] += one * load(x + r * ldx + k, K - k);
    }
}

// Narrow vectors of what needs no conversion, that of x would be made for each row of w.
template <class S>
constexpr bool kRowAfterRow = SEQKERNELS_VEC_BYTES < 64 && sizeof(S) >= 4;

// `dots` so; no prefetch: that of hardware alone is 1.2 times as fast.
template <int rows, class S, class X>
SEQ_INLINE void dots_row_after_row(const S* w, int64_t ldw, int64_t n, const X* x, int64_t ldx, int64_t K,
                                   Vec<Acc<S>> (&acc)[kLanes<Acc<S>>]) {
  using T = Acc<S>;
  constexpr int W = kLanes<T>, U = 8 / rows;  // sums enough for the latency of an addition
  for (int i = 0; i < W / rows; i++) {
    const S* row = w + (i < n ? i : n - 1) * ldw;
    Vec<T> sum[rows][U] = {};
    int64_t k = 0;
    for (; k + U * W <= K; k += U * W) SEQ_UNROLL for (int u = 0; u < U; u++) {
        const Vec<T> one = load(row + k + u * W);
        SEQ_UNROLL for (int r = 0; r < rows; r++) sum[r][u] += one * load(x + r * ldx + k + u * W);
      }
    for (; k < K; k += W) {
      const Vec<T> one = load(row + k, K - k);
      SEQ_UNROLL for (int r = 0; r < rows; r++) sum[r][0] += one * load(x + r * ldx + k, K - k);
    }
    SEQ_UNROLL for (int r = 0; r < rows; r++) {
      SEQ_UNROLL for (int u = 1; u < U; u++) sum[r][0] += sum[r][u];
      acc[r * (W / rows) + i] += sum[r][0];
    }
  }
}

// The same along all of K, for W / rows rows of w, ldw apart; those at and beyond n repeat the last one.
template <int rows, class S, class X>
SEQ_INLINE void dots(const S* w, int64_t ldw, int64_t n, int64_t ahead, const X* x, int64_t ldx, int64_t K,
                     Vec<Acc<S>> (&acc)[kLanes<Acc<S>>]) {
  constexpr int W = kLanes<Acc<S>>;
  if constexpr (kRowAfterRow<S>) return dots_row_after_row<rows>(w, ldw, n, x, ldx, K, acc);
  constexpr int N = rows < 4 && W / 2 > rows ? W / 2 / rows : 1;  // sums and x fit the registers
  SEQ_UNROLL for (int i0 = 0; i0 < W / rows; i0 += kGroup<S, rows>) {
    const S* row[kGroup<S, rows>];
    for (int i = 0; i < kGroup<S, rows>; i++) row[i] = w + (i0 + i < n ? i0 + i : n - 1) * ldw;
    dots_along<rows, N>(row, ahead, x, ldx, 0, K, acc + i0);
  }
}

// Lane r of the result is the sum over the lanes of v[r].
template <class T>
SEQ_INLINE Vec<T> sum_lanes(Vec<T> (&v)[kLanes<T>]) {
  constexpr int W = kLanes<T>;
  SEQ_UNROLL for (int n = W; n > 1; n /= 2) {
    SEQ_UNROLL for (int i = 0; i < n / 2; i++) {
      Vec<T> lo, hi;
      interleave<T>(v[i], v[i + n / 2], lo, hi, std::make_integer_sequence<int, W>{});
      v[i] = lo + hi;
    }
  }
  return v[0];
}

// fn<rows>(m) for the rows [0, M): by four (or as many as lanes), two and one.
template <class T, class Fn>
SEQ_INLINE void by_rows(int64_t M, const Fn& fn) {
  constexpr int kMost = kLanes<T> < 4 ? kLanes<T> : 4;
  int64_t m = 0;
  for (; m + kMost <= M; m += kMost) fn.template operator()<kMost>(m);
  if (kMost > 2 && m + 2 <= M) fn.template operator()<2>(m), m += 2;
  if (m < M) fn.template operator()<1>(m);
}

// One of the products x w^T that are added up, for rows of x and w; w + ahead is read soon.
template <class S, class X>
struct Term {
  const S* w;
  int64_t ldw;
  const X* x;
  int64_t ldx, K;
  int64_t ahead = 1024 / int64_t(sizeof(S));
};
template <int rows, class T, class... Terms>
static void direct_rows(int64_t m, int64_t n, T* c, int64_t ldc, const Terms&... terms) {
  constexpr int W = kLanes<T>, columns = W / rows;
  for (int64_t j = 0; j < n; j += columns) {
    Vec<T> acc[W] = {};
    (dots<rows>(terms.w + j * terms.ldw, terms.ldw, n - j, terms.ahead, terms.x + m * terms.ldx, terms.ldx,
                terms.K, acc),
     ...);
    const Vec<T> sums = sum_lanes<T>(acc);
    SEQ_UNROLL for (int r = 0; r < rows; r++) __builtin_memcpy(
        c + (m + r) * ldc + j, reinterpret_cast<const T*>(&sums) + r * columns, columns * sizeof(T));
  }
  for (int64_t j = round_up(n, columns); j < round_up(n, W); j++)
    for (int r = 0; r < rows; r++) c[(m + r) * ldc + j] = T(0);
}
// c [M, n] = the sum of `terms`. Columns up to the next whole vector are written too, and mean nothing.
template <class T, class... Terms>
static void direct_products(int64_t M, int64_t n, T* c, int64_t ldc, const Terms&... terms) {
  by_rows<T>(M, [&]<int rows>(int64_t m) { direct_rows<rows>(m, n, c, ldc, terms...); });
}

// C = x W_ih^T + h W_hh^T + biases of all gates, `gate` columns apart, for rows of x and h and units
// [u, u + units); Q keeps the split gate's W_hh h + b_hh.
template <class Cell, class S, class H>
static void direct_gates(const LayerParams& p, int d, int64_t u, int64_t units, int64_t rows, const S* x,
                         const H* h, int64_t ldh, Acc<S>* C, int64_t ldc, int64_t gate, Acc<S>* Q) {
  using T = Acc<S>;
  const Weights<const void*>& w = p.w[d];
  const S *w_ih = static_cast<const S*>(w.w_ih), *w_hh = static_cast<const S*>(w.w_hh);
  for (int g = 0; g < Cell::kGates; g++) {
    const int64_t row = g * p.H + u;
    const Term<S, S> input{w_ih + row * p.I, p.I, x, p.x_b, p.I};
    const Term<S, H> state{w_hh + row * p.P, p.P, h, ldh, p.P};
    const auto add = [&](T* to, int64_t ld, const void* b) {
      for (int64_t i = 0; b && i < units; i += kLanes<T>) {
        const Vec<T> bias = load(static_cast<const S*>(b) + row + i, units - i);
        for (int64_t r = 0; r < rows; r++) store(to + r * ld + i, load(to + r * ld + i) + bias);
      }
    };
    T* c = C + g * gate;
    if (g == Cell::kSplitGate) {
      direct_products(rows, units, c, ldc, input);
      direct_products(rows, units, Q, NR<T>, state);
      add(c, ldc, w.b_ih), add(Q, NR<T>, w.b_hh);
    } else {
      direct_products(rows, units, c, ldc, input, state);
      add(c, ldc, w.b_ih), add(c, ldc, w.b_hh);
    }
  }
}
