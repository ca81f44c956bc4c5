// Forward of attention for few queries (decoding): up to 16 rows, a row being a query of one of the heads
// that share a key head. Bound by memory: every key and value is read once, as it lies, converted on load.
// Features lie in the lanes for scores (W dot products at a time) and for values, keys in between. A task is
// one part of the keys of one key head, because there may be fewer heads than threads; the parts' sums are
// joined by their maxima.
#pragma once

#include "attention.inl.h"
#include "direct.inl.h"

// Of K and V to prefetch: 2 KB are too few for memory, 16 too many for L3.
constexpr int64_t kBytesAhead = 8192;

// out [rows, features] = out * by[row] + P [rows, nk] V, features in the lanes.
template <class S, int rows, int NV>
static void values_tile(int64_t nk, const Acc<S>* P, int64_t ldp, const S* v, int64_t ldv, int64_t ahead,
                        int64_t features, const Acc<S>* by, Acc<S>* out, int64_t ldo) {
  using T = Acc<S>;
  constexpr int W = kLanes<T>;
  Vec<T> acc[rows][NV];
  SEQ_UNROLL for (int r = 0; r < rows; r++) SEQ_UNROLL for (int i = 0; i < NV; i++) acc[r][i] =
      load(out + r * ldo + i * W) * by[r];
  const bool whole = features >= NV * W;
  _Pragma("GCC unroll 1") for (int64_t k = 0; k < nk; k++, v += ldv) {
    SEQ_UNROLL for (int i = 0; i < NV; i++) {
      __builtin_prefetch(v + ahead + i * W);
      const Vec<T> x = whole              ? load(v + i * W)
                       : i * W < features ? load(v + i * W, features - i * W)
                                          : Vec<T>{};
      SEQ_UNROLL for (int r = 0; r < rows; r++) acc[r][i] += P[r * ldp + k] * x;
    }
  }
  SEQ_UNROLL for (int r = 0; r < rows; r++) SEQ_UNROLL for (int i = 0; i < NV; i++)
      store(out + r * ldo + i * W, acc[r][i]);
}

// The same for any number of rows and of features; rows of out are padded to whole vectors, ldo apart.
template <class S>
static void few_values(int64_t R, int64_t nk, const Acc<S>* P, int64_t ldp, const S* v, int64_t ldv,
                       int64_t ahead, int64_t features, const Acc<S>* by, Acc<S>* out, int64_t ldo) {
  constexpr int NV = 4, W = kLanes<Acc<S>>;
  for (int64_t d = 0; d < ldo; d += NV * W)
    by_rows<Acc<S>>(R, [&]<int rows>(int64_t r) {
      Acc<S>* to = out + r * ldo + d;
      if (ldo - d >= NV * W)
        values_tile<S, rows, NV>(nk, P + r * ldp, ldp, v + d, ldv, ahead, features - d, by + r, to, ldo);
      else
        for (int64_t i = 0; i < ldo - d; i += W)
          values_tile<S, rows, 1>(nk, P + r * ldp, ldp, v + d + i, ldv, ahead, features - d - i, by + r,
                                  to + i, ldo);
    });
}
// Rows to read ahead of `features`, in elements.
template <class S>
static int64_t ahead_of(int64_t features, int64_t stride) {
  return divide_up(kBytesAhead, int64_t(sizeof(S)) * max_of(1, features)) * stride;
}

template <class S>
struct AttentionFew {
  using T = Acc<S>;
  using O = Operand<S>;
  static constexpr int W = kLanes<T>;
  // Most rows; keys at a time; least keys of a part.
  static constexpr int64_t kRows = 16, kK = 256, kPart = 256;

  const AttentionFwdParams& p;
  const int64_t group, ldq, ldv, k_ahead, v_ahead;
  const ScoreRule<T> rule;
  const int team;  // threads at most
  int64_t parts = 1;

  Queue* queue;
  Barrier* barrier;
  PerThread<O> q;      // rows of Q
  PerThread<T> x;      // scores
  T *max, *sum, *out;  // of each task: by row

  // With more than 8 rows to fill the lanes the other kernel is faster, if it has enough tasks. Dropout is
  // for training, with more.
  static bool suits(const AttentionFwdParams& p) {
    const int64_t rows = p.Hk > 0 && !p.dropout ? p.Hq / p.Hk * p.Tq : 2 * kRows;
    return rows <= kRows / 2 || (rows <= kRows && p.B * p.Hk < p.parallel.threads);
  }

