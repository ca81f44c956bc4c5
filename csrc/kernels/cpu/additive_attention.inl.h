// Additive attention: forward and backward.
//
// The work is B Tq Tk D tanh, so all else may be plain: the scores of up to 128 queries with all keys lie in
// L2 (1 MiB), softmax makes two passes over them, and backward computes them again. Features lie in the
// lanes: no operand is transposed, and the sums of dq, dk and dw need no horizontal step.
//
// tanh(q + k) = m / (m + 2),  m = e^2q e^2k - 1: an exponential for each query and each key instead of one
// for each pair leaves a pair 9 instructions, where a tanh takes 22. Each is the sum of two floats, because
// near 0 the difference keeps only what the product has beyond the 1; so m is as exact as q + k is. Where a
// number of a block is beyond +-20, or NaN, where few queries share a key (decoding), and in double, tanh is
// taken as it is.
#pragma once

#include "attention_few.inl.h"

#if defined(__FMA__) || defined(__aarch64__)
constexpr bool kFused = true;  // or the product is rounded before the 1 is subtracted
#else
constexpr bool kFused = false;
#endif
// a b - 1 in one step, where there is an instruction for it: compilers that optimise little do not fuse a
// product with a difference by themselves (GCC below -O2).
SEQ_INLINE Vec<float> product_minus_1(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmsub_ps((__m512)a, (__m512)b, (__m512)splat(1.0f));
#elif defined(__FMA__)
  return (Vec<float>)_mm256_fmsub_ps((__m256)a, (__m256)b, (__m256)splat(1.0f));
#else
  return a * b - 1.0f;
#endif
}

// e^2x of n floats, a multiple of the vector: out[i] + out[low + i]. False if one is beyond +-kWithin, or
// NaN.
constexpr float kWithin = 20;  // then e^2q e^2k and its reciprocal are normal numbers
[[maybe_unused]] static bool exponentials(const float* x, int64_t n, float* out, int64_t low) {
  using E = Exp<double>;
  constexpr int W = kLanes<float>, half = W / 2;
  typedef float Half __attribute__((vector_size(SEQKERNELS_VEC_BYTES / 2)));
  Vec<int32_t> beyond{};
  for (int64_t i = 0; i < n; i += W) {
    const Vec<float> v = load(x + i);
    beyond |= ~((v <= kWithin) & (v >= -kWithin));
    SEQ_UNROLL for (int64_t j = i; j < i + W; j += half) {
      Half some;
      __builtin_memcpy(&some, x + j, sizeof some);
      const Vec<double> t = __builtin_convertvector(some, Vec<double>) * 2.0;
      const Vec<double> z = t * E::kLog2e + E::kMagic, k = z - E::kMagic;
      const Vec<double> e = exp_near_0(t - k * E::kLn2Hi - k * E::kLn2Lo) * power_of_2<double>(z);
      const Half high = __builtin_convertvector(e, Half);
      const Half rest = __builtin_convertvector(e - __builtin_convertvector(high, Vec<double>), Half);
      __builtin_memcpy(out + j, &high, sizeof high);
      __builtin_memcpy(out + low + j, &rest, sizeof rest);
    }
  }
  return !any(beyond);
}

// tanh(q + k) of W features, two ways.
struct ByExponentials {
  int64_t q_low, k_low;
  Vec<float> operator()(const float* q, const float* k) const {
    const Vec<float> a = load(q), b = load(k);
    const Vec<float> m = a * load(k + k_low) + (b * load(q + q_low) + product_minus_1(a, b));
    return m * reciprocal(m + 2.0f);
  }
};
template <class T>
struct ByTanh {
  Vec<T> operator()(const T* q, const T* k) const { return tanh<T>(load(q) + load(k)); }
};

// Of a tanh, in multiply-adds of the products that threads are counted by.
constexpr double kTanhCost = 8;

template <class T>
struct Operands {  // rows of queries and of keys, padded with zeros to whole vectors
  Rows<T> q, k;
};

