// The device, torch's GEMM and sums as GpuLayer calls them.
#include "recurrent_cuda.h"

#include <dlfcn.h>

#include <array>

namespace seqkernels::ops {

namespace {

using torch::stable::detail::from;

template <size_t n>
void call(const char* op, const char* overload, std::array<StableIValue, n> stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // owns the result, which is `out`
}

// libtorch_cuda is not there to link with where torch is built for the CPU: asked of the one in memory.
void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Get>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(get,
                  "seqkernels: libtorch_cuda.so is not loaded or has no aoti_torch_get_current_cuda_stream: ",
                  "CUDA tensors need a CUDA build of torch >= 2.11");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

}  // namespace

OnDevice::OnDevice(const Tensor& x) {
  if (!x.is_cuda()) return;  // the emulation
  guard_.emplace(x.get_device_index());
  stream_ = current_stream(x.get_device_index());
}

void multiply(const Tensor& a, const Tensor& b, Tensor out) {
  call<3>("aten::mm", "out", {from(a), from(b), from(out)});
}

bool allows_tf32(DType dtype) {
  if (dtype != DType::f32) return false;
  std::array<StableIValue, 1> stack{};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("seqkernels::allows_tf32", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

void sum_rows(const Tensor& a, Tensor out) {
  const std::array<int64_t, 1> dim{0};
  torch::stable::sum_out(out, a, torch::headeronly::IntHeaderOnlyArrayRef(dim.data(), 1));
}

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

Tensor rows(const Tensor& t, int64_t begin, int64_t count) {
  if (begin == 0 && count == t.size(0)) return t;  // spares a step two calls of the dispatcher
  Tensor from = t;
  return torch::stable::narrow(from, 0, begin, count);
}

Tensor columns(const Tensor& t, int64_t begin, int64_t count) {
  Tensor from = t;
  return torch::stable::narrow(from, 1, begin, count);
}

Tensor matrix(const Tensor& t, int64_t n, int64_t columns) {
  if (t.dim() == 2) return t;
  return torch::stable::reshape(t, {n, columns});
}

GpuGradients new_gradients(const LayerCall& call, const Tensor& h0, const OptionalTensor& c0,
                           const Tensors& weights, bool need_dx) {
  const Tensor& x = *call.x;
  GpuGradients g{{}, torch::stable::new_empty(x, h0.sizes()), {}, {}};
  if (need_dx) g.dx = torch::stable::new_empty(x, call.tokens_by(call.I));
  if (c0) g.dc0 = torch::stable::new_empty(x, c0->sizes());
  for (const Tensor& w : weights) g.weights.push_back(torch::stable::new_empty(w, w.sizes()));
  return g;
}

}  // namespace seqkernels::ops
