// exp, log, log1p and tanh for float, double and short vectors of them, for host and device.
//
// Every formula of the project is a template over V: a float or double on the device, a SIMD vector of them on the CPU
// (csrc/cpu/vector.h). On the device the names below are CUDA's own functions; on the CPU the float versions are
// polynomials without branches: one instruction stream for all lanes. The exponentials are in exponential.h.
//
// Each function says where it is valid and how large its error is, for floats and vectors of doubles. A double by
// itself goes to CUDA's function or libm's, which are valid everywhere and within 1 ulp. The error is what
// tests/test_elementary.py allows at every SIMD level, and in parentheses the largest it finds over every float32 and
// over a sample of doubles.
#pragma once

#include "lanes.h"
#if !defined(__CUDACC__)
#include "exponential.h"
#endif

namespace torchce::math {

constexpr float kInfinityF = __builtin_huge_valf();
template <class A>
constexpr A kInfinity = A(__builtin_huge_val());

// kLowest is the lowest finite number, below which there is but minus infinity, and kSmallestNormal the smallest normal
// one: one below has lost digits.
template <class A>
constexpr A kLowest = sizeof(A) == sizeof(float) ? A(-__FLT_MAX__) : A(-__DBL_MAX__);
template <class A>
constexpr A kSmallestNormal = sizeof(A) == sizeof(float) ? A(__FLT_MIN__) : A(__DBL_MIN__);

// kRatioLift multiplies the quotients of log_ratio, so that none is a subnormal number.
template <class A>
constexpr A kRatioLift = sizeof(A) == sizeof(double) ? A(0x1p54) : A(0x1p25);

// two_atanh_rest is 2 atanh(u) - 2u, as u^3 Q(u^2) with a minimax fit Q.
// Valid: |u| <= 1/3 and NaN. Subnormal numbers give 0; beyond 1/3 the fit leaves the function.
// Error: 9 ulp (6.83, of doubles 2.38), most of it the fit's, which is made for the sum with 2u.
template <class F>
TORCHCE_HD F two_atanh_rest(F u) {
  const F z = u * u;
  F q = z * 2.8024458897e-1f + 2.79991410648e-1f;
  q = q * z + 4.00216990601e-1f;
  q = q * z + 6.66664131327e-1f;
  return u * z * q;
}
template <class F>
TORCHCE_HD F two_atanh_rest_of_doubles(F u) {
  const F z = u * u;
  F q = z * 0.17010741865892917 + 0.08344455498152262;
  q = q * z + 0.12105059267861645;
  q = q * z + 0.13301107419078034;
  q = q * z + 0.15386549415661643;
  q = q * z + 0.18181744433089106;
  q = q * z + 0.222222239548887;
  q = q * z + 0.2857142854809913;
  q = q * z + 0.40000000000155256;
  q = q * z + 0.6666666666666631;
  return u * z * q;
}
#if defined(__CUDACC__)
TORCHCE_HD double two_atanh_rest(double u) { return two_atanh_rest_of_doubles(u); }
#else
template <class F>
  requires kWide<F>
TORCHCE_HD F two_atanh_rest(F u) {
  return two_atanh_rest_of_doubles(u);
}
#endif

// two_atanh is 2 atanh(u).
// Valid: |u| <= 1/3 and NaN. -0 and subnormal numbers are right; beyond 1/3 the fit leaves the function.
// Error: 1 ulp (of floats 0.62), of which the fit has 2^-27.7 of the value, of doubles 2^-58.7.
template <class F>
TORCHCE_HD F two_atanh(F u) {
  return u * 2.0f + two_atanh_rest(u);
}

#if defined(__CUDACC__)

// exp_of_negative is e^x, log the natural logarithm, log1p is log(1 + x): CUDA's own.
// Valid: all x, as of the C functions of these names; subnormal results are right.
// Error: at most 2 ulp by CUDA's table of its functions.
TORCHCE_HD float exp_of_negative(float x) { return ::expf(x); }
TORCHCE_HD double exp_of_negative(double x) { return ::exp(x); }
TORCHCE_HD float log(float x) { return ::logf(x); }
TORCHCE_HD double log(double x) { return ::log(x); }
TORCHCE_HD float log1p(float x) { return ::log1pf(x); }
TORCHCE_HD double log1p(double x) { return ::log1p(x); }

// log_of_positive and log_ratio are described below, for the CPU.
// Error: at most 2 ulp by CUDA's table of its functions; of log_ratio, beside that of its arguments.
TORCHCE_HD float log_of_positive(float x) { return ::logf(x); }
TORCHCE_HD double log_of_positive(double x) { return ::log(x); }
template <class A>
TORCHCE_HD A log_ratio(A lifted, A excess) {
  if (lifted >= A(0.5) * kRatioLift<A>) return log1p(excess);
  if (lifted < kSmallestNormal<A> * kRatioLift<A>) return log_of_positive(lifted) - log(kRatioLift<A>);
  return log_of_positive(lifted * (1 / kRatioLift<A>));
}

// tanh of doubles is CUDA's own, as above.
TORCHCE_HD double tanh(double u) { return ::tanh(u); }

// larger is the larger of a and b.
// Valid: all a and b; beside a NaN the other one.
// Error: none.
TORCHCE_HD float larger(float a, float b) { return ::fmaxf(a, b); }
TORCHCE_HD double larger(double a, double b) { return ::fmax(a, b); }

// within is u, or beyond -limit and limit the nearer of these.
// Valid: all u and limit > 0; a NaN stays.
// Error: none.
TORCHCE_HD float within(float u, float limit) { return select(::fabsf(u) > limit, ::copysignf(limit, u), u); }
TORCHCE_HD double within(double u, double limit) { return select(::fabs(u) > limit, ::copysign(limit, u), u); }

// divide is a / b.
// Valid: all a; 2^-126 <= |b| <= 2^126, 0, infinity and NaN. A smaller b counts as 0, by a larger one the result is 0.
// Error: 2 ulp, of doubles 1/2.
//
// It takes two instructions where an exact division takes ten and __fdividef, which scales divisors below 2^-126, six.
TORCHCE_HD double divide(double a, double b) { return a / b; }
TORCHCE_HD float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));
  return a * reciprocal;
