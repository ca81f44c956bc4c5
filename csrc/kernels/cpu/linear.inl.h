// Linear and its gradients: one product C = A B three times.
//
//   y [M, N] = x W^T + b,   dx [M, K] = dy W,   dW [N, K] = dy^T x
//
// All threads pack B (up to kPass rows of it at a time) into panels that lie in L2 or L3 for everybody, then
// take blocks of up to kRows rows of A from one queue: as many as keep a panel in L1 busy for longer than it
// takes to come. Rows of A are read where they lie unless they have to be converted, padded or transposed. Up
// to 12 rows of x, packing would cost more than the product: then W is read as it lies.
#pragma once

#include "direct.inl.h"
#include "team.inl.h"

// Element [i, j] at data[i * ld + j], or where it is transposed at data[j * ld + i].
template <class S>
struct Matrix {
  const S* data;
  int64_t ld;
  bool transposed = false;
};

// C [M, N] = A [M, K] B [K, N] + bias.
template <class S>
struct Product {
  using T = Acc<S>;
  using O = Operand<S>;
  static constexpr int W = kLanes<T>;
  static constexpr int64_t kRows = 96, kPass = 1024;

  int64_t M, N, K;
  Matrix<S> a, b;
  const S* bias = nullptr;  // [N]
  S* c;
  S* row_sums = nullptr;  // [M]: of A, where they are wanted
  const Parallel& parallel;

  const bool in_place = sizeof(S) == sizeof(T) && N % W == 0;  // C itself holds the sums
  const int64_t passes = max_of(1, divide_up(K, kPass)), pass = round_up(divide_up(K, passes), 32);
  const int64_t panels = divide_up(N, NR<O>);
  const int64_t ld_rows = row_stride<O>(pass), ld_sums = in_place ? N : passes > 1 ? round_up(N, W) : NR<O>;
  int team = 1;
  int64_t block_rows = kRows, row_blocks = divide_up(M, kRows), column_blocks = 1;

  O* packed = nullptr;
  PerThread<O> rows{};
  PerThread<T> block_sums{};
  T *biases = nullptr, *sums = nullptr, *of_rows = nullptr;
  Queue* queues = nullptr;  // [passes]
  Barrier* barrier = nullptr;

  Panels<O> panels_of(int64_t k) const { return {N, k}; }
  // Rows of A that the tiles can read: of their type, padded, and not all in one set of L1 (see LayerFwd).
  bool a_as_it_lies(int64_t k) const {
    return !a.transposed && sizeof(S) == sizeof(O) && k == panels_of(k).depth() &&
           a.ld * int64_t(sizeof(S)) % 4096 != 0;
  }

  void layout(Arena& arena) {
    packed = arena.take<O>(panels_of(pass).size());
    rows = arena.take_each<O>(team, kRows * ld_rows);
    biases = arena.take<T>(round_up(N, NR<O>));
    sums = arena.take<T>(in_place || passes == 1 ? 0 : M * ld_sums);
    block_sums = arena.take_each<T>(team, in_place || passes > 1 ? 0 : kRows * NR<O>);
    of_rows = arena.take<T>(M);
    queues = arena.take_zeros<Queue>(passes);
    barrier = arena.take_zeros<Barrier>(1);
  }
  void prepare() const {
    for (int64_t n = 0; n < N; n += W) store(biases + n, bias ? load(bias + n, N - n) : Vec<T>{});
  }
  int wanted() const { return team; }

  void run() {
    team = threads_for(double(M) * double(N) * double(K), parallel.threads);
    column_blocks = row_blocks >= 2 * team ? 1 : max_of(1, min_of(panels, team));
    if (row_blocks > team) {  // about as many for each thread
      block_rows = divide_up(M, round_up(row_blocks, team));
      row_blocks = divide_up(M, block_rows);
    }
    run_kernel(parallel, *this);
  }

  void thread(int id, int size) {
    for (int64_t i = 0; i < passes; i++) {
      const int64_t k0 = i * pass, k = min_of(pass, K - k0);
      for (int64_t j = panels * id / size; j < panels * (id + 1) / size; j++) pack(k0, k, j);
      barrier->wait(size);
      const int64_t tasks = row_blocks * column_blocks;
      for (int64_t t; (t = queues[i].take()) < tasks;)
        block(id, i, k0, k, t / column_blocks, t % column_blocks);
      barrier->wait(size);
    }
    release_tiles();
  }

  void pack(int64_t k0, int64_t k, int64_t j) const {
    const Panels<O> shape = panels_of(k);
    O* to = packed + shape.offset(j);
    const int64_t n = j * NR<O>, width = shape.width(j);
    if (b.transposed) return pack_panel(b.data + n * b.ld + k0, b.ld, N - n, k, to, width);
    pack_rows(b.data + k0 * b.ld + n, b.ld, N - n, to, 0, k, width);
    pack_padding(to, k, width);
  }

