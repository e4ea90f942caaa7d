// The gradient of the scale that multiplies the logits: of each row its part, the sum over its classes of the gradient
// of a value times the value's derivative by the scale.
#pragma once

#include "softmax_ce_kernels.h"

namespace torchce::cpu::TORCHCE_LEVEL {

namespace along {

template <class T, class Target>
TORCHCE_SIMD void scale_gradients_of_group(const Backward& call, int64_t row, int count,
                                           const IndexTargets<T>* targets) {
  using A = Accumulate<T>;
  const Rows& rows = call.rows;
  const GroupGradients<T, Target, TiltedExp<T>> gradients(call, row, count, targets);
  const LogitOf<Target, T> logit(rows);
  PerRow<A, kGroup> hot_logits{}, of_target_values{}, grad{};
  if (targets != nullptr) {
    for_each_row<T, Target>(rows, row, count, [&](int l, RowPosition, RowLogits<T, Target> x) TORCHCE_HD_LAMBDA {
      hot_logits[l] = load_one<A>(x.x + targets->index[l]);
    });
    of_target_values = gradients.of_target_values(hot_logits, vectors_of<A>(count));
  }
  for_each_row<T, Target>(rows, row, count, [&](int l, RowPosition at, RowLogits<T, Target> x) TORCHCE_HD_LAMBDA {
    if (gradients.is_zero(l)) return;
    gradients.with_row(l, at, [&](const auto& of_values) TORCHCE_HD_LAMBDA {
      grad[l] = sum_over_pairs<T>(rows.classes, [&](int64_t k) TORCHCE_HD_LAMBDA {
        const auto stored = VectorPair<T>::load(x.x + k);
        const VectorPair<T> values = x.at(k);
        VectorPair<T> terms = of_values.at(k, values);
        for (int i = 0; i < terms.kVectors; ++i) terms.v[i] *= logit.slope_by_scale(stored.v[i], values.v[i]);
        // The target class's is added last, with its own part in it: where it is certain nothing must stay of them.
        const int64_t place = targets == nullptr ? -1 : targets->index[l] - k;
        return uint64_t(place) < uint64_t(VectorPair<T>::kSize) ? terms.without(place) : terms;
      });
    });
    if (targets == nullptr) return;
    grad[l] += of_target_values[l] * logit.slope_by_scale(hot_logits[l], logit.value(hot_logits[l]));
  });
  grad.write(static_cast<A*>(call.grad) + row, count);
}

template <class T, class Target>
void scale_gradients(const Backward& call, int64_t row_begin, int64_t row_end) {
  for_each_group<Accumulate<T>>(row_begin, row_end, [&](int64_t row, int count) TORCHCE_HD_LAMBDA {
    if constexpr (Target::kProbabilities) {
      scale_gradients_of_group<T, Target>(call, row, count, nullptr);
    } else {
      const IndexTargets<T> targets(call.rows, row, count);
      scale_gradients_of_group<T, Target>(call, row, count, &targets);
    }
  });
}

}  // namespace along

namespace across {

template <class T, class Target, int W>
TORCHCE_SIMD void scale_gradients_of_strip(const Backward& call, int64_t row, int count) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  const Rows& rows = call.rows;
  const StripLogits<T, Target, W> logits(rows, row, count);
  const auto& logit = logits.logit;
  math::CompensatedSum<V, true> totals[W]{};
  const auto add_classes = [&](const Factors<A, W, true>& factors, auto subtract_hot) {
    with_coefficients<Target, A, W>(rows, row, count, [&](auto& coefficients) {
      for_each_block(rows.classes, [&](int64_t k, int classes) {
        Block<A, W> slopes, block;  // at first logits as they lie in memory, and their values
        static_cast<const Strip<A, const T, W>&>(logits).read(k, classes, slopes);
        for (int c = 0; c < classes; ++c) {
          for (int w = 0; w < W; ++w) block.values[c][w] = logit.value(slopes.values[c][w]);
        }
        to_gradients<Target, TiltedExp<T>>(block, k, classes, coefficients, factors,
                                           [&](int c, int w, V value) TORCHCE_HD_LAMBDA {
                                             V& slope = slopes.values[c][w];
                                             slope = logit.slope_by_scale(slope, value);
                                           });
        subtract_hot(k, classes, block);
        for (int w = 0; w < W; ++w) {
          math::StridedSum<4, V> of_block;
          of_block.add(classes, [&](int c) TORCHCE_HD_LAMBDA { return block.values[c][w] * slopes.values[c][w]; });
          totals[w].add(of_block.value());
        }
      });
    });
  };
  PerRow<A, W> grad;
  if constexpr (Target::kProbabilities) {
    add_classes(Factors<A, W, true>(call, row, count, nullptr), [](int64_t, int, Block<A, W>&) {});
    for (int w = 0; w < W; ++w) grad.set(w, totals[w].sum);
  } else {
    const IndexedRows<A, W> targets(rows, row, count);
    const Factors<A, W, true> factors(call, row, count, &targets);
    add_classes(factors, [&](int64_t k, int classes, Block<A, W>& block) {
      for_each_hot(targets, k, classes, block, [&](int l, A& g) { g -= factors.hot[l]; });
    });
    for (int w = 0; w < W; ++w) {
      grad.set(w, math::select(factors.has_gradient.lanes(w) == V{}, V{}, totals[w].sum));
    }
  }
  grad.write(static_cast<A*>(call.grad) + row, count);
}

template <class T, class Target>
void scale_gradients(const Backward& call, int64_t row_begin, int64_t row_end) {
  for_each_strip<Accumulate<T>, kWidest<Target>>(
      call.rows, call.rows.logits_strides, row_begin, row_end,
      [&](auto wide, int64_t row, int count) { scale_gradients_of_strip<T, Target, wide.value>(call, row, count); });
}

}  // namespace across

inline void softmax_ce_backward_scale(const Backward& call, int64_t row_begin, int64_t row_end) {
  with_general_types(call.rows, [&](auto logits, auto target) {
    using T = decltype(logits);
    using Target = decltype(target);
    if (lanes_run_along<T, Target>(call.rows)) {
      along::scale_gradients<T, Target>(call, row_begin, row_end);
    } else {
      across::scale_gradients<T, Target>(call, row_begin, row_end);
    }
  });
}

}  // namespace torchce::cpu::TORCHCE_LEVEL
