// Backward of one layer, for every cell.
//
// Time is walked back in chunks of 256 to 1024 tokens. Within a chunk each thread owns rows and units as in
// forward: the cell's epilogue turns dh into the gate gradients dG, then dh = dG W_hh for the step before. A
// chunk done, dG is still in cache, and the rest is three quarters of the products: blocks of tokens (dx = dG
// W_ih) and of gate rows (dW += dG^T [x | h], with x and h packed into panels once a chunk), which the
// threads of the direction take from one queue, so that a core that is slower, or shared, holds up nobody. So
// dG never exists for the whole sequence, a block is the work of one thread (no copies: same bits every time,
// whoever takes it), and all threads of a direction meet twice a chunk, three times where gates are rebuilt.
#pragma once

#include "layer_fwd.inl.h"

// What a cell's backward epilogue works on: a block of `units` columns for `rows` rows of one step.
template <class S>
struct BwdTile {
  using T = Acc<S>;
  using O = Operand<S>;
  int64_t rows, units, H;
  const S* gates;  // saved activations, gate g at column g * H
  int64_t ldgates;
  const S* dy;  // or null
  int64_t lddy;
  T* dh;  // in: gradient of h from later steps; out: what reaches h_{t-1} past the matrix product (GRU)
  int64_t lddh;
  O* dG;  // gate gradients, slot s at column s * H
  int64_t lddG;
  const S* h_prev;  // GRU
  int64_t ldh_prev;
  const S* y;  // RNN: h_t
  int64_t ldy;
  const T *c, *c_prev;  // LSTM
  int64_t ldc, ldc_prev;
  const T* dcells;  // or null
  int64_t lddcells;
  T* dc;  // in: gradient of c_t from later steps; out: of c_{t-1}
  int64_t lddc;
  O* m;  // LSTM with projection: m_t again, for dW_hr; or null
  int64_t ldm;
  bool relu;
};

template <class Cell, class S>
struct LayerBwd {
  using T = Acc<S>;
  using O = Operand<S>;
  using Params = typename Cell::BwdParams;
  static constexpr int G = Cell::kGates, kSlots = Cell::kSlots;
  static constexpr int64_t kRebuildTokens = 48, kInPlaceTokens = 8, kGradientRows = 48, kTaskRows = 96;

  const Params& p;
  Sequence seq;
  const int64_t I, H, P, B, D;
  BackwardWeights<Cell, S> weights;
  ForwardWeights<Cell, S> forward;  // to rebuild the gates; panels only then
  const bool rebuild, projected;
  const bool dh_in_place;       // one step: dh is made where the caller wants it
  const int team;               // threads at most
  int64_t steps, chunk_tokens;  // of a chunk, at most
  int64_t dx_tokens, dw_rows;   // of a task
  const int64_t ldG, ldh, ldcell;

  // Shared, one of each per direction. x and h panels hold one chunk; dw_* are sums in the layout [rows,
  // padded]; of dW_ih and dW_hh only where there are several chunks or the caller's have that layout.
  O *dG[2], *dh_chunk[2], *m_chunk[2], *x_panels[2], *h_panels[2];
  S* gates[2];
  T *dh[2], *dc[2], *dm[2], *c0[2], *dh0[2], *dc0[2], *dw_ih[2], *dw_hh[2], *dw_hr[2], *db[2];
  T* dx_reverse;
  Barrier *everyone, *direction_barriers, *row_barriers;
  Shares::Busy* busy;  // [directions at once, row groups, unit groups]
  PerThread<int64_t> shares;
  Queue *tasks[2], *once_blocks;  // of each chunk; of the recurrent product where it packs block by block
  // One of each per thread: a panel of products; a share of dG, transposed; tokens of x and h to rebuild
  // gates from.
  PerThread<T> local;
  PerThread<O> local_operand;

  explicit LayerBwd(const Params& params)
      : p(params),
        seq(params),
        I(p.I),
        H(p.H),
        P(p.P),
        B(p.B),
        D(p.D),
        weights(params, seq.tokens <= kInPlaceTokens),
        forward(params),
        rebuild(Cell::kSaved > 0 && !p.gates),
        projected(weights.projected),
        dh_in_place(weights.once && in_place(P) && !p.resets),
        team(team_size(seq, 3 * G)),  // three products of the size of forward's
        steps(1),
        chunk_tokens(0),
        dx_tokens(0),
        dw_rows(0),
        ldG(p.H * (kSlots - G) + row_stride<O>(G * p.H)),
        ldh(dh_in_place ? P : row_stride<O>(P)),
        ldcell(row_stride<O>(p.H)) {}

