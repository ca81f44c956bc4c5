// y = x W^T + b for M rows: torch.nn.functional.linear, here because attention projects with it, and because
// the layers' packed product reaches 85 % of the peak on Zen 5, where the BLAS that torch calls reaches 35 %.
#pragma once

#include "parallel.h"
#include "types.h"

namespace seqkernels {

struct LinearParams {
  DType dtype = DType::f32;
  int64_t M = 0, N = 0, K = 0;  // rows, outputs, inputs
  const void* x = nullptr;      // [M, K], rows x_m elements apart
  int64_t x_m = 0;
  const void* w = nullptr;  // [N, K]
  Parallel parallel;
};
struct LinearFwdParams : LinearParams {
  const void* b = nullptr;  // [N] or null
  void* y = nullptr;        // [M, N]
};
// What is null is not wanted. dx needs w, dw needs x; db is summed while dw is made, and comes only with it.
struct LinearBwdParams : LinearParams {
  const void* dy = nullptr;  // [M, N], rows dy_m elements apart
  int64_t dy_m = 0;
  void* dx = nullptr;  // [M, K]: dy W
  void* dw = nullptr;  // [N, K]: dy^T x
  void* db = nullptr;  // [N]: sums of dy over its rows
};

void linear_fwd(const LinearFwdParams&);
void linear_bwd(const LinearBwdParams&);

}  // namespace seqkernels
