// The emulation's device: DeviceScope of csrc/cuda/device.h, and what the tests set and ask of it through ctypes.
#include "cuda/device.h"

namespace torchce::cuda {
namespace {

int multiprocessors_of_device = 3;  // few, so that a small grid already strides over its rows more than once
unsigned counter_of_device = 0;

}  // namespace

DeviceScope::DeviceScope(const torch::stable::Tensor&) { multiprocessors = multiprocessors_of_device; }

// Now the device's own, which kernels must leave as they find it, now as in a capture the one that the graph keeps.
unsigned* DeviceScope::counter(void* spare) const {
  static bool capturing = false;
  capturing = !capturing;
  if (!capturing) return &counter_of_device;
  *static_cast<unsigned*>(spare) = 0;
  return static_cast<unsigned*>(spare);
}

extern "C" {
void cuda_emulation_set_multiprocessors(int count) { multiprocessors_of_device = count; }
unsigned cuda_emulation_reset_counter() { return std::exchange(counter_of_device, 0); }  // what it was: 0, or spoiled
}

}  // namespace torchce::cuda
