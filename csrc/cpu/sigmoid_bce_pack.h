// Copies the operands of a tile that are read across (sigmoid_bce_tiles.h) into the order of the others.
#pragma once

#include <memory>

#include "../sigmoid_bce_element.h"
#include "sigmoid_bce_tiles.h"
#include "vector.h"

namespace torchce::cpu::TORCHCE_LEVEL {

namespace bce {

using namespace sigmoid_bce;

// Moves kLanes<A> integers of type I to and from the bits of a vector, which is as wide or wider.
template <class A, class I>
TORCHCE_SIMD Lanes<A> load_bits(const I* p) {
  using Wide = std::conditional_t<sizeof(A) == sizeof(double), Longs, Ints>;
  typename VectorOf<I, kLanes<A>>::type stored;
  std::memcpy(&stored, p, sizeof stored);
  Wide wide;
  if constexpr (sizeof(I) == 1) {  // by doubling: GCC takes a longer step lane by lane
    wide = __builtin_convertvector(__builtin_convertvector(stored, typename VectorOf<uint16_t, kLanes<A>>::type), Wide);
  } else {
    wide = __builtin_convertvector(stored, Wide);
  }
  Lanes<A> v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}

template <class A, class I>
TORCHCE_SIMD void store_bits(I* p, Lanes<A> v) {
  using Wide = std::conditional_t<sizeof(A) == sizeof(double), Longs, Ints>;
  using Stored = typename VectorOf<I, kLanes<A>>::type;
  Wide wide;
  std::memcpy(&wide, &v, sizeof wide);
  Stored stored;
  if constexpr (sizeof(I) == 1) {
    stored =
        __builtin_convertvector(__builtin_convertvector(wide, typename VectorOf<uint16_t, kLanes<A>>::type), Stored);
  } else {
    stored = __builtin_convertvector(wide, Stored);
  }
  std::memcpy(p, &stored, sizeof stored);
}

// to[a * inner + i] = from[a * strides[0] + i * strides[1]], as integers of the elements' width.
//
// Neighbours along `across` are moved in squares of lanes. The last square of a row or column overlaps the one before.
// Where `inner` is shorter than a square, what is written beyond a row is overwritten by the next one's; beyond the
// last there must be room for a vector.
template <class I>
void copy_across(const I* from, const int64_t* strides, int64_t across, int64_t inner, I* to) {
  using A = std::conditional_t<sizeof(I) == sizeof(double), double, float>;
  constexpr int L = kLanes<A>;
  if (across < L || strides[0] != 1 || strides[1] == 0) {
    for (int64_t a = 0; a < across; ++a) {
      for (int64_t i = 0; i < inner; ++i) to[a * inner + i] = from[a * strides[0] + i * strides[1]];
    }
    return;
  }
  for (int64_t i = 0; i < inner; i += L) {
    const int64_t first = i + L <= inner || inner < L ? i : inner - L;
    const int rows = inner < L ? int(inner) : L;
    for (int64_t a = 0; a < across; a += L) {
      const int64_t column = a + L <= across ? a : across - L;
      Lanes<A> square[L] = {};
      for (int l = 0; l < rows; ++l) square[l] = load_bits<A>(from + (first + l) * strides[1] + column);
      transpose<A>(square);
      for (int l = 0; l < L; ++l) store_bits<A>(to + (column + l) * inner + first, square[l]);
    }
  }
}

// Whether a copy of the operand is worth its time: it is read across, or it is a weight that repeats and would keep
// short rows from being joined.
TORCHCE_SIMD bool is_copied(const Elements& tile, int operand) {
  constexpr int64_t kShort = 256;
  const int64_t* strides = tile.strides[operand];
  if (operand == kOutput) return false;
  if (strides[0] == 1 && strides[1] > 1) return true;
  return (operand == kWeight || operand == kPosWeight) && tile.sizes[1] < kShort && strides[0] + strides[1] == 1;
}

// Whether this is a tile: the host makes one of every problem that has such an operand.
TORCHCE_SIMD bool is_tile(const Elements& problem) {
  if (problem.dims != 2) return false;
  for (const Operand operand : {kLogits, kTarget, kWeight, kPosWeight, kGradOutput}) {
    if (problem.strides[operand][0] == 1 && problem.strides[operand][1] > 1) return true;
  }
  return false;
}

// Calls f(the tile with its operands in one order), whose dimensions are merged where that makes them one.
template <class F>
__attribute__((noinline)) void with_packed_operands(const Elements& tile, F f) {
  std::unique_ptr<char[]> buffers[kOutput];  // not on the stack, which some threads have little of
  Elements packed = tile;
  const int64_t across = tile.sizes[0], inner = tile.sizes[1];
  bool merges = true;
  for (int operand = 0; operand < kOperands; ++operand) {
    int64_t* strides = packed.strides[operand];
    if (is_copied(tile, operand)) {
      buffers[operand].reset(new char[kTileBytes + kBytes]);
      const auto copy = [&](auto integer) {
        using I = decltype(integer);
        copy_across(static_cast<const I*>(tile.data[operand]), strides, across, inner,
                    reinterpret_cast<I*>(buffers[operand].get()));
      };
      switch (bytes_of(tile.dtypes[operand])) {
        case 8:
          copy(uint64_t{});
          break;
        case 4:
          copy(uint32_t{});
          break;
        case 2:
          copy(uint16_t{});
          break;
        default:
          copy(uint8_t{});
      }
      packed.data[operand] = buffers[operand].get();
      strides[0] = inner;
      strides[1] = 1;
    }
    merges = merges && strides[0] == strides[1] * inner;
  }
  if (merges) {
    packed.dims = 1;
    packed.sizes[0] = across * inner;
    for (auto& strides : packed.strides) strides[0] = strides[1];
  }
  f(packed);
}

}  // namespace bce

}  // namespace torchce::cpu::TORCHCE_LEVEL
