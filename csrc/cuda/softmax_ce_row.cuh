// What the softmax_ce kernels do with a row's numbers: sums in one pass over the logits, the loss, the gradient.
#pragma once

#include "../softmax_ce_row.h"
#include "exp.cuh"
#include "pack.cuh"
#include "reduce.cuh"

namespace torchce::cuda::softmax_ce {

using namespace torchce::softmax_ce;

// Blocks of a kernel that must fit on a multiprocessor at once. Three only where nothing else needs the registers: the
// exponentials of float64, and the coefficients of every class.
template <class Target, class T>
constexpr int kBlocks = sizeof(T) == sizeof(double) || Target::kSpread ? kBlocksToFit : kBlocksOfPlain;

// Packs of logits a thread has in flight. Half as many where something else needs the registers: the exponentials of
// float64, and the coefficients of every class.
template <class Target, class A>
constexpr int kUnroll = 4 / (sizeof(A) == sizeof(double) ? 2 : 1) / (Target::kSpread ? 2 : 1);

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
  // has no terms but zeros, or a NaN that must stay.
  __device__ __forceinline__ void rebase(A larger) { rebase(larger, exp_in_sum(max - base(larger))); }
  __device__ __forceinline__ void rebase(A larger, A factor) {
    exponentials *= factor;
    if constexpr (kSpread) gaps += weighted_gap(coefficients, base(max), base(larger));
    max = larger;
  }

  // Adds n classes: x(i) are the logits, u(i) the coefficients.
  template <int n, class Logit, class Coefficient>
  __device__ __forceinline__ void add(Logit x, Coefficient u) {
    rebase(largest<n>(max, x));  // without asking whether it is larger: that takes as long, and rows are not in step
    add_terms<n>(x, u);
  }

