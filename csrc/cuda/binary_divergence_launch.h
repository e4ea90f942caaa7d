// How the kernels of binary_divergence are chosen.
#pragma once

#include <type_traits>

#include "../math/binary_divergence.h"
#include "sigmoid_bce_launch.h"

namespace torchce::cuda::binary_divergence {

using namespace torchce::binary_divergence;
using namespace torchce::cuda::sigmoid_bce;

// Calls f with the formula's type, the storage type of logits and targets, a layout and the elements of a pack. Both
// operands are of one dtype, and without weights no layout has their columns.
template <class F>
void with_kernel_of(Formula formula, const Elements& problem, F f) {
  host::check(problem.dtypes[kTarget] == problem.dtypes[kLogits], "target: expected the input's dtype on CUDA");
  with_formula(formula, [&](auto terms) {
    with_kernel(problem, [&](auto logits, auto target, auto layout, auto pack) {
      if constexpr (std::is_same_v<decltype(logits), decltype(target)> && layout() != Layout::columns) {
        f(terms, logits, layout, pack);
      }
    });
  });
}

}  // namespace torchce::cuda::binary_divergence
