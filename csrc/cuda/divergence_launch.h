// Which divergence kernel takes a call.
#pragma once

#include "divergence_row.cuh"
#include "softmax_ce_plan.h"

namespace torchce::cuda::divergence {

// Calls f with a value of the operands' storage type and one of Sides.
template <class F>
void with_kernel_types(const Rows& rows, F f) {
  with_float_type(rows.first.dtype, [&](auto storage) {
    if (rows.are_js()) {
      if (rows.first.side == Side::logits) return f(storage, Sides<Side::logits, Side::logits, true>{});
      return f(storage, Sides<Side::probabilities, Side::logits, true>{});
    }
    if (rows.other.side == Side::none) return f(storage, Sides<Side::logits, Side::none, false>{});
    if (rows.other.side == Side::probabilities) return f(storage, Sides<Side::logits, Side::probabilities, false>{});
    if (rows.first.side == Side::probabilities) return f(storage, Sides<Side::probabilities, Side::logits, false>{});
    f(storage, Sides<Side::logits, Side::logits, false>{});
  });
}

inline bool operands_are_adjacent(const Rows& rows) {
  return rows.first.strides.classes == 1 && (rows.other.side == Side::none || rows.other.strides.classes == 1);
}

}  // namespace torchce::cuda::divergence
