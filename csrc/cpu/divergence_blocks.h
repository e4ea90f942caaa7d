// The operands of a divergence, block by block in the accumulation type. Their element types are known to these readers
// and writers alone: what is computed of blocks is compiled once for all of them.
//
// A block has steps of W vectors. Across rows a step is a class, with a lane for each row; along a row a step is as
// many neighbouring classes of it as a vector has lanes, and every lane adds up classes of its own, as if it were a
// row.
#pragma once

#include <algorithm>
#include <new>

#include "../divergence_row.h"
#include "strip.h"

namespace torchce::cpu::TORCHCE_LEVEL::divergences {

using namespace divergence;
using across::Block;
using across::kBlockClasses;

constexpr int kWidest = 4;  // vectors in a strip: a block each of both operands, and their gradients, are 16 KiB

// One operand of a strip of rows.
template <class A, int W>
class StripOperand {
  using AnyStrip = across::Strip<A, char, W>;  // which has the size of any other
  alignas(AnyStrip) unsigned char strip_[sizeof(AnyStrip)];
  void (*read_)(const void*, int64_t, int, Block<A, W>&);
  void (*write_)(const void*, int64_t, int, const Block<A, W>&);

  template <class T>
  using StripOf = across::Strip<A, T, W>;

  template <class T>
  static void read_as(const void* strip, int64_t k, int steps, Block<A, W>& block) {
    const auto& typed = *static_cast<const StripOf<T>*>(strip);
    typed.read(k, steps, block);
    for (int c = 0; c < steps; ++c) {
      for (int w = 0; w < W; ++w) typed.template prefetch_next<0>(k + c, w);
    }
  }
  template <class T>
  static void write_as(const void* strip, int64_t k, int steps, const Block<A, W>& block) {
    const auto& typed = *static_cast<const StripOf<T>*>(strip);
    typed.write(k, steps, block);
    for (int c = 0; c < steps; ++c) {
      for (int w = 0; w < W; ++w) typed.template prefetch_next<1>(k + c, w);
    }
  }

 public:
  StripOperand(const RowShape& rows, void* data, DType dtype, const RowStrides& strides, int64_t row, int count) {
    with_float_type(dtype, [&](auto storage) {
      using T = decltype(storage);
      static_assert(sizeof(StripOf<T>) == sizeof(AnyStrip));
      new (strip_) StripOf<T>(rows, static_cast<T*>(data), strides, row, count);
      read_ = &read_as<T>;
      write_ = &write_as<T>;
    });
  }
  TORCHCE_SIMD void read(int64_t k, int steps, Block<A, W>& block) const { read_(strip_, k, steps, block); }
  TORCHCE_SIMD void write(int64_t k, int steps, const Block<A, W>& block) const { write_(strip_, k, steps, block); }
};

// One operand of a row whose classes are adjacent. Beyond the last class there is `filler`.
template <class A>
class RowOperand {
  static constexpr int L = kLanes<A>;
  char* row_;
  int64_t classes_;
  A filler_;
  void (*read_)(const RowOperand&, int64_t, int, Block<A, 1>&);
  void (*write_)(const RowOperand&, int64_t, int, const Block<A, 1>&);

  template <class T>
  static void read_as(const RowOperand& row, int64_t step, int steps, Block<A, 1>& block) {
    const T* p = reinterpret_cast<const T*>(row.row_) + step * L;
    const int64_t left = row.classes_ - step * L;
    const int whole = int(std::min<int64_t>(steps, left / L));
    for (int i = 0; i < whole; ++i) block.values[i][0] = load<A>(p + i * L);
    if (whole == steps) return;
    Lanes<A> last = broadcast(row.filler_);
    for (int l = 0; l < int(left - whole * L); ++l) last[l] = load_one<A>(p + whole * L + l);
    block.values[whole][0] = last;
  }
  template <class T>
  static void write_as(const RowOperand& row, int64_t step, int steps, const Block<A, 1>& block) {
    T* p = reinterpret_cast<T*>(row.row_) + step * L;
    const int64_t left = row.classes_ - step * L;
    const int whole = int(std::min<int64_t>(steps, left / L));
    for (int i = 0; i < whole; ++i) store(p + i * L, block.values[i][0]);
    if (whole == steps) return;
    for (int l = 0; l < int(left - whole * L); ++l) store_one(p + whole * L + l, block.values[whole][0][l]);
  }

 public:
  RowOperand(const RowShape& rows, void* data, DType dtype, const RowStrides& strides, RowPosition at, A filler)
      : classes_(rows.classes), filler_(filler) {
    with_float_type(dtype, [&](auto storage) {
      using T = decltype(storage);
      row_ = reinterpret_cast<char*>(static_cast<T*>(data) + at.offset(strides));
      read_ = &read_as<T>;
      write_ = &write_as<T>;
    });
  }
  TORCHCE_SIMD void read(int64_t step, int steps, Block<A, 1>& block) const { read_(*this, step, steps, block); }
  TORCHCE_SIMD void write(int64_t step, int steps, const Block<A, 1>& block) const {
    write_(*this, step, steps, block);
  }
};

// Stands for an operand that is not there, or a gradient that is not wanted.
struct NoOperand {
  template <class B>
  TORCHCE_SIMD void read(int64_t, int, B&) const {}
  template <class B>
  TORCHCE_SIMD void write(int64_t, int, const B&) const {}
};

// Makes of a block as it lies in memory the values that the formulas take.
template <Side kSide, class A, int W>
TORCHCE_SIMD void to_values(A scale, int steps, Block<A, W>& block) {
  if (kSide == Side::logits && scale == A(1)) return;
  for (int c = 0; c < steps; ++c) {
    for (int w = 0; w < W; ++w) block.values[c][w] = value_of<kSide>(block.values[c][w], scale);
  }
}

// Calls f with a value of the accumulation type and the Sides of a call.
template <class F>
TORCHCE_SIMD void with_number_and_sides(const Rows& rows, F f) {
  with_sides(rows, [&](auto sides) TORCHCE_HD_LAMBDA {
    if (rows.accumulation == DType::float64) return f(double{}, sides);
    f(float{}, sides);
  });
}

// Whether lanes run along each row: it is long, and its classes are adjacent in every operand.
template <class A>
bool lanes_run_along(const Rows& rows) {
  constexpr int64_t kLongRow = 12 * kLanes<A>;
  return rows.classes >= kLongRow && rows.first.strides.classes == 1 &&
         (rows.other.side == Side::none || rows.other.strides.classes == 1);
}

// The rows that are kept: 1, and 0 of those that the mask leaves out and of idle lanes.
template <class A, int W>
TORCHCE_SIMD PerRow<A, W> kept_rows(const Rows& rows, int64_t row, int count) {
  PerRow<A, W> kept{};
  if (rows.mask == nullptr) {
    for (int w = 0; w < W; ++w) {
      const auto is_there = lane_numbers<A>() < A(count - w * kLanes<A>);
      kept.set(w, math::select(is_there, broadcast(A(1)), Lanes<A>{}));
    }
    return kept;
  }
  RowPosition at(rows, row);
  for (int l = 0; l < count; ++l, at.advance(rows)) {
    kept[l] = is_kept(rows, at) ? A(1) : A(0);
  }
  return kept;
}

}  // namespace torchce::cpu::TORCHCE_LEVEL::divergences
