// Sigmoid binary cross entropy of one element, from logit x, target t, class weight w and positive weight c.
//
//   loss = w ( (1 - t) x + (1 + (c - 1) t) softplus(-x) ),  softplus(-x) = max(-x, 0) + log1p(exp(-|x|))
//        = w ( a |x| + (1 + (c - 1) t) log1p(exp(-|x|)) ),  a = 1 - t where x >= 0, c t where x < 0
//   dloss/dx = w ( (1 - t) p - c t q ),  p = sigmoid(x), q = 1 - p
//   dloss/dt = w ( (c - 1) softplus(-x) - x )
//
// The second form of the loss never subtracts two large numbers, so it stays finite and exact to a rounding where the
// true value is; likewise p and q are each computed, never as 1 minus the other.
// (Maximum likelihood over Bernoulli labels, DESIGN's seed equations 1 to 5.)
#pragma once

#include "elementary.h"

namespace torchce::sigmoid_bce {

// A weight that is absent.
struct One {};
template <class V>
TORCHCE_HD V operator*(One, V v) {
  return v;
}

// a |x|
template <class V, class PosWeight>
TORCHCE_HD V linear_part(V x, V target, PosWeight pos_weight) {
  const V a = math::select(x < V{}, pos_weight * target, V{} + 1 - target);
  return math::select(a == V{}, V{}, a * math::abs(x));  // 0 * inf = 0: a certain and right answer costs nothing
}

// exp(-|x|), the odds of the label that is less likely.
template <class V>
TORCHCE_HD V smaller_odds(V x) {
  return math::exp_of_negative(-math::abs(x));
}

template <class V>
TORCHCE_HD V loss(V x, V target, V weight, V pos_weight) {
  const V one = V{} + 1;
  return weight *
         (linear_part(x, target, pos_weight) + (one + (pos_weight - one) * target) * math::log1p_unit(smaller_odds(x)));
}

template <class V, class Weight, class PosWeight>
TORCHCE_HD V gradient(V x, V target, Weight weight, PosWeight pos_weight) {
  const V one = V{} + 1;
  const V e = smaller_odds(x);
  const V larger = math::divide(one, one + e);
  const V smaller = e * larger;
  const V p = math::select(x < V{}, smaller, larger);
  const V q = math::select(x < V{}, larger, smaller);
  return weight * ((one - target) * p - (pos_weight * target) * q);
}

template <class V>
TORCHCE_HD V target_gradient(V x, V weight, V pos_weight) {
  const V one = V{} + 1;
  const V negative_part = math::select(x < V{}, -x, V{});
  const V softplus = negative_part + math::log1p_unit(smaller_odds(x));
  // Without pos_weight the softplus has no part in it, whatever its value (0 * inf would be NaN).
  const V curved = math::select(pos_weight == one, V{}, (pos_weight - one) * softplus);
  return weight * (curved - x);
}

}  // namespace torchce::sigmoid_bce
