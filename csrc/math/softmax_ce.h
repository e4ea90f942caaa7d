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
//   c_k = u_k + h [k == y]
//   class index y:    h = (1 - eps) w_y,  u_k = w_k eps / C
//   probabilities t:  h = 0,              u_k = w_k ((1 - eps) t_k + eps / C)
//
// So with the sums U = sum_k u_k and G = sum_k u_k (x_k - max), and lse = max + log(sum), sum = sum_k exp(x_k - max):
//
//   loss = h (lse - x_y) + U log(sum) - G
//   dloss/dx_j = exp(x_j - max) A / sum - u_j - h [j == y],  A = h + U
//   dloss/dt_j = (1 - eps) w_j (lse - x_j), of probabilities
//
// A z-loss of z adds z lse^2 to the loss (Chowdhery et al. 2022, PaLM, arXiv:2204.02311), which keeps lse near 0, and
// 2 z lse p_j to the gradient: as any loss that is made of lse alone, p_j times its derivative by lse.
//
// The entropy of p is H = -sum_k p_k log p_k. With the mean gap M = sum_k p_k (x_k - max), as log p_k = x_k - lse:
//
//   H = log(sum) - M
//   dH/dx_j = -p_j (log p_j + H) = p_j (M - (x_j - max))
//
// max and sum are kept apart: a float32 lse near 1e4 is rounded to 1e-3, which would be the relative error of every
// gradient; and the sum, not its logarithm, spares the backward one rounding.
#pragma once

#include "elementary.h"
#include "rounding.h"

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

// Smoothing is what a call says of label smoothing, and makes of it h and the shares of u_k.
template <class A>
struct Smoothing {
  A label_smoothing, unsmoothed, classes;  // eps, 1 - eps, C

  // Taken from a double, as 1 - eps of a float eps has lost digits where eps is near 1.
  TORCHCE_HD Smoothing(double eps, int64_t classes)
      : label_smoothing(A(eps)), unsmoothed(A(1 - eps)), classes(A(classes)) {}

  // h of rows whose target class has the weight `weight`.
  template <class V>
  TORCHCE_HD V hot(V weight) const {
    return unsmoothed * weight;
  }
  // eps / C, the share of each class of a row with a class index.
  TORCHCE_HD A even_share() const { return label_smoothing / classes; }
  // (1 - eps) t_k + eps / C of a class that the target gives the probability `probability`.
  template <class V>
  TORCHCE_HD V share(V probability) const {
    return probability * unsmoothed + even_share();
  }
};

// Coefficient is u_k as its factors: w_k and the class's share of the label. They are kept apart because u_k may
// underflow where its product with a large gap does not. Weight: V, or One where there is none. kEven: every class has
// the same share, which is not 0.
template <class Weight, class V, bool kEven = false>
struct Coefficient {
  Weight weight;
  V share;

  TORCHCE_HD V value() const { return weight * share; }
  // u_k (x_k - max), with 0 * -inf = 0: a class that the target excludes costs nothing, however unlikely it is.
  TORCHCE_HD V gap(V x, V max) const {
    const V product = weight * (share * (x - max));
    if constexpr (!math::kIsOne<Weight> && kEven) {
      return math::select(weight == V{}, V{}, product);
    } else if constexpr (!math::kIsOne<Weight>) {
      return math::select((share == V{}) | (weight == V{}), V{}, product);
    } else if constexpr (!kEven) {
      return math::select(share == V{}, V{}, product);
    } else {
      return product;
    }
  }
  // The factor that GradientFactors::spread, which has an even share in it, is multiplied with.
  TORCHCE_HD auto of_gradient() const {
    if constexpr (kEven) {
      return weight;
    } else {
      return value();
    }
  }
};
template <class V>
TORCHCE_HD Coefficient<math::One, V> coefficient(V share) {
  return {{}, share};
}

// LogitSums are what some of a row's classes add up to, against a number near their largest logit. kKnown: what the
// coefficients add up to is known otherwise.
template <bool kSpread, class V, bool kKnown = false>
struct LogitSums {
  V exponentials{}, coefficients{}, gaps{};  // sum exp(x_k - from), sum u_k, sum u_k (x_k - from)

  // Those of one class, given exp(x - from).
  template <class Weight, bool kEven>
  TORCHCE_HD static LogitSums of(V exponential, const Coefficient<Weight, V, kEven>& u, V x, V from) {
    if constexpr (!kSpread) return {exponential};
    return {exponential, kKnown ? V{} : u.value(), u.gap(x, from)};
  }
  TORCHCE_HD LogitSums operator+(const LogitSums& other) const {
    if constexpr (!kSpread) return {exponentials + other.exponentials};
    return {exponentials + other.exponentials, kKnown ? V{} : coefficients + other.coefficients, gaps + other.gaps};
  }
  // The sums with their coefficients', which is `known`, or in them already.
  TORCHCE_HD LogitSums<kSpread, V> complete(V known) const {
    return {exponentials, kKnown ? known : coefficients, gaps};
  }
};

