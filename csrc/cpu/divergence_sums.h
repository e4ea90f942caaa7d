// What the classes of rows add up to, from blocks of both operands (divergence_blocks.h).
#pragma once

#include "../math/divergence.h"
#include "divergence_blocks.h"

namespace torchce::cpu::TORCHCE_LEVEL::divergences {

// The sums of some rows, a lane each, as they are written and as a divergence is made of them.
template <class A, int W>
struct SumsOfRows {
  using V = Lanes<A>;
  PerRow<A, W> first_reference, other_reference, first_max, other_max, first, other, surplus, gaps, most,
      first_offset, other_offset;

  TORCHCE_SIMD RowSums<V> sums(int w) const {
    return {first_reference.lanes(w),
            other_reference.lanes(w),
            first.lanes(w),
            other.lanes(w),
            surplus.lanes(w),
            gaps.lanes(w),
            most.lanes(w),
            {first_offset.lanes(w), other_offset.lanes(w)}};
  }
};

// Adds up rows while they are read once (Milakov and Gimelshein 2018, arXiv:1805.02867): each lane against the largest
// logits of its first block, until others exceed them by much.
//
// kHasGaps: whether F's weighted differences are added up too, for a KL divergence; else exponentials alone.
template <class A, int W, class S, bool kHasGaps>
class OnlineSums {
  using V = Lanes<A>;
  using Terms = KLTerms<V>;
  static constexpr int kPartialSums = 4;  // of a block, so that none gathers more than eight roundings
  // A logit may exceed its reference by this much: one that is raised for every block would make the sums gather the
  // errors of the exponentials that rescale them.
  static constexpr A kHeadroom = 4;

  math::ExpInSum<V> exp;
  Bounds<V> bounds;
  V first_reference[W], other_reference[W], first_max[W], other_max[W], most[W];
  Offsets<V> offsets[W];
  math::CompensatedSum<V, true> first[W], other[W], surplus[W], gaps[W];
  static constexpr bool kHasSurplus = kHasGaps && S::kFirst == Side::logits && S::kOther == Side::logits;

  // Whose sums do not change with the reference: they are of probabilities, against 0.
  template <Side side>
  static constexpr bool kMoves = side == Side::logits;

  template <Side side>
  TORCHCE_SIMD static V starting_reference() {
    return kMoves<side> ? broadcast(kLowest<A>) : V{};
  }

  // Makes the sums of vector w relative to other references, which are not less.
  TORCHCE_SIMD void raise_to(V new_first, V new_other, int w) {
    const auto moves = (first_reference[w] != new_first) | (other_reference[w] != new_other);
    if constexpr (kHasGaps) {
      const auto next = Offsets<V>::template near<A>(new_first, new_other);
      gaps[w].add(math::select(first[w].sum == V{}, V{}, (offsets[w].sum() - next.sum()) * first[w].sum));
      offsets[w] = next;
    }
    if constexpr (kMoves<S::kFirst>) {
      const V factor = math::exp_of_negative(first_reference[w] - new_first);
      first[w].scale(factor);
      if constexpr (kHasGaps) {  // which may be infinite
        const auto is_zero = factor == V{};
        gaps[w].sum = math::select(is_zero, V{}, gaps[w].sum * factor);
        gaps[w].excess = math::select(is_zero, V{}, gaps[w].excess * factor);
      }
      first_reference[w] = new_first;
    }
    if constexpr (kMoves<S::kOther>) {
      other[w].scale(math::exp_of_negative(other_reference[w] - new_other));
      other_reference[w] = new_other;
    }
    if constexpr (kHasSurplus) {
      surplus[w].sum = math::select(moves, first[w].sum - other[w].sum, surplus[w].sum);
      surplus[w].excess = math::select(moves, first[w].excess - other[w].excess, surplus[w].excess);
    }
  }

  // The reference of a block whose largest logit so far is `max`.
  TORCHCE_SIMD static V raised(V reference, V max) { return math::select(max > reference + kHeadroom, max, reference); }

 public:
  TORCHCE_SIMD OnlineSums() {
    for (int w = 0; w < W; ++w) {
      first_reference[w] = first_max[w] = starting_reference<S::kFirst>();
      other_reference[w] = other_max[w] = starting_reference<S::kOther>();
      most[w] = broadcast(-math::kInfinity<A>);
      first[w] = other[w] = surplus[w] = gaps[w] = {V{}, V{}};
    }
  }

  TORCHCE_SIMD void add(const Block<A, W>& f, const Block<A, W>& o, int steps) {
    for (int w = 0; w < W; ++w) {
      for (int c = 0; c < steps; ++c) {
        if constexpr (kMoves<S::kFirst>) first_max[w] = larger_or_second(f.values[c][w], first_max[w]);
        if constexpr (kMoves<S::kOther>) other_max[w] = larger_or_second(o.values[c][w], other_max[w]);
      }
      raise_to(raised(first_reference[w], first_max[w]), raised(other_reference[w], other_max[w]), w);
      const V from_first = first_reference[w], from_other = other_reference[w];
      const Offsets<V> offsets_of_row = offsets[w];
      V most_here = most[w];
      math::StridedSum<kPartialSums, Terms> of_block;
      of_block.add(steps, [&](int c) TORCHCE_HD_LAMBDA {
        Terms terms;
        V value = f.values[c][w], weight = value, other_value{};
        if constexpr (S::kFirst == Side::logits) {
          weight = math::rounded(exp(value - from_first));
        } else if constexpr (kHasGaps) {
          value = math::log_of_positive(value);
        }
        terms.first = weight;
        if constexpr (S::kOther == Side::logits) {
          other_value = o.values[c][w];
          terms.other = math::rounded(exp(other_value - from_other));
        } else if constexpr (S::kOther == Side::probabilities) {
          terms.other = o.values[c][w];
          other_value = math::log_of_positive(terms.other);
        }
        if constexpr (kHasSurplus) terms.surplus = terms.first - terms.other;
        if constexpr (kHasGaps) {
          const V gap = offsets_of_row.gap(value, other_value);
          most_here = larger_or_second(gap, most_here);
          terms.gaps = weight * bounds.within(gap);
        }
        return terms;
      });
      most[w] = most_here;
      const Terms sums = of_block.value();
      first[w].add(sums.first);
      if constexpr (S::kOther != Side::none) other[w].add(sums.other);
      if constexpr (kHasSurplus) surplus[w].add(sums.surplus);
      if constexpr (kHasGaps) gaps[w].add(sums.gaps);
    }
  }

