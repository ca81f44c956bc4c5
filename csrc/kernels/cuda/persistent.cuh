// The whole sequence in one launch.
//
// A block keeps its slice of the recurrent weights in shared memory: all gates of `units` hidden units
// forward, the columns of `units` states backward, rearranged once into the fragments of the matrix
// instruction. Every step it multiplies the slice with what its group exchanged (states h forward, gate
// gradients dG backward: `rows` rows of `pitch` elements), its warps sharing tiles and, where tiles are few,
// parts of K, each with the first fragments of its share in registers; the partial sums meet in shared memory
// in fixed order, and each thread does the gates of its unit in up to kMostRows rows. States, and backward
// the gradients that bypass the product, stay in its registers in float.
//
// Exchange: through global memory (L2) in packets of 16 bytes that say themselves whether they are there: the
// last word of an empty one is all ones, a NaN that no number is rounded to. Who needs a packet looks at it
// until it is full, so that a step waits for one way to L2 and back and for no fence, counter or flag. They
// lie as warps look at them, [8 rows][chunk of K][row][bytes of its lanes]: 24 KB took 700 clocks, rows that
// lie apart 2,000. Steps take `slots` slots in turn. Who gives packets of step s has seen all of step s - 1,
// given by blocks that had read all of step s - 2, and empties its own packets of that. They are written
// again at step s + slots - 2; until then everybody passes two fences, one in every slots / 4 steps: the
// first puts the emptying before a packet that all look at, the second that look before the next into the
// slot. A group of one block exchanges through two slots in its own shared memory, with block barriers alone.
// Groups never meet. Limit: a hop through L2 a step (plan.h).
//
// Memory: what a step reads of it, all but the exchange, is loaded a step ahead where a thread has one row,
// else before it looks; what it writes, y, dG and the saved activations, after it has given.
//
// A tile is 16 rows of weights by 8 rows of batch, and a warp takes some with what it receives once: forward
// the gates of 16 units, one a tile (by FFMA, which is slowed by weights and not by what is received, those
// of 8 units in two), of an RNN 16 units in one, backward 16 units in one or 32 in two. Lane 4 g + q holds of
// the product rows g and g + 8, columns 2 q and 2 q + 1 (PTX's mma.m16n8k16, m16n8k8). K may be permuted as
// long as both operands agree: a lane reads 16 bytes of neighbouring elements at once, and they serve two
// instructions. Floats are multiplied in TF32 where torch allows it, else by FFMA.
#pragma once

#include <type_traits>

#include "gates.cuh"
#include "launch.h"

namespace seqkernels::cuda {

template <int n>
using Count = std::integral_constant<int, n>;
template <int n>
struct alignas(4 * n) Floats {
  float of[n];
};

__device__ __forceinline__ int exponent(int power_of_two) {
  int e = 0;
  while (power_of_two > 1) power_of_two >>= 1, e++;
  return e;
}

// The packets at at(0), at(1), ..., `count` but N at most, all on their way at once, when all are full.
template <int N, class At>
__device__ __forceinline__ void receive(uint4 (&packets)[N], int count, const At& at) {
#pragma unroll
  for (int n = 0; n < N; n++) {
    packets[n].w = 0;
    if (n < count) packets[n] = poll(at(n));
  }
  while (true) {
    bool missing = false;
#pragma unroll
    for (int n = 0; n < N; n++) missing |= packets[n].w == kEmpty;
    if (!missing) return;
#pragma unroll
    for (int n = 0; n < N; n++) poll_again(at(n), packets[n]);
  }
}

// An element to publish: any NaN but the one that marks what is empty, which no half type is rounded to.
template <class E>
__device__ __forceinline__ void narrow_to_publish(float a, E& to) {
  narrow(sizeof(E) == 4 && a != a ? nanf("") : a, to);
}

// A warp multiplies a stack of tiles with kEights times 8 rows at once. Where an element of its weights lies,
// and the product. `kChunk` elements of K make one step; a chunk of weights is 16 * kTiles * kChunk elements.
template <class E, int kTiles>
struct Stack {  // by the matrix instruction: bf16, f16, tf32
  static constexpr int kPiece = 16 / sizeof(E), kChunk = 4 * kPiece, kWord = 4 / sizeof(E);

