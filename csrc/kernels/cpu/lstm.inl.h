// LSTM gate arithmetic.
#pragma once

#include "layer_bwd.inl.h"
#include "layer_fwd.inl.h"
#include "math.inl.h"

struct Lstm {
  using FwdParams = LstmFwdParams;
  using BwdParams = LstmBwdParams;
  static constexpr int kGates = 4, kSaved = 4, kSplitGate = -1;
  static constexpr bool kCellState = true, kReluOption = false;
  // Gate gradients lie in slots; both products read all four.
  static constexpr int kSlots = 4, kInputSlot[] = {0, 1, 2, 3}, kRecurrentSlot[] = {0, 1, 2, 3};
  static constexpr bool kBypass = false;  // h_{t-1} acts through W_hh only

  // In two passes, c_t then h_t: a chain of two activations is 140 cycles long, and the scheduler holds less
  // than two vectors of it (71 cycles each in one pass, 57 in two, 50 with shorter polynomials).
  template <class S>
  static void fwd(const FwdTile<S>& t) {
    using T = Acc<S>;
    constexpr int W = kLanes<T>;
    for (int64_t b = 0; b < t.rows; b++) {
      const T* C = t.C + b * t.ldc;
      for (int64_t u = 0; u < t.units; u += W) {
        const Vec<T> i = sigmoid<T>(load(C + u)), f = sigmoid<T>(load(C + t.gate + u)),
                     g = tanh<T>(load(C + 2 * t.gate + u));
        T* cell = t.c + b * t.ldcell + u;
        const Vec<T> c = f * load(cell) + i * g;
        store(cell, c);
        if (t.cells) store(t.cells + b * t.ldcells + u, c, t.units - u);
        if (t.gates) t.save(b, 0, u, i), t.save(b, 1, u, f), t.save(b, 2, u, g);
      }
    }
    for (int64_t b = 0; b < t.rows; b++) {
      const T* C = t.C + b * t.ldc + 3 * t.gate;
      for (int64_t u = 0; u < t.units; u += W) {
        const int64_t n = t.units - u;
        const Vec<T> o = sigmoid<T>(load(C + u)), h = o * tanh<T>(load(t.c + b * t.ldcell + u));
        store(t.h + b * t.ldh + u, h, n);
        if (t.y) store(t.y + b * t.ldy + u, h, n);
        if (t.gates) t.save(b, 3, u, o);
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
        const S* gates = t.gates + b * t.ldgates + u;
        const Vec<T> i = load(gates, n), f = load(gates + t.H, n), g = load(gates + 2 * t.H, n),
                     o = load(gates + 3 * t.H, n);
        const Vec<T> tanh_c = tanh<T>(load(t.c + b * t.ldc + u, n));
        Vec<T> dh = load(t.dh + b * t.lddh + u);
        if (t.dy) dh += load(t.dy + b * t.lddy + u, n);
        Vec<T> dc = load(t.dc + b * t.lddc + u) + dh * o * (T(1) - tanh_c * tanh_c);
        if (t.dcells) dc += load(t.dcells + b * t.lddcells + u, n);
        Operand<S>* dG = t.dG + b * t.lddG + u;
        store(dG, dc * g * (i * (T(1) - i)), n);
        store(dG + t.H, dc * load(t.c_prev + b * t.ldc_prev + u, n) * (f * (T(1) - f)), n);
        store(dG + 2 * t.H, dc * i * (T(1) - g * g), n);
        store(dG + 3 * t.H, dh * tanh_c * (o * (T(1) - o)), n);
        store(t.dc + b * t.lddc + u, dc * f);
        if (t.m) store(t.m + b * t.ldm + u, o * tanh_c, n);
      }
    }
  }
};
