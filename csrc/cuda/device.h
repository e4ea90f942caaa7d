// Where an op's kernels run: the device of its tensors, torch's current stream there, and how a kernel is launched.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "../host/tensor.h"
#include "properties.h"

namespace torchce::cuda {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes the device of a tensor the current one for as long as it lives.
class DeviceScope {
 public:
  explicit DeviceScope(const torch::stable::Tensor& on);

  // A counter that is 0, for the blocks of one launch to count themselves with (reduce.cuh). While the stream is being
  // captured into a graph it lies in `spare`, which the graph keeps.
  unsigned* counter(void* spare) const;

  // Lets a kernel be launched with as much dynamic shared memory as the device has, which it cannot be unasked: once,
  // because what is set holds for every thread of the process.
  void allow_shared_memory(const void* kernel) const;

  cudaStream_t stream = nullptr;
  Properties properties;

 private:
  std::unique_ptr<void, void (*)(void*)> guard_{nullptr, nullptr};
};

struct Grid {
  int64_t blocks;
  int threads;            // of a block
  int shared_memory = 0;  // bytes of a block, beside what the kernel declares
  int cluster = 1;        // blocks; divides their number
};

// Launches `kernel` on at least one block, at most as many as there can be: kernels stride over what is left.
template <class... Parameters, class... Arguments>
void launch(const DeviceScope& device, void (*kernel)(Parameters...), const Grid& grid, Arguments&&... arguments) {
  constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(std::clamp<int64_t>(grid.blocks, 1, kMostBlocks)));
  config.blockDim = dim3(unsigned(grid.threads));
  config.dynamicSmemBytes = size_t(grid.shared_memory);
  config.stream = device.stream;
  cudaLaunchAttribute cluster{};
  if (grid.cluster > 1) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {unsigned(grid.cluster), 1, 1};
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  if (grid.shared_memory > 0) device.allow_shared_memory(reinterpret_cast<const void*>(kernel));
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  const cudaError_t last = cudaGetLastError();  // also takes it back, so that nobody else reports it
  check_cuda(error != cudaSuccess ? error : last, "launch");
}

}  // namespace torchce::cuda
