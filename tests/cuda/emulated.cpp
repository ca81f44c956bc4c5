// The CUDA kernels and their bindings, compiled for the CPU: torch.ops.seqkernels_emulated.* take CPU
// tensors.
#include "kernels/cuda/gru.cu"
#include "kernels/cuda/lstm.cu"
#include "kernels/cuda/rnn.cu"
#include "kernels/cuda/sequence.cu"

// The GPU that plans are made for (no multiprocessors: every layer goes step by step), and the order of
// threads.
extern "C" __attribute__((visibility("default"))) void seqkernels_emulate(int multiprocessors, int64_t shared,
                                                                          unsigned seed) {
  seqkernels::cuda::host::machine() = {multiprocessors, shared};
  seqkernels::cuda::host::Grid::seed() = seed;
}
