// The whole sequence in one launch.
//
// A block keeps its slice of the recurrent weights in shared memory: all gates of `units` hidden units
// forward, the columns of `units` states backward, rearranged once into the fragments of the matrix
// instruction. Every step it multiplies the slice with what its group exchanged (states h forward, gate
// gradients dG backward: `rows` rows of `pitch` elements), its warps sharing tiles and, where tiles are few,
// parts of K; the partial sums meet in shared memory in fixed order, and each thread does the gates of its
// units. Cell states, and backward the gradients that bypass the product, stay in shared memory in float.
//
// Exchange: two slots per group in global memory (L2), written and read in turn; a counter per group, which
// each block raises once a step. A slot is written again only after every member has announced the step that
// read it. A group of one block exchanges through its own shared memory, with block barriers alone. Groups
// never meet. Limit: hop through L2 of some 0.65 us a step, or 128 bytes of weights per clock from shared
// memory (plan.h).
//
// A tile is 16 rows of weights by 8 rows of batch. LSTM and GRU stack the gates of 8 units in two tiles
// (GRU's last quarter is zero), RNN and every backward take 16 units in one. Lane 4 g + q holds of the
// product rows g and g + 8, columns 2 q and 2 q + 1 (PTX's mma.m16n8k16). K may be permuted as long as both
// operands agree: a lane reads 8 neighbouring elements at once, 16 bytes, and they serve two instructions.
#pragma once

#include "gates.cuh"
#include "launch.h"

namespace seqkernels::cuda {

// Where an element of a tile's weights lies, and the product of a tile with 8 rows. `kChunk` elements of K
// make one step; a chunk of weights is 16 * kTiles * kChunk elements.
template <class S, int kTiles>
struct Tile {  // bf16, f16
  static constexpr int kChunk = 32;

  static __device__ int64_t index(int m, int64_t k) {
    const int e = k % 8, lane = m % 8 * 4 + k % 32 / 8, word = m % 16 / 8 + e % 4 / 2 * 2;
    return ((((k / 32 * kTiles + m / 16) * 2 + e / 4) * 32 + lane) * 4 + word) * 2 + e % 2;
  }

  static __device__ __forceinline__ void multiply(float (&c)[kTiles][4], const S* weights, const S* rows,
                                                  int pitch, int64_t begin, int64_t end) {
    const int lane = threadIdx.x % 32;
    const uint4* a = reinterpret_cast<const uint4*>(weights) + lane;
    const S* b = rows + lane / 4 * pitch + lane % 4 * 8;
#pragma unroll 4
    for (int64_t k = begin; k < end; k++) {
      const uint4 h = *reinterpret_cast<const uint4*>(b + k * kChunk);
#pragma unroll
      for (int t = 0; t < kTiles; t++) {
        mma(c[t], a[((k * kTiles + t) * 2) * 32], h.x, h.y, S());
        mma(c[t], a[((k * kTiles + t) * 2 + 1) * 32], h.z, h.w, S());
      }
    }
  }
};

template <int kTiles>
struct Tile<float, kTiles> {
  static constexpr int kChunk = 8;

  static __device__ int64_t index(int m, int64_t k) {
    return ((((k / 8 * kTiles + m / 16) * 2 + m % 16 / 8) * 2 + k % 8 / 4) * 8 + m % 8) * 4 + k % 4;
  }

  static __device__ __forceinline__ void multiply(float (&c)[kTiles][4], const float* weights,
                                                  const float* rows, int pitch, int64_t begin, int64_t end) {
    const int lane = threadIdx.x % 32;
    const float4* a = reinterpret_cast<const float4*>(weights) + lane / 4;
    const float* b = rows + lane % 4 * 2 * pitch;
#pragma unroll 2
    for (int64_t k = begin; k < end; k++)
#pragma unroll
      for (int part = 0; part < 2; part++) {
        const float4 b0 = *reinterpret_cast<const float4*>(b + k * kChunk + part * 4);
        const float4 b1 = *reinterpret_cast<const float4*>(b + pitch + k * kChunk + part * 4);
#pragma unroll
        for (int t = 0; t < kTiles; t++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const float4 w = a[(((k * kTiles + t) * 2 + half) * 2 + part) * 8];
            c[t][half * 2] += w.x * b0.x + w.y * b0.y + w.z * b0.z + w.w * b0.w;
            c[t][half * 2 + 1] += w.x * b1.x + w.y * b1.y + w.z * b1.z + w.w * b1.w;
          }
      }
  }
};

// A block: its place, its shared memory and its exchange. Gates: rows of weights per unit.
template <class S, int kGates>
struct Block {
  static constexpr int kTiles = tiles(kGates), kUnits = tile_units(kGates), kRows = 16 * kTiles;
  static constexpr int kStride = kRows + 4;  // of a column of partial sums: no bank conflicts
  using Product = Tile<S, kTiles>;

