// Divergences of two distributions F and O over the classes of a row, from logits or probabilities.
//
// F is softmax(f) of logits f, or F itself where its probabilities are given, and so is O. Probabilities are taken as
// they are: nothing makes them add up to 1. With f_k for log F_k of probabilities, and a lse of 0 for these:
//
//   KL(F || O) = sum_k F_k (log F_k - log O_k) = sum_k F_k (f_k - lse_f - o_k + lse_o)
//
// One pass adds up sum_k exp(f_k - f*), the same of o, and sum_k exp(f_k - f*) d_k, d_k = (f_k - c) - o_k, against
// numbers f* and o* near the largest. c, an integer near f* - o*, is there because d_k would be rounded in proportion
// to a number that all of the f_k have beyond the o_k. The difference of two floats that are near each other is exact:
// of equal logits nothing is left, and of almost equal ones little is lost. With K what c and the lses leave over:
//
//   log F_k - log O_k = d_k - K,  K = (lse_f - lse_o) - c = ((f* - c) - o*) + log(sum_f / sum_o)
//   KL(F || O) = sum_k F_k d_k - K sum_k F_k
//
// Without O, all o_k and lse_o 0, it is the negative of F's entropy, -H(F) = sum_k F_k log F_k.
//
// Where F_k = 0 a class costs nothing, whatever O_k; where only O_k is 0 the divergence is infinite.
//
//   dKL/do_j = O_j sum_k F_k - F_j            of logits,  dKL/dO_j = -F_j / O_j                   of probabilities
//   dKL/df_j = F_j (log F_j - log O_j - KL)   of logits,  dKL/dF_j = log F_j - log O_j + 1        of probabilities
//
// The generalised Jensen-Shannon divergence has the mixture M = beta F + (1 - beta) O in the place of both others:
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

#include "elementary.h"
#include "rounding.h"

namespace torchce::divergence {

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
  TORCHCE_HD Bounds() : most(sizeof(V) == sizeof(double) ? V(__DBL_MAX__) : V(__FLT_MAX__)), least(-most) {}
#else
  TORCHCE_HD Bounds() : most{}, least{} {
    using A = math::ElementOf<V>;
    most += math::unseen(sizeof(A) == sizeof(double) ? A(__DBL_MAX__) : A(__FLT_MAX__));
    least -= most;
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

// RowSums are the sums of a whole row, with what they are against; of probabilities the reference is 0.
template <class V>
struct RowSums {
  V first_reference, other_reference;
  V first, other, surplus, gaps;  // as of KLTerms
  V most;                // the largest d_k, infinite where O_k alone is 0
  Offsets<V> offsets;
};

// log_of_quotient is log(a / b) of sums, given a - b too.
template <class V>
TORCHCE_HD V log_of_quotient(V a, V b, V surplus) {
  return math::log_ratio(a / b, surplus / b);
}

// remainder is K, of the references, which may be the largest logits, and sums of both.
template <class V>
TORCHCE_HD V remainder(const Offsets<V>& offsets, V first_reference, V other_reference, V first, V other, V surplus) {
  return offsets.gap(first_reference, other_reference) + log_of_quotient(first, other, surplus);
}

// kl is KL(F || O) from a row's sums; `first` and `other` are 1 of an operand that has probabilities or is not there,
// and `weights` is 1 of logits.
template <class V>
TORCHCE_HD V kl(const RowSums<V>& row, V first, V other, V surplus, V weights) {
  const V rest = remainder(row.offsets, row.first_reference, row.other_reference, first, other, surplus);
  const V finite = row.gaps / first - rest * weights;
  return math::select(row.most == V{} + math::kInfinityF, row.most + first + other, finite);
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
    constexpr A kSmallest = sizeof(A) == sizeof(double) ? A(__DBL_MIN__) : A(__FLT_MIN__);  // where both are 0
    const V mixture = beta * f + rest * o;
    const V inverse = A(1) / math::larger(mixture, V{} + kSmallest), excess = (f - o) * inverse;
    first = math::log_ratio(f * inverse, rest * excess);
    other = math::log_ratio(o * inverse, -beta * excess);
  }
};

// reachable_log is one of MixtureLogs, but for those beyond any that there can be, minus infinity too, whose F_k or O_k
// is 0 or as good as that: with it its product would be a NaN.
template <class V>
TORCHCE_HD V reachable_log(V log) {
  constexpr float kBeyond = -2000;
  return math::select(log > V{} + kBeyond, log, V{} + kBeyond);
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

}  // namespace torchce::divergence
