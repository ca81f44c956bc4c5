// What forward and backward of attention share: which keys a query sees, how a score becomes a logit, exp2,
// and the matrix product that both are made of.
#pragma once

#include "dropout.inl.h"
#include "math.inl.h"
#include "team.inl.h"

// Queries (forward) or keys (backward) of one block: 64 floats, 32 doubles. They lie in the lanes, side by
// side in every row of every buffer of a block, so that softmax, masks and limits need no horizontal step.
template <class T>
constexpr int64_t kBlock = 256 / sizeof(T);

// Products
// -------------------------------------------------------------------------------------------------------
//
//   C [M, N] = start + A [M, K] B [K, N],  N in lanes, both operands read where they lie.
//
// A is read by broadcast, element [r, k] at a[r * lda + k] or, transposed, at a[k * lda + r]:
// no operand of attention has to be packed or transposed but the one in the lanes. With 32 registers a tile
// is 6 rows x 4 vectors: 24 accumulators, 10 loads for 24 FMAs. bf16 operands (see Operand) come in pairs of
// k.

enum class Start { zero, c, scaled };  // C = A B, C + A B, C scale[column] + A B

template <class D, int rows, int NV, bool transposed>
static void product_tile(int64_t K, const D* a, int64_t lda, const D* b, int64_t ldb, Acc<D>* c, int64_t ldc,
                         Start start, const Acc<D>* scale) {
  using T = Acc<D>;
  constexpr int W = kLanes<T>, pair = kPair<D>;
  Vec<T> acc[rows][NV] = {};
  constexpr int kBases = (rows + 2) / 3;  // x86 addresses base, base + lda and base + 2 lda for free
  const D* base[kBases];
  SEQ_UNROLL for (int i = 0; i < kBases; i++) base[i] = a + 3 * i * (transposed ? pair : lda);
  _Pragma("GCC unroll 1") for (int64_t k = 0; k < K; k += pair) {
    SEQ_UNROLL for (int r = 0; r < rows; r++) {
      SEQ_UNROLL for (int v = 0; v < NV; v++)
          multiply_add(acc[r][v], base[r / 3] + (r % 3) * (transposed ? pair : lda), b + v * W * pair);
    }
    SEQ_UNROLL for (int i = 0; i < kBases; i++) base[i] += transposed ? lda : pair;
    b += ldb;
  }
  SEQ_UNROLL for (int r = 0; r < rows; r++) SEQ_UNROLL for (int v = 0; v < NV; v++) {
    T* to = c + r * ldc + v * W;
    if (start == Start::c) acc[r][v] += load(to);
    if (start == Start::scaled) acc[r][v] += load(to) * load(scale + v * W);
    store(to, acc[r][v]);
  }
}

template <class D>
using ProductTile = void (*)(int64_t K, const D* a, int64_t lda, const D* b, int64_t ldb, Acc<D>* c,
                             int64_t ldc, Start start, const Acc<D>* scale);
constexpr int kTileVectors = MR == 12 ? 4 : 2, kTileRows = 6;
template <class D, int NV, bool transposed, int... r>
SEQ_INLINE ProductTile<D> product_tile_of(int rows, std::integer_sequence<int, r...>) {
  static constexpr ProductTile<D> tiles[] = {product_tile<D, r + 1, NV, transposed>...};
  return tiles[rows - 1];
}

