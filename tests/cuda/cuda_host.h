// CUDA kernels on the CPU: every thread of every block is a fiber of one operating-system thread, so that
// block and warp barriers, packets between blocks and the matrix instruction run as the kernels' source has
// them. Fibers take turns in random order and some blocks are slower than others: what a missing
// barrier would allow happens here too. If all wait, that is a deadlock and an error. Shared memory starts as
// NaN.
#pragma once

#include <stdint.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/cuda/plan.h"
#include "kernels/cuda/recurrence.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint4 {
  uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace seqkernels::cuda {

struct bf16 {
  uint16_t bits = 0;
};
using f16 = _Float16;
struct tf32 {
  uint32_t bits = 0;
};

inline float widen(bf16 a) {
  const uint32_t bits = uint32_t(a.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
inline float widen(f16 a) { return a; }
inline void narrow(float a, f16& to) { to = static_cast<f16>(a); }
inline void narrow(float a, bf16& to) {
  uint32_t bits;
  std::memcpy(&bits, &a, 4);
  to.bits = a != a ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
// The matrix instruction looks at no more than the first 10 bits of the mantissa; cvt.rna rounds to them, to
// nearest, ties away from zero.
inline float widen(tf32 a) {
  const uint32_t bits = a.bits & ~0x1fffu;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
inline void narrow(float a, tf32& to) {
  std::memcpy(&to.bits, &a, 4);
  to.bits = a != a ? 0x7fffffff : std::isinf(a) ? to.bits : (to.bits + 0x1000) & ~0x1fffu;
}

namespace host {

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  uint4 a[2][32];
  uint32_t b[2][32][2];
};

struct Block {
  Barrier barrier;
  Warp warps[kSingleWarps];
  std::unique_ptr<char, decltype(&std::free)> shared{nullptr, &std::free};
};

// Why a fiber waits: until *word has left a value.
struct Fiber {
  ucontext_t context;
  unsigned block = 0, thread = 0;
  const unsigned* word = nullptr;
  unsigned value = 0;
  bool done = false;
  unsigned turn = 0;  // which buffer of the warp the next matrix instruction uses

  bool waits() const { return word && *word == value; }
};

struct Grid {
  static constexpr size_t kStack = 64 << 10;

  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  std::minstd_rand random{seed()};

  static unsigned& seed() {
    static unsigned seed = 1;
    return seed;
  }
  static Grid*& running() {
    static Grid* grid = nullptr;
    return grid;
  }

  static void enter() {
    Grid& grid = *running();
    grid.body(grid.arguments);
    grid.current->done = true;
    swapcontext(&grid.current->context, &grid.scheduler);
  }

  // Blocks `first` and following.
  void run(unsigned count, int64_t shared, unsigned first) {
    static char* stacks = nullptr;
    static size_t reserved = 0;
    const size_t threads = size_t(count) * blockDim.x;
    if (reserved < threads) {
      if (stacks) munmap(stacks, reserved * kStack);
      stacks = static_cast<char*>(mmap(nullptr, threads * kStack, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
      reserved = threads;
    }
    blocks.resize(count);
    for (Block& block : blocks) {
      block.shared.reset(static_cast<char*>(std::aligned_alloc(16, up(shared, 16))));
      std::memset(block.shared.get(), 0xff, shared);
    }
    fibers.resize(threads);
    for (size_t i = 0; i < threads; i++) {
      Fiber& f = fibers[i];
      f.block = i / blockDim.x, f.thread = i % blockDim.x;
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = stacks + i * kStack, f.context.uc_stack.ss_size = kStack;
      f.context.uc_link = nullptr;
      makecontext(&f.context, enter, 0);
    }
    running() = this;
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    std::vector<unsigned> haste(count);  // of 8 rounds a block takes part in so many
    for (unsigned& h : haste) h = 1 + random() % 8;
    std::vector<char> awake(count);
    for (size_t left = threads; left > 0;) {
      for (unsigned b = 0; b < count; b++) awake[b] = random() % 8 < haste[b];
      for (size_t i = threads - 1; i > 0; i--) std::swap(order[i], order[random() % (i + 1)]);
      bool moved = false;
      for (unsigned i : order) {
        Fiber& f = fibers[i];
        if (f.done || f.waits()) continue;
        moved = true;
        if (!awake[f.block]) continue;
        f.word = nullptr;
        current = &f;
        threadIdx.x = f.thread, blockIdx.x = first + f.block;
        swapcontext(&scheduler, &f.context);
        left -= f.done;
      }
      if (!moved) throw std::runtime_error("emulation: deadlock of " + std::to_string(left) + " threads");
    }
    running() = nullptr;
  }

  void wait(const unsigned* word, unsigned value) {
    Fiber& f = *current;
    f.word = word, f.value = value;
    if (f.waits()) {
      swapcontext(&f.context, &scheduler);
    } else {
      f.word = nullptr;
    }
  }
  void meet(Barrier& barrier, unsigned count) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived == count) {
      barrier.arrived = 0, barrier.generation++;
    } else {
      wait(&barrier.generation, generation);
    }
  }
};

inline Grid& grid() { return *Grid::running(); }
inline Block& block() { return grid().blocks[grid().current->block]; }

inline Machine& machine() {
  static Machine machine;
  return machine;
}

}  // namespace host

inline char* shared_memory() { return host::block().shared.get(); }
template <class S>
using InFlight = S;
template <class S>
S issue_load(const void* from, int64_t i) {
  return static_cast<const S*>(from)[i];
}
template <class S>
S loaded(S a) {
  return a;
}
inline void publish(const uint4& packet, void* to) { std::memcpy(to, &packet, 16); }
inline uint4 poll(const void* from) {  // not before there is something to see
  const uint32_t* last = static_cast<const uint32_t*>(from) + 3;
  while (*last == kEmpty) host::grid().wait(last, kEmpty);
  uint4 packet;
  std::memcpy(&packet, from, 16);
  return packet;
}
inline void poll_again(const void*, uint4&) {}
inline void fence() {}

// With n elements to a word, lane 4 g + q: a holds rows g, g + 8, g, g + 8 at columns n q, n q, n (q + 4),
// n (q + 4) and, of two, their neighbours; b rows n q and n (q + 4) and neighbours at column g.
template <class E>
void mma(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1, E) {
  constexpr int n = 4 / sizeof(E);
  host::Fiber& fiber = *host::grid().current;
  host::Warp& warp = host::block().warps[fiber.thread / 32];
  const int lane = fiber.thread % 32, turn = fiber.turn++ % 2;
  warp.a[turn][lane] = a, warp.b[turn][lane][0] = b0, warp.b[turn][lane][1] = b1;
  host::grid().meet(warp.barrier, 32);
  const auto element = [](uint32_t word, int which) {
    E value;
    std::memcpy(static_cast<void*>(&value), reinterpret_cast<const char*>(&word) + which * sizeof(E),
                sizeof(E));
    return widen(value);
  };
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 8 * n; k++) {
      const int half = k / (4 * n), q = k / n % 4;
      const uint4& from = warp.a[turn][row % 8 * 4 + q];
      const uint32_t words[] = {from.x, from.y, from.z, from.w};
      c[i] += element(words[row / 8 + half * 2], k % n) * element(warp.b[turn][column * 4 + q][half], k % n);
    }
  }
}

// Kernels without barriers need no fibers.
template <class Args>
void launch(void (*kernel)(Args), const char*, const Args& args, int64_t work, Stream) {
  gridDim.x = 3, blockDim.x = kThreads;
  for (blockIdx.x = 0; work > 0 && blockIdx.x < gridDim.x; blockIdx.x++)
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; threadIdx.x++) kernel(args);
}

// `together` blocks at a time.
template <class Args>
void launch_blocks(void (*kernel)(Args), const Args& args, int threads, int together) {
  static void (*body)(Args);
  body = kernel;
  gridDim.x = args.plan.grid, blockDim.x = threads;
  for (int first = 0; first < args.plan.grid; first += together) {
    host::Grid grid;
    grid.body = [](const void* arguments) { body(*static_cast<const Args*>(arguments)); };
    grid.arguments = &args;
    grid.run(std::min(together, args.plan.grid - first), args.plan.shared, first);
  }
}
template <class Args>
void launch_together(void (*kernel)(Args), const char*, const Args& args, Stream) {
  if (args.plan.exchange_bytes > 0) std::memset(args.exchange, 0xff, args.plan.exchange_bytes);
  launch_blocks(kernel, args, kThreads, args.plan.grid);
}
template <class Args>
void launch_apart(void (*kernel)(Args), const char*, const Args& args, Stream) {
  launch_blocks(kernel, args, kSingleThreads, 3);
}

template <class Args>
Machine machine_for(void (*)(Args), int) {
  return host::machine();
}

}  // namespace seqkernels::cuda

inline void __syncwarp() {
  namespace host = seqkernels::cuda::host;
  host::grid().meet(host::block().warps[host::grid().current->thread / 32].barrier, 32);
}
inline void __syncthreads() {
  namespace host = seqkernels::cuda::host;
  host::grid().meet(host::block().barrier, blockDim.x);
}
