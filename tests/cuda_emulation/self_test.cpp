// What the emulation promises, on kernels of a few lines. Exits with 0 if all of it holds; prints its speed.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "cooperative_groups.h"
#include "cuda_runtime.h"

namespace kernels {

enum class Fault { none, no_barrier_before_read, no_barrier_before_reuse };

// Sums 3 * blockDim.x numbers a block, in three rounds over the same shared memory.
template <class T, Fault fault>
__global__ void block_sum(const T* in, T* out) {
  __shared__ T partial[32];
  T total = 0;
  for (int round = 0; round < 3; ++round) {
    T sum = in[(blockIdx.x * 3 + round) * blockDim.x + threadIdx.x];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
    if (fault != Fault::no_barrier_before_reuse) __syncthreads();
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
    if (fault != Fault::no_barrier_before_read) __syncthreads();
    for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += partial[warp];
  }
  if (threadIdx.x == 0) out[blockIdx.x] = total;
}

// Reverses 32 numbers through shared memory.
template <bool synchronised>
__global__ void reverse_warp(const float* in, float* out) {
  __shared__ float copy[32];
  copy[threadIdx.x] = in[threadIdx.x];
  if (synchronised) __syncwarp();
  out[threadIdx.x] = copy[31 - threadIdx.x];
}

// Both halves of a warp on their own ways, which differ in length.
__global__ void halves(int* out, unsigned* votes) {
  int value = threadIdx.x;
  if (threadIdx.x < 16) {
    for (int step = 8; step > 0; step /= 2) value += __shfl_down_sync(0x0000ffff, value, step, 16);
    votes[threadIdx.x] = __ballot_sync(0x0000ffff, threadIdx.x % 3 == 0);
  } else {
    value = __shfl_sync(0xffff0000, value, 5, 16);
    votes[threadIdx.x] = __any_sync(0xffff0000, threadIdx.x == 40) + 2 * __all_sync(0xffff0000, threadIdx.x > 15);
  }
  out[threadIdx.x] = value;
  out[threadIdx.x] += 1000 * __shfl_up_sync(0xffffffff, int(threadIdx.x), 1);
}

// The block that ends last adds up what all wrote; the counter is left as it was found.
__global__ void last_block_sum(float* partials, unsigned* counter, float* out) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = float(1 + blockIdx.x);
    __threadfence();
    last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last || threadIdx.x != 0) return;
  out[0] = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) out[0] += partials[block];
}

__global__ void record_order(unsigned* next, unsigned* order) { order[atomicAdd(next, 1)] = blockIdx.x; }

__global__ void ends_before_barrier() {
  if (threadIdx.x == 7) return;
  __syncthreads();
}

__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void different_masks() { __syncwarp(threadIdx.x == 3 ? 0x0000ffff : 0xffffffff); }

__global__ void different_operations() {
  if (threadIdx.x == 3) {
    __syncwarp();
  } else {
    __any_sync(0xffffffff, 1);
  }
}

__global__ void barrier_instead_of_shuffle() {
  if (threadIdx.x == 40) {
    __syncthreads();
  } else {
    __shfl_sync(0xffffffff, 1, 0);
  }
}

__global__ void not_in_mask() { __syncwarp(threadIdx.x == 3 ? 0xfffffff7 : 0xffffffff); }

__global__ void reads_outside_mask() {
  if (threadIdx.x < 16) __shfl_sync(0x0000ffff, 1, 20);
}

__global__ void reads_unwritten(double* out) {
  __shared__ double partly_written[4];
  if (threadIdx.x == 0) partly_written[0] = 1;
  __syncthreads();
  out[threadIdx.x] = partly_written[threadIdx.x];
}

extern __shared__ float dynamic[];
__shared__ float dynamic[64];

__global__ void writes_dynamic(int count, double* sum) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) dynamic[i] = 1;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < count; ++i) *sum += dynamic[i];
  }
}

enum class ClusterFault { none, no_sync_before_read, no_sync_before_reuse };

