// What the kernels ask of the machine. Tests put an emulation of it (cuda_host.h) in its place and run the
// same kernels on the CPU.
#pragma once

#include <stdint.h>

#include <type_traits>

#include "kernels/types.h"

#if defined(__CUDACC__)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace seqkernels::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;
struct tf32 {  // a float with 10 bits of mantissa: how products of floats take it
  uint32_t bits;
};

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

__device__ __forceinline__ float widen(bf16 a) { return __bfloat162float(a); }
__device__ __forceinline__ float widen(f16 a) { return __half2float(a); }
__device__ __forceinline__ void narrow(float a, bf16& to) { to = __float2bfloat16_rn(a); }
__device__ __forceinline__ void narrow(float a, f16& to) { to = __float2half_rn(a); }

__device__ __forceinline__ void narrow(float a, tf32& to) {
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(to.bits) : "f"(a));
}

// c [16, 8] += a [16, 16] b [16, 8], spread over a warp as PTX's mma.m16n8k16 has it; of TF32 m16n8k8.
__device__ __forceinline__ void mma(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1, bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1, f16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(float (&c)[4], const uint4& a, uint32_t b0, uint32_t b1, tf32) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// What blocks publish to each other: 16 bytes at once, past the L1 cache.
__device__ __forceinline__ void publish(const uint4& packet, void* to) {
  asm volatile(
      "{ .reg .b64 lo, hi; .reg .b128 all; mov.b64 lo, {%1, %2}; mov.b64 hi, {%3, %4};\n"
      "mov.b128 all, {lo, hi}; st.relaxed.gpu.b128 [%0], all; }" ::"l"(to),
      "r"(packet.x), "r"(packet.y), "r"(packet.z), "r"(packet.w)
      : "memory");
}
__device__ __forceinline__ uint4 poll(const void* from) {
  uint4 packet;
  asm volatile(
      "{ .reg .b64 lo, hi; .reg .b128 all; ld.relaxed.gpu.b128 all, [%4]; mov.b128 {lo, hi}, all;\n"
      "mov.b64 {%0, %1}, lo; mov.b64 {%2, %3}, hi; }"
      : "=r"(packet.x), "=r"(packet.y), "=r"(packet.z), "=r"(packet.w)
      : "l"(from)
      : "memory");
  return packet;
}
// Anew, if the packet is empty: without a branch, so that all of a thread's are on their way at once.
__device__ __forceinline__ void poll_again(const void* from, uint4& packet) {
  asm volatile(
      "{ .reg .b64 lo, hi; .reg .b128 all; .reg .pred empty; setp.eq.u32 empty, %3, 0xffffffff;\n"
      "mov.b64 lo, {%0, %1}; mov.b64 hi, {%2, %3}; mov.b128 all, {lo, hi};\n"
      "@empty ld.relaxed.gpu.b128 all, [%4]; mov.b128 {lo, hi}, all;\n"
      "mov.b64 {%0, %1}, lo; mov.b64 {%2, %3}, hi; }"
      : "+r"(packet.x), "+r"(packet.y), "+r"(packet.z), "+r"(packet.w)
      : "l"(from)
      : "memory");
}
// What this thread published and polled before comes before what it publishes and polls from now on.
__device__ __forceinline__ void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// An element on its way from memory, in a register of its own: of two halves that share one the first would
// be waited for where the second is loaded.
template <class S>
using InFlight = std::conditional_t<sizeof(S) == 2, uint32_t, S>;
template <class S>
__device__ __forceinline__ InFlight<S> issue_load(const void* from, int64_t i) {
  if constexpr (sizeof(S) == 2) {
    uint32_t bits;
    asm volatile("ld.global.u16 %0, [%1];"
                 : "=r"(bits)
                 : "l"(__cvta_generic_to_global(static_cast<const S*>(from) + i)));
    return bits;
  } else {
    return static_cast<const S*>(from)[i];
  }
}
template <class S>
__device__ __forceinline__ S loaded(InFlight<S> a) {
  if constexpr (sizeof(S) == 2) {
    const uint16_t bits = static_cast<uint16_t>(a);
    return reinterpret_cast<const S&>(bits);
  } else {
    return a;
  }
}

}  // namespace seqkernels::cuda

#else
#include "cuda_host.h"
#endif

namespace seqkernels::cuda {

// Arithmetic is done in float, of doubles in double.
template <class S>
struct Accumulation {
  using type = float;
};
template <>
struct Accumulation<double> {
  using type = double;
};
template <class S>
using Acc = typename Accumulation<S>::type;

// What tensors hold of the elements of a product.
template <class E>
struct Storage {
  using type = E;
};
template <>
struct Storage<tf32> {
  using type = float;
};
template <class E>
using Stored = typename Storage<E>::type;

__device__ __forceinline__ float widen(float a) { return a; }
__device__ __forceinline__ double widen(double a) { return a; }
__device__ __forceinline__ void narrow(float a, float& to) { to = a; }
__device__ __forceinline__ void narrow(double a, double& to) { to = a; }

// As a tensor of S holds it.
template <class S>
__device__ __forceinline__ Acc<S> rounded(Acc<S> a) {
  S narrowed;
  narrow(a, narrowed);
  return widen(narrowed);
}

template <class S>
__device__ __forceinline__ S element(const void* from, int64_t i) {
  return static_cast<const S*>(from)[i];
}
template <class S>
__device__ __forceinline__ Acc<S> load(const void* from, int64_t i) {
  return widen(element<S>(from, i));
}
template <class S>
__device__ __forceinline__ void store(Acc<S> value, void* to, int64_t i) {
  narrow(value, static_cast<S*>(to)[i]);
}

}  // namespace seqkernels::cuda
