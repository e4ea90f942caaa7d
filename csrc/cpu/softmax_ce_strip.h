// A strip of rows that go through the classes together: a lane for each row.
//
// A strip is W vectors wide where all its rows are adjacent in memory (one row apart: one element apart), so that
// several cache lines of a class are read at once. Elsewhere it is one vector wide; squares of adjacent classes are
// transposed, and other strides copied lane by lane.
// A strip with fewer rows than lanes (the last of a range) repeats its last row in the idle lanes and never stores
// those.
#pragma once

#include <type_traits>

#include "softmax_ce_per_row.h"

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

  Strip(const Rows& rows, T* data, const RowStrides& strides, int64_t row, int rows_here)
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

// The strip's logits; a block of them holds their values.
template <class T, class Target, int W>
struct StripLogits : Strip<Accumulate<T>, const T, W> {
  using A = Accumulate<T>;
  [[no_unique_address]] LogitOf<Target, T> logit;

  StripLogits(const Rows& rows, int64_t row, int count)
      : Strip<A, const T, W>(rows, static_cast<const T*>(rows.logits), rows.logits_strides, row, count), logit(rows) {}

  TORCHCE_SIMD void read(int64_t k, int classes, Block<A, W>& block) const {
    Strip<A, const T, W>::read(k, classes, block);
    if constexpr (LogitOf<Target, T>::kIsPlain) return;
    for (int c = 0; c < classes; ++c) {
      for (int w = 0; w < W; ++w) block.values[c][w] = logit.value(block.values[c][w]);
    }
  }
};

// The logits' own derivatives in a block, which multiply its gradient last, when the target class's part is in it.
template <class Logit, class A, int W>
struct BlockSlopes {
  Block<A, W> slopes;

  TORCHCE_SIMD void take(const Logit& logit, int c, int w, Lanes<A> value) {
    if constexpr (!Logit::kIsPlain) slopes.values[c][w] = logit.slope(value);
  }
  TORCHCE_SIMD void multiply(int classes, Block<A, W>& gradient) const {
    if constexpr (Logit::kIsPlain) return;
    for (int c = 0; c < classes; ++c) {
      for (int w = 0; w < W; ++w) gradient.values[c][w] *= slopes.values[c][w];
    }
  }
};

// The strip's targets, seen as the coefficients u_k of its rows. kWeighted: there are class weights.
template <class Target, class A, int W, bool kWeighted>
struct StripCoefficients {
  using V = Lanes<A>;
  static constexpr bool kKnownSum = true;  // what a block's coefficients add up to is the same for all rows
  const A* weight;
  A share;
  V sum_of_block{};
  int64_t k = 0;

  TORCHCE_SIMD StripCoefficients(const Rows& rows, int64_t, int)
      : weight(static_cast<const A*>(rows.weight)), share(smoothing_of<A>(rows).even_share()) {}
  TORCHCE_SIMD void read_block(int64_t first, int count) {
    k = first;
    if constexpr (kWeighted) {
      math::StridedSum<4, A> sum;
      sum.add(count, [&](int c) TORCHCE_HD_LAMBDA { return weight[k + c] * share; });
      sum_of_block = broadcast(sum.value());
    } else {
      sum_of_block = broadcast(A(count) * share);
    }
  }
  // The Coefficient of class c of the block that was read, for vector w of the rows.
  TORCHCE_SIMD auto at(int c, int) const {
    if constexpr (kWeighted) {
      return Coefficient<V, V, true>{broadcast(weight[k + c]), broadcast(share)};
    } else {
      return Coefficient<math::One, V, true>{{}, broadcast(share)};
    }
  }
};

template <class Target, class A, int W, bool kWeighted>
  requires Target::kProbabilities
struct StripCoefficients<Target, A, W, kWeighted> {
  using V = Lanes<A>;
  using P = typename Target::Storage;
  static constexpr bool kKnownSum = false;
  static constexpr V sum_of_block{};
  const A* weight;
  Smoothing<A> smoothing;
  Strip<A, const P, W> target;
  Block<A, W> block;
  int64_t k = 0;

  TORCHCE_SIMD StripCoefficients(const Rows& rows, int64_t row, int count)
      : weight(static_cast<const A*>(rows.weight)),
        smoothing(smoothing_of<A>(rows)),
        target(rows, static_cast<const P*>(rows.target), rows.target_strides, row, count) {}
  TORCHCE_SIMD void read_block(int64_t first, int count) {
    k = first;
    target.read(first, count, block);
  }
  TORCHCE_SIMD auto at(int c, int w) const {
    const V share = smoothing.share(block.values[c][w]);
    if constexpr (kWeighted) {
      return Coefficient<V, V>{broadcast(weight[k + c]), share};
    } else {
      return coefficient(share);
    }
  }
};

// Calls f with a reference to StripCoefficients, which are too large to be copied.
template <class Target, class A, int W, class F>
TORCHCE_SIMD void with_coefficients(const Rows& rows, int64_t row, int count, F f) {
  if constexpr (Target::kSpread) {
    if (rows.weight != nullptr) {
      StripCoefficients<Target, A, W, true> weighted(rows, row, count);
      return f(weighted);
    }
  }
  StripCoefficients<Target, A, W, false> unweighted(rows, row, count);
  f(unweighted);
}

// Calls body(first class, classes) for the blocks of all classes.
template <class F>
TORCHCE_SIMD void for_each_block(int64_t classes, F body) {
  for (int64_t k = 0; k < classes; k += kBlockClasses)
    body(k, int(classes - k < kBlockClasses ? classes - k : kBlockClasses));
}

// Calls f(row of the strip, the row's value at its target class) for the classes k to k + classes - 1.
template <class A, int W, class F>
TORCHCE_SIMD void for_each_hot(const IndexedRows<A, W>& targets, int64_t k, int classes, Block<A, W>& block, F f) {
  constexpr int kRows = IndexedRows<A, W>::kRows;
  A(*values)[kRows] = reinterpret_cast<A(*)[kRows]>(block.values);
  for (int l = 0; l < targets.count; ++l) {
    const uint64_t c = uint64_t(targets.index[l] - k);
    if (c < uint64_t(classes)) f(l, values[c][l]);
  }
}

// Splits a range of rows into strips and calls body(integral constant W, first row, rows in the strip).
template <int W>
struct Wide {
  static constexpr int value = W;
};
template <class A, class Target, class F>
TORCHCE_SIMD void for_each_strip(const Rows& rows, const RowStrides& strides, int64_t row_begin, int64_t row_end,
                                 F body) {
  // One vector for transformed logits, or compiling a SIMD level would take a quarter longer.
  constexpr int kWidest = kIsGeneral<Target> ? 1 : kWide;
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
