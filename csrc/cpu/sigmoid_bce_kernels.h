// Sigmoid binary cross entropy of a range of elements, in the order of the problem's merged dimensions.
#pragma once

#include "../sigmoid_bce_element.h"
#include "vector.h"

namespace torchce::cpu::TORCHCE_LEVEL {

namespace bce {

using namespace sigmoid_bce;

// One operand along a run of the innermost dimension.
template <class T>
struct Run {
  T* data;
  int64_t stride;

  template <class A>
  TORCHCE_SIMD Lanes<A> at(int64_t i, int count) const {
    if (stride == 0) return broadcast(load_one<A>(data));
    if (stride == 1 && count == kLanes<A>) return load<A>(data + i);
    Lanes<A> v{};  // the remainder of a run, or a stride
    for (int l = 0; l < count; ++l) v[l] = load_one<A>(data + (i + l) * stride);
    return v;
  }

  template <class V>
  TORCHCE_SIMD void put(int64_t i, int count, V v) const {
    constexpr int L = sizeof(V) / sizeof(v[0]);
    if (stride == 1 && count == L) return store(data + i, v);
    for (int l = 0; l < count; ++l) store_one(data + (i + l) * stride, v[l]);
  }
};

// Weights: of the accumulation type, ones where absent.
template <class A>
Run<const A> weight_run(const Elements& problem, Operand operand, const int64_t* offsets) {
  static constexpr A kOne = 1;
  if (problem.data[operand] == nullptr) return {&kOne, 0};
  return {static_cast<const A*>(problem.data[operand]) + offsets[operand], problem.strides[operand][problem.dims - 1]};
}

template <class T>
Run<T> run_of(const Elements& problem, Operand operand, const void* data, const int64_t* offsets) {
  return {static_cast<T*>(const_cast<void*>(data)) + offsets[operand], problem.strides[operand][problem.dims - 1]};
}

// Splits elements [begin, end) into runs of the innermost dimension: body(offsets of the operands, length).
template <class F>
TORCHCE_SIMD void for_each_run(const Elements& problem, int64_t begin, int64_t end, F body) {
  const int inner = problem.dims - 1;
  while (begin < end) {
    int64_t index = begin, offsets[kOperands] = {}, inner_index = 0;
    for (int d = inner; d >= 0; --d) {
      const int64_t i = index % problem.sizes[d];
      index /= problem.sizes[d];
      if (d == inner) inner_index = i;
      for (int operand = 0; operand < kOperands; ++operand) offsets[operand] += i * problem.strides[operand][d];
    }
    const int64_t left = problem.sizes[inner] - inner_index;
    const int64_t length = left < end - begin ? left : end - begin;
    body(offsets, length);
    begin += length;
  }
}

// Calls body(i, lanes that count) for the vectors of a run.
template <class A, class F>
TORCHCE_SIMD void for_each_vector(int64_t length, F body) {
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  for (; i + L <= length; i += L) body(i, L);
  if (i < length) body(i, int(length - i));
}

// Upstream gradients of kLanes elements.
template <class A>
struct GradOutput {
  const Elements& problem;
  const int64_t* offsets;
  bool unreduced;
  A of_all;

  GradOutput(const Elements& problem, const int64_t* offsets)
      : problem(problem),
        offsets(offsets),
        unreduced(problem.reduction == Reduction::none),
        of_all(unreduced ? A(0) : grad_output_of_all<A>(problem)) {}

