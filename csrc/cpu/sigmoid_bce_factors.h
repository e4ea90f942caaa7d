// What a run's gradients are multiplied with: weights and upstream gradients.
#pragma once

#include "../sigmoid_bce_element.h"
#include "sigmoid_bce_runs.h"

namespace torchce::cpu::TORCHCE_LEVEL {

namespace bce {

using namespace sigmoid_bce;

// A factor of every element of a dense run: one for all, or one for each, side by side.
template <class A>
class Factor {
  const A* data = nullptr;
  bool repeats = true;
  Lanes<A> of_all{};

 public:
  Factor() {}
  Factor(const A* data, int64_t stride) : data(data), repeats(stride == 0), of_all(broadcast(*data)) {}
  TORCHCE_SIMD Lanes<A> at(int64_t i) const { return repeats ? of_all : load<A>(data + i); }
};

// The smallest magnitude of a run's numbers other than 0, and the largest.
template <class A>
struct Magnitudes {
  A smallest, largest;
};

template <class A, class T>
TORCHCE_SIMD Magnitudes<A> magnitudes(Run<const T> run, int64_t length) {
  using V = Lanes<A>;
  constexpr int L = kLanes<A>, kChains = 4;  // of operations that wait for each other
  V smallest[kChains], largest[kChains] = {};
  for (V& v : smallest) v = broadcast(math::kInfinity<A>);
  const auto add = [&](int chain, V v) TORCHCE_HD_LAMBDA {
    const V magnitude = math::abs(v), nonzero = math::select(magnitude == V{}, smallest[chain], magnitude);
    smallest[chain] = nonzero < smallest[chain] ? nonzero : smallest[chain];
    largest[chain] = larger_or_second(magnitude, largest[chain]);
  };
  int64_t i = 0;
  if (run.stride == 1) {
    for (; i + kChains * L <= length; i += kChains * L) {
      for (int chain = 0; chain < kChains; ++chain) add(chain, load<A>(run.data + i + chain * L));
    }
  }
  for_each_vector<A>(i, run.stride == 0 ? 1 : length,
                     [&](int64_t j, int count) { add(0, run.template at<A>(j, count)); });
  for (int chain = 1; chain < kChains; ++chain) {
    smallest[0] = smallest[chain] < smallest[0] ? smallest[chain] : smallest[0];
    largest[0] = larger_or_second(largest[chain], largest[0]);
  }
  return {fold<A>(smallest[0], [](auto a, auto b) { return a < b ? a : b; }), max_of<A>(largest[0])};
}

template <class A>
constexpr DType kTypeOf = sizeof(A) == sizeof(double) ? DType::float64 : DType::float32;

// The upstream gradient of a run, and in which order it and the weights are multiplied with a gradient. The product of
// both comes first where that loses nothing, which for weights of their own takes a look at them: comparing at every
// element (`product_in_range`), as unreduced losses do, costs a tenth of the time.
template <class A>
class GradOutput {
  const Elements& problem;
  const int64_t* offsets;
  bool unreduced, multiplies_first;
  GradOutputOfAll<A> of_all;

  // Whether the product with any weight may come first where gradients are at most 1: it cannot overflow, and where it
  // is subnormal the result has no more digits.
  bool suits_small_gradients() const { return math::abs(of_all.value) <= A(1); }

  bool suits(Run<const A> weight, int64_t length) const {
    const auto [smallest, largest] = magnitudes<A>(weight, length);
    return is_exact_product(of_all.value, smallest) && is_exact_product(of_all.value, largest);
  }

 public:
  // `small_gradients` says that gradients without weight are at most 1, as targets from 0 to 1 make them.
  GradOutput(const Elements& problem, const int64_t* offsets, Run<const A> weight, int64_t length, bool small_gradients)
      : problem(problem),
        offsets(offsets),
        unreduced(problem.options.reduction == Reduction::none),
        of_all(unreduced ? GradOutputOfAll<A>{A(1), A(1)} : grad_output_of_all<A>(problem)) {
    if (unreduced) {
      multiplies_first = problem.data[kWeight] == nullptr;
    } else {
      multiplies_first = of_all.rest == A(1) && ((small_gradients && suits_small_gradients()) || suits(weight, length));
    }
  }

  // Whether one product stands for the run's one weight and upstream gradient; sets it.
  bool with_weight(A weight, A* product) const {
    *product = of_all.value * weight;
    return !unreduced && multiplies_first;
  }

  // Sets the upstream gradients of a dense run, where they are of the accumulation type, or the one factor that there
  // is.
  bool as_factor(Factor<A>* factor) const {
    if (!unreduced) {
      *factor = Factor<A>(&of_all.value, 0);
      return of_all.rest == A(1);
    }
    if (problem.dtypes[kGradOutput] != kTypeOf<A>) return false;
    const auto run = run_of<const A>(problem, kGradOutput, problem.data[kGradOutput], offsets);
    *factor = Factor<A>(run.data, run.stride);
    return run.stride <= 1;
  }

  // A gradient with upstream gradient and weight.
  template <class V, class Weight>
  TORCHCE_SIMD V scale(V gradient, V upstream, Weight weight) const {
    return multiplies_first ? gradient * (weight * upstream) : math::product_in_range(gradient, upstream, weight);
  }

  // The same of kLanes elements from i on, of which `count` are there.
  template <class Weight>
  TORCHCE_SIMD Lanes<A> scale(Lanes<A> gradient, Weight weight, int64_t i, int count) const {
    if (!unreduced) return scale(gradient, broadcast(of_all.value), weight) * broadcast(of_all.rest);
    Lanes<A> upstream{};
    with_float_type(problem.dtypes[kGradOutput], [&](auto storage) TORCHCE_HD_LAMBDA {
      upstream = run_of<const decltype(storage)>(problem, kGradOutput, problem.data[kGradOutput], offsets)
                     .template at<A>(i, count);
    });
    return scale(gradient, upstream, weight);
  }
};

}  // namespace bce

}  // namespace torchce::cpu::TORCHCE_LEVEL
