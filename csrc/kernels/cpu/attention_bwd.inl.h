// Backward of attention, and attention weights.
//
// Keys lie in the lanes: up to 64 of them make a block, whose K^T and V^T are packed once and whose dK^T and
// dV^T stay in L1 and L2 while the queries that see them pass by, 64 at a time, from all heads that share the
// key head:
//
//   S [queries, keys] = Q K^T,   P = exp(S - LSE),   dP = dO V^T,
//   delta = rowsum(dO * O) - dLSE,   dS = P (dP - delta),
//   dV^T += dO^T P,   dK^T += Q^T dS,   dQ += dS K,
//
// with dropout of P for dV and of dP.
//
// An LSE is rounded: far from 0 it has no digits left for log sum (none at -1e9, where a finite mask hides a
// whole row). For such rows the softmax is computed again from the scores: P = exp(S - max - log sum).
//
// Five products (not seven), Q, dO and K read where they lie. A task is every `splits`-th block of one key
// head; dQ is summed in memory of its own, one for each task where there are several for a key head, and
// those are added up in one order. No atomics: the result does not depend on which thread did what.
#pragma once

#include "attention.inl.h"

// P of logits, given the LSE of their query, or the largest of them and the log of the sum: at most 1, though
// an LSE may be rounded. Where no key is seen every P is 0.
template <class T>
SEQ_INLINE Vec<T> weights_of(Vec<T> logits, T lse, T log_sum) {
  const Vec<T> x = logits - (lse == -kInf<T> ? kInf<T> : lse) - log_sum;
  return exp2_of<T>(x > T(0) ? Vec<T>{} : x, splat(T(kLog2e)), Vec<T>{});
}

// From here on the LSE would make P wrong by more than 2^-16 (float).
template <class T>
static bool is_far(T lse) {
  return __builtin_fabs(double(lse)) > 256 && __builtin_fabs(double(lse)) < kInf<double>;
}

template <class S>
struct AttentionBwd {
  using T = Acc<S>;
  using O = Operand<S>;
  static constexpr bool kPacked = sizeof(O) == 2;
  static constexpr int W = kLanes<T>;
  static constexpr int64_t kK = kBlock<T>, kQ = 64;

  const AttentionBwdParams& p;
  const int64_t group, ldk, ldv, max_q;  // rows of D and Dv features, queries: padded
  const ScoreRule<T> rule;
  const Philox philox;
  const bool in_turn;  // one dmask for several key heads: a task is a split of all of them
  const int team;      // threads at most
  int64_t splits = 1;

  Queue* queue;
  Barrier* barrier;
  PerThread<T> dQ;  // or of each task, where a key head has several, without those that lie in place
  T* dsink;
  PerThread<char> buffers;

  explicit AttentionBwd(const AttentionBwdParams& params)
      : p(params),
        group(p.Hk ? p.Hq / p.Hk : 0),
        ldk(kPacked ? round_up(max_of(p.D, 1), 32) : round_up(p.D, W)),
        ldv(kPacked ? round_up(max_of(p.Dv, 1), 32) : round_up(p.Dv, W)),
        max_q(kPacked ? round_up(p.Tq, kQ) : p.Tq),
        rule(p),
        philox(p.dropout),
        in_turn(p.dmask && (p.B * p.Hk > 1) && (p.mask_b == 0 || p.mask_h == 0)),
        team(p.parallel.threads) {
    splits = busy_splits(in_turn ? 1 : p.B * p.Hk, p.parallel.threads, divide_up(p.Tk, kK) / 2);
    if (p.dmask && p.mask_k == 0) splits = 1;  // all keys of a query share one sum
  }

  // Of several tasks of a key head the first sums dQ where it belongs.
  bool in_place() const { return std::is_same_v<S, T> && splits > 1 && ldk == p.D; }
  int64_t dq_buffers() const { return splits == 1 ? team : p.B * p.Hk * (splits - in_place()); }
  int64_t dq_size() const { return group * max_q * ldk; }
  int64_t tasks() const { return in_turn ? splits : p.B * p.Hk * splits; }