// N is a multiple of the vector. lda and ldb in elements; a row of B is a pair of k where operands are pairs.
template <class D, bool transposed>
static void product(int64_t M, int64_t N, int64_t K, const D* a, int64_t lda, const D* b, int64_t ldb,
                    Acc<D>* c, int64_t ldc, Start start, const Acc<D>* scale = nullptr) {
  using T = Acc<D>;
  constexpr int W = kLanes<T>, pair = kPair<D>;
  constexpr int64_t kDepthOfBlock = 128 * pair;  // of B: 32 KiB at a time, or it leaves L1 between two tiles
  int64_t k0 = 0;
  do {
    const int64_t k = K - k0 < kDepthOfBlock * 3 / 2 ? K - k0 : kDepthOfBlock;
    for (int64_t n = 0; n < N;) {
      const int nv = (N - n) / W >= kTileVectors ? kTileVectors : (N - n) / W >= 2 ? 2 : 1;
      constexpr auto some = std::make_integer_sequence<int, kTileRows>{};
      constexpr auto many = std::make_integer_sequence<int, MR>{};
      const int64_t rows_at_most = nv == kTileVectors ? kTileRows : MR, tiles = divide_up(M, rows_at_most);
      for (int64_t i = 0; i < tiles; i++) {
        const int64_t m = M * i / tiles;
        const int rows = int(M * (i + 1) / tiles - m);
        const auto tile = nv == kTileVectors ? product_tile_of<D, kTileVectors, transposed>(rows, some)
                          : nv == 2          ? product_tile_of<D, 2, transposed>(rows, many)
                                             : product_tile_of<D, 1, transposed>(rows, many);
        tile(k, transposed ? a + k0 / pair * lda + m * pair : a + m * lda + k0, lda,
             b + k0 / pair * ldb + n * pair, ldb, c + m * ldc + n, ldc, k0 ? Start::c : start,
             scale ? scale + n : nullptr);
      }
      n += nv * W;
    }
    k0 += k;
  } while (k0 < K);
}

#if defined(__AVX512BF16__)
// C [M, N] = start + A B of bf16 in steps, so that softmax of one block can run between the products of
// others: the matrix unit works by itself, but no reorder buffer is long enough to find it work. M and K are
// multiples of 32 (padded with zeros), N is 16 or 32.
struct SteppedProduct {
  int64_t M = 0, N = 0, K = 0;
  const bf16* a = nullptr;
  int64_t lda = 0;
  const bf16* b = nullptr;
  int64_t ldb = 0;
  float* c = nullptr;
  int64_t ldc = 0;
  Start start = Start::zero;
  int64_t m = 0, k = 0;

#if defined(__AMX_BF16__)
  int64_t steps() const { return M / 32 * (K / 32); }
  // 2 x 2 tiles of 16 x 16, 32 deep: 4 products of 16 cycles.
  void step() {
    if (m >= M) return;
    const bool wide = N > 16;
    float* to = c + m * ldc;
    compiler_barrier();
    if (k == 0 && start == Start::zero) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else if (k == 0) {
      _tile_loadd(0, to, ldc * 4);
      _tile_loadd(2, to + 16 * ldc, ldc * 4);
      if (wide) _tile_loadd(1, to + 16, ldc * 4);
      if (wide) _tile_loadd(3, to + 16 * ldc + 16, ldc * 4);
    }
    const bf16 *rows = a + m * lda + k, *columns = b + k / 2 * ldb;
    _tile_loadd(6, columns, ldb * 2);
    _tile_loadd(4, rows, lda * 2);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, rows + 16 * lda, lda * 2);
    _tile_dpbf16ps(2, 5, 6);
    if (wide) {
      _tile_loadd(7, columns + 32, ldb * 2);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    if ((k += 32) >= K) {
      _tile_stored(0, to, ldc * 4);
      _tile_stored(2, to + 16 * ldc, ldc * 4);
      if (wide) _tile_stored(1, to + 16, ldc * 4);
      if (wide) _tile_stored(3, to + 16 * ldc + 16, ldc * 4);
      k = 0, m += 32;
    }
    compiler_barrier();
  }
#else
  int64_t steps() const { return M > 0; }
  void step() {
    if (m < M) product<bf16, false>(M, N, K, a, lda, b, ldb, c, ldc, start);
    m = M;
  }
#endif
  void finish() {
    while (m < M) step();
  }
};
// The whole of it, for any N that is a multiple of 16.
SEQ_INLINE void tile_product(int64_t M, int64_t N, int64_t K, const bf16* a, int64_t lda, const bf16* b,
                             int64_t ldb, float* c, int64_t ldc, Start start) {
  for (int64_t n = 0; n < N; n += 32)
    SteppedProduct{M, min_of(32, N - n), K, a, lda, b + 2 * n, ldb, c + n, ldc, start}.finish();
}
#endif
SEQ_INLINE void prepare_tiles() {
#if defined(__AMX_BF16__)
  shape_tiles(16, 16);
#endif
}

// exp2
// -------------------------------------------------------------------------------------------------------

