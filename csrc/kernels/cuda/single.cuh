// The whole sequence of a small layer, up to 128 units of a half type: a block has eight rows for itself, and
// no other block to wait for.
//
// Its 16 warps hold all recurrent weights in registers, as fragments of the matrix instruction: of an LSTM of
// 128 units 128 KB, 64 registers a thread. Of the rows, h (backward the gate gradients) lies in shared memory
// as the instruction takes it, [chunk of K][8 rows][32], a lane's 16 bytes side by side. A step: each warp
// multiplies its tiles of 16 gate rows (backward of 16 units and half of K) and leaves the sums in shared
// memory; two warps do the gates of a row, a lane one unit or two neighbours, so that all memory is read and
// written by rows; what they give goes back to shared memory. Two barriers, and what a step reads of memory
// is loaded two steps ahead, backward one. Limit: instructions, some 300 of each warp, of which two in a row
// take 5 clocks; 16 warps hide that better than 8 with twice the units. Memory only beyond 132 blocks.
#pragma once

#include "gates.cuh"
#include "launch.h"

namespace seqkernels::cuda {

template <class S, int n>
struct alignas(sizeof(S) * n) Several {
  S of[n];
};

// aligned: to all of them; memory of the caller may not be.
template <class S, int n>
__device__ __forceinline__ Several<S, n> load_several(const void* from, int64_t i, bool aligned = true) {
  const S* at = static_cast<const S*>(from) + i;
  if (aligned) return *reinterpret_cast<const Several<S, n>*>(at);
  Several<S, n> several;
#pragma unroll
  for (int j = 0; j < n; j++) several.of[j] = at[j];
  return several;
}
template <class S, int n>
__device__ __forceinline__ void store_several(const Several<S, n>& several, void* to, int64_t i) {
  *reinterpret_cast<Several<S, n>*>(static_cast<S*>(to) + i) = several;
}
template <class S, int n>
__device__ __forceinline__ Several<S, n> narrowed(const float (&values)[n]) {
  Several<S, n> several;
#pragma unroll
  for (int j = 0; j < n; j++) narrow(values[j], several.of[j]);
  return several;
}

// Tiles of 16 rows of weights, kChunks times 32 elements of K: Stack (persistent.cuh) says how K is permuted.
template <class E, int kTiles, int kChunks>
struct Fragments {
  uint4 of[kTiles][kChunks][2];

  // Of kAll tiles, which pass through `buffer` chunk by chunk, those of the warp. weight(row, k):
  // neighbouring threads take neighbouring k or, if kAcross, rows, what lies side by side in memory.
  template <int kAll, bool kAcross, class F>
  __device__ __forceinline__ void load(E* buffer, const F& weight) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kChunks; n++) {
      for (int i = threadIdx.x; i < kAll * 512; i += kSingleThreads) {
        const int row = kAcross ? i % (kAll * 16) : i / 32, k = kAcross ? i / (kAll * 16) : i % 32;
        const int word = row % 16 / 8 + k % 4 / 2 * 2, owner = row % 8 * 4 + k / 8;
        buffer[row / 16 * 512 + ((k % 8 / 4 * 32 + owner) * 4 + word) * 2 + k % 2] = weight(row, n * 32 + k);
      }
      __syncthreads();
#pragma unroll
      for (int t = 0; t < kTiles; t++) {
        const uint4* tile = reinterpret_cast<const uint4*>(buffer + (warp + t * kSingleWarps) * 512);
#pragma unroll
        for (int i = 0; i < 2; i++)
          of[t][n][i] = warp + t * kSingleWarps < kAll ? tile[i * 32 + lane] : uint4{};
      }
      __syncthreads();
    }
  }

  // Lane 4 g + q: rows g and g + 8 of each tile, columns 2 q and 2 q + 1, added to c.
  __device__ __forceinline__ void multiply(float (&c)[kTiles][4], const E* rows) const {
    constexpr int kSums = 4 / kTiles;  // as an instruction waits for the one before on its sum
    float sums[kSums][kTiles][4] = {};
    const uint4* from = reinterpret_cast<const uint4*>(rows) + threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kChunks; n++) {
      const uint4 h = from[n * 32];
#pragma unroll
      for (int t = 0; t < kTiles; t++) mma(sums[2 * n % kSums][t], of[t][n][0], h.x, h.y, E());
#pragma unroll
      for (int t = 0; t < kTiles; t++) mma(sums[(2 * n + 1) % kSums][t], of[t][n][1], h.z, h.w, E());
    }
#pragma unroll
    for (int i = 0; i < 4 * kTiles * kSums; i++)
      c[i / 4 % kTiles][i % 4] += sums[i / 4 / kTiles][i / 4 % kTiles][i % 4];
  }
};

