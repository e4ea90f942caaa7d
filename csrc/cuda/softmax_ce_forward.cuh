// Softmax cross entropy, forward: one read of the logits, one launch, the reduction included.
//
// Rows whose classes are adjacent in memory are read along the classes, by
// - a part of a warp each (short rows),
// - a block each (long rows),
// - several blocks each, where there are fewer rows than would fill the device.
// All other rows are read across: threads hold neighbouring rows, which are adjacent in memory wherever [N, C, d1...]
// is contiguous, and the classes come one after another.
#pragma once

#include "softmax_ce_sums.cuh"

namespace torchce::cuda::softmax_ce {

// Each row belongs to `lanes` neighbouring threads, a power of two up to a warp.
template <class T, class Target>
__global__ __launch_bounds__(kThreads, kBlocks<Target, T>) void forward_by_lanes(const Forward call, const int lanes,
                                                                                 const GridScratch scratch) {
  using A = Accumulate<T>;
  const Rows& rows = call.rows;
  const int64_t count = rows.outer * rows.inner, rows_of_block = kThreads / lanes, step = gridDim.x * rows_of_block;
  const int lane = threadIdx.x % lanes;
  int64_t r = blockIdx.x * rows_of_block + threadIdx.x / lanes;
  TargetAhead<Target> ahead(rows, r);
  LossSums total = LossSums::identity();
  for (int64_t first = blockIdx.x * rows_of_block; first < count; first += step, r += step) {
    const int64_t target = ahead.get();
    ahead.ask_for(r + step);
    auto sums = ClassSums<A, Target::kSpread>::identity();
    T hot_logit{};
    if (r < count && !is_ignored<Target>(rows, target)) {
      const RowPosition at(rows, r);
      if (lane == 0) hot_logit = load_hot_logit<T, Target>(rows, at, target);
      sums = sum_classes<T, Target>(rows, at, 0, rows.classes, lane, lanes);
    }
    sums = sums.of_lanes(lanes);
    if (r < count && lane == 0) finish_row<T, Target>(call, r, sums, target, hot_logit, total);
  }
  if (reduce_grid(total, scratch)) finish_launch<Target, A>(call, total);
}

// Each row belongs to a block.
template <class T, class Target>
__global__ __launch_bounds__(kThreads, kBlocks<Target, T>) void forward_by_block(const Forward call,
                                                                                 const GridScratch scratch) {
  using A = Accumulate<T>;
  const Rows& rows = call.rows;
  const int64_t count = rows.outer * rows.inner;
  TargetAhead<Target> ahead(rows, blockIdx.x);
  LossSums total = LossSums::identity();
  for (int64_t r = blockIdx.x; r < count; r += gridDim.x) {
    const int64_t target = ahead.get();
    ahead.ask_for(r + gridDim.x);
    auto sums = ClassSums<A, Target::kSpread>::identity();
    T hot_logit{};
    if (!is_ignored<Target>(rows, target)) {
      const RowPosition at(rows, r);
      if (threadIdx.x == 0) hot_logit = load_hot_logit<T, Target>(rows, at, target);
      sums = sum_classes<T, Target>(rows, at, 0, rows.classes, threadIdx.x, kThreads);
    }
    sums = reduce_block(sums);
    if (threadIdx.x == 0) finish_row<T, Target>(call, r, sums, target, hot_logit, total);
  }
  if (reduce_grid(total, scratch)) finish_launch<Target, A>(call, total);
}

// What the blocks of forward_by_parts share.
struct PartScratch {
  void* of_parts;              // [rows, parts], the parts' ClassSums
  LossSums* of_rows;           // [rows]
  unsigned* counters_of_rows;  // [rows], each zero before the launch, and again after it
  unsigned* counter;           // the same, of all rows
};

// Each row belongs to `parts` blocks, which take `part` classes each. The last block to be done with a row finishes
// the row, and the last of those finishes the launch.
template <class T, class Target>
__global__ __launch_bounds__(kThreads, kBlocks<Target, T>) void forward_by_parts(const Forward call, const int parts,
                                                                                 const int64_t part,
                                                                                 const PartScratch scratch) {
  using A = Accumulate<T>;
  using Part = ClassSums<A, Target::kSpread>;
  const Rows& rows = call.rows;
  const int64_t count = rows.outer * rows.inner, r = blockIdx.x / unsigned(parts);
  const int64_t begin = blockIdx.x % unsigned(parts) * part;
  const int64_t end = begin + part < rows.classes ? begin + part : rows.classes;
  const RowPosition at(rows, r);
  const uint64_t target_bits = load_target_bits<Target>(rows, at);
  auto sums = sum_classes<T, Target>(rows, at, begin, end, threadIdx.x, kThreads);
  sums = reduce_block(sums);
  const int64_t target = target_of(rows, target_bits);
  T hot_logit{};
  if (threadIdx.x == 0) {
    static_cast<Part*>(scratch.of_parts)[blockIdx.x] = sums;
    hot_logit = load_hot_logit<T, Target>(rows, at, target);
  }
  if (!is_last_block(scratch.counters_of_rows + r, unsigned(parts))) return;
  if (threadIdx.x < kWarp) {
    LossSums total = LossSums::identity();
    const Part* of_lane = static_cast<const Part*>(scratch.of_parts) + r * parts + threadIdx.x;
    const int of_this_lane = (parts - int(threadIdx.x) + kWarp - 1) / kWarp;
    sums = Part::of_each(of_this_lane, [&](int i) { return of_lane[i * kWarp]; }).of_lanes(kWarp);
    if (threadIdx.x == 0) {
      finish_row<T, Target>(call, r, sums, target, hot_logit, total);
      scratch.of_rows[r] = total;
    }
  }
  if (!is_last_block(scratch.counter, unsigned(count))) return;
  finish_launch<Target, A>(call, sum_of(scratch.of_rows, count));
}

// Finishes n adjacent rows of one image, from row r on: all that they wait for is asked for at once.
template <int n, class T, class Target, class A>
__device__ __forceinline__ void finish_rows(const Forward& call, int64_t r,
                                            const ClassSums<A, Target::kSpread> (&sums)[n], LossSums& total) {
  const Rows& rows = call.rows;
  const RowPosition at(rows, r);
  uint64_t target_bits[n];
  load_target_bits<Target>(rows, at, target_bits);
  T hot_logits[n];
#pragma unroll
  for (int v = 0; v < n; ++v) {
    hot_logits[v] = load_hot_logit<T, Target>(rows, at.plus(v), target_of(rows, target_bits[v]));
  }
#pragma unroll
  for (int v = 0; v < n; ++v) {
    finish_row<T, Target>(call, r + v, sums[v], target_of(rows, target_bits[v]), hot_logits[v], total);
  }
}

// Each block takes `columns` packs, a power of two, of V rows that are adjacent in memory; kThreads / columns threads
// share the classes of a pack. A thread that has a pack to itself finishes its rows from registers.
template <class T, class Target, int V>
__global__ __launch_bounds__(kThreads, kBlocksToFit) void forward_across(const Forward call, const int columns,
                                                                         const GridScratch scratch) {
  using A = Accumulate<T>;
  using Share = ClassSums<A, Target::kSpread>;
  __shared__ Share of_threads[kThreads * V];  // [class shares, columns, V]
  const Rows& rows = call.rows;
  const int64_t count = rows.outer * rows.inner, packs = count / V;
  const int column = threadIdx.x % columns, share = threadIdx.x / columns, shares = kThreads / columns;
  LossSums total = LossSums::identity();

  for (int64_t first = int64_t(blockIdx.x) * columns; first < packs; first += int64_t(gridDim.x) * columns) {
    const bool has_pack = first + column < packs;
    Share sums[V];
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] = Share::identity();
    if (has_pack) sum_across<V, T, Target>(rows, (first + column) * V, share, shares, sums);
    if (shares == 1) {
      if (has_pack) finish_rows<V, T, Target>(call, (first + column) * V, sums, total);
      continue;
    }
    __syncthreads();  // the rows before may still be read
#pragma unroll
    for (int v = 0; v < V; ++v) of_threads[threadIdx.x * V + v] = sums[v];
    __syncthreads();
    for (int row = threadIdx.x; row < columns * V; row += kThreads) {
      const int64_t r = first * V + row;
      if (r >= count) break;
      const Share whole[1] = {Share::of_each(shares, [&](int s) { return of_threads[s * columns * V + row]; })};
      finish_rows<1, T, Target>(call, r, whole, total);
    }
  }
  if (reduce_grid(total, scratch)) finish_launch<Target, A>(call, total);
}

}  // namespace torchce::cuda::softmax_ce
