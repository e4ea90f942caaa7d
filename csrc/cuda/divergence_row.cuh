// The classes of two distributions as the divergence kernels read them, and what each adds to the sums of its row.
#pragma once

#include "../divergence_row.h"
#include "exp.cuh"
#include "pack.cuh"
#include "packed_classes.cuh"
#include "reduce.cuh"

namespace torchce::cuda::divergence {

using namespace torchce::divergence;

// Calls add(class, values of the first operand, of the other one), packs of them, for the classes of thread `thread`
// out of `team` that share a row. kAdjacent: classes are adjacent in memory. The first operand decides where packs
// start.
template <class S, bool kAdjacent, class T, class Add>
__device__ __forceinline__ void for_each_class(const Rows& rows, RowPosition at, int thread, int team, Add add) {
  using A = Accumulate<T>;
  constexpr bool kHasOther = S::kOther != Side::none;
  const A scale = A(1 / rows.options.temperature);
  const T* f = static_cast<const T*>(rows.first.data) + at.offset(rows.first.strides);
  const T* o = kHasOther ? static_cast<const T*>(rows.other.data) + at.offset(rows.other.strides) : f;
  const int64_t f_step = rows.first.strides.classes, o_step = rows.other.strides.classes;
  const auto add_one = [&](int64_t k) {
    A first[1] = {value_of<S::kFirst>(A(load_one<A>(f + k * f_step)), scale)}, other[1] = {0};
    if constexpr (kHasOther) other[0] = value_of<S::kOther>(A(load_one<A>(o + k * o_step)), scale);
    add(k, first, other);
  };
  if constexpr (!kAdjacent) {
    for (int64_t k = thread; k < rows.classes; k += team) add_one(k);
  } else {
    constexpr int V = kPack<T>;
    const PackedClasses<V> classes(f, 0, rows.classes);
    const bool other_aligned = is_aligned<V>(o + classes.body);
    classes.for_each_before(thread, team, add_one);
    for (int64_t p = thread; p < classes.packs; p += team) {
      const int64_t k = classes.body + p * V;
      const Pack<T, V> first_pack = load_pack<V>(f + k, true);
      Pack<T, V> other_pack = first_pack;
      if constexpr (kHasOther) other_pack = load_pack<V>(o + k, other_aligned);
      A first[V], other[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        first[v] = value_of<S::kFirst>(get<A>(first_pack, v), scale);
        other[v] = kHasOther ? value_of<S::kOther>(get<A>(other_pack, v), scale) : A(0);
      }
      add(k, first, other);
    }
    classes.for_each_after(thread, team, add_one);
  }
}

// The sums of some of a row's classes, against the largest logits among them: what reductions combine (reduce.cuh).
template <class A, class S>
struct Share {
  OnlineSums<A, S, PlainSum<A>> sums;

  __device__ __forceinline__ static Share identity() { return {OnlineSums<A, S, PlainSum<A>>::template none<A>()}; }

  // What `width` neighbouring lanes have together, with the same bits in each of them: made relative to the largest
  // logits of all first, by one factor each.
  __device__ __forceinline__ Share of_lanes(int width) const {
    Share all = *this;
    auto& [against, most, first, other, surplus, gaps] = all.sums;
    A largest_first = against.first, largest_other = against.other;
    for (int step = width / 2; step > 0; step /= 2) {
      largest_first = math::larger(largest_first, __shfl_xor_sync(kAllLanes, largest_first, step));
      largest_other = math::larger(largest_other, __shfl_xor_sync(kAllLanes, largest_other, step));
      most = math::larger(most, __shfl_xor_sync(kAllLanes, most, step));
    }
    all.sums.template raise_to<A>(largest_first, largest_other);
    first.sum = sum_of_lanes(first.sum, width);
    other.sum = sum_of_lanes(other.sum, width);
    surplus.sum = sum_of_lanes(surplus.sum, width);
    gaps.sum = sum_of_lanes(gaps.sum, width);
    return all;
  }
};

struct ExpInSum {
  template <class A>
  __device__ __forceinline__ A operator()(A x) const {
    return exp_in_sum(x);
  }
};

// Adds up the classes that a thread goes through. They stay relative to earlier maxima until a logit is far above: the
// errors of the factors would add up.
template <class A, class S>
class RunningSums {
  static constexpr int kFar = 4;
  OnlineSums<A, S, math::CompensatedSum<A, true>> sums_ =
      OnlineSums<A, S, math::CompensatedSum<A, true>>::template none<A>();
  A first_max_ = sums_.against.first, other_max_ = sums_.against.other;
  Bounds<A> bounds_;

 public:
  template <int n>
  __device__ __forceinline__ void add(const A (&f)[n], const A (&o)[n]) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if constexpr (S::kFirst == Side::logits) first_max_ = math::larger(first_max_, f[i]);
      if constexpr (S::kOther == Side::logits) other_max_ = math::larger(other_max_, o[i]);
    }
    const References<A, S>& against = sums_.against;
    const bool first_is_far = first_max_ > against.first + A(kFar);
    const bool other_is_far = other_max_ > against.other + A(kFar);
    if (first_is_far || other_is_far) {
      sums_.template raise_to<A>(first_is_far ? first_max_ : against.first, other_is_far ? other_max_ : against.other);
    }
    sums_.add(
        math::sum_in_pairs<n>(0, [&](int i) { return against.terms(ExpInSum{}, bounds_, f[i], o[i], sums_.most); }));
  }

  // What was added, against the largest logits.
  __device__ __forceinline__ Share<A, S> share() {
    sums_.template raise_to<A>(first_max_, other_max_);
    return {{sums_.against, sums_.most, {sums_.first.sum}, {sums_.other.sum}, {sums_.surplus.sum}, {sums_.gaps.sum}}};
  }
};

// What makes probabilities, times a factor, of the values of a row.
template <class A, Side kSide>
class Softmax {
  ScaledExp<A, false> exp;
  A max;

 public:
  __device__ __forceinline__ Softmax() {}
  __device__ __forceinline__ Softmax(A max, A sum, A factor) : exp(factor / sum), max(max) {}
  __device__ __forceinline__ A at(A x) const { return exp(x - max); }
};
template <class A>
class Softmax<A, Side::probabilities> {
  A factor;

 public:
  __device__ __forceinline__ Softmax() {}
  __device__ __forceinline__ Softmax(A, A, A factor) : factor(factor) {}
  __device__ __forceinline__ A at(A probability) const { return factor * probability; }
};
template <class A>
class Softmax<A, Side::none> {
 public:
  __device__ __forceinline__ Softmax() {}
  __device__ __forceinline__ Softmax(A, A, A) {}
  __device__ __forceinline__ A at(A) const { return 0; }
};

}  // namespace torchce::cuda::divergence
