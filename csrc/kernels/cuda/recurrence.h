// The recurrence of a layer on an NVIDIA GPU: what the bindings call. Products of all tokens at once (input
// projection, dx, weight gradients) are GEMMs and belong to the caller; what remains per step is here, in two
// forms:
//   persistent  the whole sequence in one launch, weights on chip (persistent.cuh, single.cuh)
//   stepwise    per step one GEMM by the caller and one fused kernel (step.cuh): any size, any dtype
// All pointers are of the device. Shapes as in kernels/layer.h, but xw and h_prev are [D, tokens, ...], so
// that each direction is one matrix.
#pragma once

#include <cstdint>

#include "kernels/types.h"
#include "plan.h"

namespace seqkernels::cuda {

using Stream = void*;  // cudaStream_t

struct Layer {
  DType dtype = DType::f32;
  int64_t T = 0, B = 0, H = 0, P = 0;
  int D = 1;
  bool relu = false;                 // RNN
  bool tf32 = false;                 // products of float32 may be of TF32
  const int64_t* offsets = nullptr;  // [T + 1] first token of each step, or null: t * B
  const uint8_t* resets = nullptr;   // [T, B]
  const void* h0 = nullptr;          // [D, B, P]
  const void* c0 = nullptr;          // [D, B, H]
  const void* w_hh[2] = {};          // [G*H, P]
  Plan plan;                         // persistent only, with
  void* exchange = nullptr;          // plan.exchange_bytes, blocks' states or gradients
};

struct FwdLayer : Layer {
  const void* xw[2] = {};                   // x W_ih^T, [tokens, G*H], without bias
  const void *b_ih[2] = {}, *b_hh[2] = {};  // or null
  void* y = nullptr;                        // [tokens, D*P]
  // [D, B, P]; stepwise it is also the state: it starts as h0. Null: one step from h0 to y.
  void* hn = nullptr;
  void* cn = nullptr;     // [D, B, H]
  void* c = nullptr;      // stepwise: acc [D, B, H], the state; starts as c0. Null: one step from c0 to cn
  void* cells = nullptr;  // acc, or null
  void* gates = nullptr;  // or null
};

// One step of one direction, or of all tokens at once to rebuild the gates.
struct FwdStep : FwdLayer {
  int d = 0;
  int64_t rows = 0;
  int64_t token = 0;         // the first
  int64_t next = -1;         // the step to come, or -1: none
  const void* hw = nullptr;  // h_{t-1} W_hh^T, [rows, G*H]
  void* m = nullptr;         // with projection [rows, H]: o tanh(c) goes here, not to y and hn
  bool only_gates = false;
};

struct BwdLayer : Layer {
  const void* gates = nullptr;
  const void* y = nullptr;
  const void* cells = nullptr;
  const void* h_prev[2] = {};  // [tokens, P], by previous()
  const void *dy = nullptr, *dhn = nullptr, *dcn = nullptr, *dcells = nullptr;
  void* dG = nullptr;                   // [tokens, D*slots*H]
  void *dh0 = nullptr, *dc0 = nullptr;  // [D, B, P], [D, B, H]
  void *dh = nullptr, *dc = nullptr;    // stepwise: acc [D, B, P], [D, B, H]; start as dhn and dcn, or zeros
  void *dh_reset = nullptr, *dc_reset = nullptr;  // stepwise with resets: acc zeros like dh and dc
};

struct BwdStep : BwdLayer {
  int d = 0;
  int64_t t = 0, rows = 0;
  int64_t token = 0;
  int64_t next = -1;              // the step after this one in time, done just before it; -1: none
  const void* product = nullptr;  // [product_rows, P]: dG W_hh of that step
  int64_t product_rows = 0;
  void* dh_now = nullptr;    // with projection: [rows, P], gradient of h_t
  const void* dm = nullptr;  // with projection: [rows, H], dh_now W_hr
  void* m = nullptr;         // with projection: [rows, H], o tanh(c) again
};

template <class Cell>
struct Recurrence {
  static void fwd(const FwdLayer&, Stream);  // persistent
  static void bwd(const BwdLayer&, Stream);
  static Plan plan_fwd(const Layer&), plan_bwd(const Layer&);

  static void step_fwd(const FwdStep&, Stream);
  static void step_bwd(const BwdStep&, Stream);
};

// With projection: h_t as the GEMM left it, [rows, P] at `product`, to y and the state.
void project_fwd(const FwdStep&, const void* product, Stream);
// With projection: the gradient of h_t to dh_now; without rows, the last step, it goes to dh0.
void project_bwd(const BwdStep&, Stream);
// h_{t-1} of every token: to[d] [tokens, P].
void previous(const Layer&, const void* y, void* const (&to)[2], Stream);
// `count` integers of the host to `to`, as arguments of launches: no copy to wait for, and CUDA graphs can
// record it.
void upload(const int64_t* from, int64_t count, int64_t* to, Stream);

}  // namespace seqkernels::cuda
