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

// What rows give: their statistics, and the values that the loss is made of.
template <class A, int W, class S>
struct Results {
  using V = Lanes<A>;
  SumsOfRows<A, W> sums;
  PerRow<A, W> kl_or_first, other;  // the KL divergence, or the terms of a JS divergence

  // The sums of exponentials against the largest logits, as a backward takes them.
  TORCHCE_SIMD V first_against_max(int w) const {
    return sums.first.lanes(w) * math::exp_of_negative(sums.first_reference.lanes(w) - sums.first_max.lanes(w));
  }
  TORCHCE_SIMD V other_against_max(int w) const {
    return sums.other.lanes(w) * math::exp_of_negative(sums.other_reference.lanes(w) - sums.other_max.lanes(w));
  }

  TORCHCE_SIMD void set_kl(int w) {
    const RowSums<V> row = sums.sums(w);
    const V one = broadcast(A(1));
    V first = row.first, other = row.other, weights = one;
    if constexpr (S::kFirst == Side::probabilities) std::swap(first, weights);
    if constexpr (S::kOther != Side::logits) other = one + A(0) * other;  // where there is a NaN, it stays one
    const bool knows_surplus = S::kFirst == Side::logits && S::kOther == Side::logits;
    kl_or_first.set(w, kl(row, first, other, knows_surplus ? row.surplus : first - other, weights));
  }

  TORCHCE_SIMD void write(const Forward& call, int64_t row, int count, Partial* partial) {
    const Rows& rows = call.rows;
    const Statistics<A> statistics(rows, call.statistics);
    const auto kept = kept_rows<A, W>(rows, row, count);
    const A sign = rows.options.kind == Kind::entropy ? -1 : 1;
    PerRow<A, W> loss;
    SumInDouble<A> loss_sum, kept_sum;
    for (int w = 0; w < vectors_of<A>(count); ++w) {
      V value = sign * kl_or_first.lanes(w);
      if constexpr (S::kJs) value += other.lanes(w);
      value = math::select(kept.lanes(w) == V{}, V{}, value);
      loss.set(w, value);
      loss_sum.add(value);
      kept_sum.add(kept.lanes(w));
      if constexpr (S::kFirst == Side::logits) sums.first.set(w, first_against_max(w));
      if constexpr (S::kOther == Side::logits) sums.other.set(w, other_against_max(w));
    }
    partial->loss += loss_sum.value();
    partial->weight += kept_sum.value();
    if constexpr (S::kFirst == Side::logits) sums.first_max.write(statistics.first_max + row, count);
    sums.first.write(statistics.first_sum + row, count);
    if constexpr (S::kOther == Side::logits) {
      sums.other_max.write(statistics.other_max + row, count);
      sums.other.write(statistics.other_sum + row, count);
    }
    kl_or_first.write(statistics.values + row, count);
    if constexpr (S::kJs) other.write(statistics.values + rows.outer * rows.inner + row, count);
    if (rows.options.reduction != Reduction::none) return;
    with_float_type(call.loss_dtype, [&](auto storage) {
      auto* out = static_cast<decltype(storage)*>(call.loss) + row;
      for (int l = 0; l < count; ++l) store_one(out + l, loss[l]);
    });
  }
};

// Goes through the rows of a strip, or through one row, whose sums take(OnlineSums) and take_terms(MixtureSums) take.
template <class A, int W, class S, class First, class Other, class Take, class Prepare, class TakeTerms>
TORCHCE_SIMD void sum_up(const Rows& rows, const First& first, const Other& other, int64_t steps, Take take,
                         Prepare prepare, TakeTerms take_terms) {
  const A scale = scale_of<A>(rows.options);
  {
    OnlineSums<A, W, S, !S::kJs> sums;
    for_each_pair_of_blocks<S, A, W>(first, other, scale, steps,
                                     [&](int64_t, int count, const Block<A, W>& f, const Block<A, W>& o)
                                         TORCHCE_HD_LAMBDA { sums.add(f, o, count); });
    take(sums);
  }
  if constexpr (S::kJs) {  // the second time from the caches
    MixtureSums<A, W, S> terms(rows.options);
    prepare(terms);
    for_each_pair_of_blocks<S, A, W>(first, other, scale, steps,
                                     [&](int64_t, int count, const Block<A, W>& f, const Block<A, W>& o)
                                         TORCHCE_HD_LAMBDA { terms.add(f, o, count); });
    take_terms(terms);
  }
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
  using V = Lanes<A>;
  const Rows& rows = call.rows;
  Results<A, W, S> results;
  with_strip<A, W, S>(rows, row, count, [&](const auto& first, const auto& other) TORCHCE_HD_LAMBDA {
    sum_up<A, W, S>(
        rows, first, other, rows.classes, [&](const auto& sums) TORCHCE_HD_LAMBDA { sums.write(results.sums); },
        [&](auto& terms) TORCHCE_HD_LAMBDA {
          for (int w = 0; w < W; ++w) {
            const V lift = broadcast(A(kLift));
            terms.f.set(w, results.sums.first_max.lanes(w), results.first_against_max(w), lift);
            terms.o.set(w, results.sums.other_max.lanes(w), results.other_against_max(w), lift);
          }
        },
        [&](const auto& terms) TORCHCE_HD_LAMBDA {
          for (int w = 0; w < W; ++w) {
            results.kl_or_first.set(w, terms.first_term(w));
            results.other.set(w, terms.other_term(w));
          }
        });
  });
  if constexpr (!S::kJs) {
    for (int w = 0; w < vectors_of<A>(count); ++w) results.set_kl(w);
  }
  results.write(call, row, count, partial);
}

template <class A, class S>
void forward_group(const Forward& call, int64_t row, int count, Partial* partial) {
  const Rows& rows = call.rows;
  Results<A, 1, S> results{};
  const auto kept = kept_rows<A, 1>(rows, row, count);
  RowPosition at(rows, row);
  for (int l = 0; l < count; ++l, at.advance(rows)) {
    if (kept[l] == 0) continue;
    with_row<A, S>(rows, at, [&](const auto& first, const auto& other) TORCHCE_HD_LAMBDA {
      sum_up<A, 1, S>(
          rows, first, other, (rows.classes + kLanes<A> - 1) / kLanes<A>,
          [&](auto& sums) TORCHCE_HD_LAMBDA { sums.write_merged(results.sums, l); },
          [&](auto& terms) TORCHCE_HD_LAMBDA {
            const auto lift = broadcast(A(kLift));
            terms.f.set(0, broadcast(results.sums.first_max[l]), broadcast(results.first_against_max(0)[l]), lift);
            terms.o.set(0, broadcast(results.sums.other_max[l]), broadcast(results.other_against_max(0)[l]), lift);
          },
          [&](const auto& terms) TORCHCE_HD_LAMBDA {
            results.kl_or_first[l] = sum_of<A>(terms.first_term(0));
            results.other[l] = sum_of<A>(terms.other_term(0));
          });
    });
  }
  if constexpr (!S::kJs) results.set_kl(0);
  results.write(call, row, count, partial);
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