  static __device__ int index(int m, int k) {
    const int e = k % kPiece, lane = m % 8 * 4 + k % kChunk / kPiece, instruction = e / (kPiece / 2);
    const int word = m % 16 / 8 + e % (kPiece / 2) / kWord * 2;
    return ((((k / kChunk * kTiles + m / 16) * 2 + instruction) * 32 + lane) * 4 + word) * kWord + e % kWord;
  }

  struct Fragment {  // of a chunk of weights, for two instructions a tile
    uint4 of[kTiles][2];
  };

  // The first chunks of a warp's weights stay in registers: shared memory feeds the instruction 8 rows at
  // 40 % of its rate.
  static constexpr int kHeld = held_words(kTiles) / (8 * kTiles);
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

  // kAtOnce: chunks received at once. mine: hold() was given these weights. apart: from 8 rows to the next.
  template <int kAtOnce, bool kHolds, int kEights>
  __device__ __forceinline__ void multiply(float (&c)[kEights][kTiles][4], bool mine, const E* weights,
                                           const E* rows, int apart, int begin, int end, uint4*) const {
    constexpr int kSums =
        kTiles * kEights < 4 ? 2 : 1;  // as an instruction waits for the one before on its sum
    float sums[kSums][kEights][kTiles][4] = {};
    const E* b = rows + threadIdx.x % 32 * kPiece;
    for (int first = begin; first < end; first += kAtOnce) {
      uint4 h[kAtOnce * kEights];
      const E* from = b + first * 8 * kChunk;
      receive(h, (end - first) * kEights,
              [&](int n) { return from + n / kEights * 8 * kChunk + n % kEights * apart; });
      const bool in_registers = kHolds && mine && first == begin;
#pragma unroll
      for (int n = 0; n < kAtOnce; n++) {
        if (first + n >= end) break;
        const auto add = [&](const Fragment& a) {
#pragma unroll
          for (int i = 0; i < kTiles * kEights; i++) {
            const int t = i / kEights, e = i % kEights;
            const uint4& packet = h[n * kEights + e];
            mma(sums[0][e][t], a.of[t][0], packet.x, packet.y, E());
            mma(sums[kSums - 1][e][t], a.of[t][1], packet.z, packet.w, E());
          }
        };
        if (n < kHeld && in_registers)
          add(held[n < kHeld ? n : 0]);
        else
          add(read(weights, first + n));
      }
    }
#pragma unroll
    for (int i = 0; i < 4 * kTiles * kEights; i++) {
      const int e = i / 4 / kTiles, t = i / 4 % kTiles;
      c[e][t][i % 4] = sums[0][e][t][i % 4];
      if (kSums == 2) c[e][t][i % 4] += sums[kSums - 1][e][t][i % 4];
    }
  }
};

// By FFMA. Lanes share rows and weights: the warp receives each packet once, and passes it on in shared
// memory.
template <int kTiles>
struct Stack<float, kTiles> {
  static constexpr int kChunk = 8;

  static __device__ int index(int m, int k) {
    return ((((k / 8 * kTiles + m / 16) * 2 + m % 16 / 8) * 2 + k % 8 / 4) * 8 + m % 8) * 4 + k % 4;
  }

  __device__ void hold(const float*, int, int) {}  // FFMA is no faster than shared memory

