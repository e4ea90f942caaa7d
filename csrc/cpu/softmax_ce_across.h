// Softmax cross entropy with lanes across rows: a strip of neighbouring rows goes through the classes together.
//
// A strip is W vectors wide where all its rows are adjacent in memory (one row apart: one element apart), so that
// several cache lines of a class are read at once; elsewhere it is one vector wide and its lanes are gathered. A strip
// with fewer rows than lanes (the last of a range) repeats its last row in the idle lanes and never stores those.
#pragma once

#include "../softmax_ce_row.h"
#include "vector.h"

namespace torchce::cpu::TORCHCE_LEVEL::across {

using namespace softmax_ce;

constexpr int kWide = 4;  // vectors in a strip of adjacent rows

// The rows of one strip in one operand.
template <class A, class T, int W>
struct Strip {
  T* first;
  int64_t class_stride;
  int count;
  bool adjacent;
  int64_t offsets[W * kLanes<A>];  // from the first row, in elements; only where the rows are not adjacent

  Strip(const Rows& rows, T* data, const RowStrides& strides, int64_t row, int rows_here)
      : first(data + RowPosition(rows, row).offset(strides)),
        class_stride(strides.classes),
        count(rows_here),
        adjacent(rows_here == W * kLanes<A> && adjacent_rows(rows, strides, row, rows_here)) {
    if (adjacent) return;
    const int64_t base = RowPosition(rows, row).offset(strides);
    for (int l = 0; l < W * kLanes<A>; ++l) {
      offsets[l] = RowPosition(rows, row + (l < count ? l : count - 1)).offset(strides) - base;
    }
  }

  static bool adjacent_rows(const Rows& rows, const RowStrides& strides, int64_t row, int rows_here) {
    if (rows.inner == 1) return strides.outer == 1;
    return strides.inner == 1 && row % rows.inner + rows_here <= rows.inner;
  }

  TORCHCE_SIMD Lanes<A> at(int64_t k, int w) const {
    const T* p = first + k * class_stride;
    if (adjacent) return load<A>(p + w * kLanes<A>);
    Lanes<A> v{};
    for (int l = 0; l < kLanes<A>; ++l) v[l] = load_one<A>(p + offsets[w * kLanes<A> + l]);
    return v;
  }

  TORCHCE_SIMD void put(int64_t k, int w, Lanes<A> v) const {
    T* p = first + k * class_stride;
    if (adjacent) return store(p + w * kLanes<A>, v);
    for (int l = w * kLanes<A>; l < count && l < (w + 1) * kLanes<A>; ++l) store_one(p + offsets[l], v[l % kLanes<A>]);
  }

  T* element(int l, int64_t k) const { return first + k * class_stride + (adjacent ? l : offsets[l]); }
};

// The strip's targets, seen as the coefficients u_k of its rows.
template <class Target, class A, int W>
struct Coefficients {
  const A* weight;
  explicit Coefficients(const Rows& rows, int64_t, int) : weight(static_cast<const A*>(rows.weight)) {}
  TORCHCE_SIMD Lanes<A> at(int64_t k, int) const { return broadcast(weight == nullptr ? A(1) : weight[k]); }
};

template <class P, class A, int W>
struct Coefficients<Probabilities<P>, A, W> {
  const A* weight;
  A label_smoothing, classes;
  Strip<A, const P, W> target;

  explicit Coefficients(const Rows& rows, int64_t row, int count)
      : weight(static_cast<const A*>(rows.weight)),
        label_smoothing(A(rows.label_smoothing)),
        classes(A(rows.classes)),
        target(rows, static_cast<const P*>(rows.target), rows.target_strides, row, count) {}
  TORCHCE_SIMD Lanes<A> at(int64_t k, int w) const {
    const Lanes<A> class_weight = broadcast(weight == nullptr ? A(1) : weight[k]);
    return probability_coefficient(target.at(k, w), class_weight, label_smoothing, classes);
  }
};

// kLanes values a lane each, as an array that scalar code fills.
template <class A, int W>
struct PerRow {
  A values[W * kLanes<A>] = {};
  A& operator[](int l) { return values[l]; }
  TORCHCE_SIMD Lanes<A> lanes(int w) const { return load<A>(values + w * kLanes<A>); }
  TORCHCE_SIMD void set(int w, Lanes<A> v) { store(values + w * kLanes<A>, v); }
};

// The class indices of a strip.
template <class A, int W>
struct IndexedStrip {
  int64_t index[W * kLanes<A>] = {};
  RowKind kind[W * kLanes<A>] = {};
  PerRow<A, W> weight, hot, kept;  // kept: 1 or 0
  A uniform = 0;

  IndexedStrip(const Rows& rows, int64_t row, int count) {
    for (int l = 0; l < count; ++l) {
      const IndexedRow<A> one(rows, RowPosition(rows, row + l));
      index[l] = one.index;
      kind[l] = one.kind;
      weight[l] = one.weight;
      hot[l] = one.hot;
      kept[l] = one.kind == RowKind::ignored ? A(0) : A(1);
      uniform = one.uniform;
    }
  }