  static constexpr bool kSame = sizeof(S) == sizeof(T);
  int64_t padded(int64_t n) const { return round_up(n, kLanes<T>); }
  bool in_place(int64_t columns) const { return kSame && columns == padded(columns); }
  // All steps are one chunk: dW_ih and dW_hh are converted tile by tile, there are no sums to add to.
  bool one_chunk() const { return steps == p.T; }

  void layout(Arena& a) {
    seq.layout(a);
    weights.layout(a);
    if (rebuild) forward.layout(a);
    const int64_t average = seq.tokens / p.T;
    // The sums dW are read and written once a chunk: the larger they are, the longer the chunk has to be.
    const int64_t weight_bytes = G * H * (I + P) * int64_t(sizeof(T));
    const int64_t wanted = weight_bytes <= (2 << 20) ? 256 : weight_bytes <= (8 << 20) ? 512 : 1024;
    steps = average > 0 ? min_of(p.T, max_of(1, wanted / average)) : 1;
    chunk_tokens = min_of(steps * B, seq.tokens);
    const Panels<O> xs{I, chunk_tokens}, hs{P, chunk_tokens};
    const auto rows = [&](bool wanted, int64_t ld) {
      return a.take<T>(wanted ? B * ld + apart<T>(team) : 0);
    };
    for (int64_t d = 0; d < D; d++) {
      dG[d] = a.take<O>(chunk_tokens * ldG);
      dh[d] = dh_in_place ? static_cast<T*>(p.dh0) + d * B * P : rows(true, ldh);
      dc[d] = rows(Cell::kCellState, ldcell);
      c0[d] = rows(Cell::kCellState, ldcell);
      dm[d] = rows(projected, ldcell);
      dh_chunk[d] = projected ? a.take<O>(chunk_tokens * ldh) : nullptr;
      m_chunk[d] = projected ? a.take<O>(chunk_tokens * ldcell) : nullptr;
      dh0[d] = rows(p.resets, ldh);
      dc0[d] = rows(p.resets && Cell::kCellState, ldcell);
      gates[d] = rebuild ? a.take<S>(chunk_tokens * Cell::kSaved * H) : nullptr;
      x_panels[d] = a.take<O>(xs.size());
      h_panels[d] = a.take<O>(hs.size());
      const auto sums = [&](int64_t columns, void* dw) {
        return in_place(columns) ? static_cast<T*>(dw)
               : one_chunk()     ? nullptr
                                 : a.take<T>(G * H * padded(columns));
      };
      dw_ih[d] = sums(I, p.dw[d].w_ih);
      dw_hh[d] = sums(P, p.dw[d].w_hh);
      dw_hr[d] = !projected    ? nullptr
                 : in_place(H) ? static_cast<T*>(p.dw[d].w_hr)
                               : a.take<T>(P * padded(H));
      db[d] = a.take<T>(kSlots * H);
    }
    dx_reverse = D == 2 && p.dx ? a.take<T>(seq.tokens * I) : nullptr;
    everyone = a.take_zeros<Barrier>(1);
    direction_barriers = a.take_zeros<Barrier>(2);
    row_barriers = a.take_zeros<Barrier>(2 * team);
    busy = a.take<Shares::Busy>(2 * team);
    shares = a.take_each<int64_t>(team, 2 * team + 1);
    // Some for every thread of dx, which comes first; many of dW, which fill the gaps.
    const int64_t threads = max_of(1, team / D), tile = kDepth<O> == 32 ? 32 : MR;
    dx_tokens = round_up(max_of(2 * tile, divide_up(chunk_tokens, 2 * threads)), tile);
    dw_rows = round_up(min_of(kTaskRows, divide_up(G * H, 8 * threads)), tile);
    for (int d = 0; d < D; d++) tasks[d] = a.take_zeros<Queue>(divide_up(p.T, steps));
    once_blocks = a.take_zeros<Queue>(D);
    const int64_t rebuilt = rebuild ? kRebuildTokens : 0;
    const int64_t local_rows = max_of(max_of(chunk_tokens, kGradientRows), (G + 3) * rebuilt);
    int64_t operand_size = (projected ? max_of(H, P) + NR<T> : dw_rows) * depth_of(chunk_tokens);
    const int64_t rebuild_size = rebuilt * (forward.in.depth() + forward.rec.depth() + 2 * NR<T>);
    operand_size = max_of(operand_size, rebuild_size);
    if (weights.once) operand_size = max_of(operand_size, weights.kBlockSize);
    local = a.take_each<T>(team, local_rows * NR<T>);
    local_operand = a.take_each<O>(team, operand_size);
  }
  // Stride of a transposed chunk: tokens, padded for whole vectors and for the products.
  static int64_t depth_of(int64_t tokens) { return row_stride<O>(tokens); }

