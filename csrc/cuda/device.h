// Where an op's kernels run: the device of its tensors, torch's current stream there, and how a kernel is launched.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "../host/tensor.h"
#include "launch_shape.h"
#include "properties.h"

namespace torchce::cuda {

// Throws where a call failed, and takes back its error, which the next one to ask CUDA would report as its own. A call
// that succeeds leaves an older error to whoever it belongs to.
inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

struct BlockShape {
  int threads;
  int shared_memory = 0;  // bytes of a block, beside what the kernel declares
  int cluster = 1;        // blocks that run together
};

constexpr unsigned kMostCounters = 1 << 13;  // of one launch

// Makes the device of a tensor the current one for as long as it lives.
class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor& on);

  // Counters that are 0, for the blocks of one launch to count themselves with (reduce.cuh): at most kMostCounters.
  // While the stream is being captured into a graph they lie in `spare`, which the graph keeps.
  unsigned* counters(unsigned count, void* spare) const;

  // Blocks of that kernel and shape that the device runs at once, whole clusters only; 0 where not one can be placed.
  // Asked of CUDA once for each kernel, shape and device.
  template <class... Parameters>
  int64_t resident_blocks(void (*kernel)(Parameters...), const BlockShape& shape) const {
    return resident_blocks(reinterpret_cast<const void*>(kernel), shape);
  }

  // Lets a kernel be launched with as much dynamic shared memory as the device has and in clusters of any size, which
  // it cannot be unasked: once, because what is set holds for every thread of the process.
  void lift_limits(const void* kernel) const;

  cudaStream_t stream = nullptr;
  Properties properties;

 private:
  int64_t resident_blocks(const void* kernel, const BlockShape& shape) const;

  std::unique_ptr<void, void (*)(void*)> guard_{nullptr, nullptr};
};

struct Grid {
  int64_t blocks;  // whole clusters
  BlockShape shape;
};

// A cluster's size as an attribute of a launch; none for blocks that run alone.
inline void set_cluster(cudaLaunchConfig_t& config, cudaLaunchAttribute& attribute, int cluster) {
  if (cluster == 1) return;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(cluster), 1, 1};
  config.attrs = &attribute;
  config.numAttrs = 1;
}

// Launches `kernel` on at least one block, at most as many as there can be: kernels stride over what is left.
template <class... Parameters, class... Arguments>
void launch(const DeviceScope& device, void (*kernel)(Parameters...), const Grid& grid, Arguments&&... arguments) {
  constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;
  const BlockShape& shape = grid.shape;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(std::clamp<int64_t>(grid.blocks, 1, kMostBlocks)));
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = size_t(shape.shared_memory);
  config.stream = device.stream;
  cudaLaunchAttribute attribute{};
  set_cluster(config, attribute, shape.cluster);
  if (shape.shared_memory > 0) device.lift_limits(reinterpret_cast<const void*>(kernel));
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), "launch");
}

// Launches a kernel that takes its call and `team`, on rows that belong to teams of so many threads of a block each.
template <class Call>
void launch_teams(const DeviceScope& device, void (*kernel)(Call, int), const Call& call, int64_t rows, int team) {
  if (rows == 0) return;
  const int64_t teams = kThreads / team, slots = device.resident_blocks(kernel, {kThreads});
  launch(device, kernel, Grid{std::min(slots, (rows + teams - 1) / teams), {kThreads}}, call, team);
}

}  // namespace torchce::cuda
