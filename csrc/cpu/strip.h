// A strip of rows that go through the classes together: a lane for each row.
//
// A strip is W vectors wide where all its rows are adjacent in memory (one row apart: one element apart), so that
// several cache lines of a class are read at once. Elsewhere it is one vector wide; squares of adjacent classes are
// transposed, and other strides copied lane by lane.
// A strip with fewer rows than lanes (the last of a range) repeats its last row in the idle lanes and never stores
// those.
#pragma once

#include <type_traits>

#include "rows.h"

namespace torchce::cpu::TORCHCE_LEVEL::across {

constexpr int kWide = 8;                                   // vectors in a strip of adjacent rows
constexpr int kBlockClasses = 32;                          // classes: 16 KiB of AVX-512 vectors
constexpr int64_t kTwoStrips = 2 * kWide * kLanes<float>;  // rows: the first strip has the caches fetch the second

// Values of a block of classes for a strip of rows.
template <class A, int W>
struct Block {
  Lanes<A> values[kBlockClasses][W];
};

// The rows of one strip in one operand.
template <class A, class T, int W>
struct Strip {
  static constexpr int kRows = W * kLanes<A>;
  T* first;
  int64_t class_stride;
  int count;
  bool adjacent;
  int64_t offsets[kRows];  // from the first row, in elements; only where the rows are not adjacent

  Strip(const RowShape& rows, T* data, const RowStrides& strides, int64_t row, int rows_here)
      : class_stride(strides.classes),
        count(rows_here),
        adjacent(rows_here == kRows && adjacent_rows(rows, strides, row, rows_here)) {
    RowPosition at(rows, row);
    const int64_t base = at.offset(strides);
    first = data + base;
    if (adjacent) return;
    for (int l = 0; l < kRows; ++l) {
      offsets[l] = at.offset(strides) - base;
      if (l + 1 < count) at.advance(rows);
    }
  }

  // Calls body(first class) for squares of as many classes as a vector has lanes. The last one overlaps its neighbour
  // unless they divide the classes of the block.
  template <class F>
  TORCHCE_SIMD static void for_each_square(int classes, F body) {
    int c = 0;
    for (; c + kLanes<A> <= classes; c += kLanes<A>) body(c);
    if (c < classes) body(classes - kLanes<A>);
  }

  // Has the caches fetch vector w of a class of the strip that comes next: as many classes as a strip has, each on
  // another page, are more than the hardware follows by itself. Two lines of a class at a time would be one too many.
  template <int kForWriting>
  TORCHCE_SIMD void prefetch_next(int64_t k, int w) const {
    constexpr int kLine = 64;
    if (!adjacent || w * kLanes<A> * sizeof(T) % kLine != 0) return;
    __builtin_prefetch(first + k * class_stride + kRows + w * kLanes<A>, kForWriting, 2);
  }

  // Reads classes k to k + classes - 1 into the block.
  TORCHCE_SIMD void read(int64_t k, int classes, Block<A, W>& block) const {
    if (adjacent) {
      const T* p = first + k * class_stride;
      for (int c = 0; c < classes; ++c, p += class_stride) {
        for (int w = 0; w < W; ++w) block.values[c][w] = load<A>(p + w * kLanes<A>);
      }
      return;
    }
    if (W == 1 && class_stride == 1 && classes >= kLanes<A>) {
      for_each_square(classes, [&](int c) {
        Lanes<A> square[kLanes<A>];
        for (int l = 0; l < kLanes<A>; ++l) square[l] = load<A>(first + offsets[l] + k + c);
        transpose<A>(square);
        for (int l = 0; l < kLanes<A>; ++l) block.values[c + l][0] = square[l];
      });
      return;
    }
    std::remove_const_t<T> stored[kBlockClasses][kRows];
    for (int l = 0; l < kRows; ++l) {
      const T* p = first + offsets[l] + k * class_stride;
      for (int c = 0; c < classes; ++c, p += class_stride) stored[c][l] = *p;
    }
    for (int c = 0; c < classes; ++c) {
      for (int w = 0; w < W; ++w) block.values[c][w] = load<A>(stored[c] + w * kLanes<A>);
    }
  }

  template <Nans kNans = Nans::any>
  TORCHCE_SIMD void write(int64_t k, int classes, const Block<A, W>& block) const {
    if (adjacent) {
      T* p = first + k * class_stride;
      const int64_t step = class_stride;  // what is stored might be this object, for all the compiler knows
      for (int c = 0; c < classes; ++c, p += step) {
        for (int w = 0; w < W; ++w) store<kNans>(p + w * kLanes<A>, block.values[c][w]);
      }
      return;
    }
    if (W == 1 && class_stride == 1 && classes >= kLanes<A>) {
      for_each_square(classes, [&](int c) {
        Lanes<A> square[kLanes<A>];
        for (int l = 0; l < kLanes<A>; ++l) square[l] = block.values[c + l][0];
        transpose<A>(square);
        for (int l = 0; l < count; ++l) store<kNans>(first + offsets[l] + k + c, square[l]);
      });
      return;
    }
    T stored[kBlockClasses][kRows];
    for (int c = 0; c < classes; ++c) {
      for (int w = 0; w < W; ++w) store<kNans>(stored[c] + w * kLanes<A>, block.values[c][w]);
    }
    const int64_t step = class_stride;
    for (int l = 0; l < count; ++l) {
      T* p = first + offsets[l] + k * step;
      for (int c = 0; c < classes; ++c, p += step) *p = stored[c][l];
    }
  }
};

// Calls body(first class, classes) for the blocks of all classes.
template <class F>
TORCHCE_SIMD void for_each_block(int64_t classes, F body) {
  for (int64_t k = 0; k < classes; k += kBlockClasses)
    body(k, int(classes - k < kBlockClasses ? classes - k : kBlockClasses));
}

// Splits a range of rows into strips of at most kWidest vectors and calls body(integral constant W, first row, rows in
// the strip).
template <int W>
struct Wide {
  static constexpr int value = W;
};
template <class A, int kWidest, class F>
TORCHCE_SIMD void for_each_strip(const RowShape& rows, const RowStrides& strides, int64_t row_begin, int64_t row_end,
                                 F body) {
  constexpr int64_t kWideRows = kWidest * kLanes<A>;
  for (int64_t row = row_begin; row < row_end;) {
    if (row + kWideRows <= row_end && adjacent_rows(rows, strides, row, kWideRows)) {
      body(Wide<kWidest>{}, row, int(kWideRows));
      row += kWideRows;
    } else {
      const int count = int(row_end - row < kLanes<A> ? row_end - row : kLanes<A>);
      body(Wide<1>{}, row, count);
      row += count;
    }
  }
}

}  // namespace torchce::cpu::TORCHCE_LEVEL::across