template <class T>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr float kMagic = Exp<float>::kMagic, kLowest = kMagic - 126;
  // Minimax on |r| <= 1/2, exact at 0: relative error 9.1e-8.
  static constexpr float kC[] = {0.00132647269f, 0.00967151266f, 0.0555073374f,
                                 0.240222421f,   0.693146978f,   1.0f};
};
template <>
struct Exp2<double> {
  static constexpr double kMagic = Exp<double>::kMagic, kLowest = kMagic - 1022;
  static constexpr double kC[] = {1.3691488853904128e-12, 2.5678435993488206e-11,
                                  4.4455382718708116e-10, 7.054911620801123e-09,
                                  1.01780860092397e-07,   1.321548679014431e-06,
                                  1.5252733804059841e-05, 0.0001540353039338161,
                                  0.0013333558146428443,  0.009618129107628477,
                                  0.05550410866482158,    0.24022650695910072,
                                  0.6931471805599453,     1.0};
};

template <class T>
constexpr T kFar = T(1 << 21);
// 2^(s c - ref) for an exponent < 128 (1024) and an integer |ref| < kFar: 0 below the normal numbers and for
// -inf, NaN for NaN. The fraction r comes out of one FMA with s c, not rounded before.
template <class T>
SEQ_INLINE Vec<T> exp2_of(Vec<T> s, Vec<T> c, Vec<T> ref) {
  using E = Exp2<T>;
  const Vec<T> magic = E::kMagic - ref, z = s * c + magic, r = s * c - (z - magic);
  const Vec<T> y = polynomial<T>(r, E::kC) * power_of_2<T>(z);
  return z < E::kLowest ? Vec<T>{} : y;
}
// The nearest integer of |x| < kFar.
template <class T>
SEQ_INLINE Vec<T> nearest(Vec<T> x) {
  constexpr T magic = Exp2<T>::kMagic;
  return (x + magic) - magic;
}
constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class T>
constexpr T kInf = __builtin_inff();

// Is a lane of this comparison true?
template <class M>
SEQ_INLINE bool any(M mask) {
  uint64_t words[sizeof(M) / 8], all = 0;
  __builtin_memcpy(words, &mask, sizeof mask);
  SEQ_UNROLL for (uint64_t w : words) all |= w;
  return all != 0;
}

// Geometry
// -------------------------------------------------------------------------------------------------------

// One sequence: its rows begin at query q0 and key k0 of batch entry `batch`.
struct Span {
  int64_t batch, q0, k0, Tq, Tk, offset, left, right, lse, lse_h;  // lse: of query 0, and from head to head

  Span(const AttentionParams& p, int64_t b) : batch(b), q0(0), k0(0), Tq(p.Tq), Tk(p.Tk) {
    if (p.cu_q) {
      batch = 0;
      q0 = p.cu_q[b], k0 = p.cu_k[b];
      Tq = p.cu_q[b + 1] - q0, Tk = p.cu_k[b + 1] - k0;
    } else if (p.len_k) {
      Tk = max_of(0, min_of(Tk, p.len_k[b]));
    }
    constexpr int64_t kNoLimit = int64_t(1) << 61;  // sums of positions stay in range
    offset = p.bottom_right ? Tk - Tq : 0;
    left = max_of(-kNoLimit, min_of(p.left, kNoLimit)), right = max_of(-kNoLimit, min_of(p.right, kNoLimit));
    lse_h = p.cu_q ? p.cu_q[p.B] : Tq;
    lse = p.cu_q ? q0 : b * p.Hq * Tq;
  }
  // Query i sees keys [first_key(i), end_key(i)); key j is seen by queries [first_query(j), end_query(j)).
  int64_t first_key(int64_t i) const { return max_of(0, min_of(Tk, i + offset - left)); }
  int64_t end_key(int64_t i) const { return max_of(0, min_of(Tk, i + offset + right + 1)); }
  int64_t first_query(int64_t j) const { return max_of(0, min_of(Tq, j - offset - right)); }
  int64_t end_query(int64_t j) const { return max_of(0, min_of(Tq, j - offset + left + 1)); }
};

template <class S, class P>
SEQ_INLINE auto row_of(const Heads<P>& x, int64_t b, int64_t h, int64_t t) {
  using To = std::conditional_t<std::is_const_v<std::remove_pointer_t<P>>, const S, S>;
  return static_cast<To*>(x.data) + b * x.b + h * x.h + t * x.t;
}

// Scores and masks
// -------------------------------------------------------------------------------------------------------

