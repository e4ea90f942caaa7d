// exp for the CPU, for float, double and SIMD vectors of them; elementary.h gives CUDA its own.
//
// exp_of_negative is the function as such. ExpInSum and ScaledExp are cheaper by what their users can do without: bits
// of a term that a sum loses anyway, and the multiplication by a row's factor. All of them split e^x into 2^n 2^f, put
// n into the exponent and take a polynomial of f: no branch, and no table but one that is looked up within registers.
//
// Valid ranges and errors are those of floats; doubles have a range and fits of their own (elementary.h says what the
// figures are).
#pragma once

#include <type_traits>
#include <utility>

#include "lanes.h"

namespace torchce::math {

template <class A>
constexpr A kLog2E = A(1.4426950408889634);
template <class A>
constexpr A kLn2 = A(0.6931471805599453);
// ln 2 in two parts: the first times a multiple of 1/32, of doubles an integer, is exact.
template <class A>
constexpr A kLn2High = kWide<A> ? A(0.6931471805582987) : A(0.693359375);
template <class A>
constexpr A kLn2Low = kWide<A> ? A(1.6465949582897082e-12) : A(-2.12194440e-4);

template <class V>
constexpr int kMantissaBits = kWide<V> ? 52 : 23;
template <class V>
constexpr int kExponentBias = kWide<V> ? 1023 : 127;

// e^x = 2^n 2^f, n = k + i / 2^b, |f| <= 2^-(b+1). Where a permutation of lanes can look up 2^(i/2^b), b is as large as
// the lanes of two AVX-512 vectors or one of AVX2 allow, and the polynomial of f is short. Elsewhere b is 0, and so it
// is for doubles: a table of 16 takes a quarter off the time of their exponential, and adds an ulp to its error.
//
// Adding 1.5 * 2^(23-b) to a float leaves it, rounded to a multiple of 2^-b, in the low bits of the mantissa: i lowest,
// k above. Shifted into the exponent's place k is a power of two, but for the exponent's bias, which is in the table.
// Where there is none, it is part of the number that is added. To a double 1.5 * 2^52 is added.
template <class F>
constexpr int kTableBits = kWide<F>          ? 0
                           : sizeof(F) == 64 ? 5
                           : sizeof(F) == 32 ? 3
                                             : 0;
template <class F>
constexpr auto kRoundToTable = ElementOf<F>(int64_t{3} << (kMantissaBits<F> - 1 - kTableBits<F>)) +
                               ElementOf<F>(kTableBits<F> == 0 ? kExponentBias<F> : 0);

// 2^(i/32)
constexpr float kPowers[32] = {
    1.0f,        1.0218972f,  1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f,  1.13878858f, 1.1637249f,
    1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f,  1.61049032f, 1.64575553f,
    1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f,  1.87416768f, 1.91520655f, 1.95714414f};

// PowerOfTwo is 2^n of a number n + kRoundToTable, where n is a multiple of 2^-b.
// Valid: -126 <= n < 128, and n = -127, which gives 0; between these two results are anything from 0 to 2^-126. For
// doubles: -1022 <= n < 1024, and n = -1023.
// Error: none with b = 0, else the rounding of the table, 1/2 ulp.
template <class F, int bits = kTableBits<F>>
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
  TORCHCE_HD F operator()(F shifted) const { return from_bits(to_bits(shifted) << kMantissaBits<F>); }
};

// Terms are the factors of a polynomial, the highest power's first.
template <class F, int n>
struct Terms {
  static constexpr int kCount = n;
  F each[n];
};
template <class F, class A, int n>
TORCHCE_HD constexpr Terms<F, n> operator*(F factor, const Terms<A, n>& terms) {
  Terms<F, n> products{};
  for (int i = 0; i < n; ++i) products.each[i] = factor * terms.each[i];
  return products;
}

// polynomial is the one of these terms, by Horner's rule.
// Valid: all r.
// Error: that of its roundings, the more of a term the larger its part in the sum.
template <class F, class Term, int n>
TORCHCE_HD F polynomial(F r, const Terms<Term, n>& terms) {
  F p = r * terms.each[0] + terms.each[1];
  for (int i = 2; i < n; ++i) p = p * r + terms.each[i];
  return p;
}

