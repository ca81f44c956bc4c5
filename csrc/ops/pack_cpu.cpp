// Weights as the CPU's forward kernels read them, for calls that share them.
#include <cstring>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/table.h"
#include "recurrent.h"

namespace seqkernels::ops {

namespace {

struct alignas(64) PackedHeader {
  int32_t isa, dtype;
  int64_t G, D, I, H, P;
};
static_assert(sizeof(PackedHeader) == 64);

PackedHeader header_of(const LayerCall& call) {
  PackedHeader header{};
  header.isa = static_cast<int32_t>(active_isa()), header.dtype = static_cast<int32_t>(call.dtype);
  header.G = call.G, header.D = call.D, header.I = call.I, header.H = call.H, header.P = call.P;
  return header;
}

// Bytes that *_pack() writes; writes them unless `out` is null.
int64_t pack(const LayerCall& call, const LayerParams& p, void* out) {
  const KernelTable& table = kernels();
  return (call.G == 4 ? table.lstm_pack : call.G == 3 ? table.gru_pack : table.rnn_pack)(p, out);
}
int64_t packed_size(const LayerCall& call, const LayerParams& p) {
  return pack(call, p, nullptr) + static_cast<int64_t>(sizeof(PackedHeader));
}

}  // namespace

Tensor rnn_pack(Tensors weights, int64_t gates, bool bidirectional) {
  STD_TORCH_CHECK(gates == 1 || gates == 3 || gates == 4,
                  "seqkernels::rnn_pack: expected gates 1 (RNN), 3 (GRU) or 4", " (LSTM), got ", gates);
  STD_TORCH_CHECK(weights.size() >= 2 && weights[0].dim() == 2 && weights[1].dim() == 2,
                  "seqkernels::rnn_pack: expected w_ih [G*H, I], w_hh [G*H, P], ...");
  const std::vector<int64_t> x{1, 1, weights[0].size(1)}, h0{bidirectional ? 2 : 1, 1, weights[1].size(1)};
  Tensor inputs = empty(weights[0], x), h = empty(weights[0], h0);
  OptionalTensor none;
  const LayerCall call("rnn_pack", static_cast<int>(gates), inputs, h, weights, none, none, bidirectional);
  LayerParams p;
  call.fill(p, h, weights, none, none);
  Tensor out = large_empty(weights[0], {packed_size(call, p)}, ScalarType::Byte);
  char* data = static_cast<char*>(out.mutable_data_ptr());
  const PackedHeader header = header_of(call);
  std::memcpy(data, &header, sizeof header);
  pack(call, p, data + sizeof header);
  return out;
}

const void* packed_panels(const LayerCall& call, const LayerParams& p, const Tensor& packed) {
  STD_TORCH_CHECK(packed.is_cpu() && packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() &&
                      packed.numel() > static_cast<int64_t>(sizeof(PackedHeader)),
                  "seqkernels::", call.op, ": expected `packed` from rnn_pack");
  const char* data = static_cast<const char*>(packed.const_data_ptr());
  const PackedHeader header = header_of(call);
  STD_TORCH_CHECK(std::memcmp(data, &header, sizeof header) == 0 && packed.numel() == packed_size(call, p),
                  "seqkernels::", call.op,
                  ": `packed` was made for other sizes, dtype or instruction set than this call's (now ",
                  isa_name(active_isa()), "): pack the weights again");
  return data + sizeof header;
}

}  // namespace seqkernels::ops
