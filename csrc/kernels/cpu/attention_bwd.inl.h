// Backward of attention, and attention weights.
//
// Keys lie in the lanes: up to 64 of them make a block, whose K^T and V^T are packed once and whose dK^T and
// dV^T stay in L1 and L2 while the queries that see them pass by, 64 at a time, from all heads that share the
// key head:
//   S [queries, keys] = Q K^T,   P = exp(S - LSE),   dP = dO V^T,   dS = P (dP - delta),   delta = rowsum(dO
//   O) - dLSE, dV^T += dO^T P,   dK^T += Q^T dS,   dQ += dS K.
// Five products (not seven), Q, dO and K read where they lie. A task is every `splits`-th block of one key
// head; dQ is summed in memory of its own, one for each task where there are several for a key head, and
// those are added up in one order. No atomics: the result does not depend on which thread did what.
#pragma once

#include "attention.inl.h"

// Scores of queries [i, i + n) of head h and a block of keys in the lanes, as products left them, to logits.
template <class S>
struct KeyBlock {
  using T = Acc<S>;
  static constexpr int W = kLanes<T>;
  static constexpr int64_t kK = kBlock<T>;

  const AttentionParams& p;
  const ScoreRule<T>& rule;
  const Span& span;
  const int64_t b, j, nk, N;  // sequence, keys [j, j + nk), lanes

  KeyBlock(const AttentionParams& params, const ScoreRule<T>& r, const Span& s, int64_t seq, int64_t j0)
      : p(params), rule(r), span(s), b(seq), j(j0), nk(least(kK, s.Tk - j0)), N(round_up(nk, W)) {}

  int64_t first_query() const { return span.first_query(j); }
  int64_t end_query() const { return span.end_query(j + nk - 1); }
  bool seen_by_all(int64_t i, int64_t n) const {
    return span.first_key(i + n - 1) <= j && j + nk <= span.end_key(i);
  }

  // P of W keys of one query, from lane l on. `slope`: derivative of the logit by the scaled score.
  Vec<T> weights(Vec<T> s, int64_t h, int64_t i, int64_t l, T lse, bool limits, Vec<T>& slope) const {
    const T c = rule.log2_scale();
    slope = splat(T(1));
    if (rule.natural)
      s = rule(s, T(j + l - i - span.offset) + iota<T>(),
               splat(p.alibi ? T(p.alibi[b * p.alibi_b + h]) : T(0)), slope);
    if (p.mask_kind != MaskKind::none && l < nk) {
      const Vec<T> m = mask_values<S>(p, mask_offset(p, b, h, i), j + l, nk - l);
      if (p.mask_kind != MaskKind::boolean)
        s += m;
      else
        s = m < T(0) ? m * (c < 0 ? T(-1) : T(1)) : s;  // c s = -inf
    }
    Vec<T> e = exp2_of<T>(s * c - lse, splat(T(1)), Vec<T>{});
    if (limits) {
      const Vec<T> at = iota<T>() + T(l);
      e = at < T(most(0, least(nk, span.first_key(i) - j))) ? Vec<T>{} : e;
      e = at >= T(most(0, least(nk, span.end_key(i) - j))) ? Vec<T>{} : e;
    }
    return e;
  }
};

// LSE as exp2 subtracts it. Where no key is seen every P is 0.
template <class T>
SEQ_INLINE T log2_of(T lse) {
  return lse == -kInf<T> ? kInf<T> : T(double(lse) * kLog2e);
}

template <class S>
struct AttentionBwd {
  using T = Acc<S>;
  static constexpr int W = kLanes<T>;
  static constexpr int64_t kK = kBlock<T>, kQ = 64;

  const AttentionBwdParams& p;
  const int64_t group, ldk, ldv;  // of rows with features in the lanes
  const ScoreRule<T> rule;
  const bool in_turn;  // one dmask for several key heads: a task is a split of all of them
  int64_t splits = 1;
  int team = 1;

  int64_t* next;
  Barrier* barrier;
  T *dQ, *dsink, *buffers;

