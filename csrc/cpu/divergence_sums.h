// What the classes of rows add up to, from blocks of both operands (divergence_blocks.h).
#pragma once

#include "divergence_blocks.h"

namespace torchce::cpu::TORCHCE_LEVEL::divergences {

// Lift is a power of two times which logarithms of known probabilities are taken. Where both distributions are near
// each other, every d_k is about the logarithm of the logits' sum, and the sum of what is weighted with it would lose
// digits; of lifted probabilities it is about 0. A lift is chosen by the first class of a row: 2^n is that sum
// then, and n at most the binary logarithm of their number.
template <class V, class S>
class Lift {
  using A = math::ElementOf<V>;
  V n{};  // its binary logarithm

  TORCHCE_SIMD static V power(V n) {
    using Words = typename math::WordsOf<V>::type;
    const V shifted = n + math::kRoundToInteger<A>;
    return math::from_bits(typename math::BitsOf<V>::type(
        (Words(math::to_bits(shifted)) << math::kMantissaBits<V>)+Words(math::to_bits(V{} + A(1)))));
  }

 public:
  TORCHCE_SIMD Lift() {}
  // From the first classes of rows, or with is_one_row of one, whose first class is in the first lane.
  TORCHCE_SIMD Lift(const References<V, S>& against, V f, V o, A most, bool is_one_row) {
    if constexpr (S::kFirst == Side::probabilities) f = math::log_of_positive(f);
    if constexpr (S::kOther == Side::probabilities) o = math::log_of_positive(o);
    const V gap = against.offsets.gap(f, o) * A(S::kFirst == Side::probabilities ? -1 : 1);
    n = (gap * math::kLog2E<A> + math::kRoundToInteger<A>)-math::kRoundToInteger<A>;
    n = math::select((n > V{}) & (n <= V{} + most), n, V{});
    if (is_one_row) n = broadcast(n[0]);
  }
  TORCHCE_SIMD V factor() const { return power(n); }
  TORCHCE_SIMD V inverse() const { return power(-n); }
};
template <class V, class S>
  requires(!S::kOneIsKnown || S::kJs)
class Lift<V, S> {
  using A = math::ElementOf<V>;

 public:
  TORCHCE_SIMD Lift() {}
  TORCHCE_SIMD Lift(const References<V, S>&, V, V, A, bool) {}
  TORCHCE_SIMD math::One factor() const { return {}; }
  TORCHCE_SIMD math::One inverse() const { return {}; }
};

// Adds up rows while they are read once (Milakov and Gimelshein 2018, arXiv:1805.02867): each lane against the largest
// logits of its first block, until others exceed them by much.
//
// kAlong: the lanes are of one row, and are merged in the end.
template <class A, int W, class S, bool kAlong>
class RunningSums {
  using V = Lanes<A>;
  using Sums = OnlineSums<V, S, math::CompensatedSum<V, true>>;
  static constexpr int kPartialSums = 4;  // of a block, so that none gathers more than eight roundings
  // A logit may exceed its reference by this much: one that is raised for every block would make the sums gather the
  // errors of the exponentials that rescale them.
  static constexpr A kHeadroom = 4;

  // Rounded, so that exponentials of equal logits are equal, whatever is made of them.
  struct RoundedExp {
    math::ExpInSum<V> exp;
    TORCHCE_SIMD RoundedExp() {}
    TORCHCE_SIMD V operator()(V x) const { return math::rounded(exp(x)); }
  };
  RoundedExp exp;
  Bounds<V> bounds;
  Sums sums[W];
  V first_max[W], other_max[W];
  Lift<V, S> lift[W];
  A most_lift;
  bool are_against_largest = true;  // as those of a single block are

  // The reference of a block whose largest logit so far is `max`.
  TORCHCE_SIMD static V raised(V reference, V max) { return math::select(max > reference + kHeadroom, max, reference); }

 public:
  TORCHCE_SIMD explicit RunningSums(int64_t classes) : most_lift(A(64 - __builtin_clzll(uint64_t(classes)))) {
    for (int w = 0; w < W; ++w) {
      sums[w] = Sums::template none<A>();
      first_max[w] = sums[w].against.first;
      other_max[w] = sums[w].against.other;
    }
  }

  // `is_first` says that no block was added before.
  TORCHCE_SIMD void add(const Block<A, W>& f, const Block<A, W>& o, int steps, bool is_first) {
    are_against_largest = is_first;
    for (int w = 0; w < W; ++w) {
      for (int c = 0; c < steps; ++c) {
        if constexpr (S::kFirst == Side::logits) first_max[w] = larger_or_second(f.values[c][w], first_max[w]);
        if constexpr (S::kOther == Side::logits) other_max[w] = larger_or_second(o.values[c][w], other_max[w]);
      }
      const V next_first = raised(sums[w].against.first, first_max[w]);
      const V next_other = raised(sums[w].against.other, other_max[w]);
      if (is_first) {
        sums[w].template start_from<A>(next_first, next_other);
        lift[w] = Lift<V, S>(sums[w].against, f.values[0][w], o.values[0][w], most_lift, kAlong);
      } else {
        sums[w].template raise_to<A>(next_first, next_other);
      }
      const References<V, S> against = sums[w].against;
      V most = sums[w].most;
      math::StridedSum<kPartialSums, KLTerms<V>> of_block;
      of_block.add(steps, [&](int c) TORCHCE_HD_LAMBDA {
        return against.terms(exp, bounds, f.values[c][w], S::kOther == Side::none ? V{} : o.values[c][w], most,
                             lift[w].factor());
      });
      sums[w].add(of_block.value());
      sums[w].most = most;
    }
  }

