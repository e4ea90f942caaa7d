// One element of a sigmoid_bce problem: the types its operands have, what the upstream gradient gives it. The same for
// every device.
#pragma once

#include "math/sigmoid_bce.h"
#include "storage.h"

namespace torchce::sigmoid_bce {

// Targets come in the logits' type or one of these; the host converts others.
template <class T, class F>
inline __attribute__((always_inline)) void with_target_type(DType target, F f) {
  switch (target) {
    case DType::uint8:
      return f(uint8_t{});
    case DType::int64:
      return f(int64_t{});
    case DType::float32:
      return f(float{});
    default:
      return f(T{});
  }
}

// Calls f with the storage types of logits and targets.
template <class F>
inline __attribute__((always_inline)) void with_types(const Elements& problem, F f) {
  with_float_type(problem.dtypes[kLogits], [&](auto logits) {
    with_target_type<decltype(logits)>(problem.dtypes[kTarget], [&](auto target) { f(logits, target); });
  });
}

// The gradient of the target has the target's type, that of the logits theirs.
template <bool kFirst, class First, class Second>
auto pick(First first, Second second) {
  if constexpr (kFirst)
    return first;
  else
    return second;
}

// The upstream gradient of a reduced loss, as each element receives it: a product of two factors, the second of which
// is mostly 1.
template <class A>
struct GradOutputOfAll {
  A value, rest;
};

// The share of a mean is mostly g / N, but where that is subnormal a large gradient is multiplied with g first, as
// torch does.
template <class A>
TORCHCE_HD GradOutputOfAll<A> grad_output_of_all(const Elements& problem) {
  const A grad_output = load_as<A>(problem.dtypes[kGradOutput], problem.data[kGradOutput], 0);
  if (problem.options.reduction != Reduction::mean) return {grad_output, A(1)};
  const A share = grad_output / A(problem.numel);
  const bool is_exact = grad_output == A(0) || !(math::abs(share) < math::kSmallestNormal<A>);
  return is_exact ? GradOutputOfAll<A>{share, A(1)} : GradOutputOfAll<A>{grad_output, A(1) / A(problem.numel)};
}

// Whether a * b may stand for both factors: it is as exact as they, and so is its product with any number.
template <class A>
TORCHCE_HD bool is_exact_product(A a, A b) {
  const A product = math::abs(a * b);
  return a == A(0) || b == A(0) || (product >= math::kSmallestNormal<A> && product < math::kInfinity<A>);
}

}  // namespace torchce::sigmoid_bce