  explicit AttentionBwd(const AttentionBwdParams& params)
      : p(params),
        group(p.Hk ? p.Hq / p.Hk : 0),
        ldk(round_up(p.D, W)),
        ldv(round_up(p.Dv, W)),
        rule(p),
        in_turn(p.dmask && (p.B * p.Hk > 1) && (p.mask_b == 0 || p.mask_h == 0)) {
    // As few splits as keep all threads busy; they depend on nothing but the call.
    const int64_t threads = p.parallel.threads, heads = in_turn ? 1 : p.B * p.Hk,
                  blocks = (p.Tk + kK - 1) / kK;
    const auto busy = [&](int64_t s) {
      const int64_t n = heads * s;
      return double(n) / double((n + threads - 1) / threads * threads);
    };
    while (splits < 2 * threads && 2 * splits <= blocks && heads > 0 && busy(splits) < 0.9) splits++;
    if (p.dmask && p.mask_k == 0) splits = 1;  // all keys of a query share one sum
  }

  int64_t dq_buffers() const { return splits == 1 ? team : p.B * p.Hk * splits; }
  int64_t dq_size() const { return group * p.Tq * ldk; }
  int64_t tasks() const { return in_turn ? splits : p.B * p.Hk * splits; }

  struct Buffers {
    T *KT, *VT, *dKT, *dVT, *K, *Q, *dO, *P, *dS, *lse, *delta;
    Buffers(const AttentionBwd& f, Arena& a) {
      const bool converted = !std::is_same_v<S, T>;
      KT = a.take<T>(f.p.D * kK), dKT = a.take<T>(f.p.D * kK);
      VT = a.take<T>(f.p.Dv * kK), dVT = a.take<T>(f.p.Dv * kK);
      K = a.take<T>(kK * f.ldk);
      Q = a.take<T>(converted ? kQ * f.p.D : 0), dO = a.take<T>(converted ? kQ * f.p.Dv : 0);
      P = a.take<T>(kQ * kK), dS = a.take<T>(kQ * kK);
      lse = a.take<T>(f.group * f.p.Tq), delta = a.take<T>(f.group * f.p.Tq);
    }
  };
  void layout(Arena& a) {
    next = a.take<int64_t>(1);
    barrier = a.take<Barrier>(1);
    dsink = a.take<T>(p.dsinks ? p.B * p.Hq : 0);
    dQ = a.take<T>(dq_buffers() * dq_size());
    Arena one;
    Buffers count(*this, one);
    buffers = a.take<T>(0);
    for (int i = 0; i < team; i++) Buffers(*this, a);
  }
  void prepare() {
    *next = 0;
    __builtin_memset(static_cast<void*>(barrier), 0, sizeof(Barrier));
    if (p.dmask) __builtin_memset(p.dmask, 0, sizeof(T) * mask_size());
  }

  // dmask: contiguous, 1 where the mask is broadcast.
  int64_t size_q() const { return p.mask_q ? p.Tq : 1; }
  int64_t size_k() const { return p.mask_k ? p.Tk : 1; }
  int64_t size_h() const { return p.mask_h ? p.Hq : 1; }
  int64_t mask_size() const { return (p.mask_b ? p.B : 1) * size_h() * size_q() * size_k(); }
  T* dmask_row(int64_t b, int64_t h, int64_t i) const {
    const int64_t row = ((p.mask_b ? b : 0) * size_h() + (p.mask_h ? h : 0)) * size_q() + (p.mask_q ? i : 0);
    return static_cast<T*>(p.dmask) + row * size_k();
  }

