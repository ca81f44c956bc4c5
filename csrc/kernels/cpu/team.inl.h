// Threads of one kernel call: how many, how they wait for each other, what memory they share, and at the end
// how every kernel runs on them.
#pragma once

#include "gemm.inl.h"

// Some 50 us: whoever is waited for so long is not running, because there are more threads than cores. Then
// yield.
constexpr int kSpins = 1000;

// Between two looks at what another thread does.
SEQ_INLINE void relax(int spins) {
  if (spins >= kSpins) {
    sched_yield();
    return;
  }
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// A barrier that spins until the phase changes: a step of the recurrence is shorter than a futex. One cache
// line for arrivals, one for the release.
struct Barrier {
  alignas(64) int arrived;
  alignas(64) int phase;

  void wait(int size) {
    if (size == 1) return;
    const int now = __atomic_load_n(&phase, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&arrived, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&phase, now + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&phase, __ATOMIC_ACQUIRE) == now;) relax(spins++);
  }
};

// A clock that runs alike on all cores.
SEQ_INLINE int64_t ticks() {
#if defined(__x86_64__)
  return int64_t(__builtin_ia32_rdtsc());
#elif defined(__aarch64__)
  int64_t t;
  __asm__ volatile("mrs %0, cntvct_el0" : "=r"(t));
  return t;
#else
  return 0;
#endif
}

// Blocks of work of which each thread of a group does its share again and again, and waits for the others
// each time. A core may be slower than another for seconds, by a half where neighbours use it too; so after
// each round of such steps the blocks are shared out anew, in proportion to how fast each thread was.
struct Shares {
  struct alignas(64) Busy {
    int64_t ticks[2];  // of the threads' rounds, in turn: nobody overwrites what another still reads
  };
  Busy* busy;              // [size], of the group
  int64_t *first, *count;  // the thread's own; thread i has count[i] blocks from first[i] on
  int size, rank;
  int turn = 0;
  int64_t since = 0, waited = 0;

  // More than that are never one thread's.
  static int64_t most_blocks(int64_t blocks, int size) {
    return min_of(blocks, divide_up(3 * blocks, 2 * int64_t(size)));
  }
  void begin(int64_t blocks) {
    for (int i = 0; i <= size; i++) first[i] = blocks * i / size;
    begin_round();
  }
  void begin_round() { since = ticks(), waited = 0; }
  void wait(Barrier* barrier) {
    if (size == 1) return;
    const int64_t arrival = ticks();
    barrier->wait(size);
    waited += ticks() - arrival;
  }
  // The round is done: to be called before a barrier of the group, and share_anew() after it.
  void report() { busy[rank].ticks[turn] = ticks() - since - waited; }
  void share_anew() {
    const int64_t blocks = first[size], limit = most_blocks(blocks, size);
    const auto block_ticks = [&](int i) {
      return double(max_of(1, busy[i].ticks[turn])) / double(max_of(1, first[i + 1] - first[i]));
    };
    double was = 0, would_be = 0;
    for (int i = 0; i < size; i++) count[i] = 1, was = max_of(was, double(busy[i].ticks[turn]));
    for (int64_t left = blocks - size; left > 0; left--) {  // to whoever would be done first
      int next = -1;
      double end = 0;
      for (int i = 0; i < size; i++) {
        const double then = double(count[i] + 1) * block_ticks(i);
        if (count[i] < limit && (next < 0 || then < end)) next = i, end = then;
      }
      count[next]++;
    }
    for (int i = 0; i < size; i++) would_be = max_of(would_be, double(count[i]) * block_ticks(i));
    if (would_be < kWorthIt * was)
      for (int i = 0; i < size; i++) first[i + 1] = first[i] + count[i];
    turn = 1 - turn;
    begin_round();
  }
  static constexpr double kWorthIt = 0.95;
};

// Tasks 0, 1, 2 ...: each goes to the thread that asks next.
struct Queue {
  alignas(64) int64_t next;

  int64_t take() { return __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); }
};

// Work below this many multiply-adds is not worth waking another thread: 3 us at best, but 20 us where every
// weight is read from L3 and used once.
constexpr double kWorkPerThread = 1e5;

