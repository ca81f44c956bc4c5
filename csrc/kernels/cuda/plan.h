// How a layer's recurrence is spread over a GPU, or that it does not fit. A *group* of blocks serves some
// rows of one direction; its *members* share the hidden units and exchange their states every step.
#pragma once

#include <algorithm>
#include <cstdint>

namespace seqkernels::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSingleThreads = 512, kSingleWarps = kSingleThreads / 32;  // single.cuh
constexpr int kSingleRows = 8;
constexpr int kSingleParts = 2;  // of K, backward
constexpr int kMostRows = 4;     // of a thread
constexpr int kHoldingRows = 2;  // of a thread, at most, where its warp holds weights in registers

constexpr int kFfmaChunks = 8;                    // of K, 8 elements each, that a warp receives at once
constexpr int kLeastSlots = 16, kMostSlots = 64;  // of a group, written in turn, each a step's exchanged rows
constexpr int64_t kSlotsBytes = 4 << 20;  // of all groups: beyond it they get fewer, down to the least
constexpr uint32_t kEmpty = ~0u;          // last word of a packet that nobody has published yet

struct Plan {
  int members = 0;  // 0: does not fit, go stepwise
  int groups = 0;   // per direction
  int units = 0, rows = 0;
  int single = 0;    // units of a thread, 1 or 2, where single.cuh does it
  int tiles = 1;     // of 16 rows of weights, that a warp takes at once
  int parts = 1;     // of K, among the warps of a block
  int segments = 1;  // of an exchanged row: forward 1, backward one for each gate
  int pitch = 0;     // elements of an exchanged row
  int slots = 2;
  int grid = 0;        // blocks, all resident at the same time unless each is a group
  int64_t shared = 0;  // bytes per block
  int64_t exchange_bytes = 0;
  double clocks = 0;  // of a step, estimated

  // A warp multiplies 8 rows at once with what it holds, else 16 with what it reads.
  constexpr int passes() const {
    return units * rows <= kHoldingRows * kThreads ? rows / 8 : (rows + 8) / 16;
  }
};

struct Machine {
  int multiprocessors = 0;
  int64_t shared = 0;  // bytes a block may have
};

// A block multiplies its slice [units * gates, K] of weights with the rows' K exchanged elements.
struct Work {
  int64_t B, H, K;  // K: H forward, G * H backward
  int D;
  int gates;            // rows of weights per unit: G forward, 1 backward
  int tiles;            // of 16 rows of weights, that a warp takes at once: a stack
  int element, states;  // bytes of an element; floats per unit and row
  bool ffma = false;    // instead of the matrix instruction
};

constexpr int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
// Units of a stack: of several gates 16, each gate in a tile of its own, or 8, all gates in two.
constexpr int stack_units(int gates, int tiles) { return gates == 1 ? 16 * tiles : tiles == gates ? 16 : 8; }
// Floats from a row's partial sums to the next one's: stores have no bank conflicts.
constexpr int sums_stride(int gates, int tiles) {
  return stack_units(gates, tiles) * (gates > 1 ? 4 : 1) + 4;
}
// 32-bit words of weights that a thread holds: what the rest of the kernel leaves of its 255 registers.
constexpr int held_words(int tiles) { return tiles == 1 ? 56 : tiles == 4 ? 64 : 48; }

// Shared memory of a block, in this order; each part is a multiple of 16 bytes. Exchange: both slots of a
// single block. Outgoing: what a block gives to others in a step. Passed: packets that lanes share, for FFMA.
struct Layout {
  int64_t partial, state, exchange, outgoing, passed, end;

  constexpr Layout(const Plan& p, int gates, int element, int states, bool ffma)
      : partial(int64_t(p.units / stack_units(gates, p.tiles)) * p.tiles * 16 * p.pitch * element),
        state(partial + int64_t(p.units / stack_units(gates, p.tiles)) * (p.rows / 8) * p.parts * 8 *
                            sums_stride(gates, p.tiles) * 4),
        exchange(state + int64_t(states) * p.rows * p.units * 4),
        outgoing(exchange + (p.members == 1 ? 2 * int64_t(p.rows) * p.pitch * element : 0)),
        passed(outgoing + (p.members > 1 ? int64_t(p.rows) * element * p.segments * p.units : 0)),
        end(passed + (ffma ? kWarps * kFfmaChunks * 256 : 0)) {}
};

