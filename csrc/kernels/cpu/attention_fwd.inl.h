// Forward of attention.
//
// A task is a block of up to 64 queries in the lanes: of one query head, or of several that share a key head
// where each has few queries. Q^T is packed once; then for each block of keys
//   S^T [keys, queries] = K Q^T,   P^T = exp2(S^T - reference),   O^T [Dv, queries] = O^T alpha + V^T P^T.
// Sums and maxima are vectors. The reference is an integer near the running maximum, so that scaling O^T
// again is exact, and it moves only when the maximum has grown by more than 2^8. O^T is transposed once, at
// the end, and divided by the sum of the weights that products read: of bf16 this is not that of the LSE, and
// a query with one large weight would get 1 +- 2^-9 of that value. Tasks come from one queue: head after
// head, of each the longest rows first.
//
// float, double, f16: K and V are read where they lie (f16 converts a block at a time); Q^T, P^T, O^T stay in
// L1 and L2. bf16 with dot products: K and V^T are packed first, by all threads, because products read pairs
// along the features and along the keys; some key heads at a time, which bounds the memory and leaves what
// was packed in L2 and L3. Softmax takes as long as the matrix unit does, so both run at once: softmax of one
// block makes the steps of the next block's scores and of the last block's values (see SteppedProduct).
#pragma once

#include "attention_few.inl.h"

template <class S>
struct AttentionFwd {
  using T = Acc<S>;
  using O = Operand<S>;
  static constexpr bool kPacked = sizeof(O) == 2;
  static constexpr int W = kLanes<T>;
  // Queries and keys of a block. The matrix unit adds to O^T in memory: the more keys at a time, the better.
  static constexpr int64_t kQ = kBlock<T>, kK = kPacked ? 256 : 64;
  static constexpr int64_t kUnit = kPacked ? 32 : kQ, kUnits = kQ / kUnit, kBuffers = kPacked ? 3 : 1;
  static constexpr T kGrowth = 8;  // log2 of how far P may pass 1
  // Bytes of keys and values that are packed at a time: a head of 8192 keys with D = Dv = 64.
  static constexpr int64_t kPass = 2 << 20;

  const AttentionFwdParams& p;
  const int64_t group;
  const ScoreRule<T> rule;
  const Philox philox;
  const int64_t depth, ldv;   // D and Dv as products see them
  const int team;             // threads at most
  int64_t at_once, room = 0;  // key heads of a pass, blocks of keys that are packed for one

  int64_t *first_task, *first_block;  // of each sequence: tasks, blocks of keys
  Queue* queue;
  Barrier* barrier;
  PerThread<O> QT;
  PerThread<T> OT, ST, rows;
  O* packed;

  // Blocks of a sequence: heads x queries.
  struct Blocks {
    int64_t heads, queries, chunks, per_head;  // of one block; blocks of heads, of queries
    Blocks(int64_t Tq, int64_t group)
        : heads(Tq ? max_of(1, min_of(group, kQ / Tq)) : 1),
          queries(min_of(Tq, kQ)),
          chunks(divide_up(group, heads)),
          per_head(queries ? divide_up(Tq, queries) : 0) {}
    int64_t tasks() const { return chunks * per_head; }  // of one key head
  };

  explicit AttentionFwd(const AttentionFwdParams& params)
      : p(params),
        group(p.Hk ? p.Hq / p.Hk : 0),
        rule(p),
        philox(p.dropout),
        depth(kPacked ? round_up(max_of(p.D, 1), kDepth<O>) : p.D),
        ldv(kPacked ? round_up(p.Dv, 32) : p.Dv),
        team(p.parallel.threads),
        at_once(heads()) {
    if (kPacked && at_once > 0) split_heads();
  }
  int64_t heads() const { return p.B * p.Hk; }
  static int64_t blocks_of(int64_t Tk) { return divide_up(Tk, kK); }
  int64_t block_size() const { return kK * (depth + ldv); }

