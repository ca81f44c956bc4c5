// Weights of one layer as the kernels read them: panels of NR units for the forward products, and of NR
// inputs for the backward products, where the sum runs over the gates.
#pragma once

#include "gemm.inl.h"
#include "team.inl.h"

// Forward, one direction: G gates of w_ih [I, H], G gates of w_hh [P, H], w_hr [H, P]; the biases summed
// where they may be.
template <class Cell, class S>
struct ForwardWeights {
  using T = Acc<S>;
  using O = Operand<S>;
  static constexpr int G = Cell::kGates;
  const LayerParams& p;
  const int64_t H, I, P;
  const bool projected, in_place;  // in place: no panels, only the biases
  const Panels<O> in, rec, proj;
  O* panels[2];
  T *bias[2], *q_bias[2];  // bias [G, padded H]; q_bias: b_hh of the gate that keeps it apart

  explicit ForwardWeights(const LayerParams& params, bool use_in_place = false)
      : p(params),
        H(p.H),
        I(p.I),
        P(p.P),
        projected(p.w[0].w_hr != nullptr),
        in_place(use_in_place || p.panels),
        in{H, I},
        rec{H, P},
        proj{P, H} {}

  int64_t size() const { return G * (in.size() + rec.size()) + (projected ? proj.size() : 0); }
  // All gates of a block of units lie side by side: one stream for the prefetchers.
  O* input(int d, int g, int64_t j) const {
    return panels[d] + G * in.offset(j) + g * in.depth() * in.width(j);
  }
  O* recurrent(int d, int g, int64_t j) const {
    return panels[d] + G * (in.size() + rec.offset(j)) + g * rec.depth() * rec.width(j);
  }
  O* projection(int d, int64_t j) const { return panels[d] + G * (in.size() + rec.size()) + proj.offset(j); }

  void layout(Arena& a) {
    for (int d = 0; d < p.D; d++) {
      panels[d] = p.panels ? const_cast<O*>(static_cast<const O*>(p.panels)) + d * size()
                           : a.take<O>(in_place ? 0 : size());
      bias[d] = a.take<T>(G * in.padded());
      q_bias[d] = a.take<T>(in.padded());
    }
  }

  // Share `rank` of `size`.
  void pack(int d, int rank, int size) const {
    if (!in_place) pack_panels(d, rank, size);
    if (rank == 0) sum_biases(d);
  }
  // Neighbouring units go to one thread: with units split over all threads they are its own.
  void pack_panels(int d, int rank, int size) const {
    const Weights<const void*>& w = p.w[d];
    for (int64_t j = in.count() * rank / size; j < in.count() * (rank + 1) / size; j++)
      for (int g = 0; g < G; g++) pack_block(d, g, j, input(d, g, j), recurrent(d, g, j));
    for (int64_t j = rank; projected && j < proj.count(); j += size)
      pack_panel(static_cast<const S*>(w.w_hr) + j * NR<O> * H, H, P - j * NR<O>, H, projection(d, j),
                 proj.width(j));
  }
  // Gate g of unit block j.
  void pack_block(int d, int g, int64_t j, O* to_input, O* to_recurrent) const {
    const int64_t row = g * H + j * NR<O>, rows = H - j * NR<O>;
    pack_panel(static_cast<const S*>(p.w[d].w_ih) + row * I, I, rows, I, to_input, in.width(j));
    pack_panel(static_cast<const S*>(p.w[d].w_hh) + row * P, P, rows, P, to_recurrent, rec.width(j));
  }
  void sum_biases(int d) const {
    const S *b_ih = static_cast<const S*>(p.w[d].b_ih), *b_hh = static_cast<const S*>(p.w[d].b_hh);
    for (int g = 0; g < G; g++) {
      for (int64_t u = 0; u < H; u += kLanes<T>) {
        const Vec<T> bi = b_ih ? load(b_ih + g * H + u, H - u) : Vec<T>{};
        const Vec<T> bh = b_hh ? load(b_hh + g * H + u, H - u) : Vec<T>{};
        store(bias[d] + g * in.padded() + u, g == Cell::kSplitGate ? bi : bi + bh);
        if (g == Cell::kSplitGate) store(q_bias[d] + u, bh);
      }
    }
  }
};

