// Softmax cross entropy with lanes along each row. Rows have at least one full pack (vector.h) of adjacent classes.
//
// Bulk and remainder: packs start at 0, P, 2P, ... and the last one at C - P, so it overlaps its neighbour unless P
// divides C (C = 1001, P = 32: it covers 969..1000, of which 969..991 were done before). Sums mask what was done
// before. A gradient that overwrites its logits would transform the overlap twice, so the last pack is read before any
// is written.
//
// A row is read once: its exponentials are summed against the largest logit so far, and a sum shrinks when a larger one
// turns up (Milakov and Gimelshein 2018, arXiv:1805.02867), which is looked at once a block.
#pragma once

#include "../softmax_ce_row.h"
#include "vector.h"

namespace torchce::cpu::TORCHCE_LEVEL::along {

using namespace softmax_ce;

// u_k of the classes of a pack from k on.
template <class T, class Target>
struct Coefficients {
  using A = Accumulate<T>;
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

  TORCHCE_SIMD Pack<T> at(int64_t k) const {
    Pack<T> u = {broadcast<A>(1), broadcast<A>(1)};
    if (weight != nullptr) u = Pack<T>::load(weight + k);
    if constexpr (Target::kProbabilities) {
      const auto t = Pack<T>::load(static_cast<const typename Target::Storage*>(target) + k);
      if (weight == nullptr && label_smoothing == 0) return t;
      for (int i = 0; i < u.kVectors; ++i) u.v[i] = probability_coefficient(t.v[i], u.v[i], label_smoothing, classes);
    }
    return u;
  }
};

// What one row of logits adds up to.
template <class T, class Target>
struct RowSums {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  static constexpr int kPacks = 8;  // of a block, whose largest logit is looked at together

  A max = kLowest<A>;
  A exponentials = 0;
  A coefficients = 0;  // sum_k u_k
  A gaps = 0;          // sum_k u_k (x_k - max)

  TORCHCE_SIMD RowSums(const T* x, int64_t classes, const Coefficients<T, Target>& u) {
    constexpr int64_t P = Pack<T>::kSize;
    int64_t k = 0;
    for (; k + kPacks * P <= classes; k += kPacks * P) {
      add<kPacks>(kPacks, [&](int i) { return Pack<T>::load(x + k + i * P); }, [&](int i) { return u.at(k + i * P); });
    }
    const int left = int((classes - k) / P);
    add<0>(left, [&](int i) { return Pack<T>::load(x + k + i * P); }, [&](int i) { return u.at(k + i * P); });
    k += left * P;
    if (k < classes) {
      const int64_t last = classes - P;
      add<1>(
          1, [&](int) { return Pack<T>::load(x + last).from(k - last, -math::kInfinity<A>); },
          [&](int) { return u.at(last).from(k - last, 0); });
    }
    finish();
  }

 private:
  math::ExpInSum<V> exp;
  CompensatedSum<V> exponential_lanes, coefficient_lanes, gap_lanes;

  // A block of packs: as many as the template says, or `count`.
  template <int kCount, class Logits, class Us>
  TORCHCE_SIMD void add(int count, Logits logits, Us coefficients_at) {
    if constexpr (kCount > 0) count = kCount;
    V block_max = broadcast(max);
    for (int i = 0; i < count; ++i) {
      const Pack<T> x = logits(i);
      block_max = larger(block_max, larger(x.v[0], x.v[1]));
    }
    const A new_max = max_of<A>(block_max);
    if (new_max > max) raise(new_max);

    const V max_lanes = broadcast(max);
    V sum{}, sum_coefficients{}, sum_gaps{};
    for (int i = 0; i < count; ++i) {
      const Pack<T> x = logits(i);
      for (const V& v : x.v) sum += exp(v - max_lanes);
      if constexpr (Target::kSpread) {
        const Pack<T> u = coefficients_at(i);
        for (int j = 0; j < u.kVectors; ++j) {
          sum_coefficients += u.v[j];
          sum_gaps += weighted_gap(u.v[j], x.v[j], max_lanes);
        }
      }
    }
    exponential_lanes.add(sum);
    if constexpr (Target::kSpread) {
      coefficient_lanes.add(sum_coefficients);
      gap_lanes.add(sum_gaps);
    }
  }

  TORCHCE_SIMD void raise(A new_max) {
    exponential_lanes.scale(math::exp_of_negative(max - new_max));
    if constexpr (Target::kSpread)
      gap_lanes.add(weighted_gap(coefficient_lanes.sum, broadcast(max), broadcast(new_max)));
    max = new_max;
  }

