// Packs: neighbouring elements that are loaded and stored together, 16 bytes at a time where they are as wide.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "../storage.h"

namespace torchce::cuda {

// Elements in 16 bytes, the widest access there is; those computed in float64 are as few as float64's, whose registers
// they need.
template <class T>
constexpr int kPack = 16 / int(kInDouble<T> ? sizeof(double) : sizeof(T));

template <class T, int V>
struct Pack {
  T elements[V];
};

// The same element V times.
template <int V, class T>
__device__ __forceinline__ Pack<T, V> repeat(T element) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.elements[v] = element;
  return pack;
}

// What a load says of the memory it reads.
enum class Cache {
  keep,    // it will be read again: the logits of a forward
  stream,  // it was read for the last time, so that it need not push anything else out: the logits of a backward
};

template <Cache cache, class Word>
__device__ __forceinline__ Word load_word(const Word* p) {
#if defined(__CUDA_ARCH__)
  if constexpr (cache == Cache::stream) return __ldcs(p);
#endif
  return *p;
}

// Stores a word with the default cache policy, named so that the compiler leaves the word whole: it has split plain
// stores of 16 bytes.
template <class Word>
__device__ __forceinline__ void store_word(Word* p, Word word) {
#if defined(__CUDA_ARCH__)
  __stwb(p, word);
#else
  *p = word;
#endif
}

// The machine word of at most 16 bytes that a pack of that many bytes consists of.
template <int kBytes>
struct WordOf {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};
template <>
struct WordOf<1> {
  using type = unsigned char;
};
template <class T, int V>
using Word = typename WordOf<(V * sizeof(T) < 16 ? int(V * sizeof(T)) : 16)>::type;

// Whether packs of V elements from p on can be accessed by words.
template <int V, class T>
__device__ __forceinline__ bool is_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Word<T, V>) == 0;
}

// Loads V elements from p on, by words where `aligned` says that p allows it, else one by one.
template <int V, Cache cache = Cache::keep, class T>
__device__ __forceinline__ Pack<T, V> load_pack(const T* p, bool aligned) {
  Pack<T, V> pack;
  if (aligned) {
    constexpr int kWords = sizeof(pack) / sizeof(Word<T, V>);
    Word<T, V> words[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = load_word<cache>(reinterpret_cast<const Word<T, V>*>(p) + i);
    std::memcpy(&pack, words, sizeof pack);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) pack.elements[i] = p[i];
  }
  return pack;
}

template <int V, class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, V>& pack, bool aligned) {
  if (aligned) {
    constexpr int kWords = sizeof(pack) / sizeof(Word<T, V>);
    Word<T, V> words[kWords];
    std::memcpy(words, &pack, sizeof pack);
#pragma unroll
    for (int i = 0; i < kWords; ++i) store_word(reinterpret_cast<Word<T, V>*>(p) + i, words[i]);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) p[i] = pack.elements[i];
  }
}

// Widens element i in one instruction: a bfloat16 is the upper half of its float's word, where it already lies or is
// shifted to. Its 16 bits by themselves take two.
template <int V>
__device__ __forceinline__ float widen_half_of_word(const Pack<BFloat16, V>& pack, int i) {
  uint32_t word;
  std::memcpy(&word, &pack.elements[i / 2 * 2], sizeof word);
  word = i % 2 == 0 ? word << 16 : word & 0xffff0000u;
  float element;
  std::memcpy(&element, &word, sizeof element);
  return element;
}

// Element i in the accumulation type.
template <class A, class T, int V>
__device__ __forceinline__ A get(const Pack<T, V>& pack, int i) {
  if constexpr (std::is_same_v<T, BFloat16> && V % 2 == 0) {
    return widen_half_of_word(pack, i);
  } else {
    return load_one<A>(&pack.elements[i]);
  }
}

// Rounded values, two at a time where the device has an instruction for that.
template <class T, int V, class A>
__device__ __forceinline__ Pack<T, V> rounded(const A (&values)[V]) {
  Pack<T, V> pack;
  if constexpr (kSixteenBits<T> && V % 2 == 0) {
#pragma unroll
    for (int i = 0; i < V; i += 2) {
      const uint32_t word = narrow_two(T{}, float(values[i]), float(values[i + 1]));
      std::memcpy(&pack.elements[i], &word, sizeof word);
    }
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) store_one(&pack.elements[i], values[i]);
  }
  return pack;
}

// The elements of a pack where all bits of the mask are set, and zeros where none is.
template <class T, int V>
__device__ __forceinline__ Pack<T, V> masked(const Pack<T, V>& pack, const Pack<T, V>& mask) {
  using W = Word<T, V>;
  constexpr int kWords = sizeof(pack) / sizeof(W), kParts = sizeof(W) / sizeof(uint32_t);
  Pack<T, V> result;
  if constexpr (kParts == 0) {
    W a, b;
    std::memcpy(&a, &pack, sizeof a);
    std::memcpy(&b, &mask, sizeof b);
    a = W(a & b);
    std::memcpy(&result, &a, sizeof a);
  } else {
    uint32_t a[kWords * kParts], b[kWords * kParts];
    std::memcpy(a, &pack, sizeof a);
    std::memcpy(b, &mask, sizeof b);
#pragma unroll
    for (int i = 0; i < kWords * kParts; ++i) a[i] &= b[i];
    std::memcpy(&result, a, sizeof a);
  }
  return result;
}

}  // namespace torchce::cuda