  void prepare() { seq.prepare(); }
  int wanted() const { return team; }

  void thread(int id, int size) {
    const Plan plan = make_plan<O>(seq, size, G, weights.once);
    const int group = size / plan.concurrent, first = id / group, rank = id % group;
    if (first < plan.concurrent) {
      for (int d = first; d < D; d += plan.concurrent) {
        weights.pack(d, rank, group);
        if (rebuild) forward.pack(d, rank, group);
        Worker worker(*this, plan, d, id, rank, group, direction_barriers + first,
                      first * plan.row_groups + rank / plan.unit_groups);
        worker.run();
      }
      release_tiles();
    }
    if (!dx_reverse) return;
    everyone->wait(size);
    const int64_t n = seq.tokens * I, begin = n * id / size, end = n * (id + 1) / size;
    S* dx = static_cast<S*>(p.dx);
    for (int64_t i = begin; i < end; i += kLanes<T>)
      store(dx + i, load(dx + i, end - i) + load(dx_reverse + i, end - i), end - i);
  }

  // One thread's share of one direction.
  struct Worker {
    const LayerBwd& f;
    const Params& p;
    const Sequence& seq;
    const int d, rank, group;
    const bool owner;  // of rows; other threads only share the chunk's products
    const int row_group;
    const RowRange own;
    const int64_t r0, r1;  // rows
    const int64_t n0, n1;  // gate rows of the sums that become the caller's
    const int64_t q0, q1;  // rows of dW_hr
    Barrier *direction, *rows_barrier;
    Shares shares;                     // of the unit blocks, among the threads that share these rows
    int64_t j0, j1, k0, k1;            // own unit blocks; own blocks of P: the units unless projected
    T *dh, *dc, *dm, *c0, *dh0, *dc0;  // of this direction, [B, ..]; rows of different owners lie apart
    T* local;
    O* local_operand;
    int64_t lo = 0, hi = 0;  // the chunk's steps, in memory order
    bool first_chunk = true;

    Worker(const LayerBwd& layer, const Plan& plan, int dir, int id, int rank_, int group_, Barrier* all,
           int rows_of)
        : f(layer),
          p(layer.p),
          seq(layer.seq),
          d(dir),
          rank(rank_),
          group(group_),
          owner(rank_ < plan.per_direction()),
          row_group(owner ? rank / plan.unit_groups : 0),
          own(owner ? row_group_of(seq, plan.row_groups, row_group) : RowRange{}),
          r0(own.begin),
          r1(own.end),
          n0(G * f.H * rank / group),
          n1(G * f.H * (rank + 1) / group),
          q0(f.P * rank / group),
          q1(f.P * (rank + 1) / group),
          direction(all),
          rows_barrier(layer.row_barriers + rows_of),
          shares{layer.busy + rows_of * plan.unit_groups, layer.shares[id],
                 layer.shares[id] + plan.unit_groups + 1, owner ? plan.unit_groups : 1,
                 owner ? rank % plan.unit_groups : 0},
          dh(layer.dh[d] + apart<T>(row_group)),
          dc(layer.dc[d] + apart<T>(row_group)),
          dm(layer.dm[d] + apart<T>(row_group)),
          c0(layer.c0[d] + apart<T>(row_group)),
          dh0(layer.dh0[d] + apart<T>(row_group)),
          dc0(layer.dc0[d] + apart<T>(row_group)),
          local(layer.local[id]),
          local_operand(layer.local_operand[id]) {
      shares.begin(blocks(f.H));
      take_units();
    }
    void take_units() {
      j0 = shares.first[shares.rank], j1 = shares.first[shares.rank + 1];
      k0 = f.projected ? blocks(f.P) * shares.rank / shares.size : j0;
      k1 = f.projected ? blocks(f.P) * (shares.rank + 1) / shares.size : j1;
    }

    static int64_t blocks(int64_t n) { return divide_up(n, NR<T>); }
    int64_t time(int64_t step) const { return d ? p.T - 1 - step : step; }
    int64_t row_of(int64_t t) const { return seq.token(t) - seq.token(lo); }  // of a chunk's buffers
    int64_t chunk_size() const { return seq.token(hi) - seq.token(lo); }
    int64_t width(int64_t n, int64_t j) const { return min_of(NR<T>, n - j * NR<T>); }