  const Layer& p;
  const int d, group, member;
  const int64_t row0, unit0;
  S* weights;
  float *partial, *state, *bias;
  S* slots;
  unsigned* flag;
  unsigned announced = 0;

  __device__ Block(const Layer& layer, int states)
      : p(layer),
        d(blockIdx.x / (layer.plan.groups * layer.plan.members)),
        group(blockIdx.x / layer.plan.members % layer.plan.groups),
        member(blockIdx.x % layer.plan.members),
        row0(int64_t(group) * layer.plan.rows),
        unit0(int64_t(member) * layer.plan.units) {
    const Plan& plan = p.plan;
    const Layout at(plan, kGates, sizeof(S), states);
    char* memory = shared_memory();
    weights = reinterpret_cast<S*>(memory);
    partial = reinterpret_cast<float*>(memory + at.partial);
    state = reinterpret_cast<float*>(memory + at.state);
    bias = reinterpret_cast<float*>(memory + at.bias);
    const int64_t place = d * plan.groups + group;
    if (plan.members == 1) {
      slots = reinterpret_cast<S*>(memory + at.exchange);
      for (int i = threadIdx.x; i < 2 * plan.rows * plan.pitch; i += kThreads) narrow(0.0f, slots[i]);
    } else {
      slots = static_cast<S*>(p.exchange) + place * 2 * plan.rows * plan.pitch;
      flag = p.flags + place * 32;
    }
  }

  // weight(gate, unit, k) of the matrix, into fragments; zero beyond its end.
  template <class F>
  __device__ void load_weights(const F& weight) {
    const int pitch = p.plan.pitch;
    for (int64_t i = threadIdx.x; i < int64_t(p.plan.units) / kUnits * kRows * pitch; i += kThreads) {
      const int64_t k = i % pitch, row = i / pitch, u = unit0 + row / kRows * kUnits + row % kUnits;
      const int m = row % kRows, gate = m / kUnits;
      S w;
      narrow(gate < kGates && u < p.H ? weight(gate, u, k) : 0.0f, w);
      weights[row / kRows * kRows * pitch + Product::index(m, k)] = w;
    }
  }

  __device__ S* slot(int64_t s) const { return slots + s % 2 * p.plan.rows * p.plan.pitch; }

  // All that this block wrote for the step is there.
  __device__ void announce() {
    announced++;
    __syncthreads();
    if (p.plan.members > 1 && threadIdx.x == 0) arrive(flag);
  }
  // All that the group announced as often as this block.
  __device__ void wait() const {
    if (p.plan.members == 1) return;
    if (threadIdx.x == 0) await(flag, announced * p.plan.members);
    __syncthreads();
  }

  // Partial sums of weights times the rows in `from`.
  __device__ void multiply(const S* from) const {
    const Plan& plan = p.plan;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, parts = plan.parts;
    const int octets = plan.rows / 8, items = plan.units / kUnits * octets;
    const int64_t chunks = plan.pitch / Product::kChunk;
    for (int item = warp / parts; item < items; item += kWarps / parts) {
      const int part = warp % parts;
      float c[kTiles][4] = {};
      Product::multiply(c, weights + int64_t(item / octets) * kRows * plan.pitch,
                        from + item % octets * 8 * plan.pitch, plan.pitch, chunks * part / parts,
                        chunks * (part + 1) / parts);
      float* to = partial + (item * parts + part) * 8 * kStride + lane % 4 * 2 * kStride + lane / 4;
#pragma unroll
      for (int t = 0; t < kTiles; t++) {
        to[t * 16] = c[t][0], to[t * 16 + kStride] = c[t][1];
        to[t * 16 + 8] = c[t][2], to[t * 16 + 8 + kStride] = c[t][3];
      }
    }
    __syncthreads();
  }
  // The product for a gate of a unit and a row, both of the block.
  __device__ float sum(int gate, int u, int r) const {
    const int parts = p.plan.parts, item = u / kUnits * (p.plan.rows / 8) + r / 8;
    const float* from = partial + (item * parts * 8 + r % 8) * kStride + gate * kUnits + u % kUnits;
    float total = 0;
    for (int i = 0; i < parts; i++) total += from[i * 8 * kStride];
    return total;
  }

