// Memory that one training step frees and the next takes again: saved activations, gradients of weights. Only
// blocks of 2 MiB and more; smaller ones come from torch, whose allocator reuses them itself.
#include <cstdint>
#include <cstdlib>
#include <mutex>

#include "tensor.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace seqkernels::ops {

namespace {

struct Kept {
  void* data;
  size_t bytes;
};

class Keeper {
 public:
  // The smallest block of at least `bytes` that wastes at most a quarter, or a new one.
  Kept take(size_t bytes) {
    if (const std::unique_lock lock(mutex_, std::try_to_lock); lock) {  // never wait: it may be a forked lock
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
    bytes = (bytes + kPage - 1) / kPage * kPage;
    void* data = nullptr;
    if (posix_memalign(&data, kHugePage, bytes)) data = nullptr;
#if defined(__linux__)
    if (data) madvise(data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);  // and no more than is asked for
#endif
    return {data, bytes};
  }
  void give_back(Kept block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || block.bytes > kMostKept) return std::free(block.data);
#if defined(__linux__)
    // Marking takes 8 us a MiB, a hundredth of a step: what a small model needs is left alone.
    if (total_ + block.bytes > kUnmarked) madvise(block.data, block.bytes, MADV_FREE);
#endif
    kept_.push_back(block);
    for (total_ += block.bytes; total_ > kMostKept; kept_.erase(kept_.begin())) {
      total_ -= kept_.front().bytes;
      std::free(kept_.front().data);
    }
  }

 private:
  static constexpr size_t kPage = 4096;
  std::mutex mutex_;
  std::vector<Kept> kept_;  // the oldest first
  size_t total_ = 0;
};

}  // namespace

Tensor kept_empty(const Tensor& t, Shape sizes) {
  static Keeper& keeper = *new Keeper;  // outlives every tensor, also those freed at exit
  const auto extent = contiguous(sizes);
  int64_t bytes = 0;
  if (!extent || __builtin_mul_overflow(extent->numel, int64_t(t.element_size()), &bytes) ||
      bytes < int64_t(kHugePage) || bytes > PTRDIFF_MAX - int64_t(kHugePage))
    return empty(t, sizes);
  const Kept block = keeper.take(static_cast<size_t>(bytes));
  if (!block.data) return empty(t, sizes);  // says that there is no memory
  return torch::stable::from_blob(block.data, sizes, extent->strides, t.device(), t.scalar_type(),
                                  [block](void*) { keeper.give_back(block); });
}

}  // namespace seqkernels::ops