    // The state before step t is the initial one.
    bool initial(int64_t t, int64_t b) const {
      const int64_t before = d ? t + 1 : t - 1;
      if (before < 0 || before >= p.T || seq.rows(before) <= b) return true;
      return p.resets && p.resets[t * f.B + b];
    }
    const S* h_prev(int64_t t, int64_t b) const {
      if (initial(t, b)) return static_cast<const S*>(p.h0) + (d * f.B + b) * f.P;
      return y(d ? t + 1 : t - 1, b);
    }
    const S* y(int64_t t, int64_t b) const {
      return static_cast<const S*>(p.y) + ((seq.token(t) + b) * f.D + d) * f.P;
    }

    void run() {
      init_state();
      direction->wait(group);
      for (int64_t end = p.T, begin; end > 0; end = begin) {
        begin = (end - 1) / f.steps * f.steps;
        lo = d ? time(end - 1) : begin, hi = d ? time(begin) + 1 : end;
        if (f.rebuild) rebuild_gates(), direction->wait(group);
        pack_inputs();
        shares.begin_round();
        if (owner) {
          for (int64_t s = end - 1; s >= begin; s--) step(s);
          shares.report();
        }
        direction->wait(group);
        if (owner && shares.size > 1 && begin > 0) shares.share_anew(), take_units();
        products(f.tasks[d][begin / f.steps]);
        if (f.projected && q0 < q1) projection_gradient();
        first_chunk = false;
        direction->wait(group);
      }
      finish();
    }

    // Own rows, own columns of P and of H.
    template <class Fn>
    void each_state(const Fn& fn) const {
      for (int64_t b = r0; b < r1; b++)
        for (int64_t k = k0; k < k1; k++)
          for (int64_t i = k * NR<T>, e = i + width(f.P, k); i < e; i += kLanes<T>) fn(b, i, e - i);
    }
    template <class Fn>
    void each_cell(const Fn& fn) const {
      if constexpr (Cell::kCellState)
        for (int64_t b = r0; b < r1; b++)
          for (int64_t j = j0; j < j1; j++)
            for (int64_t i = j * NR<T>, e = i + width(f.H, j); i < e; i += kLanes<T>) fn(b, i, e - i);
    }

    void init_state() const {
      for (int64_t row = f.chunk_tokens * rank / group; row < f.chunk_tokens * (rank + 1) / group; row++) {
        for (int64_t i = f.kSlots * f.H; i < f.ldG; i++) f.dG[d][row * f.ldG + i] = O{};
        for (int64_t i = f.P; f.projected && i < f.ldh; i++) f.dh_chunk[d][row * f.ldh + i] = O{};
      }
      const int64_t h_at = d * f.B * f.P;
      each_state([&](int64_t b, int64_t i, int64_t n) {
        const S* from = static_cast<const S*>(p.dhn) + h_at + b * f.P + i;
        store(dh + b * f.ldh + i, p.dhn ? load(from, n) : Vec<T>{});
        if (p.resets) store(dh0 + b * f.ldh + i, Vec<T>{});
      });
      if constexpr (Cell::kCellState) {
        const int64_t c_at = d * f.B * f.H;
        each_cell([&](int64_t b, int64_t i, int64_t n) {
          const S* from = static_cast<const S*>(p.dcn) + c_at + b * f.H + i;
          store(dc + b * f.ldcell + i, p.dcn ? load(from, n) : Vec<T>{});
          store(c0 + b * f.ldcell + i, load(static_cast<const S*>(p.c0) + c_at + b * f.H + i, n));
          if (p.resets) store(dc0 + b * f.ldcell + i, Vec<T>{});
        });
      }
    }

    // x and h_{t-1} of the chunk's tokens into panels, for the weight gradients. Tokens are shared out by
    // pairs.
    void pack_inputs() const {
      const int64_t m = chunk_size(), begin = m * rank / group & ~1,
                    end = rank + 1 == group ? m : m * (rank + 1) / group & ~1;
      const Panels<O> xs{f.I, m}, hs{f.P, m};
      each_token(begin, end, [&](int64_t row, int64_t t, int64_t b) {
        pack_token(seq.template x<S>(t, b), xs, f.x_panels[d], row);
        pack_token(h_prev(t, b), hs, f.h_panels[d], row);
      });
      if (rank != 0) return;
      for (int64_t j = 0; j < xs.count(); j++) pack_padding(f.x_panels[d] + xs.offset(j), m, xs.width(j));
      for (int64_t j = 0; j < hs.count(); j++) pack_padding(f.h_panels[d] + hs.offset(j), m, hs.width(j));
    }
    template <class From>
    static void pack_token(const From* from, const Panels<O>& shape, O* panels, int64_t row) {
      for (int64_t j = 0; j < shape.count(); j++)
        pack_row(from + j * NR<T>, shape.N - j * NR<T>, panels + shape.offset(j), row, shape.width(j));
    }
    template <class Fn>
    void each_token(int64_t begin, int64_t end, const Fn& fn) const {
      for (int64_t t = lo, row = 0; t < hi; t++) {
        const int64_t n = seq.rows(t);
        for (int64_t b = max_of(0, begin - row); b < n && row + b < end; b++) fn(row + b, t, b);
        row += n;
      }
    }

