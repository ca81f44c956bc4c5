// Which kernel the recurrence of a layer takes, by the cheapest plan, and its launch.
#pragma once

#include <type_traits>

#include "persistent.cuh"
#include "single.cuh"

namespace seqkernels::cuda {

// of(E()) for the type of the layer's products on chip; doubles go stepwise.
template <class F>
auto with_product_type(const Layer& p, const F& of) {
  return p.dtype == DType::bf16  ? of(bf16())
         : p.dtype == DType::f16 ? of(f16())
         : p.tf32                ? of(tf32())
                                 : of(float());
}

template <class E, class Args>
Plan plan_for(void (*kernel)(Args), const Layer& p, int64_t K, int gates, int tiles, int states) {
  if (p.P != p.H || p.dtype == DType::f64) return {};
  return make_plan(machine_for(kernel, kThreads),
                   {p.B, p.H, K, p.D, gates, tiles, int(sizeof(E)), states, std::is_same_v<E, float>});
}

// Of the kernels of single.cuh.
template <class Kernel>
Kernel* of_size(int64_t H, Kernel* of_64, Kernel* of_128) {
  return single_several(H) == 1 ? of_64 : of_128;
}

template <class Cell>
void Recurrence<Cell>::fwd(const FwdLayer& p, Stream stream) {
  with_product_type(p, [&](auto e) {
    using E = decltype(e);
    if constexpr (sizeof(E) == 2)
      if (p.plan.single)
        return launch_apart(of_size(p.H, single_fwd_kernel<Cell, E, 1>, single_fwd_kernel<Cell, E, 2>),
                            "single_fwd", p, stream);
    constexpr int kMost = most_tiles_fwd<E>(Cell::kGates), kLeast = kMost < 2 ? kMost : 2;
    launch_together(p.plan.tiles == kMost ? persistent_fwd_kernel<Cell, E, kMost>
                                          : persistent_fwd_kernel<Cell, E, kLeast>,
                    "persistent_fwd", p, stream);
  });
}
template <class Cell>
void Recurrence<Cell>::bwd(const BwdLayer& p, Stream stream) {
  with_product_type(p, [&](auto e) {
    using E = decltype(e);
    if constexpr (sizeof(E) == 2)
      if (p.plan.single)
        return launch_apart(of_size(p.H, single_bwd_kernel<Cell, E, 1>, single_bwd_kernel<Cell, E, 2>),
                            "single_bwd", p, stream);
    launch_together(p.plan.tiles == 1 ? persistent_bwd_kernel<Cell, E, 1> : persistent_bwd_kernel<Cell, E, 2>,
                    "persistent_bwd", p, stream);
  });
}
template <class Args>
Plan single_plan_for(void (*kernel)(Args), const Layer& p, bool forward, int gates) {
  if (p.P != p.H) return {};
  return make_single_plan(machine_for(kernel, kSingleThreads), p.B, p.H, p.D, forward, gates);
}

// The cheaper of two plans, the first if it is as cheap.
inline Plan cheaper(const Plan& a, const Plan& b) {
  return a.members == 0 || (b.members > 0 && b.clocks < a.clocks) ? b : a;
}
template <class Cell>
Plan Recurrence<Cell>::plan_fwd(const Layer& p) {
  return with_product_type(p, [&](auto e) {
    using E = decltype(e);
    constexpr int G = Cell::kGates, kMost = most_tiles_fwd<E>(G), kLeast = kMost < 2 ? kMost : 2;
    Plan plan = cheaper(plan_for<E>(persistent_fwd_kernel<Cell, E, kLeast>, p, p.H, G, kLeast, 0),
                        plan_for<E>(persistent_fwd_kernel<Cell, E, kMost>, p, p.H, G, kMost, 0));
    if constexpr (sizeof(E) == 2)
      plan = cheaper(
          plan, single_plan_for(of_size(p.H, single_fwd_kernel<Cell, E, 1>, single_fwd_kernel<Cell, E, 2>), p,
                                true, G));
    return plan;
  });
}
template <class Cell>
Plan Recurrence<Cell>::plan_bwd(const Layer& p) {
  return with_product_type(p, [&](auto e) {
    using E = decltype(e);
    const int64_t K = Cell::kGates * p.H;
    Plan plan = cheaper(plan_for<E>(persistent_bwd_kernel<Cell, E, 1>, p, K, 1, 1, 1 + Cell::kCellState),
                        plan_for<E>(persistent_bwd_kernel<Cell, E, 2>, p, K, 1, 2, 1 + Cell::kCellState));
    if constexpr (sizeof(E) == 2)
      plan = cheaper(
          plan, single_plan_for(of_size(p.H, single_bwd_kernel<Cell, E, 1>, single_bwd_kernel<Cell, E, 2>), p,
                                false, Cell::kGates));
    return plan;
  });
}

}  // namespace seqkernels::cuda
