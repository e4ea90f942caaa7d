// Divergences of two distributions F and O over the classes of a row, from logits or probabilities.
//
// F is softmax(f) of logits f, or F itself where its probabilities are given, and so is O. Probabilities are taken as
// they are: nothing makes them add up to 1. With f_k for log F_k of probabilities, and a lse of 0 for these:
//
//   KL(F || O) = sum_k F_k (log F_k - log O_k) = sum_k F_k (f_k - lse_f - o_k + lse_o)
//
// One pass adds up sum_k exp(f_k - f*), of O sum_k exp(o_k - o*), and sum_k exp(f_k - f*) d_k, against numbers f* and
// o* near the largest logits, with d_k = (f_k - c_f) - (o_k - c_o). The offset c = c_f - c_o is an integer near f* -
// o*: a d_k is rounded in proportion to its size, which would be what all of the f_k have beyond the o_k. It is taken
// from whichever of both is larger, which has no digits below it, and the other one is 0. The difference of two floats
// that are near each other is exact: of equal logits nothing is left, and of almost equal ones little is lost. With K
// what c and the lses leave over:
//
//   log F_k - log O_k = d_k - K,  K = (lse_f - lse_o) - c = ((f* - c_f) - (o* - c_o)) + log(sum_f / sum_o)
//   KL(F || O) = sum_k F_k d_k - K sum_k F_k
//
// Without O, all o_k and lse_o 0, it is the negative of F's entropy, -H(F) = sum_k F_k log F_k.
//
// Where F_k = 0 a class costs nothing, whatever O_k; where only O_k is 0 the divergence is infinite.
//
//   dKL/do_j = O_j sum_k F_k - F_j            of logits,  dKL/dO_j = -F_j / O_j                   of probabilities
//   dKL/df_j = F_j (log F_j - log O_j - KL)   of logits,  dKL/dF_j = log F_j - log O_j + 1        of probabilities
//
// The generalised Jensen-Shannon divergence is of both from their mixture M = beta F + (1 - beta) O:
//
//   JS = beta KL(F || M) + (1 - beta) KL(O || M)
//
// Its derivative by a probability is that of its own logarithm alone, as those of M cancel: beta log(F_j / M_j) and
// (1 - beta) log(O_j / M_j). By a logit, with J_f the first of the two terms of JS and J_o the second:
//
//   dJS/df_j = F_j (beta log(F_j / M_j) - J_f),  dJS/do_j = O_j ((1 - beta) log(O_j / M_j) - J_o)
//
// The logits are divided by a temperature first, and so are their derivatives.
#pragma once

#include "../problem.h"
#include "elementary.h"
#include "rounding.h"

namespace torchce::divergence {

// Which operands a call has, at compile time.
template <Side kFirstSide, Side kOtherSide, bool kIsJs>
struct Sides {
  static constexpr Side kFirst = kFirstSide, kOther = kOtherSide;
  static constexpr bool kJs = kIsJs;  // then exponentials are added up alone, in the first of two passes
  static constexpr bool kTwoLogits = kFirst == Side::logits && kOther == Side::logits;
  static constexpr bool kOneIsKnown = kOther != Side::none && !kTwoLogits;  // by its probabilities
};

// Calls f with the Sides of a call.
template <class F>
inline __attribute__((always_inline)) void with_sides(const Rows& rows, F f) {
  if (rows.are_js()) {
    if (rows.first.side == Side::logits) return f(Sides<Side::logits, Side::logits, true>{});
    return f(Sides<Side::probabilities, Side::logits, true>{});
  }
  if (rows.other.side == Side::none) return f(Sides<Side::logits, Side::none, false>{});
  if (rows.other.side == Side::probabilities) return f(Sides<Side::logits, Side::probabilities, false>{});
  if (rows.first.side == Side::probabilities) return f(Sides<Side::probabilities, Side::logits, false>{});
  f(Sides<Side::logits, Side::logits, false>{});
}

// value_of is what the formulas take for an element x: a logit divided by the temperature, whose inverse is `scale`, or
// a probability. The product is rounded before anything is subtracted from it. A negative probability has no logarithm,
// and is as good as a NaN.
template <Side kSide, class V, class A>
TORCHCE_HD V value_of(V x, A scale) {
  if constexpr (kSide == Side::logits) {
    return math::rounded_product(x, V{} + scale);
  } else {
    return math::select(x < V{}, V{} + A(__builtin_nan("")), x);
  }
}

// Offsets are c_f and c_o of a row.
template <class V>
struct Offsets {
  V first{}, other{};

