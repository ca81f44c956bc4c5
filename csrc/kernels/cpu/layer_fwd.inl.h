// Forward of one layer, for every cell.
//
// A thread owns rows [r0, r1) (many of them in parts, one after the other) and units [u0, u1) of one
// direction for all time steps. It projects a chunk of steps at once into its own C (1 MiB, to stay in L2;
// more where input weights come from beyond it), then walks the chunk: for each block of NR units, the
// recurrent product is added to C gate by gate, and the cell's epilogue turns C into h while the block is in
// L1. The state h lives in two buffers that take turns, so one barrier a step (among the threads that share
// rows) is enough; threads that own whole rows never wait. Weight traffic per step is the panels of the own
// units; see step_cycles for what that costs.
#pragma once

#include "direct.inl.h"
#include "sequence.inl.h"
#include "team.inl.h"
#include "weights.inl.h"

// What a cell's epilogue works on: a block of `units` columns for `rows` rows that are consecutive tokens of
// one step.
template <class S>
struct FwdTile {
  using T = Acc<S>;
  using O = Operand<S>;
  int64_t rows, units, H;
  T* C;  // pre-activations, gate g at column g * gate; may be overwritten
  int64_t ldc, gate;
  const T* q;  // GRU: W_hn h + b_hn
  int64_t ldq;
  const O* h_prev;
  O* h;  // [rows, ldh]
  int64_t ldh_prev, ldh;
  T* c;  // LSTM: cell state, in place
  int64_t ldcell;
  S* y;  // or null
  int64_t ldy;
  S* gates;  // or null; gate g at column g * H
  int64_t ldgates;
  T* cells;  // or null
  int64_t ldcells;
  bool relu;
  bool past_cache;  // gates are many and aligned: stream them

  // Saved activation of gate g at unit u of row b.
  void save(int64_t b, int g, int64_t u, Vec<T> v) const {
    S* to = gates + b * ldgates + g * H + u;
    if (past_cache)
      stream(to, v);
    else
      store(to, v, units - u);
  }
};

template <class Cell, class S>
struct LayerFwd {
  using T = Acc<S>;
  using O = Operand<S>;
  using Params = typename Cell::FwdParams;
  static constexpr int G = Cell::kGates;
  static constexpr int64_t kChunkTokens = 128, kChunkBytes = 1 << 20, kDirectTokens = 16, kDirectSteps = 4;
  static constexpr int64_t kMostChunks = 8;
  // Rows that go through all steps before the next ones begin: what they need stays in L2. One step of 65,536
  // rows, H = 64: 43 -> 91 GF/s, four of 16,384: 87 -> 102, 4,096 and less: the same.
  static constexpr int64_t kPartRows = 256;

  const Params& p;
  Sequence seq;
  const int64_t I, H, P, B;
  const bool direct;  // few steps of few rows: weights are read in place
  const bool once;  // one step: each block is used once, so it is packed when its turn comes and stays in L2
  ForwardWeights<Cell, S> weights;
  const bool past_cache;  // saved gates: 20 % of a training step's forward went to fetching their lines
  const int team;         // threads at most
  const int64_t part_rows, home_rows;  // rows of a part, at most; rows that have a place in state, m and cell
  int64_t chunk_tokens;                // of a projection, at most

  // Shared, one of each per direction.
  O *state[2], *m[2];
  T* cell[2];
  Barrier *everyone, *row_barriers;
  Queue* once_blocks;
  PerThread<T> C, Q;
  PerThread<O> X, block;
  Shares::Busy* busy;  // [directions at once, row groups, unit groups]
  PerThread<int64_t> shares;
  int64_t c_size, state_size;  // state_size: of one of the two buffers
  const int64_t ldx, ldh, ldm, ldcell;