#else
  return a / b;
#endif
}

// log1p_unit is log(1 + x), as 2 atanh(x / (2 + x)).
// Valid: 0 <= x <= 1 and NaN; -0 stays -0. Beyond 1 the fit of two_atanh leaves the function, +infinity gives NaN.
// Error: 2^-21.6 of the value: the roundings of 2 + x, of the quotient and of two_atanh.
TORCHCE_HD float log1p_unit(float x) { return two_atanh(divide(x, x + 2.0f)); }
TORCHCE_HD double log1p_unit(double x) { return ::log1p(x); }

#else

// divide is a / b.
// Valid: all a and b.
// Error: 1/2 ulp.
template <class V>
TORCHCE_HD V divide(V a, V b) {
  return a / b;
}

// larger is the larger of a and b.
// Valid: all numbers a; a NaN in b gives a, and one in a stays. Of two zeros it is a.
// Error: none.
template <class V>
TORCHCE_HD V larger(V a, V b) {
  return select(b > a, b, a);
}

// within is u, or beyond -limit and limit the nearer of these.
// Valid: all u and limit > 0; a NaN stays.
// Error: none.
template <class F>
TORCHCE_HD F within(F u, ElementOf<F> limit) {
  const F most = F{} + unseen(limit), least = -most;
  u = select(most < u, most, u);
  return select(least > u, least, u);
}

TORCHCE_HD double log(double x) { return __builtin_log(x); }
TORCHCE_HD double log1p_unit(double x) { return __builtin_log1p(x); }
TORCHCE_HD double log1p(double x) { return __builtin_log1p(x); }
TORCHCE_HD double tanh(double u) { return __builtin_tanh(u); }

// exponent_of is n where x = 2^n m with m in [0.9, 1.8): not around 1, because n ln 2 and log m would cancel below it.
// Valid: normal x > 0; infinity gives 128, of doubles 1024.
// Error: none.
template <class F>
TORCHCE_HD typename BitsOf<F>::type exponent_of(F x) {
  return (to_bits(x) - to_bits(ElementOf<F>(0.9f))) >> kMantissaBits<F>;
}