  template <int, bool, int kEights>
  static __device__ __forceinline__ void multiply(float (&c)[kEights][kTiles][4], bool, const float* weights,
                                                  const float* rows, int apart, int begin, int end,
                                                  uint4* passed) {
    constexpr int kAtOnce = kFfmaChunks / kEights, kPackets = kAtOnce / 2;
    const int lane = threadIdx.x % 32, row = lane % 16 / 2, part = lane % 2, odd = lane / 16;
    const float4* a = reinterpret_cast<const float4*>(weights) + lane / 4;
    const float4* b = reinterpret_cast<const float4*>(passed) + lane % 4 * 2;  // [8 rows][chunk][part][row]
    for (int first = begin; first < end; first += kAtOnce) {
      uint4 packets[kEights * kPackets];  // of every other chunk, a row's part
      const float* from = rows + first * 8 * kChunk + lane * 4;
      receive(packets, (end - first - odd + 1) / 2 * kEights,
              [&](int n) { return from + n / kEights * 16 * kChunk + n % kEights * apart; });
      __syncwarp();
#pragma unroll
      for (int n = 0; n < kEights * kPackets; n++)
        passed[(n % kEights * kAtOnce + n / kEights * 2 + odd) * 16 + part * 8 + row] = packets[n];
      __syncwarp();
#pragma unroll
      for (int n = 0; n < 2 * kAtOnce; n++)
        if (first + n / 2 < end) {
          float4 b0[kEights], b1[kEights];
#pragma unroll
          for (int e = 0; e < kEights; e++)
            b0[e] = b[(e * kAtOnce * 2 + n) * 8], b1[e] = b[(e * kAtOnce * 2 + n) * 8 + 1];
#pragma unroll
          for (int i = 0; i < 2 * kTiles; i++) {
            const int t = i / 2, half = i % 2;
            const float4 w = a[((((first + n / 2) * kTiles + t) * 2 + half) * 2 + n % 2) * 8];
#pragma unroll
            for (int e = 0; e < kEights; e++) {
              c[e][t][half * 2] += w.x * b0[e].x + w.y * b0[e].y + w.z * b0[e].z + w.w * b0[e].w;
              c[e][t][half * 2 + 1] += w.x * b1[e].x + w.y * b1[e].y + w.z * b1[e].z + w.w * b1[e].w;
            }
          }
        }
    }
  }
};

// Forward a tile for each gate, or all gates of 8 units in two, of a GRU with a last quarter of zeros. By
// FFMA always the latter.
template <class E>
constexpr int most_tiles_fwd(int gates) {
  return std::is_same_v<E, float> && gates > 1 ? 2 : gates;
}

// A block: its place, its shared memory and its exchange. E: elements of the product; gates: rows of weights
// per unit; segments: of an exchanged row; tiles: that a warp takes at once. What a step needs is computed
// once: its instructions are few, and wait for each other 5 clocks each.
template <class E, int kGates, int kSegments, int kTiles>
struct Block {
  static constexpr int kUnits = stack_units(kGates, kTiles), kRows = 16 * kTiles;
  static constexpr int kStride = sums_stride(kGates, kTiles);
  static constexpr int kPiece = 16 / sizeof(E);
  using Product = Stack<E, kTiles>;

  const Layer& p;
  const int d, group, member;
  const int64_t row0, unit0;
  const bool alone;
  int u, row, gap, rows;  // a thread has one unit of the rows `row`, `row + gap`, ... below `rows`
  // A warp's products, each of a stack with 8 rows or 16: `item`, item + items_apart, ... below `items`,
  // along the chunks [begin, end) of K.
  int item, items, items_apart, stacks_exponent;
  int part, begin, end;
  Product product;
  E* weights;
  float *partial, *state;
  uint4* passed;  // a warp's
  E* slots;
  int slot_size, slots_mask;
  E* outgoing;  // shared memory for what goes to other blocks: the thread's unit of its first row
  // What all have put: packets in lines of `units` elements, of which a thread gives its part.
  const E* lines;
  int line, lines_apart, column, line_to;