  explicit LayerFwd(const Params& params)
      : p(params),
        seq(params),
        I(p.I),
        H(p.H),
        P(p.P),
        B(p.B),
        direct(p.T <= kDirectSteps && seq.tokens <= kDirectTokens && !p.panels && p.w[0].w_hr == nullptr),
        once(p.T == 1 && B <= kPartRows && !direct && !p.panels && p.w[0].w_hr == nullptr),
        weights(params, direct || once),
        past_cache(params.gates && reinterpret_cast<uintptr_t>(params.gates) % 64 == 0 &&
                   p.H * int64_t(sizeof(S)) % 64 == 0 && seq.tokens * p.D * Cell::kSaved * p.H >= (1 << 18)),
        team(forward_team_size<O>(seq, G, once)),
        part_rows(min_of(B, kPartRows)),
        home_rows(min_of(B, team * part_rows)),
        chunk_tokens(0),
        ldx(row_stride<O>(I)),
        ldh(row_stride<O>(P)),
        ldm(row_stride<O>(H)),
        ldcell(round_up(H, kLanes<T>)) {}

  // Tiles read x itself, if it is what they multiply and needs no padding, and if its rows do not all fall
  // into one set of the L1 cache (12 rows 4 KiB apart evict each other: 10 % at I = 1024).
  bool x_in_place() const {
    const int64_t stride = (B > 1 ? p.x_b : p.x_t) * int64_t(sizeof(S));
    return sizeof(S) == sizeof(O) && I == weights.in.depth() && stride % 4096 != 0;
  }

  void layout(Arena& a) {
    seq.layout(a);
    weights.layout(a);
    state_size = home_rows * ldh + apart<O>(team);
    for (int d = 0; d < p.D; d++) {
      state[d] = a.take<O>(2 * state_size);
      m[d] = weights.projected ? a.take<O>(home_rows * ldm) : nullptr;
      cell[d] = a.take<T>(Cell::kCellState ? home_rows * ldcell + apart<T>(team) : 0);
    }
    everyone = a.take_zeros<Barrier>(1);
    row_barriers = a.take_zeros<Barrier>(2 * team);
    busy = a.take<Shares::Busy>(2 * team);
    shares = a.take_each<int64_t>(team, 2 * team + 1);
    once_blocks = a.take_zeros<Queue>(p.D);
    // Each chunk reads all input weights once. Where a thread's share of them comes from L3 or memory, C is
    // half as large: H = 1024 +4 to 6 %.
    const int64_t half = G * weights.in.size() * int64_t(sizeof(O)) / (2 * team) / kChunkBytes,
                  chunks = max_of(1, min_of(half, kMostChunks));
    chunk_tokens = chunks * kChunkTokens;
    const int64_t all = p.T == 1 ? 0 : seq.tokens * (G * weights.in.padded() + kLanes<T>);
    c_size = max_of(min_of(chunks * kChunkBytes / int64_t(sizeof(T)), all),
                    part_rows * (G * NR<T>));  // a block of units of one step
    const int64_t x_size = x_in_place() || direct ? 0 : max_of(part_rows, chunk_tokens) * ldx;
    C = a.take_each<T>(team, c_size);
    Q = a.take_each<T>(team, part_rows * NR<T>);
    X = a.take_each<O>(team, x_size);
    const int64_t block_size = once ? G * (weights.in.depth() + weights.rec.depth()) * NR<T> : 0;
    block = a.take_each<O>(team, block_size);
  }

  void prepare() { seq.prepare(); }
  int wanted() const { return team; }

  void thread(int id, int size) {
    const Plan plan = make_plan<O>(seq, size, G, once, kBalanced);
    const int group = size / plan.concurrent, first = id / group, rank = id % group;
    for (int d = first; !direct && d < p.D; d += plan.concurrent) weights.pack(d, rank, group);
    everyone->wait(size);
    if (rank >= plan.per_direction() || first >= plan.concurrent) return;
    const int row_group = rank / plan.unit_groups, rows_of = first * plan.row_groups + row_group;
    const RowRange own = row_group_of(seq, plan.row_groups, row_group);
    const int64_t rows = own.end - own.begin, parts = max_of(1, divide_up(rows, kPartRows));
    for (int d = first; d < p.D; d += plan.concurrent)
      for (int64_t i = 0; i < parts; i++) {
        const RowRange part{own.begin + rows * i / parts, own.begin + rows * (i + 1) / parts};
        Worker(*this, plan, d, id, rank, rows_of, part).run();
        row_barriers[rows_of].wait(plan.unit_groups);  // what follows takes the same memory
      }
    release_tiles();
  }

