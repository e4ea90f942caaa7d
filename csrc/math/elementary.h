// exp, log and log1p for float, double and short vectors of them, for host and device.
//
// Every formula of the project is a template over V: a float or double on the device, a SIMD vector of them on the CPU
// (csrc/cpu/vector.h). On the device the names below are CUDA's own functions; on the CPU the float versions are
// polynomials without branches or tables, so that one instruction stream serves all lanes, and the double versions call
// libm lane by lane. tests/test_elementary.py holds the float versions to 2 ulp over every float32.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define TORCHCE_HD __host__ __device__ __forceinline__
#else
#define TORCHCE_HD inline __attribute__((always_inline))
#endif

namespace torchce::math {

constexpr float kInfinityF = __builtin_huge_valf();

// mask ? a : b, for a bool and scalars as for a lane mask and vectors.
template <class M, class V>
TORCHCE_HD V select(M mask, V a, V b) {
  return mask ? a : b;
}

template <class V>
TORCHCE_HD V abs(V x) {
  return select(x < V{}, -x, x);
}

// 2 atanh(u) for |u| <= 1/3: 2u + u^3 Q(u^2), Q a minimax fit with a relative error of 2^-27.7.
template <class F>
TORCHCE_HD F two_atanh(F u) {
  const F z = u * u;
  F q = z * 2.8024458897e-1f + 2.79991410648e-1f;
  q = q * z + 4.00216990601e-1f;
  q = q * z + 6.66664131327e-1f;
  return u * 2.0f + u * z * q;
}

#if defined(__CUDACC__)

TORCHCE_HD float exp_of_negative(float x) { return ::expf(x); }
TORCHCE_HD double exp_of_negative(double x) { return ::exp(x); }
// Subnormal results may become 0, which no sum with a term of 1 in it can tell. Two instructions where expf takes
// eight.
TORCHCE_HD float exp_in_sum(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
  return y;
#else
  return ::expf(x);
#endif
}
TORCHCE_HD double exp_in_sum(double x) { return ::exp(x); }
TORCHCE_HD float log(float x) { return ::logf(x); }
TORCHCE_HD double log(double x) { return ::log(x); }
TORCHCE_HD double divide(double a, double b) { return a / b; }
// Within 2 ulp for a divisor between 2^-126 and 2^126, in two instructions where an exact division takes ten.
TORCHCE_HD float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

TORCHCE_HD float log1p_unit(float x) { return two_atanh(divide(x, x + 2.0f)); }
TORCHCE_HD double log1p_unit(double x) { return ::log1p(x); }

#else

template <class V>
TORCHCE_HD V divide(V a, V b) {
  return a / b;
}

// The bits of a float, or of every lane of a vector of floats, and back.
template <class F>
struct BitsOf {
  typedef int32_t type __attribute__((vector_size(sizeof(F))));
};
template <>
struct BitsOf<float> {
  using type = int32_t;
};
template <class I>
struct FloatsOf {
  typedef float type __attribute__((vector_size(sizeof(I))));
};
template <>
struct FloatsOf<int32_t> {
  using type = float;
};
template <class F>
TORCHCE_HD typename BitsOf<F>::type to_bits(F x) {
  typename BitsOf<F>::type bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}
template <class I>
TORCHCE_HD typename FloatsOf<I>::type from_bits(I bits) {
  typename FloatsOf<I>::type x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// libm in every lane, where V holds doubles.
template <class V, class F>
TORCHCE_HD V each_lane(V x, F function) {
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(double); ++lane) x[lane] = function(x[lane]);
  return x;
}
template <class V>
constexpr bool kOfDoubles = sizeof(decltype(V{}[0])) == sizeof(double);
template <>
inline constexpr bool kOfDoubles<float> = false;

TORCHCE_HD double exp_of_negative(double x) { return __builtin_exp(x); }
TORCHCE_HD double log(double x) { return __builtin_log(x); }
TORCHCE_HD double log1p_unit(double x) { return __builtin_log1p(x); }

// e^x for x <= 0, or NaN. With n = round(x / ln 2) and r = x - n ln 2 it is 2^n e^r; the polynomial is a minimax fit of
// e^r on |r| <= ln 2 / 2 with a relative error of 2^-28. 2^n is applied as 2^(n + 64) 2^-64, so that subnormal results
// are right too.
template <class F>
TORCHCE_HD F exp_of_negative(F x) {
  if constexpr (kOfDoubles<F>) {
    return each_lane(x, [](double lane) { return exp_of_negative(lane); });
  } else {
    // Adding 1.5 * 2^23 leaves round(x / ln 2) in the low bits of the mantissa; 64 + 127 makes it the exponent's bits.
    constexpr float kRound = 12582912.0f + 64.0f + 127.0f;
    x = select(x < -104.0f, F{} - 104.0f, x);  // e^-104 rounds to 0
    const F shifted = x * 1.44269504f + kRound;
    const F n = shifted - kRound;
    const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts: the first product is exact
    F p = r * 1.38146132631e-3f + 8.3687098241e-3f;
    p = p * r + 4.16683873612e-2f;
    p = p * r + 1.66665206898e-1f;
    p = p * r + 4.99999934517e-1f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * from_bits(to_bits(shifted) << 23) * 0x1p-64f;
  }
}

template <class F>
TORCHCE_HD F exp_in_sum(F x) {
  return exp_of_negative(x);
}

// log(x) for x >= 1, infinity or NaN: what a sum of exponentials that holds its own maximum can be.
// x = 2^n m with m in [1/sqrt 2, sqrt 2), log x = n ln 2 + 2 atanh((m - 1) / (m + 1)).
template <class F>
TORCHCE_HD F log(F x) {
  if constexpr (kOfDoubles<F>) {
    return each_lane(x, [](double lane) { return log(lane); });
  } else {
    const auto bits = to_bits(x);
    const auto n = (bits - 0x3f3504f3) >> 23;  // 0x3f3504f3: 1/sqrt 2
    const F m = from_bits(bits - (n << 23));
    const F nf = from_bits(n + 0x4b400000) - 12582912.0f;  // int to float by the same 1.5 * 2^23
    const F y = nf * 0.693359375f + (two_atanh((m - 1.0f) / (m + 1.0f)) - nf * 2.12194440e-4f);
    return select(x < kInfinityF, y, x);
  }
}

// log(1 + x) for 0 <= x <= 1, or NaN: 2 atanh(x / (2 + x)).
template <class F>
TORCHCE_HD F log1p_unit(F x) {
  if constexpr (kOfDoubles<F>) {
    return each_lane(x, [](double lane) { return log1p_unit(lane); });
  } else {
    return two_atanh(divide(x, x + 2.0f));
  }
}

#endif

}  // namespace torchce::math
