// How a kernel gets its threads. The caller owns them (torch's pool, std::thread in tests), the kernel only
// asks.
#pragma once

#include <cstdint>

namespace seqkernels {

// run(ctx, n, body, arg) calls body(arg, begin, end) on ranges that together cover [0, n). Ranges given to
// different threads must be running at the same time, because kernels spin on barriers; one thread may be
// given all of [0, n).
struct Parallel {
  int threads = 1;  // how many the kernel may ask for
  void (*run)(void* ctx, int64_t n, void (*body)(void* arg, int64_t begin, int64_t end), void* arg) = nullptr;
  void* ctx = nullptr;
};

}  // namespace seqkernels