  // One thread's share of one direction, for one part of its rows.
  struct Worker {
    const LayerFwd& f;
    const Params& p;
    const Sequence& seq;
    const ForwardWeights<Cell, S>& weights;
    const int d;
    const int64_t r0, r1, R;  // rows
    const int64_t k0, k1;     // projection blocks
    Barrier* barrier;         // of the threads that share these rows
    Shares shares;            // of the unit blocks, among them
    int64_t j0, j1;           // own unit blocks
    int64_t u0, width;        // first unit, units (padded)
    T *C, *Q, *cell;
    O *X, *packed_block, *states, *m;  // states, m and cell: row r0
    int64_t steps;                     // in a chunk
    bool by_block;                     // a chunk is one step: project block by block, C holds one block
    int64_t ldc, gate;

    Worker(const LayerFwd& layer, const Plan& plan, int direction, int id, int rank, int rows_of,
           const RowRange& part)
        : f(layer),
          p(layer.p),
          seq(layer.seq),
          weights(layer.weights),
          d(direction),
          r0(part.begin),
          r1(part.end),
          R(r1 - r0),
          k0(weights.proj.count() * (rank % plan.unit_groups) / plan.unit_groups),
          k1(weights.proj.count() * (rank % plan.unit_groups + 1) / plan.unit_groups),
          barrier(layer.row_barriers + rows_of),
          shares{layer.busy + rows_of * plan.unit_groups, layer.shares[id],
                 layer.shares[id] + plan.unit_groups + 1, plan.unit_groups, rank % plan.unit_groups},
          C(layer.C[id]),
          Q(layer.Q[id]),
          X(layer.X[id]),
          packed_block(layer.block[id]) {
      const int row_group = rank / plan.unit_groups;
      const int64_t home = f.home_rows == f.B ? r0 : row_group * f.part_rows;
      states = f.state[d] + apart<O>(row_group) + home * f.ldh;
      m = weights.projected ? f.m[d] + home * f.ldm : nullptr;
      cell = f.cell[d] + apart<T>(row_group) + home * f.ldcell;
      const int64_t widest = Shares::most_blocks(weights.in.count(), shares.size) * NR<T>,
                    fits = f.c_size / (G * widest + kLanes<T>), tokens = min_of(fits, f.chunk_tokens);
      steps = R > 0 && tokens > R && p.T > 1 && !f.direct ? tokens / R : 1;
      by_block = steps == 1;
      shares.begin(weights.in.count());
      take_units();
    }
    void take_units() {
      j0 = shares.first[shares.rank], j1 = shares.first[shares.rank + 1];
      u0 = j0 * NR<T>, width = min_of(j1 * NR<T>, weights.in.padded()) - u0;
      gate = by_block ? NR<T> : width;
      ldc = G * gate + (by_block ? 0 : kLanes<T>);
    }

    O* state(int64_t step) const { return states + (step & 1) * f.state_size; }
    const O* input_panel(int g, int64_t j) const {
      return f.once ? packed_block + g * weights.in.depth() * NR<T> : weights.input(d, g, j);
    }
    const O* recurrent_panel(int g, int64_t j) const {
      return f.once ? packed_block + (G * weights.in.depth() + g * weights.rec.depth()) * NR<T>
                    : weights.recurrent(d, g, j);
    }
    // What step s reads after this panel; at its end, what the next step reads first.
    const O* next_panel(int64_t s, int g, int64_t j) const {
      const int64_t first = j0 * G, last = j1 * G - 1, n = j * G + g + (s % 2 ? -1 : 1);
      const int64_t at = max_of(first, min_of(n, last));
      return recurrent_panel(int(at % G), at / G);
    }
    int64_t time(int64_t step) const { return d ? p.T - 1 - step : step; }
    S* y(int64_t t, int64_t j) const {
      return static_cast<S*>(p.y) + ((seq.token(t) + r0) * p.D + d) * f.P + j * NR<T>;
    }

