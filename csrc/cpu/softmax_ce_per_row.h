// What a few neighbouring rows have once each, a lane a row: targets, sums, losses, factors of the gradient. The same
// for both ways of laying the logits themselves on lanes (softmax_ce_along.h, softmax_ce_across.h).
//
// Such rows are W vectors of them. Fewer rows fill as many vectors as they need (vectors_of); their idle lanes hold
// harmless numbers and are never stored.
#pragma once

#include <cstring>

#include "../softmax_ce_row.h"
#include "rows.h"

namespace torchce::cpu::TORCHCE_LEVEL {

using namespace softmax_ce;

// The class indices of the rows.
template <class A, int W>
struct IndexedRows {
  static constexpr int kRows = W * kLanes<A>;
  int count;
  alignas(kBytes) int64_t index[kRows];  // a class even where the row is not kept
  PerRow<A, W> weight;                   // 0 for ignored rows and idle lanes, NaN for bad rows
  PerRow<A, W> kept;                     // 0 for ignored rows and idle lanes, else 1
  Smoothing<A> smoothing;
  bool any_bad, any_ignored;

  TORCHCE_SIMD IndexedRows(const Rows& rows, int64_t row, int count) : count(count), smoothing(smoothing_of<A>(rows)) {
    const int lanes = vectors_of<A>(count) * kLanes<A>;
    read_targets(rows, row, lanes);
    const A* weights = static_cast<const A*>(rows.weight);
    constexpr int kStep = kLanes<double>;
    Longs all_bad{}, all_ignored{};
    for (int l = 0; l < lanes; l += kStep) {
      Longs target;
      std::memcpy(&target, index + l, sizeof target);
      const ClassIndex<Longs> of_rows(target, rows.options.ignore_index, rows.classes);
      all_ignored |= of_rows.ignored;
      all_bad |= of_rows.bad;
      const Doubles keeps = math::select(of_rows.ignored, Doubles{}, Doubles{} + 1);
      const Doubles weighs = math::select(of_rows.bad, Doubles{} + __builtin_nan(""), keeps);
      store(kept.values + l, keeps);
      store(weight.values + l, weighs);
      std::memcpy(index + l, &of_rows.index, sizeof target);
    }
    const auto any = [](const Longs& lanes) {
      int64_t bits = 0;
      for (int l = 0; l < kStep; ++l) bits |= lanes[l];
      return bits != 0;
    };
    any_bad = any(all_bad);
    any_ignored = any(all_ignored);
    for (int l = 0; weights != nullptr && l < lanes; ++l) weight[l] *= kept[l] == 0 ? A(0) : weights[index[l]];
    for (int l = count; l < lanes; ++l) weight[l] = kept[l] = 0;
  }

  // hot is h of the rows of vector w.
  TORCHCE_SIMD Lanes<A> hot(int w) const { return smoothing.hot(weight.lanes(w)); }

 private:
  TORCHCE_SIMD void read_targets(const Rows& rows, int64_t row, int lanes) {
    RowPosition at(rows, row);
    with_index_type(rows.target_dtype, [&](auto type) {
      const auto* target = static_cast<const decltype(type)*>(rows.target);
      if (count == kRows && adjacent_rows(rows, rows.target_strides, row, kRows)) {
        target += at.offset(rows.target_strides);
        for (int l = 0; l < kRows; ++l) index[l] = target[l];
        return;
      }
      for (int l = 0; l < lanes; ++l) {
        index[l] = target[at.offset(rows.target_strides)];
        if (l + 1 < count) at.advance(rows);
      }
    });
  }
};

// What the logits of each row add up to, against a number near the largest of them; a row that is left out has none.
template <class Target, class A, int W>
struct SumsPerRow {
  using V = Lanes<A>;
  static constexpr int kSpreadVectors = Target::kSpread ? W : 1;
  PerRow<A, W> reference, max;
  PerRow<A, W> exponentials;                     // sum_k exp(x_k - reference)
  PerRow<A, kSpreadVectors> coefficients, gaps;  // sum_k u_k, sum_k u_k (x_k - reference)
  bool against_max = false;                      // whether every reference is its row's largest logit already

