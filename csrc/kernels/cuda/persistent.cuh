// The whole sequence in one launch.
//
// A block keeps its slice of the recurrent weights in shared memory: all gates of `units` hidden units
// forward, the columns of `units` states backward, rearranged once into the fragments of the matrix
// instruction. Every step it multiplies the slice with what its group exchanged (states h forward, gate
// gradients dG backward: `rows` rows of `pitch` elements), its warps sharing tiles and, where tiles are few,
// parts of K, each with the first fragments of its share in registers; the partial sums meet in shared memory
// in fixed order, and each thread does the gates of its unit in some rows. Cell states, and backward the
// gradients that bypass the product, stay in shared memory in float.
//
// Exchange: through global memory (L2), in packets of 16 bytes that say themselves whether they are there:
// empty ones have a word of all ones, a NaN that no number is rounded to. Who needs a packet looks at it
// until it is full, so that a step waits for one way to L2 and one back and for no fence, counter or flag.
// Steps take kSlots slots in turn. Who gives packets of step s has seen all of step s - 1, given by blocks
// that had read all of step s - 2, and empties its own packets of that. They are written again at step s +
// kSlots - 2; before, everybody has passed two fences of every fourth step: the first puts the emptying
// before a packet that all look at, the second that look before the next into the slot. A group of one block
// exchanges through two slots in its own shared memory, with block barriers alone. Groups never meet.
// Whatever else a step reads of memory is loaded before it looks; what it writes to y, dG and the saved
// activations it writes after it has given. Limit: a hop through L2 a step, or 128 bytes of weights per clock
// from shared memory (plan.h).
//
// A tile is 16 rows of weights by 8 rows of batch. LSTM and GRU stack the gates of 8 units in two tiles
// (GRU's last quarter is zero), RNN and every backward take 16 units in one. Lane 4 g + q holds of the
// product rows g and g + 8, columns 2 q and 2 q + 1 (PTX's mma.m16n8k16, m16n8k8). K may be permuted as long
// as both operands agree: a lane reads 16 bytes of neighbouring elements at once, and they serve two
// instructions. Floats are multiplied in TF32 where torch allows it, else by FFMA.
#pragma once

#include <type_traits>

#include "gates.cuh"
#include "launch.h"

namespace seqkernels::cuda {

__device__ __forceinline__ bool empty(const uint4& packet) {
  return packet.x == ~0u || packet.y == ~0u || packet.z == ~0u || packet.w == ~0u;
}

// The packets at at(0), at(1), ..., `count` but N at most, all on their way at once, when all are full.
template <int N, class At>
__device__ __forceinline__ void receive(uint4 (&packets)[N], int count, const At& at) {
#pragma unroll
  for (int n = 0; n < N; n++)
    if (n < count) packets[n] = look(at(n));
  for (bool missing = true; missing;) {
    missing = false;
#pragma unroll
    for (int n = 0; n < N; n++)
      if (n < count && empty(packets[n])) packets[n] = look(at(n)), missing = true;
  }
}

template <int n>
using Count = std::integral_constant<int, n>;

// An element to give: any NaN but the one that marks what is empty.
template <class E>
__device__ __forceinline__ void narrow_to_give(float a, E& to) {
  narrow(std::is_same_v<E, float> && a != a ? nanf("") : a, to);
}

// Where an element of a tile's weights lies, and the product of a tile with 8 rows. `kChunk` elements of K
// make one step; a chunk of weights is 16 * kTiles * kChunk elements.
template <class E, int kTiles>
struct Tile {  // by the matrix instruction: bf16, f16, tf32
  static constexpr int kPiece = 16 / sizeof(E), kChunk = 4 * kPiece, kWord = 4 / sizeof(E);

  static __device__ int64_t index(int m, int64_t k) {
    const int e = k % kPiece, lane = m % 8 * 4 + k % kChunk / kPiece, instruction = e / (kPiece / 2);
    const int word = m % 16 / 8 + e % (kPiece / 2) / kWord * 2;
    return ((((k / kChunk * kTiles + m / 16) * 2 + instruction) * 32 + lane) * 4 + word) * kWord + e % kWord;
  }