// The cheapest of all spreads that fit, by clocks of a step. They put 1,100 spreads of 46 layers, timed on an
// H100, in such an order that what is picked was the fastest of all, and 769 of 30 layers after the kernels
// had changed so that it was 0.5 % slower (docs/cuda.md):
//   hop 300 beside the 600 of all
//   received rows 10 bytes a clock; the warps of every stack receive them
//   gates 600 for every 256 units x rows, and 20 for each part of K that they sum
//   FFMA 22 bytes of weights a clock, once for every 8 rows or 16
// Warps take groups of 8 rows as well as stacks, or all rows and parts of K: fewer weights for each to hold.
inline Plan make_plan(const Machine& machine, const Work& w) {
  Plan best;
  const int unit = stack_units(w.gates, w.tiles);
  for (int64_t units = unit; units < 2 * up(w.H, unit) && units <= kThreads; units *= 2)
    for (int rows = 8; rows <= 64 && rows < 2 * up(w.B, 8); rows *= 2) {
      const int64_t members = (w.H + units - 1) / units, groups = (w.B + rows - 1) / rows;
      const int64_t grid = groups * w.D * members;
      if (units * rows > kMostRows * kThreads) continue;
      // Blocks of 8 units, and no more than half of all, so that two layers fit side by side (pipeline.py).
      if (w.gates > w.tiles && !w.ffma && (units > unit || 2 * grid > machine.multiprocessors)) continue;
      if (grid > machine.multiprocessors || grid == 0) continue;
      Plan p;
      p.units = static_cast<int>(units), p.rows = rows, p.tiles = w.tiles;
      p.members = static_cast<int>(members), p.groups = static_cast<int>(groups),
      p.grid = static_cast<int>(grid);
      p.segments = static_cast<int>(w.K / w.H), p.pitch = static_cast<int>(p.segments * up(w.H, 32));
      const int64_t slot = int64_t(rows) * p.pitch * w.element;
      if (members > 1) {
        p.slots = kMostSlots;
        while (p.slots > kLeastSlots && groups * w.D * p.slots * slot > kSlotsBytes) p.slots /= 2;
        p.exchange_bytes = groups * w.D * p.slots * slot;
      }
      const int most = std::max(1, kWarps / static_cast<int>(units / unit));
      for (p.parts = std::max(1, most / p.passes()); p.parts <= most; p.parts *= 2) {
        const Layout layout(p, w.gates, w.element, w.states, w.ffma);
        p.shared = layout.end;
        if (p.shared > machine.shared) continue;
        const double received = double(slot) * (units / unit);
        const int64_t turns = (units * rows + kThreads - 1) / kThreads;
        p.clocks = 600 + (members > 1 ? 300 : 0) + received / 10 + turns * (600 + 20 * p.parts);
        if (w.ffma) p.clocks += double(layout.partial) * p.passes() / 22;
        if (best.members == 0 || p.clocks < best.clocks) best = p;
      }
    }
  return best;
}

// single.cuh: units of a thread; all tiles forward, and floats from a row's sums to the next one's.
constexpr int single_several(int64_t H) { return H <= 64 ? 1 : 2; }
constexpr int single_tiles(int gates, int several) { return 4 * several * gates; }
constexpr int single_pitch(int sums) { return sums + 4; }  // stores have no bank conflicts

// Eight rows a block, which waits for no other: there may be more than multiprocessors.
inline Plan make_single_plan(const Machine& machine, int64_t B, int64_t H, int D, bool forward, int gates) {
  const int64_t groups = (B + kSingleRows - 1) / kSingleRows;
  if (machine.multiprocessors == 0 || B == 0 || H > 128 || H % 4 || groups * D > INT32_MAX) return {};
  Plan p;
  p.single = single_several(H);
  p.members = 1, p.groups = static_cast<int>(groups), p.grid = p.groups * D;
  p.units = 64 * p.single, p.rows = kSingleRows;
  const int tiles = forward ? single_tiles(gates, p.single) : 4 * p.single * kSingleParts;
  const int sums = forward ? single_pitch(gates * p.units) : kSingleParts * single_pitch(p.units);
  p.tiles = (tiles + kSingleWarps - 1) / kSingleWarps;
  p.shared = std::max(kSingleRows * (4 * sums + 2 * (forward ? 1 : gates) * p.units), tiles * 1024);
  if (p.shared > machine.shared) return {};
  p.clocks = p.single == 1 ? 1200 : 1100 + 400 * gates;  // as make_plan's: what was faster is cheaper
  p.clocks *= double((p.grid + machine.multiprocessors - 1) / machine.multiprocessors);
  return p;
}

}  // namespace seqkernels::cuda