  // The divergences of the rows of vector w.
  TORCHCE_SIMD V divergence(int w) const { return kl<A>(sums[w], lift[w].inverse()); }
  // Their largest logits, and their sums against these.
  TORCHCE_SIMD V first_largest(int w) const { return first_max[w]; }
  TORCHCE_SIMD V other_largest(int w) const { return other_max[w]; }
  TORCHCE_SIMD V first_sum(int w) const {
    if (S::kFirst != Side::logits || are_against_largest) return sums[w].first.sum;
    return sums[w].first.sum * math::exp_of_negative(sums[w].against.first - first_max[w]);
  }
  TORCHCE_SIMD V other_sum(int w) const {
    if (are_against_largest) return sums[w].other.sum;
    return sums[w].other.sum * math::exp_of_negative(sums[w].against.other - other_max[w]);
  }

  // Makes what the lanes of a single row have together the sums of each of them.
  TORCHCE_SIMD void merge_lanes() {
    static_assert(W == 1);
    are_against_largest = false;
    Sums& all = sums[0];
    all.template raise_to<A>(broadcast(max_of<A>(all.against.first)), broadcast(max_of<A>(all.against.other)));
    for (auto* sum : {&all.first, &all.other, &all.surplus, &all.gaps}) sum->sum = broadcast(sum_of<A>(sum->sum));
    all.most = broadcast(max_of<A>(all.most));
    first_max[0] = broadcast(max_of<A>(first_max[0]));
    other_max[0] = broadcast(max_of<A>(other_max[0]));
  }
};

// What makes probabilities, times a factor, of the values of a vector of rows.
template <class A, Side kSide>
class Softmax {
  using V = Lanes<A>;
  using Exp = math::ScaledExp<V, false>;
  Exp exp;
  V max{};
  typename Exp::Scale scale;

 public:
  TORCHCE_SIMD Softmax() {}
  TORCHCE_SIMD Softmax(V max, V sum, V factor) : max(max), scale(factor / sum) {}
  TORCHCE_SIMD V at(V x) const { return exp(x - max, scale); }
};
template <class A>
class Softmax<A, Side::probabilities> {
  using V = Lanes<A>;
  V factor{};

 public:
  TORCHCE_SIMD Softmax() {}
  TORCHCE_SIMD Softmax(V, V, V factor) : factor(factor) {}
  TORCHCE_SIMD V at(V probability) const { return factor * probability; }
};
template <class A>
class Softmax<A, Side::none> {
  using V = Lanes<A>;

 public:
  TORCHCE_SIMD Softmax() {}
  TORCHCE_SIMD Softmax(V, V, V) {}
  TORCHCE_SIMD V at(V) const { return {}; }
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
  Softmax<A, S::kFirst> f[W];
  Softmax<A, S::kOther> o[W];
  math::CompensatedSum<V, true> first[W], other[W];

  TORCHCE_SIMD explicit MixtureSums(const Options& options) : beta(A(options.beta)), rest(A(1 - options.beta)) {
    for (int w = 0; w < W; ++w) first[w] = other[w] = {V{}, V{}};
  }
  TORCHCE_SIMD void add(const Block<A, W>& first_block, const Block<A, W>& other_block, int steps) {
    for (int w = 0; w < W; ++w) {
      math::StridedSum<2, Terms> of_block;
      of_block.add(steps, [&](int c) TORCHCE_HD_LAMBDA {
        const V p = f[w].at(first_block.values[c][w]), q = o[w].at(other_block.values[c][w]);
        const MixtureLogs<V, A> logs(p, q, beta, rest);
        return Terms{p * reachable_log(logs.first), q * reachable_log(logs.other)};
      });
      const Terms sums = of_block.value();
      first[w].add(sums.first);
      other[w].add(sums.other);
    }
  }
  // Makes what the lanes of a single row have together the sums of each of them.
  TORCHCE_SIMD void merge_lanes() {
    static_assert(W == 1);
    for (auto* sum : {&first[0], &other[0]}) sum->sum = broadcast(sum_of<A>(sum->sum));
  }
  TORCHCE_SIMD V first_term(int w) const { return beta * (first[w].sum * (1 / kLift)); }
  TORCHCE_SIMD V other_term(int w) const { return rest * (other[w].sum * (1 / kLift)); }
};

}  // namespace torchce::cpu::TORCHCE_LEVEL::divergences
