// Binary divergences and entropies of a range of elements, in the order of the problem's merged dimensions.
#pragma once

#include "../math/binary_divergence.h"
#include "sigmoid_bce_kernels.h"

namespace torchce::cpu::TORCHCE_LEVEL {

namespace binary {

using namespace binary_divergence;

// The sum of a few divergences.
template <class A, class Terms>
struct FewDivergences {
  using V = Lanes<A>;
  V losses{};
  TORCHCE_SIMD void add(V x, V target, int count = kLanes<A>) {
    losses += bce::first_lanes<A>(count, Terms::value(x, target));
  }
  TORCHCE_SIMD V sum() const { return losses; }
};

// Calls f with the formula's type, the storage types of logits and targets.
template <class F>
void with_formula_and_types(Formula formula, const sigmoid_bce::Elements& problem, F f) {
  with_formula(formula, [&](auto terms) {
    with_float_type(problem.dtypes[sigmoid_bce::kLogits], [&](auto logits) {
      using T = decltype(logits);
      const bool is_float = problem.dtypes[sigmoid_bce::kTarget] == DType::float32;
      if constexpr (!std::is_same_v<decltype(terms), Entropy> && !std::is_same_v<T, float>) {
        if (is_float) return f(terms, logits, float{});
      }
      f(terms, logits, T{});
    });
  });
}

}  // namespace binary

void binary_divergence_forward(const sigmoid_bce::Elements& problem, binary_divergence::Formula formula, int64_t begin,
                               int64_t end, Partial* partial) {
  using namespace bce;
  if (is_tile(problem)) {
    return with_packed_operands(
        problem, [&](const Elements& packed) { binary_divergence_forward(packed, formula, begin, end, partial); });
  }
  binary::with_formula_and_types(formula, problem, [&](auto terms, auto logits_type, auto target_type) {
    using T = decltype(logits_type);
    using U = decltype(target_type);
    using A = Accumulate<T>;
    for_each_run(problem, begin, end, [&](const int64_t* offsets, int64_t length) {
      const auto logits = run_of<const T>(problem, kLogits, problem.data[kLogits], offsets);
      const auto target = run_of<const U>(problem, kTarget, problem.data[kTarget], offsets);
      if (problem.options.reduction != Reduction::none) {
        partial->loss += sum_of_losses(logits, target, length, binary::FewDivergences<A, decltype(terms)>{});
        return;
      }
      with_float_type(problem.dtypes[kOutput], [&](auto storage) {
        const auto output = run_of<decltype(storage)>(problem, kOutput, problem.output, offsets);
        for_each_vector<A>(0, length, [&](int64_t i, int count) {
          output.put(i, count, terms.value(logits.template at<A>(i, count), target.template at<A>(i, count)));
        });
      });
    });
  });
}

template <bool kOfTarget>
void binary_divergence_gradient(const sigmoid_bce::Elements& problem, binary_divergence::Formula formula, int64_t begin,
                                int64_t end) {
  using namespace bce;
  if (is_tile(problem)) {
    return with_packed_operands(
        problem, [&](const Elements& packed) { binary_divergence_gradient<kOfTarget>(packed, formula, begin, end); });
  }
  binary::with_formula_and_types(formula, problem, [&](auto terms, auto logits_type, auto target_type) {
    using T = decltype(logits_type);
    using U = decltype(target_type);
    using A = Accumulate<T>;
    if constexpr (!kOfTarget || !std::is_same_v<decltype(terms), binary_divergence::Entropy>) {
      using Output = decltype(pick<kOfTarget>(target_type, logits_type));
      const auto gradient = [&](auto x, auto t) TORCHCE_HD_LAMBDA {
        if constexpr (kOfTarget) {
          return terms.by_target(x, t);
        } else {
          return terms.by_logit(x, t);
        }
      };
      for_each_run(problem, begin, end, [&](const int64_t* offsets, int64_t length) {
        const auto logits = run_of<const T>(problem, kLogits, problem.data[kLogits], offsets);
        const auto target = run_of<const U>(problem, kTarget, problem.data[kTarget], offsets);
        const auto output = run_of<Output>(problem, kOutput, problem.output, offsets);
        const GradOutput<A> grad_output(problem, offsets, weight_run<A>(problem, kWeight, offsets), length,
                                        /*small_gradients=*/!kOfTarget);
        for_each_vector<A>(0, length, [&](int64_t i, int count) TORCHCE_HD_LAMBDA {
          const auto grad = gradient(logits.template at<A>(i, count), target.template at<A>(i, count));
          output.put(i, count, grad_output.scale(grad, One{}, i, count));
        });
      });
    }
  });
}

void binary_divergence_backward(const sigmoid_bce::Elements& problem, binary_divergence::Formula formula, GradientOf of,
                                int64_t begin, int64_t end) {
  if (of == GradientOf::target) {
    binary_divergence_gradient<true>(problem, formula, begin, end);
  } else {
    binary_divergence_gradient<false>(problem, formula, begin, end);
  }
}

}  // namespace torchce::cpu::TORCHCE_LEVEL