  // fn(i, u, r): each thread's units and rows, the same ones every time.
  template <class F>
  __device__ void each_unit(const F& fn) const {
    const int units = p.plan.units;
    for (int i = threadIdx.x; i < units * p.plan.rows; i += kThreads) {
      const int u = i % units, r = i / units;
      if (unit0 + u < p.H && row0 + r < p.B) fn(i, u, r);
    }
  }
};

template <class Cell, class S>
__global__ void __launch_bounds__(kThreads, 1) persistent_fwd_kernel(const FwdLayer p) {
  constexpr int G = Cell::kGates;
  Block<S, G> block(p, 1 + Cell::kCellState);
  const int d = block.d, units = p.plan.units, pitch = p.plan.pitch;
  const int64_t row0 = block.row0, unit0 = block.unit0;
  block.load_weights([&](int gate, int64_t u, int64_t k) {
    return k < p.H ? load<S>(p.w_hh[d], (gate * p.H + u) * p.H + k) : 0.0f;
  });
  for (int i = threadIdx.x; i < 2 * G * units; i += kThreads) {
    const int64_t u = unit0 + i % units, row = i / units % G * p.H + u;
    const void* bias = i < G * units ? p.b_ih[d] : p.b_hh[d];
    block.bias[i] = bias && u < p.H ? load<S>(bias, row) : 0.0f;
  }
  float *h_state = block.state, *c_state = h_state + p.plan.rows * units;  // of an RNN or GRU only the first
  __syncthreads();  // the slots of a single block are zero
  block.each_unit([&](int i, int u, int r) {
    const int64_t at = (d * p.B + row0 + r) * p.H + unit0 + u;
    h_state[i] = load<S>(p.h0, at);
    if (Cell::kCellState) c_state[i] = load<S>(p.c0, at);
    store<S>(h_state[i], block.slot(0), int64_t(r) * pitch + unit0 + u);
  });
  const int64_t steps = steps_of(p, row0);
  for (int64_t s = 0; s < steps; s++) {
    const int64_t t = d ? steps - 1 - s : s, next = d ? t - 1 : t + 1;
    const int64_t token = first_token(p, t) + row0, active = rows_at(p, t) - row0;
    block.announce();
    block.wait();
    block.multiply(block.slot(s));
    block.each_unit([&](int i, int u, int r) {
      float h = h_state[i], c = Cell::kCellState ? c_state[i] : 0.0f;
      if (r < active) {
        float x_gates[G], h_gates[G];
#pragma unroll
        for (int g = 0; g < G; g++) {
          x_gates[g] = load<S>(p.xw[d], ((token + r) * G + g) * p.H + unit0 + u) + block.bias[g * units + u];
          h_gates[g] = block.sum(g, u, r) + block.bias[(G + g) * units + u];
        }
        forward_unit<Cell, S>(p, d, token + r, unit0 + u, x_gates, h_gates, h, c);
      }
      const int64_t at = (d * p.B + row0 + r) * p.H + unit0 + u;
      if (p.resets && s + 1 < steps && p.resets[next * p.B + row0 + r]) {
        h = load<S>(p.h0, at);
        if (Cell::kCellState) c = load<S>(p.c0, at);
      }
      h_state[i] = h;
      if (Cell::kCellState) c_state[i] = c;
      store<S>(h, block.slot(s + 1), int64_t(r) * pitch + unit0 + u);
    });
  }
  block.each_unit([&](int i, int u, int r) {
    const int64_t at = (d * p.B + row0 + r) * p.H + unit0 + u;
    store<S>(h_state[i], p.hn, at);
    if (Cell::kCellState) store<S>(c_state[i], p.cn, at);
  });
}

// Two floats per state: the gradient on its way, and what resets have sent to the initial state.
template <class Cell, class S>
__global__ void __launch_bounds__(kThreads, 1) persistent_bwd_kernel(const BwdLayer p) {
  constexpr int G = Cell::kGates, kStates = 2 * (1 + Cell::kCellState);
  Block<S, 1> block(p, kStates);
  const int d = block.d, units = p.plan.units, pitch = p.plan.pitch, padded = pitch / G;
  const int64_t row0 = block.row0, unit0 = block.unit0;
  block.load_weights([&](int, int64_t u, int64_t k) {
    return k % padded < p.H ? load<S>(p.w_hh[d], (k / padded * p.H + k % padded) * p.H + u) : 0.0f;
  });
  const int size = p.plan.rows * units;
  float *dh_state = block.state, *dh_reset = dh_state + size, *dc_state = dh_state + 2 * size,
        *dc_reset = dh_state + 3 * size;
  __syncthreads();  // the slots of a single block are zero
  block.each_unit([&](int i, int u, int r) {
    const int64_t at = (d * p.B + row0 + r) * p.H + unit0 + u;
    dh_state[i] = p.dhn ? load<S>(p.dhn, at) : 0.0f, dh_reset[i] = 0.0f;
    if (Cell::kCellState) dc_state[i] = p.dcn ? load<S>(p.dcn, at) : 0.0f, dc_reset[i] = 0.0f;
  });
  const int64_t steps = steps_of(p, row0);
  for (int64_t s = 0; s < steps; s++) {  // the first step finds slot 0 full of zeros
    const int64_t t = d ? s : steps - 1 - s, active = rows_at(p, t) - row0;
    const int64_t done = d ? t - 1 : t + 1;
    if (s > 0) {
      block.wait();
      block.multiply(block.slot(s));
    }
    block.each_unit([&](int i, int u, int r) {
      const int64_t b = row0 + r;
      float dh = dh_state[i] + (s > 0 ? block.sum(0, u, r) : 0.0f),
            dc = Cell::kCellState ? dc_state[i] : 0.0f;
      if (p.resets && s > 0 && p.resets[done * p.B + b]) {
        dh_reset[i] += dh, dh = 0.0f;
        if (Cell::kCellState) dc_reset[i] += dc, dc = 0.0f;
      }
      float slots[Cell::kSlots] = {};
      if (r < active) {
        if (p.dy) dh += load<S>(p.dy, ((first_token(p, t) + b) * p.D + d) * p.H + unit0 + u);
        backward_unit<Cell, S>(p, d, t, b, unit0 + u, dh, dc, slots);
      }
      dh_state[i] = dh;
      if (Cell::kCellState) dc_state[i] = dc;
#pragma unroll
      for (int g = 0; g < G; g++)
        store<S>(slots[Cell::kRecurrentSlot + g], block.slot(s + 1),
                 int64_t(r) * pitch + g * padded + unit0 + u);
    });
    block.announce();
  }
  if (steps > 0) {
    block.wait();
    block.multiply(block.slot(steps));
  }
  block.each_unit([&](int i, int u, int r) {
    const int64_t at = (d * p.B + row0 + r) * p.H + unit0 + u;
    const float dh = dh_state[i] + (steps > 0 ? block.sum(0, u, r) : 0.0f);
    store<S>(dh + dh_reset[i], p.dh0, at);
    if (Cell::kCellState) store<S>(dc_state[i] + dc_reset[i], p.dc0, at);
  });
}

// of<S>() for the types of matrix products on chip; doubles go stepwise.
template <class F>
auto with_product_type(DType dtype, const F& of) {
  return dtype == DType::bf16 ? of(bf16()) : dtype == DType::f16 ? of(f16()) : of(float());
}

template <class S, class Args>
Plan plan_for(void (*kernel)(Args), const Layer& p, int64_t K, int gates, int states) {
  if (p.P != p.H || p.dtype == DType::f64) return {};
  return make_plan(machine_for(kernel), {p.B, p.H, K, p.D, gates, int(sizeof(S)), states});
}

template <class Cell>
void Recurrence<Cell>::fwd(const FwdLayer& p, Stream stream) {
  with_product_type(p.dtype, [&](auto s) {
    launch_together(persistent_fwd_kernel<Cell, decltype(s)>, "persistent_fwd", p, stream);
  });
}
template <class Cell>
void Recurrence<Cell>::bwd(const BwdLayer& p, Stream stream) {
  with_product_type(p.dtype, [&](auto s) {
    launch_together(persistent_bwd_kernel<Cell, decltype(s)>, "persistent_bwd", p, stream);
  });
}
template <class Cell>
Plan Recurrence<Cell>::plan_fwd(const Layer& p) {
  return with_product_type(p.dtype, [&](auto s) {
    using S = decltype(s);
    return plan_for<S>(persistent_fwd_kernel<Cell, S>, p, p.H, Cell::kGates, 1 + Cell::kCellState);
  });
}
template <class Cell>
Plan Recurrence<Cell>::plan_bwd(const Layer& p) {
  return with_product_type(p.dtype, [&](auto s) {
    using S = decltype(s);
    return plan_for<S>(persistent_bwd_kernel<Cell, S>, p, Cell::kGates * p.H, 1, 2 * (1 + Cell::kCellState));
  });
}

}  // namespace seqkernels::cuda
