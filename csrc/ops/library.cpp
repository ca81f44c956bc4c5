// Every op's schema. Recurrent shapes: T steps, B rows, N tokens, D directions, P = H or the projection's
// size; `weights` is the layer's slice of torch's flat weights, of each direction w_ih, w_hh, b_ih, b_hh,
// w_hr, biases and projection if any. Gates are opaque; size 0 means: not saved, rebuild them.
#include <string>

#include "kernels/cpu/dispatch.h"
#include "recurrent.h"

namespace seqkernels::ops {

namespace {

void set_isa(std::string name) { force_isa(name.c_str()); }
std::string get_isa() { return isa_name(active_isa()); }
bool allows_no_tf32() { return false; }

}  // namespace

STABLE_TORCH_LIBRARY(seqkernels, m) {
  // `.exported` is what exported programs call instead: the same, and in Python it has gradients.
  const auto forward = [&](const std::string& name, const std::string& schema) {
    m.def((name + schema).c_str());
    m.def((name + ".exported" + schema).c_str());
  };
  forward("lstm_layer_fwd",
          "(Tensor x, Tensor h0, Tensor c0, Tensor[] weights, Tensor? batch_sizes, Tensor? resets, "
          "Tensor? panels, bool bidirectional, bool save_cells, bool save_gates) "
          "-> (Tensor y, Tensor hn, Tensor cn, Tensor cells, Tensor gates)");
  m.def(
      "lstm_layer_bwd(Tensor? dy, Tensor? dhn, Tensor? dcn, Tensor? dcells, Tensor x, Tensor h0, Tensor c0, "
      "Tensor[] weights, Tensor y, Tensor cells, Tensor gates, Tensor? batch_sizes, Tensor? resets, "
      "bool bidirectional, bool need_dx) -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)");
  forward("lstm_cell_fwd",
          "(Tensor x, Tensor h, Tensor c, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, bool save) "
          "-> (Tensor h, Tensor c, Tensor gates)");
  forward("gru_layer_fwd",
          "(Tensor x, Tensor h0, Tensor[] weights, Tensor? batch_sizes, Tensor? resets, Tensor? panels, "
          "bool bidirectional, bool save_gates) -> (Tensor y, Tensor hn, Tensor gates)");
  m.def(
      "gru_layer_bwd(Tensor? dy, Tensor? dhn, Tensor x, Tensor h0, Tensor[] weights, Tensor y, Tensor gates, "
      "Tensor? batch_sizes, Tensor? resets, bool bidirectional, bool need_dx) "
      "-> (Tensor dx, Tensor dh0, Tensor[] dweights)");
  forward("gru_cell_fwd",
          "(Tensor x, Tensor h, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, bool save) "
          "-> (Tensor h, Tensor gates)");
  forward("rnn_layer_fwd",
          "(Tensor x, Tensor h0, Tensor[] weights, Tensor? batch_sizes, Tensor? resets, Tensor? panels, "
          "bool bidirectional, bool relu) -> (Tensor y, Tensor hn)");
  m.def(
      "rnn_layer_bwd(Tensor? dy, Tensor? dhn, Tensor x, Tensor h0, Tensor[] weights, Tensor y, "
      "Tensor? batch_sizes, Tensor? resets, bool bidirectional, bool relu, bool need_dx) "
      "-> (Tensor dx, Tensor dh0, Tensor[] dweights)");
  forward("rnn_cell_fwd",
          "(Tensor x, Tensor h, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, bool relu) "
          "-> Tensor");
  // The weights of one layer of G = `gates` gates as the forward kernels read them, for `panels`.
  m.def("pack_weights(Tensor[] weights, int gates, bool bidirectional) -> Tensor");
  // In words, how the recurrence of layers on the device of x and of its dtype runs there, for B rows.
  m.def("cuda_plan(Tensor x, int gates, int B, int H, int D, bool projected) -> str");
  // Its blocks, all resident at the same time; 0: stepwise.
  m.def(
      "cuda_blocks(Tensor x, int gates, int B, int H, int D, bool projected) -> (int forward, int backward)");
  // Whether torch allows TF32 in products of float32: asked of Python, as the stable ABI does not know.
  // Programs without Python have exact ones.
  m.def("allows_tf32() -> bool");
  // Shapes and meaning: kernels/attention.h. q [B,Hq,Tq,D], k, v by any strides but the last; with cu_q and
  // cu_k they hold all sequences, B = 1. out is [B,Tq,Hq,Dv], so that [B,Tq,Hq*Dv] is a view; so are dq, dk,
  // dv. rng: int64 [2], seed and offset of the dropout, wanted where there is one. max_q, max_k: the longest
  // sequences of cu_q and cu_k, which the host need not read from a GPU then, or 0. dmask is like mask, size
  // 0 if not wanted.
  forward("attention_fwd",
          "(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? cu_q, Tensor? cu_k, Tensor? len_k, "
          "Tensor? alibi, Tensor? sinks, float scale, float softcap, int left, int right, bool bottom_right, "
          "float dropout, Tensor? rng, int max_q, int max_k) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? mask, Tensor? cu_q, Tensor? cu_k, Tensor? len_k, Tensor? alibi, Tensor? sinks, float scale, "
      "float softcap, int left, int right, bool bottom_right, float dropout, Tensor? rng, int max_q, "
      "int max_k, bool need_dmask) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dmask, Tensor dsinks)");
  // k and v in pages [pages,Hk,rows,D]: row j of sequence b lies in page block_table[b, j / rows]. On GPUs
  // alone.
  m.def(
      "paged_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor block_table, Tensor len_k, Tensor? alibi, "
      "Tensor? sinks, float scale, float softcap, int left, int right, bool bottom_right) "
      "-> (Tensor out, Tensor lse)");
  forward("attention_weights",
          "(Tensor q, Tensor k, Tensor lse, Tensor? mask, Tensor? len_k, Tensor? alibi, "
          "float scale, float softcap, int left, int right, bool bottom_right, float dropout, Tensor? rng, "
          "bool mean) -> Tensor");
  // kernels/additive_attention.h: q [B,Tq,D], k [B,Tk,D], v [B,Tk,Dv], w [D], mask broadcast to [B,Tq,Tk].
  // weights [B,Tq,Tk] and dscores, the gradient of a mask that is not broadcast: size 0 if not wanted.
  forward("additive_attention_fwd",
          "(Tensor q, Tensor k, Tensor v, Tensor w, Tensor? mask, Tensor? len_k, bool need_weights) "
          "-> (Tensor out, Tensor weights)");
  m.def(
      "additive_attention_bwd(Tensor dout, Tensor? dweights, Tensor q, Tensor k, Tensor v, Tensor w, "
      "Tensor? mask, Tensor? len_k, bool need_dscores) "
      "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dw, Tensor dscores)");
  // x [M,K] and dy [M,N] with unit stride in the last dimension, w [N,K]. Without w there is no dx, without x
  // neither dw nor db: they have size 0.
  forward("linear_fwd", "(Tensor x, Tensor w, Tensor? b) -> Tensor");
  m.def(
      "linear_bwd(Tensor dy, Tensor? x, Tensor? w) "
      "-> (Tensor dx, Tensor dw, Tensor db)");
  m.def("set_isa(str name) -> ()");
  m.def("get_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(seqkernels, CompositeExplicitAutograd, m) {
  m.impl("set_isa", TORCH_BOX(&set_isa));
  m.impl("get_isa", TORCH_BOX(&get_isa));
}

// For programs without Python, where nobody can be asked; ops/_library.py registers what has priority.
STABLE_TORCH_LIBRARY_IMPL(seqkernels, CompositeImplicitAutograd, m) {
  m.impl("allows_tf32", TORCH_BOX(&allows_no_tf32));
}

}  // namespace seqkernels::ops
