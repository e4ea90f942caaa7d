// Softmax cross entropy of one row, from logits x, its two statistics and the coefficients of its target.
//
// A label t, 1 at one of C classes and 0 at the others, has the multinomial likelihood prod_k p_k^t_k, p = softmax(x).
// The loss is its negative logarithm with a coefficient c_k on each class, which for probabilities t is the cross
// entropy of t, p. As p_k = exp(x_k) / sum_i exp(x_i) = exp(x_k - lse):
//
//   loss = -sum_k c_k log p_k = sum_k c_k (lse - x_k),  lse = log(sum_k exp(x_k))
//
// The derivative of lse is p_j. Every class's term adds c_k p_j to the gradient, and class j's own subtracts c_j:
//
//   dloss/dx_j = p_j sum_k c_k - c_j
//
// Class weights w and smoothing eps, which moves that share of t evenly onto all classes (Szegedy et al. 2016,
// arXiv:1512.00567), make c_k = w_k ((1 - eps) t_k + eps / C). What only a target class y has is kept apart from that:
//
//   c_k = b u_k + h [k == y]
//   class index y:    h = (1 - eps) w_y,  b = eps / C,  u_k = w_k
//   probabilities t:  h = 0,              b = 1,        u_k = w_k ((1 - eps) t_k + eps / C)
//
// So with the sums U = sum_k u_k and G = sum_k u_k (x_k - max), and lse = max + log(sum), sum = sum_k exp(x_k - max):
//
//   loss = h (lse - x_y) + b (U log(sum) - G)
//   dloss/dx_j = exp(x_j - max) A / sum - b u_j - h [j == y],  A = h + b U
//   dloss/dt_j = (1 - eps) w_j (lse - x_j), of probabilities
//
// max and sum are kept apart: a float32 lse near 1e4 is rounded to 1e-3, which would be the relative error of every
// gradient; and the sum, not its logarithm, spares the backward one rounding.
#pragma once

#include "elementary.h"

namespace torchce::softmax_ce {

// ClassIndex says of a target whether its row is left out (ignored) or it is none of the classes (bad): neither of an
// ordinary row. I is an integer or a vector of integers.
template <class I>
struct ClassIndex {
  using Answer = decltype(I{} == I{});
  Answer ignored, bad;
  I index;  // the class; 0 where the target is ignored or bad, so that reading a logit there is safe
  TORCHCE_HD ClassIndex(I target, int64_t ignore_index, int64_t classes)
      : ignored(target == ignore_index),
        bad(((target < 0) | (target >= classes)) & (target != ignore_index)),
        index(math::select(ignored | bad, I{}, target)) {}
};

// Smoothing is what a call says of label smoothing, and makes of it the coefficients h, b and u_k.
template <class A>
struct Smoothing {
  A label_smoothing, classes;  // eps, C

  // h of rows whose target class has the weight `weight`.
  template <class V>
  TORCHCE_HD V hot(V weight) const {
    return (A(1) - label_smoothing) * weight;
  }
  // b of rows with a class index.
  TORCHCE_HD A uniform() const { return label_smoothing / classes; }
  // u_k of a class that the target gives the probability `probability`.
  template <class V>
  TORCHCE_HD V coefficient(V probability, V weight) const {
    return weight * (probability * (A(1) - label_smoothing) + uniform());
  }
};

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
TORCHCE_HD V spread_loss(A uniform, V sum_coefficients, V sum_gaps, V log_sum, A classes) {
  const V loss = sum_coefficients * log_sum - sum_gaps, scaled = sum_coefficients * 16.0f;
  const auto infinite = (loss != loss) & (scaled - scaled != V{});
  return uniform * math::select(infinite, scaled * (classes - A(1)) + log_sum, loss);  // of a NaN it is NaN
}

// LossTerms are what a row's classes add up to, as its loss takes it.
template <class V>
struct LossTerms {
  V max, log_sum;
  V coefficients{}, gaps{};  // U and G, where the loss has a part of every class
};

// index_loss is the loss of a row with a class index. A NaN for h, where the index is no class, makes it NaN. kSpread:
// there may be smoothing.
template <bool kSpread, class V, class A>
TORCHCE_HD V index_loss(V hot, V x_y, const LossTerms<V>& terms, const Smoothing<A>& smoothing) {
  V loss = hot_loss(hot, x_y, terms.max, terms.log_sum);
  if constexpr (kSpread) {
    loss += spread_loss(smoothing.uniform(), terms.coefficients, terms.gaps, terms.log_sum, smoothing.classes);
  }
  return loss;
}

// probability_loss is the loss of a row with probabilities.
template <class V, class A>
TORCHCE_HD V probability_loss(const LossTerms<V>& terms, A classes) {
  return spread_loss(A(1), terms.coefficients, terms.gaps, terms.log_sum, classes);
}

// GradientFactors make the gradient of each class of a row, the upstream gradient g in it:
// g dloss/dx_j = exp(x_j - max) scale - spread u_j - hot [j == y]
template <class V>
struct GradientFactors {
  V scale, spread, hot;
};

// index_factors gives those of a row with a class index. `sum_coefficients` is U, but 0 where there is no smoothing, as
// 0 times an infinite class weight would be NaN. kSpread: there may be smoothing.
template <bool kSpread, class V, class A>
TORCHCE_HD GradientFactors<V> index_factors(V grad_output, V hot, const Smoothing<A>& smoothing, A sum_coefficients,
                                            V sum) {
  GradientFactors<V> factors{{}, {}, grad_output * hot};
  V of_all = factors.hot;
  if constexpr (kSpread) {
    const V spread = grad_output * smoothing.uniform();
    factors.spread = math::select(spread == spread, spread, V{});  // NaN where g is infinite and there is no smoothing
    of_all += factors.spread * sum_coefficients;
  }
  factors.scale = of_all / sum;
  return factors;
}

// probability_factors gives those of a row with probabilities.
template <class V>
TORCHCE_HD GradientFactors<V> probability_factors(V grad_output, V sum_coefficients, V sum) {
  return {grad_output * sum_coefficients / sum, grad_output, V{}};
}

// scaled_probability is exp(x_j - max) scale, the part of a class's gradient that takes an exponential.
template <class V>
TORCHCE_HD V scaled_probability(V x, V max, V scale) {
  return math::exp_of_negative(x - max) * scale;
}

// class_gradient is the gradient of a class, given scaled_probability; at the target class `hot` is subtracted from it.
template <class V, class Spread>
TORCHCE_HD V class_gradient(V scaled_probability, Spread spread, V coefficient) {
  return scaled_probability - spread * coefficient;
}

// d loss / d t_j = (1 - eps) w_j (lse - x_j), from hot = (1 - eps) w_j
template <class V>
TORCHCE_HD V target_gradient(V x, V hot, V max, V log_sum) {
  return hot * (log_sum - (x - max));
}

}  // namespace torchce::softmax_ce
