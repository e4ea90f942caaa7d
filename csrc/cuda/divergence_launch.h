// How the divergence kernels are laid over a problem.
#pragma once

#include "divergence_row.cuh"
#include "softmax_ce_plan.h"

namespace torchce::cuda::divergence {

// Calls f with the operands' storage type, their Sides, and whether classes are adjacent in every operand and gradient.
template <class F>
void with_kernel(const Rows& rows, bool gradients_are_adjacent, F f) {
  const bool adjacent = gradients_are_adjacent && rows.first.strides.classes == 1 &&
                        (rows.other.side == Side::none || rows.other.strides.classes == 1);
  host::check(rows.other.side == Side::none || rows.first.dtype == rows.other.dtype,
              "target: expected the input's dtype, which is what CUDA kernels take");
  with_float_type(rows.first.dtype, [&](auto storage) {
    with_sides(rows, [&](auto sides) {
      adjacent ? f(storage, sides, std::true_type{}) : f(storage, sides, std::false_type{});
    });
  });
}

// How many threads share a row: of strided classes one does, so that neighbours read neighbouring rows.
template <class T>
int team_of(const Rows& rows, bool adjacent) {
  return adjacent ? softmax_ce::team_of_row(rows.classes, kPack<T>) : 1;
}

}  // namespace torchce::cuda::divergence