// kRoundToInteger added to a number leaves that, rounded to an integer, in the low bits of the mantissa.
template <class A>
constexpr A kRoundToInteger = A(int64_t{3} << (kMantissaBits<A> - 1));

// log_of_parts is n ln 2 + log(1 + x), the latter as 2 atanh(x / (2 + x)).
// Valid: |n| < 2^15, for n times the upper part of ln 2 to be exact, and -0.1 <= x < 0.8.
// Error: at most 2 ulp (1.98, of doubles 1.95), most of it x / (2 + x)'s where n is 0.
template <class F>
TORCHCE_HD F log_of_parts(typename BitsOf<F>::type n, F x) {
  using A = ElementOf<F>;
  const F nf = from_bits(n + to_bits(kRoundToInteger<A>)) - kRoundToInteger<A>;  // n as a number of type A
  return nf * kLn2High<A> + (two_atanh(x / (x + A(2))) + nf * kLn2Low<A>);
}

// log is the natural logarithm of what a sum of exponentials that holds its own maximum can be.
// Valid: x >= 1, infinity and NaN. Nothing is promised below 1, where 0 and negative numbers give finite ones.
// Error: at most 2 ulp (1.98, of doubles 1.95).
template <class F>
TORCHCE_HD F log(F x) {
  using A = ElementOf<F>;
  const auto n = exponent_of(x);
  return select(x < kInfinity<A>, log_of_parts(n, from_bits(to_bits(x) - (n << kMantissaBits<F>)) - A(1)), x);
}

// exponent_around_one is n where x = 2^n m with m in [0.707, 1.415): beside a log m of the other sign half of n ln 2 is
// left at the least.
// Valid: normal x > 0.
// Error: none.
template <class F>
TORCHCE_HD typename BitsOf<F>::type exponent_around_one(F x) {
  using Words = typename WordsOf<F>::type;  // without a sign: the difference of others may overflow
  using I = typename BitsOf<F>::type;
  return I(Words(to_bits(x)) - Words(to_bits(F{} + ElementOf<F>(0.70710678f)))) >> kMantissaBits<F>;
}

// log_of_positive is the natural logarithm.
// Valid: all x but infinity, which gives a finite number; 0 gives minus infinity, a negative x NaN.
// Error: at most 2 ulp (1.99, of doubles 1.99).
template <class F>
TORCHCE_HD F log_of_positive(F x) {
  using A = ElementOf<F>;
  using I = typename BitsOf<F>::type;
  constexpr int kLift = kMantissaBits<F> + 1;  // of subnormal numbers, which have no exponent of their own
  constexpr A kFactor = A(int64_t{1} << kLift);
  const auto is_subnormal = x < kSmallestNormal<A>;
  const F y = select(is_subnormal, x * kFactor, x);
  const I n = exponent_around_one(y);
  const F mantissa = from_bits(to_bits(y) - (n << kMantissaBits<F>));
  const F result = log_of_parts(n - select(is_subnormal, I{} + kLift, I{}), mantissa - A(1));
  return select(x > F{}, result, select(x == F{}, F{} - kInfinity<A>, x + A(__builtin_nan(""))));
}

// log_ratio is log r, given r kRatioLift, and r - 1 as `excess`, which may be known more exactly than r is.
// Valid: r from 2^-149, of doubles 2^-1074, to 2^100, 0 and NaN; 0 gives minus infinity.
// Error: at most 3 ulp (2.51), beside that of r where it is below 1/2 and that of the excess elsewhere.
template <class F>
TORCHCE_HD F log_ratio(F lifted, F excess) {
  using A = ElementOf<F>;
  constexpr int kLift = kWide<F> ? 54 : 25;
  const auto of_lifted = exponent_around_one(lifted), n = of_lifted - kLift;
  const F mantissa = from_bits(to_bits(lifted) - (of_lifted << kMantissaBits<F>));
  using Words = typename WordsOf<F>::type;  // of 0 or a NaN the difference of others overflows
  using I = typename BitsOf<F>::type;
  const F scale = from_bits(I(Words(to_bits(F{} + A(1))) - (Words(n) << kMantissaBits<F>)));
  const auto is_small = lifted < A(0.5) * kRatioLift<A>;
  const F of_mantissa = select(is_small, mantissa - A(1), excess * scale + (scale - A(1)));
  return select(lifted == F{}, F{} - kInfinity<A>, log_of_parts(n, of_mantissa));
}

