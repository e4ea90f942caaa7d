// Softmax cross entropy of one row, from logits x, its two statistics and the coefficients of its target.
//
//   lse    = max + log(sum),  sum = sum_k exp(x_k - max)
//   loss   = h (lse - x_y) + b sum_k u_k (lse - x_k)
//   dloss/dx_j = p_j A - b u_j - h [j == y],  p_j = exp(x_j - max) / sum,  A = h + b sum_k u_k
//
// Class index y with weight w and smoothing eps:  h = (1 - eps) w_y,  b = eps / C,  u_k = w_k.
// Probabilities t:                                h = 0,  b = 1,  u_k = w_k ((1 - eps) t_k + eps / C).
// (Maximum likelihood over multinomial labels: minus the logarithm of the product of p_k^t_k, with p = softmax(x);
// smoothing after Szegedy et al. 2016, arXiv:1512.00567.)
//
// max and sum are kept apart: a float32 lse near 1e4 is rounded to 1e-3, which would be the relative error of every
// gradient; and the sum, not its logarithm, spares the backward one rounding.
#pragma once

#include "elementary.h"

namespace torchce::softmax_ce {

// The coefficients of a row whose target is a class index, or of a vector V of such rows.
template <class V, class A = V>
struct IndexTarget {
  V hot;      // h
  A uniform;  // b, 0 without smoothing
  TORCHCE_HD IndexTarget(V weight, A label_smoothing, A classes)
      : hot((A(1) - label_smoothing) * weight), uniform(label_smoothing / classes) {}
};

// u_k of a probability target.
template <class V, class A>
TORCHCE_HD V probability_coefficient(V target, V weight, A label_smoothing, A classes) {
  return weight * (target * (A(1) - label_smoothing) + label_smoothing / classes);
}

// u_k (x_k - max), with 0 * -inf = 0: a class that the target excludes costs nothing, however unlikely it is.
template <class V>
TORCHCE_HD V weighted_gap(V coefficient, V x, V max) {
  return math::select(coefficient == V{}, V{}, coefficient * (x - max));
}

// h (lse - x_y), with 0 * inf = 0. A row with a NaN has a NaN log_sum, which must show even under h = 0.
template <class V>
TORCHCE_HD V hot_loss(V hot, V x_y, V max, V log_sum) {
  return math::select(hot == V{}, hot * log_sum, hot * ((max - x_y) + log_sum));
}

// b sum_k u_k (lse - x_k), from U = sum_k u_k and G = sum_k u_k (x_k - max)
//
// An infinite u_k makes the loss infinite: lse - x_k > 0, but for a single class. The formula gives NaN where G met
// infinity times a gap of 0, or, while its terms were against an earlier maximum, infinities of both signs. Products
// with a gap may be such infinities where 16 U is beyond the largest number; then the loss would be too.
template <class V, class A>
TORCHCE_HD V spread_loss(V uniform, V sum_coefficients, V sum_gaps, V log_sum, A classes) {
  const V loss = sum_coefficients * log_sum - sum_gaps, scaled = sum_coefficients * 16.0f;
  const auto infinite = (loss != loss) & (scaled - scaled != V{});
  return uniform * math::select(infinite, scaled * (classes - A(1)) + log_sum, loss);  // of a NaN it is NaN
}

// p_j times whatever the row multiplies it with: scale = grad_output * A / sum
template <class V>
TORCHCE_HD V scaled_probability(V x, V max, V scale) {
  return math::exp_of_negative(x - max) * scale;
}

// d loss / d t_j = -(1 - eps) w_j (x_j - lse)
template <class V, class A>
TORCHCE_HD V target_gradient(V x, V weight, V max, V log_sum, A label_smoothing) {
  return weight * (A(1) - label_smoothing) * (log_sum - (x - max));
}

}  // namespace torchce::softmax_ce
