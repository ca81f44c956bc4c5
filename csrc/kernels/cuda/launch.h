// Launches that say what failed. All kernels take one struct by value. The tests' emulation brings its own.
#pragma once

#include "device.h"
#include "plan.h"
#include "recurrence.h"

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace seqkernels::cuda {

inline void check(cudaError_t error, const char* what, int64_t grid, int64_t shared, int threads = kThreads) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or torch would find it later
  throw std::runtime_error(std::string("seqkernels: CUDA kernel ") + what + " (" + std::to_string(grid) +
                           " blocks of " + std::to_string(threads) + " threads, " + std::to_string(shared) +
                           " bytes of shared memory): " + cudaGetErrorString(error));
}

// Enough threads for `work` items, and never more than 2^31 - 1 blocks: the kernels walk in strides of the
// grid.
template <class Args>
void launch(void (*kernel)(Args), const char* name, const Args& args, int64_t work, Stream stream) {
  if (work == 0) return;
  const int64_t blocks = (work + kThreads - 1) / kThreads, grid = blocks < (1 << 20) ? blocks : 1 << 20;
  void* arguments[] = {const_cast<Args*>(&args)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(grid), dim3(kThreads), arguments, 0,
                         static_cast<cudaStream_t>(stream)),
        name, grid, 0);
}

// Blocks of single.cuh, which never wait for each other.
template <class Args>
void launch_apart(void (*kernel)(Args), const char* name, const Args& args, Stream stream) {
  void* arguments[] = {const_cast<Args*>(&args)};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(args.plan.grid), dim3(kSingleThreads),
                         arguments, args.plan.shared, static_cast<cudaStream_t>(stream)),
        name, args.plan.grid, args.plan.shared, kSingleThreads);
}

// All blocks resident at the same time, or an error: blocks that wait for each other cannot hang. The plan is
// from machine_for(), which has allowed the kernel its shared memory; an attribute set here, as large as this
// launch needs, would fail the larger one of another thread.
template <class Args>
void launch_together(void (*kernel)(Args), const char* name, const Args& args, Stream stream) {
  const Plan& plan = args.plan;
  if (plan.exchange_bytes > 0)
    check(cudaMemsetAsync(args.exchange, 0xff, plan.exchange_bytes, static_cast<cudaStream_t>(stream)), name,
          plan.grid, plan.shared);
  void* arguments[] = {const_cast<Args*>(&args)};
  check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(plan.grid), dim3(kThreads),
                                    arguments, plan.shared, static_cast<cudaStream_t>(stream)),
        name, plan.grid, plan.shared);
}

// The current device, asked once per kernel, which is then allowed all shared memory that a block may have
// there: no multiprocessors if such a block cannot be resident, or the device knows no cooperative launch.
// What the kernel has statically counts: cubins of sm_90 and newer list 1 KB that nobody declared, and with a
// byte too many every layer would go step by step. What fails, for lack of memory for the code say, is asked
// again next time.
template <class Args>
Machine machine_for(void (*kernel)(Args), int threads) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, Machine> known;
  int device = 0, count = 0, shared = 0, cooperative = 0, resident = 0;
  cudaGetDevice(&device);
  const std::lock_guard lock(mutex);
  const std::pair key{reinterpret_cast<const void*>(kernel), device};
  if (const auto at = known.find(key); at != known.end()) return at->second;
  cudaFuncAttributes has{};
  bool told = true;
  const auto ask = [&](cudaError_t answer) { told &= answer == cudaSuccess; };
  ask(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  ask(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  ask(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device));
  ask(cudaFuncGetAttributes(&has, kernel));
  shared -= static_cast<int>(has.sharedSizeBytes);
  ask(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  ask(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, shared));
  cudaGetLastError();
  const Machine machine{told && cooperative && resident > 0 ? count : 0, shared};
  return told ? known[key] = machine : machine;
}

}  // namespace seqkernels::cuda

#endif