  // As many heads in a pass as fit in kPass and as give each thread four tasks: the last ones wait for the
  // others.
  void split_heads() {
    int64_t all_blocks = 0, all_tasks = 0, longest = 1;
    for (int64_t b = 0; b < p.B; b++) {
      const Span span(p, b);
      all_blocks += blocks_of(span.Tk) * p.Hk;
      all_tasks += Blocks(span.Tq, group).tasks() * p.Hk;
      longest = max_of(longest, blocks_of(span.Tk));
    }
    const int64_t fit = kPass / (longest * block_size() * int64_t(sizeof(O))),
                  busy = 4 * p.parallel.threads * heads() / max_of(1, all_tasks) + 1,
                  passes = divide_up(heads(), max_of(fit, busy));
    at_once = divide_up(heads(), passes);
    room = min_of(all_blocks, at_once * longest);
  }

  void layout(Arena& a) {
    first_task = a.take<int64_t>(p.B + 1);
    first_block = a.take<int64_t>(p.B + 1);
    queue = a.take_zeros<Queue>(1);
    barrier = a.take_zeros<Barrier>(1);
    QT = a.take_each<O>(team, depth * kQ);
    OT = a.take_each<T>(team, ldv * kQ);
    ST = a.take_each<T>(team, kBuffers * kK * kUnit);
    packed = a.take<O>(room * block_size());
    const int64_t rows_size = max_of(kQ * p.D * int64_t(sizeof(S)) / int64_t(sizeof(T)) + W,
                                     std::is_same_v<S, T> || kPacked ? 0 : kK * max_of(p.D, p.Dv));
    rows = a.take_each<T>(team, rows_size);
  }
  int64_t tasks() const { return first_task[p.B]; }
  void prepare() {
    first_task[0] = first_block[0] = 0;
    for (int64_t b = 0; b < p.B; b++) {
      const Span span(p, b);
      first_task[b + 1] = first_task[b] + p.Hk * Blocks(span.Tq, group).tasks();
      first_block[b + 1] = first_block[b] + p.Hk * blocks_of(span.Tk);
    }
  }
  int wanted() const { return attention_threads(p, tasks()); }
  // Of head n, and of those before it.
  int64_t first_of(const int64_t* first, int64_t n) const {
    const int64_t b = n / p.Hk;
    return b == p.B ? first[b] : first[b] + n % p.Hk * ((first[b + 1] - first[b]) / p.Hk);
  }

#if defined(__AVX512BF16__)
  // Packed block of keys: K [kK, depth] as it lies, V^T [ldv, kK], zeros around.
  void pack(const Span& span, int64_t hk, int64_t i, O* K) const {
    const int64_t j = span.k0 + i * kK, n = min_of(kK, span.Tk - i * kK), to = round_up(n, 32);
    pad_rows(row_of<S>(p.k, span.batch, hk, j), p.k.t, n, p.D, K, to, depth);
    pad_transposed(row_of<S>(p.v, span.batch, hk, j), p.v.t, n, p.Dv, K + kK * depth, ldv, kK, to);
  }
  // Blocks of the heads from n on, this thread's share of `count`.
  void pack_heads(int64_t n, int64_t count, int id, int size) const {
    const int64_t first = first_of(first_block, n);
    int64_t b = n / p.Hk;
    for (int64_t k = first + count * id / size; k < first + count * (id + 1) / size; k++) {
      while (first_block[b + 1] <= k) b++;
      const Span span(p, b);
      const int64_t i = k - first_block[b], blocks = blocks_of(span.Tk);
      pack(span, i / blocks, i % blocks, packed + (k - first) * block_size());
    }
  }
#endif

  void thread(int id, [[maybe_unused]] int size) {
    if (kPacked) prepare_tiles();
    Worker worker(*this, id);
    int64_t task = queue->take(), b = 0;
    for (int64_t n = 0; n < heads(); n += at_once) {
      const int64_t end = min_of(heads(), n + at_once), blocks_before = first_of(first_block, n);
#if defined(__AVX512BF16__)
      if constexpr (kPacked) {
        if (n > 0) barrier->wait(size);
        pack_heads(n, first_of(first_block, end) - blocks_before, id, size);
        barrier->wait(size);
      }
#endif
      for (const int64_t last = first_of(first_task, end); task < last; task = queue->take()) {
        while (first_task[b + 1] <= task) b++;
        const Span span(p, b);
        const Blocks blocks(span.Tq, group);
        const int64_t i = task - first_task[b], head = i / blocks.tasks(),
                      block = blocks.per_head - 1 - i / blocks.chunks % blocks.per_head,
                      chunk = i % blocks.chunks, h = chunk * blocks.heads, q = block * blocks.queries;
        if (kPacked)
          worker.keys = packed + (first_of(first_block, b * p.Hk + head) - blocks_before) * block_size();
        worker.run(span, b, head, head * group + h, min_of(blocks.heads, group - h), q,
                   min_of(blocks.queries, span.Tq - q));
      }
    }
    release_tiles();
  }