// A thread's place: one row, kSeveral units from u on.
template <class E, int kSeveral>
struct Place {
  static constexpr int kUnits = 64 * kSeveral;  // of the layer at most

  const Layer& p;
  const int d, warp, lane, row, u;
  const int64_t b;
  const bool live;

  __device__ explicit Place(const Layer& layer)
      : p(layer),
        d(blockIdx.x / layer.plan.groups),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        row(warp / 2),
        u(threadIdx.x % 64 * kSeveral),
        b(int64_t(blockIdx.x % layer.plan.groups) * kSingleRows + row),
        live(b < layer.B && u < layer.H) {}

  __device__ int64_t state() const { return (d * p.B + b) * p.H + u; }
  __device__ int64_t steps() const { return steps_of(p, b - row); }
  // Of the thread's units in rows of all segments' elements.
  __device__ void put(const Several<E, kSeveral>& values, E* rows, int segment) const {
    const int k = segment * kUnits + u;
    store_several(values, rows, (k / 32 * kSingleRows + row) * 32 + k % 32);
  }
};

template <class Cell, class E, int kSeveral>
__global__ void __launch_bounds__(kSingleThreads, 1) single_fwd_kernel(const FwdLayer p) {
  using At = Place<E, kSeveral>;
  constexpr int G = Cell::kGates, kUnits = At::kUnits, kAll = single_tiles(G, kSeveral);
  constexpr int kTiles = (kAll + kSingleWarps - 1) / kSingleWarps;  // of a warp
  constexpr int kPitch = single_pitch(G * kUnits);
  constexpr bool kOneBias = !Cell::kNeedsPreviousH;  // for a gate; a GRU's n has two
  const At at(p);
  const int H = static_cast<int>(p.H), u = at.u, d = at.d;
  float* sums = reinterpret_cast<float*>(shared_memory());  // [8 rows][gate][unit]
  E* rows = reinterpret_cast<E*>(sums + kSingleRows * kPitch);

  // Row `row` of a warp's tile, of all gates' rows.
  const auto gate_row = [&](int tile, int row) { return (at.warp + tile * kSingleWarps) * 16 + row; };
  Fragments<E, kTiles, 2 * kSeveral> weights;
  weights.template load<kAll, false>(reinterpret_cast<E*>(sums), [&](int row, int k) {
    const int gate = row / kUnits, unit = row % kUnits;
    return unit < H && k < H ? element<E>(p.w_hh[d], (int64_t(gate) * H + unit) * H + k) : E{};
  });
  float bias[kTiles][2] = {}, b_ih[G][kSeveral] = {};
  if (p.b_ih[d]) {
#pragma unroll
    for (int i = 0; i < kTiles * 2; i++) {
      const int r = gate_row(i / 2, at.lane / 4 + i % 2 * 8), gate = r / kUnits, unit = r % kUnits;
      if (gate < G && unit < H) {
        bias[i / 2][i % 2] = load<E>(p.b_hh[d], gate * H + unit);
        if (kOneBias) bias[i / 2][i % 2] += load<E>(p.b_ih[d], gate * H + unit);
      }
    }
    if (!kOneBias && u < H)
#pragma unroll
      for (int i = 0; i < G * kSeveral; i++)
        b_ih[i / kSeveral][i % kSeveral] = load<E>(p.b_ih[d], i / kSeveral * H + u + i % kSeveral);
  }

  float h[kSeveral] = {}, c[kSeveral] = {};
  const auto start = [&] {
#pragma unroll
    for (int n = 0; n < kSeveral; n++) {
      h[n] = load<E>(p.h0, at.state() + n);
      if (Cell::kCellState) c[n] = load<E>(p.c0, at.state() + n);
    }
  };
  if (at.live) start();
  at.put(narrowed<E>(h), rows, 0);
  __syncthreads();

  const int64_t steps = at.steps();
  const auto time = [&](int64_t s) { return d ? steps - 1 - s : s; };
  struct Inputs {
    Several<E, kSeveral> x[G];
    int64_t token;
    bool there, reset;
  };
  const auto load_inputs = [&](int64_t s, Inputs& to) {
    const int64_t t = time(s);
    to.token = first_token(p, t) + at.b, to.there = at.live && at.b < rows_at(p, t);
    if (to.there)
#pragma unroll
      for (int g = 0; g < G; g++) to.x[g] = load_several<E, kSeveral>(p.xw[d], (to.token * G + g) * H + u);
    to.reset = at.live && p.resets && s + 1 < steps && p.resets[time(s + 1) * p.B + at.b];
  };
  const auto step = [&](const Inputs& now) {
    float c_tiles[kTiles][4];
#pragma unroll
    for (int i = 0; i < kTiles * 4; i++) c_tiles[i / 4][i % 4] = bias[i / 4][i % 4 / 2];
    weights.multiply(c_tiles, rows);
#pragma unroll
    for (int i = 0; i < kTiles * 4; i++) {
      const int r = gate_row(i / 4, at.lane / 4 + i % 4 / 2 * 8);
      if (r < G * kUnits) sums[(at.lane % 4 * 2 + i % 2) * kPitch + r] = c_tiles[i / 4][i % 4];
    }
    __syncthreads();
    Several<E, kSeveral> y{}, saved[Cell::kSaved + 1];
    Several<float, kSeveral> cells{};
#pragma unroll
    for (int n = 0; n < kSeveral; n++) {
      float x_gates[G], h_gates[G], kept[Cell::kSaved + 1], h_now = h[n], c_now = c[n];
#pragma unroll
      for (int g = 0; g < G; g++) {
        x_gates[g] = widen(now.x[g].of[n]) + b_ih[g][n];
        h_gates[g] = sums[at.row * kPitch + g * kUnits + u + n];
      }
      Cell::template forward<Arithmetic<E>>(x_gates, h_gates, h_now, c_now, kept, p.relu);
      narrow(h_now, y.of[n]), cells.of[n] = c_now;
      if (now.there) h[n] = widen(y.of[n]), c[n] = c_now;
#pragma unroll
      for (int i = 0; i < Cell::kSaved; i++) narrow(kept[i], saved[i].of[n]);
    }
    if (now.reset) start();
    at.put(narrowed<E>(h), rows, 0);
    __syncthreads();
    if (!now.there) return;
    const int64_t first = (now.token * p.D + d) * H;
    if (p.y) store_several(y, p.y, first + u);
    if (Cell::kCellState && p.cells) store_several(cells, p.cells, first + u);
    if (p.gates)
#pragma unroll
      for (int i = 0; i < Cell::kSaved; i++)
        store_several(saved[i], p.gates, first * Cell::kSaved + i * H + u);
  };
  Inputs even{}, odd{};
  if (steps > 0) load_inputs(0, even);
  if (steps > 1) load_inputs(1, odd);
  for (int64_t s = 0; s < steps; s += 2) {
    step(even);
    if (s + 2 < steps) load_inputs(s + 2, even);
    if (s + 1 == steps) break;
    step(odd);
    if (s + 3 < steps) load_inputs(s + 3, odd);
  }
  if (at.live)
#pragma unroll
    for (int n = 0; n < kSeveral; n++) {
      store<E>(h[n], p.hn, at.state() + n);
      if (Cell::kCellState) store<E>(c[n], p.cn, at.state() + n);
    }
}

