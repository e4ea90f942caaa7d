// Softmax cross entropy with lanes across rows: a strip of neighbouring rows goes through the classes together.
//
// Classes are taken from memory a block at a time and worked on from there: where they are a power of two apart, the
// caches hold only a few of them at once, and reading them again would mean to fetch them again. As in
// softmax_ce_along.h, sums are against the largest logit so far.
#pragma once

#include "softmax_ce_strip.h"

namespace torchce::cpu::TORCHCE_LEVEL::across {

// What the rows of a strip add up to, a lane each.
template <class T, class Target, int W>
struct StripSums {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  V max[W];
  CompensatedSum<V> exponentials[W];
  static constexpr int kSpreadVectors = Target::kSpread ? W : 1;
  CompensatedSum<V> coefficients[kSpreadVectors];  // sum_k u_k
  CompensatedSum<V> gaps[kSpreadVectors];          // sum_k u_k (x_k - max)

  // `look` sees every block of logits: look(first class, classes, block).
  template <class Look>
  TORCHCE_SIMD StripSums(const Strip<A, const T, W>& logits, Coefficients<Target, A, W>& u, int64_t classes,
                         Look look) {
    for (V& m : max) m = broadcast(kLowest<A>);
    for_each_block(classes, [&](int64_t k, int count) {
      Block<A, W> x;
      logits.read(k, count, x);
      look(k, count, x);
      if constexpr (Target::kSpread) u.read(k, count);
      for (int w = 0; w < W; ++w) {
        for (int c = 0; c < count; ++c) logits.template prefetch_next<0>(k + c, w);
        add(x, u, count, w);
      }
    });
    for (int w = 0; w < W; ++w) {
      // A row with a logit has a term of 1. One of -inf alone has a maximum of -inf and, like one with a NaN, no sum.
      const auto has_sum = exponentials[w].sum >= 1;
      exponentials[w].sum = math::select(has_sum, exponentials[w].sum, broadcast(A(__builtin_nan(""))));
      max[w] = math::select(has_sum, max[w], broadcast(-math::kInfinity<A>));
    }
  }

 private:
  math::ExpInSum<V> exp;

  TORCHCE_SIMD void add(const Block<A, W>& x, const Coefficients<Target, A, W>& u, int count, int w) {
    V new_max = max[w];
    for (int c = 0; c < count; ++c) new_max = larger(new_max, x.values[c][w]);
    exponentials[w].scale(exp(max[w] - new_max));
    V sum{}, sum_coefficients{}, sum_gaps{};
    for (int c = 0; c < count; ++c) {
      sum += exp(x.values[c][w] - new_max);
      if constexpr (Target::kSpread) {
        const V coefficient = u.at(c, w);
        sum_coefficients += coefficient;
        sum_gaps += weighted_gap(coefficient, x.values[c][w], new_max);
      }
    }
    exponentials[w].add(sum);
    if constexpr (Target::kSpread) {
      gaps[w].add(weighted_gap(coefficients[w].sum, max[w], new_max));
      gaps[w].add(sum_gaps);
      coefficients[w].add(sum_coefficients);
    }
    max[w] = new_max;
  }
};

template <class T, class Target, int W>
TORCHCE_SIMD void forward_strip(const Forward& call, int64_t row, int count, Partial* partial) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  const Rows& rows = call.rows;
  const Strip<A, const T, W> logits(rows, static_cast<const T*>(rows.logits), rows.logits_strides, row, count);
  Coefficients<Target, A, W> coefficients(rows, row, count);
  PerRow<A, W> loss, maxima, sums, spread;
  SumInDouble<A> loss_sum, weight_sum;
  const auto sum_up = [&](auto look) { return StripSums<T, Target, W>(logits, coefficients, rows.classes, look); };
  const auto store_sums = [&](const StripSums<T, Target, W>& of) {
    for (int w = 0; w < W; ++w) {
      maxima.set(w, of.max[w]);
      sums.set(w, of.exponentials[w].sum);
      if constexpr (Target::kProbabilities) spread.set(w, of.coefficients[w].sum);
    }
  };
  if constexpr (Target::kProbabilities) {
    const auto of = sum_up([](int64_t, int, Block<A, W>&) {});
    store_sums(of);
    for (int w = 0; w < W; ++w) {
      const V log_sum = math::log(of.exponentials[w].sum);
      loss.set(w, spread_loss(broadcast<A>(1), of.coefficients[w].sum, of.gaps[w].sum, log_sum));
    }
  } else {
    const IndexedStrip<A, W> targets(rows, row, count);
    PerRow<A, W> hot_logits;
    const auto of = sum_up([&](int64_t k, int classes, Block<A, W>& block) {
      targets.for_each_hot(k, classes, block, [&](int l, A x) { hot_logits[l] = x; });
    });
    store_sums(of);
    for (int w = 0; w < W; ++w) {
      const V log_sum = math::log(of.exponentials[w].sum);
      const auto target = targets.coefficients(w);
      V v = hot_loss(target.hot, hot_logits.lanes(w), of.max[w], log_sum);
      if constexpr (Target::kSpread) {
        v += spread_loss(broadcast(target.uniform), of.coefficients[w].sum, of.gaps[w].sum, log_sum);
      }
      loss.set(w, math::select(targets.kept.lanes(w) == V{}, V{}, v));
    }
    for (int w = 0; w < W; ++w) weight_sum.add(targets.weight.lanes(w));
    partial->weight += weight_sum.value();
    if (targets.any_bad && partial->bad_row < 0) partial->bad_row = first_bad_row(rows, row, row + count);
  }
  const Statistics<A> statistics(rows, call.statistics);
  maxima.write(statistics.max + row, count);
  sums.write(statistics.sum + row, count);
  if constexpr (Target::kProbabilities) spread.write(statistics.spread + row, count);
  for (int l = count; l < W * kLanes<A>; ++l) loss[l] = 0;
  for (int w = 0; w < W; ++w) loss_sum.add(loss.lanes(w));
  partial->loss += loss_sum.value();
  if (rows.reduction == Reduction::none) {
    with_float_type(call.loss_dtype, [&](auto storage) {
      auto* out = static_cast<decltype(storage)*>(call.loss) + row;
      for (int l = 0; l < count; ++l) store_one(out + l, loss[l]);
    });
  }
}

