// Forward of attention.
//
// A task is a block of queries of one key head: up to 64 queries in the lanes, of one query head, or of
// several that share the key head where they have few queries each. Q^T is packed once; then for each block
// of keys
//   S^T [keys, queries] = K Q^T,   P^T = exp2(S^T - running maximum),   O^T [Dv, queries] = O^T alpha + V^T
//   P^T,
// K and V read where they lie. Q^T, P^T and O^T stay in L1 and L2. Maximum and sum are vectors; O^T is scaled
// again only when a maximum has grown by more than a factor 2^8. O^T is transposed once, at the end.
// Tasks come from one queue: heads one after the other, of each the longest rows first.
#pragma once

#include "attention.inl.h"

template <class S>
struct AttentionFwd {
  using T = Acc<S>;
  using O = Operand<S>;
  static constexpr bool kPacked = sizeof(O) == 2;
  static constexpr int W = kLanes<T>;
  static constexpr int64_t kQ = kBlock<T>, kK = kPacked ? 128 : 64;  // queries and keys of a block
  static constexpr T kGrowth = 8;                                    // log2 of how far P may pass 1

  const AttentionFwdParams& p;
  const int64_t group;
  const ScoreRule<T> rule;
  const bool masked;
  const int64_t depth, ldv;  // D and Dv as products see them
  int64_t key_blocks = 0;    // of all sequences
  int team = 1;

  int64_t *first_task, *first_block, *next;  // of each sequence: tasks, packed blocks of keys
  Barrier* barrier;
  O *QT, *packed;
  T *OT, *ST, *M, *rows;
  int64_t rows_size;

  explicit AttentionFwd(const AttentionFwdParams& params)
      : p(params),
        group(p.Hk ? p.Hq / p.Hk : 0),
        rule(p),
        masked(p.mask_kind != MaskKind::none),
        depth(round_up(p.D, kDepth<O>)),
        ldv(kPacked ? round_up(p.Dv, 32) : p.Dv) {
    for (int64_t b = 0; kPacked && b < p.B; b++) key_blocks += blocks_of(Span(p, b).Tk);
  }
  static int64_t blocks_of(int64_t Tk) { return (Tk + kK - 1) / kK; }
  int64_t block_size() const { return kK * (depth + ldv); }

  // Blocks of a sequence: heads x queries.
  struct Blocks {
    int64_t heads, queries, chunks, per_head;  // of one block; blocks of heads, of queries
    Blocks(int64_t Tq, int64_t group)
        : heads(Tq ? most(1, least(group, kQ / Tq)) : 1),
          queries(least(Tq, kQ)),
          chunks((group + heads - 1) / heads),
          per_head(queries ? (Tq + queries - 1) / queries : 0) {}
  };

  void layout(Arena& a) {
    first_task = a.take<int64_t>(p.B + 1);
    first_block = a.take<int64_t>(p.B + 1);
    next = a.take<int64_t>(1);
    barrier = a.take<Barrier>(1);
    QT = a.take<O>(team * depth * kQ);
    OT = a.take<T>(team * ldv * kQ);
    ST = a.take<T>(team * kK * kQ);
    M = a.take<T>(masked ? team * kK * kQ : 0);
    packed = a.take<O>(kPacked ? key_blocks * p.Hk * block_size() : 0);
    rows_size = most(kQ * p.D * int64_t(sizeof(S)) / int64_t(sizeof(T)) + W,
                     std::is_same_v<S, T> || kPacked ? 0 : kK * most(p.D, p.Dv));
    rows = a.take<T>(team * rows_size);
  }
  void prepare() {
    *next = 0;
    __builtin_memset(static_cast<void*>(barrier), 0, sizeof(Barrier));
    first_task[0] = first_block[0] = 0;
    for (int64_t b = 0; b < p.B; b++) {
      const Span span(p, b);
      const Blocks blocks(span.Tq, group);
      first_task[b + 1] = first_task[b] + p.Hk * blocks.chunks * blocks.per_head;
      first_block[b + 1] = first_block[b] + blocks_of(span.Tk);
    }
  }
  int64_t tasks() const { return first_task[p.B]; }

