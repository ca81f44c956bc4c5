// sigmoid and tanh on vectors, <= 4 ulp (tests/test_kernels.py measures it; sigmoid is 0 below -88.4, with
// AVX-512 below -87), exact at 0, +-1 when saturated, NaN in NaN out. On Zen 5 a tanh takes 12 cycles, the
// five activations of an LSTM 50. Both reduce to k ln 2 + r with |r| <= ln 2 / 2, so that e^(k ln 2) is made
// of bits.
#pragma once

#include "vec.h"

template <class T>
using Word = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // as wide as a lane

// kMagic rounds to integer when added and leaves the biased exponent in the low bits; ln 2 in two parts. The
// power of 2 near e^kInf is inf.
template <class T>
struct Exp;

template <>
struct Exp<float> {
  static constexpr float kMagic = 12582912.0f + 127, kLog2e = 1.44269504f, kLn2Hi = 0.693359375f,
                         kLn2Lo = -2.12194440e-4f, kLimit = 87.0f, kInf = 88.7228391f;
  static constexpr int kShift = 23;
};
template <>
struct Exp<double> {
  static constexpr double kMagic = 6755399441055744.0 + 1023, kLog2e = 1.4426950408889634,
                          kLn2Hi = 6.93147180369123816490e-01, kLn2Lo = 1.90821492927058770002e-10,
                          kLimit = 700.0, kInf = 709.782712893384;
  static constexpr int kShift = 52;
};

// 2^k for a biased k in the low bits of z.
template <class T>
SEQ_INLINE Vec<T> power_of_2(Vec<T> z) {
  return (Vec<T>)((Vec<Word<T>>)z << Exp<T>::kShift);
}
template <class T, int n>
SEQ_INLINE Vec<T> polynomial(Vec<T> x, const T (&c)[n]) {  // highest power first
  Vec<T> y = splat(c[0]);
  SEQ_UNROLL for (int i = 1; i < n; i++) y = y * x + c[i];
  return y;
}

// e^r, minimax but exact at 0: relative error 9.1e-8.
SEQ_INLINE Vec<float> exp_near_0(Vec<float> r) {
  constexpr float c[] = {0.00829031453f, 0.0418979294f, 0.166676362f, 0.499991496f, 0.999999708f, 1.0f};
  return polynomial<float>(r, c);
}
// e^r - 1 and e^r by Taylor's series.
SEQ_INLINE Vec<double> expm1_near_0(Vec<double> r) {
  constexpr double c[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                          1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                          1.0 / 120,        1.0 / 24,        1.0 / 6,        0.5};
  return polynomial<double>(r, c) * (r * r) + r;
}
SEQ_INLINE Vec<double> exp_near_0(Vec<double> r) { return 1.0 + expm1_near_0(r); }

// 1 / d and n / d for 0 < d < inf, and 1 / inf where it is a division. AVX-512 has no fast single precision
// division (16 cycles), so one Newton step on vrcp14ps and, for a quotient that must not pass 1 where n <= d,
// one on the quotient.
template <class T>
constexpr bool kDivides = SEQKERNELS_VEC_BYTES < 64 || sizeof(T) == 8;
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

// A NaN stays one.
template <class T>
SEQ_INLINE Vec<T> clamp(Vec<T> x, T lo, T hi) {
  return min_of(splat(hi), max_of(splat(lo), x));
}

template <class T>
SEQ_INLINE Vec<T> sigmoid(Vec<T> x) {  // 1 / (1 + e^-x)
  using E = Exp<T>;
  const Vec<T> t = clamp<T>(x, kDivides<T> ? -E::kInf : -E::kLimit, E::kLimit);
  const Vec<T> z = E::kMagic - t * E::kLog2e, k = z - E::kMagic, r = -t - k * E::kLn2Hi - k * E::kLn2Lo;
  const Vec<T> y = reciprocal(exp_near_0(r) * power_of_2<T>(z) + T(1));
  if constexpr (kDivides<T>) return y;  // 22 -> 20 cycles for three of 8 floats (Zen 4)
  return x < -E::kLimit ? Vec<T>{} : y;
}

// tanh(x) = e / (e + 2), e = e^2x - 1 = s p + (s - 1) with s = 2^k and p = e^2r - 1: written so, small
// arguments keep their relative accuracy. The larger |x|, the less an error of r counts, so that float needs
// ln 2 in one part only.
SEQ_INLINE Vec<float> tanh_of(Vec<float> x) {
  using E = Exp<float>;
  constexpr float kHalfLn2 = 0.34657359f;
  // (e^2r - 1) / r, minimax on |r| <= ln 2 / 4: relative error 1.1e-8.
  constexpr float c[] = {0.08888878545f, 0.2678124814f, 0.6666742094f, 1.333320446f, 1.999999925f, 2.0f};
  x = clamp<float>(x, -10.0f, 10.0f);  // tanh(10) rounds to 1
  const Vec<float> z = x * (2 * E::kLog2e) + E::kMagic, r = x - (z - E::kMagic) * kHalfLn2;
  const Vec<float> s = power_of_2<float>(z), p = polynomial<float>(r, c) * r;
  return divide(s * p + (s - 1.0f), s * p + (s + 1.0f));
}
SEQ_INLINE Vec<double> tanh_of(Vec<double> x) {
  using E = Exp<double>;
  const Vec<double> t = clamp<double>(x + x, -40.0, 40.0), z = t * E::kLog2e + E::kMagic, k = z - E::kMagic;
  const Vec<double> s = power_of_2<double>(z), p = expm1_near_0(t - k * E::kLn2Hi - k * E::kLn2Lo);
  return divide(s * p + (s - 1.0), s * p + (s + 1.0));
}
template <class T>
SEQ_INLINE Vec<T> tanh(Vec<T> x) {
  return tanh_of(x);
}