  struct Fragment {  // of a chunk of weights, for two instructions a tile
    uint4 of[kTiles][2];
  };

  // The first chunks of a warp's weights stay in registers: shared memory feeds the instruction 8 rows at
  // 40 % of its rate.
  static constexpr int kHeld = kHeldWords / (8 * kTiles), kAtOnce = 8;
  Fragment held[kHeld];

  static __device__ __forceinline__ Fragment read(const E* weights, int k) {
    const uint4* from = reinterpret_cast<const uint4*>(weights) + k * kTiles * 64 + threadIdx.x % 32;
    Fragment a;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; i++) a.of[i / 2][i % 2] = from[i * 32];
    return a;
  }
  __device__ __forceinline__ void hold(const E* weights, int begin, int end) {
#pragma unroll
    for (int n = 0; n < kHeld; n++)
      if (begin + n < end) held[n] = read(weights, begin + n);
  }

  // mine: hold() was given these weights.
  __device__ __forceinline__ void multiply(float (&c)[kTiles][4], bool mine, const E* weights, const E* rows,
                                           int pitch, int begin, int end) const {
    float odd[kTiles][4] = {};  // a second sum, as an instruction waits for the one before on its sum
    const E* b = rows + threadIdx.x % 32 / 4 * pitch + threadIdx.x % 4 * kPiece;
    for (int first = begin; first < end; first += kAtOnce) {
      uint4 h[kAtOnce];
      receive(h, end - first, [&](int n) { return b + (first + n) * kChunk; });
      const bool in_registers = mine && first == begin;
#pragma unroll
      for (int n = 0; n < kAtOnce; n++)
        if (first + n < end) {
          const Fragment a = n < kHeld && in_registers ? held[n] : read(weights, first + n);
#pragma unroll
          for (int t = 0; t < kTiles; t++) {
            mma(c[t], a.of[t][0], h[n].x, h[n].y, E());
            mma(odd[t], a.of[t][1], h[n].z, h[n].w, E());
          }
        }
    }
#pragma unroll
    for (int i = 0; i < 4 * kTiles; i++) c[i / 4][i % 4] += odd[i / 4][i % 4];
  }
};

__device__ __forceinline__ float4 floats(const uint4& packet) {
  float4 values;
  memcpy(&values, &packet, sizeof values);
  return values;
}

template <int kTiles>
struct Tile<float, kTiles> {
  static constexpr int kChunk = 8, kAtOnce = 3;

  static __device__ int64_t index(int m, int64_t k) {
    return ((((k / 8 * kTiles + m / 16) * 2 + m % 16 / 8) * 2 + k % 8 / 4) * 8 + m % 8) * 4 + k % 4;
  }

  __device__ void hold(const float*, int, int) {}  // FFMA is no faster than shared memory

  static __device__ __forceinline__ void multiply(float (&c)[kTiles][4], bool, const float* weights,
                                                  const float* rows, int pitch, int begin, int end) {
    const int lane = threadIdx.x % 32;
    const float4* a = reinterpret_cast<const float4*>(weights) + lane / 4;
    const float* b = rows + lane % 4 * 2 * pitch;
    for (int first = begin; first < end; first += kAtOnce) {
      uint4 packets[4 * kAtOnce];  // of a chunk two rows in two parts
      receive(packets, (end - first) * 4,
              [&](int n) { return b + n / 2 % 2 * pitch + (first + n / 4) * kChunk + n % 2 * 4; });
#pragma unroll
      for (int n = 0; n < 2 * kAtOnce; n++)
        if (first + n / 2 < end) {
          const int part = n % 2;
          const float4 b0 = floats(packets[n / 2 * 4 + part]), b1 = floats(packets[n / 2 * 4 + 2 + part]);
#pragma unroll
          for (int t = 0; t < kTiles; t++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
              const float4 w = a[((((first + n / 2) * kTiles + t) * 2 + half) * 2 + part) * 8];
              c[t][half * 2] += w.x * b0.x + w.y * b0.y + w.z * b0.z + w.w * b0.w;
              c[t][half * 2 + 1] += w.x * b1.x + w.y * b1.y + w.z * b1.z + w.w * b1.w;
            }
        }
    }
  }
};

