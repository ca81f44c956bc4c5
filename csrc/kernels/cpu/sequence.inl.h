// Where tokens lie, and how a layer is divided among threads: what forward and backward have in common.
#pragma once

#include "gemm.inl.h"
#include "team.inl.h"

// Rows and tokens of each step; dense and packed sequences look the same from here on.
struct Sequence {
  const LayerParams& p;
  int64_t tokens;            // of all steps
  int64_t* first = nullptr;  // packed: [T + 1] first token of each step, filled by prepare()

  explicit Sequence(const LayerParams& params) : p(params), tokens(params.T * params.B) {
    if (!p.batch_sizes) return;
    tokens = 0;
    for (int64_t t = 0; t < p.T; t++) tokens += p.batch_sizes[t];
  }
  void layout(Arena& a) {
    if (p.batch_sizes) first = a.take<int64_t>(p.T + 1);
  }
  void prepare() {
    if (!first) return;
    first[0] = 0;
    for (int64_t t = 0; t < p.T; t++) first[t + 1] = first[t] + p.batch_sizes[t];
  }
  int64_t rows(int64_t t) const { return p.batch_sizes ? p.batch_sizes[t] : p.B; }
  int64_t token(int64_t t) const { return first ? first[t] : t * p.B; }
  // Rows of [r0, r1) that live at step t.
  int64_t rows(int64_t t, int64_t r0, int64_t r1) const {
    const int64_t n = rows(t);
    return most(0, least(n, r1) - r0);
  }
  template <class S>
  const S* x(int64_t t, int64_t b) const {
    return static_cast<const S*>(p.x) + (first ? (first[t] + b) * p.x_b : t * p.x_t + b * p.x_b);
  }
  // Tokens of consecutive steps, all rows, lie one after another.
  bool x_contiguous() const { return first || p.x_t == p.B * p.x_b; }
};

// A direction's threads form a grid: row_groups (no communication) x unit_groups (a barrier each step).
struct Plan {
  int concurrent;  // directions at once
  int row_groups, unit_groups;
  int per_direction() const { return row_groups * unit_groups; }
};

// Multiply-adds of a tile row by two vectors, per cycle: 1, 2 with vdpbf16ps, 16 with AMX.
template <class D>
constexpr double kRate = kDepth<D> == 32 ? 16 : kPair<D>;

// With the way of h from core to core: 0.4 to 0.8 us on Zen 5 (LSTM B = 1, H = 64 to 256).
constexpr double kBarrierCycles = 2500;

// Cycles of one thread's step: FMA rate, load rate, weight traffic (L1, L2, beyond), gate arithmetic,
// barrier; the projection was done for many steps at once. The numbers are rounded from measurements on Zen 5
// and Golden Cove; only their order matters for the choice.
template <class D>
static double step_cycles(int64_t rows, int64_t units, int64_t I, int64_t K, int G, bool barrier) {
  if (rows == 0) return barrier ? kBarrierCycles : 0;
  const double panels = double(G) * round_up(units, kLanes<Acc<D>>) / NR<D>,
               tiles = double(divide_up(rows, MR));
  const double bytes = panels * NR<D> * K * sizeof(D);
  const double bandwidth = bytes <= (24 << 10)    ? 128
                           : bytes <= (512 << 10) ? 40
                           : bytes <= (2 << 20)   ? 14
                                                  : 5;
  const double fma = double(rows) / kRate<D>, loads = (2 * tiles + rows) / (kRate<D> > 1 ? kRate<D> * 2 : 2),
               traffic = NR<D> * sizeof(D) / bandwidth;
  const double busy = fma > loads ? fma : loads, k = (busy > traffic ? busy : traffic) + 0.15 * traffic;
  return panels * (K * k + 1.1 * I * fma) + 15.0 * G * rows * units / kLanes<Acc<D>> +
         (barrier ? kBarrierCycles : 0);
}

// Threads that wait for each other at every step share units out anew where one core is slower: worth this in
// forward, where shares are at least so many blocks. (In backward three quarters of the work come from a
// queue.)
constexpr double kBalanced = 0.97;
constexpr int64_t kFineBlocks = 4;

// Rows [split(i), split(i + 1)) belong to row group i: the same number of tokens each.
static int64_t row_split(const Sequence& seq, int groups, int i) {
  const int64_t B = seq.p.B;
  if (!seq.p.batch_sizes || i == 0 || i == groups) return B * i / groups;
  int64_t lo = 0, hi = B;
  const double target = double(seq.tokens) * i / groups;
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    double below = 0;
    for (int64_t t = 0; t < seq.p.T; t++) below += double(seq.rows(t, 0, mid));
    if (below < target)
      lo = mid + 1;
    else
      hi = mid;
  }
  return lo;
}

template <class D>
static Plan make_plan(const Sequence& seq, int threads, int G, bool units_only, double balanced = 1) {
  const LayerParams& p = seq.p;
  const int64_t blocks = divide_up(p.H, NR<D>);
  const int64_t samples = p.batch_sizes ? least(p.T, 64) : 1;
  Plan best{1, 1, 1};
  double cheapest = -1;
  auto consider = [&](int concurrent, int rg, int ug) {
    const int64_t units = divide_up(blocks, ug) * NR<D>;
    double worst = 0;
    for (int i = 0; i < rg; i++) {
      const int64_t r0 = row_split(seq, rg, i), r1 = row_split(seq, rg, i + 1);
      double sum = 0;
      for (int64_t s = 0; s < samples; s++)
        sum += step_cycles<D>(seq.rows(p.T * s / samples, r0, r1), least(units, p.H), p.I, p.P, G, ug > 1);
      if (sum > worst) worst = sum;
    }
    worst *= double(p.D) / concurrent;
    if (ug > 1 && blocks >= kFineBlocks * ug) worst *= balanced;
    if (cheapest < 0 || worst < cheapest) cheapest = worst, best = {concurrent, rg, ug};
  };
  for (int concurrent = p.D <= threads ? p.D : 1; concurrent > 0; concurrent--) {
    const int size = threads / concurrent;
    if (!units_only) consider(concurrent, 1, 1);  // steps shorter than a barrier
    for (int rg = 1; rg <= (units_only ? 1 : size) && (rg <= p.B || rg == 1); rg++)
      consider(concurrent, rg, int(least(size / rg, blocks)));
  }
  return best;
}

static int team_size(const Sequence& seq, int G) {
  const LayerParams& p = seq.p;
  return threads_for(double(p.D) * double(seq.tokens) * G * double(p.H) * double(p.I + p.P),
                     p.parallel.threads);
}
// Forward: nobody is woken to watch one thread walk alone.
template <class D>
static int forward_team_size(const Sequence& seq, int G, bool units_only) {
  const int size = team_size(seq, G);
  const Plan plan = make_plan<D>(seq, size, G, units_only, kBalanced);
  return plan.concurrent * plan.per_direction() == 1 ? 1 : size;
}