  // The same for classes that are none of them far above max, which stays as it is.
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

// The sums of a row that a thread goes through in many small batches. They stay relative to an earlier maximum until a
// logit is far above it: rescaled at each new one, a row that rises slowly would gather the errors of a thousand
// factors. Beyond e^4 the differences from the earlier maximum, and so the terms, would lose digits.
template <class A, bool kSpread>
struct LongRowSums {
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
#pragma unroll 1
    for (int64_t k = begin + thread; k < body; k += threads) f(k);
  }
  template <class F>
  __device__ __forceinline__ void for_each_after(int thread, int threads, F f) const {
#pragma unroll 1
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

// The targets of n neighbouring rows as their bits, so that nothing waits for a load before target_of makes a number of
// it. The dtype is asked once for all: loads on both sides of a branch would wait for each other.
template <class Target, int n>
__device__ __forceinline__ void load_target_bits(const Rows& rows, RowPosition at, uint64_t (&bits)[n]) {
  const int64_t first = at.offset(rows.target_strides), step = rows.target_strides.inner;
  const auto load = [&](auto storage) {
#pragma unroll
    for (int v = 0; v < n; ++v) bits[v] = static_cast<const decltype(storage)*>(rows.target)[first + v * step];
  };
  if constexpr (Target::kProbabilities) {
#pragma unroll
    for (int v = 0; v < n; ++v) bits[v] = 0;
  } else if (rows.target_dtype == DType::int64) {
    load(uint64_t{});
  } else if (rows.target_dtype == DType::int32) {
    load(uint32_t{});
  } else {
    load(uint8_t{});
  }
}
template <class Target>
__device__ __forceinline__ uint64_t load_target_bits(const Rows& rows, RowPosition at) {
  uint64_t bits[1];
  load_target_bits<Target>(rows, at, bits);
  return bits[0];
}
__device__ __forceinline__ int64_t target_of(const Rows& rows, uint64_t bits) {
  return rows.target_dtype == DType::int32 ? int64_t(int32_t(uint32_t(bits))) : int64_t(bits);
}

// Rows that need no pass over their classes.
template <class Target>
__device__ __forceinline__ bool is_ignored(const Rows& rows, int64_t target) {
  return !Target::kProbabilities && target == rows.ignore_index;
}

// The target of the row whose turn it is, of the rows that a thread goes through. It is asked for while the row before
// is worked on: whether a row is ignored must be known before its logits are asked for, which would wait for it
// otherwise.
template <class Target>
class TargetAhead {
  const Rows& rows_;
  const int64_t count_;
  uint64_t bits_;

 public:
  __device__ __forceinline__ TargetAhead(const Rows& rows, int64_t first)
      : rows_(rows), count_(rows.outer * rows.inner) {
    ask_for(first);
  }
  __device__ __forceinline__ void ask_for(int64_t r) {
    bits_ = r < count_ ? load_target_bits<Target>(rows_, RowPosition(rows_, r)) : 0;
  }
  __device__ __forceinline__ int64_t get() const { return target_of(rows_, bits_); }
};

// The logit at a row's target, asked for before the row's sums and looked at after them, and before a gradient is
// written there. Class 0's where the target is no class.
template <class T, class Target>
__device__ __forceinline__ T load_hot_logit(const Rows& rows, RowPosition at, int64_t target) {
  if constexpr (Target::kProbabilities) return T{};
  const int64_t index = TargetClass(rows, target).index;
  return at_row<T>(rows.logits, rows.logits_strides, at)[index * rows.logits_strides.classes];
}

// A row's end: writes its statistics and its unreduced loss, and adds to what the thread has of the reduced one. A row
// whose index is no class has a NaN loss.
template <class T, class Target, class A>
__device__ __forceinline__ void finish_row(const Forward& call, int64_t r, const RowSums<A, Target::kSpread>& sums,
                                           int64_t target, T hot_logit, Sums& total) {
  const Rows& rows = call.rows;
  const Statistics<A> statistics(rows, call.statistics);
  const A sum = sums.whole_exponentials(), log_sum = math::log(sum);
  A loss = 0;
  if constexpr (Target::kProbabilities) {
    loss = spread_loss(A(1), sums.coefficients, sums.gaps, log_sum);
    statistics.spread[r] = sums.coefficients;
  } else {
    const IndexedRow<A> row(rows, target);
    if (row.kind == RowKind::bad) {
      loss = A(__builtin_nan(""));
    } else if (row.kind == RowKind::kept) {
      loss = hot_loss(row.hot, load_one<A>(&hot_logit), sums.max, log_sum);
      if constexpr (Target::kSpread) loss += spread_loss(row.uniform, sums.coefficients, sums.gaps, log_sum);
      total.weight += row.weight;
    }
  }
  statistics.max[r] = sums.max;
  statistics.sum[r] = sum;
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

// Of a gradient: the logits' type, or the target's for the gradient of the target.
template <class Target, class T, Of of>
struct GradientType {
  using type = T;
};
template <class P, class T>
struct GradientType<Probabilities<P>, T, Of::target> {
  using type = P;
};

// What the upstream gradient, the forward's statistics and the target say of a row: all that is read of it beside its
// logits.
template <class A>
struct RowInputs {
  A grad_output;
  uint64_t target_bits;
  A max, sum, coefficients;  // the last one is sum_k u_k, where the target has any
};

// Those of n neighbouring rows from row r on, in loads of which none waits for another.
template <class Target, Of of, int n, class A>
__device__ __forceinline__ void load_row_inputs(const Backward& call, int64_t r, RowPosition at,
                                                RowInputs<A> (&inputs)[n]) {
  const Rows& rows = call.rows;
  const Statistics<A> statistics(rows, call.statistics);
  uint64_t bits[n];
  load_target_bits<Target>(rows, at, bits);
  A grad_outputs[n];
  row_grad_outputs(call, at, grad_outputs);
  A coefficients_of_all = 0;
  if constexpr (!Target::kProbabilities && Target::kSpread) coefficients_of_all = sum_of_class_weights<A>(call);
#pragma unroll
  for (int v = 0; v < n; ++v) {
    inputs[v] = {grad_outputs[v], bits[v], statistics.max[r + v], statistics.sum[r + v], coefficients_of_all};
    if constexpr (Target::kProbabilities && of == Of::logits) inputs[v].coefficients = statistics.spread[r + v];
  }
}

// A row's gradient, given its logits. T: their type.
template <class T, class Target, Of of>
struct RowGradient {
  using A = Accumulate<T>;
  static constexpr bool kShort = kSixteenBits<typename GradientType<Target, T, of>::type>;
  ScaledExp<A, kShort> probability;
  A max;
  A scale;        // of the target's gradient: the upstream gradient
  A spread;       // of the target's gradient: log sum
  A hot;          // subtracted at the target class
  int64_t index;  // the target class, or -1
  bool ignored;

  __device__ __forceinline__ RowGradient() {}
  __device__ __forceinline__ RowGradient(const Rows& rows, const RowInputs<A>& in)
      : max(in.max), scale(0), spread(0), hot(0), index(-1), ignored(false) {
    const A g = in.grad_output;
    if constexpr (of == Of::target) {
      scale = g;
      spread = math::log(in.sum);
    } else if constexpr (Target::kProbabilities) {
      probability = ScaledExp<A, kShort>(g * in.coefficients / in.sum);
      spread = g;
    } else {
      const IndexedRow<A> row(rows, target_of(rows, in.target_bits));
      ignored = row.kind == RowKind::ignored;
      index = row.index;
      const A kept = row.kind == RowKind::bad ? A(__builtin_nan("")) : g;
      hot = kept * row.hot;
      A sum_of_coefficients = hot;
      if constexpr (Target::kSpread) {
        spread = kept * row.uniform;
        sum_of_coefficients += spread * in.coefficients;
      }
      probability = ScaledExp<A, kShort>(sum_of_coefficients / in.sum);
    }
  }

  // Of class k, all but the part that only the target class has.
  __device__ __forceinline__ A at(int64_t k, A x, A target, const Coefficients<Target, A>& coefficients) const {
    if constexpr (of == Of::target) {
      return scale * target_gradient(x, coefficients.weight_of(k), max, spread, coefficients.label_smoothing);
    } else {
      A g = probability(x - max);
      if constexpr (Target::kSpread) g -= spread * coefficients.at(k, target);
      return g;
    }
  }

  // The target class's own part, where it is one of the V classes from k on: asked once for all of them.
  template <int V>
  __device__ __forceinline__ void subtract_hot(A (&gradient)[V], int64_t k) const {
    if constexpr (!Target::kProbabilities) {
      const uint64_t place = uint64_t(index - k);
      if (place >= uint64_t(V)) return;
#pragma unroll
      for (int v = 0; v < V; ++v) gradient[v] -= v == int(place) ? hot : A(0);
    }
  }
};

}  // namespace torchce::cuda::softmax_ce