  TORCHCE_SIMD void finish() {
    exponentials = sum_of<A>(exponential_lanes.sum);
    coefficients = sum_of<A>(coefficient_lanes.sum);
    gaps = sum_of<A>(gap_lanes.sum);
    // A row with a logit has a term of 1. One of -inf alone has a maximum of -inf and, like one with a NaN, no sum.
    if (!(exponentials >= 1)) {
      max = -math::kInfinity<A>;
      exponentials = max - max;
    }
  }
};

template <class T, class Target>
void forward(const Forward& call, int64_t row_begin, int64_t row_end, Partial* partial) {
  using A = Accumulate<T>;
  const Rows rows = call.rows;  // a copy: what is stored might be the original, for all the compiler knows
  const Statistics<A> statistics(rows, call.statistics);
  for (int64_t r = row_begin; r < row_end; ++r) {
    const RowPosition at(rows, r);
    const T* x = static_cast<const T*>(rows.logits) + at.offset(rows.logits_strides);
    A loss = 0, max = 0, sum = 1;
    const auto reduce_row = [&] {
      const RowSums<T, Target> sums(x, rows.classes, Coefficients<T, Target>(rows, at));
      max = sums.max;
      sum = sums.exponentials;
      return sums;
    };
    if constexpr (Target::kProbabilities) {
      const auto sums = reduce_row();
      loss = spread_loss(A(1), sums.coefficients, sums.gaps, math::log(sums.exponentials));
      statistics.spread[r] = sums.coefficients;
    } else {
      const IndexedRow<A> row(rows, at);
      if (row.kind == RowKind::bad && partial->bad_row < 0) partial->bad_row = r;
      if (row.kind == RowKind::kept) {
        const auto sums = reduce_row();
        const A log_sum = math::log(sums.exponentials);
        loss = hot_loss(row.hot, load_one<A>(x + row.index), max, log_sum);
        if constexpr (Target::kSpread) loss += spread_loss(row.uniform, sums.coefficients, sums.gaps, log_sum);
        partial->weight += row.weight;
      }
    }
    statistics.max[r] = max;
    statistics.sum[r] = sum;
    partial->loss += loss;
    if (rows.reduction == Reduction::none) store_as(call.loss_dtype, call.loss, r, loss);
  }
}

// grad_k = exp(x_k - max) scale - spread u_k, for every class.
template <class T, class Target, class A>
TORCHCE_SIMD void row_gradient(const T* x, T* grad, int64_t classes, A max, A scale, A spread,
                               const Coefficients<T, Target>& coefficients) {
  constexpr int64_t P = Pack<T>::kSize;
  const auto max_lanes = broadcast(max);
  const math::ScaledExp<Lanes<A>, kSixteenBits<T>> scaled_exp(broadcast(scale));
  const auto gradient = [&](int64_t k) {
    Pack<T> g = Pack<T>::load(x + k);
    for (auto& v : g.v) v = scaled_exp(v - max_lanes);
    if constexpr (Target::kSpread) {
      const Pack<T> u = coefficients.at(k);
      for (int i = 0; i < g.kVectors; ++i) g.v[i] -= spread * u.v[i];
    }
    return g;
  };
  const bool remainder = classes % P != 0;
  Pack<T> last{};
  if (remainder) last = gradient(classes - P);
  for (int64_t k = 0; k + P <= classes; k += P) gradient(k).store(grad + k);
  if (remainder) last.store(grad + classes - P);
}

template <class T, class Target>
void backward(const Backward& original, int64_t row_begin, int64_t row_end) {
  using A = Accumulate<T>;
  const Backward call = original;  // what is stored might be the original, for all the compiler knows
  const Rows& rows = call.rows;
  const Statistics<A> statistics(rows, call.statistics);
  for (int64_t r = row_begin; r < row_end; ++r) {
    const RowPosition at(rows, r);
    const T* x = static_cast<const T*>(rows.logits) + at.offset(rows.logits_strides);
    T* grad = static_cast<T*>(call.grad) + at.offset(call.grad_strides);
    const Coefficients<T, Target> coefficients(rows, at);
    const A max = statistics.max[r], sum = statistics.sum[r];
    if constexpr (Target::kProbabilities) {
      const A g = row_grad_output<A>(call, at);
      row_gradient<T, Target>(x, grad, rows.classes, max, g * statistics.spread[r] / sum, g, coefficients);
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
      row_gradient<T, Target>(x, grad, rows.classes, max, scale, spread, coefficients);
      store_one(grad + row.index, scaled_probability(hot_logit, max, scale) - spread * row.weight - g * row.hot);
    }
  }
}

}  // namespace torchce::cpu::TORCHCE_LEVEL::along
