// Reductions over lanes, blocks and the grid, all in an order that only the launch's shape decides.
//
// A value that is reduced has identity(), of_lanes(width), what `width` neighbouring lanes have together, and
// of_each(count, at), what at(0) to at(count - 1) are together. It has no constructor, so that it can lie in shared
// memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "launch_shape.h"

namespace torchce::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The sum over `width` neighbouring lanes, a power of two up to a warp, with the same bits in each of them.
// Assumes: all lanes of the warp call it.
template <class Number>
__device__ __forceinline__ Number sum_of_lanes(Number value, int width) {
  for (int step = width / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Combines the values of all threads of a block.
// Assumes: all threads call it. Result: in thread 0.
template <class Value>
__device__ __forceinline__ Value reduce_block(Value value) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kThreads % kWarp == 0 && kWarps <= kWarp && (kWarps & (kWarps - 1)) == 0);
  __shared__ Value of_warps[kWarps];
  value = value.of_lanes(kWarp);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  __syncthreads();  // an earlier call may still be reading
  if (lane == 0) of_warps[warp] = value;
  __syncthreads();
  if (warp == 0) {
    value = lane < kWarps ? of_warps[lane] : Value::identity();
    value = value.of_lanes(kWarps);
  }
  return value;
}

// A number that is added up.
template <class Number>
struct Sum {
  Number value;

  __device__ __forceinline__ static Sum identity() { return {0}; }
  __device__ __forceinline__ Sum of_lanes(int width) const { return {sum_of_lanes(value, width)}; }
};

// What a launch adds up to: the reduced loss before its division, and the divisor of a mean over class indices, or of a
// divergence's over rows.
struct LossSums {
  double loss;
  double weight;

  __device__ __forceinline__ static LossSums identity() { return {0, 0}; }
  __device__ __forceinline__ void add(const LossSums& other) {
    loss += other.loss;
    weight += other.weight;
  }
  __device__ __forceinline__ LossSums of_lanes(int width) const {
    return {sum_of_lanes(loss, width), sum_of_lanes(weight, width)};
  }
};

// Memory that the blocks of one launch share.
struct GridScratch {
  LossSums* of_blocks;  // one a block; unused by a single block
  unsigned* counter;    // zero before the launch, and again after it
};

// Whether this block is the last of `blocks` to come here, which share a counter. What the others wrote before is then
// visible to it.
// Assumes: all threads of all those blocks call it, once for that counter.
__device__ __forceinline__ bool is_last_block(unsigned* counter, unsigned blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();  // every thread's writes come before the count
  if (blocks == 1) return true;
  if (threadIdx.x == 0) last = atomicInc(counter, blocks - 1) == blocks - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// Adds `count` sums that other blocks wrote.
// Assumes: all threads of the block call it. Result: in thread 0.
__device__ __forceinline__ LossSums sum_of(const LossSums* sums, int64_t count) {
  LossSums sum = LossSums::identity();
  for (int64_t i = threadIdx.x; i < count; i += kThreads) sum.add(sums[i]);
  return reduce_block(sum);
}

// Sums over all threads of the grid.
// Assumes: all threads call it, once. Result: true in all threads of one block, whose thread 0 has the sums.
__device__ __forceinline__ bool reduce_grid(LossSums& sums, const GridScratch& scratch) {
  sums = reduce_block(sums);
  if (gridDim.x == 1) return true;
  if (threadIdx.x == 0) scratch.of_blocks[blockIdx.x] = sums;
  if (!is_last_block(scratch.counter, gridDim.x)) return false;
  sums = sum_of(scratch.of_blocks, gridDim.x);
  return true;
}

}  // namespace torchce::cuda
