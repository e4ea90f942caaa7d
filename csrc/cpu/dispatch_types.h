// From the run-time element types of a problem to the storage types of vector.h.
#pragma once

#include "vector.h"

namespace torchce::cpu::TORCHCE_LEVEL {

// Calls f with a value of the storage type of floating `dtype`.
template <class F>
TORCHCE_SIMD void with_float_type(DType dtype, F f) {
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

// Writes one loss in the output's dtype.
template <class A>
TORCHCE_SIMD void store_as(DType dtype, void* data, int64_t i, A value) {
  with_float_type(dtype, [&](auto storage) { store_one(static_cast<decltype(storage)*>(data) + i, value); });
}

template <class A>
TORCHCE_SIMD A load_as(DType dtype, const void* data, int64_t i) {
  A value{};
  with_float_type(dtype,
                  [&](auto storage) { value = A(load_one<A>(static_cast<const decltype(storage)*>(data) + i)); });
  return value;
}

}  // namespace torchce::cpu::TORCHCE_LEVEL
