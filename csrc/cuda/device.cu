#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <atomic>
#include <mutex>
#include <set>
#include <utility>

#include "device.h"

namespace torchce::cuda {
namespace {

// Zero when the module is loaded, and again after every launch that used one. Launches take them in turn: two that run
// at the same time have different ones as long as fewer than these are started while one of them runs.
constexpr unsigned kCounters = 1 << 16;
__device__ unsigned counters[kCounters];

constexpr int kMostDevices = 64;
constexpr int kLargestCluster = 8;  // that every device with clusters can run

// Tells which architecture its file, and so every kernel, was compiled for.
__global__ void any_kernel() {}

int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// Clusters are there if the device has them and its code is not that of an older one, which its driver translated.
bool has_clusters(int device) {
  constexpr int kOldestArch = 90;
  cudaFuncAttributes code{};
  check_cuda(cudaFuncGetAttributes(&code, any_kernel), "cudaFuncGetAttributes");
  return attribute_of(device, cudaDevAttrClusterLaunch) != 0 && code.ptxVersion >= kOldestArch;
}

// May load the module, which a capture would not allow, but for the kernel that is captured too.
const Properties& properties_of(int device) {
  static std::once_flag known[kMostDevices];
  static Properties properties[kMostDevices];
  std::call_once(known[device], [&] {
    properties[device] = {
        .multiprocessors = attribute_of(device, cudaDevAttrMultiProcessorCount),
        .shared_memory_of_block = attribute_of(device, cudaDevAttrMaxSharedMemoryPerBlockOptin),
        .shared_memory_of_multiprocessor = attribute_of(device, cudaDevAttrMaxSharedMemoryPerMultiprocessor),
        .largest_cluster = has_clusters(device) ? kLargestCluster : 1,
    };
  });
  return properties[device];
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
  TORCHCE_CHECK_TORCH(aoti_torch_create_device_guard(device, &guard));
  guard_ = {guard, [](void* held) { aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(held)); }};
  void* current = nullptr;
  TORCHCE_CHECK_TORCH(aoti_torch_get_current_cuda_stream(device, &current));
  stream = static_cast<cudaStream_t>(current);
  properties = properties_of(device);
}

void DeviceScope::allow_shared_memory(const void* kernel) const {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> allowed;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  if (allowed.count({device, kernel}) != 0) return;
  cudaFuncAttributes of_kernel{};
  check_cuda(cudaFuncGetAttributes(&of_kernel, kernel), "cudaFuncGetAttributes");
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  properties.shared_memory_of_block - int(of_kernel.sharedSizeBytes)),
             "cudaFuncSetAttribute");
  allowed.insert({device, kernel});
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
