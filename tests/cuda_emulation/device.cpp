// The emulation's device: DeviceScope of csrc/cuda/device.h, and what the tests set and ask of it through ctypes.
#include "cuda/device.h"

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
    .shared_memory_of_multiprocessor = 64 << 10,
};
unsigned counter_of_device = 0;

}  // namespace

DeviceScope::DeviceScope(const torch::stable::Tensor&) { properties = properties_of_device; }

void DeviceScope::allow_shared_memory(const void*) const {}

// Now the device's own, which kernels must leave as they find it, now as in a capture the one that the graph keeps.
unsigned* DeviceScope::counter(void* spare) const {
  static bool capturing = false;
  capturing = !capturing;
  if (!capturing) return &counter_of_device;
  *static_cast<unsigned*>(spare) = 0;
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
// What it was: 0, or spoiled.
unsigned cuda_emulation_reset_counter() { return std::exchange(torchce::cuda::counter_of_device, 0); }
}