// How scale Q K^T becomes a logit. Where neither softcap nor alibi nor an additive mask is there, scores stay
// as the product left them and the scale goes into exp2 (unless it is 0: 0 times the -inf of a mask).
template <class T>
struct ScoreRule {
  T scale, cap;
  bool natural, alibi;

  explicit ScoreRule(const AttentionParams& p)
      : scale(T(p.scale)),
        cap(T(p.softcap)),
        natural(p.softcap != 0 || p.scale == 0 || p.alibi || p.mask_kind == MaskKind::additive ||
                p.mask_kind == MaskKind::additive_acc),
        alibi(p.alibi) {}
  // Logits but for the mask; `slope` is the derivative of softcap.
  Vec<T> operator()(Vec<T> s, Vec<T> distance, Vec<T> alibi_slope, Vec<T>& slope) const {
    s *= scale;
    if (cap != 0) {
      const Vec<T> t = tanh<T>(s / cap);
      slope = T(1) - t * t;
      s = t * cap;
    }
    if (alibi) s -= alibi_slope * (distance < T(0) ? -distance : distance);
    return s;
  }
};

template <class T>
SEQ_INLINE Vec<T> iota() {
  Vec<T> v;
  SEQ_UNROLL for (int i = 0; i < kLanes<T>; i++) v[i] = T(i);
  return v;
}

SEQ_INLINE int64_t mask_offset(const AttentionParams& p, int64_t b, int64_t h, int64_t i) {
  return b * p.mask_b + h * p.mask_h + i * p.mask_q;
}
// What an additive mask of M adds to the logits of n keys from key j on.
template <class M>
SEQ_INLINE Vec<Acc<M>> mask_values(const AttentionParams& p, int64_t offset, int64_t j, int64_t n) {
  using T = Acc<M>;
  const M* x = static_cast<const M*>(p.mask) + offset + j * p.mask_k;
  n = min_of(n, kLanes<T>);
  if (p.mask_k == 1) return load(x, n);
  T line[kLanes<T>] = {};
  for (int64_t i = 0; i < n; i++) line[i] = load(x + i * p.mask_k, 1)[0];
  return load(static_cast<const T*>(line));
}

// Bit i: does a boolean mask show key j + i? 0 < n <= 32 keys.
SEQ_INLINE uint32_t mask_bits(const AttentionParams& p, int64_t offset, int64_t j, int64_t n) {
  const uint8_t* x = static_cast<const uint8_t*>(p.mask) + offset + j * p.mask_k;
  uint32_t bits = 0;
  if (p.mask_k != 1) {
    for (int64_t i = 0; i < n; i++) bits |= uint32_t(x[i * p.mask_k] != 0) << i;
    return bits;
  }
#if defined(__AVX512BW__)
  const __m256i bytes = _mm256_maskz_loadu_epi8(~uint32_t(0) >> (32 - n), x);
  return _mm256_test_epi8_mask(bytes, bytes);
#else
  for (int64_t i = 0; i < n; i += 8) {
    uint64_t bytes = 0;
    __builtin_memcpy(&bytes, x + i, size_t(min_of(8, n - i)));
    for (int shift = 4; shift; shift /= 2) bytes |= bytes >> shift;  // the lowest bit of a byte: any of them
    // The product puts the lowest bits of the eight bytes side by side into the uppermost one.
    bits |= uint32_t((bytes & 0x0101010101010101u) * 0x0102040810204080u >> 56) << i;
  }
  return bits;
#endif
}
// Lanes whose bits are set, the lowest bit first.
template <class T>
SEQ_INLINE auto lanes_of(uint32_t bits) {
  Vec<Word<T>> bit;
  SEQ_UNROLL for (int lane = 0; lane < kLanes<T>; lane++) bit[lane] = 1 << lane;
  return (bit & Word<T>(bits)) != 0;
}
// A block of keys in the lanes: their scores to logits.
template <class S>
struct KeyBlock {
  using T = Acc<S>;
  static constexpr int W = kLanes<T>;

  const AttentionParams& p;
  const ScoreRule<T>& rule;
  const Span& span;
  const int64_t b, j, nk, N;  // sequence, keys [j, j + nk), lanes

  KeyBlock(const AttentionParams& params, const ScoreRule<T>& r, const Span& s, int64_t seq, int64_t first,
           int64_t end)
      : p(params), rule(r), span(s), b(seq), j(first), nk(end - first), N(round_up(nk, W)) {}

