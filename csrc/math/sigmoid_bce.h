// Sigmoid binary cross entropy of one element, from logit x, target t, class weight w and positive weight c.
//
// A label t of 0 or 1 has the Bernoulli likelihood p^t q^(1-t), where p = sigmoid(x) = 1 / (1 + exp(-x)) and q = 1 - p.
// The loss is its negative logarithm with a weight on each part; for t between 0 and 1 it is the cross entropy of t, p:
//
//   loss = -w ( c t log p + (1 - t) log q ),  -log p = softplus(-x) = log(1 + exp(-x)),  -log q = x + softplus(-x)
//        = w ( (1 - t) x + ((1 - t) + c t) softplus(-x) ),  softplus(-x) = max(-x, 0) + l,  l = log1p(exp(-|x|))
//        = w ( a |x| + ((1 - t) + c t) l ),  a = 1 - t where x >= 0, c t where x < 0
//
// The derivative of softplus(-x) is -q, which leaves (1 - t) - (1 - t) q = (1 - t) p beside the positive label's part:
//
//   dloss/dx = w ( (1 - t) p - c t q )
//   dloss/dt = w ( (c - 1) softplus(-x) - x )
//            = w ( b |x| + (c - 1) l ),  b = -1 where x >= 0, c where x < 0
//
// None of these sums takes one large number from another where the result is small for all x near by, so each stays
// finite and exact to a rounding where the true value is; likewise p and q are each computed, never as 1 minus the
// other, and (1 - t) + c t not as 1 + (c - 1) t, which loses a small c beside t = 1.
#pragma once

#include "elementary.h"
#include "rounding.h"

namespace torchce::sigmoid_bce {

using math::One;  // a weight that is absent

// a |x|, where 0 * inf = 0: what has no part costs nothing.
template <class V>
TORCHCE_HD V times_magnitude(V a, V x) {
  return math::select(a == V{}, V{}, a * math::abs(x));
}

// The part of the loss that is linear in x.
template <class V, class PosWeight>
TORCHCE_HD V linear_part(V x, V target, PosWeight pos_weight) {
  return times_magnitude(math::select(x < V{}, pos_weight * target, V{} + 1 - target), x);
}

// exp(-|x|), the odds of the label that is less likely.
template <class V>
TORCHCE_HD V smaller_odds(V x) {
  return math::exp_of_negative(-math::abs(x));
}

// The sum of losses without weights. Their log1p(e) add up to the logarithm of (1 + e)(1 + e')..., of which `odds` is
// all but the 1, so that small odds are not lost beside it: two operations a term instead of a logarithm.
template <class V>
struct UnweightedSum {
  V linear{}, odds{};

  TORCHCE_HD void add(V linear_part, V smaller_odds) {
    linear += linear_part;
    odds = (odds * smaller_odds + odds) + smaller_odds;
  }
  // The sum of up to 100 terms: the product of their 1 + e is at most 2^100.
  TORCHCE_HD V value() const { return linear + math::log1p(odds); }
};

// (1 - t) + c t, the factor of log1p(exp(-|x|)).
template <class V>
TORCHCE_HD V curvature(V target, V pos_weight) {
  return (V{} + 1 - target) + pos_weight * target;
}
template <class V>
TORCHCE_HD One curvature(V, One one) {
  return one;
}

template <class V, class Weight, class PosWeight>
TORCHCE_HD V loss(V x, V target, Weight weight, PosWeight pos_weight) {
  return weight *
         (linear_part(x, target, pos_weight) + curvature(target, pos_weight) * math::log1p_unit(smaller_odds(x)));
}

// dloss/dx without w. `odds` are smaller_odds(x), as exact as the result must be.
template <class V, class PosWeight>
TORCHCE_HD V gradient(V x, V target, PosWeight pos_weight, V odds) {
  const V one = V{} + 1;
  const V larger = math::divide(one, one + odds);
  const V smaller = odds * larger;
  const V p = math::select(x < V{}, smaller, larger);
  const V q = math::select(x < V{}, larger, smaller);
  return (one - target) * p - (pos_weight * target) * q;
}

// dloss/dt without w.
template <class V>
TORCHCE_HD V target_gradient(V x, V pos_weight) {
  const V one = V{} + 1, curved = (pos_weight - one) * math::log1p_unit(smaller_odds(x));
  const auto infinite = (x < V{}) & (pos_weight == V{} + math::kInfinityF);  // the linear part is, and times 0 NaN
  return times_magnitude(math::select(x < V{}, pos_weight, -one), x) + math::select(infinite, V{}, curved);
}
template <class V>
TORCHCE_HD V target_gradient(V x, One) {
  return -x;
}

}  // namespace torchce::sigmoid_bce
