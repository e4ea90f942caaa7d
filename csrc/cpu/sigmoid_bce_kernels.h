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

// A weight operand along a run: it is of the accumulation type, and one where it is absent.
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

// Calls body(i, lanes that count) for the vectors of a run from element i on.
template <class A, class F>
TORCHCE_SIMD void for_each_vector(int64_t i, int64_t length, F body) {
  constexpr int L = kLanes<A>;
  for (; i + L <= length; i += L) body(i, L);
  if (i < length) body(i, int(length - i));
}

// Pairs of vectors where all operands are dense. They take the even-odd order of 16-bit types only where logits and
// target both are of 16 bits.
template <class T, class U>
using DensePair = VectorPair<std::conditional_t<kSixteenBits<T> && kSixteenBits<U>, T, Accumulate<T>>>;

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
        unreduced(problem.options.reduction == Reduction::none),
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

// The first `count` lanes of v; the others are 0.
template <class A>
TORCHCE_SIMD Lanes<A> first_lanes(int count, Lanes<A> v) {
  return count == kLanes<A> ? v : math::select(lane_numbers<A>() < A(count), v, Lanes<A>{});
}

// The sum of a few losses that have the same weights.
template <class A>
struct FewWeighted {
  using V = Lanes<A>;
  V weight, pos_weight, losses{};
  TORCHCE_SIMD void add(V x, V target, int count = kLanes<A>) {
    losses += first_lanes<A>(count, loss(x, target, weight, pos_weight));
  }
  TORCHCE_SIMD V sum() const { return losses; }
};

// The sum of a few losses without weights.
template <class A>
struct FewUnweighted {
  using V = Lanes<A>;
  UnweightedSum<V> few;
  TORCHCE_SIMD void add(V x, V target, int count = kLanes<A>) {
    few.add(first_lanes<A>(count, linear_part(x, target, One{})), first_lanes<A>(count, smaller_odds(x)));
  }
  TORCHCE_SIMD V sum() const { return few.value(); }
};

// So many vectors are added up before the sum goes on in double: equal terms round the same way each time, and 512 of
// them in a float32 lane were off by 1.3e-6.
constexpr int kFew = 16;

template <class T, class U, class Few>
TORCHCE_SIMD double sum_of_losses(Run<const T> logits, Run<const U> target, int64_t length, const Few empty) {
  using A = Accumulate<T>;
  using P = DensePair<T, U>;
  constexpr int64_t kFewElements = kFew * kLanes<A>;
  static_assert(kFew % P::kVectors == 0);
  SumInDouble<A> total;
  int64_t i = 0;
  if (logits.stride == 1 && target.stride == 1) {
    for (; i + kFewElements <= length; i += kFewElements) {
      Few few = empty;
      for (int64_t j = i; j < i + kFewElements; j += P::kSize) {
        const P x = P::load(logits.data + j), t = P::load(target.data + j);
        for (int v = 0; v < P::kVectors; ++v) few.add(x.v[v], t.v[v]);
      }
      total.add(few.sum());
    }
  }
  while (i < length) {
    Few few = empty;
    const int64_t end = i + kFewElements < length ? i + kFewElements : length;
    for_each_vector<A>(i, end, [&](int64_t j, int count) {
      few.add(logits.template at<A>(j, count), target.template at<A>(j, count), count);
    });
    total.add(few.sum());
    i = end;
  }
  return total.value();
}

// Writes gradient(x, target) of the whole pairs of a dense run; says how many elements that were.
template <class T, class U, class F>
TORCHCE_SIMD int64_t write_dense(const T* logits, const U* target, auto* output, int64_t length, F gradient) {
  using P = DensePair<T, U>;
  int64_t i = 0;
  for (; i + P::kSize <= length; i += P::kSize) {
    const P x = P::load(logits + i), t = P::load(target + i);
    P g;
    for (int v = 0; v < P::kVectors; ++v) g.v[v] = gradient(x.v[v], t.v[v]);
    g.store(output + i);
  }
  return i;
}

}  // namespace bce

inline void sigmoid_bce_forward(const sigmoid_bce::Elements& problem, int64_t begin, int64_t end, Partial* partial) {
  using namespace bce;
  with_types(problem, [&](auto logits_type, auto target_type) {
    using T = decltype(logits_type);
    using U = decltype(target_type);
    using A = Accumulate<T>;
    using V = Lanes<A>;
    for_each_run(problem, begin, end, [&](const int64_t* offsets, int64_t length) {
      const auto logits = run_of<const T>(problem, kLogits, problem.data[kLogits], offsets);
      const auto target = run_of<const U>(problem, kTarget, problem.data[kTarget], offsets);
      const auto weight = weight_run<A>(problem, kWeight, offsets);
      const auto pos_weight = weight_run<A>(problem, kPosWeight, offsets);
      const auto each_loss = [&](auto each) {
        for_each_vector<A>(0, length, [&](int64_t i, int count) {
          each(i, count,
               loss(logits.template at<A>(i, count), target.template at<A>(i, count), weight.template at<A>(i, count),
                    pos_weight.template at<A>(i, count)));
        });
      };
      if (problem.options.reduction == Reduction::none) {
        with_float_type(problem.dtypes[kOutput], [&](auto storage) {
          const auto output = run_of<decltype(storage)>(problem, kOutput, problem.output, offsets);
          each_loss([&](int64_t i, int count, V v) { output.put(i, count, v); });
        });
      } else if (problem.data[kWeight] == nullptr && problem.data[kPosWeight] == nullptr) {
        partial->loss += sum_of_losses(logits, target, length, FewUnweighted<A>{});
      } else if (weight.stride == 0 && pos_weight.stride == 0) {
        const FewWeighted<A> empty{broadcast(load_one<A>(weight.data)), broadcast(load_one<A>(pos_weight.data))};
        partial->loss += sum_of_losses(logits, target, length, empty);
      } else {
        V few{};
        SumInDouble<A> total;
        each_loss([&](int64_t i, int count, V v) {
          few += first_lanes<A>(count, v);
          if ((i / kLanes<A> + 1) % kFew == 0) total.add(std::exchange(few, V{}));
        });
        total.add(few);
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
      int64_t done = 0;
      if constexpr (!kOfTarget) {
        if (!grad_output.unreduced && logits.stride == 1 && target.stride == 1 && output.stride == 1 &&
            weight.stride == 0) {
          const auto w = broadcast(load_one<A>(weight.data) * grad_output.of_all);
          if (problem.data[kPosWeight] == nullptr) {
            done = write_dense<T, U>(logits.data, target.data, output.data, length,
                                     [&](auto x, auto t) { return gradient(x, t, w, One{}, smaller_odds(x)); });
          } else if (pos_weight.stride == 0) {
            const auto c = broadcast(load_one<A>(pos_weight.data));
            done = write_dense<T, U>(logits.data, target.data, output.data, length,
                                     [&](auto x, auto t) { return gradient(x, t, w, c, smaller_odds(x)); });
          }
        }
      }
      for_each_vector<A>(done, length, [&](int64_t i, int count) {
        const auto x = logits.template at<A>(i, count);
        const auto w = weight.template at<A>(i, count) * grad_output.at(i, count);
        const auto c = pos_weight.template at<A>(i, count);
        if constexpr (kOfTarget) {
          output.put(i, count, target_gradient(x, w, c));
        } else {
          output.put(i, count, gradient(x, target.template at<A>(i, count), w, c, smaller_odds(x)));
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
