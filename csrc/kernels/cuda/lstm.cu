// Every CUDA kernel of LSTM.
#include "layer.cuh"
#include "step.cuh"

namespace seqkernels::cuda {

template struct Recurrence<Lstm>;

}  // namespace seqkernels::cuda