  int64_t first_query() const { return span.first_query(j); }
  int64_t end_query() const { return span.end_query(j + nk - 1); }
  // By queries [i, i + n), and no lane is left over.
  bool seen_by_all(int64_t i, int64_t n) const {
    return nk == N && span.first_key(i + n - 1) <= j && j + nk <= span.end_key(i);
  }

  // Logits of W keys of query i, from lane l on; -inf where `limits` hide a key. `slope`: their derivative by
  // the scaled score.
  Vec<T> logits(Vec<T> s, int64_t h, int64_t i, int64_t l, bool limits, Vec<T>& slope) const {
    slope = splat(T(1));
    if (rule.natural)
      s = rule(s, T(j + l - i - span.offset) + iota<T>(),
               splat(p.alibi ? T(p.alibi[b * p.alibi_b + h]) : T(0)), slope);
    else
      s *= rule.scale;
    const bool masked = p.mask_kind != MaskKind::none && l < nk, boolean = p.mask_kind == MaskKind::boolean;
    const int64_t row = mask_offset(p, b, h, i);
    if (masked && !boolean)
      s += p.mask_kind == MaskKind::additive ? mask_values<S>(p, row, j + l, nk - l)
                                             : mask_values<T>(p, row, j + l, nk - l);
    if (masked && boolean) s = lanes_of<T>(mask_bits(p, row, j + l, min_of(W, nk - l))) ? s : splat(-kInf<T>);
    if (limits) {
      const int64_t end = min_of(nk, span.end_key(i) - j);  // lanes are small numbers, keys may be no floats
      s = iota<T>() < T(max_of(0, min_of(W, span.first_key(i) - j - l))) ? splat(-kInf<T>) : s;
      s = iota<T>() >= T(max_of(0, min_of(W, end - l))) ? splat(-kInf<T>) : s;
    }
    return s;
  }

  // Bits of the keys, 64 at most, whose weights dropout leaves to query i.
  uint64_t kept(const Philox& philox, int64_t h, int64_t i) const {
    uint64_t bits = 0;
    for (int64_t l = 0; p.dropout && l < nk; l += 32)
      bits |= uint64_t(philox.kept(b * p.Hq + h, i, j + l)) << l;
    return bits;
  }
  // W weights, or gradients by them, behind the dropout.
  Vec<T> dropped(Vec<T> x, uint64_t kept, int64_t l) const {
    if (!p.dropout) return x;
    return lanes_of<T>(uint32_t(kept >> l)) ? x * T(p.dropout.factor) : Vec<T>{};
  }
};

// Scores of query i, at least as many as fill the block's lanes, become weights e^(logit - m) with m the
// largest of them and of those before, l their sum. Returns what sums of those before are multiplied by.
template <class S, class T = Acc<S>>
static T softmax_row(const KeyBlock<S>& block, int64_t h, int64_t i, T* xs, T& m, T& l) {
  constexpr int W = kLanes<T>;
  const bool limits = !block.seen_by_all(i, 1);
  Vec<T> top = splat(m), total{}, unused;
  for (int64_t n = 0; n < block.N; n += W) {
    const Vec<T> logit = block.logits(load(xs + n), h, i, n, limits, unused);
    top = max_of(logit, top);
    store(xs + n, logit);
  }
  const T now = reduce_lanes<T>(top, [](Vec<T> a, Vec<T> b) { return a > b ? a : b; });
  const T zero = now == -kInf<T> ? T(0) : now;
  for (int64_t n = 0; n < block.N; n += W) {
    const Vec<T> e = exp2_of<T>(load(xs + n) - zero, splat(T(kLog2e)), Vec<T>{});
    total += e;
    store(xs + n, e);
  }
  const T by = exp2_of<T>(splat(m - zero), splat(T(kLog2e)), Vec<T>{})[0];
  m = now;
  l = l * by + reduce_lanes<T>(total, [](Vec<T> a, Vec<T> b) { return a + b; });
  return by;
}

// Rows
// -------------------------------------------------------------------------------------------------------

