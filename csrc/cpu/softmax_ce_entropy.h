// The entropies of rows, from the largest logits and sums that the forward has found, while the logits are in cache.
#pragma once

#include "softmax_ce_kernels.h"

namespace torchce::cpu::TORCHCE_LEVEL {

// Writes what `count` rows have of their entropies. `weighted_gaps` are their sum_k exp(x_k - max) (x_k - max).
template <class A, int W>
TORCHCE_SIMD void write_entropies(const Forward& call, int64_t row, int count, const PerRow<A, W>& weighted_gaps) {
  const Statistics<A> statistics(call.rows, call.statistics);
  const auto sum = PerRow<A, W>::of(statistics.sum + row, count);
  PerRow<A, W> mean_gaps, entropy;
  for (int w = 0; w < vectors_of<A>(count); ++w) {
    mean_gaps.set(w, weighted_gaps.lanes(w) / sum.lanes(w));
    entropy.set(w, math::log(sum.lanes(w)) - mean_gaps.lanes(w));
  }
  mean_gaps.write(statistics.mean_gaps + row, count);
  entropy.write(static_cast<A*>(call.entropy) + row, count);
}

namespace along {

template <class T>
void entropies(const Forward& call, int64_t row_begin, int64_t row_end) {
  using A = Accumulate<T>;
  using Target = General<Indices>;
  const Rows& rows = call.rows;
  const Statistics<A> statistics(rows, call.statistics);
  const math::ExpInSum<Lanes<A>> exp;
  for_each_group<A>(row_begin, row_end, [&](int64_t row, int count) TORCHCE_HD_LAMBDA {
    PerRow<A, kGroup> weighted_gaps{};
    for_each_row<T, Target>(rows, row, count, [&](int l, RowPosition, RowLogits<T, Target> x) TORCHCE_HD_LAMBDA {
      const auto max = broadcast(statistics.max[row + l]);
      weighted_gaps[l] = sum_over_pairs<T>(rows.classes, [&](int64_t k) TORCHCE_HD_LAMBDA {
        VectorPair<T> pair = x.at(k);
        for (auto& v : pair.v) v = weighted_gap(exp(v - max), v - max);
        return pair;
      });
    });
    write_entropies(call, row, count, weighted_gaps);
  });
}

}  // namespace along

namespace across {

template <class T, int W>
TORCHCE_SIMD void entropies_of_strip(const Forward& call, int64_t row, int count) {
  using A = Accumulate<T>;
  using V = Lanes<A>;
  const Rows& rows = call.rows;
  const StripLogits<T, General<Indices>, W> logits(rows, row, count);
  const auto max = PerRow<A, W>::of(Statistics<A>(rows, call.statistics).max + row, count);
  const math::ExpInSum<V> exp;
  math::CompensatedSum<V, true> totals[W]{};
  for_each_block(rows.classes, [&](int64_t k, int classes) {
    Block<A, W> block;
    logits.read(k, classes, block);
    for (int w = 0; w < W; ++w) {
      math::StridedSum<4, V> of_block;
      of_block.add(classes, [&](int c) TORCHCE_HD_LAMBDA {
        const V gap = block.values[c][w] - max.lanes(w);
        return weighted_gap(exp(gap), gap);
      });
      totals[w].add(of_block.value());
    }
  });
  PerRow<A, W> weighted_gaps;
  for (int w = 0; w < W; ++w) weighted_gaps.set(w, totals[w].sum);
  write_entropies(call, row, count, weighted_gaps);
}

template <class T>
void entropies(const Forward& call, int64_t row_begin, int64_t row_end) {
  for_each_strip<Accumulate<T>, kWidest<General<Indices>>>(
      call.rows, call.rows.logits_strides, row_begin, row_end,
      [&](auto wide, int64_t row, int count) { entropies_of_strip<T, wide.value>(call, row, count); });
}

}  // namespace across

inline void softmax_ce_entropies(const Forward& call, int64_t row_begin, int64_t row_end) {
  with_float_type(call.rows.dtype, [&](auto logits) {
    using T = decltype(logits);
    if (lanes_run_along<T, Indices>(call.rows)) {
      along::entropies<T>(call, row_begin, row_end);
    } else {
      across::entropies<T>(call, row_begin, row_end);
    }
  });
}

}  // namespace torchce::cpu::TORCHCE_LEVEL