// CompensatedLogitSums adds up LogitSums, and may change the number that they are against. It has to be started, or to
// be made of zeros.
template <bool kSpread, class V>
struct CompensatedLogitSums {
  math::CompensatedSum<V, false> exponentials;
  math::CompensatedSum<V, true> coefficients, gaps;

  TORCHCE_HD void start(const LogitSums<kSpread, V>& sums) {
    exponentials = {sums.exponentials, V{}};
    if constexpr (kSpread) {
      coefficients = {sums.coefficients, V{}};
      gaps = {sums.gaps, V{}};
    }
  }
  TORCHCE_HD void add(const LogitSums<kSpread, V>& sums) {
    exponentials.add(sums.exponentials);
    if constexpr (kSpread) {
      coefficients.add(sums.coefficients);
      gaps.add(sums.gaps);
    }
  }
  // `factor` is exp(from - to).
  template <class Factor>
  TORCHCE_HD void rebase(V from, V to, Factor factor) {
    exponentials.scale(factor);
    if constexpr (kSpread) gaps.add(coefficient(coefficients.sum).gap(from, to));
  }
};

// h (lse - x_y), with 0 * inf = 0. A row with a NaN has a NaN log_sum, which must show even under h = 0.
template <class V>
TORCHCE_HD V hot_loss(V hot, V x_y, V max, V log_sum) {
  return math::select(hot == V{}, hot * log_sum, hot * ((max - x_y) + log_sum));
}

// LossTerms are what a row's classes add up to, as its loss takes it.
template <class V>
struct LossTerms {
  V max, log_sum;
  V coefficients{}, gaps{};  // U and G, where the loss has a part of every class

  // A row of nothing but minus infinity has no log_sum, but this.
  TORCHCE_HD V lse() const { return math::select(max == V{} - __builtin_inff(), max, max + log_sum); }
};

// sum_k u_k (lse - x_k), from U = sum_k u_k and G = sum_k u_k (x_k - max)
//
// An infinite u_k makes the loss infinite: lse - x_k > 0, but for a single class. The formula gives NaN where G met
// infinity times a gap of 0, or, while its terms were against an earlier maximum, infinities of both signs. Products
// with a gap may be such infinities where 16 U is beyond the largest number; then the loss would be too.
template <class V, class A>
TORCHCE_HD V spread_loss(const LossTerms<V>& terms, A classes) {
  const V loss = terms.coefficients * terms.log_sum - terms.gaps, beyond = terms.coefficients * 16.0f;
  const auto infinite = (loss != loss) & (beyond - beyond != V{});
  return math::select(infinite, beyond * (classes - A(1)) + terms.log_sum, loss);  // of a NaN it is NaN
}

// index_loss is the loss of a row with a class index. A NaN for h, where the index is no class, makes it NaN. kSpread:
// there may be smoothing.
template <bool kSpread, class V, class A>
TORCHCE_HD V index_loss(V hot, V x_y, const LossTerms<V>& terms, A classes) {
  V loss = hot_loss(hot, x_y, terms.max, terms.log_sum);
  if constexpr (kSpread) loss += spread_loss(terms, classes);
  return loss;
}

// probability_loss is the loss of a row with probabilities.
template <class V, class A>
TORCHCE_HD V probability_loss(const LossTerms<V>& terms, A classes) {
  return spread_loss(terms, classes);
}

// z_loss is z lse^2, z_slope its derivative by lse.
template <class V, class A>
TORCHCE_HD V z_loss(A z, V lse) {
  return z * lse * lse;
}
template <class V, class A>
TORCHCE_HD V z_slope(A z, V lse) {
  return A(2) * z * lse;
}

// reachable_gap is a gap x_k - max, but for those beyond whose exponential is 0 in every dtype, minus infinity too:
// with that its product would be a NaN.
template <class V>
TORCHCE_HD V reachable_gap(V gap) {
  constexpr float kBeyond = -1000;
  return math::select(gap < V{} + kBeyond, V{} + kBeyond, gap);
}

// weighted_gap is what a class adds to sum_k exp(x_k - max) (x_k - max), the mean gap's numerator.
template <class V>
TORCHCE_HD V weighted_gap(V exponential, V gap) {
  return exponential * reachable_gap(gap);
}

