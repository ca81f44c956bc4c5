// One vector type for every instruction set, on the compilers' own vector extensions: Vec<float>, Vec<double>
// of SEQKERNELS_VEC_BYTES (16 SSE2 and NEON, 32 AVX2, 64 AVX-512). Operators are the language's; a * b + c
// contracts to FMA. Included inside the anonymous namespace of an ISA file, so that no AVX-512 copy of an
// inline function can leak out.
#pragma once

template <class T>
struct VecOf {
  // Overload resolution names Vec<bf16> too, which Clang before 16 would have to be a vector.
  using E = std::conditional_t<std::is_arithmetic_v<T>, T, float>;
  typedef E type __attribute__((vector_size(SEQKERNELS_VEC_BYTES)));
  typedef E unaligned __attribute__((vector_size(SEQKERNELS_VEC_BYTES), aligned(alignof(E)), may_alias));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = SEQKERNELS_VEC_BYTES / sizeof(T);

#define SEQ_INLINE static inline __attribute__((always_inline))
#define SEQ_UNROLL _Pragma("GCC unroll 32")

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The arithmetic type behind a storage type.
template <class S>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class S>
using Acc = typename AccOf<S>::type;

// What the matrix products multiply: the arithmetic type, or bf16 itself where the processor has dot products
// for it.
template <class S>
struct OperandOf {
  using type = Acc<S>;
};
#if defined(__AVX512BF16__)
template <>
struct OperandOf<bf16> {
  using type = bf16;
};
#endif
template <class S>
using Operand = typename OperandOf<S>::type;

template <class T>
SEQ_INLINE Vec<T> splat(T s) {
  return s - Vec<T>{};
}

template <int n, class V, int... i>
SEQ_INLINE V exchange(V v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (i ^ n)...);
}
// All lanes joined into one value, by halves.
template <class T, int n = kLanes<T> / 2, class Join>
SEQ_INLINE T reduce_lanes(Vec<T> v, const Join& join) {
  if constexpr (n == 0)
    return v[0];
  else
    return reduce_lanes<T, n / 2>(join(v, exchange<n>(v, std::make_integer_sequence<int, kLanes<T>>{})),
                                  join);
}

// The larger (smaller) of each lane, b where one of them is NaN: x86's own rule, for which GCC would take a
// comparison and a blend.
SEQ_INLINE Vec<double> max_of(Vec<double> a, Vec<double> b) { return a > b ? a : b; }
SEQ_INLINE Vec<double> min_of(Vec<double> a, Vec<double> b) { return a < b ? a : b; }
#if defined(__AVX512F__)
SEQ_INLINE Vec<float> max_of(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
}
SEQ_INLINE Vec<float> min_of(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_maskz_min_ps(0xffff, (__m512)a, (__m512)b);
}
#elif defined(__AVX2__)
SEQ_INLINE Vec<float> max_of(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
}
SEQ_INLINE Vec<float> min_of(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b);
}
#else
SEQ_INLINE Vec<float> max_of(Vec<float> a, Vec<float> b) { return a > b ? a : b; }
SEQ_INLINE Vec<float> min_of(Vec<float> a, Vec<float> b) { return a < b ? a : b; }
#endif

using U32 = Vec<uint32_t>;
typedef uint16_t U16 __attribute__((vector_size(SEQKERNELS_VEC_BYTES / 2)));
typedef uint16_t U16u __attribute__((vector_size(SEQKERNELS_VEC_BYTES / 2), aligned(2), may_alias));

// Loads and stores of kLanes elements, converting between storage and arithmetic type.
template <class T>
SEQ_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecOf<T>::unaligned*>(p);
}
template <class T>
SEQ_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecOf<T>::unaligned*>(p) = v;
}

// 16-bit floats to float and back.
#if defined(__AVX512F__)  // GCC converts 256 bits at a time
SEQ_INLINE Vec<float> widen(U16 half, bf16) {
  return (Vec<float>)((U32)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)half) << 16);
}
#else
SEQ_INLINE Vec<float> widen(U16 half, bf16) { return (Vec<float>)(__builtin_convertvector(half, U32) << 16); }
#endif
#if defined(__AVX512BF16__)
SEQ_INLINE U16 narrow(Vec<float> v, bf16) {  // subnormal numbers become 0, as in the dot products
  return (U16)_mm512_cvtneps_pbh((__m512)v);
}
#else
SEQ_INLINE U16 narrow(Vec<float> v, bf16) {  // to nearest even; a NaN stays a NaN
  U32 u = (U32)v;
  U32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  U32 is_nan = (U32)(v != v);
  return __builtin_convertvector((rounded & ~is_nan) | (((u >> 16) | 0x40u) & is_nan), U16);
}
#endif