static int threads_for(double work, int64_t most, double work_per_thread = kWorkPerThread) {
  const double threads = work / work_per_thread;
  return threads >= double(most) ? int(most) : threads < 1 ? 1 : int(threads);
}

// body(begin, end) on ranges that together cover [0, n), by whichever threads come: none waits for another.
template <class Body>
static void run_ranges(const Parallel& parallel, int64_t n, const Body& body) {
  if (n <= 1 || parallel.run == nullptr) return body(0, n);
  parallel.run(
      parallel.ctx, n,
      [](void* arg, int64_t begin, int64_t end) { (*static_cast<const Body*>(arg))(begin, end); },
      const_cast<Body*>(&body));
}

// Runs body(id, size) on up to `want` threads at once. A range of several ids may come to one thread (a pool
// that is busy, a nested parallel region); so the threads first count themselves, and `size` is how many
// really came.
template <class Body>
static void run_team(const Parallel& parallel, int want, const Body& body) {
  if (want <= 1 || parallel.run == nullptr) return body(0, 1);
  struct Team {
    const Body& body;
    int64_t want;
    int members = 0;
    int64_t covered = 0;
  } team{body, want};
  parallel.run(
      parallel.ctx, want,
      [](void* arg, int64_t begin, int64_t end) {
        Team& t = *static_cast<Team*>(arg);
        const int id = __atomic_fetch_add(&t.members, 1, __ATOMIC_ACQ_REL);
        __atomic_add_fetch(&t.covered, end - begin, __ATOMIC_ACQ_REL);
        for (int spins = 0; __atomic_load_n(&t.covered, __ATOMIC_ACQUIRE) < t.want;) relax(spins++);
        t.body(id, __atomic_load_n(&t.members, __ATOMIC_ACQUIRE));
      },
      &team);
}

// What one thread writes lies kApart from what another does: prefetchers run some 16 KiB ahead and take away
// lines that the other core is writing. Hardly seen while cores share an L3 cache; where they do not (Zen 5),
// attention in float32 ran at 64 % of the peak instead of 80 % (4 KiB apart: 69 %, 8: 73 %, 16: 78 %, 32 and
// 64: 80 %), a GRU of 16 rows and 128 units at 69 instead of 77 %.
constexpr int64_t kApart = 32 << 10;

template <class T>
constexpr int64_t apart(int64_t neighbours) {
  return neighbours * kApart / int64_t(sizeof(T));
}

template <class T>
struct PerThread {  // a buffer for each thread
  T* first = nullptr;
  int64_t step = 0;
  T* operator[](int64_t id) const { return first + id * step; }
};

// Scratch memory by two passes over the same take() calls: the first counts, the second hands out.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* p = base ? reinterpret_cast<T*>(base + used) : nullptr;
    // The odd line keeps buffers off each other's cache sets.
    used += round_up(n * int64_t(sizeof(T)), 64) + 64;
    return p;
  }
  template <class T>
  T* take_zeros(int64_t n) {  // barriers and queues, as they begin
    T* p = take<T>(n);
    if (p) __builtin_memset(static_cast<void*>(p), 0, n * sizeof(T));
    return p;
  }
  template <class T>
  PerThread<T> take_each(int64_t team, int64_t n) {
    if (n == 0 || team == 1) return {take<T>(n), 0};
    const int64_t step = round_up(n, 64) + apart<T>(1);
    return {take<T>(team * step), step};
  }
  // Memory of a `Buffers` for each thread: Buffers(kernel, arena) takes it from an arena that begins there.
  template <class Buffers, class Kernel>
  PerThread<char> take_buffers(int64_t team, const Kernel& kernel) {
    Arena one;
    Buffers(kernel, one);
    one.used += kApart;
    return {take<char>(team * one.used), one.used};
  }
};

// How every kernel runs: layout() takes its memory, prepare() fills what the threads share, then
// thread(id, size) runs on up to wanted() of them.
template <class Kernel>
static void run_kernel(const Parallel& parallel, Kernel&& kernel) {
  Arena count;
  kernel.layout(count);
  Arena arena{static_cast<char*>(scratch_alloc(count.used))};
  kernel.layout(arena);
  kernel.prepare();
  run_team(parallel, kernel.wanted(), [&](int id, int size) { kernel.thread(id, size); });
  scratch_free(arena.base);
}
