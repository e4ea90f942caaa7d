// exp, log and log1p for float, double and short vectors of them, for host and device.
//
// Every formula of the project is a template over V: a float or double on the device, a SIMD vector of them on the CPU
// (csrc/cpu/vector.h). On the device the names below are CUDA's own functions; on the CPU the float versions are
// polynomials without branches, whose tables, if any, are looked up within registers: one instruction stream for all
// lanes, and the double versions call libm lane by lane. tests/test_elementary.py holds the float versions to 2 ulp,
// beside what the short ones promise less.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__CUDACC__)
#define TORCHCE_HD __host__ __device__ __forceinline__
#define TORCHCE_HD_LAMBDA
#else
// A function that is not inlined might be linked as one SIMD level compiled it; lambdas are functions too.
#define TORCHCE_HD inline __attribute__((always_inline))
#define TORCHCE_HD_LAMBDA __attribute__((always_inline))
#endif

namespace torchce::math {

constexpr float kInfinityF = __builtin_huge_valf();
template <class A>
constexpr A kInfinity = A(__builtin_huge_val());

// mask ? a : b, for a bool and scalars as for a lane mask and vectors.
template <class M, class V>
TORCHCE_HD V select(M mask, V a, V b) {
  return mask ? a : b;
}

template <class V>
TORCHCE_HD V abs(V x) {
#if defined(__CUDA_ARCH__)
  return ::fabs(x);  // costs nothing: instructions take an operand's absolute value
#else
  return select(x < V{}, -x, x);
#endif
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
TORCHCE_HD float larger(float a, float b) { return ::fmaxf(a, b); }
TORCHCE_HD double larger(double a, double b) { return ::fmax(a, b); }
TORCHCE_HD float log(float x) { return ::logf(x); }
TORCHCE_HD double log(double x) { return ::log(x); }
TORCHCE_HD double divide(double a, double b) { return a / b; }
// Within 2 ulp for a divisor between 2^-126 and 2^126, in two instructions where an exact division takes ten and
// __fdividef, which scales divisors below 2^-126, six.
TORCHCE_HD float divide(float a, float b) {
#if defined(__CUDA_ARCH__)
  float reciprocal;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(b));
  return a * reciprocal;
#else
  return a / b;
#endif
}

TORCHCE_HD float log1p_unit(float x) { return two_atanh(divide(x, x + 2.0f)); }
TORCHCE_HD double log1p_unit(double x) { return ::log1p(x); }
TORCHCE_HD float log1p(float x) { return ::log1pf(x); }
TORCHCE_HD double log1p(double x) { return ::log1p(x); }

#else

template <class V>
TORCHCE_HD V divide(V a, V b) {
  return a / b;
}

// The larger of a, which is no NaN, and b; a beside a NaN.
template <class V>
TORCHCE_HD V larger(V a, V b) {
  return select(b > a, b, a);
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
template <class F>
struct WordsOf {
  typedef uint32_t type __attribute__((vector_size(sizeof(F))));
};
template <>
struct WordsOf<int32_t> {
  using type = uint32_t;
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
template <>
inline constexpr bool kOfDoubles<double> = true;

TORCHCE_HD double exp_of_negative(double x) { return __builtin_exp(x); }
TORCHCE_HD double log(double x) { return __builtin_log(x); }
TORCHCE_HD double log1p_unit(double x) { return __builtin_log1p(x); }
TORCHCE_HD double log1p(double x) { return __builtin_log1p(x); }

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147182f;
constexpr float kLn2High = 0.693359375f,
                kLn2Low = -2.12194440e-4f;  // in two parts: the first times a multiple of 1/32 is exact

// e^x = 2^n 2^f, n = k + i / 2^b, |f| <= 2^-(b+1). Where a permutation of lanes can look up 2^(i/2^b), b is as large as
// the lanes of two AVX-512 vectors or one of AVX2 allow, and the polynomial of f is short. Elsewhere b is 0.
//
// Adding 1.5 * 2^(23-b) to a float leaves it, rounded to a multiple of 2^-b, in the low bits of the mantissa: i lowest,
// k above. Shifted into the exponent's place k is a power of two, but for the exponent's bias, which is in the table.
// Where there is none, it is part of the number that is added.
template <class F>
constexpr int kTableBits = sizeof(F) == 64   ? 5
                           : sizeof(F) == 32 ? 3
                                             : 0;
template <class F>
constexpr float kRoundToTable = float(3 << (22 - kTableBits<F>)) + (kTableBits<F> == 0 ? 127.0f : 0.0f);

// 2^(i/32)
constexpr float kPowers[32] = {
    1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f, 1.1637249f,
    1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f,  1.61049032f, 1.64575553f,
    1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f};

// 2^n of a float to which kRoundToTable has been added.
template <class F, int bits = kTableBits<F> >
class PowerOfTwo {
  using I = typename BitsOf<F>::type;
  static constexpr int kLanes = sizeof(F) / sizeof(float);

  // 2^(i/2^b) less i, which is shifted along with k.
  static constexpr int32_t entry(int i) {
    return __builtin_bit_cast(int32_t, kPowers[i << (5 - bits)]) - (i << (23 - bits));
  }
  template <int... lane>
  TORCHCE_HD static I table(int first, std::integer_sequence<int, lane...>) {
    return I{entry(first + lane)...};
  }
  I lower, upper;

 public:
  TORCHCE_HD PowerOfTwo()
      : lower(table(0, std::make_integer_sequence<int, kLanes>())),
        upper(table((1 << bits) - kLanes, std::make_integer_sequence<int, kLanes>())) {}
  TORCHCE_HD F operator()(F shifted) const {
    using Words = typename WordsOf<F>::type;  // without a sign, because what becomes of a NaN may overflow
    const I n = to_bits(shifted);             // a permutation sees the lowest bits alone
    const Words power = Words(n) << (23 - bits);
    if constexpr (1 << bits == kLanes) {
      return from_bits(I(power + Words(__builtin_shuffle(lower, n))));
    } else {
      return from_bits(I(power + Words(__builtin_shuffle(lower, upper, n))));
    }
  }
};
template <class F>
class PowerOfTwo<F, 0> {
 public:
  TORCHCE_HD F operator()(F shifted) const { return from_bits(to_bits(shifted) << 23); }
};

// Of a polynomial, the highest power's first.
template <class F, int n>
struct Terms {
  static constexpr int kCount = n;
  F each[n];
};
template <class F, int n>
TORCHCE_HD constexpr Terms<F, n> operator*(F factor, const Terms<float, n>& terms) {
  Terms<F, n> products{};
  for (int i = 0; i < n; ++i) products.each[i] = factor * terms.each[i];
  return products;
}

template <class F, class Term, int n>
TORCHCE_HD F polynomial(F r, const Terms<Term, n>& terms) {
  F p = r * terms.each[0] + terms.each[1];
  for (int i = 2; i < n; ++i) p = p * r + terms.each[i];
  return p;
}

// e^r for |r| <= ln 2 / 2^(b+1): minimax fits with relative errors of 2^-28 (b = 0) and less than 2^-30.
template <int bits>
struct LongExp {
  static constexpr Terms<float, 7> kTerms = {
      {1.38146132631e-3f, 8.3687098241e-3f, 4.16683873612e-2f, 1.66665206898e-1f, 4.99999934517e-1f, 1.0f, 1.0f}};
};
template <>
struct LongExp<3> {
  static constexpr Terms<float, 5> kTerms = {{4.16604323e-2f, 1.66680259e-1f, 0.5f, 1.0f, 1.0f}};
};
template <>
struct LongExp<5> {
  static constexpr Terms<float, 4> kTerms = {{1.66666808e-1f, 0.5f, 1.0f, 1.0f}};
};

// 2^f for |f| <= 2^-(b+1): minimax fits that are exactly 1 at 0, with relative errors of 2^-23.1, 2^-25 and 2^-24. e^x
// is within |x| 2^-26 + 2^-23 of its value, in two or three operations less. A fused multiply-add does not round the
// product; without one it is |x| 2^-24 more.
template <int bits>
struct ShortExp {
  static constexpr Terms<float, 6> kTerms = {
      {1.3264646e-3f, 9.671576e-3f, 5.5507347e-2f, 2.4022241e-1f, 6.93147e-1f, 1.0f}};
};
template <>
struct ShortExp<3> {
  static constexpr Terms<float, 4> kTerms = {{5.54962218e-2f, 2.4025763e-1f, 6.93147214e-1f, 1.0f}};
};
template <>
struct ShortExp<5> {
  static constexpr Terms<float, 3> kTerms = {{2.40226531e-1f, 6.9315733e-1f, 1.0f}};
};

// The polynomial of what is left of x beyond n.
template <bool kShort, class F, class Term, int count>
TORCHCE_HD F exp_of_rest(F x, F n, const Terms<Term, count>& terms) {
  if constexpr (kShort) {
    return polynomial(x * kLog2E - n, terms);
  } else {
    return polynomial((x - n * kLn2High) - n * kLn2Low, terms);
  }
}

// e^x for x <= 0, or NaN. 2^n is applied as 2^(n + 64) 2^-64, so that subnormal results are right too.
template <class F>
TORCHCE_HD F exp_of_negative(F x) {
  if constexpr (kOfDoubles<F>) {
    return each_lane(x, [](double lane) { return exp_of_negative(lane); });
  } else {
    constexpr float kRound = kRoundToTable<F> + 64.0f;
    constexpr auto kTerms = 0x1p-64f * LongExp<kTableBits<F> >::kTerms;
    x = select(x < -104.0f, F{} - 104.0f, x);  // e^-104 rounds to 0
    const F shifted = x * kLog2E + kRound;
    return exp_of_rest<false>(x, shifted - kRound, kTerms) * PowerOfTwo<F>()(shifted);
  }
}

// A number that the compiler cannot see: it takes two instructions for the larger of x and a constant, one where both
// are values.
TORCHCE_HD float unseen(float value) {
  int32_t bits = to_bits(value);
  asm("" : "+r"(bits));
  return from_bits(bits);
}

// e^x for x <= 64, or NaN, in a sum that has a term of 1 or more in it, where what is below 2^-126 counts for nothing.
template <class V>
struct ExpInSum {
  PowerOfTwo<V, kOfDoubles<V> ? 0 : kTableBits<V> > power_of_two;
  V least{};  // 2^-127 is one less than the exponent can say, which makes it 0

  TORCHCE_HD ExpInSum() {
    if constexpr (!kOfDoubles<V>) least += unseen(-127.0f * kLn2);
  }
  TORCHCE_HD V operator()(V x) const {
    if constexpr (kOfDoubles<V>) {
      return exp_of_negative(x);
    } else {
      x = select(x < least, least, x);
      const V shifted = x * kLog2E + kRoundToTable<V>;
      return exp_of_rest<true>(x, shifted - kRoundToTable<V>, ShortExp<kTableBits<V> >::kTerms) * power_of_two(shifted);
    }
  }
};

// The larger of x <= 0 and of y < 0; a NaN may count as -infinity. As integers without a sign negative floats go the
// other way, and a minimum of integers keeps out of the way of the additions, where one of floats does not.
template <class V>
TORCHCE_HD V larger_of_negatives(V x, V y) {
#if defined(__SSE2__) && !defined(__SSE4_1__)  // has no such instruction
  return select(x < y, y, x);
#else
  using Words = typename WordsOf<V>::type;
  const Words a = Words(to_bits(x)), b = Words(to_bits(y));
  return from_bits(typename BitsOf<V>::type(a < b ? a : b));  // `select` would not become one instruction
#endif
}

// scale e^x for x <= 0, subnormal results included. kShort: of the shorter polynomial, where the result is rounded to
// 16 bits. A NaN may count as -infinity, but a scale of NaN makes NaN of everything.
//
// The scale is a factor of the polynomial's terms, which also takes out an excess of 64 in the exponent of e^x, which
// keeps e^x normal down to 2^-190. The terms must not become subnormal that way: where the scale is below 2^-24 there
// is no excess, because a product with less than 2^-126 is 0 then.
template <class V, bool kShort>
class ScaledExp {
  static constexpr int kBits = kOfDoubles<V> ? 0 : kTableBits<V>;
  using Exp = std::conditional_t<kShort, ShortExp<kBits>, LongExp<kBits> >;
  static constexpr int kTerms = Exp::kTerms.kCount;
  PowerOfTwo<V, kBits> power_of_two;

 public:
  // What a scale makes of the constants.
  struct Scale {
    Terms<V, kTerms> terms{};
    V round{}, least{};  // e^least: one less than the exponent can say, which makes it 0

    TORCHCE_HD Scale() {}
    TORCHCE_HD explicit Scale(V scale) {
      if constexpr (kOfDoubles<V>) {
        terms.each[0] = scale;
      } else {
        const auto small = abs(scale) < 0x1p-24f;
        const V factor = select(small, scale, scale * 0x1p-64f);
        terms = select(factor - factor == V{}, factor, V{}) * Exp::kTerms;
        terms.each[kTerms - 1] = factor;  // that of 1 alone where it is infinite: with others the sum would be NaN
        round = select(small, V{} + kRoundToTable<V>, V{} + (kRoundToTable<V> + 64.0f));
        least = select(small, V{} - 127.0f * kLn2, V{} - 191.0f * kLn2);
      }
    }
    // One lane's, in all.
    TORCHCE_HD Scale(const Scale& of_lanes, int lane)
        : round(of_lanes.round[lane] - V{}), least(of_lanes.least[lane] - V{}) {
      for (int i = 0; i < kTerms; ++i) terms.each[i] = of_lanes.terms.each[i][lane] - V{};
    }
  };

  TORCHCE_HD ScaledExp() {}
  TORCHCE_HD V operator()(V x, const Scale& scale) const {
    if constexpr (kOfDoubles<V>) {
      return exp_of_negative(x) * scale.terms.each[0];
    } else {
      x = larger_of_negatives(x, scale.least);
      const V shifted = x * kLog2E + scale.round;
      return exp_of_rest<kShort>(x, shifted - scale.round, scale.terms) * power_of_two(shifted);
    }
  }
};

// n where x = 2^n m with m in [0.9, 1.8): not around 1, because n ln 2 and log m would cancel below it.
template <class F>
TORCHCE_HD typename BitsOf<F>::type exponent_of(F x) {
  return (to_bits(x) - 0x3f666666) >> 23;
}

// Adding it to a float leaves that, rounded to an integer, in the low bits of the mantissa.
constexpr float kRoundToInteger = 12582912.0f;

// n ln 2 + log(1 + x), the latter as 2 atanh(x / (2 + x)).
template <class F>
TORCHCE_HD F log_of_parts(typename BitsOf<F>::type n, F x) {
  const F nf = from_bits(n + to_bits(kRoundToInteger)) - kRoundToInteger;  // int to float
  return nf * kLn2High + (two_atanh(x / (x + 2.0f)) + nf * kLn2Low);
}

// log(x) for x >= 1, infinity or NaN: what a sum of exponentials that holds its own maximum can be.
template <class F>
TORCHCE_HD F log(F x) {
  if constexpr (kOfDoubles<F>) {
    return each_lane(x, [](double lane) { return log(lane); });
  } else {
    const auto n = exponent_of(x);
    return select(x < kInfinityF, log_of_parts(n, from_bits(to_bits(x) - (n << 23)) - 1.0f), x);
  }
}

// log(1 + x) for 0 <= x < 2^100, or NaN. Nothing of x is lost beside the 1: (1 + x) / 2^n - 1 is x itself where n is
// 0.
template <class F>
TORCHCE_HD F log1p(F x) {
  if constexpr (kOfDoubles<F>) {
    return each_lane(x, [](double lane) { return log1p_unit(lane); });
  } else {
    const auto n = exponent_of(x + 1.0f);
    const F scale = from_bits(0x3f800000 - (n << 23));
    return log_of_parts(n, x * scale + (scale - 1.0f));
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
