// Softmax cross entropy with lanes along each row. Rows have at least one full vector of adjacent classes.
//
// Bulk and remainder: vectors start at 0, L, 2L, ... and the last one at C - L, so it overlaps its neighbour unless L
// divides C (C = 1001, L = 16: it covers 985..1000, of which 985..991 were done before). Sums mask what was done
// before. A gradient that overwrites its logits would transform the overlap twice, so the last vector is read before
// any is written.
#pragma once

#include "../softmax_ce_row.h"
#include "vector.h"

namespace torchce::cpu::TORCHCE_LEVEL::along {

using namespace softmax_ce;

// u_k of kLanes classes from k on.
template <class Target, class A>
struct Coefficients {
  const A* weight;
  const void* target;
  A label_smoothing, classes;

  Coefficients(const Rows& rows, RowPosition at)
      : weight(static_cast<const A*>(rows.weight)),
        target(nullptr),
        label_smoothing(A(rows.label_smoothing)),
        classes(A(rows.classes)) {
    if constexpr (Target::kProbabilities) {
      target = static_cast<const typename Target::Storage*>(rows.target) + at.offset(rows.target_strides);
    }
  }

  TORCHCE_SIMD Lanes<A> at(int64_t k) const {
    const Lanes<A> w = weight == nullptr ? broadcast<A>(1) : load<A>(weight + k);
    if constexpr (Target::kProbabilities) {
      const auto* probabilities = static_cast<const typename Target::Storage*>(target);
      return probability_coefficient(load<A>(probabilities + k), w, label_smoothing, classes);
    } else {
      return w;
    }
  }
};

template <class V>
TORCHCE_SIMD V larger(V a, V b) {
  return math::select(b > a, b, a);
}

template <class A, class T>
TORCHCE_SIMD A row_max(const T* x, int64_t classes) {
  using V = Lanes<A>;
  constexpr int L = kLanes<A>;
  constexpr int kChains = 4;  // a compare waits for the one before it: four chains keep the loads busy
  const V last = load<A>(x + classes - L);
  V max[kChains] = {last, last, last, last};
  int64_t k = 0;
  for (; k + kChains * L <= classes; k += kChains * L) {
    for (int i = 0; i < kChains; ++i) max[i] = larger(max[i], load<A>(x + k + i * L));
  }
  for (; k + L <= classes; k += L) max[0] = larger(max[0], load<A>(x + k));
  return max_of<A>(larger(larger(max[0], max[1]), larger(max[2], max[3])));
}

template <class A>
struct RowSums {
  A exponentials = 0;
  A coefficients = 0;  // sum_k u_k
  A gaps = 0;          // sum_k u_k (x_k - max)
};

template <class Target, class A, class T>
TORCHCE_SIMD RowSums<A> row_sums(const T* x, int64_t classes, A max, const Coefficients<Target, A>& coefficients) {
  using V = Lanes<A>;
  constexpr int L = kLanes<A>;
  // Vectors added in one go before the running total: float32 sums of 10^5 terms would lose digits one by one.
  constexpr int64_t kBlock = 128 * L;
  const V max_lanes = broadcast(max);
  V total{}, total_coefficients{}, total_gaps{};

  const auto add = [&](int64_t k, auto mask, V& sum, V& sum_coefficients, V& gaps) {
    const V logits = load<A>(x + k);
    sum += mask(math::exp_of_negative(logits - max_lanes));
    if constexpr (Target::kSpread) {
      const V u = mask(coefficients.at(k));
      sum_coefficients += u;
      gaps += weighted_gap(u, logits, max_lanes);
    }
  };
  const auto all = [](auto v) { return v; };

  int64_t k = 0;
  while (k + L <= classes) {
    const int64_t stop = classes - L < k + kBlock - L ? classes - L : k + kBlock - L;
    V sum{}, sum_coefficients{}, gaps{};
    for (; k <= stop; k += L) add(k, all, sum, sum_coefficients, gaps);
    total += sum;
    total_coefficients += sum_coefficients;
    total_gaps += gaps;
  }
  if (k < classes) {
    const A done_before = A(k - (classes - L));
    const auto fresh = [&](V v) { return math::select(lane_numbers<A>() >= done_before, v, V{}); };
    add(classes - L, fresh, total, total_coefficients, total_gaps);
  }
  RowSums<A> sums;
  sums.exponentials = sum_of<A>(total);
  if constexpr (Target::kSpread) {
    sums.coefficients = sum_of<A>(total_coefficients);
    sums.gaps = sum_of<A>(total_gaps);
  }
  return sums;
}

template <class T, class Target>
void forward(const Forward& call, int64_t row_begin, int64_t row_end, Partial* partial) {
  using A = Accumulate<T>;
  const Rows& rows = call.rows;
  const Statistics<A> statistics(rows, call.statistics);
  for (int64_t r = row_begin; r < row_end; ++r) {
    const RowPosition at(rows, r);
    const T* x = static_cast<const T*>(rows.logits) + at.offset(rows.logits_strides);
    A loss = 0, max = 0;
    RowSums<A> sums{1};
    const auto reduce_row = [&] {
      max = row_max<A>(x, rows.classes);
      sums = row_sums<Target, A>(x, rows.classes, max, Coefficients<Target, A>(rows, at));
    };
    if constexpr (Target::kProbabilities) {
      reduce_row();
      loss = spread_loss(A(1), sums.coefficients, sums.gaps, math::log(sums.exponentials));
      statistics.spread[r] = sums.coefficients;
    } else {
      const IndexedRow<A> row(rows, at);
      if (row.kind == RowKind::bad && partial->bad_row < 0) partial->bad_row = r;
      if (row.kind == RowKind::kept) {
        reduce_row();
        const A log_sum = math::log(sums.exponentials);
        loss = hot_loss(row.hot, load_one<A>(x + row.index), max, log_sum);
        if constexpr (Target::kSpread) loss += spread_loss(row.uniform, sums.coefficients, sums.gaps, log_sum);
        partial->weight += row.weight;
      }
    }
    statistics.max[r] = max;
    statistics.sum[r] = sums.exponentials;
    partial->loss += loss;
    if (rows.reduction == Reduction::none) store_as(call.loss_dtype, call.loss, r, loss);
  }
}

// grad_k = exp(x_k - max) scale - spread u_k, for every class.
template <class Target, class A, class T>
TORCHCE_SIMD void row_gradient(const T* x, T* grad, int64_t classes, A max, A scale, A spread,
                               const Coefficients<Target, A>& coefficients) {
  using V = Lanes<A>;
  constexpr int L = kLanes<A>;
  const V max_lanes = broadcast(max), scale_lanes = broadcast(scale);
  const auto gradient = [&](int64_t k) {
    V g = scaled_probability(load<A>(x + k), max_lanes, scale_lanes);
    if constexpr (Target::kSpread) g -= spread * coefficients.at(k);
    return g;
  };
  const bool remainder = classes % L != 0;
  const V last = remainder ? gradient(classes - L) : V{};
  for (int64_t k = 0; k + L <= classes; k += L) store(grad + k, gradient(k));
  if (remainder) store(grad + classes - L, last);
}

template <class T, class Target>
void backward(const Backward& call, int64_t row_begin, int64_t row_end) {
  using A = Accumulate<T>;
  const Rows& rows = call.rows;
  const Statistics<A> statistics(rows, call.statistics);
  for (int64_t r = row_begin; r < row_end; ++r) {
    const RowPosition at(rows, r);
    const T* x = static_cast<const T*>(rows.logits) + at.offset(rows.logits_strides);
    T* grad = static_cast<T*>(call.grad) + at.offset(call.grad_strides);
    const Coefficients<Target, A> coefficients(rows, at);
    const A max = statistics.max[r], sum = statistics.sum[r];
    if constexpr (Target::kProbabilities) {
      const A g = row_grad_output<A>(call, at);
      row_gradient<Target>(x, grad, rows.classes, max, g * statistics.spread[r] / sum, g, coefficients);
    } else {
      const IndexedRow<A> row(rows, at);
      if (row.kind == RowKind::ignored) {
        std::memset(static_cast<void*>(grad), 0, sizeof(T) * rows.classes);
        continue;
      }
      const A g = row.kind == RowKind::bad ? A(__builtin_nan("")) : row_grad_output<A>(call, at);
      const A spread = g * row.uniform;
      const A scale = (g * row.hot + spread * sum_of_class_weights<A>(call)) / sum;
      const A hot_logit = load_one<A>(x + row.index);  // before it may be overwritten
      row_gradient<Target>(x, grad, rows.classes, max, scale, spread, coefficients);
      store_one(grad + row.index, scaled_probability(hot_logit, max, scale) - spread * row.weight - g * row.hot);
    }
  }
}

}  // namespace torchce::cpu::TORCHCE_LEVEL::along
