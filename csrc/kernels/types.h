// Element types of tensors.
#pragma once

namespace seqkernels {

enum class DType { f32, f64, bf16, f16 };

}  // namespace seqkernels