  struct Buffers {
    T *dKT, *dVT, *P, *dS, *lse, *log_sum, *delta;
    O *KT, *VT, *K, *Q, *dO;  // K and of the queries: rows, where they are not read in place
    O *QT, *dOT, *narrow_dS;  // packed: per head and block of queries [ldk or ldv, kQ]; rows of dS
    Buffers(const AttentionBwd& f, Arena& a) {
      const bool in_place = std::is_same_v<S, T>;
      const int64_t rows = kPacked ? f.group * f.max_q : in_place ? 0 : kQ, columns = kPacked ? rows : 0;
      dKT = a.take<T>(f.ldk * kK), dVT = a.take<T>(f.ldv * kK);
      P = a.take<T>(kQ * kK), dS = a.take<T>(kQ * kK);
      lse = a.take<T>(f.group * f.max_q), log_sum = a.take<T>(f.group * f.max_q);
      delta = a.take<T>(f.group * f.max_q);
      KT = a.take<O>(f.ldk * kK), VT = a.take<O>(f.ldv * kK), K = a.take<O>(kK * f.ldk);
      Q = a.take<O>(rows * f.ldk), dO = a.take<O>(rows * f.ldv);
      QT = a.take<O>(columns * f.ldk), dOT = a.take<O>(columns * f.ldv);
      narrow_dS = a.take<O>(kPacked ? kQ * kK : 0);
    }
  };
  void layout(Arena& a) {
    queue = a.take_zeros<Queue>(1);
    barrier = a.take_zeros<Barrier>(1);
    dsink = a.take<T>(p.dsinks ? p.B * p.Hq : 0);
    dQ = a.take_each<T>(dq_buffers(), dq_size());
    buffers = a.take_buffers<Buffers>(team, *this);
  }
  void prepare() {
    if (p.dmask) __builtin_memset(p.dmask, 0, sizeof(T) * mask_size());
  }
  int wanted() const { return attention_threads(p, tasks()); }

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
    Arena own{buffers[id]};
    Worker worker{*this, p, Buffers(*this, own)};
    if (kPacked) prepare_tiles();
    for (int64_t task; (task = queue->take()) < tasks();) {
      const int64_t split = task % splits;
      for (int64_t n = in_turn ? 0 : task / splits; n < (in_turn ? p.B * p.Hk : task / splits + 1); n++)
        worker.run(id, n / p.Hk, n % p.Hk, split);
    }
    release_tiles();
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

  // dQ of a task: query i of head g of the group.
  struct Sum {
    T* first;
    int64_t head, row;
    T* operator()(int64_t g, int64_t i) const { return first + g * head + i * row; }
  };
  Sum sum_of(const Span& span, int64_t n, int64_t split, int64_t id) const {
    if constexpr (std::is_same_v<S, T>)
      if (in_place() && split == 0)
        return {row_of<S>(p.dq, span.batch, n % p.Hk * group, span.q0), p.dq.h, p.dq.t};
    return {dQ[splits == 1 ? id : n * (splits - in_place()) + split - in_place()], max_q * ldk, ldk};
  }
  void write_dq(const Span& span, int64_t h, const Sum& sum) const {
    for (int64_t i = 0; i < span.Tq; i++)
      for (int64_t d = 0; d < p.D; d += W)
        store(row_of<S>(p.dq, span.batch, h, span.q0 + i) + d, load(sum(h % group, i) + d) * T(p.scale),
              p.D - d);
  }
  void add_dq(int64_t b, int64_t h) const {
    const Span span(p, b);
    const int64_t n = b * p.Hk + h / group, g = h % group;
    const Sum sum = sum_of(span, n, 0, 0);
    for (int64_t s = 1; s < splits; s++) {
      const Sum more = sum_of(span, n, s, 0);
      for (int64_t i = 0; i < span.Tq; i++)
        for (int64_t d = 0; d < ldk; d += W) store(sum(g, i) + d, load(sum(g, i) + d) + load(more(g, i) + d));
    }
    write_dq(span, h, sum);
  }

  struct Worker {
    const AttentionBwd& f;
    const AttentionBwdParams& p;
    const Buffers m;

