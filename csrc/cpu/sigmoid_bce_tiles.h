// Tiles of a sigmoid_bce problem in which an operand's fast dimension is not the others', such as logits in
// channels_last beside a contiguous target: that operand is copied into the others' order first, tile by tile
// (sigmoid_bce_pack.h).
#pragma once

#include <algorithm>

#include "../storage.h"

namespace torchce::cpu {

// Bytes of an operand in a tile at most, and elements along its fast dimension if that is as long: two cache lines of
// float32.
constexpr int64_t kTileBytes = 1 << 15, kTileAcross = 32;

// How a problem is cut. Tiles are numbered with the innermost dimension fastest.
struct Tiles {
  int64_t count = 0;  // 0: no operand is read across
  int across = 0;     // the dimension in which such an operand's elements are neighbours
  int64_t sizes[sigmoid_bce::kMaxDims] = {};
};

// The dimension in which neighbours of an operand lie that are not neighbours in the innermost one, or -1.
inline int dimension_across(const sigmoid_bce::Elements& problem) {
  using namespace sigmoid_bce;
  for (const Operand operand : {kLogits, kTarget, kWeight, kPosWeight, kGradOutput}) {
    const int64_t* strides = problem.strides[operand];
    if (problem.data[operand] == nullptr || strides[problem.dims - 1] <= 1) continue;
    const int64_t* found = std::find(strides, strides + problem.dims - 1, 1);
    if (found != strides + problem.dims - 1) return int(found - strides);
  }
  return -1;
}

inline Tiles tiles_of(const sigmoid_bce::Elements& problem) {
  using namespace sigmoid_bce;
  Tiles tiles;
  if (problem.numel == 0) return tiles;
  tiles.across = dimension_across(problem);
  if (tiles.across < 0) return tiles;
  int widest = 1;
  for (int operand = 0; operand < kOutput; ++operand) {
    if (problem.data[operand] != nullptr) widest = std::max(widest, bytes_of(problem.dtypes[operand]));
  }
  const int inner = problem.dims - 1;
  const int64_t elements = kTileBytes / widest;
  const int64_t across = std::max(elements / problem.sizes[inner] / kTileAcross, int64_t(1)) * kTileAcross;
  std::fill_n(tiles.sizes, inner, 1);
  tiles.sizes[tiles.across] = std::min(problem.sizes[tiles.across], across);
  tiles.sizes[inner] = std::min(problem.sizes[inner], elements / tiles.sizes[tiles.across]);
  tiles.count = 1;
  for (int d = 0; d < problem.dims; ++d) tiles.count *= (problem.sizes[d] + tiles.sizes[d] - 1) / tiles.sizes[d];
  return tiles;
}

// The problem of one tile: dimension `across`, and within it the innermost one. A mean is still over all elements.
inline sigmoid_bce::Elements tile_of(const sigmoid_bce::Elements& problem, const Tiles& tiles, int64_t number) {
  using namespace sigmoid_bce;
  const int inner = problem.dims - 1;
  Elements tile = problem;
  int64_t offsets[kOperands] = {};
  for (int d = inner; d >= 0; --d) {
    const int64_t blocks = (problem.sizes[d] + tiles.sizes[d] - 1) / tiles.sizes[d];
    const int64_t first = number % blocks * tiles.sizes[d];
    number /= blocks;
    for (int operand = 0; operand < kOperands; ++operand) offsets[operand] += first * problem.strides[operand][d];
    if (d == tiles.across || d == inner) {
      tile.sizes[d == inner] = std::min(tiles.sizes[d], problem.sizes[d] - first);
    }
  }
  tile.dims = 2;
  for (int operand = 0; operand < kOperands; ++operand) {
    tile.strides[operand][0] = problem.strides[operand][tiles.across];
    tile.strides[operand][1] = problem.strides[operand][inner];
    if (tile.data[operand] != nullptr) {
      tile.data[operand] =
          static_cast<const char*>(tile.data[operand]) + offsets[operand] * bytes_of(tile.dtypes[operand]);
    }
  }
  const bool writes_each = tile.data[kGradOutput] != nullptr || tile.options.reduction == Reduction::none;
  if (writes_each) tile.output = static_cast<char*>(tile.output) + offsets[kOutput] * bytes_of(tile.dtypes[kOutput]);
  return tile;
}

}  // namespace torchce::cpu