    void run() {
      init_state();
      barrier->wait(shares.size);
      shares.begin_round();
      for (int64_t begin = 0; begin < p.T; begin += steps) {
        const int64_t end = min_of(begin + steps, p.T);
        const int64_t lo = d ? time(end - 1) : begin,
                      hi = d ? time(begin) + 1 : end;  // chunk in memory order
        load_inputs(lo, hi);
        if (!by_block) project(lo, hi, j0, j1);
        int64_t row = 0;  // of C: the step's first; the chunk's steps lie in memory order
        if (d)
          for (int64_t t = lo; t < hi; t++) row += seq.rows(t, r0, r1);
        for (int64_t s = begin; s < end; s++) {
          const int64_t n = seq.rows(time(s), r0, r1);
          if (d) row -= n;
          step(s, n, by_block ? C : C + row * ldc);
          if (s + 1 == end) shares.report();
          shares.wait(barrier);
          if (!d) row += n;
        }
        if (shares.size > 1 && end < p.T) shares.share_anew(), take_units();
      }
      final_state();
      if (f.past_cache) fence();
    }

    void init_state() {
      const S* h0 = static_cast<const S*>(p.h0) + d * f.B * f.P;
      for (int64_t b = r0; b < r1; b++) {
        for (int half = 0; half < 2; half++) {
          set_h(b, state(half), h0);
          for (int64_t i = f.P; j0 == 0 && i < f.ldh; i++) state(half)[(b - r0) * f.ldh + i] = O{};
        }
        for (int64_t i = f.H; weights.projected && j0 == 0 && i < f.ldm; i++) m[(b - r0) * f.ldm + i] = O{};
      }
      if constexpr (Cell::kCellState)
        for (int64_t b = r0; b < r1; b++) set_c(b);
    }
    // Own columns of h and c back to their initial values.
    int64_t h_begin() const { return weights.projected ? k0 * NR<T> : u0; }
    int64_t h_end() const { return min_of(f.P, weights.projected ? k1 * NR<T> : u0 + width); }
    void set_h(int64_t b, O* to, const S* h0) const {
      const int64_t j = h_begin(), n = h_end() - j;
      copy_row(h0 + b * f.P + j, n, to + (b - r0) * f.ldh + j, n);
    }
    void set_c(int64_t b) const {
      const S* c0 = static_cast<const S*>(p.c0) + (d * f.B + b) * f.H;
      for (int64_t u = u0; u < u0 + width; u += kLanes<T>)
        store(cell + (b - r0) * f.ldcell + u, load(c0 + u, f.H - u));
    }

    // Own rows of x for the steps [lo, hi), converted and padded.
    void load_inputs(int64_t lo, int64_t hi) {
      if (f.x_in_place() || f.direct) return;
      O* to = X;
      for (int64_t t = lo; t < hi; t++)
        for (int64_t b = r0; b < r0 + seq.rows(t, r0, r1); b++, to += f.ldx)
          copy_row(seq.template x<S>(t, b), f.I, to, f.ldx);
    }