  // Those that go with references f* and o*. An integer near a number beyond 2^22 may be the number itself.
  template <class A>
  TORCHCE_HD static Offsets near(V first_reference, V other_reference) {
    constexpr A kRound = sizeof(A) == sizeof(double) ? A(0x1.8p52) : A(0x1.8p23);
    const V c = ((first_reference - other_reference) + kRound) - kRound;
    const auto first_is_larger = math::abs(first_reference) > math::abs(other_reference);
    return {math::select(first_is_larger, c, V{}), math::select(first_is_larger, V{}, -c)};
  }
  // c.
  TORCHCE_HD V sum() const { return first - other; }
  // d_k.
  TORCHCE_HD V gap(V f, V o) const { return (f - first) - (o - other); }
};

// Bounds are the largest numbers, as which infinite differences count beside a weight of 0.
template <class V>
struct Bounds {
  V most, least;
#if defined(__CUDACC__)
  TORCHCE_HD Bounds() : most(-math::kLowest<V>), least(math::kLowest<V>) {}
#else
  TORCHCE_HD Bounds() : most{}, least{} {
    least += math::unseen(math::kLowest<math::ElementOf<V>>);
    most -= least;
  }
#endif
  // x, or the nearer bound; of a NaN the upper one.
  TORCHCE_HD V within(V x) const {
    x = x < most ? x : most;
    return x > least ? x : least;
  }
};

// KLTerms are what classes add up to: the exponentials of logits, or probabilities, of both, by how much F's are more,
// and F's weighted d_k. Of logits that are near each other the differences are exact, where both sums are rounded.
template <class V>
struct KLTerms {
  V first{}, other{}, surplus{}, gaps{};

  TORCHCE_HD KLTerms operator+(const KLTerms& added) const {
    return {first + added.first, other + added.other, surplus + added.surplus, gaps + added.gaps};
  }
};

// References are what the sums of a row are against, numbers near the largest logits; of probabilities 0.
template <class V, class S>
struct References {
  V first, other;
  Offsets<V> offsets{};

  template <class A>
  TORCHCE_HD static References lowest() {
    return {V{} + (S::kFirst == Side::logits ? math::kLowest<A> : A(0)),
            V{} + (S::kOther == Side::logits ? math::kLowest<A> : A(0))};
  }
  // What a class adds; `most` becomes the largest d_k. Exp: e^x, of x up to the headroom that references are given. The
  // logarithms of known probabilities are taken of `lift` times as much, a power of two.
  template <class Exp, class Lift = math::One>
  TORCHCE_HD KLTerms<V> terms(const Exp& exp, const Bounds<V>& bounds, V f, V o, V& most, Lift lift = {}) const {
    KLTerms<V> terms;
    V other_value{};
    terms.first = f;
    if constexpr (S::kFirst == Side::logits) terms.first = exp(f - first);
    if constexpr (S::kOther == Side::logits) {
      other_value = o;
      terms.other = exp(o - other);
    } else if constexpr (S::kOther == Side::probabilities) {
      other_value = math::log_of_positive(lift * o);
      terms.other = o;
    }
    if constexpr (S::kJs) return terms;
    if constexpr (S::kTwoLogits) terms.surplus = terms.first - terms.other;
    if constexpr (S::kFirst == Side::probabilities) f = math::log_of_positive(lift * f);
    const V gap = offsets.gap(f, other_value);
    most = gap > most ? gap : most;  // a NaN does not count
    terms.gaps = terms.first * bounds.within(gap);
    return terms;
  }
};

// PlainSum is a sum with the members of a math::CompensatedSum.
template <class V>
struct PlainSum {
  V sum{};
  TORCHCE_HD void add(V term) { sum += term; }
  template <class Factor>
  TORCHCE_HD void scale(Factor factor) {
    sum *= factor;
  }
};

// OnlineSums are the sums of some of a row's classes, which may be made relative to other references. Sum: a PlainSum
// or a math::CompensatedSum.
template <class V, class S, class Sum>
struct OnlineSums {
  References<V, S> against;
  V most;  // the largest d_k, infinite where O_k alone is 0
  Sum first{}, other{}, surplus{}, gaps{};