// S [nq, nk] = sum over D of w tanh(q + k). Columns up to the next whole vector are written too, and mean
// nothing.
template <class T, class Tanh>
static void scores(const Tanh& tanh_of_pair, const Operands<T>& x, int64_t nq, int64_t nk, int64_t D,
                   const T* w, T* S, int64_t ld) {
  constexpr int W = kLanes<T>;
  by_rows<T>(nq, [&]<int rows>(int64_t r0) {
    constexpr int columns = W / rows;
    for (int64_t c0 = 0; c0 < nk; c0 += columns) {
      const T *q[rows], *k[columns];
      SEQ_UNROLL for (int r = 0; r < rows; r++) q[r] = x.q.data + (r0 + r) * x.q.ld;
      SEQ_UNROLL for (int c = 0; c < columns; c++) k[c] = x.k.data + min_of(c0 + c, nk - 1) * x.k.ld;
      Vec<T> acc[W] = {};
      _Pragma("GCC unroll 1") for (int64_t h = 0; h < D; h += W) {
        const Vec<T> by = load(w + h);
        if (rows == 1)
          SEQ_UNROLL for (int c = 0; c < columns; c++) __builtin_prefetch(k[c] + h + columns * x.k.ld);
        SEQ_UNROLL for (int r = 0; r < rows; r++) SEQ_UNROLL for (int c = 0; c < columns; c++)
            acc[r * columns + c] += by * tanh_of_pair(q[r] + h, k[c] + h);
      }
      const Vec<T> sums = sum_lanes<T>(acc);
      SEQ_UNROLL for (int r = 0; r < rows; r++) __builtin_memcpy(
          S + (r0 + r) * ld + c0, reinterpret_cast<const T*>(&sums) + r * columns, columns * sizeof(T));
    }
  });
}

// With G = dS (1 - tanh(q + k)^2): dq += sum of G over keys, dk += sum of G over queries, both without the
// factor w; dw += sum of dS tanh(q + k). dq, dk and dw are padded like q and k, `width` apart. What four
// queries give is summed apart: long chains of additions were ten times less exact than torch's.
template <class T, class Tanh>
static void score_gradients(const Tanh& tanh_of_pair, const Operands<T>& x, int64_t nq, int64_t nk,
                            int64_t width, const T* dS, int64_t ld, T* dq, T* dk, T* dw) {
  constexpr int W = kLanes<T>;
  by_rows<T>(nq, [&]<int rows>(int64_t r) {
    const T *q = x.q.data + r * x.q.ld, *ds = dS + r * ld;
    T* to_q = dq + r * width;
    for (int64_t h = 0; h < width; h += W) {
      Vec<T> of_q[rows], of_w{};
      SEQ_UNROLL for (int i = 0; i < rows; i++) of_q[i] = load(to_q + i * width + h);
      _Pragma("GCC unroll 1") for (int64_t c = 0; c < nk; c++) {
        Vec<T> of_k{};
        SEQ_UNROLL for (int i = 0; i < rows; i++) {
          const Vec<T> t = tanh_of_pair(q + i * x.q.ld + h, x.k.data + c * x.k.ld + h);
          const T by = ds[i * ld + c];
          const Vec<T> g = by * (T(1) - t * t);
          of_q[i] += g, of_k += g, of_w += by * t;
        }
        store(dk + c * width + h, load(dk + c * width + h) + of_k);
      }
      SEQ_UNROLL for (int i = 0; i < rows; i++) store(to_q + i * width + h, of_q[i]);
      store(dw + h, load(dw + h) + of_w);
    }
  });
}

// What forward and backward share: tiles of queries, blocks of keys, and the scores of both.
template <class S>
struct Additive {
  using T = Acc<S>;
  static constexpr int W = kLanes<T>;
  static constexpr int64_t kTile = 128, kKeys = 64, kScores = (1 << 20) / sizeof(T);
  static constexpr int64_t kFew = 8;  // queries that pay for the exponentials of their keys
  static constexpr bool kFast = kFused && std::is_same_v<T, float>;

  const AdditiveAttentionParams& p;
  const int64_t ld, ldv, lds, rows, tiles;  // rows of D and Dv features and of scores; queries of a tile
  const ScoreRule<T> rule;
  const int team;  // threads at most
  T* w;
  Queue* queue;
  Barrier* barrier;

  explicit Additive(const AdditiveAttentionParams& params)
      : p(params),
        ld(round_up(p.D, W)),
        ldv(round_up(p.Dv, W)),
        lds(round_up(p.Tk, W)),
        rows(tile_rows()),
        tiles(divide_up(p.Tq, rows)),
        rule(p),
        team(p.parallel.threads) {}

