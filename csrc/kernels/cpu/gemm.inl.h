// The packed matrix product that projection, recurrence and gradients share.
//
//   C [M, N] = init + A [M, K] B [K, N],  B in panels of NR = 2 vectors: panel j is [K, NR], so a tile
//   streams it once.
//
// A register tile is MR rows x 2 vectors: with AVX-512 12 x 2 accumulators + 2 of B + 1 broadcast of A fill
// 27 of 32 registers and every 24 FMAs need 14 loads, half of what the two load ports give. M rows are cut
// into equal tiles (16 = 8 + 8, not 12 + 4). Tiles with few rows keep KU sets of accumulators, because an FMA
// takes 4 cycles and two start in each. K is cut into blocks of KC, so that a panel block (32 KiB) stays in
// L1 for all row tiles. Measured: 94 % of the FMA peak with operands in L1, 90 % with panels in L2.
#pragma once

#include "vec.h"

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MR = 12;  // 32 vector registers
#else
constexpr int MR = 6;  // 16
#endif
template <class T>
constexpr int NR = 2 * kLanes<T>;
constexpr int64_t KC = 256;
constexpr int64_t kAhead =
    16;  // rows of B prefetched: 2 KiB, some 150 cycles; +10 % where panels come from L3

// One tile of `rows` x NV vectors. init rows step by ldi (0: the same bias for all rows; null: zero).
// AT: A is a packed tile, element (r, k) at a[k * MR + r]; lda unused.
template <class T>
using TileFn = void (*)(int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb, const T* init,
                        int64_t ldi, T* c, int64_t ldc);

template <class T, int rows, int NV, bool AT>
static void tile(int64_t K, const T* __restrict a, int64_t lda, const T* __restrict b, int64_t ldb,
                 const T* init, int64_t ldi, T* c, int64_t ldc) {
  constexpr int W = kLanes<T>, KU = rows == 1 ? 4 : rows <= 3 ? 2 : 1, kBases = (rows + 2) / 3;
  Vec<T> acc[KU][rows][NV] = {};
  if (init) {
    SEQ_UNROLL for (int r = 0; r < rows; r++) SEQ_UNROLL for (int v = 0; v < NV; v++) acc[0][r][v] =
        load(init + r * ldi + v * W);
  }
  // Three rows share one base pointer: x86 addresses base, base + lda and base + 2 lda for free.
  const T* base[kBases];
  SEQ_UNROLL for (int i = 0; i < kBases; i++) base[i] = AT ? a + 3 * i : a + 3 * i * lda;
  auto step = [&](int u) __attribute__((always_inline)) {
    Vec<T> bv[NV];
    SEQ_UNROLL for (int v = 0; v < NV; v++) bv[v] = load(b + v * W);
    if constexpr (rows >= 5) {  // with fewer rows the loads themselves run ahead
      SEQ_UNROLL for (int v = 0; v < NV; v++) __builtin_prefetch(b + kAhead * ldb + v * W);
    }
    SEQ_UNROLL for (int r = 0; r < rows; r++) {
      T s = AT ? base[r / 3][r % 3] : base[r / 3][(r % 3) * lda];
      SEQ_UNROLL for (int v = 0; v < NV; v++) acc[u][r][v] += s * bv[v];
    }
    b += ldb;
    SEQ_UNROLL for (int i = 0; i < kBases; i++) base[i] += AT ? MR : 1;
  };
  int64_t k = 0;
  if constexpr (KU > 1) {
    for (; k + KU <= K; k += KU) {
      SEQ_UNROLL for (int u = 0; u < KU; u++) step(u);
    }
  }
  _Pragma("GCC unroll 1") for (; k < K; k++) step(0);
  SEQ_UNROLL for (int r = 0; r < rows; r++) SEQ_UNROLL for (int v = 0; v < NV; v++) {
    Vec<T> sum = acc[0][r][v];
    SEQ_UNROLL for (int u = 1; u < KU; u++) sum += acc[u][r][v];
    store(c + r * ldc + v * W, sum);
  }
}

template <class T, bool AT, int... r>
constexpr TileFn<T> tile_of(int vectors, int rows, std::integer_sequence<int, r...>) {
  constexpr TileFn<T> one[] = {tile<T, r + 1, 1, AT>...}, two[] = {tile<T, r + 1, 2, AT>...};
  return vectors == 1 ? one[rows - 1] : two[rows - 1];
}

