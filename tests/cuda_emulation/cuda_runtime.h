// Stands in for CUDA's header of this name where csrc/cuda is compiled for the emulation: what the kernels and their
// host code use of CUDA, and nothing else, so that whatever else they come to use must be looked at here first.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// The thread-local variables of this library are the shared variables of its kernels and nothing else, which is how the
// machine finds them all to overwrite them before a block. (A named section would do too, but g++ ignores it in
// templates.)
#define __shared__ thread_local

namespace cuda_emulation {
inline __shared__ unsigned char a_shared_variable;
}

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

extern cuda_emulation::Index threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_emulation {

// As the special function unit may compute it: 2^-22 off at most, subnormal numbers are 0 on both sides.
inline float exp2_approx(float y) {
  const double exact = std::exp2(double(std::fabs(y) < 0x1p-126f ? 0.0f : y));
  uint64_t bits = 0;
  std::memcpy(&bits, &exact, sizeof bits);
  bits = (bits + (uint64_t(1) << 30)) >> 31 << 31;  // 21 bits of the mantissa, but for a NaN
  double rounded = 0;
  std::memcpy(&rounded, &bits, sizeof rounded);
  return std::isnan(exact) ? y : rounded < 0x1p-126 ? 0.0f : float(rounded);
}

}  // namespace cuda_emulation

// --- barriers, shuffles, votes, atomics -----------------------------------------------------------------------------

inline void __syncthreads(cuda_emulation::Site site = cuda_emulation::Site::current()) {
  cuda_emulation::block_barrier(site);
}

inline void __syncwarp(unsigned mask = 0xffffffff, cuda_emulation::Site site = cuda_emulation::Site::current()) {
  cuda_emulation::warp_operation(cuda_emulation::Operation::syncwarp, mask, 0, 0, site);
}

namespace cuda_emulation {

template <class T>
T shuffle(Operation operation, unsigned mask, T value, int source, Site site) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= sizeof(int), "CUDA shuffles numbers of 4 and 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = warp_operation(operation, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_emulation

// A source outside the lane's segment of `width` lanes means the lane itself; earlier segments can be read with xor.

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = cuda_emulation::kWarpSize,
              cuda_emulation::Site site = cuda_emulation::Site::current()) {
  const int lane = cuda_emulation::lane_of_this_thread();
  return cuda_emulation::shuffle(cuda_emulation::Operation::shfl, mask, value, (lane & -width) | (source & (width - 1)),
                                 site);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = cuda_emulation::kWarpSize,
                  cuda_emulation::Site site = cuda_emulation::Site::current()) {
  const int lane = cuda_emulation::lane_of_this_thread(), source = lane ^ lane_mask;
  return cuda_emulation::shuffle(cuda_emulation::Operation::shfl_xor, mask, value,
                                 source > (lane | (width - 1)) ? lane : source, site);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = cuda_emulation::kWarpSize,
                   cuda_emulation::Site site = cuda_emulation::Site::current()) {
  const int lane = cuda_emulation::lane_of_this_thread(), source = lane + int(delta);
  return cuda_emulation::shuffle(cuda_emulation::Operation::shfl_down, mask, value,
                                 source > (lane | (width - 1)) ? lane : source, site);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = cuda_emulation::kWarpSize,
                 cuda_emulation::Site site = cuda_emulation::Site::current()) {
  const int lane = cuda_emulation::lane_of_this_thread(), source = lane - int(delta);
  return cuda_emulation::shuffle(cuda_emulation::Operation::shfl_up, mask, value,
                                 source < (lane & -width) ? lane : source, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              cuda_emulation::Site site = cuda_emulation::Site::current()) {
  return unsigned(cuda_emulation::warp_operation(cuda_emulation::Operation::ballot, mask, predicate != 0, 0, site));
}

inline int __any_sync(unsigned mask, int predicate, cuda_emulation::Site site = cuda_emulation::Site::current()) {
  return int(cuda_emulation::warp_operation(cuda_emulation::Operation::any, mask, predicate != 0, 0, site));
}

inline int __all_sync(unsigned mask, int predicate, cuda_emulation::Site site = cuda_emulation::Site::current()) {
  return int(cuda_emulation::warp_operation(cuda_emulation::Operation::all, mask, predicate != 0, 0, site));
}

inline void __threadfence() { cuda_emulation::preemption_point(); }

// Only of integers: a float's sum would depend on the order, and torchce promises that nothing does.
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_integral_v<T>);
  cuda_emulation::preemption_point();
  const T old = *address;
  *address = old + value;
  return old;
}

inline unsigned atomicInc(unsigned* address, unsigned last) {
  cuda_emulation::preemption_point();
  const unsigned old = *address;
  *address = old >= last ? 0 : old + 1;
  return old;
}

// --- launch ---------------------------------------------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9 };

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid configuration argument";
}

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};

// Shared memory whose size the launch gives: `extern __shared__`, which a library defines as long as it will be.
namespace cuda_emulation {
DynamicSharedMemory dynamic_shared_memory();  // the library's own
}

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace cuda_emulation {

inline cudaError_t last_error = cudaSuccess;

inline unsigned placeable_cluster =
    16;  // blocks; larger ones are refused, as where multiprocessors stand in small groups

inline unsigned cluster_of(const cudaLaunchConfig_t& config) {  // 0: of no kind that is known here
  if (config.numAttrs == 0) return 1;
  const cudaLaunchAttribute& attribute = config.attrs[0];
  const auto& cluster = attribute.val.clusterDim;
  return attribute.id == cudaLaunchAttributeClusterDimension && cluster.y == 1 && cluster.z == 1 ? cluster.x : 0;
}

inline bool can_be_launched(const cudaLaunchConfig_t& config) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  return 0 < grid.x && grid.x <= 0x7fffffff && grid.y == 1 && grid.z == 1 &&       //
         0 < block.x && block.x <= kMaxThreads && block.y == 1 && block.z == 1 &&  //
         config.dynamicSmemBytes <= dynamic_shared_memory().size && config.numAttrs <= 1 && 0 < cluster_of(config) &&
         cluster_of(config) <= placeable_cluster && grid.x % cluster_of(config) == 0;
}

}  // namespace cuda_emulation

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_emulation::last_error, cudaSuccess); }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (!cuda_emulation::can_be_launched(*config)) return cuda_emulation::last_error = cudaErrorInvalidConfiguration;
  const auto thread = [kernel, copies = std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)] {
    std::apply(kernel, copies);
  };
  using Thread = decltype(thread);
  cuda_emulation::launch({
      .kernel = reinterpret_cast<const void*>(kernel),
      .blocks = config->gridDim.x,
      .threads = config->blockDim.x,
      .cluster = cuda_emulation::cluster_of(*config),
      .thread = [](const void* closure) { (*static_cast<const Thread*>(closure))(); },
      .closure = &thread,
      .shared_variable = &cuda_emulation::a_shared_variable,
      .dynamic_shared_memory = cuda_emulation::dynamic_shared_memory(),
      .dynamic_shared_bytes = config->dynamicSmemBytes,
  });
  return cudaSuccess;
}