// A block: its place, its shared memory and its exchange. E: elements of the product; gates: rows of weights
// per unit; segments: of an exchanged row.
template <class E, int kGates, int kSegments>
struct Block {
  static constexpr int kTiles = tiles(kGates), kUnits = tile_units(kGates), kRows = 16 * kTiles;
  static constexpr int kStride = kRows + 4;  // of a column of partial sums: no bank conflicts
  static constexpr int kPiece = 16 / sizeof(E);
  using Product = Tile<E, kTiles>;

  const Layer& p;
  const int d, group, member;
  const int64_t row0, unit0;
  int u, row, gap, rows;  // a thread has one unit of the rows `row`, `row + gap`, ... below `rows`
  // A warp's tiles and groups of 8 rows: the first, how far the next.
  int tile, octet, tiles_apart, octets_apart;
  int part, begin, end;  // of K, in chunks
  Product product;
  E* weights;
  float *partial, *state;
  E* slots;
  E* given;  // by the thread in this step, its first row and segment; null for a single block

  __device__ Block(const Layer& layer, int states)
      : p(layer),
        d(blockIdx.x / (layer.plan.groups * layer.plan.members)),
        group(blockIdx.x / layer.plan.members % layer.plan.groups),
        member(blockIdx.x % layer.plan.members),
        row0(int64_t(group) * layer.plan.rows),
        unit0(int64_t(member) * layer.plan.units) {
    const Plan& plan = p.plan;
    u = threadIdx.x % plan.units, row = threadIdx.x / plan.units, gap = kThreads / plan.units;
    rows = unit0 + u >= p.H ? 0 : p.B - row0 < plan.rows ? static_cast<int>(p.B - row0) : plan.rows;
    const int chunks = plan.pitch / Product::kChunk, warp = threadIdx.x / 32;
    const int all = plan.units / kUnits;  // tiles
    part = warp % plan.parts, tile = warp / plan.parts % all, octet = warp / plan.parts / all;
    tiles_apart = kWarps / plan.parts, octets_apart = tiles_apart > all ? tiles_apart / all : 1;
    begin = chunks * part / plan.parts, end = chunks * (part + 1) / plan.parts;
    const Layout at(plan, kGates, sizeof(E), states);
    char* memory = shared_memory();
    weights = reinterpret_cast<E*>(memory);
    partial = reinterpret_cast<float*>(memory + at.partial);
    state = reinterpret_cast<float*>(memory + at.state);
    E* exchange = reinterpret_cast<E*>(memory + at.exchange);
    for (int64_t i = threadIdx.x; i < (at.end - at.exchange) / int64_t(sizeof(E)); i += kThreads)
      narrow(0.0f, exchange[i]);
    slots = exchange, given = nullptr;
    if (alone()) return;
    given = exchange;
    slots =
        static_cast<E*>(p.exchange) + (d * plan.groups + group) * int64_t(kSlots) * plan.rows * plan.pitch;
    // The last block fills up the rows once for all.
    for (int64_t u = int64_t(plan.members) * plan.units + threadIdx.x * kPiece; u < padded();
         u += kThreads * kPiece)
      if (member == plan.members - 1)
        for (int i = 0; i < kSlots * plan.rows * kSegments; i++) give({}, slots + i * padded() + u);
  }

  // weight(gate, unit, k) of the matrix, into fragments; zero beyond its end.
  template <class F>
  __device__ void load_weights(const F& weight) {
    const int pitch = p.plan.pitch;
    for (int64_t i = threadIdx.x; i < int64_t(p.plan.units) / kUnits * kRows * pitch; i += kThreads) {
      const int64_t k = i % pitch, row = i / pitch, u = unit0 + row / kRows * kUnits + row % kUnits;
      const int m = row % kRows, gate = m / kUnits;
      E w;
      narrow(gate < kGates && u < p.H ? weight(gate, u, k) : 0.0f, w);
      weights[row / kRows * kRows * pitch + Product::index(m, k)] = w;
    }
  }

