// The layer ops for CUDA tensors. Products of all tokens at once go to torch's GEMM, the recurrence to
// kernels/cuda: persistent where a plan fits the GPU, else step by step with a GEMM of torch for each. No
// Python in the loop, nothing waits for the device, and a CUDA graph can record every call.
#pragma once

#include <initializer_list>

#include "kernels/cuda/cells.h"
#include "kernels/cuda/recurrence.h"
#include "recurrent.h"

// Tests build these bindings a second time, for CPU tensors, over kernels that an emulation runs.
#ifndef SEQKERNELS_GPU_LIBRARY
#define SEQKERNELS_GPU_LIBRARY seqkernels
#define SEQKERNELS_GPU_KEY CUDA
#endif

namespace seqkernels::ops {

// Makes the device of x the current one; its current stream.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x);
  cuda::Stream stream() const { return stream_; }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  cuda::Stream stream_ = nullptr;
};

// Autograd refuses ops with `out` on weights that require gradients, which exported programs pass.
class NoGrad {
 public:
  NoGrad() { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }
  NoGrad(const NoGrad&) = delete;

 private:
  const bool before_ = aoti_torch_grad_mode_is_enabled();
};

// out = a b; variants with `out` are what autocast leaves alone. Nothing here adds to a product,
// because the stable ABI cannot pass the scalars of addmm.
void multiply(const Tensor& a, const Tensor& b, Tensor out);
void sum_rows(const Tensor& a, Tensor out);
bool allows_tf32(DType dtype);  // as torch's GEMM asks whenever it runs
Tensor transposed(const Tensor& matrix);
Tensor rows(const Tensor& t, int64_t begin, int64_t count);
Tensor columns(const Tensor& t, int64_t begin, int64_t count);
Tensor matrix(const Tensor& t, int64_t n, int64_t columns);  // a view if t lies so, else a copy

struct GpuGradients {
  OptionalTensor dx;
  Tensor dh0;
  OptionalTensor dc0;
  Tensors weights;
};
GpuGradients new_gradients(const LayerCall& call, const Tensor& h0, const OptionalTensor& c0,
                           const Tensors& weights, bool need_dx);

template <class Cell>
class GpuLayer {
 public:
  static constexpr int G = Cell::kGates;

  GpuLayer(const LayerCall& layer_call, const Tensor& h0_, const OptionalTensor& c0_, const Tensors& weights,
           const OptionalTensor& batch_sizes, const OptionalTensor& resets, bool relu)
      : call(layer_call), x(*layer_call.x), on(x), h0(h0_), c0(c0_), sizes(batch_sizes) {
    for (int64_t d = 0; d < call.D; d++) {
      w[d] = call.direction(weights, d);
      base.w_hh[d] = w[d].w_hh->const_data_ptr();
    }
    base.dtype = call.dtype;
    base.T = call.T, base.B = call.B, base.H = call.H, base.P = call.P;
    base.D = static_cast<int>(call.D), base.relu = relu, base.tf32 = allows_tf32(call.dtype);
    base.h0 = h0.const_data_ptr();
    if (c0) base.c0 = c0->const_data_ptr();
    if (resets) base.resets = static_cast<const uint8_t*>(resets->const_data_ptr());
    if (batch_sizes) {
      const int64_t* n = batch_sizes->const_data_ptr<int64_t>();
      for (int64_t t = 0; t < call.T; t++) first.push_back(first.back() + n[t]);
      offsets = torch::stable::new_empty(x, {call.T + 1}, ScalarType::Long);
      cuda::upload(first.data(), call.T + 1, static_cast<int64_t*>(offsets->mutable_data_ptr()), on.stream());
      base.offsets = offsets->const_data_ptr<int64_t>();
    }
  }

  void forward(Tensor y, Tensor hn, OptionalTensor cn, OptionalTensor cells, OptionalTensor gates) {
    cuda::FwdLayer p{base};
    const Tensor xw = project_inputs(p);
    p.y = y.mutable_data_ptr(), p.hn = hn.mutable_data_ptr();
    if (cn) p.cn = cn->mutable_data_ptr();
    if (cells) p.cells = cells->mutable_data_ptr();
    if (gates) p.gates = gates->mutable_data_ptr();
    p.plan = cuda::Recurrence<Cell>::plan_fwd(p);
    if (p.plan.members > 0) {
      const Tensor exchange = give_exchange(p);
      cuda::Recurrence<Cell>::fwd(p, on.stream());
    } else {
      forward_steps(p, hn, cn);
    }
  }

