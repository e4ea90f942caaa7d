// Short vectors of the accumulation type, as wide as the registers of the SIMD level being compiled.
//
// Included by kernels that are compiled once a level (levels.h); everything with a linker symbol lives in that level's
// namespace. The vectors are GNU vector extensions: the compiler of any architecture turns them into its instructions.
#pragma once

#include <cstdint>
#include <cstring>

#include "../math/storage.h"
#include "levels.h"

namespace torchce::cpu::TORCHCE_LEVEL {

constexpr int kBytes = TORCHCE_LEVEL_BYTES;

typedef float Floats __attribute__((vector_size(kBytes)));
typedef double Doubles __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));

template <class A>
struct LanesOf;
template <>
struct LanesOf<float> {
  using V = Floats;
};
template <>
struct LanesOf<double> {
  using V = Doubles;
};
template <class A>
using Lanes = typename LanesOf<A>::V;
template <class A>
constexpr int kLanes = kBytes / int(sizeof(A));

#define TORCHCE_SIMD inline __attribute__((always_inline))

// kLanes<A> consecutive elements to and from a vector.

template <class A, class T>
TORCHCE_SIMD Lanes<A> load(const T* p) {
  if constexpr (kSixteenBits<T> && sizeof(A) == sizeof(double)) {
    Lanes<A> v{};  // a float64 problem with 16-bit gradients: rare enough to go lane by lane
    for (int l = 0; l < kLanes<A>; ++l) v[l] = load_one<A>(p + l);
    return v;
  } else if constexpr (kSixteenBits<T>) {
    typedef uint16_t Bits __attribute__((vector_size(kBytes / 2)));
    Bits bits;
    std::memcpy(&bits, p, sizeof bits);
    return math::from_bits(widen_bits(T{}, __builtin_convertvector(bits, Ints)));
  } else {
    typedef T Stored __attribute__((vector_size(sizeof(T) * kLanes<A>)));
    Stored stored;
    std::memcpy(&stored, p, sizeof stored);
    return __builtin_convertvector(stored, Lanes<A>);
  }
}

template <class T, class V>
TORCHCE_SIMD void store(T* p, V value) {
  if constexpr (kSixteenBits<T> && sizeof(value[0]) == sizeof(double)) {
    for (int l = 0; l < kLanes<double>; ++l) store_one(p + l, value[l]);
  } else if constexpr (kSixteenBits<T>) {
    typedef uint16_t Bits __attribute__((vector_size(kBytes / 2)));
    const Bits bits = __builtin_convertvector(narrow_bits(T{}, math::to_bits(value)), Bits);
    std::memcpy(p, &bits, sizeof bits);
  } else {
    typedef T Stored __attribute__((vector_size(sizeof(T) * (sizeof(V) / sizeof(value[0])))));
    const Stored stored = __builtin_convertvector(value, Stored);
    std::memcpy(p, &stored, sizeof stored);
  }
}

template <class A>
TORCHCE_SIMD Lanes<A> broadcast(A value) {
  return Lanes<A>{} + value;
}

// (0, 1, 2, ...)
template <class A>
TORCHCE_SIMD Lanes<A> lane_numbers() {
  Lanes<A> v;
  for (int l = 0; l < kLanes<A>; ++l) v[l] = A(l);
  return v;
}

// Folds the upper half of the lanes onto the lower until one is left, so that the order is fixed and short.
template <class A, class V, class F>
TORCHCE_SIMD A fold(V v, F combine) {
  if constexpr (sizeof(V) == 2 * sizeof(A)) {
    return combine(A(v[0]), A(v[1]));
  } else {
    typedef A Half __attribute__((vector_size(sizeof(V) / 2)));
    Half lower, upper;
    std::memcpy(&lower, &v, sizeof lower);
    std::memcpy(&upper, reinterpret_cast<const char*>(&v) + sizeof lower, sizeof upper);
    return fold<A>(combine(lower, upper), combine);
  }
}
template <class A>
TORCHCE_SIMD A sum_of(Lanes<A> v) {
  return fold<A>(v, [](auto a, auto b) { return a + b; });
}
template <class A>
TORCHCE_SIMD A max_of(Lanes<A> v) {
  return fold<A>(v, [](auto a, auto b) { return math::select(b > a, b, a); });
}

}  // namespace torchce::cpu::TORCHCE_LEVEL