  // As many as the scores leave room for, but no thread goes without.
  int64_t tile_rows() const {
    const int64_t fit = max_of(kFew, min_of(kTile, kScores / max_of(1, lds))),
                  share = divide_up(p.B * p.Tq, p.parallel.threads);
    return max_of(1, min_of(p.Tq, min_of(fit, max_of(2 * kFew, share))));
  }

  struct Buffers {  // of one thread
    T *q_copy, *k_copy, *v_copy, *q_exp, *k_exp;
    Buffers(const Additive& f, Arena& a) {
      q_copy = a.take<T>(f.rows * f.ld), k_copy = a.take<T>(kKeys * f.ld), v_copy = a.take<T>(kKeys * f.ldv);
      q_exp = a.take<T>(kFast ? 2 * f.rows * f.ld : 0), k_exp = a.take<T>(kFast ? 2 * kKeys * f.ld : 0);
    }
  };
  void layout(Arena& a) {
    w = a.take<T>(ld);
    queue = a.take_zeros<Queue>(1);
    barrier = a.take_zeros<Barrier>(1);
  }
  void prepare() const { copy_row(static_cast<const S*>(p.w), p.D, w, ld); }

  struct Tile {  // queries [i, i + n) of sequence b
    const Additive& f;
    const Buffers& m;
    const Span span;
    const int64_t b, i, n;
    bool within = false;
    Operands<T> of{};

    Tile(const Additive& additive, const Buffers& buffers, int64_t seq, int64_t tile)
        : f(additive), m(buffers), span(f.p, seq), b(seq), i(tile * f.rows), n(min_of(f.rows, f.p.Tq - i)) {
      of.q = as_operand<T>(row_of<S>(f.p.q, b, 0, i), f.p.q.t, n, f.p.D, m.q_copy, f.ld);
      if constexpr (kFast) within = n >= kFew && all_exponentials(of.q, n, m.q_exp, f.rows);
    }
    bool all_exponentials(const Rows<T>& x, int64_t count, T* out, int64_t most_rows) const {
      for (int64_t r = 0; r < count; r++)
        if (!exponentials(x.data + r * x.ld, f.ld, out + r * f.ld, most_rows * f.ld)) return false;
      return true;
    }

    // fn(tanh of a pair, operands, j, nk) for the blocks of keys [j, j + nk) that make [begin, end).
    template <class Fn>
    void each_block(int64_t begin, int64_t end, const Fn& fn) {
      for (int64_t j = begin; j < end; j += kKeys) {
        const int64_t nk = min_of(kKeys, end - j);
        of.k = as_operand<T>(row_of<S>(f.p.k, b, 0, j), f.p.k.t, nk, f.p.D, m.k_copy, f.ld);
        if constexpr (kFast)
          if (within && all_exponentials(of.k, nk, m.k_exp, kKeys)) {
            fn(ByExponentials{f.rows * f.ld, kKeys * f.ld}, Operands<T>{{m.q_exp, f.ld}, {m.k_exp, f.ld}}, j,
               nk);
            continue;
          }
        fn(ByTanh<T>{}, of, j, nk);
      }
    }
    // Of keys [begin, end): e^(S - max) in rows of x, their maxima and sums.
    void softmax(int64_t begin, int64_t end, T* x, int64_t ldx, T* max, T* sum) {
      each_block(begin, end, [&](const auto& pair, const Operands<T>& operands, int64_t j, int64_t nk) {
        scores(pair, operands, n, nk, f.ld, f.w, x + j - begin, ldx);
      });
      const KeyBlock<S> keys(f.p, f.rule, span, b, begin, end);
      for (int64_t r = 0; r < n; r++) {
        max[r] = -kInf<T>, sum[r] = 0;
        if (begin < end) softmax_row(keys, 0, i + r, x + r * ldx, max[r], sum[r]);
      }
    }
  };
};

// Forward. A task is a tile of queries, or one part of its keys where there are fewer tiles than threads; the
// parts are joined by their maxima.
template <class S>
struct AdditiveFwd : Additive<S> {
  using Base = Additive<S>;
  using Base::kKeys, Base::ld, Base::lds, Base::ldv, Base::rows, Base::team, Base::tiles, Base::W;
  using typename Base::Buffers, typename Base::T, typename Base::Tile;
  static constexpr int64_t kPart = 128;  // least keys of a part

