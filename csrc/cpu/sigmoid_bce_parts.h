// How the elements of a problem are spread over cores: in chunks that do not depend on how many there are.
#pragma once

#include "levels.h"
#include "reduce.h"
#include "sigmoid_bce_tiles.h"

namespace torchce::cpu {

constexpr int64_t kChunk = 1 << 14;  // elements

// Calls f(problem, its first element, its last one's successor, where its losses are added) for chunks of the elements,
// or for tiles where an operand's fast dimension is not the others'; gives the sum of the losses.
template <class F>
Partial for_each_part(const sigmoid_bce::Elements& elements, const F& f) {
  const Tiles tiles = tiles_of(elements);
  if (tiles.count == 0) {
    return sum_over_chunks(elements.numel, kChunk,
                           [&](int64_t begin, int64_t end, Partial* partial) { f(elements, begin, end, partial); });
  }
  return sum_over_chunks(tiles.count, 1, [&](int64_t number, int64_t, Partial* partial) {
    const sigmoid_bce::Elements tile = tile_of(elements, tiles, number);
    f(tile, 0, tile.sizes[0] * tile.sizes[1], partial);
  });
}

// Writes the loss of all elements, where it is one.
inline void store_reduced(const sigmoid_bce::Elements& elements, double sum) {
  store_reduced(elements.options.reduction, sum, double(elements.numel), elements.dtypes[sigmoid_bce::kOutput],
                elements.output);
}

}  // namespace torchce::cpu