  void backward(cuda::BwdLayer p, const OptionalTensor& dhn, const OptionalTensor& dcn, GpuGradients& to) {
    static_cast<cuda::Layer&>(p) = base;
    Tensor h_prev = empty({call.D, call.N, call.P}), dG = empty({call.N, call.D * Cell::kSlots * call.H});
    void* h_prev_data[2] = {};
    for (int64_t d = 0; d < call.D; d++) p.h_prev[d] = h_prev_data[d] = part(h_prev, d).mutable_data_ptr();
    p.dG = dG.mutable_data_ptr();
    cuda::previous(p, p.y, h_prev_data, on.stream());
    OptionalTensor gates;
    if (Cell::kSaved > 0 && !p.gates) gates = rebuild_gates(h_prev), p.gates = gates->const_data_ptr();
    p.dh0 = to.dh0.mutable_data_ptr();
    if (to.dc0) p.dc0 = to.dc0->mutable_data_ptr();
    p.plan = cuda::Recurrence<Cell>::plan_bwd(p);
    if (p.plan.members > 0) {
      const Tensor exchange = give_exchange(p);
      cuda::Recurrence<Cell>::bwd(p, on.stream());
    } else {
      backward_steps(p, dG, dhn, dcn, to);
    }
    products(dG, h_prev, to);
  }

 private:
  const LayerCall& call;
  const Tensor& x;
  const OnDevice on;
  const NoGrad no_grad;
  const Tensor& h0;
  const OptionalTensor &c0, &sizes;
  Weights<const Tensor*> w[2];
  std::vector<int64_t> first{0};  // token of each step, if packed
  OptionalTensor offsets;
  cuda::Layer base;

  int64_t rows_at(int64_t t) const { return sizes ? first[t + 1] - first[t] : call.B; }
  int64_t token(int64_t t) const { return sizes ? first[t] : t * call.B; }
  Tensor empty(std::initializer_list<int64_t> shape) const {
    return torch::stable::new_empty(x, std::vector<int64_t>(shape));
  }
  Tensor accumulator(const OptionalTensor& start, int64_t width) const {
    const std::vector<int64_t> shape{call.D, call.B, width};
    if (!start) return torch::stable::new_zeros(x, shape, accumulation_type(call.dtype));
    Tensor t = torch::stable::new_empty(x, shape, accumulation_type(call.dtype));
    torch::stable::copy_(t, *start);
    return t;
  }
  static Tensor part(const Tensor& t, int64_t d) { return torch::stable::select(t, 0, d); }

  // Memory that blocks share.
  Tensor give_exchange(cuda::Layer& p) const {
    const std::vector<int64_t> bytes{p.plan.exchange_bytes};
    Tensor t = torch::stable::new_empty(x, bytes, ScalarType::Byte);
    p.exchange = t.mutable_data_ptr();
    return t;
  }

  Tensor project_inputs(cuda::FwdLayer& p) const {
    Tensor xw = empty({call.D, call.N, G * call.H});
    const Tensor inputs = matrix(x, call.N, call.I);
    for (int64_t d = 0; d < call.D; d++) {
      multiply(inputs, transposed(*w[d].w_ih), part(xw, d));
      p.xw[d] = part(xw, d).const_data_ptr();
      if (call.has_bias) p.b_ih[d] = w[d].b_ih->const_data_ptr(), p.b_hh[d] = w[d].b_hh->const_data_ptr();
    }
    return xw;
  }

  void forward_steps(const cuda::FwdLayer& p, Tensor hn, OptionalTensor cn) const {
    torch::stable::copy_(hn, h0);
    OptionalTensor c;
    if (cn) c = accumulator(c0, call.H), torch::stable::copy_(*cn, *c0);  // for rows of length zero
    Tensor hw = empty({call.B, G * call.H}), m = empty({call.projected ? call.B : 0, call.H});
    Tensor product = empty({call.projected ? call.B : 0, call.P});
    for (int64_t d = 0; d < call.D; d++) {
      const Tensor h = part(hn, d), w_hh = transposed(*w[d].w_hh);
      for (int64_t k = 0; k < call.T; k++) {
        cuda::FwdStep step{p};
        const int64_t t = d ? call.T - 1 - k : k;
        step.d = static_cast<int>(d), step.rows = rows_at(t), step.token = token(t);
        if (step.rows == 0) continue;
        if (k + 1 < call.T) step.next = d ? t - 1 : t + 1;
        if (c) step.c = c->mutable_data_ptr();
        multiply(rows(h, 0, step.rows), w_hh, rows(hw, 0, step.rows));
        step.hw = hw.const_data_ptr();
        if (call.projected) {
          step.m = m.mutable_data_ptr(), step.y = nullptr;
          cuda::Recurrence<Cell>::step_fwd(step, on.stream());
          multiply(rows(m, 0, step.rows), transposed(*w[d].w_hr), rows(product, 0, step.rows));
          step.y = p.y;
          cuda::project_fwd(step, product.const_data_ptr(), on.stream());
        } else {
          cuda::Recurrence<Cell>::step_fwd(step, on.stream());
        }
      }
    }
  }

