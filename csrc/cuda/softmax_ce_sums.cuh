// The sums over a row's classes that its loss and its gradient need, in one pass over the logits.
#pragma once

#include "../softmax_ce_row.h"
#include "exp.cuh"
#include "reduce.cuh"

namespace torchce::cuda::softmax_ce {

using namespace torchce::softmax_ce;

template <int n, class A, class Logit>
__device__ __forceinline__ A largest(A max, Logit x) {
#pragma unroll
  for (int i = 0; i < n; ++i) max = math::larger(max, x(i));
  return max;
}

// The sums of some of a row's classes relative to their own maximum, so that those of others can be added and the
// logits are read once (the online softmax of Milakov and Gimelshein, arXiv:1805.02867). While there is no maximum but
// -inf, sums are relative to 0, where exp(-inf) is 0 as it should be.
template <class A, bool kSpread>
struct RowSums {
  A max;
  A exponentials;  // sum_k exp(x_k - max)
  A coefficients;  // sum_k u_k
  A gaps;          // sum_k u_k (x_k - max)

  __device__ __forceinline__ static A minus_infinity() { return -A(math::kInfinityF); }
  __device__ __forceinline__ static RowSums identity() { return {minus_infinity(), 0, 0, 0}; }
  __device__ __forceinline__ static A base(A max) { return max == minus_infinity() ? A(0) : max; }

  // Makes the sums relative to another maximum that is not less. One of minus infinity makes the sum 0 times itself: it
  // has no terms but zeros, or a NaN that must stay. Gaps below it are infinite or none, and no maximum changes them.
  __device__ __forceinline__ void rebase(A larger) { rebase(larger, exp_in_sum(max - base(larger))); }
  __device__ __forceinline__ void rebase(A larger, A factor) {
    exponentials *= factor;
    if constexpr (kSpread) {
      const A to = base(larger);
      gaps += weighted_gap(coefficients, max == minus_infinity() ? to : max, to);
    }
    max = larger;
  }

  // Adds n classes, none of them far above max: x(i) are the logits, u(i) the coefficients.
  template <int n, class Logit, class Coefficient>
  __device__ __forceinline__ void add_terms(Logit x, Coefficient u) {
    const A from = base(max);
    A sum = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      sum += exp_in_sum(x(i) - from);
      if constexpr (kSpread) {
        coefficients += u(i);
        gaps += weighted_gap(u(i), x(i), from);
      }
    }
    exponentials += sum;
  }

  // Of a whole row. One with nothing but -inf has no softmax.
  __device__ __forceinline__ A whole_exponentials() const {
    return max == minus_infinity() ? A(__builtin_nan("")) : exponentials;
  }

  // What several have together is made relative to the largest maximum first: one factor for each of them, where
  // merging them pair by pair would take one a step and gather their errors.

  // The same bits in each of the `width` lanes.
  __device__ __forceinline__ RowSums of_lanes(int width) const {
    A larger = max;
    for (int step = width / 2; step > 0; step /= 2) {
      larger = math::larger(larger, __shfl_xor_sync(kAllLanes, larger, step));
    }
    RowSums all = *this;
    all.rebase(larger);
    all.exponentials = sum_of_lanes(all.exponentials, width);
    if constexpr (kSpread) {
      all.coefficients = sum_of_lanes(all.coefficients, width);
      all.gaps = sum_of_lanes(all.gaps, width);
    }
    return all;
  }

  template <class At>
  __device__ __forceinline__ static RowSums of_each(int count, At at) {
    RowSums all = identity();
    for (int i = 0; i < count; ++i) all.max = math::larger(all.max, at(i).max);
    for (int i = 0; i < count; ++i) {
      RowSums each = at(i);
      each.rebase(all.max);
      all.exponentials += each.exponentials;
      if constexpr (kSpread) {
        all.coefficients += each.coefficients;
        all.gaps += each.gaps;
      }
    }
    return all;
  }
};

// The sums of the classes that a thread goes through, batch after batch. They stay relative to an earlier maximum until
// a logit is far above it: rescaled at each new one, a row that rises slowly would gather the errors of all those
// factors. Beyond e^4 the differences from the earlier maximum, and so the terms, would lose digits.
template <class A, bool kSpread>
struct RunningSums {
  static constexpr int kFar = 4;
  RowSums<A, kSpread> sums = RowSums<A, kSpread>::identity();
  A max = RowSums<A, kSpread>::minus_infinity();

  template <int n, class Logit, class Coefficient>
  __device__ __forceinline__ void add(Logit x, Coefficient u) {
    max = largest<n>(max, x);
    if (max > sums.max + A(kFar)) sums = rebased();
    sums.template add_terms<n>(x, u);
  }

  // Relative to the maximum, by one exact factor.
  __device__ __forceinline__ RowSums<A, kSpread> rebased() const {
    RowSums<A, kSpread> result = sums;
    result.rebase(max, math::exp_of_negative(sums.max - result.base(max)));
    return result;
  }
};

}  // namespace torchce::cuda::softmax_ce