#if defined(__AVX512F__)
SEQ_INLINE Vec<float> widen(U16 half, f16) {
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, (__m256i)half);
}
SEQ_INLINE U16 narrow(Vec<float> v, f16) {
  return (U16)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
}
#elif defined(__F16C__)
SEQ_INLINE Vec<float> widen(U16 half, f16) { return (Vec<float>)_mm256_cvtph_ps((__m128i)half); }
SEQ_INLINE U16 narrow(Vec<float> v, f16) {
  return (U16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
}
#else
// By integer arithmetic: normal numbers rebias the exponent, subnormals go through a float addition.
SEQ_INLINE Vec<float> widen(U16 half, f16) {
  U32 h = __builtin_convertvector(half, U32);
  U32 sign = (h & 0x8000u) << 16, mag = (h & 0x7fffu) << 13;
  U32 is_max = (U32)(mag >= (0x7c00u << 13)), is_sub = (U32)(mag < (0x0400u << 13));
  U32 normal = mag + (112u << 23) + (is_max & (112u << 23));
  U32 sub = (U32)((Vec<float>)(mag + (113u << 23)) - splat(6.103515625e-05f));
  return (Vec<float>)(sign | (is_sub & sub) | (~is_sub & normal));
}
SEQ_INLINE U16 narrow(Vec<float> v, f16) {
  U32 u = (U32)v, sign = u & 0x80000000u, mag = u ^ sign;
  U32 is_nan = (U32)(mag > 0x7f800000u), is_inf = (U32)(mag >= 0x47800000u),
      is_sub = (U32)(mag < 0x38800000u);
  U32 normal = (mag - (112u << 23) + 0xfffu + ((mag >> 13) & 1u)) >> 13;
  U32 sub = (U32)((Vec<float>)mag + splat(0.5f)) - 0x3f000000u;
  U32 out = (is_sub & sub) | (~is_sub & normal);
  out = (is_inf & 0x7c00u) | (~is_inf & out);
  out = (is_nan & 0x7e00u) | (~is_nan & out);
  return __builtin_convertvector(out | (sign >> 16), U16);
}
#endif
SEQ_INLINE Vec<float> load(const bf16* p) { return widen(*reinterpret_cast<const U16u*>(p), bf16{}); }
SEQ_INLINE Vec<float> load(const f16* p) { return widen(*reinterpret_cast<const U16u*>(p), f16{}); }
SEQ_INLINE void store(bf16* p, Vec<float> v) { *reinterpret_cast<U16u*>(p) = narrow(v, bf16{}); }
SEQ_INLINE void store(f16* p, Vec<float> v) { *reinterpret_cast<U16u*>(p) = narrow(v, f16{}); }

// The first n (1 or more) elements only; the other lanes read as zero and are not written.
template <class S>
SEQ_INLINE Vec<Acc<S>> load(const S* p, int64_t n) {
  constexpr int W = kLanes<Acc<S>>;
  if (n >= W) return load(p);
#if defined(__AVX512F__)
  const unsigned some = (1u << n) - 1;
  if constexpr (sizeof(S) == 8)
    return (Vec<Acc<S>>)_mm512_maskz_loadu_pd(__mmask8(some), p);
  else if constexpr (sizeof(S) == 4)
    return (Vec<Acc<S>>)_mm512_maskz_loadu_ps(__mmask16(some), p);
  else
    return widen((U16)_mm256_maskz_loadu_epi16(__mmask16(some), p), S{});
#else
  S some[W] = {};
  for (int64_t i = 0; i < n; i++) some[i] = p[i];
  return load(static_cast<const S*>(some));
#endif
}
template <class S>
SEQ_INLINE void store(S* p, Vec<Acc<S>> v, int64_t n) {
  constexpr int W = kLanes<Acc<S>>;
  if (n >= W) return store(p, v);
#if defined(__AVX512F__)
  const unsigned some = (1u << n) - 1;
  if constexpr (sizeof(S) == 8)
    _mm512_mask_storeu_pd(p, __mmask8(some), (__m512d)v);
  else if constexpr (sizeof(S) == 4)
    _mm512_mask_storeu_ps(p, __mmask16(some), (__m512)v);
  else
    _mm256_mask_storeu_epi16(p, __mmask16(some), (__m256i)narrow(v, S{}));
#else
  S some[W];
  store(static_cast<S*>(some), v);
  for (int64_t i = 0; i < n; i++) p[i] = some[i];
#endif
}

// Store past the caches, for what is read only in backward: no line is fetched before it is overwritten. p is
// aligned to the vector, and a whole one is written (see `past_cache` in FwdTile); fence() makes the stores
// visible to other threads.
template <class S>
SEQ_INLINE void stream(S* p, Vec<Acc<S>> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
  if constexpr (sizeof(S) == 8) return _mm512_stream_pd(reinterpret_cast<double*>(p), (__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(S) == 4) return _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
  if constexpr (sizeof(S) == 8) return _mm256_stream_pd(reinterpret_cast<double*>(p), (__m256d)v);
#endif
  store(p, v);
}
SEQ_INLINE void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
