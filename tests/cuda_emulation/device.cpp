// The emulation's device: DeviceScope of csrc/cuda/device.h, and what the tests set and ask of it through ctypes.
#include "cuda/device.h"

#include <cstring>

#include "cuda/softmax_ce_plan.h"

namespace torchce::cuda {
namespace softmax_ce {

constexpr int kKept = 3;  // packs of a thread: few, so that rows of more classes are read again
extern __shared__ uint4 dynamic_shared_memory[];
__shared__ uint4 dynamic_shared_memory[(kKept + 1) * kBytesOfKeptPack / sizeof(uint4)];  // one to be found untouched

}  // namespace softmax_ce

namespace {

Properties properties_of_device = {
    .multiprocessors = 3,  // few, so that a small grid already strides over its rows more than once
    .shared_memory_of_block = softmax_ce::kKept * softmax_ce::kBytesOfKeptPack + softmax_ce::kDeclaredSharedMemory,
};
constexpr int kBlocksOfMultiprocessor = 2;
unsigned counters_of_device[kMostCounters] = {};

}  // namespace

DeviceScope::DeviceScope(const torch::stable::Tensor&) { properties = properties_of_device; }

void DeviceScope::lift_limits(const void*) const {}

int64_t DeviceScope::resident_blocks(const void*, const BlockShape& shape) const {
  if (unsigned(shape.cluster) > cuda_emulation::placeable_cluster) return 0;
  const int64_t blocks = properties.multiprocessors * kBlocksOfMultiprocessor;
  return std::max<int64_t>(blocks / shape.cluster, 1) * shape.cluster;
}

// Now the device's own, which kernels must leave as they find them, now as in a capture those that the graph keeps.
unsigned* DeviceScope::counters(unsigned count, void* spare) const {
  host::check(count <= kMostCounters, "more counters than there are");
  static bool capturing = false;
  capturing = !capturing;
  if (!capturing) return counters_of_device;
  std::memset(spare, 0, count * sizeof(unsigned));
  return static_cast<unsigned*>(spare);
}

}  // namespace torchce::cuda

cuda_emulation::DynamicSharedMemory cuda_emulation::dynamic_shared_memory() {
  const auto& memory = torchce::cuda::softmax_ce::dynamic_shared_memory;
  return {reinterpret_cast<const unsigned char*>(memory), sizeof memory};
}

extern "C" {
void cuda_emulation_set_multiprocessors(int count) { torchce::cuda::properties_of_device.multiprocessors = count; }
void cuda_emulation_set_largest_cluster(int blocks) { torchce::cuda::properties_of_device.largest_cluster = blocks; }
void cuda_emulation_set_placeable_cluster(int blocks) { cuda_emulation::placeable_cluster = unsigned(blocks); }
// The first that is not 0, because a kernel spoiled it; all are 0 again then.
unsigned cuda_emulation_reset_counters() {
  unsigned spoiled = 0;
  for (unsigned& counter : torchce::cuda::counters_of_device) {
    const unsigned left = std::exchange(counter, 0);
    if (spoiled == 0) spoiled = left;
  }
  return spoiled;
}
}