  // What the rows of a strip have.
  TORCHCE_SIMD void write(SumsOfRows<A, W>& rows) const {
    for (int w = 0; w < W; ++w) {
      rows.first_reference.set(w, first_reference[w]);
      rows.other_reference.set(w, other_reference[w]);
      rows.first_max.set(w, first_max[w]);
      rows.other_max.set(w, other_max[w]);
      rows.first.set(w, first[w].sum);
      rows.other.set(w, other[w].sum);
      rows.surplus.set(w, surplus[w].sum);
      rows.gaps.set(w, gaps[w].sum);
      rows.most.set(w, most[w]);
      rows.first_offset.set(w, offsets[w].first);
      rows.other_offset.set(w, offsets[w].other);
    }
  }

  // What the lanes of a single row have together, as that of row l.
  TORCHCE_SIMD void write_merged(SumsOfRows<A, 1>& rows, int l) {
    static_assert(W == 1);
    raise_to(broadcast(max_of<A>(first_reference[0])), broadcast(max_of<A>(other_reference[0])), 0);
    rows.first_reference[l] = first_reference[0][0];
    rows.other_reference[l] = other_reference[0][0];
    rows.first_max[l] = max_of<A>(first_max[0]);
    rows.other_max[l] = max_of<A>(other_max[0]);
    rows.first[l] = sum_of<A>(first[0].sum);
    rows.other[l] = sum_of<A>(other[0].sum);
    rows.surplus[l] = sum_of<A>(surplus[0].sum);
    rows.gaps[l] = sum_of<A>(gaps[0].sum);
    rows.most[l] = max_of<A>(most[0]);
    rows.first_offset[l] = offsets[0].first[0];
    rows.other_offset[l] = offsets[0].other[0];
  }
};

// What makes probabilities of the logits of rows, a vector of rows in each of W.
template <class A, int W, Side kSide>
struct Softmax {
  using V = Lanes<A>;
  using Exp = math::ScaledExp<V, false>;
  Exp exp;
  V max[W];
  typename Exp::Scale scale[W];

  TORCHCE_SIMD Softmax() {}
  // `factor` times the probabilities.
  TORCHCE_SIMD void set(int w, V largest, V sum, V factor) {
    max[w] = largest;
    scale[w] = typename Exp::Scale(factor / sum);
  }
  TORCHCE_SIMD V at(int w, V x) const { return exp(x - max[w], scale[w]); }
};
template <class A, int W>
struct Softmax<A, W, Side::probabilities> {
  using V = Lanes<A>;
  V factor[W];

  TORCHCE_SIMD Softmax() {}
  TORCHCE_SIMD void set(int w, V, V, V of_rows) { factor[w] = of_rows; }
  TORCHCE_SIMD V at(int w, V probability) const { return factor[w] * probability; }
};

// The two terms of a JS divergence, of rows whose lifted probabilities are known.
template <class A, int W, class S>
class MixtureSums {
  using V = Lanes<A>;
  struct Terms {
    V first{}, other{};
    TORCHCE_SIMD Terms operator+(const Terms& added) const { return {first + added.first, other + added.other}; }
  };
  A beta, rest;

 public:
  Softmax<A, W, S::kFirst> f;
  Softmax<A, W, S::kOther> o;
  math::CompensatedSum<V, true> first[W], other[W];

  TORCHCE_SIMD explicit MixtureSums(const Options& options) : beta(A(options.beta)), rest(A(1 - options.beta)) {
    for (int w = 0; w < W; ++w) first[w] = other[w] = {V{}, V{}};
  }
  TORCHCE_SIMD void add(const Block<A, W>& first_block, const Block<A, W>& other_block, int steps) {
    for (int w = 0; w < W; ++w) {
      math::StridedSum<2, Terms> of_block;
      of_block.add(steps, [&](int c) TORCHCE_HD_LAMBDA {
        const V p = f.at(w, first_block.values[c][w]), q = o.at(w, other_block.values[c][w]);
        const MixtureLogs<V, A> logs(p, q, beta, rest);
        return Terms{p * reachable_log(logs.first), q * reachable_log(logs.other)};
      });
      const Terms sums = of_block.value();
      first[w].add(sums.first);
      other[w].add(sums.other);
    }
  }
  TORCHCE_SIMD V first_term(int w) const { return beta * (first[w].sum * (1 / kLift)); }
  TORCHCE_SIMD V other_term(int w) const { return rest * (other[w].sum * (1 / kLift)); }
};

}  // namespace torchce::cpu::TORCHCE_LEVEL::divergences