  void thread(int id, int size) {
    Arena arena{reinterpret_cast<char*>(buffers)};
    for (int i = 0; i < id; i++) Buffers(*this, arena);
    Worker worker{*this, p, Buffers(*this, arena)};
    for (;;) {
      const int64_t task = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
      if (task >= tasks()) break;
      const int64_t split = task % splits;
      for (int64_t n = in_turn ? 0 : task / splits; n < (in_turn ? p.B * p.Hk : task / splits + 1); n++)
        worker.run(n / p.Hk, n % p.Hk, split, dQ + (splits == 1 ? id : n * splits + split) * dq_size());
    }
    if (splits == 1 && !p.dsinks) return;
    barrier->wait(size);
    if (splits > 1)
      for (int64_t n = id; n < p.B * p.Hq; n += size) add_dq(n / p.Hq, n % p.Hq);
    if (p.dsinks && id == 0)
      for (int64_t h = 0; h < p.Hq; h++) {
        double total = 0;
        for (int64_t b = 0; b < p.B; b++) total += dsink[b * p.Hq + h];
        static_cast<T*>(p.dsinks)[h] = T(total);
      }
  }

  void write_dq(const Span& span, int64_t h, const T* from) const {
    for (int64_t i = 0; i < span.Tq; i++)
      for (int64_t d = 0; d < p.D; d += W)
        store(row_of<S>(p.dq, span.batch, h, span.q0 + i) + d, load(from + i * ldk + d) * T(p.scale),
              p.D - d);
  }
  void add_dq(int64_t b, int64_t h) const {
    const Span span(p, b);
    T* first = dQ + (b * p.Hk + h / group) * splits * dq_size() + h % group * p.Tq * ldk;
    for (int64_t s = 1; s < splits; s++)
      for (int64_t n = 0; n < span.Tq * ldk; n += W)
        store(first + n, load(first + n) + load(first + s * dq_size() + n));
    write_dq(span, h, first);
  }

  struct Worker {
    const AttentionBwd& f;
    const AttentionBwdParams& p;
    const Buffers m;

    void run(int64_t b, int64_t hk, int64_t split, T* dq) {
      const Span span(p, b);
      for (int64_t g = 0; g < f.group; g++) prepare_rows(span, b, hk * f.group + g, g, split);
      __builtin_memset(static_cast<void*>(dq), 0, sizeof(T) * f.dq_size());
      for (int64_t j = split * kK; j < span.Tk; j += f.splits * kK) block(span, b, hk, j, dq);
      if (f.splits == 1)
        for (int64_t g = 0; g < f.group; g++) f.write_dq(span, hk * f.group + g, dq + g * p.Tq * f.ldk);
      if (split == 0)  // keys beyond the length
        for (int64_t j = span.Tk; j < p.Tk && !p.cu_k; j++) {
          __builtin_memset(static_cast<void*>(row_of<S>(p.dk, b, hk, j)), 0, sizeof(S) * p.D);
          __builtin_memset(static_cast<void*>(row_of<S>(p.dv, b, hk, j)), 0, sizeof(S) * p.Dv);
        }
    }

    void prepare_rows(const Span& span, int64_t b, int64_t h, int64_t g, int64_t split) {
      const T *lse = static_cast<const T*>(p.lse) + span.lse + h * span.lse_h,
              *dlse = p.dlse ? static_cast<const T*>(p.dlse) + span.lse + h * span.lse_h : nullptr;
      double dsink = 0;
      for (int64_t i = 0; i < span.Tq; i++) {
        const S *o = row_of<S>(p.out, span.batch, h, span.q0 + i),
                *d = row_of<S>(p.dout, span.batch, h, span.q0 + i);
        Vec<T> sum{};
        for (int64_t v = 0; v < p.Dv; v += W) sum += load(o + v, p.Dv - v) * load(d + v, p.Dv - v);
        T delta = dlse ? -dlse[i] : T(0);
        for (int r = 0; r < W; r++) delta += sum[r];
        m.delta[g * p.Tq + i] = delta;
        m.lse[g * p.Tq + i] = log2_of(lse[i]);
        if (p.dsinks && lse[i] != -kInf<T>)
          dsink -= __builtin_exp(double(static_cast<const T*>(p.sinks)[h]) - double(lse[i])) * double(delta);
      }
      if (p.dsinks && split == 0) f.dsink[b * p.Hq + h] = T(dsink);
    }