  template <class A>
  TORCHCE_HD static OnlineSums none() {
    return {References<V, S>::template lowest<A>(), V{} - math::kInfinityF};
  }
  TORCHCE_HD void add(const KLTerms<V>& terms) {
    first.add(terms.first);
    if constexpr (S::kOther != Side::none) other.add(terms.other);
    if constexpr (S::kJs) return;
    if constexpr (S::kTwoLogits) surplus.add(terms.surplus);
    gaps.add(terms.gaps);
  }
  // Sets the references of sums that have no terms yet.
  template <class A>
  TORCHCE_HD void start_from(V new_first, V new_other) {
    against = {new_first, new_other, Offsets<V>::template near<A>(new_first, new_other)};
  }
  // Makes the sums relative to references that are not less.
  template <class A>
  TORCHCE_HD void raise_to(V new_first, V new_other) {
    const auto moves = (against.first != new_first) | (against.other != new_other);
    if constexpr (!S::kJs) {
      const auto next = Offsets<V>::template near<A>(new_first, new_other);
      gaps.add(math::select(first.sum == V{}, V{}, (against.offsets.sum() - next.sum()) * first.sum));
      against.offsets = next;
    }
    if constexpr (S::kFirst == Side::logits) {
      const V factor = math::exp_of_negative(against.first - new_first);
      first.scale(factor);
      if constexpr (!S::kJs) {
        const V finite = math::select(factor == V{}, V{}, gaps.sum);  // it may be infinite
        gaps.scale(factor);
        gaps.sum = finite * factor;
      }
      against.first = new_first;
    }
    if constexpr (S::kOther == Side::logits) {
      other.scale(math::exp_of_negative(against.other - new_other));
      against.other = new_other;
    }
    if constexpr (!S::kJs && S::kTwoLogits) {
      const V kept = surplus.sum, difference = first.sum - other.sum;
      surplus.scale(math::select(moves, V{}, V{} + 1.0f));
      surplus.sum = math::select(moves, difference, kept);
    }
  }
};

// log_of_quotient is log(a / b) of sums, given a - b too.
template <class A, class V>
TORCHCE_HD V log_of_quotient(V a, V b, V surplus) {
  return math::log_ratio(a * math::kRatioLift<A> / b, surplus / b);
}

// remainder is K, of the references, which may be the largest logits, and sums of both.
template <class A, class V>
TORCHCE_HD V remainder(const Offsets<V>& offsets, V first_reference, V other_reference, V first, V other, V surplus) {
  return offsets.gap(first_reference, other_reference) + log_of_quotient<A>(first, other, surplus);
}

// KnownSums are a row's sums as its softmax takes them: 1 of probabilities, whatever they add up to, and of an operand
// that is not there. `weights` is what F adds up to.
template <class V>
struct KnownSums {
  V first, other, surplus, weights;

  template <class S, class Sum>
  TORCHCE_HD static KnownSums of(const OnlineSums<V, S, Sum>& row) {
    const V one = V{} + 1.0f;
    KnownSums sums{one, one, V{}, one};
    if constexpr (S::kFirst == Side::logits) sums.first = row.first.sum;
    if constexpr (S::kFirst == Side::probabilities) sums.weights = row.first.sum;
    if constexpr (S::kOther == Side::logits) sums.other = row.other.sum;
    if constexpr (S::kOther == Side::probabilities) sums.other += V{} * row.other.sum;  // NaN, if there was one
    sums.surplus = S::kTwoLogits ? row.surplus.sum : sums.first - sums.other;
    return sums;
  }
};

// kl is KL(F || O) of a row. Beside known probabilities, whose logarithms were taken of `lift` times as much, drop is
// the inverse of that.
template <class A, class V, class S, class Sum, class Drop = math::One>
TORCHCE_HD V kl(const OnlineSums<V, S, Sum>& row, Drop drop = {}) {
  const auto sums = KnownSums<V>::of(row);
  const auto& [first, other, offsets] = row.against;
  V rest;
  if constexpr (S::kOneIsKnown) {
    const V log = math::log_of_positive(drop * (S::kFirst == Side::logits ? sums.first * sums.other : sums.other));
    rest = offsets.gap(first, other) + (S::kFirst == Side::logits ? log : -log);
  } else {
    rest = remainder<A>(offsets, first, other, sums.first, sums.other, sums.surplus);
  }
  const V finite = row.gaps.sum / sums.first - rest * sums.weights;
  const V infinite = row.most + sums.first + sums.other, nan = V{} + A(__builtin_nan(""));
  const V value = math::select(row.most == V{} + math::kInfinityF, infinite, finite);
  return math::select((sums.first == V{}) | (sums.other == V{}), nan, value);  // one has no class, and no softmax
}

// kLift is what probabilities are multiplied with for MixtureLogs, so that no mixture of them is a subnormal number.
constexpr float kLift = 0x1p64f;

// MixtureLogs are log(F_k / M_k) and log(O_k / M_k) of lifted F_k and O_k, minus infinity where these are 0.
//
// F_k / M_k - 1 = (1 - beta) (F_k - O_k) / M_k, and the other is -beta of that quotient: near equality nothing cancels.
template <class V, class A>
struct MixtureLogs {
  V first, other;

