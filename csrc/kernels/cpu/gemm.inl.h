// The packed matrix product that projection, recurrence and gradients share.
//
//   C [M, N] = init + A [M, K] B [K, N],  B in panels of NR = 2 vectors: panel j is [K, NR], so a tile
//   streams it once.
//
// A register tile is MR rows x 2 vectors: with AVX-512 12 x 2 accumulators + 2 of B + 1 broadcast of A fill
// 27 of 32 registers and every 24 FMAs need 14 loads, half of what the two load ports give. M rows are cut
// into equal tiles (16 = 8 + 8, not 12 + 4). Tiles with few rows keep KU sets of accumulators, because an FMA
// takes 4 cycles and two start in each. K is cut into blocks of KC, so that a panel block (32 KiB) stays in
// L1 for all row tiles. On Zen 5 93 to 97 % of the FMA peak, panels in L1, L2 or L3.
#pragma once

#include "vec.h"

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int MR = 12;  // 32 vector registers
#else
constexpr int MR = 6;  // 16
#endif
template <class D>
constexpr int NR = 2 * kLanes<Acc<D>>;
constexpr int64_t KC = 256;
// Sets of accumulators of a tile, which take k in turn.
constexpr int sets_of(int64_t rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
// Rows of B prefetched: 4 KiB, some 300 cycles, as long as L3 takes.
constexpr int64_t kAhead = 32;
// Elements of a cache line.
template <class D>
constexpr int kLine = 64 / sizeof(D);

SEQ_INLINE int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }
SEQ_INLINE int64_t round_up(int64_t n, int64_t to) { return divide_up(n, to) * to; }
SEQ_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
SEQ_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
SEQ_INLINE double max_of(double a, double b) { return a > b ? a : b; }

// bf16 dot products take pairs of k: B holds rows k and k + 1 interleaved. K is padded with zeros to kDepth:
// 2 for vdpbf16ps, 32 for AMX tiles.
template <class D>
constexpr int kPair = sizeof(D) == 2 ? 2 : 1;
#if defined(__AMX_BF16__)
template <class D>
constexpr int kDepth = sizeof(D) == 2 ? 32 : 1;
#else
template <class D>
constexpr int kDepth = kPair<D>;
#endif

// From one row of n operands to the next: padded for products, and a vector more, so that rows do not share
// cache sets. Rows begin at whole lines: bf16 on AMX backward 4 to 9 %.
template <class D>
constexpr int64_t row_stride(int64_t n) {
  return round_up(n, 32) + SEQKERNELS_VEC_BYTES / int64_t(sizeof(D));
}

// One tile of `rows` x NV vectors. init rows step by ldi (0: the same bias for all rows; null: zero). `next`
// is read after b and next_rows after a: fetch them.
template <class D>
using TileFn = void (*)(int64_t K, const D* a, int64_t lda, const D* next_rows, const D* b, int64_t ldb,
                        const D* next, const Acc<D>* init, int64_t ldi, Acc<D>* c, int64_t ldc);

template <class T>
SEQ_INLINE void multiply_add(Vec<T>& acc, const T* a, const T* b) {
  acc += *a * load(b);
}
#if defined(__AVX512BF16__)
SEQ_INLINE void multiply_add(Vec<float>& acc, const bf16* a, const bf16* b) {
  uint32_t pair;
  __builtin_memcpy(&pair, a, 4);
  acc = (Vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32(int(pair)),
                                     (__m512bh)_mm512_loadu_si512(b));
}
#endif