  struct Worker {
    const AttentionFwd& f;
    const AttentionFwdParams& p;
    O* const QT;
    T *const OT, *const ST, *const rows;
    // Of each lane:
    T max[kQ], reference[kQ];   // of its scores so far; the integer near it that exp2 starts from
    T sum[kQ], rounded[kQ];     // of its weights; of them as the product with V reads them, which divides O
    T alpha[kQ];                // what O so far is multiplied with, after a new maximum
    T slope[kQ], position[kQ];  // ALiBi
    int64_t query[kQ], mask_row[kQ], row[kQ];  // row: sequence and head, as dropout counts them
    Word<T> seen[kK / 32][kUnit];  // of each lane: bits of the keys that a boolean mask shows, 32 at a time
    // Of this task: keys [j0, j1) are seen by some query, [full0, full1) by all.
    int64_t lanes, j0, j1, full0, full1;
    bool started;  // O^T holds a sum
    O* keys;       // packed blocks of its key head
    T c;           // what exp2 multiplies scores with

    Worker(const AttentionFwd& forward, int id)
        : f(forward),
          p(forward.p),
          QT(f.QT[id]),
          OT(f.OT[id]),
          ST(f.ST[id]),
          rows(f.rows[id]),
          c(f.rule.natural ? T(kLog2e) : T(__builtin_fabs(p.scale) * kLog2e)) {}

    // Queries [i0, i0 + n) of the heads [h0, h0 + heads), which share key head hk.
    void run(const Span& span, int64_t b, int64_t hk, int64_t h0, int64_t heads, int64_t i0, int64_t n) {
      lanes = heads * n;
      started = false;
      for (int64_t l = 0; l < round_up(lanes, W); l++) {
        const int64_t h = h0 + min_of(l, lanes - 1) / n, i = i0 + min_of(l, lanes - 1) % n;
        query[l] = i;
        max[l] = reference[l] = -kInf<T>;
        sum[l] = rounded[l] = 0;
        position[l] = T(i + span.offset);
        slope[l] = p.alibi ? T(p.alibi[b * p.alibi_b + h]) : T(0);
        mask_row[l] = mask_offset(p, b, h, i);
        row[l] = b * p.Hq + h;
      }
      full0 = span.first_key(i0 + n - 1), full1 = span.end_key(i0);
      j0 = span.first_key(i0) / 32 * 32, j1 = max_of(j0, span.end_key(i0 + n - 1));
      pack_queries(span, h0, heads, i0, n);
#if defined(__AVX512BF16__)
      if constexpr (kPacked)
        packed_blocks(span);
      else
#endif
        blocks(span, hk);
      finish(span, h0, i0, n);
    }

    int64_t block_end(int64_t j) const { return min_of(j1, (j / kK + 1) * kK); }

