// Chunks over cores, and sums over chunks, in an order that the number of threads has no part in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../host/tensor.h"
#include "../storage.h"
#include "levels.h"

namespace torchce::cpu {

// Calls f(begin, end) for the chunks of [0, count), in parallel. A single chunk runs here, without asking for threads.
template <class F>
void for_each_chunk(int64_t count, int64_t chunk, const F& f) {
  const int64_t chunks = (count + chunk - 1) / chunk;
  if (chunks == 1) return f(0, count);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) f(c * chunk, std::min(count, (c + 1) * chunk));
  });
}

// Calls f(begin, end, partial) for the chunks of [0, count), in parallel, and adds the partials up in order.
template <class F>
Partial sum_over_chunks(int64_t count, int64_t chunk, const F& f) {
  std::vector<Partial> partials((count + chunk - 1) / chunk);
  for_each_chunk(count, chunk, [&](int64_t begin, int64_t end) { f(begin, end, &partials[begin / chunk]); });
  Partial total;
  for (const Partial& partial : partials) {
    total.loss += partial.loss;
    total.weight += partial.weight;
    if (total.bad_row < 0) total.bad_row = partial.bad_row;
  }
  return total;
}

// Writes the one value of a reduced loss; an unreduced one the kernels have written.
inline void store_reduced(Reduction reduction, double sum, double divisor, DType dtype, void* loss) {
  if (reduction == Reduction::none) return;
  store_as(dtype, loss, 0, reduction == Reduction::mean ? sum / divisor : sum);
}

}  // namespace torchce::cpu