  // Makes the sums relative to the largest logit. The exponential is the one that was summed, so that its error, in
  // proportion to its argument, is the same with the other sign.
  TORCHCE_SIMD void refer_to_max(int vectors) {
    const math::ExpInSum<V> exp;
    for (int w = 0; w < vectors; ++w) {
      const V from = reference.lanes(w), to = max.lanes(w);
      const V sum = against_max ? exponentials.lanes(w) : exponentials.lanes(w) * exp(from - to);
      // The sum of a row with a finite logit has a term of 1, but for the rounding of its last factor. A row of -inf
      // alone has no sum, nor has a row with a NaN or +inf; the maximum of the former is -inf, of the latter a NaN.
      const auto has_sum = sum > V{};
      const V nan = broadcast(A(__builtin_nan("")));
      exponentials.set(w, math::select(has_sum, larger_or_second(broadcast<A>(1), sum), nan));
      max.set(w, math::select(has_sum, to, math::select(sum == V{}, broadcast(-math::kInfinity<A>), nan)));
      if constexpr (Target::kSpread) {
        if (!against_max) gaps.set(w, gaps.lanes(w) + coefficient(coefficients.lanes(w)).gap(from, to));
      }
    }
  }

  // terms gives the sums of vector w, relative to the largest logits, as the loss takes them.
  TORCHCE_SIMD LossTerms<V> terms(int w) const {
    LossTerms<V> of_rows{max.lanes(w), math::log(exponentials.lanes(w))};
    if constexpr (Target::kSpread) {
      of_rows.coefficients = coefficients.lanes(w);
      of_rows.gaps = gaps.lanes(w);
    }
    return of_rows;
  }
};

// Losses and statistics of the rows from their sums. `targets` and `hot_logits`, the logits of the target classes, are
// unused where the target is of probabilities.
template <class Target, class A, int W>
TORCHCE_SIMD void write_losses(const Forward& call, int64_t row, int count, SumsPerRow<Target, A, W>& sums,
                               const IndexedRows<A, W>* targets, const PerRow<A, W>& hot_logits, Partial* partial) {
  using V = Lanes<A>;
  const Rows& rows = call.rows;
  const int vectors = vectors_of<A>(count);
  sums.refer_to_max(vectors);
  const A z = A(rows.options.z_loss);
  PerRow<A, W> loss, lse{};
  SumInDouble<A> loss_sum, weight_sum;
  for (int w = 0; w < vectors; ++w) {
    const LossTerms<V> terms = sums.terms(w);
    V v{};
    if constexpr (Target::kProbabilities) {
      v = probability_loss(terms, A(rows.classes));
    } else {
      v = index_loss<Target::kSpread>(targets->hot(w), hot_logits.lanes(w), terms, A(rows.classes));
    }
    if (z != 0) v += z_loss(z, terms.lse());
    if constexpr (!Target::kProbabilities) {
      v = math::select(targets->kept.lanes(w) == V{}, V{}, v);
      weight_sum.add(targets->weight.lanes(w));
    }
    loss.set(w, v);
    if (call.lse != nullptr) lse.set(w, terms.lse());
  }
  for (int l = count; l < vectors * kLanes<A>; ++l) loss[l] = 0;
  for (int w = 0; w < vectors; ++w) loss_sum.add(loss.lanes(w));
  partial->loss += loss_sum.value();
  if constexpr (!Target::kProbabilities) {
    partial->weight += weight_sum.value();
    if (targets->any_bad && partial->bad_row < 0) partial->bad_row = first_bad_row(rows, row, row + count);
  }
  const Statistics<A> statistics(rows, call.statistics);
  sums.max.write(statistics.max + row, count);
  sums.exponentials.write(statistics.sum + row, count);
  if constexpr (Target::kProbabilities) sums.coefficients.write(statistics.coefficients + row, count);
  if (call.lse != nullptr) lse.write(static_cast<A*>(call.lse) + row, count);
  if (rows.options.reduction == Reduction::none) {
    with_float_type(call.loss_dtype, [&](auto storage) {
      auto* out = static_cast<decltype(storage)*>(call.loss) + row;
      for (int l = 0; l < count; ++l) store_one(out + l, loss[l]);
    });
  }
}

// The rows' DividedGradients. A mean's rows have one in common; others have no divisor, and a `rest` of 1.
template <class A, int W>
struct GradOutputs {
  PerRow<A, W> g;
  A rest = 1;