    void run(int id, int64_t b, int64_t hk, int64_t split) {
      const Span span(p, b);
      const Sum dq = f.sum_of(span, b * p.Hk + hk, split, id);
      bool far = false;
      for (int64_t g = 0; g < f.group; g++) far |= prepare_rows(span, hk * f.group + g, g);
      if (far) redo_softmax(span, b, hk);
      for (int64_t g = 0; g < f.group && p.dsinks && split == 0; g++) add_dsink(span, b, hk * f.group + g, g);
      for (int64_t g = 0; g < f.group; g++)
        for (int64_t i = 0; i < span.Tq; i++)
          __builtin_memset(static_cast<void*>(dq(g, i)), 0, sizeof(T) * f.ldk);
      for (int64_t j = split * kK; j < span.Tk; j += f.splits * kK) {
        const KeyBlock<S> keys(p, f.rule, span, b, j, min_of(j + kK, span.Tk));
        bool seen;
#if defined(__AVX512BF16__)
        if constexpr (kPacked)
          seen = packed_block(keys, hk, dq);
        else
#endif
          seen = block(keys, hk, dq);
        write(m.dKT, keys.nk, p.D, seen, T(p.scale),
              [&](int64_t l) { return row_of<S>(p.dk, span.batch, hk, span.k0 + j + l); });
        write(m.dVT, keys.nk, p.Dv, seen, T(1),
              [&](int64_t l) { return row_of<S>(p.dv, span.batch, hk, span.k0 + j + l); });
      }
      if (f.splits == 1)
        for (int64_t g = 0; g < f.group; g++) f.write_dq(span, hk * f.group + g, dq);
      if (split == 0)  // keys beyond the length
        for (int64_t j = span.Tk; j < p.Tk && !p.cu_k; j++) {
          __builtin_memset(static_cast<void*>(row_of<S>(p.dk, b, hk, j)), 0, sizeof(S) * p.D);
          __builtin_memset(static_cast<void*>(row_of<S>(p.dv, b, hk, j)), 0, sizeof(S) * p.Dv);
        }
    }

    // True when the LSE of some row is far.
    bool prepare_rows(const Span& span, int64_t h, int64_t g) {
      const T *lse = lse_of(span, h),
              *dlse = p.dlse ? static_cast<const T*>(p.dlse) + span.lse + h * span.lse_h : nullptr;
      bool far = false;
      for (int64_t i = 0; i < span.Tq; i++) {
        const S *o = row_of<S>(p.out, span.batch, h, span.q0 + i),
                *d = row_of<S>(p.dout, span.batch, h, span.q0 + i);
        Vec<T> sum{};
        for (int64_t v = 0; v < p.Dv; v += W) sum += load(o + v, p.Dv - v) * load(d + v, p.Dv - v);
        T delta = dlse ? -dlse[i] : T(0);
        for (int r = 0; r < W; r++) delta += sum[r];
        const int64_t row = g * f.max_q + i;
        m.delta[row] = delta, m.lse[row] = lse[i], m.log_sum[row] = 0;
        far |= is_far(lse[i]);
      }
#if defined(__AVX512BF16__)
      if constexpr (kPacked) {
        const S *q = row_of<S>(p.q, span.batch, h, span.q0), *d = row_of<S>(p.dout, span.batch, h, span.q0);
        for (int64_t i = 0; i < span.Tq; i += kQ) {
          const int64_t row = g * f.max_q + i, n = min_of(kQ, span.Tq - i);
          pad_rows(q + i * p.q.t, p.q.t, n, p.D, m.Q + row * f.ldk, kQ, f.ldk);
          pad_rows(d + i * p.dout.t, p.dout.t, n, p.Dv, m.dO + row * f.ldv, kQ, f.ldv);
          pad_transposed(q + i * p.q.t, p.q.t, n, p.D, m.QT + row * f.ldk, f.ldk, kQ, kQ);
          pad_transposed(d + i * p.dout.t, p.dout.t, n, p.Dv, m.dOT + row * f.ldv, f.ldv, kQ, kQ);
        }
      }
#endif
      return far;
    }
    const T* lse_of(const Span& span, int64_t h) const {
      return static_cast<const T*>(p.lse) + span.lse + h * span.lse_h;
    }