    // Gates of the chunk from x and h_{t-1}: no recurrence, so plain products over blocks of tokens.
    void rebuild_gates() {
      const ForwardWeights<Cell, S>& w = f.forward;
      const int64_t m = chunk_size(), end = m * (rank + 1) / group, ldx = w.in.depth(), ldp = w.rec.depth();
      O *x = local_operand, *h = x + kRebuildTokens * ldx, *unused_h = h + kRebuildTokens * ldp;
      T *C = local, *Q = C + kRebuildTokens * G * NR<T>, *unused_c = Q + kRebuildTokens * NR<T>;
      __builtin_memset(static_cast<void*>(unused_h), 0, sizeof(O) * kRebuildTokens * NR<T>);
      __builtin_memset(static_cast<void*>(unused_c), 0, sizeof(T) * kRebuildTokens * NR<T>);
      for (int64_t m0 = m * rank / group; m0 < end; m0 += kRebuildTokens) {
        const int64_t n = min_of(kRebuildTokens, end - m0);
        each_token(m0, m0 + n, [&](int64_t row, int64_t t, int64_t b) {
          copy_row(seq.template x<S>(t, b), f.I, x + (row - m0) * ldx, ldx);
          copy_row(h_prev(t, b), f.P, h + (row - m0) * ldp, ldp);
        });
        for (int64_t j = 0; j < blocks(f.H); j++) {
          const int64_t wide = w.in.width(j), u = j * NR<T>;
          for (int g = 0; g < G; g++) {
            T* c = C + g * NR<T>;
            gemm_panel(n, wide, ldx, x, ldx, w.input(d, g, j), wide, w.bias[d] + g * w.in.padded() + u, 0, c,
                       G * NR<T>);
            if (g == Cell::kSplitGate)
              gemm_panel(n, wide, ldp, h, ldp, w.recurrent(d, g, j), wide, w.q_bias[d] + u, 0, Q, NR<T>);
            else
              gemm_panel(n, wide, ldp, h, ldp, w.recurrent(d, g, j), wide, c, G * NR<T>, c, G * NR<T>);
          }
          FwdTile<S> tile{};
          tile.rows = n, tile.units = width(f.H, j), tile.H = f.H;
          tile.C = C, tile.ldc = G * NR<T>, tile.gate = NR<T>;
          tile.q = Q, tile.ldq = NR<T>;
          tile.h_prev = unused_h, tile.ldh_prev = NR<T>;
          tile.h = unused_h, tile.ldh = NR<T>;
          tile.c = unused_c, tile.ldcell = NR<T>;
          tile.gates = f.gates[d] + m0 * Cell::kSaved * f.H + u, tile.ldgates = Cell::kSaved * f.H;
          Cell::template fwd<S>(tile);
        }
      }
    }

    void step(int64_t s) {
      const int64_t t = time(s), n = seq.rows(t, r0, r1);
      const S* dy = p.dy ? static_cast<const S*>(p.dy) + ((seq.token(t) + r0) * f.D + d) * f.P : nullptr;
      if (f.projected) project_gradient(t, n, dy);
      for (int64_t j = j0; j < j1; j++)
        for (int64_t b = 0, end; b < n; b = end) {  // runs of rows that have, or have not, a step before
          const bool start = initial(t, r0 + b);
          for (end = b + 1; end < n && initial(t, r0 + end) == start; end++) {
          }
          epilogue(t, j, r0 + b, end - b, start, dy ? dy + b * f.D * f.P : nullptr);
        }
      shares.wait(rows_barrier);
      const O* dG = f.dG[d] + (row_of(t) + r0) * f.ldG;
      T* own_dh = dh + r0 * f.ldh;
      const auto product = [&](int64_t from, int64_t to, T* c, int64_t ldc) {
        f.weights.recurrent_product(d, from, to, s % 2, n, dG, f.ldG, Cell::kBypass, c, ldc, local_operand);
      };
      if (f.weights.once) {  // by way of a block of its own: rows of dh may be 4 KiB apart
        for (int64_t k; n > 0 && (k = f.once_blocks[d].take()) < blocks(f.P);) {
          T* to = own_dh + k * NR<T>;
          if (Cell::kBypass) copy_block(to, f.ldh, local, NR<T>, n, width(f.P, k));
          product(k, k + 1, local - k * NR<T>, NR<T>);
          copy_block(local, NR<T>, to, f.ldh, n, width(f.P, k));
        }
        shares.wait(rows_barrier);
      } else if (n > 0) {
        product(k0, k1, own_dh, f.ldh);
      }
      if (p.resets) reset(t, n);
      if (f.projected) shares.wait(rows_barrier);
    }

