// One step of a few rows: a cell, or a layer that streams. Memory is the limit: weights are read as torch
// keeps them, by up to four rows at once (direct.inl.h), and threads take blocks of NR units in turn, so that
// nobody waits for a thread that wakes up late (50 us and more, as long as 2 MB of weights take).
#pragma once

#include "layer_fwd.inl.h"

template <class Cell, class S>
struct StepFwd {
  using T = Acc<S>;
  using O = Operand<S>;
  using Params = typename Cell::FwdParams;
  static constexpr int G = Cell::kGates, W = kLanes<T>;
  static constexpr int64_t kRows = 12;

  static constexpr int kShares = 64;  // threads at most

  const Params& p;
  const int64_t blocks;  // of one direction
  int shares = 1;
  Queue share[kShares];

  explicit StepFwd(const Params& params) : p(params), blocks(divide_up(p.H, NR<T>)) {}

  static bool fits(const Params& p) {
    return p.T == 1 && p.B <= kRows && !p.panels && !p.batch_sizes && p.w[0].w_hr == nullptr;
  }

  // Each thread begins with a share that is the same in every call, because some of it may still be in its
  // L2.
  void run() {
    shares = int(min_of(kShares, team_size(Sequence(p), G)));
    for (int i = 0; i < shares; i++) share[i].next = first_block(i);
    run_ranges(p.parallel, shares, [&](int64_t begin, int64_t) { take_blocks(int(begin)); });
  }
  int64_t first_block(int i) const { return p.D * blocks * i / shares; }
  void take_blocks(int own) {
    for (int n = 0, i = own; n < shares; n++, i = (i + 1) % shares)
      for (int64_t at; (at = share[i].take()) < first_block(i + 1);) block(int(at / blocks), at % blocks);
  }

  void block(int d, int64_t j) const {
    alignas(64) T C[kRows * G * NR<T>], Q[kRows * NR<T>], c[kRows * NR<T>];
    alignas(64) O h_prev[kRows * NR<T>], h[kRows * NR<T>];
    const int64_t u = j * NR<T>, units = min_of(NR<T>, p.H - u);
    const S* h0 = static_cast<const S*>(p.h0) + d * p.B * p.H;
    direct_gates<Cell>(p, d, u, units, p.B, static_cast<const S*>(p.x), h0, p.H, C, G * NR<T>, NR<T>, Q);
    for (int64_t b = 0; b < p.B; b++) {
      copy_row(h0 + b * p.H + u, units, h_prev + b * NR<T>, NR<T>);
      if constexpr (Cell::kCellState)
        copy_row(static_cast<const S*>(p.c0) + (d * p.B + b) * p.H + u, units, c + b * NR<T>, NR<T>);
    }
    FwdTile<S> tile{};
    tile.rows = p.B, tile.units = units, tile.H = p.H;
    tile.C = C, tile.ldc = G * NR<T>, tile.gate = NR<T>;
    tile.q = Q, tile.ldq = NR<T>;
    tile.h_prev = h_prev, tile.h = h, tile.ldh_prev = tile.ldh = NR<T>;
    tile.y = static_cast<S*>(p.y) + d * p.H + u, tile.ldy = p.D * p.H;
    if (p.gates)
      tile.gates = static_cast<S*>(p.gates) + d * Cell::kSaved * p.H + u,
      tile.ldgates = p.D * Cell::kSaved * p.H;
    if constexpr (Cell::kCellState) {
      tile.c = c, tile.ldcell = NR<T>;
      if (p.cells) tile.cells = static_cast<T*>(p.cells) + d * p.H + u, tile.ldcells = p.D * p.H;
    }
    if constexpr (Cell::kReluOption) tile.relu = p.relu;
    Cell::template fwd<S>(tile);
    for (int64_t b = 0; b < p.B; b++) {
      const int64_t to = (d * p.B + b) * p.H + u;
      for (int64_t i = 0; i < units; i += W) {
        const O* new_h = h + b * NR<T> + i;
        if (p.hn) store(static_cast<S*>(p.hn) + to + i, load(new_h), units - i);
        if constexpr (Cell::kCellState)
          store(static_cast<S*>(p.cn) + to + i, load(c + b * NR<T> + i), units - i);
      }
    }
  }
};
