// A few neighbouring rows: whether they are adjacent in memory, and a number for each of them, a lane a row.
#pragma once

#include <cstring>

#include "../row_position.h"
#include "vector.h"

namespace torchce::cpu::TORCHCE_LEVEL {

// Whether rows lie side by side in an operand, one element apart.
inline bool adjacent_rows(const RowShape& rows, const RowStrides& strides, int64_t row, int count) {
  if (rows.inner == 1) return strides.outer == 1;
  return strides.inner == 1 && row % rows.inner + count <= rows.inner;
}

template <class A>
constexpr int vectors_of(int rows) {
  return (rows + kLanes<A> - 1) / kLanes<A>;
}

// A number for each of the rows.
template <class A, int W>
struct PerRow {
  static constexpr int kRows = W * kLanes<A>;
  alignas(kBytes) A values[kRows];  // a vector that spans two cache lines is slow to read back

  A& operator[](int l) { return values[l]; }
  A operator[](int l) const { return values[l]; }
  TORCHCE_SIMD Lanes<A> lanes(int w) const { return load<A>(values + w * kLanes<A>); }
  TORCHCE_SIMD void set(int w, Lanes<A> v) { store(values + w * kLanes<A>, v); }

  // Read from memory where the rows lie side by side; idle lanes are 0. `write` is the way back.
  TORCHCE_SIMD static PerRow of(const A* p, int count) {
    PerRow result{};
    if (count == kRows) {  // a size that the compiler knows
      std::memcpy(result.values, p, sizeof values);
    } else {
      std::memcpy(result.values, p, count * sizeof(A));
    }
    return result;
  }
  TORCHCE_SIMD void write(A* p, int count) const {
    if (count == kRows) {
      std::memcpy(p, values, sizeof values);
    } else {
      std::memcpy(p, values, count * sizeof(A));
    }
  }
};

}  // namespace torchce::cpu::TORCHCE_LEVEL