    void blocks(const Span& span, int64_t hk) {
      const S *k = row_of<S>(p.k, span.batch, hk, span.k0), *v = row_of<S>(p.v, span.batch, hk, span.k0);
      const int64_t N = round_up(lanes, W);
      for (int64_t j = j0, nk; j < j1; j += nk) {
        nk = block_end(j) - j;
        const Mask mask = look_at_mask(0, N, j, nk);
        if (mask == Mask::hides_all) continue;
        const Rows<T> K = as_operand<T>(k + j * p.k.t, p.k.t, nk, p.D, rows, p.D);
        product<T, false>(nk, N, p.D, K.data, K.ld, QT, kQ, ST, kQ, Start::zero);
        adjust(span, mask, ST, 0, N, j, nk);
        const bool grew = softmax(ST, 0, N, nk, [] {});
        if (p.dropout) drop(ST, 0, N, j, nk);
        const Rows<T> V = as_operand<T>(v + j * p.v.t, p.v.t, nk, p.Dv, rows, p.Dv);
        product<T, true>(p.Dv, N, nk, V.data, V.ld, ST, kQ, OT, kQ,
                         !started ? Start::zero
                         : grew   ? Start::scaled
                                  : Start::c,
                         alpha);
        started = true;
      }
    }

#if defined(__AVX512BF16__)
    // Stage t: softmax of unit t % units of the lanes in block t / units of the keys.
    void packed_blocks(const Span& span) {
      const int64_t units = divide_up(lanes, kUnit), first_block = j0 / kK,
                    stages = j1 > j0 ? (blocks_of(j1) - first_block) * units : 0;
      struct Stage {
        int64_t l, N, j, nk;  // lanes, keys
        O *K, *VT, *QT;
        T *ST, *OT;
      };
      const auto stage = [&](int64_t t) {
        Stage s;
        const int64_t u = t % units, block = first_block + t / units;
        s.l = u * kUnit, s.N = min_of(kUnit, round_up(lanes - s.l, W));
        s.j = max_of(j0, block * kK), s.nk = block_end(s.j) - s.j;
        O* const K = keys + block * f.block_size();
        s.K = K + s.j % kK * f.depth, s.VT = K + kK * f.depth + s.j % kK;
        s.QT = QT + u * f.depth * kUnit, s.OT = OT + u * f.ldv * kUnit;
        s.ST = ST + t % kBuffers * kK * kUnit;
        return s;
      };
      const auto scores = [&](const Stage& s) {
        return SteppedProduct{round_up(s.nk, 32), s.N, f.depth, s.K, f.depth, s.QT, 2 * kUnit, s.ST, kUnit};
      };
      const auto values = [&](const Stage& s) {
        return SteppedProduct{f.ldv,
                              s.N,
                              round_up(s.nk, 32),
                              s.VT,
                              kK,
                              reinterpret_cast<const O*>(s.ST),
                              2 * kUnit,
                              s.OT,
                              kUnit,
                              s.j == j0 ? Start::zero : Start::c};
      };
      if (stages == 0) return;
      started = true;
      Stage now = stage(0), then{};
      SteppedProduct before, after = scores(now);
      after.finish();
      for (int64_t t = 0; t < stages; t++, now = then) {
        after = SteppedProduct{};
        if (t + 1 < stages) after = scores(then = stage(t + 1));
        const Mask mask = look_at_mask(now.l, now.N, now.j, now.nk);
        adjust(span, mask, now.ST, now.l, now.N, now.j, now.nk);
        const int64_t calls = max_of(1, now.nk / 8), steps = divide_up(before.steps() + after.steps(), calls);
        const bool grew = softmax(now.ST, now.l, now.N, now.nk, [&]() __attribute__((always_inline)) {
          for (int64_t i = 0; i < steps; i++) (before.m < before.M ? before : after).step();
        });
        if (p.dropout) drop(now.ST, now.l, now.N, now.j, now.nk);
        before.finish();
        after.finish();
        if (grew && now.j != j0)
          for (int64_t d = 0; d < f.ldv; d++)
            for (int64_t l = 0; l < now.N; l += W)
              store(now.OT + d * kUnit + l, load(now.OT + d * kUnit + l) * load(alpha + now.l + l));
        before = values(now);
      }
      before.finish();
    }
#endif

    // Q^T with the sign of the scale, so that the greatest product is the greatest score.
    void pack_queries(const Span& span, int64_t h0, int64_t heads, int64_t i0, int64_t n) {
      const S* q = row_of<S>(p.q, span.batch, h0, span.q0 + i0);
      int64_t stride = p.q.t;
      if (heads > 1) {
        S* copy = reinterpret_cast<S*>(rows);
        for (int64_t l = 0; l < lanes; l++)
          __builtin_memcpy(static_cast<void*>(copy + l * p.D), q + l / n * p.q.h + l % n * p.q.t,
                           sizeof(S) * p.D);
        q = copy, stride = p.D;
      }
      if constexpr (kPacked) {
        if (p.D == 0) __builtin_memset(static_cast<void*>(QT), 0, sizeof(O) * f.depth * kQ);
        for (int64_t l = 0; l < lanes; l += kUnit)
          pack_panel(q + l * stride, stride, min_of(kUnit, lanes - l), p.D, QT + l * f.depth, kUnit);
      } else {
        pack_transposed(q, stride, lanes, p.D, QT, kQ, round_up(lanes, W));
      }
      if (p.scale < 0 && !f.rule.natural)
        for (int64_t i = 0; i < f.depth * round_up(lanes, kUnit); i += W)
          store(QT + i, -load(static_cast<const O*>(QT + i)));
    }

