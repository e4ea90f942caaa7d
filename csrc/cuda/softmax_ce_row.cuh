// What the softmax_ce kernels do with a row's numbers: sums in one pass over the logits, the loss, the gradient.
#pragma once

#include "../softmax_ce_row.h"
#include "pack.cuh"
#include "reduce.cuh"

namespace torchce::cuda::softmax_ce {

using namespace torchce::softmax_ce;

// Packs of logits a thread has in flight. Half as many where something else needs the registers: the exponentials of
// float64, or the coefficients of every class.
template <class Target, class A>
constexpr int kUnroll = sizeof(A) == sizeof(double) || Target::kSpread ? 2 : 4;

// The sums of some of a row's classes relative to their own maximum, so that any two can be merged and the logits are
// read once (the online softmax of Milakov and Gimelshein, arXiv:1805.02867). While there is no maximum but -inf, sums
// are relative to 0, where exp(-inf) is 0 as it should be.
template <class A, bool kSpread>
struct RowSums {
  A max;
  A exponentials;  // sum_k exp(x_k - max)
  A coefficients;  // sum_k u_k
  A gaps;          // sum_k u_k (x_k - max)

  __device__ __forceinline__ static A minus_infinity() { return -A(math::kInfinityF); }
  __device__ __forceinline__ static RowSums identity() { return {minus_infinity(), 0, 0, 0}; }
  __device__ __forceinline__ static A base(A max) { return max == minus_infinity() ? A(0) : max; }

  // Makes the sums relative to another, larger maximum.
  __device__ __forceinline__ void rebase(A larger) {
    // 0 times the sum: it has no terms but zeros, or a NaN that must stay.
    exponentials *= max == minus_infinity() ? A(0) : math::exp_in_sum(max - base(larger));
    if constexpr (kSpread) gaps += weighted_gap(coefficients, base(max), base(larger));
    max = larger;
  }

  __device__ __forceinline__ void merge(RowSums other) {
    const A larger = other.max > max ? other.max : max;
    rebase(larger);
    other.rebase(larger);
    exponentials += other.exponentials;
    if constexpr (kSpread) {
      coefficients += other.coefficients;
      gaps += other.gaps;
    }
  }

  // Adds n classes: x(i) are the logits, u(i) the coefficients.
  template <int n, class Logit, class Coefficient>
  __device__ __forceinline__ void add(Logit x, Coefficient u) {
    A larger = max;
#pragma unroll
    for (int i = 0; i < n; ++i) larger = x(i) > larger ? x(i) : larger;
    if (larger != max) rebase(larger);
    const A from = base(max);
    A sum = 0;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      sum += math::exp_in_sum(x(i) - from);
      if constexpr (kSpread) {
        coefficients += u(i);
        gaps += weighted_gap(u(i), x(i), from);
      }
    }
    exponentials += sum;
  }

  __device__ __forceinline__ RowSums shuffled(int step) const {
    RowSums other;
    other.max = __shfl_xor_sync(kAllLanes, max, step);
    other.exponentials = __shfl_xor_sync(kAllLanes, exponentials, step);
    if constexpr (kSpread) {
      other.coefficients = __shfl_xor_sync(kAllLanes, coefficients, step);
      other.gaps = __shfl_xor_sync(kAllLanes, gaps, step);
    } else {
      other.coefficients = other.gaps = 0;
    }
    return other;
  }
};

// u_k of one row.
template <class Target, class A>
struct Coefficients {
  static constexpr bool kUsed = Target::kSpread;
  const A* weight;
  A label_smoothing, classes;

  __device__ __forceinline__ explicit Coefficients(const Rows& rows)
      : weight(static_cast<const A*>(rows.weight)),
        label_smoothing(A(rows.label_smoothing)),
        classes(A(rows.classes)) {}

  __device__ __forceinline__ A weight_of(int64_t k) const { return weight == nullptr ? A(1) : weight[k]; }

  // `probability` is the target's, where it has one.
  __device__ __forceinline__ A at(int64_t k, A probability) const {
    if constexpr (Target::kProbabilities) {
      return probability_coefficient(probability, weight_of(k), label_smoothing, classes);
    } else {
      return weight_of(k);
    }
  }
};

// The element type of probabilities; of logits where there are none, so that a pointer has a type.
template <class Target, class T>
struct ProbabilityType {
  using type = T;
};
template <class P, class T>
struct ProbabilityType<Probabilities<P>, T> {
  using type = P;
};

template <class T>
__device__ __forceinline__ const T* at_row(const void* data, const RowStrides& strides, RowPosition at) {
  return static_cast<const T*>(data) + at.offset(strides);
}

