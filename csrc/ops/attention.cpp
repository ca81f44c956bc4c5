// What attention ops of both kinds check alike: masks and key lengths.
#include "attention.h"

namespace seqkernels::ops {

void set_mask(const char* op, const Tensor& q, const Tensor& mask, AttentionParams& p) {
  const auto type = mask.scalar_type(), acc = accumulation_type(p.dtype);
  STD_TORCH_CHECK(mask.is_cpu() && mask.dim() == q.dim() &&
                      (type == ScalarType::Bool || type == q.scalar_type() || type == acc),
                  "seqkernels::", op, ": expected mask of ", q.dim(), " dimensions on the CPU, bool, ",
                  text(acc), " or of the dtype of q, got ", text(mask));
  std::vector<int64_t> full{p.B, p.Hq, p.Tq, p.Tk};
  std::vector<int64_t*> strides{&p.mask_b, &p.mask_h, &p.mask_q, &p.mask_k};
  if (q.dim() == 3) full.erase(full.begin() + 1), strides.erase(strides.begin() + 1);
  for (int64_t i = 0; i < mask.dim(); i++) {
    STD_TORCH_CHECK(mask.size(i) == full[i] || mask.size(i) == 1, "seqkernels::", op,
                    ": expected mask that broadcasts to ", text(full), ", got ", text(mask.sizes()));
    *strides[i] = mask.size(i) == 1 ? 0 : mask.stride(i);
  }
  p.mask = mask.const_data_ptr();
  p.mask_kind = type == ScalarType::Bool  ? MaskKind::boolean
                : type == q.scalar_type() ? MaskKind::additive
                                          : MaskKind::additive_acc;
}

void set_lengths(const char* op, Tensor& len_k, AttentionParams& p) {
  STD_TORCH_CHECK(
      len_k.is_cpu() && len_k.scalar_type() == ScalarType::Long && len_k.dim() == 1 && len_k.size(0) == p.B,
      "seqkernels::", op, ": expected len_k as int64 [", p.B, "] on the CPU, got ", text(len_k));
  lay_contiguously(len_k);
  p.len_k = len_k.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < p.B; b++)
    STD_TORCH_CHECK(p.len_k[b] >= 0 && p.len_k[b] <= p.Tk, "seqkernels::", op,
                    ": expected len_k from 0 to the ", p.Tk, " keys, got ", p.len_k[b], " at ", b);
}

}  // namespace seqkernels::ops
