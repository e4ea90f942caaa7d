// Kinds of logit, which say what a row's loss is made of in place of logit x: value(x), and its derivative.
//
// value(x) must rise with x, so that the largest value is that of the largest logit. slope(value(x)), its derivative,
// multiplies a gradient last, when the target class's part is in it. A class that is not there has no value: what
// stands for it is put there after value().
#pragma once

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

// LogitOf is the kind of logit that goes with a kind of target, for logits of storage type T.
template <class Target, class T>
using LogitOf = typename Target::template Logit<Accumulate<T>>;

}  // namespace torchce::softmax_ce