  __device__ bool alone() const { return p.plan.members == 1; }
  __device__ int padded() const { return p.plan.pitch / kSegments; }
  __device__ E* slot(int64_t s) const {
    return slots + s % (alone() ? 2 : kSlots) * p.plan.rows * p.plan.pitch;
  }
  // Where the thread puts its part of a row of step s.
  __device__ __forceinline__ E& outgoing(int64_t s, int r, int segment) const {
    return alone() ? slot(s)[(int64_t(r) * kSegments + segment) * padded() + u]
                   : given[(r * kSegments + segment) * p.plan.units + u];
  }

  // What all threads have put goes to the group.
  __device__ void exchange(int64_t s) const {
    __syncthreads();
    if (alone()) return;
    const int line = p.plan.units / kPiece, lines = p.plan.rows * kSegments;  // packets, of all rows
    const int column = threadIdx.x % line * kPiece;
    if (unit0 + column < padded())
      for (int i = threadIdx.x / line; i < lines; i += kThreads / line) {
        const int64_t at = i * padded() + unit0 + column;
        give(*reinterpret_cast<const uint4*>(given + i * p.plan.units + column), slot(s) + at);
        if (s >= 2) give({~0u, ~0u, ~0u, ~0u}, slot(s - 2) + at);
      }
    if (s % 4 == 0) fence();
  }

  __device__ const E* weights_of(int t) const { return weights + t * kRows * p.plan.pitch; }
  // Once, when all weights are there.
  __device__ void hold() { product.hold(weights_of(tile), begin, end); }

  // Partial sums of weights times the rows in `from`.
  __device__ void multiply(const E* from) const {
    const Plan& plan = p.plan;
    const int lane = threadIdx.x % 32, tiles = plan.units / kUnits;
    for (int t = tile; t < tiles; t += tiles_apart)
      for (int o = octet; o < plan.rows / 8; o += octets_apart) {
        float c[kTiles][4] = {};
        product.multiply(c, t == tile, weights_of(t), from + o * 8 * plan.pitch, plan.pitch, begin, end);
        float* to = partial + ((o * tiles + t) * plan.parts + part) * 8 * kStride;
        to += lane % 4 * 2 * kStride + lane / 4;
#pragma unroll
        for (int i = 0; i < kTiles; i++) {
          to[i * 16] = c[i][0], to[i * 16 + kStride] = c[i][1];
          to[i * 16 + 8] = c[i][2], to[i * 16 + 8 + kStride] = c[i][3];
        }
      }
    __syncthreads();
  }
  // The products for the gates of the thread's unit and a row.
  __device__ __forceinline__ void sums(int r, float (&of)[kGates]) const {
    const int parts = p.plan.parts, item = r / 8 * (p.plan.units / kUnits) + u / kUnits;
    const float* from = partial + (item * parts * 8 + r % 8) * kStride + u % kUnits;
#pragma unroll
    for (int g = 0; g < kGates; g++) of[g] = 0;
#pragma unroll 2
    for (int i = 0; i < parts; i++)
#pragma unroll
      for (int g = 0; g < kGates; g++) of[g] += from[i * 8 * kStride + g * kUnits];
  }

  // What a step reads of memory does not depend on the exchange: load(r) of kAhead rows goes to registers
  // before it looks, so that two latencies are one.
  template <class T, class Load>
  __device__ __forceinline__ void load_ahead(T (&ahead)[kAhead], int from, const Load& load) const {
#pragma unroll
    for (int n = 0; n < kAhead; n++)
      if (from + n * gap < rows) ahead[n] = load(from + n * gap);
  }
  // The thread's rows, N at a time, so that the arithmetic of one fills the latencies of the others:
  // work(N, first row, whether all others are done). The first kAhead are loaded already.
  template <class T, class Load, class Work>
  __device__ __forceinline__ void each_row(T (&ahead)[kAhead], const Load& load, const Work& work) const {
    const int turns = (p.plan.rows + gap - 1) / gap;
    if (turns == 1) return work(Count<1>(), row, true);
    if (turns == 2) return work(Count<2>(), row, true);
    for (int n = 0; n < turns; n += kAhead) {
      if (n > 0) load_ahead(ahead, row + n * gap, load);
      work(Count<kAhead>(), row + n * gap, n + kAhead >= turns);
    }
  }
};

