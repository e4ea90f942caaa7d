// The logits and coefficients of a strip of rows (strip.h).
#pragma once

#include <type_traits>

#include "softmax_ce_per_row.h"
#include "strip.h"

namespace torchce::cpu::TORCHCE_LEVEL::across {

// How wide strips are: one vector for transformed logits, or compiling a SIMD level would take a quarter longer.
template <class Target>
constexpr int kWidest = kIsGeneral<Target> ? 1 : kWide;

// The strip's logits; a block of them holds their values.
template <class T, class Target, int W>
struct StripLogits : Strip<Accumulate<T>, const T, W> {
  using A = Accumulate<T>;
  [[no_unique_address]] LogitOf<Target, T> logit;

  StripLogits(const Rows& rows, int64_t row, int count)
      : Strip<A, const T, W>(rows, static_cast<const T*>(rows.logits), rows.logits_strides, row, count), logit(rows) {}

  TORCHCE_SIMD void read(int64_t k, int classes, Block<A, W>& block) const {
    Strip<A, const T, W>::read(k, classes, block);
    if constexpr (LogitOf<Target, T>::kIsPlain) return;
    for (int c = 0; c < classes; ++c) {
      for (int w = 0; w < W; ++w) block.values[c][w] = logit.value(block.values[c][w]);
    }
  }
};

// The logits' own derivatives in a block, which multiply its gradient last, when the target class's part is in it.
template <class Logit, class A, int W>
struct BlockSlopes {
  Block<A, W> slopes;

  TORCHCE_SIMD void take(const Logit& logit, int c, int w, Lanes<A> value) {
    if constexpr (!Logit::kIsPlain) slopes.values[c][w] = logit.slope(value);
  }
  TORCHCE_SIMD void multiply(int classes, Block<A, W>& gradient) const {
    if constexpr (Logit::kIsPlain) return;
    for (int c = 0; c < classes; ++c) {
      for (int w = 0; w < W; ++w) gradient.values[c][w] *= slopes.values[c][w];
    }
  }
};

// The strip's targets, seen as the coefficients u_k of its rows. kWeighted: there are class weights.
template <class Target, class A, int W, bool kWeighted>
struct StripCoefficients {
  using V = Lanes<A>;
  static constexpr bool kKnownSum = true;  // what a block's coefficients add up to is the same for all rows
  const A* weight;
  A share;
  V sum_of_block{};
  int64_t k = 0;

  TORCHCE_SIMD StripCoefficients(const Rows& rows, int64_t, int)
      : weight(static_cast<const A*>(rows.weight)), share(smoothing_of<A>(rows).even_share()) {}
  TORCHCE_SIMD void read_block(int64_t first, int count) {
    k = first;
    if constexpr (kWeighted) {
      math::StridedSum<4, A> sum;
      sum.add(count, [&](int c) TORCHCE_HD_LAMBDA { return weight[k + c] * share; });
      sum_of_block = broadcast(sum.value());
    } else {
      sum_of_block = broadcast(A(count) * share);
    }
  }
  // The Coefficient of class c of the block that was read, for vector w of the rows.
  TORCHCE_SIMD auto at(int c, int) const {
    if constexpr (kWeighted) {
      return Coefficient<V, V, true>{broadcast(weight[k + c]), broadcast(share)};
    } else {
      return Coefficient<math::One, V, true>{{}, broadcast(share)};
    }
  }
};

template <class Target, class A, int W, bool kWeighted>
  requires Target::kProbabilities
struct StripCoefficients<Target, A, W, kWeighted> {
  using V = Lanes<A>;
  using P = typename Target::Storage;
  static constexpr bool kKnownSum = false;
  static constexpr V sum_of_block{};
  const A* weight;
  Smoothing<A> smoothing;
  Strip<A, const P, W> target;
  Block<A, W> block;
  int64_t k = 0;

  TORCHCE_SIMD StripCoefficients(const Rows& rows, int64_t row, int count)
      : weight(static_cast<const A*>(rows.weight)),
        smoothing(smoothing_of<A>(rows)),
        target(rows, static_cast<const P*>(rows.target), rows.target_strides, row, count) {}
  TORCHCE_SIMD void read_block(int64_t first, int count) {
    k = first;
    target.read(first, count, block);
  }
  TORCHCE_SIMD auto at(int c, int w) const {
    const V share = smoothing.share(block.values[c][w]);
    if constexpr (kWeighted) {
      return Coefficient<V, V>{broadcast(weight[k + c]), share};
    } else {
      return coefficient(share);
    }
  }
};

// Calls f with a reference to StripCoefficients, which are too large to be copied.
template <class Target, class A, int W, class F>
TORCHCE_SIMD void with_coefficients(const Rows& rows, int64_t row, int count, F f) {
  if constexpr (Target::kSpread) {
    if (rows.weight != nullptr) {
      StripCoefficients<Target, A, W, true> weighted(rows, row, count);
      return f(weighted);
    }
  }
  StripCoefficients<Target, A, W, false> unweighted(rows, row, count);
  f(unweighted);
}

// Calls f(row of the strip, the row's value at its target class) for the classes k to k + classes - 1.
template <class A, int W, class F>
TORCHCE_SIMD void for_each_hot(const IndexedRows<A, W>& targets, int64_t k, int classes, Block<A, W>& block, F f) {
  constexpr int kRows = IndexedRows<A, W>::kRows;
  A(*values)[kRows] = reinterpret_cast<A(*)[kRows]>(block.values);
  for (int l = 0; l < targets.count; ++l) {
    const uint64_t c = uint64_t(targets.index[l] - k);
    if (c < uint64_t(classes)) f(l, values[c][l]);
  }
}

}  // namespace torchce::cpu::TORCHCE_LEVEL::across
