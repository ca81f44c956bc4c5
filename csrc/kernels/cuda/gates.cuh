// One unit of one token: what step.cuh and persistent.cuh do once the products are there. single.cuh does the
// same for neighbouring units at once.
#pragma once

#include <type_traits>

#include "cells.h"
#include "sequence.cuh"

namespace seqkernels::cuda {

template <class S>
using Arithmetic = std::conditional_t<sizeof(S) == 2, Quick, Exact>;

// h_t, c_t and the saved activations to y, cells and gates; `at` is the place of the unit in y.
template <class Cell, class S>
__device__ __forceinline__ void store_fwd(const FwdLayer& p, int64_t at, int64_t u, Acc<S> h, Acc<S> c,
                                          const Acc<S>* saved) {
  if (p.y) store<S>(h, p.y, at);
  if (Cell::kCellState && p.cells) store<Acc<S>>(c, p.cells, at);
  if (p.gates)
    for (int s = 0; s < Cell::kSaved; s++) store<S>(saved[s], p.gates, (at - u) * Cell::kSaved + s * p.H + u);
}

// What a step backward reads of memory, as it lies there. Nothing in it depends on other steps' gradients.
template <class Cell, class S>
struct Saved {
  InFlight<S> gates[Cell::kSaved + 1];
  InFlight<S> h;         // GRU h_{t-1}, RNN y
  Acc<S> c, c_prev, dc;  // LSTM
};

template <class Cell, class S>
__device__ __forceinline__ Saved<Cell, S> load_saved(const BwdLayer& p, int d, int64_t t, int64_t b,
                                                     int64_t u) {
  const int64_t token = first_token(p, t) + b, at = (token * p.D + d) * p.H + u;
  Saved<Cell, S> saved{};
  for (int s = 0; s < Cell::kSaved; s++)
    saved.gates[s] = issue_load<S>(p.gates, (at - u) * Cell::kSaved + s * p.H + u);
  if (Cell::kCellState) {
    saved.c = load<Acc<S>>(p.cells, at);
    saved.c_prev = cell_before<S>(p, p.cells, d, t, b, u);
    if (p.dcells) saved.dc = load<Acc<S>>(p.dcells, at);
  }
  if (Cell::kNeedsPreviousH) saved.h = issue_load<S>(p.h_prev[d], token * p.H + u);
  if (Cell::kSaved == 0) saved.h = issue_load<S>(p.y, at);
  return saved;
}

// dh, dc, slots: see cells.h.
template <class Cell, class S>
__device__ __forceinline__ void backward_unit(const BwdLayer& p, const Saved<Cell, S>& saved, Acc<S>& dh,
                                              Acc<S>& dc, Acc<S>* slots) {
  Acc<S> gates[Cell::kSaved + 1];
  for (int s = 0; s < Cell::kSaved; s++) gates[s] = widen(loaded<S>(saved.gates[s]));
  const Acc<S> h = widen(loaded<S>(saved.h));
  const Past<Acc<S>> past{saved.c, saved.c_prev, h};
  dc += saved.dc;
  Cell::template backward<Arithmetic<S>>(gates, past, dh, dc, slots, p.relu);
}

// The gate gradients to dG.
template <class Cell, class S>
__device__ __forceinline__ void store_bwd(const BwdLayer& p, int64_t at, int64_t u, const Acc<S>* slots) {
  for (int s = 0; s < Cell::kSlots; s++) store<S>(slots[s], p.dG, (at - u) * Cell::kSlots + s * p.H + u);
}

}  // namespace seqkernels::cuda
