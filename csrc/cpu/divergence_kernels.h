// The CPU kernels of divergences, of rows and of elements, compiled once for every SIMD level (levels.h), in a file of
// their own: a level's other kernels take the compiler minutes.
#pragma once

#include "binary_divergence_kernels.h"
#include "divergence_backward.h"

namespace torchce::cpu::TORCHCE_LEVEL {

void divergence_forward(const divergence::Forward& call, int64_t row_begin, int64_t row_end, Partial* partial) {
  divergences::with_number_and_sides(call.rows, [&](auto number, auto sides) {
    divergences::forward<decltype(number), decltype(sides)>(call, row_begin, row_end, partial);
  });
}

void divergence_backward(const divergence::Backward& call, int64_t row_begin, int64_t row_end) {
  divergences::with_number_and_sides(call.rows, [&](auto number, auto sides) {
    divergences::backward<decltype(number), decltype(sides)>(call, row_begin, row_end);
  });
}

}  // namespace torchce::cpu::TORCHCE_LEVEL