// `first`: the first tile of rows brings the panel to L1 for those that follow. `fetch_rows`: each brings the
// rows of A of the next: projections 8 % faster, layers 1 to 3 %. Only with AVX-512: narrower vectors have
// half as much work for each instruction of it (AVX2 on Zen 4: 1 to 3 % slower, beside a neighbour on the
// core 35 %).
constexpr bool kFetchRows = SEQKERNELS_VEC_BYTES == 64;
template <class D, int rows, int NV, bool first, bool fetch_rows>
static void tile(int64_t K, const D* __restrict a, int64_t lda, [[maybe_unused]] const D* next_rows,
                 const D* __restrict b, int64_t ldb, const D* next, const Acc<D>* init, int64_t ldi,
                 Acc<D>* c, int64_t ldc) {
  using T = Acc<D>;
  constexpr int W = kLanes<T>, KU = sets_of(rows), kBases = (rows + 2) / 3, pair = kPair<D>;
  // From zero, init joins at the end: a long sum is made of sums of KC, not of one chain.
  Vec<T> acc[KU][rows][NV] = {};
  // Three rows share one base pointer: x86 addresses base, base + lda and base + 2 lda for free.
  const D* base[kBases];
  SEQ_UNROLL for (int i = 0; i < kBases; i++) base[i] = a + 3 * i * lda;
  constexpr bool fetch = first && rows >= 5;  // with fewer rows the loads themselves run ahead
  const D* ahead = b + kAhead * ldb * pair;
  [[maybe_unused]] const D* row_ahead = next_rows;
  [[maybe_unused]] int row = 0;
  auto step = [&](int u) __attribute__((always_inline)) {
    if constexpr (fetch_rows) {  // a line of one row with each step
      if (row < rows) __builtin_prefetch(row_ahead), row_ahead += lda;
      if (++row == kLine<D> / pair) row = 0, row_ahead = next_rows += kLine<D>;
    }
    if constexpr (fetch) {
      SEQ_UNROLL for (int i = 0; i < NV * W * pair; i += kLine<D>) __builtin_prefetch(ahead + i);
      ahead += ldb * pair;
    }
    SEQ_UNROLL for (int r = 0; r < rows; r++) {
      SEQ_UNROLL for (int v = 0; v < NV; v++)
          multiply_add(acc[u][r][v], base[r / 3] + (r % 3) * lda, b + v * W * pair);
    }
    b += ldb * pair;
    SEQ_UNROLL for (int i = 0; i < kBases; i++) base[i] += pair;
  };
  if (init && ldi) {  // large projections have left L2 by the time the recurrence adds to them
    SEQ_UNROLL for (int r = 0; r < rows; r++) SEQ_UNROLL for (int i = 0; i < NV * W; i += kLine<T>)
        __builtin_prefetch(init + r * ldi + i);
  }
  int64_t k = 0;
  if constexpr (KU > 1) {
    for (; k + KU * pair <= K; k += KU * pair) {
      SEQ_UNROLL for (int u = 0; u < KU; u++) step(u);
    }
  }
  if constexpr (fetch) {
    _Pragma("GCC unroll 1") for (; k < K - kAhead * pair; k += pair) step(0);
    ahead = next;
  }
  _Pragma("GCC unroll 1") for (; k < K; k += pair) step(0);
  SEQ_UNROLL for (int r = 0; r < rows; r++) SEQ_UNROLL for (int v = 0; v < NV; v++) {
    Vec<T> sum = acc[0][r][v];
    SEQ_UNROLL for (int u = 1; u < KU; u++) sum += acc[u][r][v];
    if (init) sum += load(init + r * ldi + v * W);
    store(c + r * ldc + v * W, sum);
  }
}

template <class D, int... r>
SEQ_INLINE TileFn<D> tile_of(int vectors, int rows, bool first, bool fetch_rows,
                             std::integer_sequence<int, r...>) {
  static constexpr TileFn<D> narrow[] = {tile<D, r + 1, 1, false, false>...};
  static constexpr TileFn<D> wide[][sizeof...(r)] = {{tile<D, r + 1, 2, false, false>...},
                                                     {tile<D, r + 1, 2, true, false>...},
                                                     {tile<D, r + 1, 2, false, kFetchRows>...},
                                                     {tile<D, r + 1, 2, true, kFetchRows>...}};
  return (vectors == 1 ? narrow : wide[2 * fetch_rows + first])[rows - 1];
}

