// One step: after the caller's GEMM, all else in one kernel. A thread takes one unit of one row; everything
// is read and written once, neighbours in a warp are neighbours in memory. Forward reads per unit and row 2 G
// elements of products and writes h twice (y, state), so the limit is launches (4 to 6 us for GEMM and
// kernel, computed) up to some B * H = 10^5, then bandwidth.
#pragma once

#include "gates.cuh"
#include "launch.h"

namespace seqkernels::cuda {

__device__ __forceinline__ int64_t first_item() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t item_stride() { return int64_t(gridDim.x) * blockDim.x; }

template <class S>
__device__ __forceinline__ Acc<S> or_zero(const void* from, int64_t i) {
  return from ? load<S>(from, i) : Acc<S>(0);
}

template <class Cell, class S>
__global__ void step_fwd_kernel(const FwdStep p) {
  using A = Acc<S>;
  const int d = p.d;
  for (int64_t i = first_item(); i < p.rows * p.H; i += item_stride()) {
    const int64_t b = i / p.H, u = i % p.H, token = p.token + b;
    A x[Cell::kGates], h[Cell::kGates];
    for (int g = 0; g < Cell::kGates; g++) {
      const int64_t row = g * p.H + u;
      x[g] = load<S>(p.xw[d], token * Cell::kGates * p.H + row) + or_zero<S>(p.b_ih[d], row);
      h[g] = load<S>(p.hw, b * Cell::kGates * p.H + row) + or_zero<S>(p.b_hh[d], row);
    }
    const int64_t at = (d * p.B + b) * p.H + u;
    A state = A(0), c = A(0), saved[Cell::kSaved + 1];
    if (!p.only_gates && !p.m) state = load<S>(p.hn ? p.hn : p.h0, at);
    if (!p.only_gates && Cell::kCellState) c = p.c ? load<A>(p.c, at) : load<S>(p.c0, at);
    Cell::template forward<Arithmetic<S>>(x, h, state, c, saved, p.relu);
    if (p.y) state = rounded<S>(state);
    store_fwd<Cell, S>(p, (token * p.D + d) * p.H + u, u, state, c, saved);
    if (p.only_gates) continue;
    if (Cell::kCellState) store<S>(c, p.cn, at);
    const bool reset = p.resets && p.next >= 0 && p.resets[p.next * p.B + b];
    if (Cell::kCellState && p.c) store<A>(reset ? load<S>(p.c0, at) : c, p.c, at);
    if (p.m)
      store<S>(state, p.m, i);
    else if (p.hn)
      store<S>(reset ? load<S>(p.h0, at) : state, p.hn, at);
  }
}

// The gradient of h_t (state by state like dh) from all later steps. Where step `next` was reset, it belongs
// to the initial state.
template <class S>
__device__ __forceinline__ Acc<S> arriving(const BwdStep& p, int64_t b, int64_t u) {
  using A = Acc<S>;
  const int64_t at = (p.d * p.B + b) * p.P + u;
  A dh = load<A>(p.dh, at);
  if (b < p.product_rows) dh += load<S>(p.product, b * p.P + u);
  if (p.resets && p.next >= 0 && p.resets[p.next * p.B + b]) {
    store<A>(load<A>(p.dh_reset, at) + dh, p.dh_reset, at);
    dh = A(0);
  }
  return dh;
}

// Those of this step, and those whose product with the step before still waits; in the end all.
__host__ __device__ __forceinline__ int64_t rows_touched(const BwdStep& p) {
  return p.rows == 0 ? p.B : p.rows > p.product_rows ? p.rows : p.product_rows;
}

template <class Cell, class S>
__global__ void step_bwd_kernel(const BwdStep p) {
  using A = Acc<S>;
  const int d = p.d;
  const bool last = p.rows == 0;
  for (int64_t i = first_item(); i < rows_touched(p) * p.H; i += item_stride()) {
    const int64_t b = i / p.H, u = i % p.H, at = (d * p.B + b) * p.H + u;
    A dh = p.dm ? (b < p.rows ? load<S>(p.dm, b * p.H + u) : A(0)) : arriving<S>(p, b, u);
    A dc = A(0);
    if (Cell::kCellState) {
      dc = load<A>(p.dc, at);
      if (p.resets && p.next >= 0 && p.resets[p.next * p.B + b]) {
        store<A>(load<A>(p.dc_reset, at) + dc, p.dc_reset, at);
        dc = A(0);
      }
    }
    if (b < p.rows) {
      if (!p.dm) dh += or_zero<S>(p.dy, ((p.token + b) * p.D + d) * p.H + u);
      A slots[Cell::kSlots];
      backward_unit<Cell, S>(p, load_saved<Cell, S>(p, d, p.t, b, u), dh, dc, slots);
      store_bwd<Cell, S>(p, ((p.token + b) * p.D + d) * p.H + u, u, slots);
      if constexpr (Cell::kCellState)
        if (p.m) {
          const int64_t row = (p.token + b) * p.D + d;
          const A o = load<S>(p.gates, (row * Cell::kSaved + Cell::kOutputGate) * p.H + u);
          store<S>(o * Arithmetic<S>::tanh(load<A>(p.cells, row * p.H + u)), p.m, b * p.H + u);
        }
    }
    if (!p.dm) store<A>(dh, p.dh, at);
    if (Cell::kCellState) store<A>(dc, p.dc, at);
    if (last) {
      if (!p.dm) store<S>(dh + or_zero<A>(p.dh_reset, at), p.dh0, at);
      if (Cell::kCellState) store<S>(dc + or_zero<A>(p.dc_reset, at), p.dc0, at);
    }
  }
}

// of(S()) for the dtype's S
template <class F>
auto with_type(DType dtype, const F& of) {
  switch (dtype) {
    case DType::f32:
      return of(float());
    case DType::f64:
      return of(double());
    case DType::bf16:
      return of(bf16());
    default:
      return of(f16());
  }
}

template <class Cell>
void Recurrence<Cell>::step_fwd(const FwdStep& p, Stream stream) {
  with_type(p.dtype,
            [&](auto s) { launch(step_fwd_kernel<Cell, decltype(s)>, "step_fwd", p, p.rows * p.H, stream); });
}
template <class Cell>
void Recurrence<Cell>::step_bwd(const BwdStep& p, Stream stream) {
  with_type(p.dtype, [&](auto s) {
    launch(step_bwd_kernel<Cell, decltype(s)>, "step_bwd", p, rows_touched(p) * p.H, stream);
  });
}

}  // namespace seqkernels::cuda