template <class T, class Target>
void forward(const Forward& call, int64_t row_begin, int64_t row_end, Partial* partial) {
  for_each_strip<Accumulate<T>>(
      call.rows, call.rows.logits_strides, row_begin, row_end,
      [&](auto wide, int64_t row, int count) { forward_strip<T, Target, wide.value>(call, row, count, partial); });
}

// What the upstream gradient multiplies the rows of a strip with.
template <int W, class A>
TORCHCE_SIMD PerRow<A, W> grad_outputs(const Backward& call, int64_t row, int count) {
  PerRow<A, W> result;
  RowPosition at(call.rows, row);
  if (call.rows.reduction != Reduction::none) {
    const auto of_all = broadcast(row_grad_output<A>(call, at));
    for (int w = 0; w < W; ++w) result.set(w, of_all);
    return result;
  }
  for (int l = 0; l < W * kLanes<A>; ++l) {
    result[l] = row_grad_output<A>(call, at);
    if (l + 1 < count) at.advance(call.rows);
  }
  return result;
}

template <class T, class Target, int W>
TORCHCE_SIMD void backward_strip(const Backward& call, int64_t row, int count) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  const Rows& rows = call.rows;
  const Strip<A, const T, W> logits(rows, static_cast<const T*>(rows.logits), rows.logits_strides, row, count);
  const Strip<A, T, W> grad(rows, static_cast<T*>(call.grad), call.grad_strides, row, count);
  Coefficients<Target, A, W> coefficients(rows, row, count);
  const Statistics<A> statistics(rows, call.statistics);

  const bool in_place = call.grad == rows.logits;
  const auto max = PerRow<A, W>::of(statistics.max + row, count), sum = PerRow<A, W>::of(statistics.sum + row, count);
  const PerRow<A, W> grad_output = grad_outputs<W, A>(call, row, count);
  PerRow<A, W> scale, spread;
  const auto write_classes = [&](auto finish) {
    for_each_block(rows.classes, [&](int64_t k, int classes) {
      Block<A, W> block;
      logits.read(k, classes, block);
      if constexpr (Target::kSpread) coefficients.read(k, classes);
      for (int w = 0; w < W; ++w) {
        const math::ScaledExp<V, kSixteenBits<T>> scaled_exp(scale.lanes(w));
        const V max_lanes = max.lanes(w), spread_lanes = spread.lanes(w);
        for (int c = 0; c < classes; ++c) {
          logits.template prefetch_next<0>(k + c, w);
          if (!in_place) grad.template prefetch_next<1>(k + c, w);
          V& g = block.values[c][w];
          g = scaled_exp(g - max_lanes);
          if constexpr (Target::kSpread) g -= spread_lanes * coefficients.at(c, w);
        }
      }
      finish(k, classes, block);
      grad.write(k, classes, block);
    });
  };

  if constexpr (Target::kProbabilities) {
    const auto coefficients_sum = PerRow<A, W>::of(statistics.spread + row, count);
    for (int w = 0; w < W; ++w) {
      spread.set(w, grad_output.lanes(w));
      scale.set(w, grad_output.lanes(w) * coefficients_sum.lanes(w) / sum.lanes(w));
    }
    write_classes([](int64_t, int, Block<A, W>&) {});
  } else {
    const IndexedStrip<A, W> targets(rows, row, count);
    const A sum_weights = sum_of_class_weights<A>(call);
    PerRow<A, W> hot;
    for (int w = 0; w < W; ++w) {
      const auto target = targets.coefficients(w);
      const V g = grad_output.lanes(w), of_all = g * target.uniform;
      hot.set(w, target.hot * g);
      spread.set(w, of_all);
      scale.set(w, (target.hot * g + of_all * sum_weights) / sum.lanes(w));
    }
    write_classes([&](int64_t k, int classes, Block<A, W>& block) {
      targets.for_each_hot(k, classes, block, [&](int l, A& g) { g -= hot[l]; });
      if (!targets.any_ignored) return;
      for (int c = 0; c < classes; ++c) {
        for (int w = 0; w < W; ++w) {
          block.values[c][w] = math::select(targets.kept.lanes(w) == V{}, V{}, block.values[c][w]);
        }
      }
    });
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
    const auto max = PerRow<A, W>::of(statistics.max + row, count);
    const PerRow<A, W> grad_output = grad_outputs<W, A>(call, row, count);
    auto log_sum = PerRow<A, W>::of(statistics.sum + row, count);
    for (int w = 0; w < W; ++w) log_sum.set(w, math::log(log_sum.lanes(w)));
    for_each_block(rows.classes, [&](int64_t k, int classes) {
      Block<A, W> block;
      logits.read(k, classes, block);
      for (int c = 0; c < classes; ++c) {
        const V class_weight = broadcast(weight == nullptr ? A(1) : weight[k + c]);
        for (int w = 0; w < W; ++w) {
          const V g = target_gradient(block.values[c][w], class_weight, max.lanes(w), log_sum.lanes(w),
                                      A(rows.label_smoothing));
          block.values[c][w] = g * grad_output.lanes(w);
        }
      }
      grad.write(k, classes, block);
    });
  });
}

}  // namespace torchce::cpu::TORCHCE_LEVEL::across