// C [M, width] = init + A panel. `width` is the panel's: NR, or half of it for the last panel.
template <class T>
static void gemm_panel(int64_t M, int64_t width, int64_t K, const T* a, int64_t lda, const T* b, int64_t ldb,
                       const T* init, int64_t ldi, T* c, int64_t ldc) {
  const int64_t tiles = (M + MR - 1) / MR, kc = tiles > 1 ? KC : K;
  int64_t k0 = 0;
  do {
    const int64_t k = K - k0 < kc ? K - k0 : kc;
    for (int64_t i = 0; i < tiles; i++) {
      const int64_t m = M * i / tiles, rows = M * (i + 1) / tiles - m;
      const T* from = k0 ? c + m * ldc : init ? init + m * ldi : nullptr;
      tile_of<T, false>(int(width / kLanes<T>), int(rows), std::make_integer_sequence<int, MR>{})(
          k, a + m * lda + k0, lda, b + k0 * ldb, ldb, from, k0 ? ldc : ldi, c + m * ldc, ldc);
    }
    k0 += k;
  } while (k0 < K);
}

// C [M, width] (+)= A^T B where A [K, M] lies in tiles of MR columns, each [K, MR] (pack_tiles).
template <class T>
static void gemm_tiles(int64_t M, int64_t width, int64_t K, const T* a, const T* b, int64_t ldb, bool add,
                       T* c, int64_t ldc) {
  int64_t k0 = 0;
  do {
    const int64_t k = K - k0 < KC ? K - k0 : KC;
    for (int64_t m = 0; m < M; m += MR) {
      const int64_t rows = M - m < MR ? M - m : MR;
      tile_of<T, true>(int(width / kLanes<T>), int(rows), std::make_integer_sequence<int, MR>{})(
          k, a + m * K + k0 * MR, 0, b + k0 * ldb, ldb, k0 || add ? c + m * ldc : nullptr, ldc, c + m * ldc,
          ldc);
    }
    k0 += k;
  } while (k0 < K);
}

// Panels
// ------------------------------------------------------------------------------------------------------------

SEQ_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// N columns in panels: all NR wide but the last, which is W wide where that suffices.
template <class T>
struct Panels {
  int64_t N, K;
  int64_t count() const { return (N + NR<T> - 1) / NR<T>; }
  int64_t padded() const { return round_up(N, kLanes<T>); }
  int64_t width(int64_t j) const { return padded() - j * NR<T> < NR<T> ? padded() - j * NR<T> : NR<T>; }
  int64_t offset(int64_t j) const { return j * NR<T> * K; }
  int64_t size() const { return padded() * K; }
};

// W x W transposition in log2(W) rounds of interleaving row i with row i + W/2.
template <class T, int... i>
SEQ_INLINE void interleave(Vec<T> a, Vec<T> b, Vec<T>& lo, Vec<T>& hi, std::integer_sequence<int, i...>) {
  constexpr int W = kLanes<T>;
  lo = __builtin_shufflevector(a, b, (i / 2 + (i % 2) * W)...);
  hi = __builtin_shufflevector(a, b, (W / 2 + i / 2 + (i % 2) * W)...);
}
template <class T>
SEQ_INLINE void transpose(Vec<T> (&v)[kLanes<T>]) {
  constexpr int W = kLanes<T>;
  Vec<T> w[W];
  SEQ_UNROLL for (int round = 1; round < W; round *= 2) {
    SEQ_UNROLL for (int i = 0; i < W / 2; i++)
        interleave<T>(v[i], v[i + W / 2], w[2 * i], w[2 * i + 1], std::make_integer_sequence<int, W>{});
    SEQ_UNROLL for (int i = 0; i < W; i++) v[i] = w[i];
  }
}