template <class Cell, class E>
__global__ void __launch_bounds__(kThreads, 1) persistent_fwd_kernel(const FwdLayer p) {
  using S = Stored<E>;
  constexpr int G = Cell::kGates;
  Block<E, G, 1> block(p, 1 + Cell::kCellState);
  const int d = block.d, units = p.plan.units;
  const int64_t row0 = block.row0, u = block.unit0 + block.u;
  block.load_weights([&](int gate, int64_t unit, int64_t k) {
    return k < p.H ? load<S>(p.w_hh[d], (gate * p.H + unit) * p.H + k) : 0.0f;
  });
  float b_ih[G] = {}, b_hh[G] = {};
  if (p.b_ih[d] && u < p.H)
    for (int g = 0; g < G; g++)
      b_ih[g] = load<S>(p.b_ih[d], g * p.H + u), b_hh[g] = load<S>(p.b_hh[d], g * p.H + u);
  float *h_state = block.state + block.u, *c_state = h_state + p.plan.rows * units;  // the latter of an LSTM
  __syncthreads();  // the weights are there, and the slots of a single block zero
  block.hold();
  for (int r = block.row; r < block.rows; r += block.gap) {
    const int64_t at = (d * p.B + row0 + r) * p.H + u;
    h_state[r * units] = load<S>(p.h0, at);
    if (Cell::kCellState) c_state[r * units] = load<S>(p.c0, at);
    narrow_to_give(h_state[r * units], block.outgoing(0, r, 0));
  }
  block.exchange(0);
  struct Inputs {
    S x[G];
    uint8_t reset;
  };
  const int64_t steps = steps_of(p, row0);
  for (int64_t s = 0; s < steps; s++) {
    const int64_t t = d ? steps - 1 - s : s, next = d ? t - 1 : t + 1;
    const int64_t token = first_token(p, t) + row0, active = rows_at(p, t) - row0;
    const auto load_row = [&](int r) {
      Inputs in{};
      if (r < active)
        for (int g = 0; g < G; g++) in.x[g] = element<S>(p.xw[d], ((token + r) * G + g) * p.H + u);
      if (p.resets && s + 1 < steps) in.reset = p.resets[next * p.B + row0 + r];
      return in;
    };
    Inputs ahead[kAhead];
    block.load_ahead(ahead, block.row, load_row);
    block.multiply(block.slot(s));
    block.each_row(ahead, load_row, [&](auto count, int from, bool last) {
      constexpr int N = decltype(count)::value;
      const bool idle = from >= p.plan.rows;
      float h[N] = {}, c[N] = {}, saved[N][Cell::kSaved + 1] = {};
#pragma unroll
      for (int n = 0; n < N && !idle; n++) {
        const int r = from + n * block.gap;
        float x_gates[G], h_gates[G];
        block.sums(r, h_gates);
#pragma unroll
        for (int g = 0; g < G; g++) x_gates[g] = widen(ahead[n].x[g]) + b_ih[g], h_gates[g] += b_hh[g];
        const float h_before = h_state[r * units], c_before = Cell::kCellState ? c_state[r * units] : 0.0f;
        h[n] = h_before, c[n] = c_before;
        Cell::template forward<Arithmetic<S>>(x_gates, h_gates, h[n], c[n], saved[n], p.relu);
        h[n] = r < active ? rounded<S>(h[n]) : h_before;
        c[n] = r < active ? c[n] : c_before;
      }
#pragma unroll
      for (int n = 0; n < N; n++) {
        const int r = from + n * block.gap;
        if (r >= block.rows) continue;
        const bool reset = ahead[n].reset;
        const int64_t at = (d * p.B + row0 + r) * p.H + u;
        h_state[r * units] = reset ? load<S>(p.h0, at) : h[n];
        if (Cell::kCellState) c_state[r * units] = reset ? load<S>(p.c0, at) : c[n];
        narrow_to_give(h_state[r * units], block.outgoing(s + 1, r, 0));
      }
      if (last) block.exchange(s + 1);
#pragma unroll
      for (int n = 0; n < N; n++) {
        const int r = from + n * block.gap;
        if (r < block.rows && r < active) keep<Cell, S>(p, d, token + r, u, h[n], c[n], saved[n]);
      }
    });
  }
  for (int r = block.row; r < block.rows; r += block.gap) {
    const int64_t at = (d * p.B + row0 + r) * p.H + u;
    store<S>(h_state[r * units], p.hn, at);
    if (Cell::kCellState) store<S>(c_state[r * units], p.cn, at);
  }
}

