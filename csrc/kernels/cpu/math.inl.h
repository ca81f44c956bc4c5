// sigmoid and tanh on vectors, <= 4 ulp (tests/test_kernels.py measures it; sigmoid below -87 is 0), exact at
// 0, +-1 when saturated, NaN in NaN out. Both rest on expm1(t) = s p + (s - 1) with t = k ln 2 + r, |r| <= ln
// 2 / 2, s = 2^k, p = expm1(r) by a polynomial: written so, small arguments of tanh keep their relative
// accuracy and sigmoid pays nothing for it.
#pragma once

#include "vec.h"

template <class T>
struct Expm1;  // constants: magic rounds to integer when added, Cody-Waite parts of ln 2, 1/n!

template <>
struct Expm1<float> {
  using Int = Vec<int32_t>;
  static constexpr float kLog2e = 1.44269504f, kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f,
                         kMagic = 12582912.0f;
  static constexpr int32_t kMagicBits = 0x4B400000, kBias = 127, kShift = 23;
  static constexpr float kLimit = 87.0f, kTanhOne = 20.0f;  // |tanh(10)| rounds to 1
  // Minimax on |r| <= ln 2 / 2: relative error 1.3e-8, a quarter of an ulp, with one term less than Taylor.
  static constexpr float kC[] = {0.0013882521f, 0.00836651563f, 0.0416671997f, 0.166665437f, 0.499999982f};
};

template <>
struct Expm1<double> {
  using Int = Vec<int64_t>;
  static constexpr double kLog2e = 1.4426950408889634, kLn2Hi = 6.93147180369123816490e-01,
                          kLn2Lo = 1.90821492927058770002e-10, kMagic = 6755399441055744.0;
  static constexpr int64_t kMagicBits = 0x4338000000000000, kBias = 1023, kShift = 52;
  static constexpr double kLimit = 700.0, kTanhOne = 40.0;
  static constexpr double kC[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                  1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                  1.0 / 120,        1.0 / 24,        1.0 / 6,        0.5};
};

template <class T>
SEQ_INLINE void expm1_parts(Vec<T> t, Vec<T>& s, Vec<T>& p) {  // |t| <= kLimit
  using E = Expm1<T>;
  Vec<T> z = t * E::kLog2e + E::kMagic;
  Vec<T> k = z - E::kMagic;
  s = (Vec<T>)(((typename E::Int)z + (E::kBias - E::kMagicBits)) << E::kShift);
  Vec<T> r = t - k * E::kLn2Hi;
  r = r - k * E::kLn2Lo;
  Vec<T> q = splat(E::kC[0]);
  SEQ_UNROLL
  for (int i = 1; i < int(sizeof(E::kC) / sizeof(T)); i++) q = q * r + E::kC[i];
  p = q * (r * r) + r;
}

// 1 / d and n / d for 0 < d < inf. AVX-512 has no fast single precision division (16 cycles), so one Newton
// step on vrcp14ps and, for a quotient that must not pass 1 where n <= d, one on the quotient.
SEQ_INLINE Vec<double> reciprocal(Vec<double> d) { return 1.0 / d; }
SEQ_INLINE Vec<double> divide(Vec<double> n, Vec<double> d) { return n / d; }
#if defined(__AVX512F__)
SEQ_INLINE Vec<float> reciprocal(Vec<float> d) {
  Vec<float> r = (Vec<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)d);
  return r + r * (1.0f - d * r);
}
SEQ_INLINE Vec<float> divide(Vec<float> n, Vec<float> d) {
  Vec<float> r = reciprocal(d), q = n * r;
  return q + r * (n - d * q);
}
#else
SEQ_INLINE Vec<float> reciprocal(Vec<float> d) { return 1.0f / d; }
SEQ_INLINE Vec<float> divide(Vec<float> n, Vec<float> d) { return n / d; }
#endif

// min(max(x, lo), hi); x86's minps and maxps return the second operand when one is NaN, so a NaN stays.
template <class T>
SEQ_INLINE Vec<T> clamp(Vec<T> x, T lo, T hi) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_min_ps(0xffff, (__m512)splat(hi),
                                       _mm512_maskz_max_ps(0xffff, (__m512)splat(lo), (__m512)x));
#endif
  x = x < lo ? splat(lo) : x;
  return x > hi ? splat(hi) : x;
}

template <class T>
SEQ_INLINE Vec<T> sigmoid(Vec<T> x) {  // 1 / (1 + e^-x)
  const T limit = Expm1<T>::kLimit;
  Vec<T> s, p;
  expm1_parts<T>(clamp<T>(-x, -limit, limit), s, p);
  Vec<T> y = reciprocal(s * p + (s + T(1)));
  return x < -limit ? Vec<T>{} : y;
}

template <class T>
SEQ_INLINE Vec<T> tanh(Vec<T> x) {  // expm1(2x) / (expm1(2x) + 2)
  const T limit = Expm1<T>::kTanhOne;
  Vec<T> s, p;
  expm1_parts<T>(clamp<T>(x + x, -limit, limit), s, p);
  Vec<T> e = s * p + (s - T(1));
  return divide(e, e + T(2));
}
