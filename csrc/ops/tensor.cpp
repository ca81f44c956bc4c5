#include "tensor.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <sstream>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace seqkernels::ops {

std::string text(const std::vector<int64_t>& shape) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < shape.size(); i++) out << (i ? ", " : "") << shape[i];
  out << "]";
  return out.str();
}

std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return {sizes.begin(), sizes.end()};
}

std::optional<DType> dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      return std::nullopt;
  }
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.is_cuda() == b.is_cuda() &&
         a.get_device_index() == b.get_device_index();
}

Parallel torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](void*, int64_t n, void (*body)(void*, int64_t, int64_t), void* arg) {
            torch::stable::parallel_for(0, n, 1, [=](int64_t begin, int64_t end) { body(arg, begin, end); });
          },
          nullptr};
}

Tensor empty(const Tensor& t, torch::headeronly::IntHeaderOnlyArrayRef sizes,
             std::optional<ScalarType> dtype) {
  const auto dims = static_cast<int64_t>(sizes.size());
  std::vector<int64_t> strides(sizes.size());
  int64_t numel = 1;
  bool fits = true;
  for (int64_t i = dims - 1; i >= 0; i--) {
    strides[i] = numel;
    fits = fits && !__builtin_mul_overflow(numel, std::max<int64_t>(sizes[i], 1), &numel);
  }
  const auto type =
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype ? *dtype : t.scalar_type()));
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device_type));
  AtenTensorHandle out = nullptr;
  fits = fits && !aoti_torch_empty_strided(dims, sizes.data(), strides.data(), type, device_type,
                                           t.get_device_index(), &out);
  STD_TORCH_CHECK(fits, "seqkernels: there is no memory for a tensor of shape ",
                  text({sizes.begin(), sizes.end()}), "; use smaller batches or shorter sequences");
  return Tensor(out);
}

Tensor large_empty(const Tensor& t, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                   std::optional<ScalarType> dtype) {
  Tensor out = empty(t, sizes, dtype);
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t(2) << 20;
  const auto begin = reinterpret_cast<uintptr_t>(out.mutable_data_ptr());
  const uintptr_t end = begin + static_cast<uintptr_t>(out.numel()) * out.element_size();
  // Whole huge pages only: what lies around belongs to others.
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: may fail
#endif
  return out;
}

namespace {

constexpr size_t kHugePage = size_t(2) << 20;

struct Kept {
  void* data;
  size_t bytes;
};

class Keeper {
 public:
  // The smallest block of at least `bytes` that wastes at most a quarter, or a new one.
  Kept take(size_t bytes) {
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    {
      const std::lock_guard lock(mutex_);
      auto best = kept_.end();
      for (auto it = kept_.begin(); it != kept_.end(); ++it)
        if (it->bytes >= bytes && it->bytes <= bytes + bytes / 4 &&
            (best == kept_.end() || it->bytes < best->bytes))
          best = it;
      if (best != kept_.end()) {
        const Kept block = *best;
        kept_.erase(best);
        total_ -= block.bytes;
        return block;
      }
    }
    void* data = std::aligned_alloc(kHugePage, bytes);
#if defined(__linux__)
    if (data) madvise(data, bytes, MADV_HUGEPAGE);
#endif
    return {data, bytes};
  }
  void give_back(Kept block) {
    if (block.bytes > kMost) return std::free(block.data);
#if defined(__linux__)
    madvise(block.data, block.bytes, MADV_FREE);
#endif
    const std::lock_guard lock(mutex_);
    kept_.push_back(block);
    for (total_ += block.bytes; total_ > kMost; kept_.erase(kept_.begin())) {
      total_ -= kept_.front().bytes;
      std::free(kept_.front().data);
    }
  }

 private:
  static constexpr size_t kMost = size_t(256) << 20;
  std::mutex mutex_;
  std::vector<Kept> kept_;  // the oldest first
  size_t total_ = 0;
};

}  // namespace

Tensor activations_empty(const Tensor& t, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  static Keeper& keeper = *new Keeper;  // outlives every tensor, also those freed at exit
  size_t bytes = t.element_size();
  for (const int64_t size : sizes)
    if (__builtin_mul_overflow(bytes, static_cast<size_t>(size), &bytes)) return empty(t, sizes);
  if (bytes < kHugePage || bytes > size_t(PTRDIFF_MAX) - kHugePage) return empty(t, sizes);
  const Kept block = keeper.take(bytes);
  if (!block.data) return empty(t, sizes);  // says that there is no memory
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i > 0; i--) strides[i - 1] = strides[i] * sizes[i];
  return torch::stable::from_blob(block.data, sizes, strides, t.device(), t.scalar_type(),
                                  [block](void*) { keeper.give_back(block); });
}

Tensor none_like(const Tensor& t, ScalarType dtype) { return empty(t, {0}, dtype); }

}  // namespace seqkernels::ops
