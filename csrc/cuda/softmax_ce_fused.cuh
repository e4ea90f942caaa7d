// Softmax cross entropy, forward and backward in one: the logits are read once and the gradient is written over them.
// What a thread has read it keeps in shared memory, so that memory sees one read and one write; what does not fit there
// is read again.
//
// A row belongs to
// - a part of a warp (short rows),
// - a cluster of blocks, so that long rows fit into the shared memory of several.
// In both, a thread writes the classes that it read and no others.
#pragma once

#include "cluster.cuh"
#include "softmax_ce_backward.cuh"
#include "softmax_ce_forward.cuh"

namespace torchce::cuda::softmax_ce {

static_assert(kThreads == kBackwardThreads);

extern __shared__ uint4 dynamic_shared_memory[];  // [kept, kThreads]

// Where a thread keeps the first `count` packs that it reads of a row.
template <class T>
struct KeptPacks {
  static constexpr int V = kPack<T>;
  int count;

  __device__ __forceinline__ uint4& slot(int64_t number) const {
    return dynamic_shared_memory[number * kThreads + threadIdx.x];
  }
  __device__ __forceinline__ void keep(const Pack<T, V>& pack, int64_t number) const {
    if (number < count) std::memcpy(&slot(number), &pack, sizeof pack);
  }
  __device__ __forceinline__ Pack<T, V> load(const T* p, int64_t number) const {
    if (number >= count) return load_pack<V, Cache::stream>(p, true);
    Pack<T, V> pack;
    std::memcpy(&pack, &slot(number), sizeof pack);
    return pack;
  }
};

// The logit at the target of row r, where there is one: to be read before the gradient is written there.
template <class T, class Target, class A>
__device__ __forceinline__ A hot_logit_of(const Rows& rows, int64_t r) {
  if constexpr (Target::kProbabilities) return 0;
  const RowPosition at(rows, r);
  return logit_at<T>(rows, at, TargetClass(rows, at).index);
}

// `lanes` neighbouring threads a row, a power of two up to a warp.
template <class T, class Target>
__global__ __launch_bounds__(kThreads, kBlocksToFit) void forward_backward_by_lanes(const Forward forward,
                                                                                    const Backward backward,
                                                                                    const int lanes, const int kept,
                                                                                    const GridScratch scratch) {
  using A = Accumulate<T>;
  const Rows& rows = forward.rows;
  const int64_t count = rows.outer * rows.inner, rows_of_block = kThreads / lanes;
  const int lane = threadIdx.x % lanes;
  const KeptPacks<T> packs{kept};
  Sums total = Sums::identity();
  for (int64_t first = blockIdx.x * rows_of_block; first < count; first += gridDim.x * rows_of_block) {
    const int64_t r = first + threadIdx.x / lanes;
    auto sums = RowSums<A, Target::kSpread>::identity();
    A hot_logit = 0;
    if (r < count && !is_ignored<Target, A>(rows, r)) {
      add_classes<T, Target>(rows, r, 0, rows.classes, lane, lanes, sums,
                             [&](const auto& pack, int64_t number) { packs.keep(pack, number); });
      if (lane == 0) hot_logit = hot_logit_of<T, Target, A>(rows, r);
    }
    sums = reduce_lanes(sums, lanes).of_first_lane(lanes);
    __syncwarp();  // shuffles do not order the first lane's read before the others' writes
    if (r >= count) continue;
    if (lane == 0) finish_row<Target>(forward, r, sums, total, [&](RowPosition, int64_t) { return hot_logit; });
    const RowGradient<Target, A, Of::logits> row(backward, r, sums.max, sums.whole_exponentials(), sums.coefficients);
    write_gradient<T>(backward, r, 0, rows.classes, lane, lanes, row,
                      [&](const T* p, int64_t number) { return packs.load(p, number); });
  }
  if (reduce_grid<kThreads>(total, scratch)) finish_launch<Target, A, kThreads>(forward, total);
}

// A cluster of `blocks_of_row` blocks a row.
template <class T, class Target>
__global__ __launch_bounds__(kThreads, kBlocksToFit) void forward_backward_by_cluster(const Forward forward,
                                                                                      const Backward backward,
                                                                                      const int blocks_of_row,
                                                                                      const int kept,
                                                                                      const GridScratch scratch) {
  using A = Accumulate<T>;
  const Rows& rows = forward.rows;
  const int64_t count = rows.outer * rows.inner, clusters = gridDim.x / unsigned(blocks_of_row);
  const Cluster cluster{blocks_of_row};
  const int thread = cluster.rank() * kThreads + int(threadIdx.x), threads = blocks_of_row * kThreads;
  const KeptPacks<T> packs{kept};
  Sums total = Sums::identity();
  for (int64_t r = blockIdx.x / unsigned(blocks_of_row); r < count; r += clusters) {
    auto sums = RowSums<A, Target::kSpread>::identity();
    A hot_logit = 0;
    if (!is_ignored<Target, A>(rows, r)) {
      add_classes<T, Target>(rows, r, 0, rows.classes, thread, threads, sums,
                             [&](const auto& pack, int64_t number) { packs.keep(pack, number); });
      if (thread == 0) hot_logit = hot_logit_of<T, Target, A>(rows, r);
    }
    sums = reduce_cluster<kThreads>(sums, cluster);
    if (thread == 0) finish_row<Target>(forward, r, sums, total, [&](RowPosition, int64_t) { return hot_logit; });
    const RowGradient<Target, A, Of::logits> row(backward, r, sums.max, sums.whole_exponentials(), sums.coefficients);
    write_gradient<T>(backward, r, 0, rows.classes, thread, threads, row,
                      [&](const T* p, int64_t number) { return packs.load(p, number); });
  }
  if (reduce_grid<kThreads>(total, scratch)) finish_launch<Target, A, kThreads>(forward, total);
}

}  // namespace torchce::cuda::softmax_ce
