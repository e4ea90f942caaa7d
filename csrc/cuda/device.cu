#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <atomic>
#include <mutex>

#include "device.h"

namespace torchce::cuda {
namespace {

// Zero when the module is loaded, and again after every launch that used one. Launches take them in turn: two that run
// at the same time have different ones as long as fewer than these are started while one of them runs.
constexpr unsigned kCounters = 1 << 16;
__device__ unsigned counters[kCounters];

constexpr int kMostDevices = 64;

int multiprocessors_of(int device) {
  static std::once_flag known[kMostDevices];
  static int multiprocessors[kMostDevices];
  std::call_once(known[device], [&] {
    check_cuda(cudaDeviceGetAttribute(&multiprocessors[device], cudaDevAttrMultiProcessorCount, device),
               "cudaDeviceGetAttribute");
  });
  return multiprocessors[device];
}

// The first call may load the module, which a capture would not allow: not to be called in one.
unsigned* counters_of(int device) {
  static std::once_flag known[kMostDevices];
  static void* address[kMostDevices];
  std::call_once(known[device],
                 [&] { check_cuda(cudaGetSymbolAddress(&address[device], counters), "cudaGetSymbolAddress"); });
  return static_cast<unsigned*>(address[device]);
}

}  // namespace

DeviceScope::DeviceScope(const torch::stable::Tensor& on) {
  const int device = on.device().index();
  // The CPU's index is -1: logits may lie there when only another argument brought the call here.
  host::check(0 <= device && device < kMostDevices, "logits: expected a CUDA device of an index below ", kMostDevices,
              ", got index ", device);
  DeviceGuardHandle guard = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(device, &guard));
  guard_ = {guard, [](void* held) { aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(held)); }};
  void* current = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  stream = static_cast<cudaStream_t>(current);
  multiprocessors = multiprocessors_of(device);
}

unsigned* DeviceScope::counter(void* spare) const {
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &capturing), "cudaStreamIsCapturing");
  if (capturing != cudaStreamCaptureStatusNone) {
    check_cuda(cudaMemsetAsync(spare, 0, sizeof(unsigned), stream), "cudaMemsetAsync");
    return static_cast<unsigned*>(spare);
  }
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  static std::atomic<unsigned> next;
  return counters_of(device) + next++ % kCounters;
}

}  // namespace torchce::cuda
