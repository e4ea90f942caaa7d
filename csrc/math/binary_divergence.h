// KL divergence between two Bernoulli distributions, and the entropy of one, of an element's logits.
//
// The teacher P says yes with p = sigmoid(a), the student Q with q = sigmoid(b). With d = b - a
//
//   KL(P || Q) = p log(p / q) + (1 - p) log((1 - p) / (1 - q)) = log((1 + e^b) / (1 + e^a)) - p d
//
// which stays the same where yes and no are swapped: p becomes 1 - p, and logits change their signs. Every element is
// turned so that p is at most 1/2; then no 1 - p loses digits. With e = 1 - p, t = tanh(d / 2), u = p t / (1 - e t) and
// T(x) = 2 atanh(x) - 2x it is
//
//   log(1 + p (e^d - 1)) - p d = 2 atanh(u) - 2 p atanh(t) = 2 e t u + (T(u) - p T(t))               where |d| <= log 2
//   max(b, 0) + 2 atanh(w) - p d,  w = (e^-|b| - e^a) / (2 + e^-|b| + e^a)                           elsewhere
//
// the first of which has the digits of d, where P and Q are near each other and the logarithm and p d cancel. All
// arguments of atanh are at most 1/3. Derivatives by either logit, and by p where the teacher gives that and not a:
//
//   dKL/db = q - p,  dKL/da = p (1 - p) (a - b),  dKL/dp = a - b,  a = log(p / (1 - p))
//
// 0 log 0 is 0: a label that both exclude costs nothing. One that the student alone excludes, by an infinite logit,
// makes the divergence infinite, even where p is rounded to 0. Probabilities outside [0, 1] give NaN.
//
// Entropy: H = log(1 + e^a) - p a, of which both terms are positive where a is negative; dH/da = -a p (1 - p).
#pragma once

#include "../problem.h"
#include "elementary.h"
#include "rounding.h"
#include "sigmoid_bce.h"

namespace torchce::binary_divergence {

using sigmoid_bce::smaller_odds;

constexpr float kLog2 = 0.693147f;

// Element is one of the teacher and the student, turned so that the teacher's p is at most 1/2.
template <class V>
struct Element {
  V p, odds;        // of the teacher, p / (1 - p) = e^a
  V first, second;  // a and b
  decltype(V{} < V{}) is_turned;

  // From both logits.
  TORCHCE_HD static Element of_logits(V a, V b) {
    const auto is_turned = a > V{};
    a = math::select(is_turned, -a, a);
    const V one = V{} + 1, odds = math::exp_of_negative(a);
    return {odds * math::divide(one, one + odds), odds, a, math::select(is_turned, -b, b), is_turned};
  }
  // From the teacher's probability and the student's logit. -log(1 - p) is 2 atanh(p / (2 - p)).
  TORCHCE_HD static Element of_probability(V p, V b) {
    const V one = V{} + 1;
    const auto is_turned = p > V{} + 0.5f;
    p = math::select(is_turned, one - p, p);
    p = math::select(p < V{}, V{} + math::ElementOf<V>(__builtin_nan("")), p);  // in the gradients, too
    const V a = math::log_of_positive(p) + math::two_atanh(math::divide(p, one + (one - p)));
    return {p, math::divide(p, one - p), a, math::select(is_turned, -b, b), is_turned};
  }

  TORCHCE_HD V turned_back(V gradient) const { return math::select(is_turned, -gradient, gradient); }
  // KL(P || Q).
  TORCHCE_HD V divergence() const {
    const V one = V{} + 1, rest = one - p, d = second - first, other_odds = smaller_odds(second);
    const auto is_near = math::abs(d) <= V{} + kLog2;
    const V t = math::tanh(math::select(is_near, d, V{}) * 0.5f), u = math::divide(p * t, one - rest * t);
    const V w = math::divide(other_odds - odds, (one + other_odds) + (one + odds));
    const V of_atanh = math::two_atanh_rest(math::select(is_near, u, w));
    const V near = rest * t * (u * 2.0f) + (of_atanh - p * math::two_atanh_rest(t));
    const V largest = math::select(second < V{}, V{}, second);
    const V linear = math::select(p == V{}, V{}, p * d);  // where p is 0, d may be infinite or NaN
    const V value = math::select(is_near, near, largest + ((w * 2.0f + of_atanh) - linear));
    const V infinity = V{} + math::kInfinityF, infinite = math::select(first == first, infinity, first);
    return math::select((math::abs(second) == infinity) & (second != first), infinite, value);
  }
  TORCHCE_HD V by_second_logit() const {
    const V one = V{} + 1, other_odds = smaller_odds(second), larger = math::divide(one, one + other_odds);
    const V q = math::select(second < V{}, other_odds * larger, larger);
    return turned_back(math::rounded_difference(q, p));
  }
  // An infinite a - b becomes the largest number, so that an upstream gradient of 0 leaves 0 and not a NaN. Where p is
  // 0 the gradient is 0.
  TORCHCE_HD V by_first_logit() const {
    const V gap = math::within(first - second, -math::kLowest<math::ElementOf<V>>);
    return turned_back(math::select(p == V{}, V{}, (p * ((V{} + 1) - p)) * gap));
  }
  TORCHCE_HD V by_probability() const { return turned_back(first - second); }
};

// The types of a Formula have the value of one element of a problem and its derivatives by its two operands, named as
// sigmoid_bce's: the student's logit x and the target t, which for entropies is the logit again.

struct OfLogits {
  template <class V>
  TORCHCE_HD static V value(V x, V t) {
    return Element<V>::of_logits(t, x).divergence();
  }
  template <class V>
  TORCHCE_HD static V by_logit(V x, V t) {
    return Element<V>::of_logits(t, x).by_second_logit();
  }
  template <class V>
  TORCHCE_HD static V by_target(V x, V t) {
    return Element<V>::of_logits(t, x).by_first_logit();
  }
};

struct OfProbability {
  template <class V>
  TORCHCE_HD static V value(V x, V t) {
    return Element<V>::of_probability(t, x).divergence();
  }
  template <class V>
  TORCHCE_HD static V by_logit(V x, V t) {
    return Element<V>::of_probability(t, x).by_second_logit();
  }
  template <class V>
  TORCHCE_HD static V by_target(V x, V t) {
    return Element<V>::of_probability(t, x).by_probability();
  }
};

struct Entropy {
  template <class V>
  TORCHCE_HD static V value(V x, V) {
    const V odds = smaller_odds(x), p = odds * math::divide(V{} + 1, odds + 1);
    return math::log1p_unit(odds) + math::select(p == V{}, V{}, p * math::abs(x));
  }
  template <class V>
  TORCHCE_HD static V by_logit(V x, V) {
    const V odds = smaller_odds(x), rest = math::divide(V{} + 1, odds + 1), p = odds * rest;
    return math::select(p == V{}, V{}, -(x * p) * rest);
  }
};

// Calls f with a value of the type of a formula.
template <class F>
inline __attribute__((always_inline)) void with_formula(Formula formula, F f) {
  switch (formula) {
    case Formula::of_logits:
      return f(OfLogits{});
    case Formula::of_probability:
      return f(OfProbability{});
    case Formula::entropy:
      return f(Entropy{});
  }
}

}  // namespace torchce::binary_divergence