// Two floats per state: the gradient on its way, and what resets have sent to the initial state.
template <class Cell, class E>
__global__ void __launch_bounds__(kThreads, 1) persistent_bwd_kernel(const BwdLayer p) {
  using S = Stored<E>;
  constexpr int G = Cell::kGates, kStates = 2 * (1 + Cell::kCellState);
  Block<E, 1, G> block(p, kStates);
  const int d = block.d, units = p.plan.units, padded = block.padded();
  const int64_t row0 = block.row0, u = block.unit0 + block.u;
  block.load_weights([&](int, int64_t unit, int64_t k) {
    return k % padded < p.H ? load<S>(p.w_hh[d], (k / padded * p.H + k % padded) * p.H + unit) : 0.0f;
  });
  const int size = p.plan.rows * units;
  float *dh_state = block.state + block.u, *dh_reset = dh_state + size, *dc_state = dh_state + 2 * size,
        *dc_reset = dh_state + 3 * size;
  __syncthreads();  // the weights are there, and the slots of a single block zero
  block.hold();
  for (int r = block.row; r < block.rows; r += block.gap) {
    const int64_t at = (d * p.B + row0 + r) * p.H + u;
    const int i = r * units;
    dh_state[i] = p.dhn ? load<S>(p.dhn, at) : 0.0f, dh_reset[i] = 0.0f;
    if (Cell::kCellState) dc_state[i] = p.dcn ? load<S>(p.dcn, at) : 0.0f, dc_reset[i] = 0.0f;
  }
  struct Inputs {
    Saved<Cell, S> saved;
    S dy;
    uint8_t reset;
  };
  const int64_t steps = steps_of(p, row0);
  for (int64_t s = 0; s < steps; s++) {  // nothing arrives at the first
    const int64_t t = d ? s : steps - 1 - s, done = d ? t - 1 : t + 1;
    const int64_t token = first_token(p, t) + row0, active = rows_at(p, t) - row0;
    const auto load_row = [&](int r) {
      Inputs in{};
      if (r < active) {
        in.saved = load_saved<Cell, S>(p, d, t, row0 + r, u);
        if (p.dy) in.dy = element<S>(p.dy, ((token + r) * p.D + d) * p.H + u);
      }
      if (p.resets && s > 0) in.reset = p.resets[done * p.B + row0 + r];
      return in;
    };
    Inputs ahead[kAhead];
    block.load_ahead(ahead, block.row, load_row);
    if (s > 0) block.multiply(block.slot(s));
    block.each_row(ahead, load_row, [&](auto count, int from, bool last) {
      constexpr int N = decltype(count)::value;
      const bool idle = from >= p.plan.rows;
      float dh[N] = {}, dc[N] = {}, slots[N][Cell::kSlots] = {};
#pragma unroll
      for (int n = 0; n < N && !idle; n++) {
        const int r = from + n * block.gap, i = r * units;
        const bool live = r < active && r < block.rows;
        float product[1] = {};
        if (s > 0) block.sums(r, product);
        dh[n] = dh_state[i] + product[0], dc[n] = Cell::kCellState ? dc_state[i] : 0.0f;
        if (r < block.rows && ahead[n].reset) {
          dh_reset[i] += dh[n], dh[n] = 0.0f;
          if (Cell::kCellState) dc_reset[i] += dc[n], dc[n] = 0.0f;
        }
        float dh_after = dh[n] + widen(ahead[n].dy), dc_after = dc[n];
        backward_unit<Cell, S>(p, ahead[n].saved, dh_after, dc_after, slots[n]);
        dh[n] = live ? dh_after : dh[n], dc[n] = live ? dc_after : dc[n];
#pragma unroll
        for (int i = 0; i < Cell::kSlots; i++) slots[n][i] = live ? slots[n][i] : 0.0f;
      }
#pragma unroll
      for (int n = 0; n < N; n++) {
        const int r = from + n * block.gap;
        if (r >= block.rows) continue;
        dh_state[r * units] = dh[n];
        if (Cell::kCellState) dc_state[r * units] = dc[n];
#pragma unroll
        for (int g = 0; g < G; g++)
          narrow_to_give(slots[n][Cell::kRecurrentSlot + g], block.outgoing(s + 1, r, g));
      }
      if (last) block.exchange(s + 1);
#pragma unroll
      for (int n = 0; n < N; n++) {
        const int r = from + n * block.gap;
        if (r < block.rows && r < active) keep<Cell, S>(p, d, token + r, u, slots[n]);
      }
    });
  }
  if (steps > 0) block.multiply(block.slot(steps));
  for (int r = block.row; r < block.rows; r += block.gap) {
    const int64_t at = (d * p.B + row0 + r) * p.H + u;
    const int i = r * units;
    float product[1] = {};
    if (steps > 0) block.sums(r, product);
    store<S>(dh_state[i] + product[0] + dh_reset[i], p.dh0, at);
    if (Cell::kCellState) store<S>(dc_state[i] + dc_reset[i], p.dc0, at);
  }
}