  template <class T>
  PerRow<A, W> hot_logits(const Strip<A, const T, W>& logits) const {
    PerRow<A, W> x;
    for (int l = 0; l < logits.count; ++l) x[l] = load_one<A>(logits.element(l, index[l]));
    return x;
  }
};

// Splits a range of rows into strips and calls body(integral constant W, first row, rows in the strip).
template <int W>
struct Wide {
  static constexpr int value = W;
};
template <class A, class F>
TORCHCE_SIMD void for_each_strip(const Rows& rows, const RowStrides& strides, int64_t row_begin, int64_t row_end,
                                 F body) {
  constexpr int64_t kWideRows = kWide * kLanes<A>;
  for (int64_t row = row_begin; row < row_end;) {
    if (row + kWideRows <= row_end && Strip<A, char, 1>::adjacent_rows(rows, strides, row, kWideRows)) {
      body(Wide<kWide>{}, row, int(kWideRows));
      row += kWideRows;
    } else {
      const int count = int(row_end - row < kLanes<A> ? row_end - row : kLanes<A>);
      body(Wide<1>{}, row, count);
      row += count;
    }
  }
}

template <class T, class Target, int W>
TORCHCE_SIMD void forward_strip(const Forward& call, int64_t row, int count, Partial* partial) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  const Rows& rows = call.rows;
  const Strip<A, const T, W> logits(rows, static_cast<const T*>(rows.logits), rows.logits_strides, row, count);
  const Coefficients<Target, A, W> coefficients(rows, row, count);

  V max[W], sum[W] = {}, sum_coefficients[W] = {}, gaps[W] = {};
  for (int w = 0; w < W; ++w) max[w] = logits.at(0, w);
  for (int64_t k = 1; k < rows.classes; ++k) {
    for (int w = 0; w < W; ++w) {
      const V x = logits.at(k, w);
      max[w] = math::select(x > max[w], x, max[w]);
    }
  }
  for (int64_t k = 0; k < rows.classes; ++k) {
    for (int w = 0; w < W; ++w) {
      const V x = logits.at(k, w);
      sum[w] += math::exp_of_negative(x - max[w]);
      if constexpr (Target::kSpread) {
        const V u = coefficients.at(k, w);
        sum_coefficients[w] += u;
        gaps[w] += weighted_gap(u, x, max[w]);
      }
    }
  }

  PerRow<A, W> loss, maxima, sums, spread;
  if constexpr (Target::kProbabilities) {
    for (int w = 0; w < W; ++w) {
      loss.set(w, spread_loss(broadcast<A>(1), sum_coefficients[w], gaps[w], math::log(sum[w])));
      spread.set(w, sum_coefficients[w]);
    }
  } else {
    const IndexedStrip<A, W> targets(rows, row, count);
    const PerRow<A, W> hot_logits = targets.hot_logits(logits);
    for (int w = 0; w < W; ++w) {
      const V log_sum = math::log(sum[w]);
      V v = hot_loss(targets.hot.lanes(w), hot_logits.lanes(w), max[w], log_sum);
      if constexpr (Target::kSpread)
        v += spread_loss(broadcast(targets.uniform), sum_coefficients[w], gaps[w], log_sum);
      loss.set(w, math::select(targets.kept.lanes(w) == V{}, V{}, v));
    }
    for (int l = 0; l < count; ++l) {
      if (targets.kind[l] == RowKind::kept) partial->weight += targets.weight.values[l];
      if (targets.kind[l] == RowKind::bad && partial->bad_row < 0) partial->bad_row = row + l;
    }
  }
  for (int w = 0; w < W; ++w) {
    maxima.set(w, max[w]);
    sums.set(w, sum[w]);
  }
  const Statistics<A> statistics(rows, call.statistics);
  for (int l = 0; l < count; ++l) {
    statistics.max[row + l] = maxima[l];
    statistics.sum[row + l] = sums[l];
    if constexpr (Target::kProbabilities) statistics.spread[row + l] = spread[l];
    partial->loss += loss[l];
    if (rows.reduction == Reduction::none) store_as(call.loss_dtype, call.loss, row + l, loss[l]);
  }
}

template <class T, class Target>
void forward(const Forward& call, int64_t row_begin, int64_t row_end, Partial* partial) {
  for_each_strip<Accumulate<T>>(
      call.rows, call.rows.logits_strides, row_begin, row_end,
      [&](auto wide, int64_t row, int count) { forward_strip<T, Target, wide.value>(call, row, count, partial); });
}

