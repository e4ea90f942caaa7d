// Softmax cross entropy of a range of rows.
//
// Two ways to lay rows on SIMD lanes:
// - along a row: lanes hold neighbouring classes. For rows of at least one pair (vector.h) of classes that are adjacent
//   in memory.
// - across rows: lanes hold neighbouring rows, classes come one after another. For class dimensions with a stride
//   ([N, C, d1...], transposed logits) and for shorter rows. Every stride is right (softmax_ce_strip.h).
// Either way the forward reads a row from memory once.
#pragma once

#include "softmax_ce_across.h"
#include "softmax_ce_along.h"

namespace torchce::cpu::TORCHCE_LEVEL {

template <class T, class Target>
bool lanes_run_along(const Rows& rows) {
  return rows.classes >= VectorPair<T>::kSize && rows.logits_strides.classes == 1 &&
         (!Target::kProbabilities || rows.target_strides.classes == 1);
}

// What a row has once, z-loss and lse, costs the kernels of plain losses nothing: only transformed logits and the
// gradients of entropies have others.

inline void softmax_ce_forward(const Forward& call, int64_t row_begin, int64_t row_end, Partial* partial) {
  with_problem_types(call.rows, call.rows.are_transformed(), [&](auto logits, auto target) {
    using T = decltype(logits);
    using Target = decltype(target);
    if (lanes_run_along<T, Target>(call.rows)) {
      along::forward<T, Target>(call, row_begin, row_end, partial);
    } else {
      across::forward<T, Target>(call, row_begin, row_end, partial);
    }
  });
}

template <class Exp, class T, class Target>
void softmax_ce_backward_of(const Backward& call, int64_t row_begin, int64_t row_end) {
  if (lanes_run_along<T, Target>(call.rows) && call.grad_strides.classes == 1) {
    along::backward<T, Target, Exp>(call, row_begin, row_end);
  } else {
    across::backward<T, Target, Exp>(call, row_begin, row_end);
  }
}

inline void softmax_ce_backward(const Backward& call, int64_t row_begin, int64_t row_end) {
  const bool has_tilt = call.grad_entropy != nullptr;
  with_problem_types(call.rows, has_tilt || call.rows.are_transformed(), [&](auto logits, auto target) {
    using T = decltype(logits);
    using Target = decltype(target);
    if constexpr (kIsGeneral<Target>) {
      if (has_tilt) return softmax_ce_backward_of<TiltedExp<T>, T, Target>(call, row_begin, row_end);
    }
    softmax_ce_backward_of<GradientExp<T>, T, Target>(call, row_begin, row_end);
  });
}

// Writes the gradient of target probabilities that require one.
inline void softmax_ce_backward_target(const Backward& call, int64_t row_begin, int64_t row_end) {
  with_problem_types(call.rows, call.rows.are_transformed(), [&](auto logits, auto target) {
    using T = decltype(logits);
    using Target = decltype(target);
    if constexpr (Target::kProbabilities) across::backward_target<T, Target>(call, row_begin, row_end);
  });
}

}  // namespace torchce::cpu::TORCHCE_LEVEL