  // All tokens are one step: no recurrence where h_{t-1} is known.
  Tensor rebuild_gates(const Tensor& h_prev) const {
    cuda::FwdStep step{};
    static_cast<cuda::Layer&>(step) = base;
    const Tensor xw = project_inputs(step);
    Tensor gates = empty({call.N, call.D * Cell::kSaved * call.H}), hw = empty({call.N, G * call.H});
    step.rows = call.N, step.only_gates = true;
    step.hw = hw.const_data_ptr(), step.gates = gates.mutable_data_ptr();
    for (int64_t d = 0; d < call.D; d++) {
      multiply(part(h_prev, d), transposed(*w[d].w_hh), hw);
      step.d = static_cast<int>(d);
      cuda::Recurrence<Cell>::step_fwd(step, on.stream());
    }
    return gates;
  }

  void backward_steps(const cuda::BwdLayer& p, const Tensor& dG, const OptionalTensor& dhn,
                      const OptionalTensor& dcn, GpuGradients& to) const {
    Tensor dh = accumulator(dhn, call.P), product = empty({call.B, call.P});
    OptionalTensor dc, dh_reset, dc_reset;
    if (Cell::kCellState) dc = accumulator(dcn, call.H);
    if (base.resets) dh_reset = accumulator({}, call.P);
    if (base.resets && Cell::kCellState) dc_reset = accumulator({}, call.H);
    const int64_t kept = call.projected ? call.N : 0;
    Tensor dh_all = empty({kept, call.P}), m_all = empty({kept, call.H});
    Tensor dm = empty({call.projected ? call.B : 0, call.H});
    for (int64_t d = 0; d < call.D; d++) {
      const Tensor recurrent = slots_of(dG, d, 0, G), weights = recurrent_weights(d);
      cuda::BwdStep step{p};
      step.d = static_cast<int>(d), step.product = product.const_data_ptr(), step.dh = dh.mutable_data_ptr();
      if (call.projected) step.dm = dm.const_data_ptr();
      if (dc) step.dc = dc->mutable_data_ptr();
      if (dh_reset) step.dh_reset = dh_reset->mutable_data_ptr();
      if (dc_reset) step.dc_reset = dc_reset->mutable_data_ptr();
      for (int64_t k = 0; k < call.T; k++) {
        step.t = d ? k : call.T - 1 - k;
        step.rows = rows_at(step.t), step.token = token(step.t);
        if (step.rows == 0) continue;
        if (call.projected) {
          const Tensor dh_now = rows(dh_all, step.token, step.rows), now = rows(dm, 0, step.rows);
          step.dh_now = dh_now.mutable_data_ptr();
          step.m = rows(m_all, step.token, step.rows).mutable_data_ptr();
          cuda::project_bwd(step, on.stream());
          multiply(dh_now, *w[d].w_hr, now);
        }
        cuda::Recurrence<Cell>::step_bwd(step, on.stream());
        multiply(rows(recurrent, step.token, step.rows), weights, rows(product, 0, step.rows));
        step.product_rows = step.rows, step.next = step.t;
      }
      step.rows = 0;
      if (call.projected) cuda::project_bwd(step, on.stream());
      cuda::Recurrence<Cell>::step_bwd(step, on.stream());
      if (call.projected) multiply(transposed(dh_all), m_all, *call.direction(to.weights, d).w_hr);
    }
  }

  Tensor slots_of(const Tensor& dG, int64_t d, int64_t slot, int64_t count) const {
    return columns(dG, (d * Cell::kSlots + slot) * call.H, count * call.H);
  }