template <class T, class Target, int W>
TORCHCE_SIMD void backward_strip(const Backward& call, int64_t row, int count) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  const Rows& rows = call.rows;
  const Strip<A, const T, W> logits(rows, static_cast<const T*>(rows.logits), rows.logits_strides, row, count);
  const Strip<A, T, W> grad(rows, static_cast<T*>(call.grad), call.grad_strides, row, count);
  const Coefficients<Target, A, W> coefficients(rows, row, count);
  const Statistics<A> statistics(rows, call.statistics);

  PerRow<A, W> max, scale, spread;
  const auto fill = [&](auto grad_output_of, auto factor_of) {
    for (int l = 0; l < count; ++l) {
      const A g = grad_output_of(l);
      max[l] = statistics.max[row + l];
      scale[l] = factor_of(l, g) / statistics.sum[row + l];
    }
  };
  const auto write_classes = [&](auto finish) {
    V max_lanes[W], scale_lanes[W], spread_lanes[W];
    for (int w = 0; w < W; ++w) {
      max_lanes[w] = max.lanes(w);
      scale_lanes[w] = scale.lanes(w);
      spread_lanes[w] = spread.lanes(w);
    }
    for (int64_t k = 0; k < rows.classes; ++k) {
      for (int w = 0; w < W; ++w) {
        V g = scaled_probability(logits.at(k, w), max_lanes[w], scale_lanes[w]);
        if constexpr (Target::kSpread) g -= spread_lanes[w] * coefficients.at(k, w);
        grad.put(k, w, finish(g, w));
      }
    }
  };

  if constexpr (Target::kProbabilities) {
    fill([&](int l) { return spread[l] = row_grad_output<A>(call, RowPosition(rows, row + l)); },
         [&](int l, A g) { return g * statistics.spread[row + l]; });
    write_classes([](auto g, int) { return g; });
  } else {
    const IndexedStrip<A, W> targets(rows, row, count);
    const A sum_weights = sum_of_class_weights<A>(call);
    PerRow<A, W> hot;
    fill(
        [&](int l) {
          if (targets.kind[l] == RowKind::bad) return A(__builtin_nan(""));
          return row_grad_output<A>(call, RowPosition(rows, row + l));
        },
        [&](int l, A g) {
          hot[l] = g * targets.hot.values[l];
          spread[l] = g * targets.uniform;
          return hot[l] + spread[l] * sum_weights;
        });
    const PerRow<A, W> hot_logits = targets.hot_logits(logits);  // before they may be overwritten
    V kept[W];
    for (int w = 0; w < W; ++w) kept[w] = targets.kept.lanes(w);
    write_classes([&](V g, int w) { return math::select(kept[w] == V{}, V{}, g); });
    PerRow<A, W> hot_gradient;
    for (int w = 0; w < W; ++w) {
      const V p = scaled_probability(hot_logits.lanes(w), max.lanes(w), scale.lanes(w));
      hot_gradient.set(w, p - spread.lanes(w) * targets.weight.lanes(w) - hot.lanes(w));
    }
    for (int l = 0; l < count; ++l) {
      if (targets.kind[l] != RowKind::ignored) store_one(grad.element(l, targets.index[l]), hot_gradient[l]);
    }
  }
}

template <class T, class Target>
void backward(const Backward& call, int64_t row_begin, int64_t row_end) {
  for_each_strip<Accumulate<T>>(
      call.rows, call.rows.logits_strides, row_begin, row_end,
      [&](auto wide, int64_t row, int count) { backward_strip<T, Target, wide.value>(call, row, count); });
}

template <class T, class Target>
void backward_target(const Backward& call, int64_t row_begin, int64_t row_end) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  using P = typename Target::Storage;
  const Rows& rows = call.rows;
  const Statistics<A> statistics(rows, call.statistics);
  const A* weight = static_cast<const A*>(rows.weight);
  for_each_strip<A>(rows, rows.logits_strides, row_begin, row_end, [&](auto wide, int64_t row, int count) {
    constexpr int W = wide.value;
    const Strip<A, const T, W> logits(rows, static_cast<const T*>(rows.logits), rows.logits_strides, row, count);
    const Strip<A, P, W> grad(rows, static_cast<P*>(call.grad), call.grad_strides, row, count);
    PerRow<A, W> max, log_sum, grad_output;
    for (int l = 0; l < count; ++l) {
      max[l] = statistics.max[row + l];
      log_sum[l] = math::log(statistics.sum[row + l]);
      grad_output[l] = row_grad_output<A>(call, RowPosition(rows, row + l));
    }
    for (int64_t k = 0; k < rows.classes; ++k) {
      const V class_weight = broadcast(weight == nullptr ? A(1) : weight[k]);
      for (int w = 0; w < W; ++w) {
        const V g =
            target_gradient(logits.at(k, w), class_weight, max.lanes(w), log_sum.lanes(w), A(rows.label_smoothing));
        grad.put(k, w, g * grad_output.lanes(w));
      }
    }
  });
}

}  // namespace torchce::cpu::TORCHCE_LEVEL::across
