// What LSTM, GRU and RNN layers share: one layer, one or two directions, all time steps, input projection
// included.
//
//   T steps, B rows, I inputs, H hidden units, P output units (P = H without projection), D directions.
//   A *token* is one (t, b) pair. Dense sequences have T * B tokens, token (t, b) at row t * B + b.
//   Packed sequences have sum(batch_sizes) tokens as torch's PackedSequence lies: step t holds rows [0,
//   batch_sizes[t]). batch_sizes never increases; rows at and beyond batch_sizes[0] have length zero: their
//   final state is the initial.
// All pointers of one call have the element type `dtype` unless said otherwise; `acc` below means float, or
// double for f64.
#pragma once

#include <cstdint>

#include "parallel.h"
#include "types.h"

namespace seqkernels {

// One direction's parameters in torch's layout and gate order: w_ih [G*H, I], w_hh [G*H, P], b_ih and b_hh
// [G*H] (both or neither), w_hr [P, H] (LSTM with projection, else null). Rows are contiguous.
template <class Ptr>
struct Weights {
  Ptr w_ih{}, w_hh{}, b_ih{}, b_hh{}, w_hr{};
};

struct LayerParams {
  DType dtype = DType::f32;
  int64_t T = 0, B = 0, I = 0, H = 0, P = 0;
  int D = 1;  // 2: the second direction walks time backwards, each row from its own last token

  const int64_t* batch_sizes = nullptr;  // [T] packed, or null: dense
  const uint8_t* resets = nullptr;  // [T, B] bool or null: the state before step t becomes the initial state

  const void* x = nullptr;  // [T, B, I] by strides, or packed [tokens, I]
  // Elements from step to step and from row to row; packed: x_b from token to token.
  int64_t x_t = 0, x_b = 0;
  const void* h0 = nullptr;      // [D, B, P]
  Weights<const void*> w[2];     // [D]
  const void* panels = nullptr;  // forward: the weights as *_pack() wrote them, or null

  Parallel parallel;
};

constexpr int kSavedGates = 4;  // activations of a unit: LSTM i f g o, GRU r z n q

struct LayerFwdParams : LayerParams {
  void* y = nullptr;      // [tokens, D*P]
  void* hn = nullptr;     // [D, B, P], or null: not wanted
  void* gates = nullptr;  // [tokens, D, kSavedGates*H] activations for backward, or null: not saved
};

struct LayerBwdParams : LayerParams {
  const void* y = nullptr;      // [tokens, D*P] from forward
  const void* gates = nullptr;  // from forward, or null: rebuilt from x, y (and cells)
  const void* dy = nullptr;     // [tokens, D*P] or null: zero
  const void* dhn = nullptr;    // [D, B, P] or null: zero
  void* dx = nullptr;           // [tokens, I]
  void* dh0 = nullptr;          // [D, B, P]
  Weights<void*> dw[2];         // like w
};

}  // namespace seqkernels