template <class Cell, class E, int kSeveral>
__global__ void __launch_bounds__(kSingleThreads, 1) single_bwd_kernel(const BwdLayer p) {
  using At = Place<E, kSeveral>;
  constexpr int G = Cell::kGates, kUnits = At::kUnits, kPitch = single_pitch(kUnits);
  constexpr int kTiles = kUnits / 16, kParts = kSingleParts, kChunks = G * 2 * kSeveral / kParts;
  const At at(p);
  const int H = static_cast<int>(p.H), u = at.u, d = at.d;
  const int tile = at.warp % kTiles * 16, part = at.warp / kTiles;  // of 64 units half the warps have none
  float* sums = reinterpret_cast<float*>(shared_memory());          // [part of K][8 rows][unit]
  E* rows = reinterpret_cast<E*>(sums + kParts * kSingleRows * kPitch);

  Fragments<E, 1, kChunks> weights;  // of all parts' units, the warp's
  weights.template load<kTiles * kParts, true>(reinterpret_cast<E*>(sums), [&](int row, int k) {
    const int unit = row % kUnits, all_k = row / kUnits * kChunks * 32 + k, from = all_k % kUnits;
    const int64_t gate_row = all_k / kUnits * H + from;
    return unit < H && from < H ? element<E>(p.w_hh[d], gate_row * H + unit) : E{};
  });
  float dh[kSeveral] = {}, dc[kSeveral] = {};              // on their way past the product
  float dh_reset[kSeveral] = {}, dc_reset[kSeveral] = {};  // what resets have sent to the initial state
  if (at.live)
#pragma unroll
    for (int n = 0; n < kSeveral; n++) {
      if (p.dhn) dh[n] = load<E>(p.dhn, at.state() + n);
      if (Cell::kCellState && p.dcn) dc[n] = load<E>(p.dcn, at.state() + n);
    }
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  const bool aligned =
      (address(p.gates) | address(p.y) | address(p.cells) | address(p.dy) | address(p.dcells)) % 16 == 0;

  const int64_t steps = at.steps();
  const auto time = [&](int64_t s) { return d ? s : steps - 1 - s; };
  struct Inputs {
    Several<E, kSeveral> gates[Cell::kSaved + 1], h, dy;
    Several<float, kSeveral> c, c_prev;
    int64_t token;
    bool there, reset;
  };
  const auto load_inputs = [&](int64_t s, Inputs& to) {
    const int64_t t = time(s);
    to.token = first_token(p, t) + at.b, to.there = at.live && at.b < rows_at(p, t);
    to.reset = at.live && p.resets && s > 0 && p.resets[time(s - 1) * p.B + at.b];
    if (!to.there) return;
    const int64_t first = (to.token * p.D + d) * H;
#pragma unroll
    for (int i = 0; i < Cell::kSaved; i++)
      to.gates[i] = load_several<E, kSeveral>(p.gates, first * Cell::kSaved + i * H + u, aligned);
    if (p.dy) to.dy = load_several<E, kSeveral>(p.dy, first + u, aligned);
    if (Cell::kNeedsPreviousH) to.h = load_several<E, kSeveral>(p.h_prev[d], to.token * H + u);
    if (Cell::kSaved == 0) to.h = load_several<E, kSeveral>(p.y, first + u, aligned);
    if (!Cell::kCellState) return;
    to.c = load_several<float, kSeveral>(p.cells, first + u, aligned);
    if (starts(p, d, t, at.b)) {
#pragma unroll
      for (int n = 0; n < kSeveral; n++) to.c_prev.of[n] = load<E>(p.c0, at.state() + n);
    } else {
      const int64_t before = first_token(p, d ? t + 1 : t - 1) + at.b;
      to.c_prev = load_several<float, kSeveral>(p.cells, (before * p.D + d) * H + u, aligned);
    }
  };
  const auto add_product = [&] {
#pragma unroll
    for (int part = 0; part < kParts; part++) {
      const auto some = load_several<float, kSeveral>(sums, (part * kSingleRows + at.row) * kPitch + u);
#pragma unroll
      for (int n = 0; n < kSeveral; n++) dh[n] += some.of[n];
    }
  };
  Inputs now{};
  if (steps > 0) load_inputs(0, now);
  for (int64_t s = 0; s < steps; s++) {
    if (s > 0) add_product();
    Several<E, kSeveral> slots[Cell::kSlots]{};
    Several<float, kSeveral> dcells{};
    if (Cell::kCellState && p.dcells && now.there)
      dcells = load_several<float, kSeveral>(p.dcells, (now.token * p.D + d) * H + u, aligned);
#pragma unroll
    for (int n = 0; n < kSeveral; n++) {
      if (now.reset) {
        dh_reset[n] += dh[n], dh[n] = 0.0f;
        dc_reset[n] += dc[n], dc[n] = 0.0f;
      }
      float gates[Cell::kSaved + 1], of_gates[Cell::kSlots];
#pragma unroll
      for (int i = 0; i < Cell::kSaved; i++) gates[i] = widen(now.gates[i].of[n]);
      const float h = widen(now.h.of[n]);
      const Past<float> past{now.c.of[n], now.c_prev.of[n], h};
      float dh_after = dh[n] + widen(now.dy.of[n]), dc_after = dc[n] + dcells.of[n];
      Cell::template backward<Arithmetic<E>>(gates, past, dh_after, dc_after, of_gates, p.relu);
      if (now.there) {
        dh[n] = dh_after, dc[n] = dc_after;
#pragma unroll
        for (int i = 0; i < Cell::kSlots; i++) narrow(of_gates[i], slots[i].of[n]);
      }
    }
#pragma unroll
    for (int g = 0; g < G; g++) at.put(slots[Cell::recurrent_slot(g)], rows, g);
    __syncthreads();
    if (now.there)
#pragma unroll
      for (int i = 0; i < Cell::kSlots; i++)
        store_several(slots[i], p.dG, (now.token * p.D + d) * H * Cell::kSlots + i * H + u);
    if (s + 1 < steps) load_inputs(s + 1, now);
    if (part < kParts) {
      float c[1][4] = {};
      weights.multiply(c, rows + part * kChunks * 32 * kSingleRows);
#pragma unroll
      for (int i = 0; i < 4; i++)
        sums[(part * kSingleRows + at.lane % 4 * 2 + i % 2) * kPitch + tile + at.lane / 4 + i / 2 * 8] =
            c[0][i];
    }
    __syncthreads();
  }
  if (steps > 0) add_product();
  if (at.live)
#pragma unroll
    for (int n = 0; n < kSeveral; n++) {
      store<E>(dh[n] + dh_reset[n], p.dh0, at.state() + n);
      if (Cell::kCellState) store<E>(dc[n] + dc_reset[n], p.dc0, at.state() + n);
    }
}

}  // namespace seqkernels::cuda