  // W_hh in the order of dG's columns.
  Tensor recurrent_weights(int64_t d) const {
    if (Cell::recurrent_slot(0) == 0) return *w[d].w_hh;
    Tensor all = empty({G * call.H, call.P});
    for (int g = 0; g < G; g++) {
      Tensor to = rows(all, Cell::recurrent_slot(g) * call.H, call.H);
      torch::stable::copy_(to, rows(*w[d].w_hh, g * call.H, call.H));
    }
    return all;
  }

  // What no step waits for: dx, dW and db from the gate gradients of all tokens. dW_hh is one GEMM for gates
  // whose slots lie in order.
  void products(const Tensor& dG, const Tensor& h_prev, GpuGradients& to) const {
    const Tensor inputs = matrix(x, call.N, call.I);
    for (int64_t d = 0; d < call.D; d++) {
      const Weights<const Tensor*> to_d = call.direction(to.weights, d);
      const auto sums = [&](const Tensor& slots, const Tensor& by, const Tensor* dw, const Tensor* db,
                            int64_t gate, int64_t gates) {
        multiply(transposed(slots), by, rows(*dw, gate * call.H, gates * call.H));
        if (db) sum_rows(slots, rows(*db, gate * call.H, gates * call.H));
      };
      sums(slots_of(dG, d, Cell::kInputSlot, G), inputs, to_d.w_ih, to_d.b_ih, 0, G);
      for (int g = 0, end; g < G; g = end) {
        for (end = g + 1; end < G && Cell::recurrent_slot(end) > Cell::recurrent_slot(end - 1);) end++;
        sums(slots_of(dG, d, Cell::recurrent_slot(g), end - g), part(h_prev, d), to_d.w_hh, to_d.b_hh, g,
             end - g);
      }
    }
    if (to.dx) product_of_x(dG, matrix(*to.dx, call.N, call.I));
  }

  // Half types sum both directions in one GEMM, before anything is rounded; a slot between them that x has no
  // part in (GRU's rn) meets zeros. Floats are summed in chains half as long, then added.
  void product_of_x(const Tensor& dG, Tensor dx) const {
    if (call.D == 1) return multiply(slots_of(dG, 0, Cell::kInputSlot, G), *w[0].w_ih, dx);
    if (call.dtype == DType::f32 || call.dtype == DType::f64) {
      Tensor each = empty({call.D, call.N, call.I});
      for (int64_t d = 0; d < call.D; d++)
        multiply(slots_of(dG, d, Cell::kInputSlot, G), *w[d].w_ih, part(each, d));
      return sum_rows(each, dx);
    }
    Tensor weights = empty({(Cell::kSlots + G) * call.H, call.I});
    if (Cell::kSlots > G) {
      Tensor none = rows(weights, G * call.H, (Cell::kSlots - G) * call.H);
      torch::stable::zero_(none);
    }
    for (int64_t d = 0; d < call.D; d++) {
      Tensor to = rows(weights, d * Cell::kSlots * call.H, G * call.H);
      torch::stable::copy_(to, *w[d].w_ih);
    }
    multiply(slots_of(dG, 0, Cell::kInputSlot, Cell::kSlots + G), weights, dx);
  }
};

// One step of a cell.
template <class Cell>
void gpu_cell(const CellCall& cell, const OptionalTensor& c0, Tensor h_new, OptionalTensor c_new,
              OptionalTensor gates, bool relu) {
  const OnDevice on(cell.x);
  const NoGrad no_grad;
  const std::vector<int64_t> shape{cell.B, Cell::kGates * cell.H};
  Tensor xw = torch::stable::new_empty(cell.x, shape), hw = torch::stable::new_empty(cell.x, shape);
  multiply(cell.x, transposed(cell.w_ih), xw);
  multiply(cell.h, transposed(cell.w_hh), hw);
  cuda::FwdStep p;
  p.dtype = cell.dtype;
  p.T = 1, p.B = cell.B, p.H = cell.H, p.P = cell.H, p.rows = cell.B, p.relu = relu;
  p.h0 = cell.h.const_data_ptr();
  p.xw[0] = xw.const_data_ptr(), p.hw = hw.const_data_ptr();
  if (cell.b_ih) p.b_ih[0] = cell.b_ih->const_data_ptr(), p.b_hh[0] = cell.b_hh->const_data_ptr();
  if (c0) p.c0 = c0->const_data_ptr(), p.cn = c_new->mutable_data_ptr();
  if (gates) p.gates = gates->mutable_data_ptr();
  p.y = h_new.mutable_data_ptr();
  cuda::Recurrence<Cell>::step_fwd(p, on.stream());
}

}  // namespace seqkernels::ops
