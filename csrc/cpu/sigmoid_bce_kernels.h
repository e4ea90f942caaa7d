// Sigmoid binary cross entropy of a range of elements, in the order of the problem's merged dimensions.
#pragma once

#include "sigmoid_bce_factors.h"
#include "sigmoid_bce_pack.h"

namespace torchce::cpu::TORCHCE_LEVEL {

namespace bce {

using namespace sigmoid_bce;

// Pairs of vectors where all operands are dense. They take the even-odd order of 16-bit types only where logits and
// target both are of 16 bits.
template <class T, class U>
using DensePair = VectorPair<std::conditional_t<kSixteenBits<T> && kSixteenBits<U>, T, Accumulate<T>>>;

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

// Writes gradient(x, target, place) of the whole pairs of a dense run; says how many elements that were. The place is
// that of the first lane, where the pairs P are of vectors one after the other.
template <class P, class T, class U, class F>
TORCHCE_SIMD int64_t write_dense(const T* logits, const U* target, auto* output, int64_t length, F gradient) {
  int64_t i = 0;
  for (; i + P::kSize <= length; i += P::kSize) {
    const P x = P::load(logits + i), t = P::load(target + i);
    P g;
    for (int v = 0; v < P::kVectors; ++v) g.v[v] = gradient(x.v[v], t.v[v], i + P::start(v));
    g.store(output + i);
  }
  return i;
}

}  // namespace bce

inline void sigmoid_bce_forward(const sigmoid_bce::Elements& problem, int64_t begin, int64_t end, Partial* partial) {
  using namespace bce;
  if (is_tile(problem)) {
    return with_packed_operands(problem,
                                [&](const Elements& packed) { sigmoid_bce_forward(packed, begin, end, partial); });
  }
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
  if (is_tile(problem)) {
    return with_packed_operands(problem,
                                [&](const Elements& packed) { sigmoid_bce_gradient<kOfTarget>(packed, begin, end); });
  }
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
      const GradOutput<A> grad_output(problem, offsets, weight, length,
                                      !kOfTarget && problem.data[kPosWeight] == nullptr);
      int64_t done = 0;
      if constexpr (!kOfTarget) {
        if (logits.stride == 1 && target.stride == 1 && output.stride == 1) {
          const auto write = [&]<class P>(P, auto gradient) TORCHCE_HD_LAMBDA {
            return write_dense<P>(logits.data, target.data, output.data, length, gradient);
          };
          A product;
          Factor<A> upstream;
          if (weight.stride == 0 && pos_weight.stride == 0 &&
              grad_output.with_weight(load_one<A>(weight.data), &product)) {
            using P = DensePair<T, U>;
            const auto w = broadcast(product), c = broadcast(load_one<A>(pos_weight.data));
            done = problem.data[kPosWeight] == nullptr
                       ? write(P{}, [=](auto x, auto t, int64_t)
                                        TORCHCE_HD_LAMBDA { return w * gradient(x, t, One{}, smaller_odds(x)); })
                       : write(P{}, [=](auto x, auto t, int64_t)
                                        TORCHCE_HD_LAMBDA { return w * gradient(x, t, c, smaller_odds(x)); });
          } else if (weight.stride <= 1 && pos_weight.stride <= 1 && grad_output.as_factor(&upstream)) {
            using P = VectorPair<A>;
            const Factor<A> w(weight.data, weight.stride), c(pos_weight.data, pos_weight.stride);
            done =
                problem.data[kPosWeight] == nullptr
                    ? write(P{},
                            [&](auto x, auto t, int64_t i) TORCHCE_HD_LAMBDA {
                              return grad_output.scale(gradient(x, t, One{}, smaller_odds(x)), upstream.at(i), w.at(i));
                            })
                    : write(P{}, [&](auto x, auto t, int64_t i) TORCHCE_HD_LAMBDA {
                        return grad_output.scale(gradient(x, t, c.at(i), smaller_odds(x)), upstream.at(i), w.at(i));
                      });
          }
        }
      }
      // Inlined wherever it is called: else what it captures would be read again after every store.
      const auto write = [&](auto weight_at, auto pos_weight_at) TORCHCE_HD_LAMBDA {
        for_each_vector<A>(done, length, [&](int64_t i, int count) TORCHCE_HD_LAMBDA {
          const auto x = logits.template at<A>(i, count);
          Lanes<A> grad;
          if constexpr (kOfTarget) {
            grad = target_gradient(x, pos_weight_at(i, count));
          } else {
            grad = gradient(x, target.template at<A>(i, count), pos_weight_at(i, count), smaller_odds(x));
          }
          output.put(i, count, grad_output.scale(grad, weight_at(i, count), i, count));
        });
      };
      const auto at = [](Run<const A> run) {
        return [=](int64_t i, int count) TORCHCE_HD_LAMBDA { return run.template at<A>(i, count); };
      };
      const auto one = [](int64_t, int) { return One{}; };
      if (problem.data[kWeight] != nullptr) {
        write(at(weight), at(pos_weight));
      } else if (problem.data[kPosWeight] != nullptr) {
        write(one, at(pos_weight));
      } else {
        write(one, one);
      }
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