  const AdditiveAttentionFwdParams& p;
  int64_t parts;

  PerThread<T> x, out, max, sum;  // of each thread, or of each task where parts are joined
  PerThread<char> buffers;

  explicit AdditiveFwd(const AdditiveAttentionFwdParams& params) : Base(params), p(params) {
    parts = busy_splits(p.B * tiles, p.parallel.threads, p.Tk / kPart);
  }
  int64_t tasks() const { return p.B * tiles * parts; }
  int wanted() const { return attention_threads(p, tasks(), kTanhCost); }

  void layout(Arena& a) {
    Base::layout(a);
    const int64_t count = parts == 1 ? team : tasks();
    x = a.take_each<T>(count, rows * ldx());
    out = a.take_each<T>(count, rows * ldv);
    max = a.take_each<T>(count, rows), sum = a.take_each<T>(count, rows);
    buffers = a.take_buffers<Buffers>(team, *this);
  }

  void thread(int id, int size) {
    Arena own{buffers[id]};
    const Buffers m(*this, own);
    for (int64_t task; (task = this->queue->take()) < tasks();) {
      part(m, task, parts == 1 ? id : task);
      if (parts == 1) join(task, id);
    }
    if (parts == 1) return;
    this->barrier->wait(size);
    for (int64_t n = id; n < p.B * tiles; n += size) join(n, n * parts);
  }

  int64_t first_key(const Span& span, int64_t part) const { return span.Tk * part / parts; }
  int64_t ldx() const { return round_up(divide_up(p.Tk, parts), W); }  // rows of scores of a part

  void part(const Buffers& m, int64_t task, int64_t at) {
    Tile tile(*this, m, task / parts / tiles, task / parts % tiles);
    const int64_t begin = first_key(tile.span, task % parts), end = first_key(tile.span, task % parts + 1);
    tile.softmax(begin, end, x[at], ldx(), max[at], sum[at]);
    const S* values = row_of<S>(p.v, tile.b, 0, begin);
    if (tile.n < Base::kFew) {
      T* to = out[at];
      const T by[Base::kFew] = {};
      __builtin_memset(static_cast<void*>(to), 0, sizeof(T) * tile.n * ldv);
      return few_values(tile.n, end - begin, x[at], ldx(), values, p.v.t, ahead_of<S>(p.Dv, p.v.t), p.Dv, by,
                        to, ldv);
    }
    Start start = Start::zero;
    for (int64_t j = begin; j < end; j += kKeys, start = Start::c) {
      const int64_t nk = min_of(kKeys, end - j);
      const Rows<T> v = as_operand<T>(values + (j - begin) * p.v.t, p.v.t, nk, p.Dv, m.v_copy, ldv);
      product<T, false>(tile.n, ldv, nk, x[at] + j - begin, ldx(), v.data, v.ld, out[at], ldv, start);
    }
  }

  // Output and weights of the n-th tile, whose parts lie from `at` on.
  void join(int64_t n, int64_t at) const {
    const int64_t b = n / tiles, first = n % tiles * rows;
    const Span span(p, b);
    for (int64_t r = 0; r < min_of(rows, p.Tq - first); r++) {
      T top = -kInf<T>, by[kMostParts];
      double total = 0;
      for (int64_t s = 0; s < parts; s++) top = max[at + s][r] > top ? max[at + s][r] : top;
      for (int64_t s = 0; s < parts; s++) {
        by[s] = top == -kInf<T> ? T(0) : T(__builtin_exp(double(max[at + s][r]) - double(top)));
        total += double(by[s]) * double(sum[at + s][r]);
      }
      for (int64_t s = 0; s < parts; s++) by[s] = total == 0 ? T(0) : T(double(by[s]) / total);
      S* to = row_of<S>(p.out, b, 0, first + r);
      for (int64_t d = 0; d < p.Dv; d += W) {
        Vec<T> o{};
        for (int64_t s = 0; s < parts; s++)
          if (first_key(span, s) < first_key(span, s + 1)) o += load(out[at + s] + r * ldv + d) * by[s];
        store(to + d, o, p.Dv - d);
      }
      if (!p.weights) continue;
      S* weights = static_cast<S*>(p.weights) + (b * p.Tq + first + r) * p.Tk;
      for (int64_t s = 0; s < parts; s++) {
        const int64_t begin = first_key(span, s), end = first_key(span, s + 1);
        for (int64_t j = begin; j < end; j += W)
          store(weights + j, load(x[at + s] + r * ldx() + j - begin) * by[s], end - j);
      }
      for (int64_t j = span.Tk; j < p.Tk; j++) weights[j] = S{};
    }
  }
};