// Panel from `n` rows of w (each K long, ldw apart): out[k * width + j] = w[j * ldw + k], zero for j >= n.
template <class T, class S>
static void pack_transposed(const S* w, int64_t ldw, int64_t n, int64_t K, T* out, int64_t width) {
  constexpr int W = kLanes<T>;
  for (int64_t k = 0; k < K; k += W) {
    const int64_t kn = K - k < W ? K - k : W;
    for (int64_t j = 0; j < width; j += W) {
      const S* from = w + j * ldw + k;
      Vec<T> v[W];
      if (kn == W && n - j >= W) {
        SEQ_UNROLL for (int r = 0; r < W; r++) {
          __builtin_prefetch(from + r * ldw + 4 * W);
          v[r] = load(from + r * ldw);
        }
      } else {
        for (int64_t r = 0; r < W; r++) v[r] = j + r < n ? load(from + r * ldw, kn) : Vec<T>{};
      }
      transpose<T>(v);
      T* to = out + k * width + j;
      if (kn == W) {
        SEQ_UNROLL for (int r = 0; r < W; r++) store(to + r * width, v[r]);
      } else {
        for (int64_t r = 0; r < kn; r++) store(to + r * width, v[r]);
      }
    }
  }
}

// Panel row from `n` consecutive elements: out[j] = b[j], zero for n <= j < width.
template <class T, class S>
SEQ_INLINE void pack_row(const S* b, int64_t n, T* out, int64_t width) {
  constexpr int W = kLanes<T>;
  for (int64_t j = 0; j < width; j += W) store(out + j, j < n ? load(b + j, n - j) : Vec<T>{});
}

SEQ_INLINE int64_t tiles_size(int64_t M, int64_t K) { return round_up(M, MR) * K + 64; }

// A [K, M], rows lda apart, into tiles for gemm_tiles; `sums` [M] (+)= its column sums. Whole vectors are
// stored: what runs over a tile's row is overwritten by the next row.
template <class T>
static void pack_tiles(int64_t M, int64_t K, const T* a, int64_t lda, T* out, bool add, T* sums) {
  constexpr int W = kLanes<T>;
  for (int64_t m = 0; m < M; m += W) store(sums + m, add ? load(sums + m, M - m) : Vec<T>{}, M - m);
  for (int64_t m = 0; m < M; m += MR) {
    T* to = out + m * K;
    const bool whole = m + round_up(MR, W) <= M;
    for (int64_t k = 0; k < K; k++, to += MR) {
      const T* from = a + k * lda + m;
      if (whole) {
        SEQ_UNROLL for (int i = 0; i < MR; i += W) store(to + i, load(from + i));
      } else {
        for (int i = 0; i < MR && m + i < M; i++) to[i] = from[i];
      }
    }
  }
  for (int64_t k = 0; k < K; k++)
    for (int64_t m = 0; m < M; m += W)
      store(sums + m, load(sums + m, M - m) + load(a + k * lda + m, M - m), M - m);
}

// Direct products
// -------------------------------------------------------------------------------------------------- For a
// handful of tokens packing would cost more than the product (about as much as 16 tokens), so weights are
// read as torch keeps them: W dot products along the rows of w at once, W sums by a tree of interleaved
// additions.

// acc[r] += w[r][:] x, rows ldw apart; rows at and beyond n repeat the last one.
template <class T, class S>
SEQ_INLINE void dot_rows(const S* w, int64_t ldw, int64_t n, const T* x, int64_t K,
                         Vec<T> (&acc)[kLanes<T>]) {
  constexpr int W = kLanes<T>, kGroup = W < 8 ? W : 8;
  for (int r0 = 0; r0 < W; r0 += kGroup) {
    const S* row[kGroup];
    for (int r = 0; r < kGroup; r++) row[r] = w + (r0 + r < n ? r0 + r : n - 1) * ldw;
    Vec<T> sum[kGroup];
    SEQ_UNROLL for (int r = 0; r < kGroup; r++) sum[r] = acc[r0 + r];
    int64_t k = 0;
    for (; k + W <= K; k += W) {
      const Vec<T> v = load(x + k);
      SEQ_UNROLL for (int r = 0; r < kGroup; r++) {
        __builtin_prefetch(row[r] + k +
                           kGroup * ldw);  // the rows after these: short rows end before hardware wakes up
        sum[r] += v * load(row[r] + k);
      }
    }
    if (k < K) {
      const Vec<T> v = load(x + k, K - k);
      for (int r = 0; r < kGroup; r++) sum[r] += v * load(row[r] + k, K - k);
    }
    SEQ_UNROLL for (int r = 0; r < kGroup; r++) acc[r0 + r] = sum[r];
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
