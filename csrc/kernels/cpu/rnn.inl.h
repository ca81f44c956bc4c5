// Elman RNN arithmetic.
#pragma once

#include "layer_bwd.inl.h"
#include "layer_fwd.inl.h"
#include "math.inl.h"

struct Rnn {
  using FwdParams = RnnFwdParams;
  using BwdParams = RnnBwdParams;
  static constexpr int kGates = 1, kSaved = 0, kSplitGate = -1;
  static constexpr bool kCellState = false, kReluOption = true;  // instead of tanh
  static constexpr int kSlots = 1, kInputSlot[] = {0}, kRecurrentSlot[] = {0};
  static constexpr bool kBypass = false;

  template <class S>
  static void fwd(const FwdTile<S>& t) {
    using T = Acc<S>;
    constexpr int W = kLanes<T>;
    for (int64_t b = 0; b < t.rows; b++) {
      for (int64_t u = 0; u < t.units; u += W) {
        const Vec<T> a = load(t.C + b * t.ldc + u);
        const Vec<T> h = t.relu ? (a < T(0) ? Vec<T>{} : a) : tanh<T>(a);  // NaN stays
        store(t.h + b * t.ldh + u, h, t.units - u);
        store(t.y + b * t.ldy + u, h, t.units - u);
      }
    }
  }

  template <class S>
  static void bwd(const BwdTile<S>& t) {
    using T = Acc<S>;
    constexpr int W = kLanes<T>;
    for (int64_t b = 0; b < t.rows; b++) {
      for (int64_t u = 0; u < t.units; u += W) {
        const int64_t n = t.units - u;
        const Vec<T> y = load(t.y + b * t.ldy + u, n);
        Vec<T> dh = load(t.dh + b * t.lddh + u);
        if (t.dy) dh += load(t.dy + b * t.lddy + u, n);
        store(t.dG + b * t.lddG + u, t.relu ? (y <= T(0) ? Vec<T>{} : dh) : dh * (T(1) - y * y), n);
      }
    }
  }
};