  __device__ Block(const Layer& layer, int states)
      : p(layer),
        d(blockIdx.x / (layer.plan.groups * layer.plan.members)),
        group(blockIdx.x / layer.plan.members % layer.plan.groups),
        member(blockIdx.x % layer.plan.members),
        row0(int64_t(group) * layer.plan.rows),
        unit0(int64_t(member) * layer.plan.units),
        alone(layer.plan.members == 1) {
    const Plan& plan = p.plan;
    u = threadIdx.x % plan.units, row = threadIdx.x / plan.units, gap = kThreads / plan.units;
    rows = unit0 + u >= p.H ? 0 : p.B - row0 < plan.rows ? static_cast<int>(p.B - row0) : plan.rows;
    const int chunks = plan.pitch / Product::kChunk, warp = threadIdx.x / 32;
    stacks_exponent = exponent(plan.units / kUnits);
    part = warp % plan.parts, item = warp / plan.parts, items_apart = kWarps / plan.parts;
    items = plan.passes() << stacks_exponent;
    begin = chunks * part / plan.parts, end = chunks * (part + 1) / plan.parts;
    const Layout at(plan, kGates, sizeof(E), states, std::is_same_v<E, float>);
    char* memory = shared_memory();
    weights = reinterpret_cast<E*>(memory);
    partial = reinterpret_cast<float*>(memory + at.partial);
    state = reinterpret_cast<float*>(memory + at.state);
    passed = reinterpret_cast<uint4*>(memory + at.passed) + warp * kFfmaChunks * 16;
    slots = reinterpret_cast<E*>(memory + at.exchange);
    for (int64_t i = threadIdx.x; i < (at.passed - at.exchange) / int64_t(sizeof(E)); i += kThreads)
      narrow(0.0f, slots[i]);
    slot_size = plan.rows * plan.pitch;
    slots_mask = plan.slots - 1;
    if (alone) return;
    E* given = reinterpret_cast<E*>(memory + at.outgoing);
    outgoing = given + row * kSegments * plan.units + u;
    const int packets = plan.units / kPiece, all = plan.rows * kSegments;
    column = threadIdx.x % packets * kPiece, line = threadIdx.x / packets;
    lines_apart = kThreads / packets;
    slots = static_cast<E*>(p.exchange) + (int64_t(d) * plan.groups + group) * plan.slots * slot_size;
    if (unit0 + column >= padded()) line = all;
    lines = given + line * plan.units + column;
    line_to = place_of_line(line);
    // Where units end before a row of the exchange does, the last block fills it up, once for all.
    if (member == plan.members - 1)
      for (int i = threadIdx.x; i < plan.slots * all; i += kThreads)
        for (int k = plan.members * plan.units; k < padded(); k += kPiece)
          publish({}, slots + i / all * slot_size + place(i % all / kSegments, i % kSegments * padded() + k));
  }

  // Of time t: the token of the thread's first row, and below which rows there are tokens.
  struct Tokens {
    int64_t first;
    int rows;
  };
  __device__ __forceinline__ Tokens tokens(int64_t t) const {
    const int64_t left = rows_at(p, t) - row0;
    return {first_token(p, t) + row0 + row, left < rows ? static_cast<int>(left) : rows};
  }

  // weight(gate, unit, k) of the matrix, into fragments; zero beyond its end. Neighbouring lanes take
  // neighbouring k or, if kAcross, rows m of a stack: what lies side by side in memory.
  template <bool kAcross, class F>
  __device__ __forceinline__ void load_weights(const F& weight) {
    constexpr int kApart = kThreads / kRows, kAtOnce = 16;  // one at a time they took 20 to 60 us
    const int pitch = p.plan.pitch;
    for (int stack = 0; stack < 1 << stacks_exponent; stack++) {
      E* to = weights + stack * kRows * pitch;
      const auto move = [&](int count, const auto& m, const auto& k) {
        for (int first = 0; first < count; first += kAtOnce) {
          E on_their_way[kAtOnce];
#pragma unroll
          for (int i = first; i < first + kAtOnce; i++) {
            const int gate = m(i) / kUnits;
            const int64_t u = unit0 + stack * kUnits + m(i) % kUnits;
            narrow(i < count && gate < kGates && u < p.H ? weight(gate, u, k(i)) : 0.0f,
                   on_their_way[i - first]);
          }
#pragma unroll
          for (int i = first; i < first + kAtOnce; i++)
            if (i < count) to[Product::index(m(i), k(i))] = on_their_way[i - first];
        }
      };
      if (kAcross) {
        const int m0 = threadIdx.x % kRows, k0 = threadIdx.x / kRows;
        move((pitch - k0 + kApart - 1) / kApart, [&](int) { return m0; },
             [&](int i) { return k0 + i * kApart; });
      } else {
        for (int k0 = threadIdx.x; k0 < pitch; k0 += kThreads)
          move(kRows, [](int i) { return i; }, [&](int) { return k0; });
      }
    }
  }