    // dh of P columns, own ones summed and kept for dW_hr, becomes dm = dh W_hr of H columns.
    void project_gradient(int64_t t, int64_t n, const S* dy) {
      O* chunk = f.dh_chunk[d] + (row_of(t) + r0) * f.ldh;
      for (int64_t b = 0; b < n; b++)
        for (int64_t k = k0; k < k1; k++)
          for (int64_t i = k * NR<T>, e = i + width(f.P, k); i < e; i += kLanes<T>) {
            Vec<T> g = load(dh + (r0 + b) * f.ldh + i);
            if (dy) g += load(dy + b * f.D * f.P + i, e - i);
            store(chunk + b * f.ldh + i, g, e - i);
          }
      shares.wait(rows_barrier);
      for (int64_t j = j0; j < j1 && n > 0; j++)
        gemm_panel(n, f.weights.proj.width(j), f.weights.proj.depth(), chunk, f.ldh,
                   f.weights.projection(d, j), f.weights.proj.width(j), static_cast<const T*>(nullptr), 0,
                   dm + r0 * f.ldcell + j * NR<T>, f.ldcell);
    }

    void epilogue(int64_t t, int64_t j, int64_t b, int64_t n, bool start, const S* dy) const {
      const int64_t u = j * NR<T>, token = seq.token(t) + b, row = row_of(t) + b;
      BwdTile<S> tile{};
      tile.rows = n, tile.units = width(f.H, j), tile.H = f.H;
      if (f.rebuild)
        tile.gates = f.gates[d] + row * Cell::kSaved * f.H + u, tile.ldgates = Cell::kSaved * f.H;
      else if (Cell::kSaved)
        tile.gates = static_cast<const S*>(p.gates) + (token * f.D + d) * Cell::kSaved * f.H + u,
        tile.ldgates = f.D * Cell::kSaved * f.H;
      if (f.projected) {
        tile.dh = dm + b * f.ldcell + u, tile.lddh = f.ldcell;
        tile.m = f.m_chunk[d] + row * f.ldcell + u, tile.ldm = f.ldcell;
      } else {
        tile.dh = dh + b * f.ldh + u, tile.lddh = f.ldh;
        if (dy) tile.dy = dy + u, tile.lddy = f.D * f.P;
      }
      tile.dG = f.dG[d] + row * f.ldG + u, tile.lddG = f.ldG;
      tile.h_prev = h_prev(t, b) + u, tile.ldh_prev = start ? f.P : f.D * f.P;
      tile.y = y(t, b) + u, tile.ldy = f.D * f.P;
      if constexpr (Cell::kCellState) {
        const T* cells = static_cast<const T*>(p.cells) + d * f.H + u;
        tile.c = cells + token * f.D * f.H, tile.ldc = f.D * f.H;
        if (start)
          tile.c_prev = c0 + b * f.ldcell + u, tile.ldc_prev = f.ldcell;
        else
          tile.c_prev = cells + (seq.token(d ? t + 1 : t - 1) + b) * f.D * f.H, tile.ldc_prev = f.D * f.H;
        if (p.dcells)
          tile.dcells = static_cast<const T*>(p.dcells) + (token * f.D + d) * f.H + u,
          tile.lddcells = f.D * f.H;
        tile.dc = dc + b * f.ldcell + u, tile.lddc = f.ldcell;
      }
      if constexpr (Cell::kReluOption) tile.relu = p.relu;
      Cell::template bwd<S>(tile);
    }