  // Packed block of keys: K [kK, depth] as it lies, V^T [ldv, kK], zeros around.
  O* block(int64_t b, int64_t hk, int64_t i) const {
    return packed + (first_block[b] * p.Hk + hk * (first_block[b + 1] - first_block[b]) + i) * block_size();
  }
  void pack(int64_t b, int64_t hk, int64_t i) const {
    const Span span(p, b);
    const int64_t j = span.k0 + i * kK, n = least(kK, span.Tk - i * kK), rows_to = round_up(n, 32);
    O *K = block(b, hk, i), *VT = K + kK * depth;
    for (int64_t r = 0; r < rows_to; r++) {
      const int64_t width = r < n ? p.D : 0;
      if (width)
        __builtin_memcpy(static_cast<void*>(K + r * depth), row_of<S>(p.k, span.batch, hk, j + r),
                         sizeof(O) * width);
      __builtin_memset(static_cast<void*>(K + r * depth + width), 0, sizeof(O) * (depth - width));
    }
    pack_transposed(row_of<S>(p.v, span.batch, hk, j), p.v.t, n, p.Dv, VT, kK, rows_to);
    __builtin_memset(static_cast<void*>(VT + p.Dv * kK), 0, sizeof(O) * (ldv - p.Dv) * kK);
  }

