// Sums and products that keep their roundings small, for the scalars and vectors of lanes.h.
#pragma once

#include "lanes.h"

namespace torchce::math {

// sum_in_pairs is term(first) + ... + term(first + n - 1), halves added to halves, n a power of two.
// Valid: all terms; S is a number or holds some that `+` adds one by one.
// Error: log2(n) roundings of a partial sum. One after the other they would be n - 1, and where equal terms are added
// to a large one, all of them in the same direction.
template <int n, class F>
TORCHCE_HD auto sum_in_pairs(int first, const F& term) {
  if constexpr (n == 1) {
    return term(first);
  } else {
    const auto half = sum_in_pairs<n / 2>(first, term);
    return half + sum_in_pairs<n / 2>(first + n / 2, term);
  }
}

// StridedSum adds term i to its partial sum i % n, n a power of two, and in the end these in pairs. A term that is a
// product takes one fused operation so, where sum_in_pairs has a multiplication for each second one.
template <int n, class S>
struct StridedSum {
  S partial[n] = {};

  // Adds term(0) to term(count - 1).
  // Error: count / n + 1 + log2(n) roundings of a partial sum.
  //
  // Bulk and remainder: 31 terms by 8 are three of 8, and then 4, 2 and 1, to other partial sums each.
  template <class Index, class F>
  TORCHCE_HD void add(Index count, const F& term) {
    Index first = 0;
    for (; first + n <= count; first += n) add_some<n>(0, first, term);
    add_rest<n / 2>(0, first, count, term);
  }
  TORCHCE_HD S value() const {
    return sum_in_pairs<n>(0, [&](int i) TORCHCE_HD_LAMBDA { return partial[i]; });
  }

 private:
  template <int some, class Index, class F>
  TORCHCE_HD void add_some(int place, Index first, const F& term) {
    if constexpr (some == 1) {
      partial[place] = partial[place] + term(first);
    } else {
      add_some<some / 2>(place, first, term);
      add_some<some / 2>(place + some / 2, first + some / 2, term);
    }
  }
  template <int some, class Index, class F>
  TORCHCE_HD void add_rest(int place, Index first, Index count, const F& term) {
    if constexpr (some > 0) {
      const bool are_there = first + some <= count;
      if (are_there) add_some<some>(place, first, term);
      add_rest<some / 2>(place + some, are_there ? first + some : first, count, term);
    }
  }
};

// CompensatedSum remembers what its additions rounded away (Kahan): float32 sums of 10^5 terms would lose digits. It
// has no value before it is given one: {} is 0, {x, {}} is x. Valid: all terms; infinite ones where kMayBeInfinite,
// else they make it a NaN. Error: 1 ulp and 2^-46 of the sum of magnitudes for each addition (floats).
template <class V, bool kMayBeInfinite>
struct CompensatedSum {
  V sum, excess;
  TORCHCE_HD void add(V term) {
    term -= excess;
    const V next = sum + term;
    excess = (next - sum) - term;
    if constexpr (kMayBeInfinite) excess = select(excess - excess == V{}, excess, V{});  // else it would be a NaN
    sum = next;
  }
  template <class Factor>
  TORCHCE_HD void scale(Factor factor) {
    sum *= factor;
    excess *= factor;
  }
};

// product_in_range is x a b, as of a gradient x, an upstream gradient and a weight.
// Valid: all x, a and b. With |x| <= 1 the larger of a and b comes first, else the smaller: that product lies between
// its factors, or the second takes it further the same way, so nothing is infinite or 0 but what the result is as well.
// Error: 1.5 ulp; beside a factor that is a subnormal number the product has no more digits than that.
template <class V>
TORCHCE_HD V product_in_range(V x, V a, V b) {
  const auto in_order = (abs(x) <= V{} + 1) == (abs(a) >= abs(b));
  return x * select(in_order, a, b) * select(in_order, b, a);
}
template <class V>
TORCHCE_HD V product_in_range(V x, V a, One) {
  return x * a;
}

// rounded is x, rounded before anything is added to it: a fused multiply-add would leave the rounding of a product
// where two equal ones cancel. So are rounded_product, a b, and both sides of rounded_difference, a - b.
// Valid: all x, a and b.
// Error: 1/2 ulp.
#if defined(__CUDA_ARCH__)
TORCHCE_HD float rounded_product(float a, float b) { return __fmul_rn(a, b); }
TORCHCE_HD double rounded_product(double a, double b) { return __dmul_rn(a, b); }
TORCHCE_HD float rounded_difference(float a, float b) { return __fsub_rn(a, b); }
TORCHCE_HD double rounded_difference(double a, double b) { return __dsub_rn(a, b); }
#else
template <class V>
TORCHCE_HD V rounded(V x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));  // the compiler cannot see what it is, so it cannot fuse it
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}
template <class V>
TORCHCE_HD V rounded_product(V a, V b) {
  return rounded(a * b);
}
template <class V>
TORCHCE_HD V rounded_difference(V a, V b) {
  return rounded(a) - rounded(b);
}
#endif

}  // namespace torchce::math