    void block(const Span& span, int64_t b, int64_t hk, int64_t j, T* dq) {
      const KeyBlock<S> keys(p, f.rule, span, b, j);
      const int64_t N = keys.N, nk = keys.nk;
      const S *k = row_of<S>(p.k, span.batch, hk, span.k0 + j),
              *v = row_of<S>(p.v, span.batch, hk, span.k0 + j);
      pack_transposed(k, p.k.t, nk, p.D, m.KT, kK, N);
      pack_transposed(v, p.v.t, nk, p.Dv, m.VT, kK, N);
      int64_t ldk;
      const T* rows = as_operand<T>(k, p.k.t, nk, p.D, m.K, f.ldk, true, ldk);
      Start start = Start::zero;
      for (int64_t g = 0; g < f.group; g++)
        for (int64_t i = keys.first_query(); i < keys.end_query(); i += kQ) {
          const int64_t h = hk * f.group + g, n = least(kQ, keys.end_query() - i), row = g * p.Tq + i;
          int64_t ldq, ldo;
          const T *q = as_operand<T>(row_of<S>(p.q, span.batch, h, span.q0 + i), p.q.t, n, p.D, m.Q, p.D,
                                     false, ldq),
                  *d = as_operand<T>(row_of<S>(p.dout, span.batch, h, span.q0 + i), p.dout.t, n, p.Dv, m.dO,
                                     p.Dv, false, ldo);
          product<T, false>(n, N, p.D, q, ldq, m.KT, kK, m.P, kK, Start::zero);
          product<T, false>(n, N, p.Dv, d, ldo, m.VT, kK, m.dS, kK, Start::zero);
          gradients(keys, h, i, n, row);
          product<T, true>(p.Dv, N, n, d, ldo, m.P, kK, m.dVT, kK, start);
          product<T, true>(p.D, N, n, q, ldq, m.dS, kK, m.dKT, kK, start);
          product<T, false>(n, f.ldk, nk, m.dS, kK, rows, ldk, dq + row * f.ldk, f.ldk, Start::c);
          start = Start::c;
        }
      T factor[kK];
      write(m.dKT, nk, p.D, start == Start::zero, T(p.scale), factor,
            [&](int64_t l) { return row_of<S>(p.dk, span.batch, hk, span.k0 + j + l); });
      write(m.dVT, nk, p.Dv, start == Start::zero, T(1), factor,
            [&](int64_t l) { return row_of<S>(p.dv, span.batch, hk, span.k0 + j + l); });
    }

    // P and dP, products until now, become P and dS.
    void gradients(const KeyBlock<S>& keys, int64_t h, int64_t i, int64_t n, int64_t row) {
      const bool limits = !keys.seen_by_all(i, n);
      for (int64_t r = 0; r < n; r++) {
        const T lse = m.lse[row + r], delta = m.delta[row + r];
        for (int64_t l = 0; l < keys.N; l += W) {
          T *P = m.P + r * kK + l, *dS = m.dS + r * kK + l;
          Vec<T> slope;
          const Vec<T> e = keys.weights(load(P), h, i + r, l, lse, limits, slope);
          Vec<T> ds = e * (load(dS) - delta);
          if (p.dmask && l < keys.nk) add_dmask(f.dmask_row(keys.b, h, i + r), keys.j + l, ds, keys.nk - l);
          store(P, e);
          store(dS, ds * slope);
        }
      }
    }
    void add_dmask(T* to, int64_t j, Vec<T> ds, int64_t n) const {
      if (p.mask_k) return store(to + j, load(static_cast<const T*>(to + j), n) + ds, n);
      for (int64_t l = 0; l < least(n, W); l++) *to += ds[l];
    }

    template <class Row>
    void write(T* x, int64_t n, int64_t features, bool zero, T by, T* factor, const Row& row) {
      if (zero) __builtin_memset(static_cast<void*>(x), 0, sizeof(T) * features * kK);
      for (int64_t l = 0; l < kK; l++) factor[l] = by;
      write_columns<S>(x, kK, n, features, factor, row);
    }
  };
};

