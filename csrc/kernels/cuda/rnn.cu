// Every CUDA kernel of RNN.
#include "layer.cuh"
#include "step.cuh"

namespace seqkernels::cuda {

template struct Recurrence<Rnn>;

}  // namespace seqkernels::cuda
