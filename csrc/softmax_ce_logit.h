// Kinds of logit, which say what a row's loss is made of in place of logit x: value(x), and its derivative.
//
// value(x) must rise with x, so that the largest value is that of the largest logit. slope(value(x)), its derivative,
// multiplies a gradient last, when the target class's part is in it. A class that is not there has no value: what
// stands for it is put there after value().
#pragma once

#include "math/rounding.h"
#include "storage.h"

namespace torchce::softmax_ce {

// PlainLogit is the logit itself, which costs nothing.
struct PlainLogit {
  static constexpr bool kIsPlain = true;  // minus infinity stays what it is, and no value need be kept for its slope
  TORCHCE_HD explicit PlainLogit(const Rows&) {}
  template <class V>
  TORCHCE_HD V value(V x) const {
    return x;
  }
  template <class V>
  TORCHCE_HD math::One slope(V) const {
    return {};
  }
};

// TransformedLogit is softcap tanh(scale x / softcap), or without a softcap scale x. The scale is positive: of one that
// lies on the device, where nobody asks before, every value is NaN otherwise.
template <class A>
struct TransformedLogit {
  static constexpr bool kIsPlain = false;
  bool is_capped;
  A factor, scale, softcap;          // factor is the number in scale, by which a tensor is multiplied
  A scale_of_tanh, inverse_softcap;  // scale / softcap and 1 / softcap

  TORCHCE_HD explicit TransformedLogit(const Rows& rows)
      : is_capped(rows.options.softcap != 0),
        factor(A(rows.options.logit_scale)),
        scale(factor),
        softcap(A(rows.options.softcap)),
        scale_of_tanh(A(rows.options.logit_scale / rows.options.softcap)),
        inverse_softcap(A(1 / rows.options.softcap)) {
    if (rows.scale == nullptr) return;
    const A given = *static_cast<const A*>(rows.scale);
    const A positive = given > A(0) ? given : A(__builtin_nan(""));
    scale *= positive;
    scale_of_tanh *= positive;
  }
  // It is rounded before the largest value is subtracted, which has been: of a class that is certain nothing must stay.
  template <class V>
  TORCHCE_HD V value(V x) const {
    return is_capped ? math::rounded_product(V{} + softcap, math::tanh(scale_of_tanh * x))
                     : math::rounded_product(V{} + scale, x);
  }
  template <class V>
  TORCHCE_HD V slope(V value) const {
    if (!is_capped) return V{} + scale;
    return scale * slope_of_tanh(value);
  }
  // The derivative of logit x's value by the tensor in the scale. An infinite x has none: such a class is left out.
  template <class V>
  TORCHCE_HD V slope_by_scale(V x, V value) const {
    const V finite = factor * math::select(x - x == V{}, x, V{});
    return is_capped ? slope_of_tanh(value) * finite : finite;
  }

 private:
  template <class V>
  TORCHCE_HD V slope_of_tanh(V value) const {
    const V tanh = inverse_softcap * value;
    return A(1) - tanh * tanh;
  }
};

// LogitOf is the kind of logit that goes with a kind of target, for logits of storage type T.
template <class Target, class T>
using LogitOf = typename Target::template Logit<Accumulate<T>>;

}  // namespace torchce::softmax_ce
