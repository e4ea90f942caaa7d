// Clusters: blocks that run at the same time and read each other's shared memory, from compute capability 9.0 on.
// Elsewhere a cluster is one block.
#pragma once

#include <cooperative_groups.h>

#include "reduce.cuh"

namespace torchce::cuda {

#if !defined(__CUDACC__) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define TORCHCE_CLUSTERS 1  // and with any compiler but CUDA's: the emulation's
#endif

// The blocks size * i ... size * (i + 1) - 1 of a launch with clusters of that size.
struct Cluster {
  int size;

  __device__ __forceinline__ int rank() const { return int(blockIdx.x % unsigned(size)); }

  // Waits as __syncthreads does, for the threads of all blocks of the cluster.
  __device__ __forceinline__ void sync() const {
#if TORCHCE_CLUSTERS
    if (size > 1) {
      cooperative_groups::this_cluster().sync();
      return;
    }
#endif
    __syncthreads();
  }

  // Where the block of that rank has the shared variable that this block has at p.
  template <class Value>
  __device__ __forceinline__ const Value* of_block(const Value* p, int rank) const {
#if TORCHCE_CLUSTERS
    if (size > 1) return cooperative_groups::this_cluster().map_shared_rank(p, unsigned(rank));
#endif
    return p;
  }
};

// Combines the values of all threads of a cluster, block after block.
// Assumes: all threads of all its blocks call it. Result: in every thread.
template <class Value>
__device__ __forceinline__ Value reduce_cluster(Value value, const Cluster& cluster) {
  __shared__ Value of_this_block;
  value = reduce_block(value);
  if (threadIdx.x == 0) of_this_block = value;
  cluster.sync();
  value = Value::of_each(cluster.size, [&](int rank) { return *cluster.of_block(&of_this_block, rank); });
  cluster.sync();  // the next call writes again, and a block that ends takes its memory with it
  return value;
}

}  // namespace torchce::cuda
