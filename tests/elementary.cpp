// Prints the largest errors of csrc/math/elementary.h's functions, of floats against double and of doubles against long
// double, for the SIMD level it is compiled for: a line "function range ulps" each. tests/test_elementary.py compiles,
// runs and judges it.
//
// The argument "all" takes every float32 of a function's domain; without it every mantissa is taken at the exponents
// where the results vary, and one of 509 elsewhere. Of doubles it is a sample over all exponents, 64 times as large
// with "all", and the neighbours of where the functions split their domain.
#define TORCHCE_LEVEL under_test
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/vector.h"

namespace {

using namespace torchce;
using cpu::under_test::kLanes;
using cpu::under_test::Lanes;

template <class A>
using Limits = std::numeric_limits<A>;
template <class A>
constexpr bool kIsDouble = sizeof(A) == sizeof(double);
template <class A>
using Exact = std::conditional_t<kIsDouble<A>, long double, double>;
template <class A>
using Bits = std::conditional_t<kIsDouble<A>, uint64_t, uint32_t>;

template <class A>
Exact<A> ulp_of(Exact<A> value) {
  const Exact<A> magnitude = std::fabs(value);
  if (!(magnitude >= Limits<A>::min())) return Limits<A>::denorm_min();
  return std::ldexp(Exact<A>(1), std::ilogb(magnitude) + 1 - Limits<A>::digits);
}

// Error in ulps of the exact value; a NaN where none is due, or the reverse, is infinitely wrong.
template <class A>
double error_of(A value, Exact<A> exact) {
  if (std::isnan(exact)) return std::isnan(value) ? 0 : HUGE_VAL;
  if (value == exact) return 0;
  const double error = double(std::fabs(value - exact) / ulp_of<A>(exact));
  return std::isnan(error) ? HUGE_VAL : error;
}

// The largest error over the numbers at(0), ... at(count - 1), `allowance(x, exact)` ulps aside.
template <class A, class At, class F, class Wanted, class Allowance>
double largest_error(uint64_t count, At at, F function, Wanted wanted, Allowance allowance) {
  constexpr int L = kLanes<A>;
  double largest = 0;
  for (uint64_t i = 0; i < count; i += L) {
    A x[L], y[L];
    Lanes<A> v;
    for (int l = 0; l < L; ++l) x[l] = at(i + l < count ? i + l : count - 1);
    std::memcpy(&v, x, sizeof v);
    v = function(v);
    std::memcpy(y, &v, sizeof v);
    for (int l = 0; l < L; ++l) {
      const Exact<A> exact = wanted(Exact<A>(x[l]));
      largest = std::fmax(largest, error_of<A>(y[l], exact) - allowance(double(x[l]), exact));
    }
  }
  return largest;
}

bool take_all = false;

template <class A>
Bits<A> bits_of(A x) {
  Bits<A> bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Numbers between two of one sign, `from` the one nearer to 0; every float where `dense`.
template <class A, class F, class Wanted, class Allowance>
void check(const char* name, A from, A to, bool dense, F function, Wanted wanted, Allowance allowance) {
  const uint64_t first = bits_of(from), distance = bits_of(to) - first;
  uint64_t step = take_all || dense ? 1 : 509;
  if (kIsDouble<A>) step = distance / (take_all ? 1 << 26 : 1 << 20) | 1;
  const auto at = [&](uint64_t i) {
    const Bits<A> bits = Bits<A>(first + (i * step < distance ? i * step : distance));
    A x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  };
  const double error = largest_error<A>(distance / step + 2, at, function, wanted, allowance);
  std::printf("%s%s [%g,%g] %.3f\n", name, kIsDouble<A> ? " of doubles" : "", double(from), double(to), error);
}

// Doubles beside so many borders, where a function goes over to the next part of its domain.
template <class Border, class F, class Wanted, class Allowance>
void check_borders(const char* name, int count, Border border, F function, Wanted wanted, Allowance allowance) {
  constexpr int kNeighbours = 16;
  const auto at = [&](uint64_t i) {
    const double x = border(int(i / kNeighbours));
    return x + (int(i % kNeighbours) - kNeighbours / 2) * std::ldexp(1.0, std::ilogb(x) - 52);
  };
  const double error = largest_error<double>(uint64_t(count) * kNeighbours, at, function, wanted, allowance);
  std::printf("%s of doubles at borders %.3f\n", name, error);
}

constexpr auto nothing = [](double, auto) { return 0.0; };

template <class A>
void check_exponentials() {
  constexpr A infinity = Limits<A>::infinity(), nan = Limits<A>::quiet_NaN();
  constexpr A kFar = kIsDouble<A> ? -750 : -110;  // e to that is 0
  const auto exact = [](Exact<A> x) { return std::exp(x); };
  const auto all_ranges = [&](const char* name, auto function, auto allowance) {
    check<A>(name, -A(0), A(-0.25), false, function, exact, allowance);
    check<A>(name, A(-0.25), -8, true, function, exact, allowance);
    check<A>(name, -8, kFar, false, function, exact, allowance);
    check<A>(name, kFar, -infinity, false, function, exact, allowance);
    check<A>(name, nan, nan, true, function, exact, allowance);
    if constexpr (kIsDouble<A>) {  // of n, between whose multiples of 1/32 the borders are with and without a table
      check_borders(name, 35000, [](int i) { return -0x1.62e42fefa39efp-6 * (i + 1); }, function, exact, allowance);
    }
  };
  all_ranges("exp_of_negative", [](auto x) { return math::exp_of_negative(x); }, nothing);
  // What the short polynomial promises beyond the last rounding, in ulps of the value: that of its fit, the rounding of
  // 1 / ln 2, and without a fused multiply-add of the product with it.
  constexpr double kFit = kIsDouble<A> ? 0x1p-52 : 0x1p-23, kOfConstant = kIsDouble<A> ? 0x1p-55 : 0x1p-26;
#if defined(__FMA__) || defined(__FP_FAST_FMAF)
  constexpr double kOfProduct = 0;
#else
  constexpr double kOfProduct = kIsDouble<A> ? 0x1p-53 : 0x1p-24;
#endif
  const auto short_allowance = [](double x, Exact<A> exact) {
    return double((std::fmin(-x, 1e4) * (kOfConstant + kOfProduct) + kFit) * exact / ulp_of<A>(exact));
  };
  const auto sum_allowance = [&](double x, Exact<A> exact) {  // below the smallest normal number nothing, in a sum
    constexpr Exact<A> kSmallest = Limits<A>::min();
    return exact < 1.2L * kSmallest ? double(kSmallest / ulp_of<A>(exact)) : short_allowance(x, exact);
  };
  const math::ExpInSum<Lanes<A>> in_sum;
  all_ranges("ExpInSum", in_sum, sum_allowance);
  // The scale is a power of two, so that nothing but the exponential is rounded.
  const auto scaled = [&](const char* name, A scale, auto exp, auto allowance) {
    const typename decltype(exp)::Scale scale_of_lanes(Lanes<A>{} + scale);
    const auto function = [&](auto x) { return exp(x, scale_of_lanes); };
    const auto wanted = [scale](Exact<A> x) { return scale * std::exp(x); };
    check<A>(name, A(-0.25), -16, false, function, wanted, allowance);
    check<A>(name, -16, kFar - 20, false, function, wanted, allowance);
    check<A>(name, -infinity, -infinity, true, function, wanted, allowance);
  };
  // Above and below where a scale takes out the excess in the exponent.
  for (const A scale : {A(1), A(kIsDouble<A> ? 0x1p-50 : 0x1p-20), A(kIsDouble<A> ? 0x1p-60 : 0x1p-30)}) {
    scaled("ScaledExp", scale, math::ScaledExp<Lanes<A>, false>(), nothing);
    scaled("ScaledExp short", scale, math::ScaledExp<Lanes<A>, true>(), short_allowance);
  }
  scaled("ScaledExp", nan, math::ScaledExp<Lanes<A>, false>(), nothing);
}

template <class A>
void check_logarithms() {
  constexpr A infinity = Limits<A>::infinity(), nan = Limits<A>::quiet_NaN();
  const auto log = [](auto x) { return math::log(x); };
  const auto log1p_unit = [](auto x) { return math::log1p_unit(x); };
  const auto log1p = [](auto x) { return math::log1p(x); };
  const auto exact_log = [](Exact<A> x) { return std::log(x); };
  const auto exact_log1p = [](Exact<A> x) { return std::log1p(x); };
  check<A>("log", 1, 4, true, log, exact_log, nothing);
  check<A>("log", 4, infinity, false, log, exact_log, nothing);
  check<A>("log", nan, nan, true, log, exact_log, nothing);
  check<A>("log1p_unit", 0, A(0x1p-3), false, log1p_unit, exact_log1p, nothing);
  check<A>("log1p_unit", A(0x1p-3), 1, true, log1p_unit, exact_log1p, nothing);
  check<A>("log1p_unit", nan, nan, true, log1p_unit, exact_log1p, nothing);
  // Below an eighth the wider type has too few digits of the difference. What is allowed beyond the limit of all: 7
  // ulp.
  const auto rest = [](auto u) { return math::two_atanh_rest(u); };
  const auto exact_rest = [](Exact<A> u) { return 2 * std::atanh(u) - 2 * u; };
  const auto allowed = [](double, auto) { return 7.0; };
  check<A>("two_atanh_rest", A(0x1p-3), A(1) / 3, true, rest, exact_rest, allowed);
  check<A>("two_atanh_rest", A(-0x1p-3), A(-1) / 3, true, rest, exact_rest, allowed);
  check<A>("two_atanh_rest", nan, nan, true, rest, exact_rest, allowed);
  check<A>("log1p", 0, A(0x1p-3), false, log1p, exact_log1p, nothing);
  check<A>("log1p", A(0x1p-3), 8, true, log1p, exact_log1p, nothing);
  check<A>("log1p", 8, A(0x1p100), false, log1p, exact_log1p, nothing);
  check<A>("log1p", nan, nan, true, log1p, exact_log1p, nothing);
  // What is allowed beyond the limit of all.
  const auto of_division = [](double, auto) { return 1.0; };
  const auto log_of_positive = [](auto x) { return math::log_of_positive(x); };
  check<A>("log_of_positive", 0, A(0.25), false, log_of_positive, exact_log, nothing);
  check<A>("log_of_positive", A(0.25), 4, true, log_of_positive, exact_log, nothing);
  check<A>("log_of_positive", 4, Limits<A>::max(), false, log_of_positive, exact_log, nothing);
  check<A>("log_of_positive", -A(0), -A(0), true, log_of_positive, exact_log, nothing);
  check<A>("log_of_positive", -Limits<A>::denorm_min(), -infinity, false, log_of_positive, exact_log, nothing);
  check<A>("log_of_positive", nan, nan, true, log_of_positive, exact_log, nothing);
  const auto of_ratio = [](auto r) { return math::log_ratio(r * math::kRatioLift<A>, r - A(1)); };
  const auto of_excess = [](auto x) { return math::log_ratio((x + A(1)) * math::kRatioLift<A>, x); };
  check<A>("log_ratio of r", Limits<A>::denorm_min(), A(0.5), false, of_ratio, exact_log, of_division);
  check<A>("log_ratio of 0", 0, 0, true, of_ratio, exact_log, of_division);
  check<A>("log_ratio of an excess", 0, A(0x1p20), false, of_excess, exact_log1p, of_division);
  check<A>("log_ratio of an excess", -A(0), A(-0.5), false, of_excess, exact_log1p, of_division);
  check<A>("log_ratio of an excess", A(0x1p-3), 1, true, of_excess, exact_log1p, of_division);
  check<A>("log_ratio of an excess", A(-0x1p-3), A(-0.5), true, of_excess, exact_log1p, of_division);
  check<A>("log_ratio", nan, nan, true, of_ratio, exact_log, of_division);
  if constexpr (kIsDouble<A>) {  // of the exponents
    const auto border = [](int i) { return std::ldexp(i % 2 == 0 ? 1.0 : double(0.9f), 1 + i / 2); };
    check_borders("log", 2000, border, log, exact_log, nothing);
    check_borders("log1p", 198, [&](int i) { return border(i) - 1; }, log1p, exact_log1p, nothing);
  }
}

template <class A>
void check_tanh() {
  constexpr A infinity = Limits<A>::infinity(), nan = Limits<A>::quiet_NaN();
  // Infinitely wrong are also a result beyond 1 and one that has not the sign of u, as 0 might.
  const auto tanh = [](auto u) {
    const auto y = math::tanh(u);
    const auto wrong = (math::abs(y) > A(1)) | ((math::to_bits(u) ^ math::to_bits(y)) < 0);
    return math::select((u == u) & wrong, decltype(y){} + infinity, y);
  };
  const auto exact = [](Exact<A> u) { return std::tanh(u); };
#if defined(__FMA__) || defined(__FP_FAST_FMAF)
  constexpr bool kFused = true;
#else
  constexpr bool kFused = false;
#endif
  // What is allowed beyond the limit of all.
  const auto allowance = [](double, auto) { return kIsDouble<A> || kFused ? 1.0 : 2.0; };
  for (const A sign : {A(1), A(-1)}) {
    check<A>("tanh", A(0) * sign, A(0x1p-5) * sign, false, tanh, exact, allowance);
    check<A>("tanh", A(0x1p-5) * sign, A(20) * sign, sign > 0, tanh, exact, allowance);
    check<A>("tanh", A(20) * sign, infinity * sign, false, tanh, exact, allowance);
  }
  check<A>("tanh", nan, nan, true, tanh, exact, allowance);
  if constexpr (kIsDouble<A>) {  // of n in the exponential of -2|u|
    check_borders("tanh", 60, [](int i) { return 0x1.62e42fefa39efp-3 * (2 * i + 1); }, tanh, exact, allowance);
  }
}

}  // namespace

int main(int argc, char** argv) {
  take_all = argc > 1 && std::strcmp(argv[1], "all") == 0;
  check_exponentials<float>();
  check_exponentials<double>();
  check_logarithms<float>();
  check_logarithms<double>();
  check_tanh<float>();
  check_tanh<double>();
}