  TORCHCE_HD MixtureLogs(V f, V o, A beta, A rest) {
    const V mixture = beta * f + rest * o;  // 0 where both are
    const V inverse = A(1) / math::larger(mixture, V{} + math::kSmallestNormal<A>), excess = (f - o) * inverse;
    first = math::log_ratio(f * math::kRatioLift<A> * inverse, rest * excess);
    other = math::log_ratio(o * math::kRatioLift<A> * inverse, -beta * excess);
  }
};

// reachable_log is one of MixtureLogs, but for those beyond any that there can be, minus infinity too, whose F_k or O_k
// is 0 or as good as that: with it its product would be a NaN.
template <class V>
TORCHCE_HD V reachable_log(V log) {
  constexpr float kBeyond = -2000;
  return math::select(log < V{} + kBeyond, V{} + kBeyond, log);  // a NaN stays
}

// LoweredGradient is an upstream gradient in two factors, which also take the lift out again. What is multiplied with
// them one after the other becomes subnormal only if the product is.
template <class V>
struct LoweredGradient {
  V first, second;

  TORCHCE_HD LoweredGradient() {}
  TORCHCE_HD explicit LoweredGradient(V g) {
    const auto is_small = math::abs(g) < V{} + 1.0f;
    first = math::select(is_small, V{} + 1 / kLift, g * (1 / kLift));
    second = math::select(is_small, g, V{} + 1.0f);
  }
  TORCHCE_HD V times(V lifted) const { return (lifted * first) * second; }
};

// RowInputs are what the gradients of a row are made of, the upstream gradient and what the forward found; of an
// entropy, a negative divergence, the upstream gradient is negative too.
template <class V>
struct RowInputs {
  V upstream, first_max, first_sum, other_max, other_sum, value, second_value;
};

// RowGradients turn the values of a row's classes into their gradients. First and Other make probabilities of values,
// of a largest logit, a sum and a factor: each `at` gives the factor times the probability.
template <class V, class A, class S, class First, class Other>
class RowGradients {
  static constexpr bool kFirstIsKnown = S::kFirst == Side::probabilities;
  A temperature, beta, other_share;
  V upstream, rest, first_term, other_term;
  Offsets<V> offsets;
  LoweredGradient<V> lowered;
  Bounds<V> bounds;
  First f;
  Other o;

 public:
  TORCHCE_HD RowGradients() {}
  // `of_first` says that the first distribution's gradient is wanted, which takes a logarithm more a row.
  TORCHCE_HD RowGradients(const Options& options, const RowInputs<V>& in, bool of_first)
      : temperature(A(options.temperature)),
        beta(A(options.beta)),
        other_share(A(1 - options.beta)),
        upstream(in.upstream),
        first_term(in.value),
        other_term(in.second_value),
        offsets(Offsets<V>::template near<A>(in.first_max, in.other_max)) {
    const V one = V{} + A(1), lift = V{} + A(kLift), of_logits = upstream / temperature;
    const V weights = kFirstIsKnown ? in.first_sum : one;
    lowered = LoweredGradient<V>(of_logits);
    f = First(in.first_max, in.first_sum, S::kJs ? lift : of_logits);
    o = Other(in.other_max, in.other_sum, S::kJs ? lift : of_logits * weights);
    if (S::kJs || !of_first) return;
    const V first_sum = kFirstIsKnown ? one : in.first_sum, other_sum = S::kOther == Side::logits ? in.other_sum : one;
    const V k = remainder<A>(offsets, in.first_max, in.other_max, first_sum, other_sum, first_sum - other_sum);
    // The largest number stands for an infinite divergence: minus infinity times a probability of 0 would be a NaN.
    rest = kFirstIsKnown ? k - one : k + math::select(in.value == V{} + math::kInfinityF, bounds.most, in.value);
  }

  // Turns those of a class, of both operands or of the one that is asked for.
  template <bool kOfFirst, bool kOfOther>
  TORCHCE_HD void turn(V& first, V& other) const {
    if constexpr (S::kJs) {
      const V p = f.at(first), q = o.at(other);
      const MixtureLogs<V, A> logs(p, q, beta, other_share);
      if constexpr (kOfOther) other = lowered.times(q * (other_share * reachable_log(logs.other) - other_term));
      if constexpr (kOfFirst && !kFirstIsKnown) {
        first = lowered.times(p * (beta * reachable_log(logs.first) - first_term));
      } else if constexpr (kOfFirst) {
        first = upstream * (beta * logs.first);
      }
    } else {
      const V f_part = f.at(first), value = other;
      V other_value{};
      if constexpr (S::kOther == Side::logits) other_value = value;
      if constexpr (S::kOther == Side::probabilities) other_value = math::log_of_positive(value);
      if constexpr (kOfOther && S::kOther == Side::logits) {
        other = math::rounded_difference(o.at(value), f_part);
      } else if constexpr (kOfOther) {
        const V part = -temperature * f_part;
        other = math::select(part == V{}, V{}, part / value);
      }
      if constexpr (kOfFirst && !kFirstIsKnown) {
        first = f_part * (bounds.within(offsets.gap(first, other_value)) - rest);
      } else if constexpr (kOfFirst) {
        first = upstream * (offsets.gap(math::log_of_positive(first), other_value) - rest);
      }
    }
  }
};

}  // namespace torchce::divergence