// of(E()) for the type of the layer's products on chip; doubles go stepwise.
template <class F>
auto with_product_type(const Layer& p, const F& of) {
  return p.dtype == DType::bf16  ? of(bf16())
         : p.dtype == DType::f16 ? of(f16())
         : p.tf32                ? of(tf32())
                                 : of(float());
}

template <class E, class Args>
Plan plan_for(void (*kernel)(Args), const Layer& p, int64_t K, int gates, int states) {
  if (p.P != p.H || p.dtype == DType::f64) return {};
  return make_plan(machine_for(kernel),
                   {p.B, p.H, K, p.D, gates, int(sizeof(E)), states, std::is_same_v<E, float>});
}

template <class Cell>
void Recurrence<Cell>::fwd(const FwdLayer& p, Stream stream) {
  with_product_type(p, [&](auto e) {
    launch_together(persistent_fwd_kernel<Cell, decltype(e)>, "persistent_fwd", p, stream);
  });
}
template <class Cell>
void Recurrence<Cell>::bwd(const BwdLayer& p, Stream stream) {
  with_product_type(p, [&](auto e) {
    launch_together(persistent_bwd_kernel<Cell, decltype(e)>, "persistent_bwd", p, stream);
  });
}
template <class Cell>
Plan Recurrence<Cell>::plan_fwd(const Layer& p) {
  return with_product_type(p, [&](auto e) {
    using E = decltype(e);
    return plan_for<E>(persistent_fwd_kernel<Cell, E>, p, p.H, Cell::kGates, 1 + Cell::kCellState);
  });
}
template <class Cell>
Plan Recurrence<Cell>::plan_bwd(const Layer& p) {
  return with_product_type(p, [&](auto e) {
    using E = decltype(e);
    return plan_for<E>(persistent_bwd_kernel<Cell, E>, p, Cell::kGates * p.H, 1, 2 * (1 + Cell::kCellState));
  });
}

}  // namespace seqkernels::cuda