#if defined(__AMX_BF16__)
// AMX: 16 x 16 accumulator tiles, 32 k at once; two by two of them share the loads of A and B, so that one
// load (8 cycles) comes on each product (16). Rows of A need no padding: the shapes are set to the rows that
// are there.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {};
};
// GCC's tile intrinsics do not say which memory they touch.
SEQ_INLINE void compiler_barrier() { __asm__ volatile("" ::: "memory"); }

static thread_local int64_t tile_rows = -1;  // what is configured now

static void shape_tiles(int64_t upper, int64_t lower) {
  if (tile_rows == upper * 32 + lower) return;
  tile_rows = upper * 32 + lower;
  TileShapes shapes;
  const int64_t rows[] = {upper, upper, lower, lower, upper, lower, 16, 16};
  for (int i = 0; i < 8; i++) shapes.rows[i] = uint8_t(rows[i] ? rows[i] : 1);
  compiler_barrier();
  _tile_loadconfig(&shapes);
}
// The state is large and is saved with the thread: call when a thread is done. Other libraries set shapes of
// their own.
SEQ_INLINE void release_tiles() {
  if (tile_rows >= 0) _tile_release();
  tile_rows = -1;
}

// C += A B along K: two by two tiles, or one row or one column of them.
template <bool lower, bool wide>
static void multiply_tiles(int64_t K, const bf16* a, int64_t lda, const bf16* b, int64_t ldb) {
  for (int64_t k = 0; k < K; k += 32, a += 32, b += 32 * ldb) {
    _tile_loadd(6, b, ldb * 4);
    _tile_loadd(4, a, lda * 2);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (wide) {
      _tile_loadd(7, b + 32, ldb * 4);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (lower) {
      _tile_loadd(5, a + 16 * lda, lda * 2);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (wide) _tile_dpbf16ps(3, 5, 7);
    }
  }
}

static void amx_panel(int64_t M, int64_t width, int64_t K, const bf16* a, int64_t lda, const bf16* b,
                      int64_t ldb, const float* init, int64_t ldi, float* c, int64_t ldc) {
  const bool wide = width > 16;
  compiler_barrier();
  for (int64_t m = 0; m < M; m += 32) {
    const int64_t upper = min_of(16, M - m), lower = min_of(16, M - m - upper);
    shape_tiles(upper, lower ? lower : 16);
    const float* from = init + m * ldi;
    if (init) {
      _tile_loadd(0, from, ldi * 4);
      if (wide) _tile_loadd(1, from + 16, ldi * 4);
      if (lower) _tile_loadd(2, from + 16 * ldi, ldi * 4);
      if (lower && wide) _tile_loadd(3, from + 16 * ldi + 16, ldi * 4);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    if (lower)
      wide ? multiply_tiles<true, true>(K, a + m * lda, lda, b, ldb)
           : multiply_tiles<true, false>(K, a + m * lda, lda, b, ldb);
    else
      wide ? multiply_tiles<false, true>(K, a + m * lda, lda, b, ldb)
           : multiply_tiles<false, false>(K, a + m * lda, lda, b, ldb);
    float* to = c + m * ldc;
    _tile_stored(0, to, ldc * 4);
    if (wide) _tile_stored(1, to + 16, ldc * 4);
    if (lower) _tile_stored(2, to + 16 * ldc, ldc * 4);
    if (lower && wide) _tile_stored(3, to + 16 * ldc + 16, ldc * 4);
  }
  compiler_barrier();
}
#else
SEQ_INLINE void release_tiles() {}
#endif

// C [M, width] = init + A panel. `width` is the panel's: NR, or half of it for the last panel. K is a
// multiple of kDepth: what is beyond is zero in the panel, and in A zero or a number of the next slot (gate
// gradients). `next` is the panel that comes after this one, null: the one behind it.
template <class D>
static void gemm_panel(int64_t M, int64_t width, int64_t K, const D* a, int64_t lda, const D* b, int64_t ldb,
                       const Acc<D>* init, int64_t ldi, Acc<D>* c, int64_t ldc, const D* next = nullptr) {
#if defined(__AMX_BF16__)
  if constexpr (sizeof(D) == 2) return amx_panel(M, width, K, a, lda, b, ldb, init, ldi, c, ldc);
#endif
  // Also where one tile is all there is: a chain of 900 sums has four times the error of torch's.
  const int64_t kc = KC * kPair<D> * sets_of(M), tiles = divide_up(M, MR), share = M / max_of(1, tiles),
                larger = M - share * tiles;
  // Not for two tiles, whose rows stay in L1, nor for more blocks of K: there it cost 1 to 3 %.
  const bool fetch_rows = kFetchRows && tiles > 2 && K <= kc;
  int64_t k0 = 0;
  do {
    const int64_t k = min_of(kc, K - k0);
    const D* then = next && k0 + k == K ? next : b + (k0 + k) * ldb;
    for (int64_t i = 0, m = 0, rows; i < tiles; i++, m += rows) {
      rows = share + (i < larger);
      const D* next_rows = a + (i + 1 < tiles ? (m + rows) * lda : 0);
      const Acc<D>* from = k0 ? c + m * ldc : init ? init + m * ldi : nullptr;
      tile_of<D>(int(width / kLanes<Acc<D>>), int(rows), i == 0, fetch_rows,
                 std::make_integer_sequence<int, MR>{})(k, a + m * lda + k0, lda, next_rows, b + k0 * ldb,
                                                        ldb, then, from, k0 ? ldc : ldi, c + m * ldc, ldc);
    }
    k0 += k;
  } while (k0 < K);
}

// Panels
// -------------------------------------------------------------------------------------------------------

// N columns in panels: all NR wide but the last, which is half as wide where that suffices.
template <class D>
struct Panels {
  using T = Acc<D>;
  int64_t N, K;
  int64_t depth() const { return round_up(K, kDepth<D>); }
  int64_t count() const { return divide_up(N, NR<D>); }
  int64_t padded() const { return round_up(N, kLanes<T>); }
  int64_t width(int64_t j) const { return min_of(NR<D>, padded() - j * NR<D>); }
  int64_t offset(int64_t j) const { return j * NR<D> * depth(); }
  int64_t size() const { return padded() * depth(); }
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

// out[k * ldo + j] = w[j * ldw + k] for k < K and j < n; zero for n <= j < width.
template <class D, class S>
static void pack_transposed(const S* w, int64_t ldw, int64_t n, int64_t K, D* out, int64_t ldo,
                            int64_t width) {
  using T = Acc<S>;
  constexpr int W = kLanes<T>;
  for (int64_t k = 0; k < K; k += W) {
    const int64_t kn = min_of(W, K - k);
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
      D* to = out + k * ldo + j;
      if (kn == W) {
        SEQ_UNROLL for (int r = 0; r < W; r++) store(to + r * ldo, v[r]);
      } else {
        for (int64_t r = 0; r < kn; r++) store(to + r * ldo, v[r]);
      }
    }
  }
}

// Panel from `n` rows of w, each K long: column j is row j.
template <class T, class S>
static void pack_panel(const S* w, int64_t ldw, int64_t n, int64_t K, T* out, int64_t width) {
  pack_transposed(w, ldw, n, K, out, width, width);
}
#if defined(__AVX512BF16__)
// Pairs of k travel as one 32-bit element.
static void pack_panel(const bf16* w, int64_t ldw, int64_t n, int64_t K, bf16* out, int64_t width) {
  constexpr int W = kLanes<float>;
  for (int64_t k = 0; k < round_up(K, kDepth<bf16>); k += 2 * W) {
    const int64_t left = min_of(2 * W, K - k), pairs = round_up(K, kDepth<bf16>) / 2 - k / 2;
    for (int64_t j = 0; j < width; j += W) {
      Vec<float> v[W];
      for (int64_t r = 0; r < W; r++) {
        bf16 row[2 * W] = {};
        if (j + r < n) {
          const bf16* from = w + (j + r) * ldw + k;
          if (left == 2 * W)
            __builtin_memcpy(row, from, sizeof row);
          else
            for (int64_t i = 0; i < left; i++) row[i] = from[i];
        }
        __builtin_memcpy(&v[r], row, sizeof row);
      }
      transpose<float>(v);
      for (int64_t r = 0; r < W && r < pairs; r++)
        __builtin_memcpy(out + (k + 2 * r) * width + 2 * j, &v[r], 4 * W);
    }
  }
}
#endif

// Row k of a panel from `n` consecutive elements, zero for n <= j < width. The rows of a pair come in order.
template <class T, class S>
SEQ_INLINE void pack_row(const S* b, int64_t n, T* panel, int64_t k, int64_t width) {
  constexpr int W = kLanes<T>;
  for (int64_t j = 0; j < width; j += W) store(panel + k * width + j, j < n ? load(b + j, n - j) : Vec<T>{});
}
#if defined(__AVX512BF16__)
SEQ_INLINE void pack_row(const bf16* b, int64_t n, bf16* panel, int64_t k, int64_t width) {
  constexpr int W = kLanes<float>;
  for (int64_t j = 0; j < width; j += W) {
    const U32 high = (U32)(j < n ? load(b + j, n - j) : Vec<float>{});
    uint32_t* to = reinterpret_cast<uint32_t*>(panel + (k - k % 2) * width) + j;
    if (k % 2 == 0)
      store<uint32_t>(to, high >> 16);
    else
      store<uint32_t>(to, load<uint32_t>(to) | high);
  }
}
#endif
// Rows [k, end) of a panel from rows ldb apart, n elements of each; width is 1 or 2 vectors.
template <class T, class S>
SEQ_INLINE void pack_rows(const S* b, int64_t ldb, int64_t n, T* panel, int64_t k, int64_t end,
                          int64_t width) {
  for (; k < end; k++, b += ldb) {
    __builtin_prefetch(b + kAhead * ldb);
    __builtin_prefetch(b + kAhead * ldb + kLanes<T>);
    pack_row(b, n, panel, k, width);
  }
}
#if defined(__AVX512BF16__)
SEQ_INLINE void pack_rows(const bf16* b, int64_t ldb, int64_t n, bf16* panel, int64_t k, int64_t end,
                          int64_t width) {
  typedef uint16_t Lanes __attribute__((vector_size(64)));
  const Lanes order = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __mmask32 there = n < 32 ? (__mmask32(1) << n) - 1 : ~__mmask32(0);
  if (k % 2 && k < end) pack_row(b, n, panel, k++, width), b += ldb;
  for (; k + 2 <= end; k += 2, b += 2 * ldb) {
    __builtin_prefetch(b + kAhead * ldb);
    __builtin_prefetch(b + (kAhead + 1) * ldb);
    const __m512i even = _mm512_maskz_loadu_epi16(there, b), odd = _mm512_maskz_loadu_epi16(there, b + ldb);
    bf16* to = panel + k * width;
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, (__m512i)order, odd));
    if (width > 16) _mm512_storeu_si512(to + 32, _mm512_permutex2var_epi16(even, (__m512i)(order + 16), odd));
  }
  if (k < end) pack_row(b, n, panel, k, width);
}
#endif
// Rows [K, depth) of a panel.
template <class D>
SEQ_INLINE void pack_padding(D* panel, int64_t K, int64_t width) {
  const int64_t from = round_up(K, kPair<D>), to = round_up(K, kDepth<D>);
  __builtin_memset(static_cast<void*>(panel + from * width), 0, sizeof(D) * (to - from) * width);
}

// out[0, padded) = from[0, n), converted, then zeros.
template <class D, class S>
SEQ_INLINE void copy_row(const S* from, int64_t n, D* out, int64_t padded) {
  constexpr int W = kLanes<Acc<S>>;
  int64_t i = 0;
  for (; i < n; i += W) store(out + i, load(from + i, n - i), padded - i);
  for (; i < padded; i++) out[i] = D{};
}