// Backward, one direction: w_ih [G*H, I] and w_hh [G*H, P] with their rows in the order of the gate
// gradients' slots, w_hr [P, H]. For a handful of tokens w_ih and w_hh stay where they are: their rows
// already are rows of B. With one step each is used once, so that blocks of it are packed when their turn
// comes and never leave L1.
template <class Cell, class S>
struct BackwardWeights {
  using T = Acc<S>;
  using O = Operand<S>;
  static constexpr int G = Cell::kGates;
  const LayerParams& p;
  static constexpr int64_t kBlockRows = KC * kPair<O>, kBlockSize = kBlockRows * NR<O>;
  const bool projected, in_place, once;
  const Panels<O> in, rec, proj;
  O* panels[2];

  BackwardWeights(const LayerParams& params, bool few_tokens)
      : p(params),
        projected(p.w[0].w_hr != nullptr),
        in_place(few_tokens && !projected && sizeof(O) == sizeof(S) && kPair<O> == 1 &&
                 p.I % kLanes<T> == 0 && p.P % kLanes<T> == 0),
        once(p.T == 1 && !in_place && !projected),
        in{p.I, G * p.H},
        rec{p.P, G * p.H},
        proj{p.H, p.P} {}

  int64_t size() const { return in.size() + rec.size() + (projected ? proj.size() : 0); }
  O* projection(int d, int64_t j) const { return panels[d] + in.size() + rec.size() + proj.offset(j); }

  void layout(Arena& a) {
    for (int d = 0; d < p.D; d++) panels[d] = a.take<O>(in_place || once ? 0 : size());
  }

  void pack(int d, int rank, int size) const {
    if (in_place || once) return;
    const Weights<const void*>& w = p.w[d];
    pack_columns(static_cast<const S*>(w.w_ih), in, Cell::kInputSlot, panels[d], rank, size);
    pack_columns(static_cast<const S*>(w.w_hh), rec, Cell::kRecurrentSlot, panels[d] + in.size(), rank, size);
    if (!projected) return;
    for (int64_t j = rank; j < proj.count(); j += size) {
      pack_rows(static_cast<const S*>(w.w_hr) + j * NR<O>, proj.N, proj.N - j * NR<O>, projection(d, j), 0,
                proj.K, proj.width(j));
      pack_padding(projection(d, j), proj.K, proj.width(j));
    }
  }
  static constexpr int first_slot(const int (&slot)[G]) {
    int first = slot[0];
    for (int g = 1; g < G; g++) first = slot[g] < first ? slot[g] : first;
    return first;
  }
  void pack_columns(const S* w, Panels<O> shape, const int (&slot)[G], O* out, int rank, int size) const {
    for (int64_t j = shape.count() * rank / size; j < shape.count() * (rank + 1) / size; j++)
      pack_gates(w, shape, slot, j, 0, shape.K, out + shape.offset(j));
  }
  // Rows [k0, k1) of panel j. Gate g's rows are the K range of its slot, counted from the first slot. In the
  // order of k: the second row of a pair is added to the first.
  void pack_gates(const S* w, const Panels<O>& shape, const int (&slot)[G], int64_t j, int64_t k0, int64_t k1,
                  O* to) const {
    const int64_t N = shape.N, column = j * NR<O>;
    for (int n = 0; n < G; n++) {
      int g = 0;
      while (slot[g] != first_slot(slot) + n) g++;
      const int64_t first = n * p.H, begin = max_of(k0, first), end = min_of(k1, first + p.H);
      const S* from = w + (g * p.H - first) * N + column;
      if (begin < end) pack_rows(from + begin * N, N, N - column, to, begin - k0, end - k0, shape.width(j));
    }
    pack_padding(to, k1 - k0, shape.width(j));
  }