  void thread(int id, int size) {
    if constexpr (kPacked) {
      const int64_t all = key_blocks * p.Hk;
      int64_t b = 0;
      for (int64_t n = all * id / size; n < all * (id + 1) / size; n++) {
        while (first_block[b + 1] * p.Hk <= n) b++;
        const int64_t i = n - first_block[b] * p.Hk, blocks = first_block[b + 1] - first_block[b];
        pack(b, i / blocks, i % blocks);
      }
      barrier->wait(size);
    }
    Worker worker(*this, id);
    int64_t b = 0;
    for (;;) {
      const int64_t task = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED);
      if (task >= tasks()) break;
      while (first_task[b + 1] <= task) b++;
      const Span span(p, b);
      const Blocks blocks(span.Tq, group);
      const int64_t i = task - first_task[b], head = i / (blocks.chunks * blocks.per_head),
                    block = blocks.per_head - 1 - i / blocks.chunks % blocks.per_head,
                    chunk = i % blocks.chunks, h = chunk * blocks.heads, q = block * blocks.queries;
      worker.run(span, b, head, head * group + h, least(blocks.heads, group - h), q,
                 least(blocks.queries, span.Tq - q));
    }
    release_tiles();
  }

  struct Worker {
    const AttentionFwd& f;
    const AttentionFwdParams& p;
    O* const QT;
    T *const OT, *const ST, *const M, *const rows;
    // Of each lane: maximum, sum, rescaling, alibi, position, keys seen of this block, mask row.
    T max[kQ], sum[kQ], alpha[kQ], slope[kQ], position[kQ], first[kQ], end[kQ];
    int64_t query[kQ], mask_row[kQ];

    Worker(const AttentionFwd& forward, int id)
        : f(forward),
          p(forward.p),
          QT(f.QT + id * f.depth * kQ),
          OT(f.OT + id * f.ldv * kQ),
          ST(f.ST + id * kK * kQ),
          M(f.M + (f.masked ? id * kK * kQ : 0)),
          rows(f.rows + id * f.rows_size) {}

    // Queries [i0, i0 + n) of the heads [h0, h0 + heads), which share key head hk.
    void run(const Span& span, int64_t b, int64_t hk, int64_t h0, int64_t heads, int64_t i0, int64_t n) {
      const int64_t lanes = heads * n, N = round_up(lanes, W);
      for (int64_t l = 0; l < N; l++) {
        const int64_t h = h0 + least(l, lanes - 1) / n, i = i0 + least(l, lanes - 1) % n;
        query[l] = i;
        max[l] = -kInf<T>;
        sum[l] = 0;
        position[l] = T(i + span.offset);
        slope[l] = p.alibi ? T(p.alibi[b * p.alibi_b + h]) : T(0);
        mask_row[l] = mask_offset(p, b, h, i);
      }
      pack_queries(span, h0, heads, i0, n, N);

      const int64_t full0 = span.first_key(i0 + n - 1), full1 = span.end_key(i0),  // all queries see these
          j0 = span.first_key(i0) / 32 * 32, j1 = most(j0, span.end_key(i0 + n - 1));
      const S *k = row_of<S>(p.k, span.batch, hk, span.k0), *v = row_of<S>(p.v, span.batch, hk, span.k0);
      const T c = f.rule.natural ? T(kLog2e) : T(__builtin_fabs(p.scale) * kLog2e);
      for (int64_t j = j0, nk; j < j1; j += nk) {
        nk = least(j1, (j / kK + 1) * kK) - j;
        const O* block = kPacked ? f.block(b, hk, j / kK) : nullptr;
        const bool limits = j < full0 || j + nk > full1;
        if constexpr (kPacked) {
          product<O, false>(round_up(nk, kDepth<O>), N, f.depth, block + j % kK * f.depth, f.depth, QT,
                            2 * kQ, ST, kQ, Start::zero);
        } else {
          int64_t ld;
          const T* a = as_operand<T>(k + j * p.k.t, p.k.t, nk, p.D, rows, p.D, false, ld);
          product<T, false>(nk, N, p.D, a, ld, QT, kQ, ST, kQ, Start::zero);
        }
        if (f.masked) load_mask(lanes, N, j, nk);
        if (f.masked || f.rule.natural || limits) adjust(span, N, j, nk, limits);
        const bool rescale = softmax(N, nk, c);
        const Start start = j == j0 ? Start::zero : rescale ? Start::scaled : Start::c;
        if constexpr (kPacked) {
          if (start == Start::scaled)
            for (int64_t d = 0; d < p.Dv; d++)
              for (int64_t l = 0; l < N; l += W)
                store(OT + d * kQ + l, load(OT + d * kQ + l) * load(alpha + l));
          product<O, false>(f.ldv, N, round_up(nk, kDepth<O>), block + kK * f.depth + j % kK, kK,
                            reinterpret_cast<const O*>(ST), 2 * kQ, OT, kQ, j == j0 ? Start::zero : Start::c);
        } else {
          int64_t ld;
          const T* a = as_operand<T>(v + j * p.v.t, p.v.t, nk, p.Dv, rows, p.Dv, false, ld);
          product<T, true>(p.Dv, N, nk, a, ld, ST, kQ, OT, kQ, start, alpha);
        }
      }
      finish(span, h0, i0, n, lanes, j1 > j0);
    }

    // Q^T with the sign of the scale, so that the greatest product is the greatest score.
    void pack_queries(const Span& span, int64_t h0, int64_t heads, int64_t i0, int64_t n, int64_t N) {
      const S* q = row_of<S>(p.q, span.batch, h0, span.q0 + i0);
      int64_t stride = p.q.t;
      if (heads > 1) {
        S* copy = reinterpret_cast<S*>(rows);
        for (int64_t l = 0; l < heads * n; l++)
          __builtin_memcpy(static_cast<void*>(copy + l * p.D), q + l / n * p.q.h + l % n * p.q.t,
                           sizeof(S) * p.D);
        q = copy, stride = p.D;
      }
      if constexpr (kPacked)
        pack_panel(q, stride, heads * n, p.D, QT, kQ);
      else
        pack_transposed(q, stride, heads * n, p.D, QT, kQ, N);
      if (p.scale < 0 && !f.rule.natural)
        for (int64_t i = 0; i < f.depth * kQ; i += W) store(QT + i, -load(static_cast<const O*>(QT + i)));
    }

    // M [key, query] = what the mask adds.
    void load_mask(int64_t lanes, int64_t N, int64_t j, int64_t nk) {
      bool same = true;
      for (int64_t l = 1; l < lanes; l++) same &= mask_row[l] == mask_row[0];
      for (int64_t k = 0; k < nk; k += W) {
        const Vec<T> row = mask_values<S>(p, mask_row[0], j + k, nk - k);
        for (int64_t l = 0; l < N; l += W) {
          Vec<T> v[W];
          for (int r = 0; r < W; r++)
            v[r] = same ? splat(row[r]) : mask_values<S>(p, mask_row[l + r], j + k, nk - k);
          if (!same) transpose<T>(v);
          for (int64_t r = 0; r < W && k + r < nk; r++) store(M + (k + r) * kQ + l, v[r]);
        }
      }
    }

    // Logits of the keys [j, j + nk), -inf where a query does not see a key.
    void adjust(const Span& span, int64_t N, int64_t j, int64_t nk, bool limits) {
      if (limits)
        for (int64_t l = 0; l < N; l++) {
          first[l] = T(most(0, least(nk, span.first_key(query[l]) - j)));
          end[l] = T(most(0, least(nk, span.end_key(query[l]) - j)));
        }
      for (int64_t k = 0; k < nk; k++)
        for (int64_t l = 0; l < N; l += W) {
          Vec<T> s = load(ST + k * kQ + l), unused;
          if (f.rule.natural) s = f.rule(s, T(j + k) - load(position + l), load(slope + l), unused);
          if (f.masked) s += load(M + k * kQ + l);
          if (limits) {
            s = T(k) < load(first + l) ? splat(-kInf<T>) : s;
            s = T(k) >= load(end + l) ? splat(-kInf<T>) : s;
          }
          store(ST + k * kQ + l, s);
        }
    }

    // Rows k and k + 1 of P^T as pairs; they replace row k / 2 of S^T, which has been read.
    uint32_t* pairs(int64_t k, int64_t l) const { return reinterpret_cast<uint32_t*>(ST) + k / 2 * kQ + l; }

    // S^T becomes P^T. True when O^T has to be scaled by alpha.
    bool softmax(int64_t N, int64_t nk, T c) {
      bool rescale = false;
      for (int64_t l = 0; l < N; l += W) {
        T* s = ST + l;
        Vec<T> top[4];
        SEQ_UNROLL for (int i = 0; i < 4; i++) top[i] = splat(-kInf<T>);
        int64_t k = 0;
        for (; k + 4 <= nk; k += 4) {
          SEQ_UNROLL for (int i = 0; i < 4; i++) {
            const Vec<T> v = load(s + (k + i) * kQ);
            top[i] = v > top[i] ? v : top[i];
          }
        }
        for (; k < nk; k++) {
          const Vec<T> v = load(s + k * kQ);
          top[0] = v > top[0] ? v : top[0];
        }
        top[0] = top[0] > top[1] ? top[0] : top[1];
        top[2] = top[2] > top[3] ? top[2] : top[3];
        top[0] = top[0] > top[2] ? top[0] : top[2];

        const Vec<T> was = load(max + l);
        const auto grew = (top[0] - was) * c > kGrowth;
        const Vec<T> now = grew ? top[0] : was, zero = now == -kInf<T> ? Vec<T>{} : now;
        Vec<T> total = load(sum + l);
        store(alpha + l, splat(T(1)));
        if (any(grew)) {
          const Vec<T> a = grew ? exp2_of<T>(was - now, c) : splat(T(1));
          store(max + l, now);
          store(alpha + l, a);
          total *= a;
          rescale = true;
        }
        const auto p_of = [&](int64_t k) __attribute__((always_inline)) {
          const Vec<T> e = exp2_of<T>(load(s + k * kQ) - zero, c);
          total += e;
          return e;
        };
#if defined(__AVX512BF16__)
        if constexpr (kPacked) {
          for (k = 0; k + 2 <= nk; k += 2) {
            const Vec<T> e = p_of(k);
            store<uint32_t>(pairs(k, l), (U32)as_pairs(narrow(e, p_of(k + 1))));
          }
          if (k < nk) store<uint32_t>(pairs(k, l), (U32)as_pairs(narrow(p_of(k), Vec<T>{})));
          for (k += k < nk ? 2 : 0; k < round_up(nk, kDepth<O>); k += 2) store<uint32_t>(pairs(k, l), U32{});
          store(sum + l, total);
          continue;
        }
#endif
        for (k = 0; k < nk; k++) store(s + k * kQ, p_of(k));
        store(sum + l, total);
      }
      return rescale;
    }

    void finish(const Span& span, int64_t h0, int64_t i0, int64_t n, int64_t lanes, bool any_key) {
      const double unit = f.rule.natural ? 1 : __builtin_fabs(p.scale);
      T* lse = static_cast<T*>(p.lse) + span.lse;
      for (int64_t l = 0; l < lanes; l++) {
        const int64_t h = h0 + l / n;
        double m = max[l] == -kInf<T> ? 0 : double(max[l]) * unit, total = sum[l], by = 1;
        const double sink = p.sinks ? static_cast<const T*>(p.sinks)[h] : -kInf<double>;
        if (sink != -kInf<double>) {
          const double m0 = sum[l] == 0 ? sink : m;
          m = sink > m0 ? sink : m0;
          by = __builtin_exp(m0 - m);
          total = total * by + __builtin_exp(sink - m);
        }
        lse[h * span.lse_h + i0 + l % n] = T(m + __builtin_log(total));
        alpha[l] = total == 0 ? T(0) : T(by / total);
      }
      for (int64_t l = lanes; l < round_up(lanes, W); l++) alpha[l] = 0;
      const auto row = [&](int64_t l) __attribute__((always_inline)) {
        return row_of<S>(p.out, span.batch, h0 + l / n, span.q0 + i0 + l % n);
      };
      if (any_key) return write_columns<S>(OT, kQ, lanes, p.Dv, alpha, row);
      for (int64_t l = 0; l < lanes; l++) __builtin_memset(static_cast<void*>(row(l)), 0, sizeof(S) * p.Dv);
    }
  };
};

template <class S>
static void attention_fwd(const AttentionFwdParams& p) {
  AttentionFwd<S> forward(p);
  Arena count;
  forward.team = p.parallel.threads;
  forward.layout(count);
  Arena arena{static_cast<char*>(scratch_alloc(count.used))};
  forward.layout(arena);
  forward.prepare();
  run_team(p.parallel, attention_team(p, forward.tasks()),
           [&](int id, int size) { forward.thread(id, size); });
  scratch_free(arena.base);
}
