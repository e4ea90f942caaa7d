// How the kernels of binary_divergence are chosen.
#pragma once

#include <type_traits>

#include "../math/binary_divergence.h"
#include "sigmoid_bce_launch.h"

namespace torchce::cuda::binary_divergence {

using namespace torchce::binary_divergence;
using namespace torchce::cuda::sigmoid_bce;

// Calls f with the formula, the storage types of logits and targets, a layout and the elements of a pack. No target is
// an integer, that of an entropy is the logits, and without weights no layout has their columns.
template <class F>
void with_kernel_of(Formula formula, const Elements& problem, F f) {
  with_formula(formula, [&](auto formula) {
    with_kernel(problem, [&](auto logits, auto target, auto layout, auto pack) {
      using T = decltype(logits);
      using U = decltype(target);
      constexpr bool takes_pair = std::is_same_v<T, U> || !std::is_same_v<decltype(formula), Entropy>;
      if constexpr (!std::is_integral_v<U> && takes_pair && layout() != Layout::columns) {
        f(formula, logits, target, layout, pack);
      }
    });
  });
}

}  // namespace torchce::cuda::binary_divergence
