// What the three layer ops share: checks, allocation, and the bridge from tensors to kernel parameters.
#pragma once

#include <tuple>

#include "kernels/layer.h"
#include "tensor.h"

namespace seqkernels::ops {

// One layer call, checked: sizes and the tensors that every kernel reads, laid as it reads them. Errors name
// the op, what was got and expected.
struct LayerCall {
  const char* op;
  int G;
  int64_t T, B, I, H, P, D, N;  // N tokens
  DType dtype;
  bool has_bias, projected;
  std::vector<int64_t> leading;  // of y and the like: {T, B} or {N}
  OptionalTensor x;

  LayerCall(const char* op, int G, Tensor& x, Tensor& h0, Tensors& weights, OptionalTensor& batch_sizes,
            OptionalTensor& resets, bool bidirectional);

  void fill(LayerParams& p, const Tensor& h0, const Tensors& weights, const OptionalTensor& batch_sizes,
            const OptionalTensor& resets) const;
  void check(Tensor& t, const char* name, Shape shape, bool accumulation = false) const;
  // Direction d's of the layer's weights, or of their gradients; null what the layer does not have.
  Weights<const Tensor*> direction(const Tensors& weights, int64_t d) const;
  // What backward of every cell is given, checked, into the parameters of either device. `gates` of size 0
  // were not saved.
  template <class Params>
  void fill_backward(Params& p, Tensor& y, Tensor* gates, OptionalTensor& dy, OptionalTensor& dhn) const {
    check(y, "y", tokens_by(D * P));
    p.y = y.const_data_ptr();
    if (gates && gates->dim() > 1) {
      check(*gates, "gates", tokens_by(D * kSavedGates * H));
      p.gates = gates->const_data_ptr();
    }
    p.dy = gradient(dy, "dy", tokens_by(D * P));
    p.dhn = gradient(dhn, "dhn", {D, B, P});
  }
  // data of an optional gradient with the given shape, or null
  const void* gradient(OptionalTensor& t, const char* name, Shape shape, bool accumulation = false) const;
  std::vector<int64_t> tokens_by(int64_t columns) const;
};

// One step of a cell, checked, its tensors laid contiguously; lighter than LayerCall because a step at B = 1
// takes microseconds.
struct CellCall {
  const char* op;
  int G;
  int64_t B, I, H;
  DType dtype;
  const Tensor &x, &h, &w_ih, &w_hh;
  const OptionalTensor &b_ih, &b_hh;

  CellCall(const char* op, int G, Tensor& x, Tensor& h, Tensor& w_ih, Tensor& w_hh, OptionalTensor& b_ih,
           OptionalTensor& b_hh);
  void fill(LayerParams& p) const;
  void check(Tensor& t, const char* name, Shape shape) const;
};

// New tensors on the CPU for what backward of every cell returns, given to p; dx of size 0 unless needed.
struct Gradients {
  Tensor dx, dh0;
  Tensors weights;
};
Gradients new_gradients(const LayerCall& call, LayerBwdParams& p, const Tensor& h0, const Tensors& weights,
                        bool need_dx);

// The panels in what op pack_weights returned, if it was made for this call.
const void* checked_panels(const LayerCall& call, const LayerParams& p, const Tensor& panels);

}  // namespace seqkernels::ops
