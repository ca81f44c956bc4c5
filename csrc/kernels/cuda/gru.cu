// Every CUDA kernel of GRU.
#include "layer.cuh"
#include "step.cuh"

namespace seqkernels::cuda {

template struct Recurrence<Gru>;

}  // namespace seqkernels::cuda