  explicit AttentionFew(const AttentionFwdParams& params)
      : p(params),
        group(p.Hq / p.Hk),
        ldq(round_up(p.D, W)),
        ldv(round_up(p.Dv, W)),
        k_ahead(ahead_of<S>(p.D, p.k.t)),
        v_ahead(ahead_of<S>(p.Dv, p.v.t)),
        rule(p),
        team(p.parallel.threads) {
    parts = busy_splits(p.B * p.Hk, p.parallel.threads, p.Tk / kPart);
  }
  int64_t tasks() const { return p.B * p.Hk * parts; }
  int64_t out_size() const { return group * p.Tq * ldv; }  // of a task

  void layout(Arena& a) {
    queue = a.take_zeros<Queue>(1);
    barrier = a.take_zeros<Barrier>(1);
    q = a.take_each<O>(team, kRows * ldq);
    x = a.take_each<T>(team, kRows * kK);
    max = a.take<T>(tasks() * kRows);
    sum = a.take<T>(tasks() * kRows);
    out = a.take<T>(tasks() * out_size());
  }
  void prepare() const {}
  int wanted() const { return attention_threads(p, tasks()); }

  void thread(int id, int size) {
    for (int64_t task; (task = queue->take()) < tasks();) {
      part(id, task);
      if (parts == 1) join(task);
    }
    if (parts == 1) return;
    barrier->wait(size);
    for (int64_t n = id; n < p.B * p.Hk; n += size) join(n);
  }

  void part(int id, int64_t task) {
    const int64_t head = task / parts, b = head / p.Hk, hk = head % p.Hk;
    const Span span(p, b);
    const int64_t R = group * span.Tq;
    O* qs = q[id];
    T *xs = x[id], *m = max + task * kRows, *l = sum + task * kRows, *o = out + task * out_size();
    for (int64_t r = 0; r < R; r++) {
      copy_row(row_of<S>(p.q, span.batch, hk * group + r / span.Tq, span.q0 + r % span.Tq), p.D, qs + r * ldq,
               ldq);
      m[r] = -kInf<T>, l[r] = 0;
    }
    __builtin_memset(static_cast<void*>(o), 0, sizeof(T) * R * ldv);
    if (R == 0) return;
    const int64_t first = span.first_key(0), keys = max_of(0, span.end_key(span.Tq - 1) - first),
                  j1 = first + keys * (task % parts + 1) / parts;
    for (int64_t j = first + keys * (task % parts) / parts; j < j1; j += kK) {
      const KeyBlock<S> block(p, rule, span, b, j, min_of(j + kK, j1));
      const S *k = row_of<S>(p.k, span.batch, hk, span.k0 + j),
              *v = row_of<S>(p.v, span.batch, hk, span.k0 + j);
      direct_products(R, block.nk, xs, kK, Term<S, O>{k, p.k.t, qs, ldq, p.D, k_ahead});
      T by[kRows];
      for (int64_t r = 0; r < R; r++)
        by[r] = softmax_row(block, hk * group + r / span.Tq, r % span.Tq, xs + r * kK, m[r], l[r]);
      few_values(R, block.nk, xs, kK, v, p.v.t, v_ahead, p.Dv, by, o, ldv);
    }
  }

  void join(int64_t head) const {
    const int64_t b = head / p.Hk, hk = head % p.Hk;
    const Span span(p, b);
    for (int64_t r = 0; r < group * span.Tq; r++) {
      const int64_t h = hk * group + r / span.Tq, i = r % span.Tq;
      const T *m = max + head * parts * kRows + r, *l = sum + head * parts * kRows + r;
      const double sink = p.sinks ? double(static_cast<const T*>(p.sinks)[h]) : -kInf<double>;
      double top = sink, total = 0;
      for (int64_t s = 0; s < parts; s++) top = m[s * kRows] > top ? m[s * kRows] : top;
      const double zero = top == -kInf<double> ? 0 : top;
      T by[kMostParts];
      for (int64_t s = 0; s < parts; s++) {
        by[s] = T(__builtin_exp(double(m[s * kRows]) - zero));
        total += double(by[s]) * l[s * kRows];
      }
      if (sink != -kInf<double>) total += __builtin_exp(sink - zero);
      static_cast<T*>(p.lse)[span.lse + h * span.lse_h + i] = T(zero + __builtin_log(total));
      const T inverse = total == 0 ? T(0) : T(1 / total);
      S* to = row_of<S>(p.out, span.batch, h, span.q0 + i);
      for (int64_t d = 0; d < p.Dv; d += W) {
        Vec<T> o{};
        for (int64_t s = 0; s < parts; s++)
          o += load(out + (head * parts + s) * out_size() + r * ldv + d) * by[s];
        store(to + d, o * inverse, p.Dv - d);
      }
    }
  }
};