    // C = x W_ih^T + bias for the steps [lo, hi) and unit blocks [ja, jb): each panel meets all tokens in
    // turn.
    void project(int64_t lo, int64_t hi, int64_t ja, int64_t jb) {
      for (int64_t j = ja; j < jb; j++)
        for (int g = 0; g < G; g++) {
          const O* panel = input_panel(g, j);
          const T* bias = weights.bias[d] + g * weights.in.padded() + j * NR<T>;
          T* to = C + g * gate + (by_block ? 0 : (j - j0) * NR<T>);
          each_run(lo, hi, [&](int64_t n, const O* x, int64_t ldx, int64_t row, int64_t step) {
            gemm_panel(n, weights.in.width(j), weights.in.depth(), x, ldx, panel, weights.in.width(j), bias,
                       0, to + row * ldc, step * ldc);
          });
        }
    }
    // The tokens of own rows in runs of one stride: fn(tokens, x, stride of x, row of C, stride of these
    // rows).
    template <class Fn>
    void each_run(int64_t lo, int64_t hi, const Fn& fn) const {
      int64_t tokens = 0;
      for (int64_t t = lo; t < hi; t++) tokens += seq.rows(t, r0, r1);
      if (tokens == 0) return;
      if (!f.x_in_place()) {
        fn(tokens, X, f.ldx, 0, 1);
      } else if (seq.x_contiguous() && R == f.B) {
        fn(tokens, seq.template x<O>(lo, 0), p.x_b, 0, 1);
      } else if (p.batch_sizes || R >= 8 || hi - lo == 1) {  // the rows of each step
        for (int64_t t = lo, row = 0; t < hi; t++) {
          const int64_t n = seq.rows(t, r0, r1);
          if (n > 0) fn(n, seq.template x<O>(t, r0), p.x_b, row, 1);
          row += n;
        }
      } else {  // few rows: the steps of each row
        for (int64_t b = r0; b < r1; b++) fn(hi - lo, seq.template x<O>(lo, b), p.x_t, b - r0, R);
      }
    }

    // Weights that do not fit the cache are walked to and fro: what the last step read last, this one reads
    // first. Where there is only one step, threads take blocks in turn: a core may be slower than another.
    void step(int64_t s, int64_t n, T* c_rows) {
      const int64_t t = time(s);
      if (f.once)
        for (int64_t j; n > 0 && (j = f.once_blocks[d].take()) < weights.in.count();)
          unit_block(s, t, n, j, c_rows);
      else
        for (int64_t i = j0; n > 0 && i < j1; i++) unit_block(s, t, n, s % 2 ? j0 + j1 - 1 - i : i, c_rows);
      if (weights.projected) {
        shares.wait(barrier);
        if (n > 0) project_state(s, t, n);
      }
      if (p.resets && s + 1 < p.T) reset(s + 1);
    }

    // Pre-activations and epilogue of one block of units.
    void unit_block(int64_t s, int64_t t, int64_t n, int64_t j, T* c_rows) {
      if (f.direct) {
        const int64_t u = j * NR<T>;
        direct_gates<Cell>(p, d, u, min_of(NR<T>, f.H - u), n, seq.template x<S>(t, r0), state(s), f.ldh, C,
                           ldc, gate, Q);
        return epilogue(s, t, n, j, C);
      }
      for (int g = 0; f.once && g < G; g++)
        weights.pack_block(d, g, j, packed_block + g * weights.in.depth() * NR<T>,
                           packed_block + (G * weights.in.depth() + g * weights.rec.depth()) * NR<T>);
      if (by_block) project(t, t + 1, j, j + 1);
      T* block = c_rows + (by_block ? 0 : (j - j0) * NR<T>);
      if (!weights.projected)  // y comes while the products run: RNN +2 %
        for (int64_t b = 0; b < n; b++)
          for (int64_t v = 0; v < NR<T>; v += kLanes<T>) __builtin_prefetch(y(t, j) + b * p.D * f.P + v, 1);
      const O* h = state(s);
      const int64_t w = weights.rec.width(j);
      for (int k = 0; k < G; k++) {
        const int g = s % 2 ? G - 1 - k : k;
        const O *panel = recurrent_panel(g, j), *next = next_panel(s, g, j);
        if (g == Cell::kSplitGate)
          gemm_panel(n, w, weights.rec.depth(), h, f.ldh, panel, w, weights.q_bias[d] + j * NR<T>, 0, Q,
                     NR<T>, next);
        else
          gemm_panel(n, w, weights.rec.depth(), h, f.ldh, panel, w, block + g * gate, ldc, block + g * gate,
                     ldc, next);
      }
      epilogue(s, t, n, j, block);
    }

