// The sums over a row's classes that its loss and its gradient need, from one read of the logits, and what is made of
// them: the row's loss and statistics, the launch's totals.
#pragma once

#include "exp.cuh"
#include "reduce.cuh"
#include "softmax_ce_classes.cuh"

namespace torchce::cuda::softmax_ce {

template <int n, class A, class X>
__device__ __forceinline__ A largest(A max, X x) {
#pragma unroll
  for (int i = 0; i < n; ++i) max = math::larger(max, x(i));
  return max;
}

// The sums of some of a row's classes relative to their own maximum, so that those of others can be added and the
// logits are read once (the online softmax of Milakov and Gimelshein, arXiv:1805.02867). While there is no maximum but
// -inf, sums are relative to 0, where exp(-inf) is 0 as it should be.
template <class A, bool kSpread>
struct ClassSums {
  A max;
  A exponentials;  // sum_k exp(x_k - max)
  A coefficients;  // sum_k u_k
  A gaps;          // sum_k u_k (x_k - max)

  __device__ __forceinline__ static A minus_infinity() { return -A(math::kInfinityF); }
  __device__ __forceinline__ static ClassSums identity() { return {minus_infinity(), 0, 0, 0}; }
  __device__ __forceinline__ static A base(A max) { return max == minus_infinity() ? A(0) : max; }
  // What gaps to `max` become gaps to base(larger) from: below a maximum of minus infinity they are infinite or none,
  // and no other maximum changes them.
  __device__ __forceinline__ static A gap_base(A max, A larger) { return max == minus_infinity() ? base(larger) : max; }

  // Makes the sums relative to another maximum that is not less. One of minus infinity makes the sum 0 times itself: it
  // has no terms but zeros, or a NaN that must stay.
  __device__ __forceinline__ void rebase(A larger) {
    exponentials *= exp_in_sum(max - base(larger));
    if constexpr (kSpread) gaps += coefficient(coefficients).gap(gap_base(max, larger), base(larger));
    max = larger;
  }

  // The sum of exponentials of a whole row; NaN for a row of nothing but -inf, which has no softmax.
  __device__ __forceinline__ A whole_exponentials() const {
    return max == minus_infinity() ? A(__builtin_nan("")) : exponentials;
  }

  // The sums of several threads are made relative to the largest maximum first, by one factor each: merging them pair
  // by pair would take a factor a step and gather the errors of all.

  // What `width` neighbouring lanes have together, with the same bits in each of them.
  __device__ __forceinline__ ClassSums of_lanes(int width) const {
    A larger = max;
    for (int step = width / 2; step > 0; step /= 2) {
      larger = math::larger(larger, __shfl_xor_sync(kAllLanes, larger, step));
    }
    ClassSums all = *this;
    all.rebase(larger);
    all.exponentials = sum_of_lanes(all.exponentials, width);
    if constexpr (kSpread) {
      all.coefficients = sum_of_lanes(all.coefficients, width);
      all.gaps = sum_of_lanes(all.gaps, width);
    }
    return all;
  }

  template <class At>
  __device__ __forceinline__ static ClassSums of_each(int count, At at) {
    A larger = minus_infinity();
    for (int i = 0; i < count; ++i) larger = math::larger(larger, at(i).max);
    CompensatedLogitSums<kSpread, A> total{};
    for (int i = 0; i < count; ++i) {
      ClassSums each = at(i);
      each.rebase(larger);
      total.add({each.exponentials, each.coefficients, each.gaps});
    }
    return {larger, total.exponentials.sum, total.coefficients.sum, total.gaps.sum};
  }
};

// The sums of the classes that a thread goes through, batch after batch. They stay relative to an earlier maximum until
// a logit is far above it: rescaled at each new one, a row that rises slowly would gather the errors of all those
// factors. Beyond e^4 the differences from the earlier maximum, and so the terms, would lose digits.
//
// kSettles: what is added waits for settle(), which takes four instructions, and is called after a few additions, whose
// roundings might all go in one direction. Else it is settled at once, which saves registers.
template <class A, bool kSpread, bool kSettles = false>
struct RunningSums {
  using Sums = ClassSums<A, kSpread>;
  static constexpr int kFar = 4;
  CompensatedLogitSums<kSpread, A> total{};
  LogitSums<kSpread, A> unsettled;
  A reference = Sums::minus_infinity();  // the maximum that both are relative to
  A max = Sums::minus_infinity();