  TORCHCE_SIMD GradOutputs(const Backward& call, int64_t row, int count) {
    const int vectors = vectors_of<A>(count);
    RowPosition at(call.rows, row);
    if (call.rows.options.reduction != Reduction::none) {
      const DividedGradient<A> of_all(row_grad_output<A>(call, at), mean_divisor<A>(call));
      for (int w = 0; w < vectors; ++w) g.set(w, broadcast(of_all.g));
      rest = of_all.rest;
      return;
    }
    for (int l = 0; l < vectors * kLanes<A>; ++l) {
      g[l] = row_grad_output<A>(call, at);
      if (l + 1 < count) at.advance(call.rows);
    }
  }
};

// The rows' own gradients of their lse or entropy, 0 where there are none.
template <class A, int W>
TORCHCE_SIMD PerRow<A, W> own_gradients(const Rows& rows, const void* grad, const RowStrides& strides, int64_t row,
                                        int count) {
  PerRow<A, W> result{};
  if (grad == nullptr) return result;
  RowPosition at(rows, row);
  for (int l = 0; l < count; ++l, at.advance(rows)) result[l] = static_cast<const A*>(grad)[at.offset(strides)];
  return result;
}

// Which NaNs a gradient can hold: with coefficients for every class, whatever the caller's tensors hold; else only the
// plain ones that Factors makes or that were widened from 16 bits.
template <class Target>
constexpr Nans kNans = Target::kSpread ? Nans::any : Nans::plain;

// Factors holds the rows' GradientFactors and their largest logits. kTilted: their entropies may have gradients.
template <class A, int W, bool kTilted>
struct Factors {
  using V = Lanes<A>;
  PerRow<A, W> max, scale, spread, hot;
  PerRow<A, kTilted ? W : 1> tilt;
  PerRow<A, W> has_gradient;  // of indices: 0 for an ignored row, unless lse or entropy have a gradient there, else 1

  TORCHCE_SIMD Factors(const Backward& call, int64_t row, int count, const IndexedRows<A, W>* targets) {
    const int vectors = vectors_of<A>(count);
    const Statistics<A> statistics(call.rows, call.statistics);
    const auto sum = PerRow<A, W>::of(statistics.sum + row, count);
    const GradOutputs<A, W> upstream(call, row, count);
    max = PerRow<A, W>::of(statistics.max + row, count);
    const bool has_lse = call.grad_lse != nullptr, has_entropy = kTilted && call.grad_entropy != nullptr;
    const auto of_lse = own_gradients<A, W>(call.rows, call.grad_lse, call.grad_lse_strides, row, count);
    PerRow<A, W> of_entropy, mean_gaps;
    if constexpr (kTilted) {
      of_entropy = own_gradients<A, W>(call.rows, call.grad_entropy, call.grad_entropy_strides, row, count);
      if (has_entropy) mean_gaps = PerRow<A, W>::of(statistics.mean_gaps + row, count);
    }
    const A z = A(call.rows.options.z_loss);
    // Adds what comes by way of lse and entropy. Then a row without an upstream gradient has no part of the loss, be
    // that infinite.
    const auto with_outputs = [&](int w, V g, GradientFactors<V> of_rows) TORCHCE_HD_LAMBDA {
      if (has_lse || has_entropy) of_rows = of_rows.unless(g == V{});
      if (has_lse || z != 0) {
        const V lse = LossTerms<V>{max.lanes(w), math::log(sum.lanes(w))}.lse();
        of_rows.scale += slope_of_lse(of_lse.lanes(w), g, upstream.rest, z, lse) / sum.lanes(w);
      }
      if (has_entropy) of_rows.add_entropy(of_entropy.lanes(w), mean_gaps.lanes(w), sum.lanes(w));
      return of_rows;
    };
    if (targets == nullptr) {  // probabilities
      const auto coefficients = PerRow<A, W>::of(statistics.coefficients + row, count);
      for (int w = 0; w < vectors; ++w) {
        const V g = upstream.g.lanes(w);
        set(w, with_outputs(w, g, probability_factors(g, coefficients.lanes(w), sum.lanes(w))));
      }
      return;
    }
    const A sum_of_indices = sum_of_index_coefficients<A>(call);
    for (int w = 0; w < vectors; ++w) {
      const V kept = targets->kept.lanes(w), sums = sum.lanes(w);
      const V g = math::select(kept == V{}, V{}, upstream.g.lanes(w));
      auto of_rows = with_outputs(
          w, g, index_factors<true>(g, upstream.rest, targets->hot(w), targets->smoothing, sum_of_indices, sums));
      of_rows.hot = plain(of_rows.hot);
      of_rows.scale = plain(of_rows.scale);
      if constexpr (kTilted) of_rows.tilt = plain(of_rows.tilt);
      set(w, of_rows);
      auto asked = of_lse.lanes(w) != V{};
      if constexpr (kTilted) asked |= of_entropy.lanes(w) != V{};
      has_gradient.set(w, math::select(asked & (sums == sums), V{} + 1, kept));
    }
  }

