// What the ops of both kinds of attention ask of masks and lengths. Errors name the op, what was got and
// expected.
#pragma once

#include "kernels/attention.h"
#include "tensor.h"

namespace seqkernels::ops {

// mask broadcasts to [B, Hq, Tq, Tk], or to [B, Tq, Tk] where q has no heads.
void set_mask(const char* op, const Tensor& q, const Tensor& mask, AttentionParams& p);
void set_lengths(const char* op, Tensor& len_k, AttentionParams& p);

}  // namespace seqkernels::ops