// A row's end: writes its statistics and its unreduced loss, and adds to what the thread has of the reduced one. A row
// whose index is no class has a NaN loss.
template <class T, class Target, class A>
__device__ __forceinline__ void finish_row(const Forward& call, int64_t r, RowSums<A, Target::kSpread> sums,
                                           Sums& total) {
  const Rows& rows = call.rows;
  const RowPosition at(rows, r);
  const Statistics<A> statistics(rows, call.statistics);
  if (sums.max == sums.minus_infinity()) sums.exponentials = A(__builtin_nan(""));  // nothing but -inf
  const A log_sum = math::log(sums.exponentials);
  A loss = 0;
  if constexpr (Target::kProbabilities) {
    loss = spread_loss(A(1), sums.coefficients, sums.gaps, log_sum);
    statistics.spread[r] = sums.coefficients;
  } else {
    const IndexedRow<A> row(rows, at);
    if (row.kind == RowKind::bad) {
      loss = A(__builtin_nan(""));
    } else if (row.kind == RowKind::kept) {
      const T* x = at_row<T>(rows.logits, rows.logits_strides, at);
      loss = hot_loss(row.hot, load_one<A>(x + row.index * rows.logits_strides.classes), sums.max, log_sum);
      if constexpr (Target::kSpread) loss += spread_loss(row.uniform, sums.coefficients, sums.gaps, log_sum);
      total.weight += row.weight;
    }
  }
  statistics.max[r] = sums.max;
  statistics.sum[r] = sums.exponentials;
  total.loss += loss;
  if (rows.reduction == Reduction::none) store_as(call.loss_dtype, call.loss, r, loss);
}

// The launch's end: the reduced loss and the totals, from the sums that thread 0 of one block has.
// Assumes: all threads of that block call it.
template <class Target, class A, int kThreads>
__device__ __forceinline__ void finish_launch(const Forward& call, const Sums& total) {
  const Rows& rows = call.rows;
  Sums classes{0, double(rows.classes)};  // the sum of the class weights, which only smoothed indices ask for later
  if (!Target::kProbabilities && Target::kSpread && rows.weight != nullptr) {
    classes = Sums::identity();
    for (int64_t k = threadIdx.x; k < rows.classes; k += kThreads) {
      classes.weight += static_cast<const A*>(rows.weight)[k];
    }
    classes = reduce_block<kThreads>(classes);
  }
  if (threadIdx.x != 0) return;
  const double divisor = Target::kProbabilities ? double(rows.outer) * double(rows.inner) : total.weight;
  static_cast<A*>(call.totals)[0] = A(divisor);
  static_cast<A*>(call.totals)[1] = A(classes.weight);
  if (rows.reduction == Reduction::none) return;
  store_as(call.loss_dtype, call.loss, 0, rows.reduction == Reduction::mean ? total.loss / divisor : total.loss);
}

// Which gradient a backward computes.
enum class Of { logits, target };

// What a row's gradient needs besides its logits.
template <class Target, class A, Of of>
struct RowGradient {
  A max;
  A scale;        // of the target's gradient: the upstream gradient
  A spread;       // of the target's gradient: log sum
  A hot;          // subtracted at the target class
  int64_t index;  // the target class, or -1
  bool ignored;

  __device__ __forceinline__ RowGradient() {}
  __device__ __forceinline__ RowGradient(const Backward& call, int64_t r)
      : spread(0), hot(0), index(-1), ignored(false) {
    const Rows& rows = call.rows;
    const RowPosition at(rows, r);
    const Statistics<A> statistics(rows, call.statistics);
    const A sum = statistics.sum[r];
    max = statistics.max[r];
    A g = row_grad_output<A>(call, at);
    if constexpr (of == Of::target) {
      scale = g;
      spread = math::log(sum);
    } else if constexpr (Target::kProbabilities) {
      scale = g * statistics.spread[r] / sum;
      spread = g;
    } else {
      const IndexedRow<A> row(rows, at);
      ignored = row.kind == RowKind::ignored;
      index = row.index;
      if (row.kind == RowKind::bad) g = A(__builtin_nan(""));
      hot = g * row.hot;
      scale = hot;
      if constexpr (Target::kSpread) {
        spread = g * row.uniform;
        scale += spread * sum_of_class_weights<A>(call);
      }
      scale /= sum;
    }
  }

  // Of class k.
  __device__ __forceinline__ A at(int64_t k, A x, A probability, const Coefficients<Target, A>& coefficients) const {
    if constexpr (of == Of::target) {
      return scale * target_gradient(x, coefficients.weight_of(k), max, spread, coefficients.label_smoothing);
    } else {
      A g = scaled_probability(x, max, scale);
      if constexpr (Target::kSpread) g -= spread * coefficients.at(k, probability);
      if constexpr (!Target::kProbabilities) {
        if (k == index) g -= hot;
        if (ignored) g = 0;
      }
      return g;
    }
  }
};

// Of a gradient: the logits' type, or the target's for the gradient of the target.
template <class Target, class T, Of of>
struct GradientType {
  using type = T;
};
template <class P, class T>
struct GradientType<Probabilities<P>, T, Of::target> {
  using type = P;
};

}  // namespace torchce::cuda::softmax_ce