// Each block of a cluster adds up one number of every block, in three rounds over the same shared memory.
template <ClusterFault fault>
__global__ void cluster_sum(float* out) {
  __shared__ float mine;
  const auto cluster = cooperative_groups::this_cluster();
  float total = 0;
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x == 0) mine = float(blockIdx.x + round);
    if (fault != ClusterFault::no_sync_before_read) cluster.sync();
    for (unsigned rank = 0; rank < 4; ++rank) total += *cluster.map_shared_rank(&mine, rank);
    if (fault != ClusterFault::no_sync_before_reuse || round == 2) cluster.sync();
  }
  if (threadIdx.x == 32) out[blockIdx.x] = total;
}

__global__ void block_ends_before_cluster_sync() {
  if (blockIdx.x % 4 == 2) return;
  cooperative_groups::this_cluster().sync();
}

__global__ void thread_waits_for_its_block_alone() {
  if (blockIdx.x == 5 && threadIdx.x == 1) {
    __syncthreads();
  } else {
    cooperative_groups::this_cluster().sync();
  }
}

__global__ void reads_of_a_block_that_may_have_ended(float* out) {
  __shared__ float mine;
  mine = 1;
  cooperative_groups::this_cluster().sync();
  *out = *cooperative_groups::this_cluster().map_shared_rank(&mine, 3);
}

__global__ void reads_of_another_cluster() {
  __shared__ float mine;
  cooperative_groups::this_cluster().map_shared_rank(&mine, 4);
}

__global__ void maps_what_is_not_shared(float* out) { cooperative_groups::this_cluster().map_shared_rank(out, 0); }

}  // namespace kernels

cuda_emulation::DynamicSharedMemory cuda_emulation::dynamic_shared_memory() {
  return {reinterpret_cast<const unsigned char*>(kernels::dynamic), sizeof kernels::dynamic};
}

using namespace kernels;

int failures = 0;

void expect(bool condition, const char* what, int line) {
  if (condition) return;
  ++failures;
  std::printf("self_test.cpp:%d: %s\n", line, what);
}
#define EXPECT(...) expect(__VA_ARGS__, #__VA_ARGS__, __LINE__)

template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  EXPECT(cudaLaunchKernelEx(&config, kernel, arguments...) == cudaSuccess);
}

// In clusters of four blocks.
template <class... Parameters, class... Arguments>
void run_clusters(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, Arguments... arguments) {
  cudaLaunchAttribute cluster{.id = cudaLaunchAttributeClusterDimension, .val = {.clusterDim = {4, 1, 1}}};
  cudaLaunchConfig_t config{.gridDim = blocks, .blockDim = threads, .attrs = &cluster, .numAttrs = 1};
  EXPECT(cudaLaunchKernelEx(&config, kernel, arguments...) == cudaSuccess);
}