// LongExp is a minimax fit of e^r.
// Valid: |r| <= ln 2 / 2^(b+1).
// Error: of the value 2^-28 with b = 0, else less than 2^-30; of doubles 2^-57.
template <class A, int bits>
struct LongExp;
template <>
struct LongExp<float, 0> {
  static constexpr Terms<float, 7> kTerms = {
      {1.38146132631e-3f, 8.3687098241e-3f, 4.16683873612e-2f, 1.66665206898e-1f, 4.99999934517e-1f, 1.0f, 1.0f}};
};
template <>
struct LongExp<float, 3> {
  static constexpr Terms<float, 5> kTerms = {{4.16604323e-2f, 1.66680259e-1f, 0.5f, 1.0f, 1.0f}};
};
template <>
struct LongExp<float, 5> {
  static constexpr Terms<float, 4> kTerms = {{1.66666808e-1f, 0.5f, 1.0f, 1.0f}};
};
template <>
struct LongExp<double, 0> {
  static constexpr Terms<double, 12> kTerms = {
      {2.497837682684176e-8, 2.762518909285883e-7, 2.7557640888405562e-6, 2.4801508677651313e-5, 1.98412694661798e-4,
       1.388888892679954e-3, 8.333333333500063e-3, 4.166666666660395e-2, 1.6666666666666433e-1, 0.5, 1.0, 1.0}};
};

// ShortExp is a minimax fit of 2^f, exactly 1 at 0.
// Valid: |f| <= 2^-(b+1).
// Error: of the value 2^-23.1, 2^-25 and 2^-24, with b = 0, 3 and 5; of doubles 2^-51.9.
//
// It saves two or three operations of e^x, and costs the two parts of ln 2: f is x / ln 2 less n, where 1 / ln 2 is
// rounded (|x| 2^-26 of the value, of doubles |x| 2^-55), and so is the product if there is no fused multiply-add
// (|x| 2^-24, of doubles |x| 2^-53).
template <class A, int bits>
struct ShortExp;
template <>
struct ShortExp<float, 0> {
  static constexpr Terms<float, 6> kTerms = {
      {1.3264646e-3f, 9.671576e-3f, 5.5507347e-2f, 2.4022241e-1f, 6.93147e-1f, 1.0f}};
};
template <>
struct ShortExp<float, 3> {
  static constexpr Terms<float, 4> kTerms = {{5.54962218e-2f, 2.4025763e-1f, 6.93147214e-1f, 1.0f}};
};
template <>
struct ShortExp<float, 5> {
  static constexpr Terms<float, 3> kTerms = {{2.40226531e-1f, 6.9315733e-1f, 1.0f}};
};
template <>
struct ShortExp<double, 0> {
  static constexpr Terms<double, 11> kTerms = {{7.038171324320137e-9, 1.0208328787117516e-7, 1.3215653689377617e-6,
                                                1.5252659399389253e-5, 1.5403529993956923e-4, 1.333355822584522e-3,
                                                9.618129107983448e-3, 5.550410866448156e-2, 2.40226506959091e-1,
                                                6.931471805599492e-1, 1.0}};
};

// exp_of_rest is the polynomial of what is left of x beyond n: of x - n ln 2, or if kShort of x / ln 2 - n.
// Valid: n is x / ln 2, rounded to a multiple of 2^-b.
// Error: the fit's and the polynomial's, beside the rest's: one rounding, or if kShort what ShortExp says of 1 / ln 2.
template <bool kShort, class F, class Term, int count>
TORCHCE_HD F exp_of_rest(F x, F n, const Terms<Term, count>& terms) {
  using A = ElementOf<F>;
  constexpr A kHigh = kLn2High<A>, kLow = kLn2Low<A>;
  if constexpr (kShort) {
    return polynomial(x * kLog2E<A> - n, terms);
  } else {
    return polynomial((x - n * kHigh) - n * kLow, terms);
  }
}

TORCHCE_HD double exp_of_negative(double x) { return __builtin_exp(x); }

// exp_of_negative is e^x.
// Valid: x <= 0 and NaN; -infinity gives 0. A positive x is not promised anything, +infinity gives NaN.
// Error: at most 2 ulp (1.84, of doubles 1.15), of the smallest number where the result is subnormal.
//
// 2^n is applied as 2^(n + 64) 2^-64, so that subnormal results are rounded once.
template <class F>
TORCHCE_HD F exp_of_negative(F x) {
  using A = ElementOf<F>;
  constexpr A kRound = kRoundToTable<F> + A(64), kLeast = kWide<F> ? -746 : -104;  // e to that rounds to 0
  constexpr auto kTerms = A(0x1p-64) * LongExp<A, kTableBits<F>>::kTerms;
  x = select(x < kLeast, F{} + kLeast, x);
  const F shifted = x * kLog2E<A> + kRound;
  return exp_of_rest<false>(x, shifted - kRound, kTerms) * PowerOfTwo<F>()(shifted);
}

// unseen is the value, of which the compiler cannot see that it is constant: the larger of x and a constant takes two
// instructions, that of two variables one.
// Valid: all values.
// Error: none.
template <class A>
TORCHCE_HD A unseen(A value) {
  auto bits = to_bits(value);
  asm("" : "+r"(bits));
  return from_bits(bits);
}