template <class S>
static void attention_bwd(const AttentionBwdParams& p) {
  AttentionBwd<S> backward(p);
  Arena count;
  backward.team = p.parallel.threads;
  backward.layout(count);
  Arena arena{static_cast<char*>(scratch_alloc(count.used))};
  backward.layout(arena);
  backward.prepare();
  run_team(p.parallel, attention_team(p, backward.tasks()),
           [&](int id, int size) { backward.thread(id, size); });
  scratch_free(arena.base);
}

// P once more, for need_weights: a task is a block of queries, of all heads where their mean is wanted.
template <class S>
static void attention_weights(const AttentionWeightsParams& p) {
  using T = Acc<S>;
  constexpr int W = kLanes<T>;
  constexpr int64_t kK = kBlock<T>, kQ = 64;
  const int64_t heads = p.mean ? 1 : p.Hq, width = round_up(p.Tk, W), blocks = (p.Tq + kQ - 1) / kQ,
                tasks = p.B * heads * blocks;
  const ScoreRule<T> rule(p);
  struct Buffers {
    T *KT, *P, *Q, *rows;
    Buffers(const AttentionWeightsParams& p, Arena& a, int64_t width) {
      KT = a.take<T>(p.D * kBlock<T>), P = a.take<T>(64 * kBlock<T>);
      Q = a.take<T>(std::is_same_v<S, T> ? 0 : 64 * p.D), rows = a.take<T>(64 * width);
    }
  };
  Arena count;
  for (int i = 0; i < p.parallel.threads; i++) Buffers(p, count, width);
  count.take<int64_t>(1);
  const Arena arena{static_cast<char*>(scratch_alloc(count.used))};
  int64_t* next = reinterpret_cast<int64_t*>(arena.base + count.used - 128);
  *next = 0;
  run_team(p.parallel, attention_team(p, tasks), [&](int id, int) {
    Arena mine = arena;
    for (int i = 0; i < id; i++) Buffers(p, mine, width);
    const Buffers m(p, mine, width);
    for (;;) {
      const int64_t task = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
      if (task >= tasks) break;
      const int64_t b = task / (heads * blocks), i = task % blocks * kQ, n = least(kQ, p.Tq - i);
      const Span span(p, b);
      __builtin_memset(static_cast<void*>(m.rows), 0, sizeof(T) * n * width);
      const int64_t h0 = p.mean ? 0 : task / blocks % heads, h1 = p.mean ? p.Hq : h0 + 1;
      for (int64_t h = h0; h < h1; h++) {
        const T* lse = static_cast<const T*>(p.lse) + span.lse + h * span.lse_h + i;
        int64_t ldq;
        const T* q = as_operand<T>(row_of<S>(p.q, b, h, i), p.q.t, n, p.D, m.Q, p.D, false, ldq);
        for (int64_t j = span.first_key(i) / kK * kK; j < span.end_key(i + n - 1); j += kK) {
          const KeyBlock<S> keys(p, rule, span, b, j);
          pack_transposed(row_of<S>(p.k, b, h / (p.Hq / p.Hk), j), p.k.t, keys.nk, p.D, m.KT, kK, keys.N);
          product<T, false>(n, keys.N, p.D, q, ldq, m.KT, kK, m.P, kK, Start::zero);
          const bool limits = !keys.seen_by_all(i, n) || keys.nk < keys.N;
          for (int64_t r = 0; r < n; r++)
            for (int64_t l = 0; l < keys.N; l += W) {
              Vec<T> unused;
              T* to = m.rows + r * width + j + l;
              store(to, load(to) + keys.weights(load(m.P + r * kK + l), h, i + r, l, log2_of(lse[r]), limits,
                                                unused));
            }
        }
      }
      S* out = static_cast<S*>(p.weights) + ((b * heads + h0 * !p.mean) * p.Tq + i) * p.Tk;
      for (int64_t r = 0; r < n; r++)
        for (int64_t j = 0; j < p.Tk; j += W)
          store(out + r * p.Tk + j, load(m.rows + r * width + j) * (T(1) / T(p.mean ? p.Hq : 1)), p.Tk - j);
    }
  });
  scratch_free(arena.base);
}
