// What the softmax_ce kernels do with a row's numbers: sums in one pass over the logits, the loss, the gradient.
#pragma once

#include "../softmax_ce_row.h"
#include "pack.cuh"
#include "reduce.cuh"

namespace torchce::cuda::softmax_ce {

using namespace torchce::softmax_ce;

// Packs of logits a thread has in flight. Half as many where something else needs the registers: the exponentials of
// float64, and the coefficients of every class.
template <class Target, class A>
constexpr int kUnroll = 4 / (sizeof(A) == sizeof(double) ? 2 : 1) / (Target::kSpread ? 2 : 1);

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

  // Of a whole row. One with nothing but -inf has no softmax.
  __device__ __forceinline__ A whole_exponentials() const {
    return max == minus_infinity() ? A(__builtin_nan("")) : exponentials;
  }

  __device__ __forceinline__ RowSums shuffled(int step) const {
    return exchanged([step](A value) { return __shfl_xor_sync(kAllLanes, value, step); });
  }

  // Those of the first of `width` neighbouring lanes.
  __device__ __forceinline__ RowSums of_first_lane(int width) const {
    return exchanged([width](A value) { return __shfl_sync(kAllLanes, value, 0, width); });
  }

 private:
  template <class Exchange>
  __device__ __forceinline__ RowSums exchanged(Exchange exchange) const {
    RowSums other;
    other.max = exchange(max);
    other.exponentials = exchange(exponentials);
    other.coefficients = kSpread ? exchange(coefficients) : A(0);
    other.gaps = kSpread ? exchange(gaps) : A(0);
    return other;
  }
};

// Classes [begin, end) of a row, in packs of V that start where the logits are aligned, and singly before and after.
//
// Bulk and remainder: for C = 1001 bfloat16 and a row that starts 2 bytes after such a place, 7 single classes,
// 124 packs of 8, 2 single classes.
template <int V>
struct PackedClasses {
  int64_t begin, end;
  int64_t body;  // the first class in a pack
  int64_t packs;

  template <class T>
  __device__ __forceinline__ PackedClasses(const T* x, int64_t begin, int64_t end) : begin(begin), end(end) {
    const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(x + begin) % (V * sizeof(T)) / sizeof(T));
    body = begin + (misaligned == 0 ? 0 : V - misaligned);
    if (body > end) body = end;
    packs = (end - body) / V;
  }

  // Calls f(class) for the single classes of thread `thread` out of `threads`, of those before the packs or after them.
  template <class F>
  __device__ __forceinline__ void for_each_before(int thread, int threads, F f) const {
    for (int64_t k = begin + thread; k < body; k += threads) f(k);
  }
  template <class F>
  __device__ __forceinline__ void for_each_after(int thread, int threads, F f) const {
    for (int64_t k = body + packs * V + thread; k < end; k += threads) f(k);
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

// The logit at class `index` of a row.
template <class T>
__device__ __forceinline__ Accumulate<T> logit_at(const Rows& rows, RowPosition at, int64_t index) {
  return load_one<Accumulate<T>>(at_row<T>(rows.logits, rows.logits_strides, at) + index * rows.logits_strides.classes);
}

// A row's end: writes its statistics and its unreduced loss, and adds to what the thread has of the reduced one. A row
// whose index is no class has a NaN loss. `hot_logit(at, index)` is the logit at the row's target.
template <class Target, class A, class HotLogit>
__device__ __forceinline__ void finish_row(const Forward& call, int64_t r, RowSums<A, Target::kSpread> sums,
                                           Sums& total, HotLogit hot_logit) {
  const Rows& rows = call.rows;
  const RowPosition at(rows, r);
  const Statistics<A> statistics(rows, call.statistics);
  const A sum = sums.whole_exponentials(), log_sum = math::log(sum);
  A loss = 0;
  if constexpr (Target::kProbabilities) {
    loss = spread_loss(A(1), sums.coefficients, sums.gaps, log_sum);
    statistics.spread[r] = sums.coefficients;
  } else {
    const IndexedRow<A> row(rows, at);
    if (row.kind == RowKind::bad) {
      loss = A(__builtin_nan(""));
    } else if (row.kind == RowKind::kept) {
      loss = hot_loss(row.hot, hot_logit(at, row.index), sums.max, log_sum);
      if constexpr (Target::kSpread) loss += spread_loss(row.uniform, sums.coefficients, sums.gaps, log_sum);
      total.weight += row.weight;
    }
  }
  statistics.max[r] = sums.max;
  statistics.sum[r] = sum;
  total.loss += loss;
  if (rows.reduction == Reduction::none) store_as(call.loss_dtype, call.loss, r, loss);
}

template <class T, class Target, class A>
__device__ __forceinline__ void finish_row(const Forward& call, int64_t r, RowSums<A, Target::kSpread> sums,
                                           Sums& total) {
  finish_row<Target>(call, r, sums, total,
                     [&](RowPosition at, int64_t index) { return logit_at<T>(call.rows, at, index); });
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

  // `coefficients` is sum_k u_k, where the target has any.
  __device__ __forceinline__ RowGradient(const Backward& call, int64_t r, A max, A sum, A coefficients)
      : max(max), spread(0), hot(0), index(-1), ignored(false) {
    const Rows& rows = call.rows;
    const RowPosition at(rows, r);
    A g = row_grad_output<A>(call, at);
    if constexpr (of == Of::target) {
      scale = g;
      spread = math::log(sum);
    } else if constexpr (Target::kProbabilities) {
      scale = g * coefficients / sum;
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
        scale += spread * coefficients;
      }
      scale /= sum;
    }
  }

  // From what the forward left.
  __device__ __forceinline__ static RowGradient of_row(const Backward& call, int64_t r) {
    const Statistics<A> statistics(call.rows, call.statistics);
    A coefficients = 0;
    if constexpr (Target::kProbabilities && of == Of::logits) {
      coefficients = statistics.spread[r];
    } else if constexpr (Target::kSpread && of == Of::logits) {
      coefficients = sum_of_class_weights<A>(call);
    }
    return RowGradient(call, r, statistics.max[r], statistics.sum[r], coefficients);
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