// ExpInSum is e^x, for a sum that has a term of 1 or more in it.
// Valid: x <= 64 and NaN; -infinity gives 0, +infinity NaN. Below 2^-126, with doubles 2^-1022, results are anything
// from 0 to that.
// Error: |x| 2^-26 + 2^-23 of the value, without fused multiply-adds |x| 2^-24 more, and 2 ulp (0.92); of doubles
// |x| 2^-55 + 2^-52, |x| 2^-53, and 2 ulp (1.32).
template <class V>
struct ExpInSum {
  using A = ElementOf<V>;
  PowerOfTwo<V> power_of_two;
  V least{};  // 2^-127 is one less than the exponent can say, which makes it 0; of doubles it is 2^-1023

  TORCHCE_HD ExpInSum() { least += unseen(-kExponentBias<V> * kLn2<A>); }
  TORCHCE_HD V operator()(V x) const {
    x = select(x < least, least, x);
    const V shifted = x * kLog2E<A> + kRoundToTable<V>;
    return exp_of_rest<true>(x, shifted - kRoundToTable<V>, ShortExp<A, kTableBits<V>>::kTerms) * power_of_two(shifted);
  }
};

// larger_of_negatives is the larger of x and y.
// Valid: x <= 0 and y < 0; a NaN may count as -infinity, and a positive x is the larger one.
// Error: none.
//
// As integers without a sign negative floats go the other way, and a minimum of integers keeps out of the way of the
// additions, where one of floats does not.
template <class V>
TORCHCE_HD V larger_of_negatives(V x, V y) {
#if defined(__SSE2__) && !defined(__SSE4_1__)  // has no such instruction
  constexpr bool kOfIntegers = false;
#elif defined(__SSE2__) && !defined(__AVX512F__)  // has it for 32 bits alone
  constexpr bool kOfIntegers = !kWide<V>;
#else
  constexpr bool kOfIntegers = true;
#endif
  if constexpr (kOfIntegers) {
    using Words = typename WordsOf<V>::type;
    const Words a = Words(to_bits(x)), b = Words(to_bits(y));
    return from_bits(typename BitsOf<V>::type(a < b ? a : b));  // `select` would not become one instruction
  } else {
    return select(x < y, y, x);
  }
}

// ScaledExp is scale e^x; kShort: of the shorter polynomial, where the result is rounded to 16 bits.
// Valid: x <= 0 and every scale; a NaN in x may count as -infinity, one in the scale makes NaN of everything.
// Error: at most 2 ulp (1.84, of doubles 1.15), of the smallest number where the result is subnormal; if kShort
// ExpInSum's.
//
// Where e^x is below 2^-190, of doubles 2^-1086, it may count as 0: with an infinite scale that is NaN, and infinity
// elsewhere. A positive x is not promised anything; +infinity gives NaN.
//
// The scale is a factor of the polynomial's terms, which also takes out an excess of 64 in the exponent of e^x, which
// keeps e^x normal down to there. The terms must not become subnormal that way: where the scale is below 2^-24, of
// doubles 2^-53, there is no excess, because a product with less than 2^-126, or 2^-1022, is 0 then.
template <class V, bool kShort>
class ScaledExp {
  using A = ElementOf<V>;
  using Exp = std::conditional_t<kShort, ShortExp<A, kTableBits<V>>, LongExp<A, kTableBits<V>>>;
  static constexpr int kTerms = Exp::kTerms.kCount;
  PowerOfTwo<V> power_of_two;

 public:
  // What a scale makes of the constants.
  struct Scale {
    Terms<V, kTerms> terms{};
    V round{}, least{};  // e^least: one less than the exponent can say, which makes it 0

    TORCHCE_HD Scale() {}
    TORCHCE_HD explicit Scale(V scale) {
      constexpr A kSmall = kWide<V> ? A(0x1p-53) : A(0x1p-24), kBias = kExponentBias<V>, kExcess = 64;
      const auto small = abs(scale) < kSmall;
      const V factor = select(small, scale, scale * A(0x1p-64));
      terms = select(factor - factor == V{}, factor, V{}) * Exp::kTerms;
      terms.each[kTerms - 1] = factor;  // that of 1 alone where it is infinite: with others the sum would be NaN
      round = select(small, V{} + kRoundToTable<V>, V{} + (kRoundToTable<V> + kExcess));
      least = select(small, V{} - kBias * kLn2<A>, V{} - (kBias + kExcess) * kLn2<A>);
    }
    // The scale of one lane, in all of them.
    TORCHCE_HD Scale(const Scale& of_lanes, int lane)
        : round(of_lanes.round[lane] - V{}), least(of_lanes.least[lane] - V{}) {
      for (int i = 0; i < kTerms; ++i) terms.each[i] = of_lanes.terms.each[i][lane] - V{};
    }
  };

  TORCHCE_HD ScaledExp() {}
  TORCHCE_HD V operator()(V x, const Scale& scale) const {
    x = larger_of_negatives(x, scale.least);
    const V shifted = x * kLog2E<A> + scale.round;
    return exp_of_rest<kShort>(x, shifted - scale.round, scale.terms) * power_of_two(shifted);
  }
};

}  // namespace torchce::math