  // Rows [m, m + block_rows) by a share of the panels.
  void block(int id, int64_t i, int64_t k0, int64_t k, int64_t row_block, int64_t column_block) const {
    const Panels<O> shape = panels_of(k);
    const int64_t m = row_block * block_rows, n = min_of(block_rows, M - m);
    const bool first = i == 0, last = i + 1 == passes;
    const O* from = rows[id];
    int64_t ld = ld_rows;
    if (a_as_it_lies(k))
      from = reinterpret_cast<const O*>(a.data + m * a.ld + k0), ld = a.ld;
    else
      gather(m, n, k0, k, rows[id]);
    if (row_sums && column_block == 0) add_rows(m, n, k, from, ld, first, last);
    for (int64_t j = panels * column_block / column_blocks; j < panels * (column_block + 1) / column_blocks;
         j++) {
      T* to = passes > 1 ? sums + m * ld_sums + j * NR<O> : block_sums[id];
      if constexpr (sizeof(S) == sizeof(T))
        if (in_place) to = c + m * ld_sums + j * NR<O>;
      gemm_panel(n, shape.width(j), shape.depth(), from, ld, packed + shape.offset(j), shape.width(j),
                 first ? biases + j * NR<O> : to, first ? 0 : ld_sums, to, ld_sums);
      for (int64_t r = 0; last && !in_place && r < n; r++)
        for (int64_t u = 0; u < shape.width(j); u += W)
          store(c + (m + r) * N + j * NR<O> + u, load(to + r * ld_sums + u), N - j * NR<O> - u);
    }
  }
  void gather(int64_t m, int64_t n, int64_t k0, int64_t k, O* to) const {
    const int64_t padded = round_up(k, 32);
    if (!a.transposed) {
      for (int64_t r = 0; r < n; r++) copy_row(a.data + (m + r) * a.ld + k0, k, to + r * ld_rows, padded);
      return;
    }
    pack_transposed(a.data + k0 * a.ld + m, a.ld, k, n, to, ld_rows, padded);
  }
  // Sums of the rows of A: gathered, padded with zeros.
  void add_rows(int64_t m, int64_t n, int64_t k, const O* from, int64_t ld, bool first, bool last) const {
    for (int64_t r = 0; r < n; r++) {
      Vec<T> sum{};
      for (int64_t i = 0; i < k; i += W) sum += load(from + r * ld + i, k - i);
      T total = first ? T(0) : of_rows[m + r];
      for (int l = 0; l < W; l++) total += sum[l];
      of_rows[m + r] = total;
      if (last) store(row_sums + m + r, splat(total), 1);
    }
  }
};

// A few rows of x: W as it lies, W outputs at a time.
template <class S>
struct FewRows {
  using T = Acc<S>;
  static constexpr int W = kLanes<T>;
  static constexpr int64_t kRows = 12;
  const LinearFwdParams& p;

  void run() const {
    const int64_t blocks = divide_up(p.N, W);
    const int team = threads_for(double(p.M) * double(p.N) * double(p.K), p.parallel.threads);
    run_ranges(p.parallel, team,
               [&](int64_t begin, int64_t end) { outputs(blocks * begin / team, blocks * end / team); });
  }
  void outputs(int64_t begin, int64_t end) const {
    const S *x = static_cast<const S*>(p.x), *w = static_cast<const S*>(p.w), *b = static_cast<const S*>(p.b);
    T y[kRows * W];
    for (int64_t n = begin * W; n < end * W && n < p.N; n += W) {
      const int64_t columns = min_of(W, p.N - n);
      direct_products(p.M, columns, y, W, Term<S, S>{w + n * p.K, p.K, x, p.x_m, p.K});
      const Vec<T> bias = b ? load(b + n, columns) : Vec<T>{};
      for (int64_t m = 0; m < p.M; m++)
        store(static_cast<S*>(p.y) + m * p.N + n, load(y + m * W) + bias, columns);
    }
  }
};

template <class S>
static void linear_fwd(const LinearFwdParams& p) {
  if (p.M <= FewRows<S>::kRows) return FewRows<S>{p}.run();
  Product<S>{.M = p.M,
             .N = p.N,
             .K = p.K,
             .a = {.data = static_cast<const S*>(p.x), .ld = p.x_m},
             .b = {.data = static_cast<const S*>(p.w), .ld = p.K, .transposed = true},
             .bias = static_cast<const S*>(p.b),
             .c = static_cast<S*>(p.y),
             .parallel = p.parallel}
      .run();
}
template <class S>
static void linear_bwd(const LinearBwdParams& p) {
  const S *x = static_cast<const S*>(p.x), *w = static_cast<const S*>(p.w), *dy = static_cast<const S*>(p.dy);
  if (p.dx)
    Product<S>{.M = p.M,
               .N = p.K,
               .K = p.N,
               .a = {.data = dy, .ld = p.dy_m},
               .b = {.data = w, .ld = p.K},
               .c = static_cast<S*>(p.dx),
               .parallel = p.parallel}
        .run();
  if (p.dw || p.db)  // of dw with no columns there is no pointer
    Product<S>{.M = p.N,
               .N = p.K,
               .K = p.M,
               .a = {.data = dy, .ld = p.dy_m, .transposed = true},
               .b = {.data = x, .ld = p.x_m},
               .c = static_cast<S*>(p.dw),
               .row_sums = static_cast<S*>(p.db),
               .parallel = p.parallel}
        .run();
}
