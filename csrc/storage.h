// How elements lie in memory, and what they are computed in: 16-bit floats as their bits, widened on load and rounded
// once, ties to even, on store.
#pragma once

#include "math/elementary.h"
#include "problem.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace torchce {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// A float32 element that is computed in float64, because another operand of its problem is of float64.
struct FloatInDouble {
  float value;
};

template <class T>
constexpr bool kSixteenBits = sizeof(T) == sizeof(uint16_t);

template <class T>
struct AccumulateOf {
  using A = float;
};
template <>
struct AccumulateOf<double> {
  using A = double;
};
template <>
struct AccumulateOf<FloatInDouble> {
  using A = double;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::A;

// Whether elements of T are computed in float64.
template <class T>
constexpr bool kInDouble = sizeof(Accumulate<T>) == sizeof(double);

#if defined(__CUDACC__)

template <class Two>
TORCHCE_HD uint32_t bits_of(Two two) {
  uint32_t word;
  std::memcpy(&word, &two, sizeof word);
  return word;
}
TORCHCE_HD float widen(BFloat16 x) { return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{x.bits})); }
TORCHCE_HD float widen(Half x) { return __half2float(__half(__half_raw{x.bits})); }
TORCHCE_HD BFloat16 narrow(BFloat16, float x) { return {static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(x)).x}; }
TORCHCE_HD Half narrow(Half, float x) { return {static_cast<__half_raw>(__float2half_rn(x)).x}; }
// Narrows two floats into a word, the first into its lower half, in one instruction.
TORCHCE_HD uint32_t narrow_two(BFloat16, float first, float second) {
  return bits_of(__floats2bfloat162_rn(first, second));
}
TORCHCE_HD uint32_t narrow_two(Half, float first, float second) { return bits_of(__floats2half2_rn(first, second)); }

#else

// The float values of 16-bit storage, and the nearest 16-bit values. I is int32_t or a vector of it.

template <class I>
TORCHCE_HD I widen_bits(BFloat16, I bits) {
  return bits << 16;
}

// Narrowed bits have undefined upper halves. kNans says which NaNs there can be: a NaN whose lower bits are all set
// would be rounded to 0; plain are those that arithmetic makes or that were widened from 16 bits, with none set.
enum class Nans { any, plain };
template <Nans kNans = Nans::any, class I>
TORCHCE_HD I narrow_bits(BFloat16, I bits) {
  const auto x = math::from_bits(bits);
  using Words = typename math::WordsOf<I>::type;  // without a sign, because a NaN may overflow
  const I rounded = I(Words(bits) + 0x7fff + ((Words(bits) >> 16) & 1));
  if constexpr (kNans == Nans::plain) return rounded >> 16;
  return math::select(x == x, rounded, I{} + 0x7fc00000) >> 16;
}

template <class I>
TORCHCE_HD I widen_bits(Half, I bits) {
  const I magnitude = (bits & 0x7fff) << 13;
  const I scaled = math::to_bits(math::from_bits(magnitude) * 0x1p112f);  // subnormals become normal on the way
  const I finite_or_not = math::select(magnitude >= 0x7c00 << 13, magnitude | 0x7f800000, scaled);
  return finite_or_not | ((bits & 0x8000) << 16);
}

template <Nans = Nans::any, class I>
TORCHCE_HD I narrow_bits(Half, I bits) {
  const I magnitude = bits & 0x7fffffff;
  const I normal = (magnitude + (0xfff - (112 << 23)) + ((magnitude >> 13) & 1)) >> 13;
  // Adding 1/2 leaves a subnormal half in the low mantissa bits, rounded by the addition itself.
  const I subnormal = math::to_bits(math::from_bits(magnitude) + 0.5f) - 0x3f000000;
  const I special = math::select(magnitude > 0x7f800000, I{} + 0x7e00, I{} + 0x7c00);
  const I small = math::select(magnitude < 0x38800000, subnormal, normal);
  return math::select(magnitude >= 0x47800000, special, small) | ((bits >> 16) & 0x8000);
}

// Widens the lower or the upper half of a word, or of every lane of a vector of words.
template <class T, class U>
TORCHCE_HD auto widen_lower_bits(T, U words) {
  return widen_bits(T{}, typename math::BitsOf<U>::type(words & 0xffff));
}
template <class T, class U>
TORCHCE_HD auto widen_upper_bits(T, U words) {
  return widen_bits(T{}, typename math::BitsOf<U>::type(words >> 16));
}
template <class U>
TORCHCE_HD auto widen_lower_bits(BFloat16, U words) {
  return typename math::BitsOf<U>::type(words << 16);
}

template <class T>
TORCHCE_HD float widen(T x) {
  return math::from_bits(widen_bits(T{}, int32_t(x.bits)));
}
template <class T>
TORCHCE_HD T narrow(T, float x) {
  return {uint16_t(narrow_bits(T{}, math::to_bits(x)))};
}
template <class T>
TORCHCE_HD uint32_t narrow_two(T, float first, float second) {
  return narrow(T{}, first).bits | uint32_t(narrow(T{}, second).bits) << 16;
}

#endif

// `load_one` and `store_one` convert one element to and from the accumulation type.

template <class A, class T>
TORCHCE_HD A load_one(const T* p) {
  return A(*p);
}
template <class A>
TORCHCE_HD A load_one(const BFloat16* p) {
  return widen(*p);
}
template <class A>
TORCHCE_HD A load_one(const Half* p) {
  return widen(*p);
}
template <class A>
TORCHCE_HD A load_one(const FloatInDouble* p) {
  return p->value;
}

template <class T, class A>
TORCHCE_HD void store_one(T* p, A value) {
  *p = T(value);
}
template <class A>
TORCHCE_HD void store_one(BFloat16* p, A value) {
  *p = narrow(BFloat16{}, float(value));
}
template <class A>
TORCHCE_HD void store_one(Half* p, A value) {
  *p = narrow(Half{}, float(value));
}
template <class A>
TORCHCE_HD void store_one(FloatInDouble* p, A value) {
  p->value = float(value);
}

// The bytes of one element.
TORCHCE_HD int bytes_of(DType dtype) {
  switch (dtype) {
    case DType::float64:
    case DType::int64:
      return 8;
    case DType::float32:
    case DType::int32:
      return 4;
    case DType::uint8:
      return 1;
    default:
      return 2;
  }
}

// Calls f with a value of the storage type of floating `dtype`.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // f may be for the host only, where the host calls this
#endif
template <class F>
TORCHCE_HD void with_float_type(DType dtype, F f) {
  switch (dtype) {
    case DType::float64:
      return f(double{});
    case DType::bfloat16:
      return f(BFloat16{});
    case DType::float16:
      return f(Half{});
    default:
      return f(float{});
  }
}

// Stores or loads one element of a dtype that is known only at run time.
template <class A>
TORCHCE_HD void store_as(DType dtype, void* data, int64_t i, A value) {
  with_float_type(dtype,
                  [&](auto storage) TORCHCE_HD_LAMBDA { store_one(static_cast<decltype(storage)*>(data) + i, value); });
}

template <class A>
TORCHCE_HD A load_as(DType dtype, const void* data, int64_t i) {
  A value{};
  with_float_type(dtype, [&](auto storage) TORCHCE_HD_LAMBDA {
    value = A(load_one<A>(static_cast<const decltype(storage)*>(data) + i));
  });
  return value;
}

}  // namespace torchce
