// What lets one formula run over a scalar or over every lane of a vector: select, abs, the bits of floats.
//
// V is a float or double, or on the CPU a SIMD vector of them (csrc/cpu/vector.h), which is a GNU vector. Each function
// says where it is valid and how large its error is.
#pragma once

#include <cstdint>
#include <cstring>

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

#if !defined(__CUDACC__)

// BitsOf<F> are integers as wide as floats F, WordsOf<F> such integers without a sign, FloatsOf<I> floats as wide as
// integers I.
template <class F>
struct BitsOf {
  typedef int32_t type __attribute__((vector_size(sizeof(F))));
};
template <>
struct BitsOf<float> {
  using type = int32_t;
};
template <class F>
struct WordsOf {
  typedef uint32_t type __attribute__((vector_size(sizeof(F))));
};
template <>
struct WordsOf<int32_t> {
  using type = uint32_t;
};
template <class I>
struct FloatsOf {
  typedef float type __attribute__((vector_size(sizeof(I))));
};
template <>
struct FloatsOf<int32_t> {
  using type = float;
};

// to_bits gives the bits of a float, or of every lane of a vector of floats; from_bits the float of such bits.
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

// each_lane calls a function of libm in every lane, where V holds doubles.
// Valid: what the function takes.
// Error: the function's.
template <class V, class F>
TORCHCE_HD V each_lane(V x, F function) {
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(double); ++lane) x[lane] = function(x[lane]);
  return x;
}

// kOfDoubles says whether V is double or a vector of doubles.
template <class V>
constexpr bool kOfDoubles = sizeof(decltype(V{}[0])) == sizeof(double);
template <>
inline constexpr bool kOfDoubles<float> = false;
template <>
inline constexpr bool kOfDoubles<double> = true;

#endif

}  // namespace torchce::math
