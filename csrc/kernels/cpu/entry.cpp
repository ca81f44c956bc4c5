// Public entry points and scratch memory.

#include <atomic>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(SEQKERNELS_POISON)
#include <cstring>
#endif

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/table.h"
#include "kernels/memory.h"

namespace seqkernels {

void lstm_fwd(const LstmFwdParams& p) { kernels(p.dtype).lstm_fwd(p); }
void lstm_bwd(const LstmBwdParams& p) { kernels(p.dtype).lstm_bwd(p); }
void gru_fwd(const GruFwdParams& p) { kernels(p.dtype).gru_fwd(p); }
void gru_bwd(const GruBwdParams& p) { kernels(p.dtype).gru_bwd(p); }
void rnn_fwd(const RnnFwdParams& p) { kernels(p.dtype).rnn_fwd(p); }
void rnn_bwd(const RnnBwdParams& p) { kernels(p.dtype).rnn_bwd(p); }
void attention_fwd(const AttentionFwdParams& p) { kernels(p.dtype).attention_fwd(p); }
void attention_bwd(const AttentionBwdParams& p) { kernels(p.dtype).attention_bwd(p); }
void attention_weights(const AttentionWeightsParams& p) { kernels(p.dtype).attention_weights(p); }
void additive_attention_fwd(const AdditiveAttentionFwdParams& p) {
  kernels(p.dtype).additive_attention_fwd(p);
}
void additive_attention_bwd(const AdditiveAttentionBwdParams& p) {
  kernels(p.dtype).additive_attention_bwd(p);
}
void linear_fwd(const LinearFwdParams& p) { kernels(p.dtype).linear_fwd(p); }
void linear_bwd(const LinearBwdParams& p) { kernels(p.dtype).linear_bwd(p); }

namespace {

// Fresh pages cost more than a short layer (0.25 us per 4 KiB, a 1 x 128 x 64 GRU runs in 70 us), so the last
// block is kept for the next call (memory.h; 64 threads take more than 64 MiB). Blocks of a layer ask for
// huge pages: the products run 2 to 3 % faster on them, and weights stream from L3 with 5 % fewer stalls.
constexpr std::size_t kLine = 64;

struct alignas(kLine) Block {
  std::size_t bytes;  // with this header
};

std::atomic<Block*> kept{nullptr};

// The last huge page only where three quarters of it are wanted: it is in memory as soon as one byte is
// touched.
Block* allocate(std::size_t bytes) {
  if (bytes % kHugePage >= kHugePage / 4 * 3) bytes = (bytes / kHugePage + 1) * kHugePage;
  const std::size_t huge = bytes / kHugePage * kHugePage, align = huge ? kHugePage : kLine;
  bytes = (bytes + align - 1) / align * align;  // what aligned_alloc asks for
  void* memory = std::aligned_alloc(align, bytes);
  if (!memory) throw std::bad_alloc();
#if defined(__linux__)
  if (huge) madvise(memory, huge, MADV_HUGEPAGE);
#endif
  return new (memory) Block{bytes};
}

}  // namespace

void* scratch_alloc(int64_t bytes) {
  const std::size_t need = static_cast<std::size_t>(bytes) + sizeof(Block);
  Block* block = kept.exchange(nullptr);
  if (block && block->bytes < need) {
    std::free(block);
    block = nullptr;
  }
  if (!block) block = allocate(need);
#if defined(SEQKERNELS_POISON)  // NaN everywhere: reading what was not written shows in the result
  std::memset(static_cast<void*>(block + 1), 0xff, block->bytes - sizeof(Block));
#endif
  return block + 1;
}

void scratch_free(void* memory) noexcept {
  Block* block = static_cast<Block*>(memory) - 1;
#if defined(__linux__)
  if (block->bytes > kUnmarked && block->bytes <= kMostKept)  // all but the page of the header
    madvise(reinterpret_cast<char*>(block) + kHugePage, block->bytes - kHugePage, MADV_FREE);
#endif
  if (block->bytes <= kMostKept) block = kept.exchange(block);
  std::free(block);
}

}  // namespace seqkernels
