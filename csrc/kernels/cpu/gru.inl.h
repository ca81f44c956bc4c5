// GRU gate arithmetic, linear before reset.
#pragma once

#include "layer_bwd.inl.h"
#include "layer_fwd.inl.h"
#include "math.inl.h"

struct Gru {
  using FwdParams = GruFwdParams;
  using BwdParams = GruBwdParams;
  // W_hn h + b_hn is multiplied by r before it meets W_in x + b_in, so gate 2 keeps its recurrent part apart
  // (q).
  static constexpr int kGates = 3, kSaved = 4, kSplitGate = 2;
  static constexpr bool kCellState = false, kReluOption = false;
  // Gate gradients lie in slots n, r, z, rn (= r times n's): W_ih meets the first three, W_hh the last three.
  static constexpr int kSlots = 4, kInputSlot[] = {1, 2, 0}, kRecurrentSlot[] = {1, 2, 3};
  static constexpr bool kBypass = true;  // h_{t-1} acts past W_hh too: h_t = ... + z h_{t-1}

  // In two passes, what n's tanh takes and then h_t: see Lstm::fwd.
  template <class S>
  static void fwd(const FwdTile<S>& t) {
    using T = Acc<S>;
    constexpr int W = kLanes<T>;
    for (int64_t b = 0; b < t.rows; b++) {
      T* C = t.C + b * t.ldc;
      for (int64_t u = 0; u < t.units; u += W) {
        const Vec<T> r = sigmoid<T>(load(C + u)), q = load(t.q + b * t.ldq + u);
        store(C + 2 * t.gate + u, load(C + 2 * t.gate + u) + r * q);
        if (t.gates) t.save(b, 0, u, r), t.save(b, 3, u, q);
      }
    }
    for (int64_t b = 0; b < t.rows; b++) {
      const T* C = t.C + b * t.ldc;
      for (int64_t u = 0; u < t.units; u += W) {
        const int64_t m = t.units - u;
        const Vec<T> z = sigmoid<T>(load(C + t.gate + u)), n = tanh<T>(load(C + 2 * t.gate + u));
        const Vec<T> h = n + z * (load(t.h_prev + b * t.ldh_prev + u) - n);
        store(t.h + b * t.ldh + u, h, m);
        if (t.y) store(t.y + b * t.ldy + u, h, m);
        if (t.gates) t.save(b, 1, u, z), t.save(b, 2, u, n);
      }
    }
  }

  template <class S>
  static void bwd(const BwdTile<S>& t) {
    using T = Acc<S>;
    constexpr int W = kLanes<T>;
    for (int64_t b = 0; b < t.rows; b++) {
      for (int64_t u = 0; u < t.units; u += W) {
        const int64_t m = t.units - u;
        const S* gates = t.gates + b * t.ldgates + u;
        const Vec<T> r = load(gates, m), z = load(gates + t.H, m), n = load(gates + 2 * t.H, m),
                     q = load(gates + 3 * t.H, m);
        T* dh_at = t.dh + b * t.lddh + u;
        Vec<T> dh = load(dh_at);
        if (t.dy) dh += load(t.dy + b * t.lddy + u, m);
        const Vec<T> dn = dh * (T(1) - z) * (T(1) - n * n);
        Operand<S>* dG = t.dG + b * t.lddG + u;
        store(dG, dn, m);
        store(dG + t.H, dn * q * (r * (T(1) - r)), m);
        store(dG + 2 * t.H, dh * (load(t.h_prev + b * t.ldh_prev + u, m) - n) * (z * (T(1) - z)), m);
        store(dG + 3 * t.H, dn * r, m);
        store(dh_at, dh * z);
      }
    }
  }
};