  // Adds n classes: x(i) are the logits, u(i) the coefficients. Where a class is not there, x(i) is minus infinity.
  template <int n, class Logit, class X, class IsThere, class Coefficient>
  __device__ __forceinline__ void add(const Logit& logit, X x, IsThere is_there, Coefficient u) {
    if constexpr (Logit::kIsPlain) {
      max = largest<n>(max, x);
    } else {
      max = math::larger(max, logit.value(largest<n>(Sums::minus_infinity(), x)));
    }
    if (max > reference + A(kFar)) rebase();
    const A from = Sums::base(reference);
    const auto of_class = [&](int i) {
      const A value = Logit::kIsPlain || is_there(i) ? logit.value(x(i)) : Sums::minus_infinity();
      const A exponential = exp_in_sum(value - from);
      if constexpr (kSpread) {
        return LogitSums<kSpread, A>::of(exponential, u(i), value, from);
      } else {
        return LogitSums<kSpread, A>{exponential};
      }
    };
    constexpr int kPaired = kSpread && n > 4 ? 4 : n;  // more partial sums of three kinds would spill
    auto sums = math::sum_in_pairs<kPaired>(0, of_class);
#pragma unroll
    for (int i = kPaired; i < n; i += kPaired) sums = sums + math::sum_in_pairs<kPaired>(i, of_class);
    if constexpr (kSettles) {
      unsettled = unsettled + sums;
    } else {
      total.add(sums);
    }
  }

  __device__ __forceinline__ void settle() {
    if constexpr (!kSettles) return;
    total.add(unsettled);
    unsettled = {};
  }

  // Makes the sums relative to the largest logit so far, by one exact factor.
  __device__ __forceinline__ void rebase() {
    settle();
    total.rebase(Sums::gap_base(reference, max), Sums::base(max), math::exp_of_negative(reference - Sums::base(max)));
    reference = max;
  }

  // What was added, relative to the largest logit.
  __device__ __forceinline__ Sums sums() {
    rebase();
    return {max, total.exponentials.sum, total.coefficients.sum, total.gaps.sum};
  }
};

// Minus infinity as it lies in memory, which stands for a class that does not exist.
template <class T>
__device__ __forceinline__ T no_logit() {
  T x;
  store_one(&x, -math::kInfinity<Accumulate<T>>);
  return x;
}

// Sums over classes [begin, end) of one row, those of thread `thread` out of `threads` that share them. `keep` is given
// every pack of the thread, and its number among them.
//
// Bulk and remainder: for C = 32000 bfloat16 and 256 threads, 3 batches of 4 packs for every thread and one that has
// 3 packs for some threads and 4 for the others, in which a class that is not there counts as minus infinity.
template <class T, class Target, class Keep>
__device__ __forceinline__ ClassSums<Accumulate<T>, Target::kSpread> sum_classes(const Rows& rows, RowPosition at,
                                                                                 int64_t begin, int64_t end, int thread,
                                                                                 int threads, Keep keep) {
  using A = Accumulate<T>;
  using P = typename ProbabilityType<Target, T>::type;
  constexpr int V = kPack<T>, kBatch = kUnroll<Target, T>;
  const T* x = at_row<T>(rows.logits, rows.logits_strides, at);
  const P* t = at_row<P>(rows.target, rows.target_strides, at);
  const LogitOf<Target, T> logit(rows);
  const ClassCoefficients<Target, A> coefficients(rows);
  const PackedClasses<V> classes(x, begin, end);
  const bool target_aligned = Target::kProbabilities && is_aligned<V>(t + classes.body);

  RunningSums<A, Target::kSpread> of_row;
  const auto add_one = [&](int64_t k) {
    of_row.template add<1>(
        logit, [&](int) { return load_one<A>(x + k); }, [](int) { return true; },
        [&](int) { return coefficients.at(k, Target::kProbabilities ? load_one<A>(t + k) : A(0)); });
  };
  const auto add_batch_of = [&](auto whole, auto plain, int64_t first, int number) {
    constexpr bool kPlain = decltype(plain)::value;
    const auto is_there = [&](int i) { return decltype(whole)::value || first + int64_t(i) * threads < classes.packs; };
    const auto class_of = [&](int i) { return classes.body + (first + int64_t(i) * threads) * V; };
    Pack<T, V> logits[kBatch];
    Pack<P, V> target[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (is_there(i)) {
        if constexpr (Target::kProbabilities) target[i] = load_pack<V>(t + class_of(i), kPlain || target_aligned);
        logits[i] = load_pack<V>(x + class_of(i), true);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) logits[i].elements[v] = no_logit<T>();
      }
    }
    of_row.template add<kBatch * V>(
        logit, [&](int i) { return get<A>(logits[i / V], i % V); }, [&](int i) { return is_there(i / V); },
        [&](int i) {
          const A probability = Target::kProbabilities ? get<A>(target[i / V], i % V) : A(0);
          return coefficients.template at<kPlain, decltype(whole)::value>(class_of(i / V) + i % V, probability,
                                                                          is_there(i / V));
        });
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (is_there(i)) keep(logits[i], number + i);
    }
  };
  // What is rare is asked for once a batch: loads of weights, or of a misaligned target one by one, would take
  // instructions even where there are none.
  const auto add_batch = [&](auto whole, int64_t first, int number) {
    if (!Target::kSpread || (coefficients.weight == nullptr && (!Target::kProbabilities || target_aligned))) {
      add_batch_of(whole, std::true_type{}, first, number);
    } else {
      add_batch_of(whole, std::false_type{}, first, number);
    }
  };

  classes.for_each_before(thread, threads, add_one);
  int64_t first = 0;
  int number = 0;
  for (; first + int64_t(kBatch) * threads <= classes.packs; first += int64_t(kBatch) * threads, number += kBatch) {
    add_batch(std::true_type{}, first + thread, number);
  }
  if (first + thread < classes.packs) add_batch(std::false_type{}, first + thread, number);
  classes.for_each_after(thread, threads, add_one);
  return of_row.sums();
}