    // Of rows whose LSE is far: maximum and sum, while keys pass by once more.
    void redo_softmax(const Span& span, int64_t b, int64_t hk) {
      const auto each_far = [&](int64_t g, int64_t i, int64_t end, const auto& visit) {
        const T* lse = lse_of(span, hk * f.group + g);
        for (; i < end; i++)
          if (is_far(lse[i])) visit(i, m.lse[g * f.max_q + i], m.log_sum[g * f.max_q + i]);
      };
      for (int64_t g = 0; g < f.group; g++)
        each_far(g, 0, span.Tq, [](int64_t, T& top, T& sum) { top = -kInf<T>, sum = 0; });
      for (int64_t j = 0; j < span.Tk; j += kK) {
        const KeyBlock<S> keys(p, f.rule, span, b, j, min_of(j + kK, span.Tk));
        pack_keys(keys, hk);
        for (int64_t g = 0; g < f.group; g++)
          for (int64_t i = keys.first_query() / 32 * 32, end; i < keys.end_query(); i = end) {
            end = min_of(keys.end_query(), (i / kQ + 1) * kQ);
            bool far = false;
            each_far(g, i, end, [&](int64_t, T&, T&) { far = true; });
            if (!far) continue;
            scores(keys, hk, g, i, end - i);
            each_far(g, i, end, [&](int64_t query, T& top, T& sum) {
              softmax_row(keys, hk * f.group + g, query, m.P + (query - i) * kK, top, sum);
            });
          }
      }
      for (int64_t g = 0; g < f.group; g++) {
        const T sink = p.sinks ? static_cast<const T*>(p.sinks)[hk * f.group + g] : -kInf<T>;
        each_far(g, 0, span.Tq, [&](int64_t, T& top, T& sum) {
          const T now = sink > top ? sink : top;
          double total = double(sum) * __builtin_exp(double(top) - double(now));
          if (sink > -kInf<T>) total += __builtin_exp(double(sink) - double(now));
          top = now, sum = total > 0 ? T(__builtin_log(total)) : T(0);
        });
      }
    }

    void add_dsink(const Span& span, int64_t b, int64_t h, int64_t g) const {
      const double sink = static_cast<const T*>(p.sinks)[h];
      double sum = 0;
      for (int64_t row = g * f.max_q; row < g * f.max_q + span.Tq; row++)
        if (m.lse[row] != -kInf<T>)
          sum -= __builtin_exp(sink - double(m.lse[row]) - double(m.log_sum[row])) * double(m.delta[row]);
      f.dsink[b * p.Hq + h] = T(sum);
    }

    // K^T of the block; with operands in pairs: of all lanes that products touch.
    void pack_keys(const KeyBlock<S>& keys, int64_t hk) {
      const S* k = row_of<S>(p.k, keys.span.batch, hk, keys.span.k0 + keys.j);
#if defined(__AVX512BF16__)
      if constexpr (kPacked) {
        __builtin_memset(static_cast<void*>(m.KT), 0, sizeof(O) * f.ldk * kK);
        return pack_panel(k, p.k.t, keys.nk, p.D, m.KT, kK);
      }
#endif
      if constexpr (!kPacked) pack_transposed(k, p.k.t, keys.nk, p.D, m.KT, kK, keys.N);
    }
    // Products of queries [i, i + n) of head g with these keys to m.P. Returns the queries as products read
    // them.
    Rows<O> scores(const KeyBlock<S>& keys, int64_t hk, int64_t g, int64_t i, int64_t n) {
#if defined(__AVX512BF16__)
      if constexpr (kPacked) {
        const O* q = m.Q + (g * f.max_q + i) * f.ldk;
        tile_product(round_up(n, 32), round_up(keys.nk, 32), f.ldk, q, f.ldk, m.KT, 2 * kK, m.P, kK,
                     Start::zero);
        return {q, f.ldk};
      }
#endif
      if constexpr (!kPacked) {
        const S* rows = row_of<S>(p.q, keys.span.batch, hk * f.group + g, keys.span.q0 + i);
        const Rows<T> q = as_operand<T>(rows, p.q.t, n, p.D, m.Q, p.D);
        product<T, false>(n, keys.N, p.D, q.data, q.ld, m.KT, kK, m.P, kK, Start::zero);
        return q;
      }
    }

