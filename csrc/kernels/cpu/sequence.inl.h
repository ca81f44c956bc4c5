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
    return max_of(0, min_of(n, r1) - r0);
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

// The cost of a plan that splits units, as a factor, where every thread has at least kFineBlocks of them:
// then Shares moves blocks away from a core that is slower. In forward alone: three quarters of backward come
// from a queue.
constexpr double kBalanced = 0.97;
constexpr int64_t kFineBlocks = 4;

// Visits the row groups in order, visit(i, first row, end) -> go on? They have the same number of tokens
// each. In a packed sequence a row that follows lives no longer than those before: one walk over rows and
// steps.
template <class Visit>
static void each_row_group(const Sequence& seq, int groups, const Visit& visit) {
  const int64_t B = seq.p.B;
  int64_t begin = 0, row = 0, steps = seq.p.T;
  double above = 0;  // tokens of the rows before `row`
  for (int i = 0; i < groups; i++) {
    int64_t end = B * (i + 1) / groups;
    if (seq.p.batch_sizes && i + 1 < groups) {
      const double target = double(seq.tokens) * (i + 1) / groups;
      for (; row < B && above < target; row++) {
        while (steps > 0 && seq.rows(steps - 1) <= row) steps--;
        above += double(steps);
      }
      end = row;
    }
    if (!visit(i, begin, end)) return;
    begin = end;
  }
}
struct RowRange {
  int64_t begin = 0, end = 0;
};
static RowRange row_group_of(const Sequence& seq, int groups, int which) {
  RowRange range;
  each_row_group(seq, groups, [&](int i, int64_t begin, int64_t end) {
    range = {begin, end};
    return i < which;
  });
  return range;
}

template <class D>
static Plan make_plan(const Sequence& seq, int threads, int G, bool units_only, double balanced = 1) {
  const LayerParams& p = seq.p;
  const int64_t blocks = divide_up(p.H, NR<D>);
  Plan best{1, 1, 1};
  double cheapest = -1;
  auto consider = [&](int concurrent, int rg, int ug) {
    const int64_t units = divide_up(blocks, ug) * NR<D>;
    // Steps looked at: fewer for each of many groups, so that no candidate costs much more than another.
    const int64_t samples = p.batch_sizes ? min_of(p.T, max_of(8, min_of(64, 256 / rg))) : 1;
    double worst = 0;
    each_row_group(seq, rg, [&](int, int64_t begin, int64_t end) {
      double sum = 0;
      for (int64_t s = 0; s < samples; s++)
        sum +=
            step_cycles<D>(seq.rows(p.T * s / samples, begin, end), min_of(units, p.H), p.I, p.P, G, ug > 1);
      if (sum > worst) worst = sum;
      return true;
    });
    worst *= double(p.D) / (concurrent * samples);
    if (ug > 1 && blocks >= kFineBlocks * ug) worst *= balanced;
    if (cheapest < 0 || worst < cheapest) cheapest = worst, best = {concurrent, rg, ug};
  };
  for (int concurrent = p.D <= threads ? p.D : 1; concurrent > 0; concurrent--) {
    const int size = threads / concurrent;
    if (!units_only) consider(concurrent, 1, 1);  // steps shorter than a barrier
    for (int rg = 1; rg <= (units_only ? 1 : size) && (rg <= p.B || rg == 1); rg++)
      consider(concurrent, rg, int(min_of(size / rg, blocks)));
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