    // What a mask does to the lanes [l0, l0 + N) and keys [j, j + nk).
    enum class Mask { changes_nothing, changes_some, hides_all };

    Mask look_at_mask(int64_t l0, int64_t N, int64_t j, int64_t nk) {
      if (p.mask_kind == MaskKind::none) return Mask::changes_nothing;
      if (p.mask_kind != MaskKind::boolean) return Mask::changes_some;
      uint32_t some = 0, hidden = 0;
      for (int64_t k = 0; k < nk; k += 32)
        for (int64_t l = 0; l < N; l++) {
          const int64_t n = min_of(32, nk - k);
          if (l && mask_row[l0 + l] == mask_row[l0 + l - 1]) {
            seen[k / 32][l] = seen[k / 32][l - 1];
            continue;
          }
          const uint32_t bits = mask_bits(p, mask_row[l0 + l], j + k, n);
          some |= bits, hidden |= ~bits << (32 - n);
          seen[k / 32][l] = Word<T>(bits);
        }
      return !some ? Mask::hides_all : hidden ? Mask::changes_some : Mask::changes_nothing;
    }

    // Scores to logits, -inf where a query does not see a key.
    void adjust(const Span& span, Mask mask, T* ST_, int64_t l0, int64_t N, int64_t j, int64_t nk) {
      for (int64_t l = 0; l < N; l += W) {
        const auto each = [&](int64_t from, int64_t to, const auto& rule) __attribute__((always_inline)) {
          for (int64_t k = from; k < to; k++) store(ST_ + k * kUnit + l, rule(load(ST_ + k * kUnit + l), k));
        };
        const bool additive = p.mask_kind == MaskKind::additive || p.mask_kind == MaskKind::additive_acc;
        const bool scale_only = additive && f.rule.cap == 0 && !f.rule.alibi;  // then by the mask's own pass
        if (f.rule.natural && !scale_only) {
          const Vec<T> at = load(position + l0 + l), by = load(slope + l0 + l);
          each(0, nk, [&](Vec<T> s, int64_t k) {
            Vec<T> unused;
            return f.rule(s, T(j + k) - at, by, unused);
          });
        }
        const T factor = scale_only ? f.rule.scale : T(1);
        if (p.mask_kind == MaskKind::additive) add_mask<S>(ST_ + l, factor, mask_row + l0 + l, j, nk);
        if (p.mask_kind == MaskKind::additive_acc) add_mask<T>(ST_ + l, factor, mask_row + l0 + l, j, nk);
        if (p.mask_kind == MaskKind::boolean && mask != Mask::changes_nothing)
          for (int64_t k0 = 0; k0 < nk; k0 += 32) {
            const Vec<Word<T>> bits =
                *reinterpret_cast<const typename VecOf<Word<T>>::unaligned*>(seen[k0 / 32] + l);
            each(k0, min_of(nk, k0 + 32), [&](Vec<T> s, int64_t k) {
              return (bits & (Word<T>(1) << (k - k0))) != 0 ? s : splat(-kInf<T>);
            });
          }
        if (j >= full0 && j + nk <= full1) continue;
        T first[W], end[W];
        for (int i = 0; i < W; i++) {
          first[i] = T(max_of(0, min_of(nk, span.first_key(query[l0 + l + i]) - j)));
          end[i] = T(max_of(0, min_of(nk, span.end_key(query[l0 + l + i]) - j)));
        }
        const Vec<T> low = load(first), high = load(end);
        const auto limit = [&](Vec<T> s, int64_t k) {
          s = T(k) < low ? splat(-kInf<T>) : s;
          return T(k) >= high ? splat(-kInf<T>) : s;
        };
        const int64_t full = max_of(0, min_of(nk, full0 - j));  // from here to full1 - j all see all
        each(0, full, limit);
        each(max_of(full, full1 - j), nk, limit);
      }
    }