template <class T>
struct Rows {
  const T* data;
  int64_t ld;
};
// Rows as products read them: where they lie if they have the arithmetic type and the width, otherwise
// converted into `copy`, `width` wide.
template <class T, class S>
SEQ_INLINE Rows<T> as_operand(const S* rows, int64_t stride, int64_t n, int64_t features, T* copy,
                              int64_t width) {
  if constexpr (std::is_same_v<S, T>)
    if (features == width) return {rows, stride};
  for (int64_t i = 0; i < n; i++) copy_row(rows + i * stride, features, copy + i * width, width);
  return {copy, width};
}

// Columns of x [features, ld] as rows, times factor[column]: column j goes to row_at(j).
template <class S, class T, class Row>
static void write_columns(const T* x, int64_t ld, int64_t n, int64_t features, const T* factor,
                          const Row& row_at) {
  constexpr int W = kLanes<T>;
  for (int64_t j = 0; j < n; j += W) {
    const Vec<T> by = load(factor + j);
    for (int64_t f = 0; f < features; f += W) {
      Vec<T> v[W];
      for (int r = 0; r < W; r++) v[r] = f + r < features ? load(x + (f + r) * ld + j) * by : Vec<T>{};
      transpose<T>(v);
      for (int r = 0; r < W && j + r < n; r++) store(row_at(j + r) + f, v[r], features - f);
    }
  }
}

#if defined(__AVX512BF16__)
// Rows [0, n) of `features`, then zeros: [to_rows, width].
SEQ_INLINE void pad_rows(const bf16* rows, int64_t stride, int64_t n, int64_t features, bf16* to,
                         int64_t to_rows, int64_t width) {
  for (int64_t r = 0; r < to_rows; r++, to += width) {
    const int64_t some = r < n ? features : 0;
    for (int64_t f = 0; f < some; f += 32)  // rows of 128 bytes, far apart, wake no prefetcher
      __builtin_prefetch(rows + (r + 8) * stride + f);
    if (some) __builtin_memcpy(static_cast<void*>(to), rows + r * stride, sizeof(bf16) * some);
    if (width > some) __builtin_memset(static_cast<void*>(to + some), 0, sizeof(bf16) * (width - some));
  }
}
// The same transposed: [to_features, width], n <= columns <= width of them defined.
SEQ_INLINE void pad_transposed(const bf16* rows, int64_t stride, int64_t n, int64_t features, bf16* to,
                               int64_t to_features, int64_t width, int64_t columns) {
  pack_transposed(rows, stride, n, features, to, width, columns);
  __builtin_memset(static_cast<void*>(to + features * width), 0,
                   sizeof(bf16) * (to_features - features) * width);
}

// Two rows as bf16, `a` in the lower half; and the same with the rows interleaved, as products read pairs.
SEQ_INLINE __m512i narrow(Vec<float> a, Vec<float> b) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
}
SEQ_INLINE __m512i as_pairs(__m512i rows) {
  typedef uint16_t Lanes __attribute__((vector_size(64)));
  const Lanes order = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_maskz_permutexvar_epi16(0xffffffff, (__m512i)order, rows);
}
SEQ_INLINE Vec<float> sum_of_pairs(Vec<float> sum, __m512i pairs) {
  const __m512i ones = _mm512_set1_epi16(0x3f80);
  return (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)pairs, (__m512bh)ones);
}
#endif

// Threads
// -------------------------------------------------------------------------------------------------------

// `cost`: of one of the work's multiply-adds, in multiply-adds.
static int attention_threads(const AttentionParams& p, int64_t tasks, double cost = 1) {
  const double queries = p.cu_q ? double(p.cu_q[p.B]) : double(p.B) * double(p.Tq),
               work = queries * double(p.Hq) * double(p.Tk) * double(p.D + p.Dv + 8) * cost;
  return threads_for(work, min_of(p.parallel.threads, tasks), 2 * kWorkPerThread);
}

// Parts of each of n tasks, at most `limit`: as few as keep all threads busy. It depends on nothing but the
// call, and so do the results.
constexpr int64_t kMostParts = 1024;
static int64_t busy_splits(int64_t n, int64_t threads, int64_t limit) {
  int64_t parts = 1;
  const auto busy = [&] {
    const int64_t all = n * parts;
    return double(all) / double(round_up(all, threads));
  };
  while (n > 0 && parts < 2 * threads && parts < min_of(limit, kMostParts) && busy() < 0.9) parts++;
  return parts;
}