    // The state before step t was the initial one: its gradient goes there and no further back.
    void reset(int64_t t, int64_t n) const {
      auto hand_over = [](T* from, T* to) {
        store(to, load(to) + load(from));
        store(from, Vec<T>{});
      };
      auto flagged = [&](int64_t b) { return b - r0 < n && p.resets[t * f.B + b]; };
      each_state([&](int64_t b, int64_t i, int64_t) {
        if (flagged(b)) hand_over(dh + b * f.ldh + i, dh0 + b * f.ldh + i);
      });
      each_cell([&](int64_t b, int64_t i, int64_t) {
        if (flagged(b)) hand_over(dc + b * f.ldcell + i, dc0 + b * f.ldcell + i);
      });
    }

    // What of the chunk does not depend on its order: dx by blocks of tokens (by blocks of columns where
    // weights are packed block by block), then dW and db by blocks of gate rows.
    void products(Queue& tasks) const {
      const int64_t m = chunk_size(), row_blocks = divide_up(f.H, f.dw_rows);
      const int64_t of_dx = !p.dx ? 0 : f.weights.once ? blocks(f.I) : divide_up(m, f.dx_tokens);
      for (int64_t task; (task = tasks.take()) < of_dx + G * row_blocks;) {
        if (task >= of_dx) {
          const int64_t g = (task - of_dx) / row_blocks, u = (task - of_dx) % row_blocks * f.dw_rows;
          weight_gradients(g, u, min_of(f.dw_rows, f.H - u));
        } else if (f.weights.once) {
          input_gradient(0, m, task, task + 1);
        } else {
          const int64_t m0 = task * f.dx_tokens;
          input_gradient(m0, min_of(f.dx_tokens, m - m0), 0, blocks(f.I));
        }
      }
    }
    // dx = dG W_ih for n tokens of the chunk and blocks [i0, i1) of columns.
    void input_gradient(int64_t m0, int64_t n, int64_t i0, int64_t i1) const {
      const O* dG = f.dG[d] + m0 * f.ldG;
      const int64_t token = seq.token(lo) + m0;
      if (d == 1)
        input_block(i0, i1, n, dG, f.dx_reverse + token * f.I);
      else
        input_block(i0, i1, n, dG, static_cast<S*>(p.dx) + token * f.I);
    }
    template <class Out>
    void input_block(int64_t i0, int64_t i1, int64_t n, const O* dG, Out* dx) const {
      if constexpr (sizeof(Out) == sizeof(T)) {
        if (f.I % kLanes<T> == 0 && !f.weights.once)
          return f.weights.input_product(d, i0, i1, n, dG, f.ldG, dx, f.I, local_operand);
      }
      for (int64_t j = i0; j < i1; j++) {
        T* block = local - j * NR<T>;  // column 0 of a matrix of which only this block exists
        f.weights.input_product(d, j, j + 1, n, dG, f.ldG, block, NR<T>, local_operand);
        copy_block(local, NR<T>, dx + j * NR<T>, f.I, n, width(f.I, j));
      }
    }
    template <class From, class To>
    static void copy_block(const From* from, int64_t ld_from, To* to, int64_t ld_to, int64_t rows,
                           int64_t columns) {
      for (int64_t b = 0; b < rows; b++) copy_row(from + b * ld_from, columns, to + b * ld_to, columns);
    }