    // To one vector of lanes, whose rows of the mask are W x W numbers to transpose.
    template <class M>
    void add_mask(T* s, T factor, const int64_t* row, int64_t j, int64_t nk) const {
      bool same = true;
      for (int r = 1; r < W; r++) same &= row[r] == row[0];
      for (int64_t k = 0; k < nk; k += W) {
        Vec<T> v[W];
        v[0] = mask_values<M>(p, row[0], j + k, nk - k);
        for (int r = 1; r < W; r++) v[r] = same ? v[0] : mask_values<M>(p, row[r], j + k, nk - k);
        for (int r = 0; r < W; r++)  // of the next block: rows this short wake no prefetcher
          __builtin_prefetch(static_cast<const M*>(p.mask) + row[r] + (j + k + kK) * p.mask_k);
        transpose<T>(v);
        for (int64_t r = 0; r < W && k + r < nk; r++)
          store(s + (k + r) * kUnit, load(s + (k + r) * kUnit) * factor + v[r]);
      }
    }

    // S^T of lanes from l0 on becomes P^T, in place; packed: rows k and k + 1, interleaved, replace row k
    // / 2. `step` is called now and then. True when O^T has to be scaled by alpha.
    template <class Step>
    bool softmax(T* ST_, int64_t l0, int64_t N, int64_t nk, const Step& step) {
      if (kPacked && N > W) return softmax_of<2>(ST_, l0, nk, step);
      bool grew = false;
      for (int64_t l = 0; l < N; l += W) grew |= softmax_of<1>(ST_ + l, l0 + l, nk, step);
      return grew;
    }
    template <int V, class Step>
    bool softmax_of(T* s, int64_t l0, int64_t nk, [[maybe_unused]] const Step& step) {
      Vec<T> by[V], ref[V], total[V], of_rounded[V];
      bool grew = false;
      SEQ_UNROLL for (int v = 0; v < V; v++) {
        grew |= move_reference(s + v * W, l0 + v * W, nk, by[v], ref[v]);
        total[v] = load(sum + l0 + v * W), of_rounded[v] = load(rounded + l0 + v * W);
      }
      const auto weight = [&](int64_t k, int v) __attribute__((always_inline)) {
        const Vec<T> e = exp2_of<T>(load(s + k * kUnit + v * W), by[v], ref[v]);
        total[v] += e;
        return e;
      };
#if defined(__AVX512BF16__)
      if constexpr (kPacked)
        for (int64_t k = 0; k < round_up(nk, 32); k += 2) {
          if (k % 8 == 0 && k + 2 <= nk) step();
          SEQ_UNROLL for (int v = 0; v < V; v++) {
            const Vec<T> a = k < nk ? weight(k, v) : Vec<T>{}, b = k + 1 < nk ? weight(k + 1, v) : Vec<T>{};
            const __m512i pairs = as_pairs(narrow(a, b));
            of_rounded[v] = sum_of_pairs(of_rounded[v], pairs);
            store(s + k / 2 * kUnit + v * W, (Vec<T>)pairs);
          }
        }
#endif
      if constexpr (!kPacked)
        for (int64_t k = 0; k < nk; k++) store(s + k * kUnit, weight(k, 0));
      SEQ_UNROLL for (int v = 0; v < V; v++) {
        store(sum + l0 + v * W, total[v]);
        store(rounded + l0 + v * W, kPacked ? of_rounded[v] : total[v]);
      }
      return grew;
    }

    // Behind the softmax: weights that dropout takes away become 0, in rows k or k / 2 as softmax left them.
    void drop(T* P, int64_t l0, int64_t N, int64_t j, int64_t nk) const {
      for (int64_t k0 = 0; k0 < nk; k0 += 32) {
        Word<T> kept[kUnit];
        for (int64_t l = 0; l < N; l++) kept[l] = Word<T>(f.philox.kept(row[l0 + l], query[l0 + l], j + k0));
        for (int64_t l = 0; l < N; l += W) {
          const Vec<Word<T>> bits = load(kept + l);
          for (int64_t k = 0; k < min_of(32, nk - k0); k += kPacked ? 2 : 1) {
            T* to = P + (kPacked ? (k0 + k) / 2 : k0 + k) * kUnit + l;
            const auto stays = [&](int64_t key) { return (Vec<Word<T>>)((bits & Word<T>(1) << key) != 0); };
            Vec<Word<T>> both = stays(k);
            if (kPacked) both = (both & 0xffff) | stays(k + 1) << 16;
            store(to, (Vec<T>)((Vec<Word<T>>)load(to) & both));
          }
        }
      }
    }