    // Adds to dQ; leaves dK^T and dV^T. False when no query sees these keys.
    bool block(const KeyBlock<S>& keys, int64_t hk, const Sum& dq) {
      const Span& span = keys.span;
      const int64_t N = keys.N, nk = keys.nk;
      const S *k = row_of<S>(p.k, span.batch, hk, span.k0 + keys.j),
              *v = row_of<S>(p.v, span.batch, hk, span.k0 + keys.j);
      pack_keys(keys, hk);
      pack_transposed(v, p.v.t, nk, p.Dv, m.VT, kK, N);
      const Rows<T> rows = as_operand<T>(k, p.k.t, nk, p.D, m.K, f.ldk);
      Start start = Start::zero;
      for (int64_t g = 0; g < f.group; g++)
        for (int64_t i = keys.first_query(); i < keys.end_query(); i += kQ) {
          const int64_t h = hk * f.group + g, n = min_of(kQ, keys.end_query() - i), row = g * f.max_q + i;
          const Rows<T> q = scores(keys, hk, g, i, n);
          const Rows<T> d =
              as_operand<T>(row_of<S>(p.dout, span.batch, h, span.q0 + i), p.dout.t, n, p.Dv, m.dO, p.Dv);
          product<T, false>(n, N, p.Dv, d.data, d.ld, m.VT, kK, m.dS, kK, Start::zero);
          const bool limits = !keys.seen_by_all(i, n);
          for (int64_t r = 0; r < n; r++) {
            const uint64_t kept = keys.kept(f.philox, h, i + r);
            for (int64_t l = 0; l < N; l += W) {
              const Pair x = gradients(keys, h, i, r, l, row, limits, kept);
              store(m.P + r * kK + l, x.P);
              store(m.dS + r * kK + l, x.dS);
            }
          }
          product<T, true>(p.Dv, N, n, d.data, d.ld, m.P, kK, m.dVT, kK, start);
          product<T, true>(p.D, N, n, q.data, q.ld, m.dS, kK, m.dKT, kK, start);
          product<T, false>(n, f.ldk, nk, m.dS, kK, rows.data, rows.ld, dq(g, i), dq.row, Start::c);
          start = Start::c;
        }
      return start == Start::c;
    }

#if defined(__AVX512BF16__)
    // The same with operands in pairs. P and dS become pairs of queries in place; dQ needs dS in rows as
    // well.
    bool packed_block(const KeyBlock<S>& keys, int64_t hk, const Sum& dq) {
      const Span& span = keys.span;
      const int64_t nk = keys.nk, N = round_up(nk, 32);
      const S *k = row_of<S>(p.k, span.batch, hk, span.k0 + keys.j),
              *v = row_of<S>(p.v, span.batch, hk, span.k0 + keys.j);
      pack_keys(keys, hk);
      __builtin_memset(static_cast<void*>(m.VT), 0, sizeof(O) * f.ldv * kK);
      pack_panel(v, p.v.t, nk, p.Dv, m.VT, kK);
      for (int64_t l = 0; l < N; l++) pack_row(k + (l < nk ? l : 0) * p.k.t, l < nk ? p.D : 0, m.K, l, f.ldk);
      Start start = Start::zero;
      for (int64_t g = 0; g < f.group; g++)
        for (int64_t i = keys.first_query() / 32 * 32, end; i < keys.end_query(); i = end) {
          end = min_of(keys.end_query(), (i / kQ + 1) * kQ);
          const int64_t h = hk * f.group + g, n = end - i, nq = round_up(n, 32), row = g * f.max_q + i;
          scores(keys, hk, g, i, n);
          tile_product(nq, N, f.ldv, m.dO + row * f.ldv, f.ldv, m.VT, 2 * kK, m.dS, kK, Start::zero);
          const bool limits = nk < N || !keys.seen_by_all(i, n);
          for (int64_t r = 0; r < nq; r += 2) {
            const uint64_t kept[] = {keys.kept(f.philox, h, i + r), keys.kept(f.philox, h, i + r + 1)};
            for (int64_t l = 0; l < N; l += W) {
              Pair a{}, b{};
              if (r < n) a = gradients(keys, h, i, r, l, row, limits, kept[0]);
              if (r + 1 < n) b = gradients(keys, h, i, r + 1, l, row, limits, kept[1]);
              const __m512i ds = narrow(a.dS, b.dS);
              store(m.P + r / 2 * kK + l, (Vec<T>)as_pairs(narrow(a.P, b.P)));
              store(m.dS + r / 2 * kK + l, (Vec<T>)as_pairs(ds));
              _mm256_storeu_si256((__m256i*)(m.narrow_dS + r * kK + l),
                                  _mm512_maskz_extracti64x4_epi64(0xff, ds, 0));
              _mm256_storeu_si256((__m256i*)(m.narrow_dS + (r + 1) * kK + l),
                                  _mm512_maskz_extracti64x4_epi64(0xff, ds, 1));
            }
          }
          const O *P = reinterpret_cast<const O*>(m.P), *dS = reinterpret_cast<const O*>(m.dS);
          const int64_t block = row / kQ * kQ;  // of QT and dOT
          tile_product(f.ldv, N, nq, m.dOT + block * f.ldv + i % kQ, kQ, P, 2 * kK, m.dVT, kK, start);
          tile_product(f.ldk, N, nq, m.QT + block * f.ldk + i % kQ, kQ, dS, 2 * kK, m.dKT, kK, start);
          tile_product(nq, f.ldk, N, m.narrow_dS, kK, m.K, 2 * f.ldk, dq(g, i), dq.row, Start::c);
          start = Start::c;
        }
      return start == Start::c;
    }
#endif