    // dW += dG^T [x | h_{t-1}] and db += dG summed over tokens, for rows [u, u + n) of gate g.
    void weight_gradients(int64_t g, int64_t u, int64_t n) const {
      const int in = Cell::kInputSlot[g], rec = Cell::kRecurrentSlot[g];
      const int64_t row = g * f.H + u;
      const Weights<void*>& out = p.dw[d];
      transpose_gate(in, u, n);
      outer(row, n, f.x_panels[d], f.I, f.dw_ih[d], static_cast<S*>(out.w_ih));
      if (rec != in) transpose_gate(rec, u, n);
      outer(row, n, f.h_panels[d], f.P, f.dw_hh[d], static_cast<S*>(out.w_hh));
    }
    // Columns of dG become rows of tokens, as tiles want A; their sums are the bias gradient.
    void transpose_gate(int slot, int64_t u, int64_t n) const {
      const int64_t column = slot * f.H + u, m = chunk_size();
      const O* dG = f.dG[d] + column;
      pack_transposed(dG, f.ldG, m, n, local_operand, depth_of(m), round_up(m, 32));
      T* to = f.db[d] + column;
      // Sums of 16 tokens, then of these: short chains lose fewer bits.
      for (int64_t i = 0; i < n; i += kLanes<T>) {
        Vec<T> chunk{};
        for (int64_t row = 0; row < m; row += 16) {
          Vec<T> sum{};
          for (int64_t r = row; r < row + 16 && r < m; r++) sum += load(dG + r * f.ldG + i, n - i);
          chunk += sum;
        }
        store(to + i, first_chunk ? chunk : load(to + i, n - i) + chunk, n - i);
      }
    }
    // Gate rows [first, first + n) of dW, in the sums; or some at a time converted to where the caller wants
    // them.
    void outer(int64_t first, int64_t n, const O* panels, int64_t columns, T* sums, S* dw) const {
      const Panels<O> shape{columns, chunk_size()};
      const bool convert = f.one_chunk() && !f.in_place(columns);
      const int64_t ld = convert ? NR<T> : f.padded(columns), depth = depth_of(shape.K),
                    at_once = convert ? kGradientRows : n;
      for (int64_t i = 0; i < n; i += at_once) {
        const int64_t rows = min_of(at_once, n - i);
        for (int64_t j = 0; j < shape.count(); j++) {
          T* to = convert ? local : sums + (first + i) * ld + j * NR<T>;
          gemm_panel(rows, shape.width(j), shape.depth(), local_operand + i * depth, depth,
                     panels + shape.offset(j), shape.width(j), first_chunk ? nullptr : to, ld, to, ld);
          if (convert)
            copy_block(to, ld, dw + (first + i) * columns + j * NR<T>, columns, rows, width(columns, j));
        }
      }
    }
    // dW_hr += dh^T m for this thread's rows.
    void projection_gradient() const {
      const int64_t m = chunk_size(), ld = f.padded(f.H);
      const Panels<O> shape{f.H, m};
      O* panel = local_operand + (q1 - q0) * depth_of(m);
      pack_transposed(f.dh_chunk[d] + q0, f.ldh, m, q1 - q0, local_operand, depth_of(m), round_up(m, 32));
      for (int64_t j = 0; j < shape.count(); j++) {
        pack_rows(f.m_chunk[d] + j * NR<T>, f.ldcell, f.H - j * NR<T>, panel, 0, m, shape.width(j));
        pack_padding(panel, m, shape.width(j));
        T* to = f.dw_hr[d] + q0 * ld + j * NR<T>;
        gemm_panel(q1 - q0, shape.width(j), shape.depth(), local_operand, depth_of(m), panel, shape.width(j),
                   first_chunk ? nullptr : to, ld, to, ld);
      }
    }

    // Sums into the caller's tensors, each by the thread that owns it.
    void finish() const {
      const int64_t h_at = d * f.B * f.P, c_at = d * f.B * f.H;
      if (!f.dh_in_place)
        each_state([&](int64_t b, int64_t i, int64_t n) {
          Vec<T> g = load(dh + b * f.ldh + i);
          if (p.resets) g += load(dh0 + b * f.ldh + i);
          store(static_cast<S*>(p.dh0) + h_at + b * f.P + i, g, n);
        });
      if constexpr (Cell::kCellState) {
        each_cell([&](int64_t b, int64_t i, int64_t n) {
          Vec<T> g = load(dc + b * f.ldcell + i);
          if (p.resets) g += load(dc0 + b * f.ldcell + i);
          store(static_cast<S*>(p.dc0) + c_at + b * f.H + i, g, n);
        });
      }
      const Weights<void*>& out = p.dw[d];
      if (!f.one_chunk())
        for (int64_t n = n0; n < n1; n++) {
          if (!f.in_place(f.I))
            write_row(f.dw_ih[d] + n * f.padded(f.I), static_cast<S*>(out.w_ih) + n * f.I, f.I);
          if (!f.in_place(f.P))
            write_row(f.dw_hh[d] + n * f.padded(f.P), static_cast<S*>(out.w_hh) + n * f.P, f.P);
        }
      for (int64_t n = n0, end; out.b_ih && n < n1; n = end) {
        const int64_t g = n / f.H, u = n % f.H;
        end = min_of((g + 1) * f.H, n1);
        write_row(f.db[d] + Cell::kInputSlot[g] * f.H + u, static_cast<S*>(out.b_ih) + n, end - n);
        write_row(f.db[d] + Cell::kRecurrentSlot[g] * f.H + u, static_cast<S*>(out.b_hh) + n, end - n);
      }
      if (f.projected && !f.in_place(f.H))
        for (int64_t q = q0; q < q1; q++)
          write_row(f.dw_hr[d] + q * f.padded(f.H), static_cast<S*>(out.w_hr) + q * f.H, f.H);
    }
    static void write_row(const T* from, S* to, int64_t n) { copy_row(from, n, to, n); }
  };
};

template <class Cell, class S>
static void layer_bwd(const typename Cell::BwdParams& p) {
  run_kernel(p.parallel, LayerBwd<Cell, S>(p));
}