  TORCHCE_SIMD Lanes<A> at(int64_t i, int count) const {
    if (!unreduced) return broadcast(of_all);
    Lanes<A> v{};
    with_float_type(problem.dtypes[kGradOutput], [&](auto storage) {
      v = run_of<const decltype(storage)>(problem, kGradOutput, problem.data[kGradOutput], offsets)
              .template at<A>(i, count);
    });
    return v;
  }
};

}  // namespace bce

inline void sigmoid_bce_forward(const sigmoid_bce::Elements& problem, int64_t begin, int64_t end, Partial* partial) {
  using namespace bce;
  with_types(problem, [&](auto logits_type, auto target_type) {
    using T = decltype(logits_type);
    using U = decltype(target_type);
    using A = Accumulate<T>;
    using V = Lanes<A>;
    const auto reduce = [&](const int64_t* offsets, int64_t length, auto each) {
      const auto logits = run_of<const T>(problem, kLogits, problem.data[kLogits], offsets);
      const auto target = run_of<const U>(problem, kTarget, problem.data[kTarget], offsets);
      const auto weight = weight_run<A>(problem, kWeight, offsets);
      const auto pos_weight = weight_run<A>(problem, kPosWeight, offsets);
      for_each_vector<A>(length, [&](int64_t i, int count) {
        each(i, count,
             loss(logits.template at<A>(i, count), target.template at<A>(i, count), weight.template at<A>(i, count),
                  pos_weight.template at<A>(i, count)));
      });
    };
    for_each_run(problem, begin, end, [&](const int64_t* offsets, int64_t length) {
      if (problem.reduction == Reduction::none) {
        with_float_type(problem.dtypes[kOutput], [&](auto storage) {
          const auto output = run_of<decltype(storage)>(problem, kOutput, problem.output, offsets);
          reduce(offsets, length, [&](int64_t i, int count, V v) { output.put(i, count, v); });
        });
      } else {
        // Equal terms round the same way each time: 512 of them in a float32 lane were off by 1.3e-6.
        constexpr int64_t kTerms = 16;
        V sum{};
        SumInDouble<A> total;
        reduce(offsets, length, [&](int64_t i, int count, V v) {
          sum += math::select(lane_numbers<A>() < A(count), v, V{});
          if ((i / kLanes<A> + 1) % kTerms == 0) total.add(std::exchange(sum, V{}));
        });
        total.add(sum);
        partial->loss += total.value();
      }
    });
  });
}

template <bool kOfTarget>
void sigmoid_bce_gradient(const sigmoid_bce::Elements& problem, int64_t begin, int64_t end) {
  using namespace bce;
  with_types(problem, [&](auto logits_type, auto target_type) {
    using T = decltype(logits_type);
    using U = decltype(target_type);
    using A = Accumulate<T>;
    using Output = decltype(pick<kOfTarget>(target_type, logits_type));
    for_each_run(problem, begin, end, [&](const int64_t* offsets, int64_t length) {
      const auto logits = run_of<const T>(problem, kLogits, problem.data[kLogits], offsets);
      const auto target = run_of<const U>(problem, kTarget, problem.data[kTarget], offsets);
      const auto weight = weight_run<A>(problem, kWeight, offsets);
      const auto pos_weight = weight_run<A>(problem, kPosWeight, offsets);
      const auto output = run_of<Output>(problem, kOutput, problem.output, offsets);
      const GradOutput<A> grad_output(problem, offsets);
      for_each_vector<A>(length, [&](int64_t i, int count) {
        const auto x = logits.template at<A>(i, count);
        const auto w = weight.template at<A>(i, count) * grad_output.at(i, count);
        const auto c = pos_weight.template at<A>(i, count);
        if constexpr (kOfTarget) {
          output.put(i, count, target_gradient(x, w, c));
        } else {
          output.put(i, count, gradient(x, target.template at<A>(i, count), w, c));
        }
      });
    });
  });
}

inline void sigmoid_bce_backward(const sigmoid_bce::Elements& problem, int64_t begin, int64_t end) {
  sigmoid_bce_gradient<false>(problem, begin, end);
}

inline void sigmoid_bce_backward_target(const sigmoid_bce::Elements& problem, int64_t begin, int64_t end) {
  sigmoid_bce_gradient<true>(problem, begin, end);
}

}  // namespace torchce::cpu::TORCHCE_LEVEL