 private:
  TORCHCE_SIMD void set(int w, const GradientFactors<V>& of_rows) {
    scale.set(w, of_rows.scale);
    spread.set(w, of_rows.spread);
    hot.set(w, of_rows.hot);
    if constexpr (kTilted) tilt.set(w, of_rows.tilt);
  }
  TORCHCE_SIMD static V plain(V x) { return math::select(x == x, x, broadcast(A(__builtin_nan("")))); }
};

// The exponentials of a gradient, each times what the rows' factors make of it (GradientFactors): of a row without a
// tilt its scale, which is put into the polynomial.
template <class T>
struct GradientExp : math::ScaledExp<Lanes<Accumulate<T>>, kSixteenBits<T>> {
  static constexpr bool kTilted = false;
  using Scaled = math::ScaledExp<Lanes<Accumulate<T>>, kSixteenBits<T>>;
  struct Scale : Scaled::Scale {
    TORCHCE_SIMD Scale() {}
    TORCHCE_SIMD Scale(const Scale& of_lanes, int lane) : Scaled::Scale(of_lanes, lane) {}
    TORCHCE_SIMD explicit Scale(Lanes<Accumulate<T>> scale) : Scaled::Scale(scale) {}
    template <class A, int W>
    TORCHCE_SIMD static Scale of(const Factors<A, W, kTilted>& factors, int w) {
      return Scale(factors.scale.lanes(w));
    }
  };

  TORCHCE_SIMD GradientExp() {}
};

// TiltedExp is GradientExp for rows that may have a tilt.
template <class T>
struct TiltedExp {
  static constexpr bool kTilted = true;
  using V = Lanes<Accumulate<T>>;
  using Exp = math::ScaledExp<V, kSixteenBits<T>>;
  struct Scale {
    V scale{}, tilt{};
    TORCHCE_SIMD Scale() {}
    TORCHCE_SIMD Scale(V scale, V tilt) : scale(scale), tilt(tilt) {}
    // Those of one lane, in all of them.
    TORCHCE_SIMD Scale(const Scale& of_lanes, int lane)
        : scale(of_lanes.scale[lane] - V{}), tilt(of_lanes.tilt[lane] - V{}) {}
    template <class A, int W>
    TORCHCE_SIMD static Scale of(const Factors<A, W, kTilted>& factors, int w) {
      return {factors.scale.lanes(w), factors.tilt.lanes(w)};
    }
  };

  TORCHCE_SIMD TiltedExp() {}
  TORCHCE_SIMD V operator()(V gap, const Scale& row) const {
    return exp(gap, one) * (row.scale + row.tilt * reachable_gap(gap));
  }

 private:
  Exp exp;
  typename Exp::Scale one{V{} + 1};
};

}  // namespace torchce::cpu::TORCHCE_LEVEL