  __device__ int padded() const { return p.plan.pitch / kSegments; }
  __device__ int first_unit() const { return static_cast<int>(unit0); }
  // Of a row's element k in a slot.
  __device__ __forceinline__ int place(int row, int k) const {
    constexpr int kChunk = Product::kChunk;
    return row / 8 * 8 * p.plan.pitch + (k / kChunk * 8 + row % 8) * kChunk + k % kChunk;
  }
  __device__ __forceinline__ int place_of_line(int line) const {
    return place(line / kSegments, line % kSegments * padded() + first_unit() + column);
  }
  __device__ E* slot(int64_t s) const { return slots + (static_cast<int>(s) & slots_mask) * slot_size; }

  // The thread's n-th row of step s, for the group.
  __device__ __forceinline__ void put(float a, int64_t s, int n, int segment) const {
    E* to = alone ? slot(s) + place(row + n * gap, segment * padded() + first_unit() + u)
                  : outgoing + n * kThreads * kSegments + segment * p.plan.units;
    narrow_to_publish(a, *to);
  }
  // What all threads have put goes to the group.
  __device__ __forceinline__ void exchange(int64_t s) const {
    __syncthreads();
    if (alone) return;
    E *to = slot(s), *old = slot(s - 2);
    const E* from = lines;
    for (int i = line; i < p.plan.rows * kSegments; i += lines_apart, from += lines_apart * p.plan.units) {
      const int at = i == line ? line_to : place_of_line(i);  // the first is the only one, but of long lines
      publish(*reinterpret_cast<const uint4*>(from), to + at);
      if (s >= 2) publish({kEmpty, kEmpty, kEmpty, kEmpty}, old + at);
    }
    if ((static_cast<int>(s) & slots_mask >> 2) == 0) fence();
  }

  __device__ const E* weights_of(int stack) const { return weights + stack * kRows * p.plan.pitch; }
  // Where a thread has more rows, their states need the registers, and weights serve 16 rows each time.
  static constexpr bool holds(int N) { return N <= kHoldingRows; }
  // Once, when all weights are there.
  __device__ void hold() { product.hold(weights_of(item & ((1 << stacks_exponent) - 1)), begin, end); }

  // Partial sums of weights times the rows of step s.
  template <int N>
  __device__ __forceinline__ void multiply(int64_t s) const {
    // Backward a warp has as many times more chunks as there are gates: of LSTM, H 768, in eight parts, 12.
    // Two tiles and several rows a thread leave registers for 8.
    constexpr int kAtOnce = kSegments == 1 || !holds(N) || (kTiles == 2 && N > 1) ? 8 : 12;
    constexpr int kEights = holds(N) ? 1 : 2;
    const int lane = threadIdx.x % 32, mask = (1 << stacks_exponent) - 1;
    const int apart =
        p.plan.rows > 8 ? 8 * p.plan.pitch : 0;  // 0: 8 rows are multiplied twice, and kept once
    for (int i = item; i < items; i += items_apart) {
      float c[kEights][kTiles][4] = {};
      const int stack = i & mask, eight = (i >> stacks_exponent) * kEights;
      product.template multiply<kAtOnce, holds(N)>(c, ((i ^ item) & mask) == 0, weights_of(stack),
                                                   slot(s) + eight * 8 * p.plan.pitch, apart, begin, end,
                                                   passed);
#pragma unroll
      for (int e = 0; e < kEights; e++)
        if (e == 0 || apart)
          store_sums(c[e], partial + (((((eight + e) << stacks_exponent) + stack) * p.plan.parts + part) * 8 +
                                      lane % 4 * 2) *
                                         kStride);
    }
    __syncthreads();
  }
  // Partial sums of a lane's two rows, for the gates.
  __device__ __forceinline__ void store_sums(const float (&c)[kTiles][4], float* to) const {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int column = 0; column < 2; column++, to += kStride)
      if constexpr (kGates == 1) {  // units g, g + 8, ...
        Floats<2 * kTiles> sums;
#pragma unroll
        for (int n = 0; n < 2 * kTiles; n++) sums.of[n] = c[n / 2][n % 2 * 2 + column];
        *reinterpret_cast<Floats<2 * kTiles>*>(to + g * 2 * kTiles) = sums;
      } else {  // the gates of units g and, of a stack of 16, g + 8
#pragma unroll
        for (int half = 0; half < kUnits / 8; half++) {
          Floats<4> sums{};
#pragma unroll
          for (int n = 0; n < kGates; n++)
            sums.of[n] = kUnits == 16 ? c[n % kTiles][half * 2 + column] : c[n / 2][n % 2 * 2 + column];
          *reinterpret_cast<Floats<4>*>(to + (g + half * 8) * 4) = sums;
        }
      }
  }
  // The products for the gates of the thread's unit and its n-th row.
  __device__ __forceinline__ void sums(int n, float (&of)[kGates]) const {
    const int r = row + n * gap, i = (r / 8 << stacks_exponent) + u / kUnits;
    const float* from = partial + (i * p.plan.parts * 8 + r % 8) * kStride +
                        (kGates == 1 ? u % 8 * 2 * kTiles + u % kUnits / 8 : u % kUnits * 4);
#pragma unroll
    for (int g = 0; g < kGates; g++) of[g] = 0;
#pragma unroll 4
    for (int i = 0; i < p.plan.parts; i++) {
      const auto some = *reinterpret_cast<const Floats<kGates == 1 ? 1 : 4>*>(from + i * 8 * kStride);
#pragma unroll
      for (int g = 0; g < kGates; g++) of[g] += some.of[g];
    }
  }