    // P and dS of W keys from lane l on for query i + r, from the products in their places.
    struct Pair {
      Vec<T> P, dS;
    };
    Pair gradients(const KeyBlock<S>& keys, int64_t h, int64_t i, int64_t r, int64_t l, int64_t row,
                   bool limits, uint64_t kept) const {
      Vec<T> slope;
      const Vec<T> x = keys.logits(load(m.P + r * kK + l), h, i + r, l, limits, slope),
                   e = weights_of<T>(x, m.lse[row + r], m.log_sum[row + r]),
                   dP = keys.dropped(load(m.dS + r * kK + l), kept, l), ds = e * (dP - m.delta[row + r]);
      if (p.dmask && l < keys.nk) add_dmask(f.dmask_row(keys.b, h, i + r), keys.j + l, ds, keys.nk - l);
      return {keys.dropped(e, kept, l), ds * slope};
    }
    void add_dmask(T* to, int64_t j, Vec<T> ds, int64_t n) const {
      if (p.mask_k) return store(to + j, load(static_cast<const T*>(to + j), n) + ds, n);
      for (int64_t l = 0; l < min_of(n, W); l++) *to += ds[l];
    }

    template <class Row>
    void write(T* x, int64_t n, int64_t features, bool seen, T by, const Row& row) {
      if (!seen) __builtin_memset(static_cast<void*>(x), 0, sizeof(T) * features * kK);
      T factor[kK];
      for (int64_t l = 0; l < kK; l++) factor[l] = by;
      write_columns<S>(x, kK, n, features, factor, row);
    }
  };
};

template <class S>
static void attention_bwd(const AttentionBwdParams& p) {
  run_kernel(p.parallel, AttentionBwd<S>(p));
}

// P once more, for need_weights: a task is a block of queries, of all heads where their mean is wanted. Its
// softmax is taken anew: where a finite mask hides a whole row, an LSE near -1e9 has no digits left for log
// sum.
template <class S>
struct AttentionWeights {
  using T = Acc<S>;
  static constexpr int W = kLanes<T>;
  static constexpr int64_t kK = kBlock<T>, kQ = 64;

  const AttentionWeightsParams& p;
  const ScoreRule<T> rule;
  const Philox philox;
  const int64_t heads, rows, blocks, width;  // of the result: heads; queries of a block, blocks; keys padded
  const int team;                            // threads at most

  Queue* queue;
  PerThread<char> buffers;