// GradientFactors make the gradient of each class of a row, the upstream gradient g in it:
// g dloss/dx_j = exp(x_j - max) (scale + tilt (x_j - max)) - spread u_j - hot [j == y], of a class index with w_j in
// place of u_j. Only an entropy has a tilt.
template <class V>
struct GradientFactors {
  V scale, spread, hot, tilt{};

  // Zeros where `without`.
  template <class M>
  TORCHCE_HD GradientFactors unless(M without) const {
    return {math::select(without, V{}, scale), math::select(without, V{}, spread), math::select(without, V{}, hot)};
  }
  // Adds what comes by way of the entropy, whose own gradient is `grad`.
  TORCHCE_HD void add_entropy(V grad, V mean_gap, V sum) {
    scale += grad * mean_gap / sum;
    tilt = -grad / sum;
  }
};

// slope_of_lse is what multiplies p_j in the gradient beside g A: the gradient `grad_lse` of an lse that was returned,
// and g z_slope, of an upstream gradient whose DividedGradient is `g` and `rest`.
template <class V, class A>
TORCHCE_HD V slope_of_lse(V grad_lse, V g, A rest, A z, V lse) {
  if (z == A(0)) return grad_lse;
  const V of_loss = rest == A(1) ? g * z_slope(z, lse) : g * z_slope(z, lse) / rest;
  return grad_lse + math::select(g == V{}, V{}, of_loss);  // a mean over nothing has a rest of 0
}

// DividedGradient is an upstream gradient divided by a mean's divisor: but where only the quotient is infinite, as by a
// sum of tiny class weights, it is the whole one, and `rest`, else 1, has still to divide the coefficients. Beside
// probabilities, whose divisor is a number of rows, `rest` is 1.
template <class A>
struct DividedGradient {
  A g, rest;

  TORCHCE_HD DividedGradient(A grad_output, A divisor) : g(grad_output / divisor), rest(1) {
    if (g - g == A(0) || grad_output - grad_output != A(0)) return;
    g = grad_output;
    rest = divisor;
  }
};

// index_factors gives those of a row with a class index, whose DividedGradient is `g` and `rest`. kSpread: there may be
// smoothing. Where there is none, an infinite g or class weight does not meet its 0.
template <bool kSpread, class V, class A>
TORCHCE_HD GradientFactors<V> index_factors(V g, A rest, V hot, const Smoothing<A>& smoothing, A sum_coefficients,
                                            V sum) {
  const auto divided = [&](V x) TORCHCE_HD_LAMBDA { return rest == A(1) ? x : x / rest; };
  GradientFactors<V> factors{{}, {}, g * divided(hot)};
  V of_all = factors.hot;
  if constexpr (kSpread) {
    if (smoothing.label_smoothing != A(0)) {
      factors.spread = divided(g * smoothing.even_share());
      of_all += g * divided(V{} + sum_coefficients);
    }
  }
  factors.scale = of_all / sum;
  return factors;
}

// probability_factors gives those of a row with probabilities.
template <class V>
TORCHCE_HD GradientFactors<V> probability_factors(V grad_output, V sum_coefficients, V sum) {
  return {grad_output * sum_coefficients / sum, grad_output, V{}};
}

// scaled_probability is exp(x_j - max) scale, the part of a class's gradient that takes an exponential; with a tilt
// exp(x_j - max) (scale + tilt (x_j - max)).
template <class V>
TORCHCE_HD V scaled_probability(V x, V max, V scale) {
  return math::exp_of_negative(x - max) * scale;
}
template <class V>
TORCHCE_HD V scaled_probability(V x, V max, V scale, V tilt) {
  return scaled_probability(x, max, scale + tilt * reachable_gap(x - max));
}

// class_gradient is the gradient of a class, given scaled_probability; at the target class `hot` is subtracted from it.
// Of a certain class, p = 1, it is exactly 0 where the others have no coefficient: `scale` is that product, rounded.
template <class V>
TORCHCE_HD V class_gradient(V scaled_probability, V spread, V coefficient) {
  return scaled_probability - math::rounded_product(spread, coefficient);
}
template <class V>
TORCHCE_HD V class_gradient(V scaled_probability, V spread, math::One) {
  return scaled_probability - spread;
}

// g d loss / d t_j = g (1 - eps) w_j (lse - x_j).
template <class V, class A>
TORCHCE_HD V target_gradient(V x, const Smoothing<A>& smoothing, V grad_output, V weight, V max, V log_sum) {
  return math::product_in_range(smoothing.unsmoothed * (log_sum - (x - max)), grad_output, weight);
}

}  // namespace torchce::softmax_ce