  // work(N): a loop of its own for each number of rows that a thread has at most.
  template <class Work>
  __device__ __forceinline__ void with_rows(const Work& work) const {
    const int most = p.plan.rows / gap;  // 0 where threads are more than rows
    if (most <= 1)
      work(Count<1>());
    else if (most == 2)
      work(Count<2>());
    else
      work(Count<kMostRows>());
  }
};

template <class Cell, class E, int kTiles>
__global__ void __launch_bounds__(kThreads, 1) persistent_fwd_kernel(const FwdLayer p) {
  using S = Stored<E>;
  constexpr int G = Cell::kGates;
  Block<E, G, 1, kTiles> block(p, 0);
  const int d = block.d, H = static_cast<int>(p.H), row = block.row, gap = block.gap, rows = block.rows;
  const int64_t row0 = block.row0, u = block.unit0 + block.u;
  block.template load_weights<false>([&](int gate, int64_t unit, int k) {
    return k < H ? load<S>(p.w_hh[d], (gate * H + unit) * H + k) : 0.0f;
  });
  float b_ih[G] = {}, b_hh[G] = {};
  if (p.b_ih[d] && u < p.H)
    for (int g = 0; g < G; g++)
      b_ih[g] = load<S>(p.b_ih[d], g * p.H + u), b_hh[g] = load<S>(p.b_hh[d], g * p.H + u);
  __syncthreads();  // the weights are there, and what is exchanged zero
  block.with_rows([&](auto most) {
    constexpr int N = decltype(most)::value;
    if (block.holds(N)) block.hold();
    const int64_t first_state = (d * p.B + row0 + row) * H + u;
    float h[N] = {}, c[N] = {};  // the latter of an LSTM
    const auto start = [&](int n) {
      h[n] = load<S>(p.h0, first_state + n * gap * H);
      if (Cell::kCellState) c[n] = load<S>(p.c0, first_state + n * gap * H);
    };
#pragma unroll
    for (int n = 0; n < N; n++)
      if (row + n * gap < rows) start(n), block.put(h[n], 0, n, 0);
    block.exchange(0);
    const int64_t steps = steps_of(p, row0);
    const auto time = [&](int64_t s) { return d ? steps - 1 - s : s; };
    // What a step reads of memory does not depend on the exchange: where registers allow it is loaded a step
    // ahead, else before the look at that.
    struct Inputs {
      InFlight<S> x[G];
      uint8_t reset;
    };
    const auto load_inputs = [&](int64_t s, Inputs(&to)[N]) {
      const auto tokens = block.tokens(time(s));
      const int64_t x = tokens.first * (G * H) + u;
#pragma unroll
      for (int n = 0; n < N; n++)
        if (row + n * gap < tokens.rows)
          for (int g = 0; g < G; g++) to[n].x[g] = issue_load<S>(p.xw[d], x + (n * gap * G + g) * H);
      if (p.resets && s + 1 < steps)
#pragma unroll
        for (int n = 0; n < N; n++)
          if (row + n * gap < rows) to[n].reset = p.resets[time(s + 1) * p.B + row0 + row + n * gap];
      return tokens;
    };
    constexpr bool kEarly = N == 1;
    Inputs next[N] = {};
    typename decltype(block)::Tokens next_tokens{};
    if (kEarly && steps > 0) next_tokens = load_inputs(0, next);
    for (int64_t s = 0; s < steps; s++) {
      Inputs now[N] = {};
#pragma unroll
      for (int n = 0; n < N; n++) now[n] = next[n], next[n] = {};
      auto tokens = next_tokens;
      if (!kEarly)
        tokens = load_inputs(s, now);
      else if (s + 1 < steps)
        next_tokens = load_inputs(s + 1, next);
      block.template multiply<N>(s);
      float saved[N][Cell::kSaved + 1] = {}, h_now[N] = {}, c_now[N] = {};
      if (row < p.plan.rows)
#pragma unroll
        for (int n = 0; n < N; n++) {
          float x_gates[G], h_gates[G];
          block.sums(n, h_gates);
#pragma unroll
          for (int g = 0; g < G; g++)
            x_gates[g] = widen(loaded<S>(now[n].x[g])) + b_ih[g], h_gates[g] += b_hh[g];
          h_now[n] = h[n], c_now[n] = c[n];
          Cell::template forward<Arithmetic<S>>(x_gates, h_gates, h_now[n], c_now[n], saved[n], p.relu);
          h_now[n] = rounded<S>(h_now[n]);
        }
#pragma unroll
      for (int n = 0; n < N; n++) {
        if (row + n * gap < tokens.rows) h[n] = h_now[n], c[n] = c_now[n];
        if (now[n].reset) start(n);
        if (row + n * gap < rows) block.put(h[n], s + 1, n, 0);
      }
      block.exchange(s + 1);
      const int64_t at = (tokens.first * p.D + d) * H + u;
#pragma unroll
      for (int n = 0; n < N; n++)
        if (row + n * gap < tokens.rows)
          store_fwd<Cell, S>(p, at + n * gap * p.D * H, u, h_now[n], c_now[n], saved[n]);
    }
#pragma unroll
    for (int n = 0; n < N; n++)
      if (row + n * gap < rows) {
        store<S>(h[n], p.hn, first_state + n * gap * H);
        if (Cell::kCellState) store<S>(c[n], p.cn, first_state + n * gap * H);
      }
  });
}

