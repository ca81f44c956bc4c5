// Weights as the CPU's forward kernels read them, for calls that share them.
#include <cstring>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/table.h"
#include "recurrent.h"

namespace seqkernels::ops {

namespace {

struct alignas(64) Header {  // before the panels: what they were made for
  int32_t isa, dtype;
  int64_t G, D, I, H, P;
};
static_assert(sizeof(Header) == 64);

Header header_of(const LayerCall& call) {
  Header header{};
  header.isa = static_cast<int32_t>(active_isa()), header.dtype = static_cast<int32_t>(call.dtype);
  header.G = call.G, header.D = call.D, header.I = call.I, header.H = call.H, header.P = call.P;
  return header;
}

// Bytes that *_pack() writes; writes them unless `out` is null.
int64_t pack(const LayerCall& call, const LayerParams& p, void* out) {
  const KernelTable& table = kernels(call.dtype);
  return (call.G == 4 ? table.lstm_pack : call.G == 3 ? table.gru_pack : table.rnn_pack)(p, out);
}
int64_t size_of(const LayerCall& call, const LayerParams& p) {
  return pack(call, p, nullptr) + static_cast<int64_t>(sizeof(Header));
}

Tensor pack_weights(Tensors weights, int64_t gates, bool bidirectional) {
  STD_TORCH_CHECK(gates == 1 || gates == 3 || gates == 4,
                  "seqkernels::pack_weights: expected gates 1 (RNN), 3 (GRU) or 4 (LSTM), got ", gates);
  STD_TORCH_CHECK(weights.size() >= 2 && weights[0].dim() == 2 && weights[1].dim() == 2,
                  "seqkernels::pack_weights: expected w_ih [G*H, I], w_hh [G*H, P], ..., got ",
                  weights.size(), " tensors", weights.empty() ? "" : ", the first " + text(weights[0]));
  const std::vector<int64_t> x{1, 1, weights[0].size(1)}, h0{bidirectional ? 2 : 1, 1, weights[1].size(1)};
  Tensor inputs = empty(weights[0], x), h = empty(weights[0], h0);
  OptionalTensor none;
  const LayerCall call("pack_weights", static_cast<int>(gates), inputs, h, weights, none, none,
                       bidirectional);
  LayerParams p;
  call.fill(p, h, weights, none, none);
  Tensor out = large_empty(weights[0], {size_of(call, p)}, ScalarType::Byte);
  char* data = static_cast<char*>(out.mutable_data_ptr());
  const Header header = header_of(call);
  std::memcpy(data, &header, sizeof header);
  pack(call, p, data + sizeof header);
  return out;
}

}  // namespace

const void* checked_panels(const LayerCall& call, const LayerParams& p, const Tensor& panels) {
  STD_TORCH_CHECK(panels.is_cpu() && panels.scalar_type() == ScalarType::Byte && panels.is_contiguous() &&
                      panels.numel() > static_cast<int64_t>(sizeof(Header)),
                  "seqkernels::", call.op, ": expected `panels` from pack_weights, got ", text(panels));
  const char* data = static_cast<const char*>(panels.const_data_ptr());
  const Header header = header_of(call);
  STD_TORCH_CHECK(std::memcmp(data, &header, sizeof header) == 0 && panels.numel() == size_of(call, p),
                  "seqkernels::", call.op,
                  ": `panels` were made for other sizes, dtype or instruction set than this call's (now ",
                  isa_name(active_isa()), "): pack the weights again");
  return data + sizeof header;
}

STABLE_TORCH_LIBRARY_IMPL(seqkernels, CPU, m) { m.impl("pack_weights", TORCH_BOX(&pack_weights)); }

}  // namespace seqkernels::ops
