// Divergences of a range of rows, with what their backward needs.
#pragma once

#include "divergence_sums.h"

namespace torchce::cpu::TORCHCE_LEVEL::divergences {

// Reads all blocks of both operands and calls add(first block, other block, steps).
template <class S, class A, int W, class First, class Other, class F>
TORCHCE_SIMD void for_each_pair_of_blocks(const First& first, const Other& other, A scale, int64_t steps, F add) {
  Block<A, W> f, o;
  across::for_each_block(steps, [&](int64_t k, int count) TORCHCE_HD_LAMBDA {
    first.read(k, count, f);
    to_values<S::kFirst>(scale, count, f);
    if constexpr (S::kOther != Side::none) {
      other.read(k, count, o);
      to_values<S::kOther>(scale, count, o);
    }
    add(k, count, f, o);
  });
}

template <class A>
A scale_of(const Options& options) {
  return A(1 / options.temperature);
}

// What rows give: what their backward needs, and the KL divergence or the two terms of a JS divergence.
template <class A, int W, class S>
struct Results {
  using V = Lanes<A>;
  PerRow<A, W> first_max{}, first_sum{}, other_max{}, other_sum{}, value{}, second_value{};

  TORCHCE_SIMD void write(const Forward& call, int64_t row, int count, const PerRow<A, W>& kept, Partial* partial) {
    const Rows& rows = call.rows;
    const Statistics<A> statistics(rows, call.statistics);
    const A sign = sign_of<A>(rows);
    PerRow<A, W> loss;
    SumInDouble<A> loss_sum, kept_sum;
    for (int w = 0; w < vectors_of<A>(count); ++w) {
      V of_rows = sign * value.lanes(w);
      if constexpr (S::kJs) of_rows += second_value.lanes(w);
      of_rows = math::select(kept.lanes(w) == V{}, V{}, of_rows);
      loss.set(w, of_rows);
      loss_sum.add(of_rows);
      kept_sum.add(kept.lanes(w));
    }
    partial->loss += loss_sum.value();
    partial->weight += kept_sum.value();
    if constexpr (S::kFirst == Side::logits) first_max.write(statistics.first_max + row, count);
    first_sum.write(statistics.first_sum + row, count);
    if constexpr (S::kOther == Side::logits) {
      other_max.write(statistics.other_max + row, count);
      other_sum.write(statistics.other_sum + row, count);
    }
    value.write(statistics.value + row, count);
    if constexpr (S::kJs) second_value.write(statistics.second_value + row, count);
    if (rows.options.reduction != Reduction::none) return;
    with_float_type(call.loss_dtype, [&](auto storage) {
      auto* out = static_cast<decltype(storage)*>(call.loss) + row;
      for (int l = 0; l < count; ++l) store_one(out + l, loss[l]);
    });
  }
};

// The results of a strip, or with kAlong of one row, which every lane has then.
template <class A, int W, class S, bool kAlong, class First, class Other>
TORCHCE_SIMD Results<A, W, S> results_of(const Rows& rows, const First& first, const Other& other, int64_t steps) {
  const A scale = scale_of<A>(rows.options);
  Results<A, W, S> results;
  RunningSums<A, W, S, kAlong> sums(rows.classes);
  for_each_pair_of_blocks<S, A, W>(first, other, scale, steps,
                                   [&](int64_t k, int count, const Block<A, W>& f, const Block<A, W>& o)
                                       TORCHCE_HD_LAMBDA { sums.add(f, o, count, /*is_first=*/k == 0); });
  if constexpr (kAlong) sums.merge_lanes();
  for (int w = 0; w < W; ++w) {
    results.first_max.set(w, sums.first_largest(w));
    results.first_sum.set(w, sums.first_sum(w));
    results.other_max.set(w, sums.other_largest(w));
    results.other_sum.set(w, sums.other_sum(w));
    if constexpr (!S::kJs) results.value.set(w, sums.divergence(w));
  }
  if constexpr (S::kJs) {  // the second time from the caches
    MixtureSums<A, W, S> terms(rows.options);
    for (int w = 0; w < W; ++w) {
      const auto lift = broadcast(A(kLift));
      terms.f[w] = Softmax<A, S::kFirst>(results.first_max.lanes(w), results.first_sum.lanes(w), lift);
      terms.o[w] = Softmax<A, S::kOther>(results.other_max.lanes(w), results.other_sum.lanes(w), lift);
    }
    for_each_pair_of_blocks<S, A, W>(first, other, scale, steps,
                                     [&](int64_t, int count, const Block<A, W>& f, const Block<A, W>& o)
                                         TORCHCE_HD_LAMBDA { terms.add(f, o, count); });
    if constexpr (kAlong) terms.merge_lanes();
    for (int w = 0; w < W; ++w) {
      results.value.set(w, terms.first_term(w));
      results.second_value.set(w, terms.other_term(w));
    }
  }
  return results;
}

// Calls f with the operands of a strip, or of a row.
template <class A, int W, class S, class F>
TORCHCE_SIMD void with_strip(const Rows& rows, int64_t row, int count, F f) {
  const auto operand = [&](const Operand& of) {
    return StripOperand<A, W>(rows, const_cast<void*>(of.data), of.dtype, of.strides, row, count);
  };
  if constexpr (S::kOther == Side::none) {
    f(operand(rows.first), NoOperand{});
  } else {
    f(operand(rows.first), operand(rows.other));
  }
}
template <class A, class S, class F>
TORCHCE_SIMD void with_row(const Rows& rows, RowPosition at, F f) {
  const auto operand = [&](const Operand& of) {
    const A filler = of.side == Side::logits ? -math::kInfinity<A> : A(0);
    return RowOperand<A>(rows, const_cast<void*>(of.data), of.dtype, of.strides, at, filler);
  };
  if constexpr (S::kOther == Side::none) {
    f(operand(rows.first), NoOperand{});
  } else {
    f(operand(rows.first), operand(rows.other));
  }
}

template <class A, int W, class S>
void forward_strip(const Forward& call, int64_t row, int count, Partial* partial) {
  const Rows& rows = call.rows;
  with_strip<A, W, S>(rows, row, count, [&](const auto& first, const auto& other) TORCHCE_HD_LAMBDA {
    auto results = results_of<A, W, S, /*kAlong=*/false>(rows, first, other, rows.classes);
    results.write(call, row, count, kept_rows<A, W>(rows, row, count), partial);
  });
}

template <class A, class S>
void forward_group(const Forward& call, int64_t row, int count, Partial* partial) {
  const Rows& rows = call.rows;
  Results<A, 1, S> of_rows;
  const auto kept = kept_rows<A, 1>(rows, row, count);
  RowPosition at(rows, row);
  for (int l = 0; l < count; ++l, at.advance(rows)) {
    if (kept[l] == 0) continue;
    with_row<A, S>(rows, at, [&](const auto& first, const auto& other) TORCHCE_HD_LAMBDA {
      const int64_t steps = (rows.classes + kLanes<A> - 1) / kLanes<A>;
      const auto of_row = results_of<A, 1, S, /*kAlong=*/true>(rows, first, other, steps);
      of_rows.first_max[l] = of_row.first_max[0];
      of_rows.first_sum[l] = of_row.first_sum[0];
      of_rows.other_max[l] = of_row.other_max[0];
      of_rows.other_sum[l] = of_row.other_sum[0];
      of_rows.value[l] = of_row.value[0];
      of_rows.second_value[l] = of_row.second_value[0];
    });
  }
  of_rows.write(call, row, count, kept, partial);
}

template <class A, class S>
void forward(const Forward& call, int64_t row_begin, int64_t row_end, Partial* partial) {
  const Rows& rows = call.rows;
  if (lanes_run_along<A>(rows)) {
    for (int64_t row = row_begin; row < row_end; row += kLanes<A>) {
      forward_group<A, S>(call, row, int(std::min<int64_t>(row_end - row, kLanes<A>)), partial);
    }
    return;
  }
  across::for_each_strip<A, kWidest>(
      rows, rows.first.strides, row_begin, row_end,
      [&](auto wide, int64_t row, int count) { forward_strip<A, wide.value, S>(call, row, count, partial); });
}

}  // namespace torchce::cpu::TORCHCE_LEVEL::divergences