template <class T, class Target>
__device__ __forceinline__ ClassSums<Accumulate<T>, Target::kSpread> sum_classes(const Rows& rows, RowPosition at,
                                                                                 int64_t begin, int64_t end, int thread,
                                                                                 int threads) {
  return sum_classes<T, Target>(rows, at, begin, end, thread, threads, [](const Pack<T, kPack<T>>&, int) {});
}

// Sums over classes share, share + shares, ... of V rows that are adjacent in memory, from row r on.
//
// Bulk and remainder: for 19 classes and one thread, 4 batches of 4 classes and one of 3, in which the fourth counts as
// minus infinity.
template <int V, class T, class Target, class A>
__device__ __forceinline__ void sum_across(const Rows& rows, int64_t r, int share, int shares,
                                           ClassSums<A, Target::kSpread> (&sums)[V]) {
  using P = typename ProbabilityType<Target, T>::type;
  constexpr int kBatch = kUnroll<Target, T>;
  constexpr int kUnsettled = 8;                // batches
  constexpr bool kSettles = !Target::kSpread;  // coefficients leave no registers for it
  const RowPosition at(rows, r);
  const T* x = at_row<T>(rows.logits, rows.logits_strides, at);
  const P* t = at_row<P>(rows.target, rows.target_strides, at);
  const LogitOf<Target, T> logit(rows);
  const ClassCoefficients<Target, A> coefficients(rows);
  RunningSums<A, Target::kSpread, kSettles> of_rows[V];

  const auto add_batch = [&](auto whole, int64_t k) {
    const auto class_of = [&](int i) { return k + int64_t(i) * shares; };
    const auto is_there = [&](int i) { return decltype(whole)::value || class_of(i) < rows.classes; };
    Pack<T, V> logits[kBatch];
    Pack<P, V> target[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (is_there(i)) {
        logits[i] = load_pack<V>(x + class_of(i) * rows.logits_strides.classes, true);
        if constexpr (Target::kProbabilities) {
          target[i] = load_pack<V>(t + class_of(i) * rows.target_strides.classes, true);
        }
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) logits[i].elements[v] = no_logit<T>();
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      of_rows[v].template add<kBatch>(
          logit, [&](int i) { return get<A>(logits[i], v); }, is_there,
          [&](int i) {
            const A probability = Target::kProbabilities ? get<A>(target[i], v) : A(0);
            return coefficients.template at<false, decltype(whole)::value>(class_of(i), probability, is_there(i));
          });
    }
  };
  int64_t k = share;
  for (int batch = 1; k + int64_t(kBatch - 1) * shares < rows.classes; k += int64_t(kBatch) * shares, ++batch) {
    add_batch(std::true_type{}, k);
    if (batch % kUnsettled != 0) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) of_rows[v].settle();
  }
  if (k < rows.classes) add_batch(std::false_type{}, k);
