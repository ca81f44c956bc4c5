// Which tokens there are, and what comes before them.
#pragma once

#include "device.h"
#include "recurrence.h"

namespace seqkernels::cuda {

__device__ __forceinline__ int64_t first_token(const Layer& p, int64_t t) {
  return p.offsets ? p.offsets[t] : t * p.B;
}
__device__ __forceinline__ int64_t rows_at(const Layer& p, int64_t t) {
  return p.offsets ? p.offsets[t + 1] - p.offsets[t] : p.B;
}

// Steps that row b takes part in: the first so many, as rows lie by falling length.
__device__ __forceinline__ int64_t steps_of(const Layer& p, int64_t b) {
  if (!p.offsets) return b < p.B ? p.T : 0;
  int64_t lo = 0, hi = p.T;
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if (rows_at(p, mid) > b)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo;
}

// The state before step t of row b is the initial one.
__device__ __forceinline__ bool starts(const Layer& p, int d, int64_t t, int64_t b) {
  const int64_t before = d ? t + 1 : t - 1;
  if (before < 0 || before >= p.T || rows_at(p, before) <= b) return true;
  return p.resets && p.resets[t * p.B + b];
}

// c_{t-1}
template <class S>
__device__ __forceinline__ Acc<S> cell_before(const Layer& p, const void* cells, int d, int64_t t, int64_t b,
                                              int64_t u) {
  if (starts(p, d, t, b)) return load<S>(p.c0, (d * p.B + b) * p.H + u);
  return load<Acc<S>>(cells, ((first_token(p, d ? t + 1 : t - 1) + b) * p.D + d) * p.H + u);
}

}  // namespace seqkernels::cuda
