#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <atomic>
#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <utility>

#include "device.h"

namespace torchce::cuda {
namespace {

// Counters are zero when the module is loaded, and again after every launch that used them. Launches take them in turn
// from a ring whose end is long enough for what begins there. Two launches that run at the same time have different
// ones unless a million counters are taken between the two calls, while the first still waits in its stream or runs: by
// a million launches, or by 790 that cut 1319 rows into parts, the most on an H100. The ring takes 4 MiB.
constexpr unsigned kCounters = 1 << 20;
__device__ unsigned counters[kCounters + kMostCounters];

constexpr int kMostDevices = 64;
constexpr int kLargestCluster = 16;  // blocks, that some devices can place; whether this one does, resident_blocks asks

// Tells which architecture its file, and so every kernel, was compiled for.
__global__ void any_kernel() {}

int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

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

// Asking may load the module. A capture would not allow that, but the kernel that is captured needs the module too.
const Properties& properties_of(int device) {
  static std::once_flag known[kMostDevices];
  static Properties properties[kMostDevices];
  std::call_once(known[device], [&] {
    properties[device] = {
        .multiprocessors = attribute_of(device, cudaDevAttrMultiProcessorCount),
        .shared_memory_of_block = attribute_of(device, cudaDevAttrMaxSharedMemoryPerBlockOptin),
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

void DeviceScope::lift_limits(const void* kernel) const {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> lifted;
  const int device = current_device();
  const std::lock_guard lock(mutex);
  if (lifted.count({device, kernel}) != 0) return;
  cudaFuncAttributes of_kernel{};
  check_cuda(cudaFuncGetAttributes(&of_kernel, kernel), "cudaFuncGetAttributes");
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  properties.shared_memory_of_block - int(of_kernel.sharedSizeBytes)),
             "cudaFuncSetAttribute");
  if (properties.largest_cluster > kPortableCluster &&
      cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) {
    cudaGetLastError();  // resident_blocks finds no place for such a cluster then
  }
  lifted.insert({device, kernel});
}

int64_t DeviceScope::resident_blocks(const void* kernel, const BlockShape& shape) const {
  using Key = std::tuple<int, const void*, int, int, int>;
  static std::mutex mutex;
  static std::map<Key, int64_t> known;
  const Key key{current_device(), kernel, shape.threads, shape.shared_memory, shape.cluster};
  {
    const std::lock_guard lock(mutex);
    const auto found = known.find(key);
    if (found != known.end()) return found->second;
  }
  if (shape.shared_memory > 0) lift_limits(kernel);
  int64_t blocks = 0;
  if (shape.cluster == 1) {
    int of_multiprocessor = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&of_multiprocessor, kernel, shape.threads,
                                                             size_t(shape.shared_memory)),
               "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    blocks = int64_t(of_multiprocessor) * properties.multiprocessors;
  } else {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(shape.cluster));
    config.blockDim = dim3(unsigned(shape.threads));
    config.dynamicSmemBytes = size_t(shape.shared_memory);
    cudaLaunchAttribute attribute{};
    set_cluster(config, attribute, shape.cluster);
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
      cudaGetLastError();  // refused, as where a cluster is larger than any group of multiprocessors
      clusters = 0;
    }
    blocks = int64_t(clusters) * shape.cluster;
  }
  const std::lock_guard lock(mutex);
  known[key] = blocks;
  return blocks;
}

unsigned* DeviceScope::counters(unsigned count, void* spare) const {
  host::check(count <= kMostCounters, "a launch asked for ", count, " counters of at most ", kMostCounters);
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &capturing), "cudaStreamIsCapturing");
  if (capturing != cudaStreamCaptureStatusNone) {
    check_cuda(cudaMemsetAsync(spare, 0, count * sizeof(unsigned), stream), "cudaMemsetAsync");
    return static_cast<unsigned*>(spare);
  }
  static std::atomic<unsigned> next;
  return counters_of(current_device()) + next.fetch_add(count) % kCounters;
}

}  // namespace torchce::cuda