#pragma unroll
  for (int v = 0; v < V; ++v) sums[v] = of_rows[v].sums();
}

// A row's end: writes its statistics and its unreduced loss, and adds to what the thread has of the reduced one. A row
// whose index is no class has a NaN loss.
template <class T, class Target, class A>
__device__ __forceinline__ void finish_row(const Forward& call, int64_t r, const ClassSums<A, Target::kSpread>& sums,
                                           int64_t target, T hot_logit, LossSums& total) {
  const Rows& rows = call.rows;
  const Statistics<A> statistics(rows, call.statistics);
  const A sum = sums.whole_exponentials();
  LossTerms<A> terms{sums.max, math::log(sum), sums.coefficients, sums.gaps};
  A loss_of_lse = 0;
  if constexpr (kIsGeneral<Target>) {
    if (sums.exponentials != sums.exponentials) terms.max = sums.exponentials;  // there was a NaN or +inf
    if (rows.options.z_loss != 0) loss_of_lse = z_loss(A(rows.options.z_loss), terms.lse());
    if (call.lse != nullptr) static_cast<A*>(call.lse)[r] = terms.lse();
  }
  A loss = 0;
  if constexpr (Target::kProbabilities) {
    loss = probability_loss(terms, A(rows.classes));
    if constexpr (kIsGeneral<Target>) loss += loss_of_lse;
    statistics.coefficients[r] = sums.coefficients;
  } else {
    const auto smoothing = smoothing_of<A>(rows);
    const IndexedRow<A> row(rows, target, smoothing);
    if (!row.ignored) {
      loss = index_loss<Target::kSpread>(row.hot, LogitOf<Target, T>(rows).value(load_one<A>(&hot_logit)), terms,
                                         A(rows.classes));
      if constexpr (kIsGeneral<Target>) loss += loss_of_lse;
      total.weight += row.weight;
    }
  }
  statistics.max[r] = terms.max;
  statistics.sum[r] = sum;
  total.loss += loss;
  if (rows.options.reduction == Reduction::none) store_as(call.loss_dtype, call.loss, r, loss);
}

// The launch's end: the reduced loss and the totals, from the sums that thread 0 of one block has.
// Assumes: all threads of that block call it.
template <class Target, class A>
__device__ __forceinline__ void finish_launch(const Forward& call, const LossSums& total) {
  const Rows& rows = call.rows;
  double sum_of_coefficients = 0;  // U of a row with a class index
  if constexpr (!Target::kProbabilities && Target::kSpread) {
    sum_of_coefficients = rows.options.label_smoothing;
    if (rows.weight != nullptr) {
      LossSums classes = LossSums::identity();
      for (int64_t k = threadIdx.x; k < rows.classes; k += kThreads) {
        classes.weight += static_cast<const A*>(rows.weight)[k];
      }
      sum_of_coefficients *= reduce_block(classes).weight / double(rows.classes);
    }
  }
  if (threadIdx.x != 0) return;
  const double divisor = Target::kProbabilities ? double(rows.outer) * double(rows.inner) : total.weight;
  static_cast<A*>(call.totals)[0] = A(divisor);
  static_cast<A*>(call.totals)[1] = A(sum_of_coefficients);
  if (rows.options.reduction == Reduction::none) return;
  store_as(call.loss_dtype, call.loss, 0,
           rows.options.reduction == Reduction::mean ? total.loss / divisor : total.loss);
}

}  // namespace torchce::cuda::softmax_ce