    void epilogue(int64_t s, int64_t t, int64_t n, int64_t j, T* block) {
      const int64_t u = j * NR<T>, token = seq.token(t) + r0, D = p.D;
      FwdTile<S> tile{};
      tile.rows = n, tile.units = min_of(NR<T>, f.H - u), tile.H = f.H;
      tile.C = block, tile.ldc = ldc, tile.gate = gate;
      tile.q = Q, tile.ldq = NR<T>;
      tile.h_prev = state(s) + u, tile.ldh_prev = f.ldh;
      if (weights.projected) {
        tile.h = m + u, tile.ldh = f.ldm;
      } else {
        tile.h = state(s + 1) + u, tile.ldh = f.ldh;
        tile.y = y(t, j), tile.ldy = D * f.P;
      }
      if (p.gates)
        tile.gates = static_cast<S*>(p.gates) + (token * D + d) * Cell::kSaved * f.H + u,
        tile.ldgates = D * Cell::kSaved * f.H;
      if constexpr (Cell::kCellState) {
        tile.c = cell + u, tile.ldcell = f.ldcell;
        if (p.cells)
          tile.cells = static_cast<T*>(p.cells) + (token * D + d) * f.H + u, tile.ldcells = D * f.H;
      }
      if constexpr (Cell::kReluOption) tile.relu = p.relu;
      tile.past_cache = f.past_cache;
      Cell::template fwd<S>(tile);
    }

    // h = m W_hr^T, own columns.
    void project_state(int64_t s, int64_t t, int64_t n) {
      for (int64_t k = k0; k < k1; k++) {
        const int64_t u = k * NR<T>, w = weights.proj.width(k), valid = min_of(NR<T>, f.P - u);
        gemm_panel(n, w, weights.proj.depth(), m, f.ldm, weights.projection(d, k), w,
                   static_cast<const T*>(nullptr), 0, Q, NR<T>);
        for (int64_t b = 0; b < n; b++)
          for (int64_t i = 0; i < valid; i += kLanes<T>) {
            const Vec<T> h = load(Q + b * NR<T> + i);
            store(state(s + 1) + b * f.ldh + u + i, h, valid - i);
            store(static_cast<S*>(p.y) + ((seq.token(t) + r0 + b) * p.D + d) * f.P + u + i, h, valid - i);
          }
      }
    }

    void reset(int64_t s) {
      const S* h0 = static_cast<const S*>(p.h0) + d * f.B * f.P;
      for (int64_t b = r0; b < r1; b++) {
        if (!p.resets[time(s) * f.B + b]) continue;
        set_h(b, state(s), h0);
        if constexpr (Cell::kCellState) set_c(b);
      }
    }

    // A row's last state is in the buffer of its last step: forwards its length tells which, backwards all
    // end together.
    void final_state() {
      int64_t length = p.T;
      for (int64_t b = r0; b < r1; b++) {
        while (length > 0 && seq.rows(length - 1) <= b) length--;
        const O* h = state(d || length == 0 ? p.T : length) + (b - r0) * f.ldh;
        S* hn = static_cast<S*>(p.hn) + (d * f.B + b) * f.P;
        for (int64_t j = h_begin(); p.hn && j < h_end(); j += kLanes<T>)
          store(hn + j, load(h + j), h_end() - j);
        if constexpr (Cell::kCellState) {
          S* cn = static_cast<S*>(p.cn) + (d * f.B + b) * f.H;
          for (int64_t j = u0; j < u0 + width; j += kLanes<T>)
            store(cn + j, load(cell + (b - r0) * f.ldcell + j), f.H - j);
        }
      }
    }
  };
};

template <class Cell, class S>
static void layer_fwd(const typename Cell::FwdParams& p) {
  run_kernel(p.parallel, LayerFwd<Cell, S>(p));
}
