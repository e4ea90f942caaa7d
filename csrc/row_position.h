// Where the rows of a problem stand in its operands. The same for every device.
#pragma once

#include "math/lanes.h"
#include "problem.h"

namespace torchce {

// a / b of numbers that are not negative. Where 32 bits hold both, a division of 32 bits takes a third of the time.
TORCHCE_HD int64_t quotient(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? int64_t(uint32_t(a) / uint32_t(b)) : a / b;
}

// Where row r = n * S + s stands.
struct RowPosition {
  int64_t n, s;
  TORCHCE_HD RowPosition(const RowShape& rows, int64_t r)
      : n(rows.inner == 1 ? r : quotient(r, rows.inner)), s(rows.inner == 1 ? 0 : r - n * rows.inner) {}
  TORCHCE_HD int64_t offset(const RowStrides& strides) const { return n * strides.outer + s * strides.inner; }
  // The position of the row that is `rows` later in the same n.
  TORCHCE_HD RowPosition plus(int64_t rows) const {
    RowPosition later = *this;
    later.s += rows;
    return later;
  }
  // Steps to the next row, without the division.
  TORCHCE_HD void advance(const RowShape& rows) {
    if (++s == rows.inner) {
      s = 0;
      ++n;
    }
  }
};

}  // namespace torchce