// What the machine says about a launch that it refuses.
std::string refusal(const std::function<void()>& launch) {
  try {
    launch();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "not refused";
}

template <class Kernel>
std::string refusal(Kernel kernel, unsigned threads) {
  return refusal([&] { run(kernel, 1, threads); });
}

template <class... Arguments>
std::string refusal_of_clusters(void (*kernel)(Arguments...), Arguments... arguments) {
  return refusal([&] { run_clusters(kernel, 8, 64, arguments...); });
}

bool contains(const std::string& text, const std::string& part) {
  if (text.find(part) != std::string::npos) return true;
  std::printf("'%s' is not in: %s\n", part.c_str(), text.c_str());
  return false;
}

// In how many of 100 seeds `right` holds.
int seeds_where(const std::function<bool()>& right) {
  int count = 0;
  for (int seed = 0; seed < 100; ++seed) {
    cuda_emulation_seed(seed);
    count += right();
  }
  return count;
}

template <class T, Fault fault>
bool block_sum_is_right() {
  constexpr unsigned kBlocks = 3, kThreads = 128;
  std::vector<T> in(3 * kBlocks * kThreads), out(kBlocks, T(-1));
  for (size_t i = 0; i < in.size(); ++i) in[i] = T(i);
  run(block_sum<T, fault>, kBlocks, kThreads, in.data(), out.data());
  bool right = true;
  for (unsigned block = 0; block < kBlocks; ++block) {
    const double numbers = 3.0 * kThreads, first = block * numbers;
    right = right && out[block] == T(numbers * first + numbers * (numbers - 1) / 2);
  }
  return right;
}

template <bool synchronised>
bool reversal_is_right() {
  float in[32], out[32];
  for (int i = 0; i < 32; ++i) in[i] = float(i);
  run(reverse_warp<synchronised>, 1, 32, in, out);
  for (int i = 0; i < 32; ++i) {
    if (out[i] != in[31 - i]) return false;
  }
  return true;
}

bool halves_are_right() {
  int out[32];
  unsigned votes[32];
  run(halves, 1, 32, out, votes);
  bool right = out[0] == 120 && votes[0] == 0b1001001001001001 && votes[31] == 2;
  for (int i = 16; i < 32; ++i) right = right && out[i] == 21 + 1000 * (i - 1);
  return right;
}

bool last_block_is_right() {
  float partials[7] = {}, out = -1;
  unsigned counter = 0;
  run(last_block_sum, 7, 64, partials, &counter, &out);
  return out == 28 && counter == 0;
}

template <ClusterFault fault>
bool cluster_sum_is_right() {
  constexpr unsigned kBlocks = 12;
  float out[kBlocks];
  if (refusal([&] { run_clusters(cluster_sum<fault>, kBlocks, 64, &out[0]); }) != "not refused") return false;
  for (unsigned block = 0; block < kBlocks; ++block) {
    const unsigned first = block / 4 * 4;
    if (out[block] != 3.f * float(4 * first + 6) + 4 * 3) return false;
  }
  return true;
}

void test_cluster_refusals() {
  const std::string text = refusal_of_clusters(block_ends_before_cluster_sync);
  EXPECT(contains(text, "of 8, 64 threads"));
  EXPECT(contains(text, "deadlock: threads 0-63 in the cluster's sync at self_test.cpp:"));
  EXPECT(contains(refusal_of_clusters(thread_waits_for_its_block_alone), "deadlock: threads"));
  int refused = 0;
  EXPECT(seeds_where([&] {
           float out;
           const std::string text = refusal_of_clusters(reads_of_a_block_that_may_have_ended, &out);
           refused += text != "not refused";
           return text == "not refused" || contains(text, "for memory of block 3 of its cluster, which has ended");
         }) == 100);
  EXPECT(refused >= 50);
  EXPECT(contains(refusal_of_clusters(reads_of_another_cluster), "block 4 of its cluster, which has no such block"));
  float out;
  EXPECT(contains(refusal_of_clusters(maps_what_is_not_shared, &out), "which is not shared memory"));
  EXPECT(cluster_sum_is_right<ClusterFault::none>());  // a refusal leaves nothing behind
}

void test_orders() {
  std::set<std::vector<unsigned>> seen;
  seeds_where([&] {
    std::vector<unsigned> order(3);
    unsigned next = 0;
    run(record_order, 3, 1, &next, order.data());
    return seen.insert(order).second;
  });
  EXPECT(seen.size() == 6);
}

void test_refusals() {
  std::string text = refusal(ends_before_barrier, 64);
  EXPECT(contains(text, "kernels::ends_before_barrier()"));
  EXPECT(contains(text, "block 0 of 1, 64 threads"));
  EXPECT(contains(text, "deadlock: threads 0-6 in __syncthreads at self_test.cpp:"));
  EXPECT(contains(text, "thread 7 ended; threads 8-63 in __syncthreads"));
  EXPECT(contains(refusal(two_barriers, 64), "while others wait in the one at self_test.cpp:"));
  EXPECT(contains(refusal(different_masks, 32), "thread 3 in __syncwarp with mask 0xffff at self_test.cpp:"));
  EXPECT(contains(refusal(different_operations, 32), "threads 4-31 in __any_sync with mask 0xffffffff"));
  EXPECT(contains(refusal(barrier_instead_of_shuffle, 64), "thread 40 in __syncthreads"));
  EXPECT(
      contains(refusal(not_in_mask, 32), "thread 3 names lane 3, which is not in its mask 0xfffffff7, in __syncwarp"));
  EXPECT(contains(refusal(reads_outside_mask, 32), "names lane 20, which is not in its mask 0xffff, in __shfl_sync"));
  EXPECT(block_sum_is_right<float, Fault::none>());  // a refusal leaves nothing behind
}

void test_configurations() {
  cudaLaunchConfig_t config{};
  for (const auto& [blocks, threads] : {std::pair{0u, 32u}, {1u, 0u}, {1u, 1025u}, {1u << 31, 32u}}) {
    config.gridDim = blocks;
    config.blockDim = threads;
    EXPECT(cudaLaunchKernelEx(&config, ends_before_barrier) == cudaErrorInvalidConfiguration);
    EXPECT(cudaGetLastError() == cudaErrorInvalidConfiguration);
    EXPECT(cudaGetLastError() == cudaSuccess);
  }
  config.gridDim = 6;  // no whole clusters
  config.blockDim = 32;
  cudaLaunchAttribute cluster{.id = cudaLaunchAttributeClusterDimension, .val = {.clusterDim = {4, 1, 1}}};
  config.attrs = &cluster;
  config.numAttrs = 1;
  EXPECT(cudaLaunchKernelEx(&config, ends_before_barrier) == cudaErrorInvalidConfiguration);
  EXPECT(cudaGetLastError() == cudaErrorInvalidConfiguration);
}

void test_shared_memory_is_poisoned() {
  double out[4] = {};
  run(reads_unwritten, 1, 4, out);
  EXPECT(out[0] == 1);
  for (int i = 1; i < 4; ++i) EXPECT(std::isnan(out[i]));
}

void test_dynamic_shared_memory() {
  const auto sum_of = [](int count) {
    cudaLaunchConfig_t config{};
    config.gridDim = 3;
    config.blockDim = 32;
    config.dynamicSmemBytes = 40 * sizeof(float);
    double sum = 0;
    EXPECT(cudaLaunchKernelEx(&config, writes_dynamic, count, &sum) == cudaSuccess);
    return sum;
  };
  EXPECT(sum_of(40) == 120);
  try {
    sum_of(41);
    EXPECT(false);
  } catch (const std::runtime_error& error) {
    EXPECT(contains(error.what(), "wrote beyond its 160 bytes of dynamic shared memory"));
  }
  cudaLaunchConfig_t config{};
  config.gridDim = config.blockDim = 1;
  config.dynamicSmemBytes = sizeof dynamic + 1;
  EXPECT(cudaLaunchKernelEx(&config, ends_before_barrier) == cudaErrorInvalidConfiguration);
  EXPECT(cudaGetLastError() == cudaErrorInvalidConfiguration);
}

void measure_speed() {
  constexpr unsigned kBlocks = 500, kThreads = 256;
  std::vector<float> in(3 * kBlocks * kThreads), out(kBlocks);
  const uint64_t before = cuda_emulation_switches();
  const auto start = std::chrono::steady_clock::now();
  run(block_sum<float, Fault::none>, kBlocks, kThreads, in.data(), out.data());
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("%.1f million switches a second\n", double(cuda_emulation_switches() - before) / seconds / 1e6);
}

int main() {
  EXPECT(seeds_where(block_sum_is_right<float, Fault::none>) == 100);
  EXPECT(seeds_where(block_sum_is_right<double, Fault::none>) == 100);
  EXPECT(seeds_where(block_sum_is_right<float, Fault::no_barrier_before_read>) <= 5);
  EXPECT(seeds_where(block_sum_is_right<float, Fault::no_barrier_before_reuse>) <= 50);
  EXPECT(seeds_where(reversal_is_right<true>) == 100);
  EXPECT(seeds_where(reversal_is_right<false>) <= 5);
  EXPECT(seeds_where(halves_are_right) == 100);
  EXPECT(seeds_where(last_block_is_right) == 100);
  EXPECT(seeds_where(cluster_sum_is_right<ClusterFault::none>) == 100);
  EXPECT(seeds_where(cluster_sum_is_right<ClusterFault::no_sync_before_read>) <= 5);
  EXPECT(seeds_where(cluster_sum_is_right<ClusterFault::no_sync_before_reuse>) <= 5);
  test_orders();
  test_refusals();
  test_cluster_refusals();
  test_configurations();
  test_shared_memory_is_poisoned();
  test_dynamic_shared_memory();
  measure_speed();
  std::printf(failures == 0 ? "ok\n" : "%d failures\n", failures);
  return failures != 0;
}