  // c (+)= dG W_ih (or W_hh) for the columns of blocks [j0, j1), last block first if `fro`. dG starts at slot
  // 0, c at column 0. `block`: kBlockSize elements of the thread's own, used by `once`.
  void input_product(int d, int64_t j0, int64_t j1, int64_t n, const O* dG, int64_t ldG, T* c, int64_t ldc,
                     O* block) const {
    if (once)
      return product_once(p.w[d].w_ih, in, Cell::kInputSlot, j0, j1, n, dG, ldG, false, c, ldc, block);
    product(p.w[d].w_ih, in, Cell::kInputSlot, panels[d], j0, j1, false, n, dG, ldG, false, c, ldc);
  }
  void recurrent_product(int d, int64_t j0, int64_t j1, bool fro, int64_t n, const O* dG, int64_t ldG,
                         bool add, T* c, int64_t ldc, O* block) const {
    if (once)
      return product_once(p.w[d].w_hh, rec, Cell::kRecurrentSlot, j0, j1, n, dG, ldG, add, c, ldc, block);
    product(p.w[d].w_hh, rec, Cell::kRecurrentSlot, panels[d] + in.size(), j0, j1, fro, n, dG, ldG, add, c,
            ldc);
  }
  void product_once(const void* w, const Panels<O>& shape, const int (&slot)[G], int64_t j0, int64_t j1,
                    int64_t n, const O* dG, int64_t ldG, bool add, T* c, int64_t ldc, O* block) const {
    for (int64_t j = j0; j < j1; j++) {
      T* to = c + j * NR<O>;
      for (int64_t k = 0; k < shape.K; k += kBlockRows) {
        const int64_t rows = min_of(kBlockRows, shape.K - k);
        pack_gates(static_cast<const S*>(w), shape, slot, j, k, k + rows, block);
        gemm_panel(n, shape.width(j), round_up(rows, kDepth<O>), dG + first_slot(slot) * p.H + k, ldG, block,
                   shape.width(j), add || k ? to : nullptr, ldc, to, ldc);
      }
    }
  }
  void product(const void* w, const Panels<O>& shape, const int (&slot)[G], const O* packed, int64_t j0,
               int64_t j1, bool fro, int64_t n, const O* dG, int64_t ldG, bool add, T* c, int64_t ldc) const {
    if (!in_place) {
      for (int64_t i = j0; i < j1; i++) {
        const int64_t j = fro ? j0 + j1 - 1 - i : i;
        T* to = c + j * NR<O>;
        gemm_panel(n, shape.width(j), shape.depth(), dG + first_slot(slot) * p.H, ldG,
                   packed + shape.offset(j), shape.width(j), add ? to : nullptr, ldc, to, ldc);
      }
      return;
    }
    if constexpr (kPair<O> == 1) product_in_place(w, shape, slot, j0, j1, n, dG, ldG, add, c, ldc);
  }
  void product_in_place(const void* w, const Panels<O>& shape, const int (&slot)[G], int64_t j0, int64_t j1,
                        int64_t n, const O* dG, int64_t ldG, bool add, T* c, int64_t ldc) const {
    constexpr int64_t kRows = 32;  // of w at a time, all columns: memory is read in its own order
    const int64_t N = shape.N;
    for (int g = 0; g < G; g++) {
      for (int64_t k = 0; k < p.H; k += kRows) {
        const O* rows = static_cast<const O*>(w) + (g * p.H + k) * N;
        for (int64_t j = j0; j < j1; j++) {
          T* to = c + j * NR<O>;
          gemm_panel(n, shape.width(j), min_of(kRows, p.H - k), dG + slot[g] * p.H + k, ldG, rows + j * NR<O>,
                     N, add || g || k ? to : nullptr, ldc, to, ldc);
        }
      }
    }
  }
};
