// Tensors as bindings meet them: checks and their errors, layout, allocation.
#include "tensor.h"

#include <algorithm>
#include <sstream>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace seqkernels::ops {

std::string text(Shape shape) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < shape.size(); i++) out << (i ? ", " : "") << shape[i];
  out << "]";
  return out.str();
}

std::string text(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Bool:
      return "bool";
    default:
      return torch::headeronly::toString(type);
  }
}

namespace {

std::string device_text(const Tensor& t) {
  return t.is_cpu() ? "cpu" : t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "another device";
}

}  // namespace

std::string text(const Tensor& t) {
  return text(t.scalar_type()) + " " + text(t.sizes()) + " on " + device_text(t);
}

DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, "seqkernels::", op, ": expected ", name,
                      " of float32, float64, bfloat16 or float16, got ", text(t));
  }
}

ScalarType accumulation_type(DType dtype) {
  return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() &&
         a.get_device_index() == b.get_device_index();
}

void expect(const char* op, const Tensor& t, const char* name, ScalarType type, Shape shape,
            const Tensor& like) {
  STD_TORCH_CHECK(same_device(t, like) && t.scalar_type() == type && t.sizes().equals(shape),
                  "seqkernels::", op, ": expected ", name, " as ", text(type), " ", text(shape), " on ",
                  device_text(like), ", got ", text(t));
}

void lay_contiguously(Tensor& t) {
  if (t.is_contiguous()) return;
  Tensor copy = empty(t, t.sizes());  // and not stable::contiguous, whose errors are without words
  torch::stable::copy_(copy, t);
  t = copy;
}

void lay_last_dimension(Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.stride(last) != 1 && t.size(last) > 1) lay_contiguously(t);
}

Parallel torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](void*, int64_t n, void (*body)(void*, int64_t, int64_t), void* arg) {
            torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(arg, begin, end); });
          },
          nullptr};
}

std::optional<Extent> contiguous(Shape sizes) {
  Extent extent{std::vector<int64_t>(sizes.size())};
  bool none = false;
  for (size_t i = sizes.size(); i-- > 0;) {  // in strides a size of zero counts as one
    none |= sizes[i] == 0;
    extent.strides[i] = extent.numel;
    if (__builtin_mul_overflow(extent.numel, std::max<int64_t>(sizes[i], 1), &extent.numel))
      return std::nullopt;
  }
  if (none) extent.numel = 0;
  return extent;
}

Tensor empty(const Tensor& t, Shape sizes, std::optional<ScalarType> dtype) {
  const auto extent = contiguous(sizes);
  const auto type =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype ? *dtype : t.scalar_type()));
  int32_t device_type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  AtenTensorHandle out = nullptr;
  const bool fits = extent && !aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                        extent->strides.data(), type, device_type,
                                                        t.get_device_index(), &out);
  STD_TORCH_CHECK(fits, "seqkernels: there is no memory for a tensor of shape ", text(sizes),
                  "; use smaller batches or shorter sequences");
  return Tensor(out);
}

Tensor large_empty(const Tensor& t, Shape sizes, std::optional<ScalarType> dtype) {
  Tensor out = empty(t, sizes, dtype);
#if defined(__linux__)
  const auto begin = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(out.numel()) * out.element_size();
  // Whole huge pages only: what lies around belongs to others.
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, last = end / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may fail
#endif
  return out;
}

Tensor none_like(const Tensor& t, std::optional<ScalarType> dtype) { return empty(t, {0}, dtype); }

}  // namespace seqkernels::ops
