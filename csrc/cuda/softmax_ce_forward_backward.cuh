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

extern __shared__ uint4 dynamic_shared_memory[];  // [kept, kThreads]

// Blocks of a cluster's kernel that must fit on a multiprocessor at once. Three of them let some read while others
// write, where its shared memory holds as many and 80 registers are enough, which they are not for Half's conversions.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
template <class Target, class T>
constexpr int kBlocksOfClusters = std::is_same_v<T, Half> ? kBlocksToFit : kBlocks<Target, T>;
#else
template <class Target, class T>
constexpr int kBlocksOfClusters = kBlocksToFit;
#endif

// Where a thread keeps the first `count` packs that it reads of a row.
template <class T>
struct KeptPacks {
  static constexpr int V = kPack<T>;
  int count;

  __device__ __forceinline__ uint4& slot(int number) const {
    return dynamic_shared_memory[number * kThreads + threadIdx.x];
  }
  __device__ __forceinline__ void keep(const Pack<T, V>& pack, int number) const {
    if (number < count) std::memcpy(&slot(number), &pack, sizeof pack);
  }
  __device__ __forceinline__ Pack<T, V> load(const T* p, int number) const {
    if (number >= count) return load_pack<V, Cache::stream>(p, true);
    Pack<T, V> pack;
    std::memcpy(&pack, &slot(number), sizeof pack);
    return pack;
  }
};

// Writes the gradient of a row whose sums are known, those classes of it that the thread has read.
template <class T, class Target, class A>
__device__ __forceinline__ void write_row(const Backward& call, RowPosition at, int thread, int threads,
                                          const ClassSums<A, Target::kSpread>& sums, int64_t target,
                                          const KeptPacks<T>& packs) {
  const auto row = [&] {
    uint64_t grad_output[1];
    load_grad_output_bits(call, at, grad_output);
    const RowInputs<A> inputs{
        grad_output[0],   1,  // no mean, whose divisor would be known only after the last row
        uint64_t(target), sums.max, sums.whole_exponentials(), sums.coefficients, A(0), A(0), A(0)};
    return RowGradient<T, Target, GradientOf::logits>(call, inputs);
  };
  write_gradient<T, Target, GradientOf::logits, /*kInPlace=*/true>(
      call, at, 0, call.rows.classes, thread, threads, row,
      [&](const T* p, int number) { return packs.load(p, number); });
}

// Each row belongs to `lanes` neighbouring threads, a power of two up to a warp.
template <class T, class Target>
__global__ __launch_bounds__(kThreads, kBlocksToFit) void forward_backward_by_lanes(const Forward forward,
                                                                                    const Backward backward,
                                                                                    const int lanes, const int kept,
                                                                                    const GridScratch scratch) {
  using A = Accumulate<T>;
  const Rows& rows = forward.rows;
  const int64_t count = rows.outer * rows.inner, rows_of_block = kThreads / lanes, step = gridDim.x * rows_of_block;
  const int lane = threadIdx.x % lanes;
  const KeptPacks<T> packs{kept};
  int64_t r = blockIdx.x * rows_of_block + threadIdx.x / lanes;
  TargetAhead<Target> ahead(rows, r);
  LossSums total = LossSums::identity();
  for (int64_t first = blockIdx.x * rows_of_block; first < count; first += step, r += step) {
    const int64_t target = ahead.get();
    auto sums = ClassSums<A, Target::kSpread>::identity();
    T hot_logit{};
    const RowPosition at(rows, r < count ? r : 0);
    if (r < count && !is_ignored<Target>(rows, target)) {
      if (lane == 0) hot_logit = load_hot_logit<T, Target>(rows, at, target);
      sums = sum_classes<T, Target>(rows, at, 0, rows.classes, lane, lanes,
                                    [&](const auto& pack, int number) { packs.keep(pack, number); });
    }
    ahead.ask_for(r + step);
    sums = sums.of_lanes(lanes);
    __syncwarp();  // shuffles do not order the first lane's read before the others' writes
    if (r >= count) continue;
    if (lane == 0) finish_row<T, Target>(forward, r, sums, target, hot_logit, total);
    write_row<T, Target>(backward, at, lane, lanes, sums, target, packs);
  }
  if (reduce_grid(total, scratch)) finish_launch<Target, A>(forward, total);
}

// Each row belongs to a cluster of `blocks_of_row` blocks.
template <class T, class Target>
__global__ __launch_bounds__(kThreads, kBlocksOfClusters<Target, T>) void forward_backward_by_cluster(
    const Forward forward, const Backward backward, const int blocks_of_row, const int kept,
    const GridScratch scratch) {
  using A = Accumulate<T>;
  const Rows& rows = forward.rows;
  const int64_t count = rows.outer * rows.inner, clusters = gridDim.x / unsigned(blocks_of_row);
  const Cluster cluster{blocks_of_row};
  const int thread = cluster.rank() * kThreads + int(threadIdx.x), threads = blocks_of_row * kThreads;
  const KeptPacks<T> packs{kept};
  const int64_t first = blockIdx.x / unsigned(blocks_of_row);
  TargetAhead<Target> ahead(rows, first);
  __shared__ LossSums total;  // thread 0's, kept out of the registers that a row's logits need
  if (threadIdx.x == 0) total = LossSums::identity();
  for (int64_t r = first; r < count; r += clusters) {
    const int64_t target = ahead.get();
    auto sums = ClassSums<A, Target::kSpread>::identity();
    T hot_logit{};
    if (!is_ignored<Target>(rows, target)) {
      const RowPosition at(rows, r);
      if (thread == 0) hot_logit = load_hot_logit<T, Target>(rows, at, target);
      sums = sum_classes<T, Target>(rows, at, 0, rows.classes, thread, threads,
                                    [&](const auto& pack, int number) { packs.keep(pack, number); });
    }
    ahead.ask_for(r + clusters);
    sums = reduce_cluster(sums, cluster);
    if (thread == 0) finish_row<T, Target>(forward, r, sums, target, hot_logit, total);
    write_row<T, Target>(backward, RowPosition(rows, r), thread, threads, sums, target, packs);
  }
  LossSums sums_of_grid = threadIdx.x == 0 ? total : LossSums::identity();
  if (reduce_grid(sums_of_grid, scratch)) finish_launch<Target, A>(forward, sums_of_grid);
}

}  // namespace torchce::cuda::softmax_ce