    // Maximum of one vector of lanes; P = 2^(s by - ref) from here on. True when the reference has moved.
    bool move_reference(T* s, int64_t l, int64_t nk, Vec<T>& by, Vec<T>& ref) {
      Vec<T> top[4];
      SEQ_UNROLL for (int i = 0; i < 4; i++) top[i] = splat(-kInf<T>);
      int64_t k = 0;
      for (; k + 4 <= nk; k += 4)
        SEQ_UNROLL for (int i = 0; i < 4; i++) top[i] = max_of(load(s + (k + i) * kUnit), top[i]);
      for (; k < nk; k++) top[0] = max_of(load(s + k * kUnit), top[0]);
      SEQ_UNROLL for (int i = 1; i < 4; i++) top[0] = max_of(top[i], top[0]);

      const Vec<T> was = load(max + l);
      const auto more = (top[0] - was) * c > kGrowth;
      const Vec<T> now = more ? top[0] : was, exact = now * c;
      const auto far = (exact >= kFar<T>) | ((exact <= -kFar<T>)&(now > -kInf<T>));
      by = splat(c);
      ref = load(reference + l);
      const bool moved = any(more);
      if (moved) {
        const Vec<T> next = more ? nearest<T>(exact) : ref, by_how_much = far ? (was - now) * c : ref - next;
        store(alpha + l, more ? exp2_of<T>(by_how_much, splat(T(1)), Vec<T>{}) : splat(T(1)));
        store(sum + l, load(sum + l) * load(alpha + l));
        store(rounded + l, load(rounded + l) * load(alpha + l));
        store(max + l, now);
        store(reference + l, next);
        ref = next;
      } else {
        store(alpha + l, splat(T(1)));
      }
      ref = ref == -kInf<T> ? Vec<T>{} : ref;
      if (any(far)) {  // beyond integers: subtract the maximum itself
        for (k = 0; k < nk; k++) {
          const Vec<T> v = load(s + k * kUnit);
          store(s + k * kUnit, far ? (v - now) * c : v * c - ref);
        }
        by = splat(T(1)), ref = Vec<T>{};
      }
      return moved;
    }

    void finish(const Span& span, int64_t h0, int64_t i0, int64_t n) {
      T* lse = static_cast<T*>(p.lse) + span.lse;
      for (int64_t l = 0; l < lanes; l++) {
        const int64_t h = h0 + l / n;
        const bool near = reference[l] > -kFar<T> && reference[l] < kFar<T>;
        const double scale = f.rule.natural ? 1 : __builtin_fabs(double(f.rule.scale));
        double m = max[l] == -kInf<T> ? 0 : double(max[l]) * scale;
        if (near) m += kLn2 * (double(reference[l]) - double(max[l]) * double(c));  // c is rounded
        double total = sum[l], divisor = rounded[l], by = 1;
        const double sink = p.sinks ? static_cast<const T*>(p.sinks)[h] : -kInf<double>;
        if (sink != -kInf<double>) {
          const double m0 = sum[l] == 0 ? sink : m;
          m = sink > m0 ? sink : m0;
          by = __builtin_exp(m0 - m);
          const double more = __builtin_exp(sink - m);
          total = total * by + more, divisor = divisor * by + more;
        }
        lse[h * span.lse_h + i0 + l % n] = T(m + __builtin_log(total));
        alpha[l] = total == 0 ? T(0) : T(by / divisor * p.dropout.factor);
      }
      for (int64_t l = lanes; l < round_up(lanes, W); l++) alpha[l] = 0;
      for (int64_t l0 = 0; l0 < lanes; l0 += kUnit) {
        const auto row = [&](int64_t l) __attribute__((always_inline)) {
          return row_of<S>(p.out, span.batch, h0 + (l0 + l) / n, span.q0 + i0 + (l0 + l) % n);
        };
        const int64_t count = min_of(kUnit, lanes - l0);
        if (started)
          write_columns<S>(OT + l0 * f.ldv, kUnit, count, p.Dv, alpha + l0, row);
        else
          for (int64_t l = 0; l < count; l++)
            __builtin_memset(static_cast<void*>(row(l)), 0, sizeof(S) * p.Dv);
      }
    }
  };
};

template <class S>
static void attention_fwd(const AttentionFwdParams& p) {
  if (AttentionFew<S>::suits(p))
    run_kernel(p.parallel, AttentionFew<S>(p));
  else
    run_kernel(p.parallel, AttentionFwd<S>(p));
}