template <class Cell, class E, int kTiles>
__global__ void __launch_bounds__(kThreads, 1) persistent_bwd_kernel(const BwdLayer p) {
  using S = Stored<E>;
  constexpr int G = Cell::kGates;
  Block<E, 1, G, kTiles> block(p, 1 + Cell::kCellState);
  const int d = block.d, H = static_cast<int>(p.H), row = block.row, gap = block.gap, rows = block.rows;
  const int padded = block.padded();
  const int64_t row0 = block.row0, u = block.unit0 + block.u;
  block.template load_weights<true>([&](int, int64_t unit, int k) {
    const int gate = k / padded, row = k - gate * padded;
    return row < H ? load<S>(p.w_hh[d], int64_t(gate * H + row) * H + unit) : 0.0f;
  });
  __syncthreads();  // the weights are there, and what is exchanged zero
  block.with_rows([&](auto most) {
    constexpr int N = decltype(most)::value;
    if (block.holds(N)) block.hold();
    const int64_t first_state = (d * p.B + row0 + row) * H + u;
    float dh[N] = {}, dc[N] = {};  // on their way past the product; the latter of an LSTM
    // What resets have sent to the initial state.
    float *dh_reset = block.state + threadIdx.x, *dc_reset = dh_reset + p.plan.rows * p.plan.units;
#pragma unroll
    for (int n = 0; n < N; n++)
      if (row + n * gap < rows) {
        if (p.dhn) dh[n] = load<S>(p.dhn, first_state + n * gap * H);
        if (Cell::kCellState && p.dcn) dc[n] = load<S>(p.dcn, first_state + n * gap * H);
        dh_reset[n * kThreads] = 0.0f;
        if (Cell::kCellState) dc_reset[n * kThreads] = 0.0f;
      }
    const int64_t steps = steps_of(p, row0);
    const auto time = [&](int64_t s) { return d ? s : steps - 1 - s; };
    struct Inputs {
      Saved<Cell, S> saved;
      InFlight<S> dy;
      uint8_t reset;
    };
    const auto load_inputs = [&](int64_t s, Inputs(&to)[N]) {
      const int64_t t = time(s);
      const auto tokens = block.tokens(t);
      const int64_t at = (tokens.first * p.D + d) * H + u;
#pragma unroll
      for (int n = 0; n < N; n++)
        if (row + n * gap < tokens.rows) {
          to[n].saved = load_saved<Cell, S>(p, d, t, row0 + row + n * gap, u);
          if (p.dy) to[n].dy = issue_load<S>(p.dy, at + n * gap * p.D * H);
        }
      if (p.resets && s > 0)
#pragma unroll
        for (int n = 0; n < N; n++)
          if (row + n * gap < rows) to[n].reset = p.resets[time(s - 1) * p.B + row0 + row + n * gap];
      return tokens;
    };
    constexpr bool kEarly = N == 1;
    Inputs now[N] = {}, next[N] = {};
    typename decltype(block)::Tokens tokens{}, next_tokens{};
    if (steps > 0) tokens = load_inputs(0, now);
    if (kEarly && steps > 1) next_tokens = load_inputs(1, next);
    for (int64_t s = 0; s < steps; s++) {  // nothing arrives at the first
      float slots[N][Cell::kSlots] = {};
      if (row < p.plan.rows)
#pragma unroll
        for (int n = 0; n < N; n++) {
          float product[1] = {};
          if (s > 0) block.sums(n, product);
          dh[n] += product[0];
          if (now[n].reset) {
            dh_reset[n * kThreads] += dh[n], dh[n] = 0.0f;
            if (Cell::kCellState) dc_reset[n * kThreads] += dc[n], dc[n] = 0.0f;
          }
          float dh_after = dh[n] + widen(loaded<S>(now[n].dy)), dc_after = dc[n];
          backward_unit<Cell, S>(p, now[n].saved, dh_after, dc_after, slots[n]);
          const bool live = row + n * gap < tokens.rows;
          dh[n] = live ? dh_after : dh[n], dc[n] = live ? dc_after : dc[n];
#pragma unroll
          for (int i = 0; i < Cell::kSlots; i++) slots[n][i] = live ? slots[n][i] : 0.0f;
        }
#pragma unroll
      for (int n = 0; n < N; n++)
        if (row + n * gap < rows)
#pragma unroll
          for (int g = 0; g < G; g++) block.put(slots[n][Cell::recurrent_slot(g)], s, n, g);
      block.exchange(s);
      const int64_t at = (tokens.first * p.D + d) * H + u;
#pragma unroll
      for (int n = 0; n < N; n++)
        if (row + n * gap < tokens.rows) store_bwd<Cell, S>(p, at + n * gap * p.D * H, u, slots[n]);
#pragma unroll
      for (int n = 0; n < N; n++) now[n] = next[n], next[n] = {};
      tokens = next_tokens;
      if (kEarly && s + 2 < steps) next_tokens = load_inputs(s + 2, next);
      if (!kEarly && s + 1 < steps) tokens = load_inputs(s + 1, now);
      block.template multiply<N>(s);
    }
#pragma unroll
    for (int n = 0; n < N; n++)
      if (row + n * gap < rows) {
        float product[1] = {};
        if (steps > 0) block.sums(n, product);
        store<S>(dh[n] + product[0] + dh_reset[n * kThreads], p.dh0, first_state + n * gap * H);
        if (Cell::kCellState) store<S>(dc[n] + dc_reset[n * kThreads], p.dc0, first_state + n * gap * H);
      }
  });
}

}  // namespace seqkernels::cuda