  explicit AttentionWeights(const AttentionWeightsParams& params)
      : p(params),
        rule(p),
        philox(p.dropout),
        heads(p.mean ? 1 : p.Hq),
        rows(max_of(1, min_of(kQ, p.Tq))),
        blocks(divide_up(p.Tq, rows)),
        width(round_up(p.Tk, W)),
        team(p.parallel.threads) {}

  struct Buffers {
    T *KT, *Q, *P, *mean;
    Buffers(const AttentionWeights& f, Arena& a) {
      KT = a.take<T>(f.p.D * kK), Q = a.take<T>(std::is_same_v<S, T> ? 0 : f.rows * f.p.D);
      P = a.take<T>(f.rows * f.width), mean = a.take<T>(f.p.mean ? f.rows * f.width : 0);
    }
  };
  void layout(Arena& a) {
    queue = a.take_zeros<Queue>(1);
    buffers = a.take_buffers<Buffers>(team, *this);
  }
  void prepare() const {}
  int64_t tasks() const { return p.B * heads * blocks; }
  int wanted() const { return attention_threads(p, tasks()); }

  void thread(int id, int) {
    Arena own{buffers[id]};
    const Buffers m(*this, own);
    for (int64_t task; (task = queue->take()) < tasks();) {
      const int64_t b = task / (heads * blocks), h = task / blocks % heads, i = task % blocks * rows,
                    n = min_of(rows, p.Tq - i);
      if (!p.mean) head(m, b, h, i, n);
      if (p.mean) __builtin_memset(static_cast<void*>(m.mean), 0, sizeof(T) * n * width);
      for (int64_t of = 0; p.mean && of < p.Hq; of++) {
        head(m, b, of, i, n);
        for (int64_t x = 0; x < n * width; x += W) store(m.mean + x, load(m.mean + x) + load(m.P + x));
      }
      const T by = p.mean ? T(1) / T(p.Hq) : T(1);
      S* out = static_cast<S*>(p.weights) + ((b * heads + h) * p.Tq + i) * p.Tk;
      for (int64_t r = 0; r < n; r++)
        for (int64_t j = 0; j < p.Tk; j += W)
          store(out + r * p.Tk + j, load((p.mean ? m.mean : m.P) + r * width + j) * by, p.Tk - j);
    }
  }

  // P of queries [i, i + n), with dropout.
  void head(const Buffers& m, int64_t b, int64_t h, int64_t i, int64_t n) const {
    const Span span(p, b);
    const int64_t j0 = span.first_key(i) / kK * kK, j1 = max_of(j0, span.end_key(i + n - 1));
    __builtin_memset(static_cast<void*>(m.P), 0, sizeof(T) * n * width);
    const Rows<T> q = as_operand<T>(row_of<S>(p.q, b, h, i), p.q.t, n, p.D, m.Q, p.D);
    for (int64_t j = j0; j < j1; j += kK) {
      const int64_t nk = min_of(kK, j1 - j), N = round_up(nk, W);
      pack_transposed(row_of<S>(p.k, b, h / (p.Hq / p.Hk), j), p.k.t, nk, p.D, m.KT, kK, N);
      product<T, false>(n, N, p.D, q.data, q.ld, m.KT, kK, m.P + j, width, Start::zero);
    }
    const KeyBlock<S> seen(p, rule, span, b, j0, j1);
    for (int64_t r = 0; r < n && j0 < j1; r++) {
      T top = -kInf<T>, sum = 0;
      softmax_row(seen, h, i + r, m.P + r * width + j0, top, sum);
      const T by = sum == T(0) ? T(0) : T(1) / sum;
      for (int64_t j = j0; j < j1; j += kK) {
        const KeyBlock<S> keys(p, rule, span, b, j, min_of(j + kK, j1));
        const uint64_t kept = keys.kept(philox, h, i + r);
        for (int64_t l = 0; l < keys.N; l += W) {
          T* to = m.P + r * width + j + l;
          store(to, keys.dropped(load(to) * by, kept, l));
        }
      }
    }
  }
};

template <class S>
static void attention_weights(const AttentionWeightsParams& p) {
  run_kernel(p.parallel, AttentionWeights<S>(p));
}
