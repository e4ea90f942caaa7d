// Prints the largest errors of csrc/math/elementary.h's functions against double, for the SIMD level it is compiled
// for: a line "function range ulps" each. tests/test_elementary.py compiles, runs and judges it.
//
// The argument "all" takes every float32 of a function's domain; without it every mantissa is taken at the exponents
// where the results vary, and one of 509 elsewhere.
#define TORCHCE_LEVEL under_test
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "cpu/vector.h"

namespace {

using namespace torchce;
using cpu::under_test::Floats;
using cpu::under_test::kLanes;
constexpr int L = kLanes<float>;

double ulp_of(double value) {
  const double magnitude = std::fabs(value);
  if (!(magnitude >= std::numeric_limits<float>::min())) return std::numeric_limits<float>::denorm_min();
  return std::ldexp(1.0, std::ilogb(magnitude) - 23);
}

// Error in ulps of the exact value; a NaN where none is due, or the reverse, is infinitely wrong.
double error_of(float value, double exact) {
  if (std::isnan(exact)) return std::isnan(value) ? 0 : HUGE_VAL;
  if (double(value) == exact || value == float(exact)) return std::fabs(double(value) - exact) / ulp_of(exact);
  const double error = std::fabs(double(value) - exact) / ulp_of(exact);
  return std::isnan(error) ? HUGE_VAL : error;
}

// The largest error over the floats with bits first, first + step, ... up to last, `allowance(x, exact)` ulps aside.
template <class F, class Exact, class Allowance>
double largest_error(uint32_t first, uint32_t last, uint32_t step, F function, Exact exact, Allowance allowance) {
  double largest = 0;
  for (uint64_t bits = first; bits <= last; bits += uint64_t(step) * L) {
    float x[L], y[L];
    Floats v;
    for (int l = 0; l < L; ++l) {
      const uint64_t at = bits + uint64_t(step) * l;
      const uint32_t lane = uint32_t(at > last ? last : at);
      std::memcpy(&x[l], &lane, sizeof lane);
    }
    std::memcpy(&v, x, sizeof v);
    v = function(v);
    std::memcpy(y, &v, sizeof v);
    for (int l = 0; l < L; ++l) {
      const double wanted = exact(double(x[l]));
      largest = std::fmax(largest, error_of(y[l], wanted) - allowance(double(x[l]), wanted));
    }
  }
  return largest;
}

bool take_all = false;

uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

// Floats between two of one sign, `from` the one nearer to 0; every one where `dense`.
template <class F, class Exact, class Allowance>
void check(const char* name, float from, float to, bool dense, F function, Exact exact, Allowance allowance) {
  const double error =
      largest_error(bits_of(from), bits_of(to), take_all || dense ? 1 : 509, function, exact, allowance);
  std::printf("%s [%g,%g] %.3f\n", name, from, to, error);
}

double nothing(double, double) { return 0; }

void check_exponentials() {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const auto exact = [](double x) { return std::exp(x); };
  const auto all_ranges = [&](const char* name, auto function, auto allowance) {
    check(name, -0.0f, -0.25f, false, function, exact, allowance);
    check(name, -0.25f, -8.0f, true, function, exact, allowance);
    check(name, -8.0f, -110.0f, false, function, exact, allowance);
    check(name, -110.0f, -infinity, false, function, exact, allowance);
    check(name, nan, nan, true, function, exact, allowance);
  };
  all_ranges("exp_of_negative", [](Floats x) { return math::exp_of_negative(x); }, nothing);
  // What the short polynomial promises beyond the last rounding, in ulps of the value: 2^-23, and the rounding of
  // 1 / ln 2, or without a fused multiply-add of the product with it.
#if defined(__FMA__) || defined(__FP_FAST_FMAF)
  constexpr double kPerX = 0x1p-26;
#else
  constexpr double kPerX = 0x1p-26 + 0x1p-24;
#endif
  const auto short_allowance = [](double x, double exact) {
    return (std::fmin(-x, 1e3) * kPerX + 0x1p-23) * exact / ulp_of(exact);
  };
  const auto sum_allowance = [&](double x, double exact) {  // below 2^-126 nothing, in a sum
    return x < -87.0 ? 0x1p-126 / ulp_of(exact) : short_allowance(x, exact);
  };
  const math::ExpInSum<Floats> in_sum;
  all_ranges("ExpInSum", in_sum, sum_allowance);
  // The scale is a power of two, so that nothing but the exponential is rounded.
  const auto scaled = [&](const char* name, float scale, auto exp, auto allowance) {
    const typename decltype(exp)::Scale scale_of_lanes(Floats{} + scale);
    const auto function = [&](auto x) { return exp(x, scale_of_lanes); };
    const auto wanted = [scale](double x) { return scale * std::exp(x); };
    check(name, -0.25f, -16.0f, false, function, wanted, allowance);
    check(name, -16.0f, -130.0f, false, function, wanted, allowance);
    check(name, -infinity, -infinity, true, function, wanted, allowance);
  };
  for (const float scale : {1.0f, 0x1p-20f, 0x1p-30f}) {
    scaled("ScaledExp", scale, math::ScaledExp<Floats, false>(), nothing);
    scaled("ScaledExp short", scale, math::ScaledExp<Floats, true>(), short_allowance);
  }
  scaled("ScaledExp", nan, math::ScaledExp<Floats, false>(), nothing);
}

void check_logarithms() {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  const auto log = [](Floats x) { return math::log(x); };
  const auto log1p_unit = [](Floats x) { return math::log1p_unit(x); };
  const auto log1p = [](Floats x) { return math::log1p(x); };
  const auto exact_log = [](double x) { return std::log(x); };
  const auto exact_log1p = [](double x) { return std::log1p(x); };
  check("log", 1.0f, 4.0f, true, log, exact_log, nothing);
  check("log", 4.0f, infinity, false, log, exact_log, nothing);
  check("log", nan, nan, true, log, exact_log, nothing);
  check("log1p_unit", 0.0f, 0x1p-3f, false, log1p_unit, exact_log1p, nothing);
  check("log1p_unit", 0x1p-3f, 1.0f, true, log1p_unit, exact_log1p, nothing);
  check("log1p_unit", nan, nan, true, log1p_unit, exact_log1p, nothing);
  check("log1p", 0.0f, 0x1p-3f, false, log1p, exact_log1p, nothing);
  check("log1p", 0x1p-3f, 8.0f, true, log1p, exact_log1p, nothing);
  check("log1p", 8.0f, 0x1p100f, false, log1p, exact_log1p, nothing);
  check("log1p", nan, nan, true, log1p, exact_log1p, nothing);
}

}  // namespace

int main(int argc, char** argv) {
  take_all = argc > 1 && std::strcmp(argv[1], "all") == 0;
  check_exponentials();
  check_logarithms();
}
