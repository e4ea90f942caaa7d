// The classes of a row, cut into packs where they are aligned.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace torchce::cuda {

// Classes [begin, end) of a row, in packs of V that start where the logits are aligned, and singly before and after.
//
// Bulk and remainder: for C = 1001 bfloat16 and a row that starts 2 bytes after such a place, 7 single classes,
// 124 packs of 8, 2 single classes.
template <int V>
struct PackedClasses {
  int64_t begin, end;
  int64_t body;  // the first class in a pack
  int64_t packs;

  template <class T>
  __device__ __forceinline__ PackedClasses(const T* x, int64_t begin, int64_t end) : begin(begin), end(end) {
    const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(x + begin) % (V * sizeof(T)) / sizeof(T));
    body = begin + (misaligned == 0 ? 0 : V - misaligned);
    if (body > end) body = end;
    packs = (end - body) / V;
  }

  // Calls f(class) for the single classes of thread `thread` out of `threads`, of those before the packs or after them.
  template <class F>
  __device__ __forceinline__ void for_each_before(int thread, int threads, F f) const {
#pragma unroll 1
    for (int64_t k = begin + thread; k < body; k += threads) f(k);
  }
  template <class F>
  __device__ __forceinline__ void for_each_after(int thread, int threads, F f) const {
#pragma unroll 1
    for (int64_t k = body + packs * V + thread; k < end; k += threads) f(k);
  }
};

}  // namespace torchce::cuda
