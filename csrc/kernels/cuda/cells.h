// Gate arithmetic of LSTM, GRU and RNN for one unit of one row: the same source in every CUDA kernel and, on
// the CPU, in the tests. Equations, gate order and saved activations: kernels/{lstm,gru,rnn}.h.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define SEQKERNELS_CELL __host__ __device__ __forceinline__
#else
#define SEQKERNELS_CELL inline
#endif

namespace seqkernels::cuda {

// On a GPU without the last half bit, and without the branches that it costs.
SEQKERNELS_CELL float reciprocal(float a) {
#if defined(__CUDA_ARCH__)
  return __fdividef(1.0f, a);
#else
  return 1.0f / a;
#endif
}
SEQKERNELS_CELL float power_of_two(float a) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(a));
  return power;
#else
  return exp2f(a);
#endif
}

// For tensors of floats and doubles.
struct Exact {
  static SEQKERNELS_CELL float sigmoid(float a) { return reciprocal(1.0f + expf(-a)); }
  static SEQKERNELS_CELL double sigmoid(double a) { return 1.0 / (1.0 + exp(-a)); }
  static SEQKERNELS_CELL float tanh(float a) { return tanhf(a); }
  static SEQKERNELS_CELL double tanh(double a) { return ::tanh(a); }
};
// For half types, which round to 2^-9 and 2^-12: errors up to 2^-22 (computed), in four and five
// instructions.
struct Quick {
  static constexpr float kLog2e = 1.44269504f;
  static SEQKERNELS_CELL float sigmoid(float a) { return reciprocal(1.0f + power_of_two(-kLog2e * a)); }
  static SEQKERNELS_CELL float tanh(float a) {
    return 1.0f - 2.0f * reciprocal(1.0f + power_of_two(2 * kLog2e * a));
  }
};

// What backward knows of the step beside the saved activations.
template <class T>
struct Past {
  T c, c_prev;  // LSTM
  T h;          // GRU h_{t-1}, RNN y
};

// A is Exact or Quick. forward(x, h, state, c, saved): x and h are both sides of each gate with their biases;
// state goes from h_{t-1} to h_t, c from c_{t-1} to c_t. backward(saved, past, dh, dc, dG): dh and dc go from
// gradients of h_t and c_t to what reaches h_{t-1} past the recurrent product and c_{t-1}; dG are the
// gradients of the gates, in slots: W_ih meets kGates slots from kInputSlot on, W_hh the first kGates, of
// gate g recurrent_slot(g).
struct Lstm {
  static constexpr int kOutputGate = 3;
  static constexpr int kGates = 4, kSaved = 4, kSlots = 4, kInputSlot = 0;
  static constexpr int recurrent_slot(int gate) { return gate; }
  static constexpr bool kCellState = true, kNeedsPreviousH = false;

  template <class A, class T>
  SEQKERNELS_CELL static void forward(const T* x, const T* h, T& state, T& c, T* saved, bool) {
    const T i = A::sigmoid(x[0] + h[0]), f = A::sigmoid(x[1] + h[1]);
    const T g = A::tanh(x[2] + h[2]), o = A::sigmoid(x[3] + h[3]);
    c = f * c + i * g;
    state = o * A::tanh(c);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
  }
  template <class A, class T>
  SEQKERNELS_CELL static void backward(const T* saved, const Past<T>& past, T& dh, T& dc, T* dG, bool) {
    const T i = saved[0], f = saved[1], g = saved[2], o = saved[3], tanh_c = A::tanh(past.c);
    dc += dh * o * (T(1) - tanh_c * tanh_c);
    dG[0] = dc * g * (i * (T(1) - i));
    dG[1] = dc * past.c_prev * (f * (T(1) - f));
    dG[2] = dc * i * (T(1) - g * g);
    dG[3] = dh * tanh_c * (o * (T(1) - o));
    dh = T(0);
    dc *= f;
  }
};

struct Gru {
  // Slots rn (r times n's), r, z, n: those of either side lie together, and a sum over them adds n's, the
  // largest, last. With n's first float32 gradients of x had 2.8 times the error (H 512, simulated).
  static constexpr int kGates = 3, kSaved = 4, kSlots = 4, kInputSlot = 1;
  static constexpr int recurrent_slot(int gate) { return (gate + 1) % 3; }
  static constexpr bool kCellState = false, kNeedsPreviousH = true;

  template <class A, class T>
  SEQKERNELS_CELL static void forward(const T* x, const T* h, T& state, T&, T* saved, bool) {
    const T r = A::sigmoid(x[0] + h[0]), z = A::sigmoid(x[1] + h[1]), q = h[2];
    const T n = A::tanh(x[2] + r * q);
    state = n + z * (state - n);
    saved[0] = r, saved[1] = z, saved[2] = n, saved[3] = q;
  }
  template <class A, class T>
  SEQKERNELS_CELL static void backward(const T* saved, const Past<T>& past, T& dh, T&, T* dG, bool) {
    const T r = saved[0], z = saved[1], n = saved[2], q = saved[3];
    const T dn = dh * (T(1) - z) * (T(1) - n * n);
    dG[0] = dn * r;
    dG[1] = dn * q * (r * (T(1) - r));
    dG[2] = dh * (past.h - n) * (z * (T(1) - z));
    dG[3] = dn;
    dh *= z;
  }
};

struct Rnn {
  static constexpr int kGates = 1, kSaved = 0, kSlots = 1, kInputSlot = 0;
  static constexpr int recurrent_slot(int gate) { return gate; }
  static constexpr bool kCellState = false, kNeedsPreviousH = false;

  template <class A, class T>
  SEQKERNELS_CELL static void forward(const T* x, const T* h, T& state, T&, T*, bool relu) {
    const T a = x[0] + h[0];
    state = relu ? (a < T(0) ? T(0) : a) : A::tanh(a);  // NaN stays
  }
  template <class A, class T>
  SEQKERNELS_CELL static void backward(const T*, const Past<T>& past, T& dh, T&, T* dG, bool relu) {
    dG[0] = relu ? (past.h <= T(0) ? T(0) : dh) : dh * (T(1) - past.h * past.h);
    dh = T(0);
  }
};

}  // namespace seqkernels::cuda