// Backward. A task is a sequence, or one part of its tiles where there are fewer sequences than threads; dk,
// dv and dw of the parts are added up in one order.
template <class S>
struct AdditiveBwd : Additive<S> {
  using Base = Additive<S>;
  using Base::kKeys, Base::ld, Base::lds, Base::ldv, Base::rows, Base::team, Base::tiles, Base::w, Base::W;
  using typename Base::Buffers, typename Base::T, typename Base::Tile;

  const AdditiveAttentionBwdParams& p;
  int64_t parts;

  PerThread<T> dk, dv;  // of each thread, or of each task where parts are added up
  T* dw;                // of each task
  PerThread<char> buffers;

  explicit AdditiveBwd(const AdditiveAttentionBwdParams& params) : Base(params), p(params) {
    parts = busy_splits(p.B, p.parallel.threads, min_of(tiles, 2 * p.parallel.threads / max_of(1, p.B)));
  }
  int64_t tasks() const { return p.B * parts; }
  int wanted() const { return attention_threads(p, tasks(), 3 * kTanhCost); }

  struct Own : Buffers {
    T *P, *dS, *max, *sum, *VT, *dO, *dq, *dk, *dw, *tile_dw;
    Own(const AdditiveBwd& f, Arena& a) : Buffers(f, a) {
      P = a.take<T>(f.rows * f.lds), dS = a.take<T>(f.rows * f.lds);
      max = a.take<T>(f.rows), sum = a.take<T>(f.rows);
      VT = a.take<T>(f.p.Dv * kKeys), dO = a.take<T>(f.rows * f.ldv), dq = a.take<T>(f.rows * f.ld);
      dk = a.take<T>(kKeys * f.ld), dw = a.take<T>(f.ld), tile_dw = a.take<T>(f.ld);
    }
  };
  void layout(Arena& a) {
    Base::layout(a);
    const int64_t count = parts == 1 ? team : tasks();
    dk = a.take_each<T>(count, p.Tk * ld);
    dv = a.take_each<T>(count, p.Tk * ldv);
    dw = a.take<T>(tasks() * ld);
    buffers = a.take_buffers<Own>(team, *this);
  }

  void thread(int id, int size) {
    Arena own{buffers[id]};
    const Own m(*this, own);
    for (int64_t task; (task = this->queue->take()) < tasks();) {
      const int64_t b = task / parts, at = parts == 1 ? id : task;
      clear(dk[at], p.Tk * ld), clear(dv[at], p.Tk * ldv), clear(m.dw, ld);
      for (int64_t t = tiles * (task % parts) / parts; t < tiles * (task % parts + 1) / parts; t++)
        tile(m, b, t, dk[at], dv[at]);
      __builtin_memcpy(static_cast<void*>(dw + task * ld), m.dw, sizeof(T) * ld);
      if (parts == 1) write_keys(b, at, 0, 1);
    }
    this->barrier->wait(size);
    for (int64_t b = 0; b < p.B && parts > 1; b++) write_keys(b, b * parts, id, size);
    if (id > 0) return;
    for (int64_t h = 0; h < p.D; h += W) {
      Vec<T> total{};
      for (int64_t task = 0; task < tasks(); task++) total += load(dw + task * ld + h);
      store(static_cast<S*>(p.dw) + h, total, p.D - h);
    }
  }
  static void add(const T* x, T* to, int64_t n) {
    for (int64_t i = 0; i < n; i += W) store(to + i, load(to + i) + load(x + i));
  }
  static void clear(T* x, int64_t n) { __builtin_memset(static_cast<void*>(x), 0, sizeof(T) * n); }