// log1p is log(1 + x).
// Valid: 0 <= x <= 2^100 and NaN. -0 gives 0; +infinity gives NaN, and beyond 2^126 nothing is promised.
// Error: at most 2 ulp (1.98, of doubles 1.95), of the smallest number where the result is subnormal.
//
// Nothing of x is lost beside the 1: (1 + x) / 2^n - 1 is x itself where n is 0.
template <class F>
TORCHCE_HD F log1p(F x) {
  using A = ElementOf<F>;
  const auto n = exponent_of(x + A(1));
  const F scale = from_bits(to_bits(A(1)) - (n << kMantissaBits<F>));
  return log_of_parts(n, x * scale + (scale - A(1)));
}

// log1p_unit is log(1 + x), as 2 atanh(x / (2 + x)).
// Valid: 0 <= x <= 1 and NaN; -0 stays -0. Beyond 1 the fit of two_atanh leaves the function, +infinity gives NaN.
// Error: at most 2 ulp (1.98, of doubles 1.95), of the smallest number where the result is subnormal.
template <class F>
TORCHCE_HD F log1p_unit(F x) {
  return two_atanh(divide(x, x + ElementOf<F>(2)));
}

// tanh of doubles is -E / (2 + E) with E = e^(-2|u|) - 1 = 2^n (e^r - 1) + (2^n - 1), which takes no table.
// Valid: all u; infinities give 1 and -1, -0 stays -0, a NaN stays, and no result is beyond 1.
// Error: 3 ulp (2.58), the most where n is -1 and E loses a bit.
template <class F>
  requires kWide<F>
TORCHCE_HD F tanh(F u) {
  constexpr auto& kTerms = LongExp<double, 0>::kTerms;
  constexpr double kRound = kRoundToTable<F>, kLeast = -40;  // e to that is nothing beside 1
  const auto sign = to_bits(u) & to_bits(-0.0);
  const F x = from_bits(to_bits(u) ^ sign) * -2.0, y = select(x < kLeast, F{} + kLeast, x);
  const F shifted = y * kLog2E<double> + kRound, n = shifted - kRound,
          r = (y - n * kLn2High<double>)-n * kLn2Low<double>;
  F p = r * kTerms.each[0] + kTerms.each[1];
  for (int i = 2; i < kTerms.kCount - 2; ++i) p = p * r + kTerms.each[i];
  const F power = PowerOfTwo<F>()(shifted);
  const F e = power * (r * r * p + r) + (power - 1.0);
  return from_bits((to_bits(e / (e + 2.0)) & ~to_bits(-0.0)) | sign);
}

#endif

// tanh is the hyperbolic tangent, as u / 8 + u P(u^2) / Q(u^2) with minimax fits P and Q.
// Valid: all u; infinities give 1 and -1, -0 stays -0, a NaN stays, and no result is beyond 1.
// Error: 3 ulp (2.77), without fused multiply-adds 4 ulp (3.61); on CUDA, by estimate, 5 ulp.
//
// The part u / 8 is exact, and most of the value where u is large: there the roundings of P and Q, which are largest
// then, count for little. Beyond the limit of u the result is 1.
template <class F>
TORCHCE_HD F tanh(F u) {
  u = within(u, 8.720945f);
  const F z = u * u;
  F p = z * -1.1650891e-07f - 2.7787291e-05f;
  p = p * z + 0.00037033952f;
  p = p * z + 0.102178596f;
  p = p * z + 1.1826172f;
  F q = z * 1.0826932e-06f + 0.00044957685f;
  q = q * z + 0.035102103f;
  q = q * z + 0.63165635f;
  q = q * z + 1.3515625f;
  return u * divide(p, q) + u * 0.125f;
}

}  // namespace torchce::math
