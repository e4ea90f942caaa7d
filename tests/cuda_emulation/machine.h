// The machine that runs the kernels: one block at a time, or the blocks of one cluster in turns; every thread a fiber.
//
// What can differ between two runs on a GPU is drawn at random here, from a seed: the order of the blocks, whose turn
// it is in a cluster, and which thread goes on whenever one waits. Lanes of a warp are not in step either, as on any
// GPU since Volta. So a thread that needed a barrier to see another's writes reads, sooner or later, what shared memory
// was filled with before the block began: bytes of 0xff, which are NaN.
//
// Refused, with std::runtime_error naming kernel, block and threads, instead of running into undefined behaviour: a
// barrier or warp operation that some thread named in it does not reach (it ended, or waits elsewhere), two different
// __syncthreads that meet, a lane outside its own mask, a shuffle from a lane outside the mask, dynamic shared memory
// written beyond what the launch asked for, shared memory of a block that has ended or is of another cluster.
//
// Not modelled: clusters that run at the same time (so no __threadfence is ever missed), threads that are interrupted
// between two of the operations below, blocks that are interrupted between two of their cluster's barriers. Whether a
// block has ended is asked where its memory is mapped, not where it is read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

namespace cuda_emulation {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;  // of a block

struct Index {
  unsigned x, y, z;
};

using Site = std::source_location;  // of a barrier or warp operation, for reports

enum class Operation : uint8_t { syncwarp, shfl, shfl_xor, shfl_down, shfl_up, ballot, any, all };

// __syncthreads.
void block_barrier(Site site);

// Of all blocks of the cluster.
void cluster_barrier(Site site);

// Where the block of that rank in the cluster has the shared variable that the running one has at p. Until the next
// cluster_barrier.
void* shared_memory_of(const void* p, unsigned rank, Site site);

// Waits until all lanes in `mask` are in the same operation. A shuffle returns what lane `source` of the warp gave as
// `value`; a vote takes the truth of every lane's value.
uint64_t warp_operation(Operation operation, unsigned mask, uint64_t value, int source, Site site);

// Where other threads may run, though this one need not wait.
void preemption_point();

unsigned lane_of_this_thread();

struct DynamicSharedMemory {
  const unsigned char* begin;
  size_t size;  // bytes; a launch may ask for fewer
};

struct Launch {
  const void* kernel;                   // to be named in reports
  unsigned blocks, threads, cluster;    // in the grid, in a block; blocks in a cluster, which divide the grid's
  void (*thread)(const void* closure);  // what each thread does
  const void* closure;
  const unsigned char* shared_variable;  // one of the kernels', by which the others are found
  DynamicSharedMemory dynamic_shared_memory;
  size_t dynamic_shared_bytes;  // of it, that the launch asked for
};
void launch(const Launch& launch);

}  // namespace cuda_emulation

// For the tests, through ctypes.
extern "C" {
void cuda_emulation_seed(uint64_t seed);  // of all launches from here on
uint64_t cuda_emulation_launches();       // so far
uint64_t cuda_emulation_switches();       // between fibers, so far
const char* cuda_emulation_kernels();     // the names of those launched so far, one a line
const char* cuda_emulation_last_kernel();
}