  void tile(const Own& m, int64_t b, int64_t index, T* dk_sums, T* dv_sums) {
    Tile t(*this, m, b, index);
    const int64_t keys = t.span.Tk;
    t.softmax(0, keys, m.P, lds, m.max, m.sum);
    const Rows<T> dO = as_operand<T>(row_of<S>(p.dout, b, 0, t.i), p.dout.t, t.n, p.Dv, m.dO, ldv);
    for (int64_t j = 0; j < keys; j += kKeys) {
      const int64_t nk = min_of(kKeys, keys - j), N = round_up(nk, W);
      pack_transposed(row_of<S>(p.v, b, 0, j), p.v.t, nk, p.Dv, m.VT, kKeys, N);
      product<T, false>(t.n, N, p.Dv, dO.data, dO.ld, m.VT, kKeys, m.dS + j, lds, Start::zero);
    }
    for (int64_t r = 0; r < t.n; r++)
      gradients_of_row((b * p.Tq + t.i + r) * p.Tk, keys, m.sum[r], m.P + r * lds, m.dS + r * lds);
    product<T, true>(keys, ldv, t.n, m.P, lds, dO.data, dO.ld, dv_sums, ldv, Start::c);
    clear(m.dq, t.n * ld), clear(m.tile_dw, ld);
    t.each_block(0, keys, [&](const auto& pair, const auto& of, int64_t j, int64_t nk) {
      clear(m.dk, nk * ld);
      score_gradients(pair, of, t.n, nk, ld, m.dS + j, lds, m.dq, m.dk, m.tile_dw);
      add(m.dk, dk_sums + j * ld, nk * ld);
    });
    add(m.tile_dw, m.dw, ld);
    for (int64_t r = 0; r < t.n; r++) write_row(m.dq + r * ld, row_of<S>(p.dq, b, 0, t.i + r));
  }

  // P: e^(S - max) and their sum -> weights; dS: dO V^T -> dS. `row`: of dweights and dmask.
  void gradients_of_row(int64_t row, int64_t keys, T sum, T* P, T* dS) const {
    if (sum == T(0)) {  // no key is seen, whatever dO is
      clear(P, lds), clear(dS, lds);
      if (p.dmask) clear(static_cast<T*>(p.dmask) + row, p.Tk);
      return;
    }
    const T inverse = 1 / sum;
    const S* dweights = static_cast<const S*>(p.dweights) + (p.dweights ? row : 0);
    Vec<T> deltas{};
    for (int64_t j = 0; j < keys; j += W) {
      const Vec<T> weight = load(P + j) * inverse;
      Vec<T> dP = load(dS + j);
      if (p.dweights) dP += load(dweights + j, keys - j);
      store(P + j, weight), store(dS + j, dP);
      deltas += weight * dP;
    }
    const T delta = reduce_lanes<T>(deltas, [](Vec<T> a, Vec<T> b) { return a + b; });
    for (int64_t j = 0; j < keys; j += W) store(dS + j, load(P + j) * (load(dS + j) - delta));
    if (!p.dmask) return;
    T* dmask = static_cast<T*>(p.dmask) + row;
    __builtin_memcpy(static_cast<void*>(dmask), dS, sizeof(T) * keys);
    clear(dmask + keys, p.Tk - keys);
  }

  void write_row(const T* x, S* to) const {  // of dq or dk, which lack the factor w
    for (int64_t h = 0; h < p.D; h += W) store(to + h, load(x + h) * load(w + h), p.D - h);
  }
  // Keys id, id + size ... of sequence b, whose sums lie from `at` on.
  void write_keys(int64_t b, int64_t at, int64_t id, int64_t size) const {
    for (int64_t j = id; j < p.Tk; j += size) {
      T *key = dk[at] + j * ld, *value = dv[at] + j * ldv;
      for (int64_t s = 1; s < parts; s++) {
        add(dk[at + s] + j * ld, key, ld);
        add(dv[at + s] + j * ldv, value, ldv);
      }
      write_row(key, row_of<S>(p.dk, b, 0, j));
      S* to = row_of<S>(p.dv, b, 0, j);
      for (int64_t d = 0; d < p.Dv; d += W) store(to + d, load(value + d), p.Dv - d);
    }
  }
};

template <class S>
static void additive_attention_fwd(const AdditiveAttentionFwdParams& p) {
  run_kernel(p.parallel, AdditiveFwd<S>(p));
}
template <class S>
static void additive_attention_bwd(const AdditiveAttentionBwdParams& p) {
  run_kernel(p.parallel, AdditiveBwd<S>(p));
}
