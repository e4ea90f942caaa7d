// What lets one formula run over a scalar or over every lane of a vector: select, abs, the bits of floats.
//
// V is a float or double, or on the CPU a SIMD vector of them (csrc/cpu/vector.h), which is a GNU vector. Each function
// says where it is valid and how large its error is.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define TORCHCE_HD __host__ __device__ __forceinline__
#define TORCHCE_HD_LAMBDA
#else
// A function that is not inlined might be linked as one SIMD level compiled it; lambdas are functions too.
#define TORCHCE_HD inline __attribute__((always_inline))
#define TORCHCE_HD_LAMBDA __attribute__((always_inline))
#endif

namespace torchce::math {

// select is mask ? a : b, for a bool and scalars as for a lane mask and vectors.
// Valid: all a and b; what is not selected may be a NaN or an infinity.
// Error: none; the bits of -0 and NaNs are kept.
template <class M, class V>
TORCHCE_HD V select(M mask, V a, V b) {
  return mask ? a : b;
}

// One is a factor of one that no instruction multiplies with.
struct One {};
template <class V>
TORCHCE_HD V operator*(One, V v) {
  return v;
}
template <class T>
constexpr bool kIsOne = false;
template <>
inline constexpr bool kIsOne<One> = true;

// abs is |x|.
// Valid: all x. On the CPU -0 stays -0 and a NaN keeps its sign.
// Error: none.
template <class V>
TORCHCE_HD V abs(V x) {
#if defined(__CUDA_ARCH__)
  return ::fabs(x);  // costs nothing: instructions take an operand's absolute value
#else
  return select(x < V{}, -x, x);
#endif
}

#if defined(__CUDACC__)

// ElementOf<V> is what it is on the CPU, where V may have lanes.
template <class V>
using ElementOf = V;

#else

// ElementOf<V> is the type of a lane of V, of V itself where it is a scalar.
template <class V>
struct LaneType {
  using type = std::remove_cvref_t<decltype(V{}[0])>;
};
template <class V>
  requires std::is_arithmetic_v<V>
struct LaneType<V> {
  using type = V;
};
template <class V>
using ElementOf = typename LaneType<V>::type;

// kWide<V> says whether lanes of V are of 64 bits, as doubles are.
template <class V>
constexpr bool kWide = sizeof(ElementOf<V>) == sizeof(double);

// SameLanes<V, Element>::type has an Element in the place of every lane of V.
template <class V, class Element>
struct SameLanes {
  typedef Element type __attribute__((vector_size(sizeof(V))));
};
template <class V, class Element>
  requires std::is_arithmetic_v<V>
struct SameLanes<V, Element> {
  using type = Element;
};

// BitsOf<F> are integers as wide as floats or doubles F, WordsOf<F> such integers without a sign, FloatsOf<I> floats or
// doubles as wide as integers I.
template <class F>
using BitsOf = SameLanes<F, std::conditional_t<kWide<F>, int64_t, int32_t>>;
template <class F>
using WordsOf = SameLanes<F, std::conditional_t<kWide<F>, uint64_t, uint32_t>>;
template <class I>
using FloatsOf = SameLanes<I, std::conditional_t<kWide<I>, double, float>>;

// to_bits gives the bits of a float or double, or of every lane of a vector of them; from_bits the number of such bits.
// Valid: all x, all bits.
// Error: none; the bits of NaNs are kept.
template <class F>
TORCHCE_HD typename BitsOf<F>::type to_bits(F x) {
  typename BitsOf<F>::type bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}
template <class I>
TORCHCE_HD typename FloatsOf<I>::type from_bits(I bits) {
  typename FloatsOf<I>::type x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

#endif

}  // namespace torchce::math
