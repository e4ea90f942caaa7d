// Exponentials as the special function unit takes them: one instruction, where CUDA's expf takes eight.
#pragma once

#include <cuda_runtime.h>

#include "../math/elementary.h"

namespace torchce::cuda {

constexpr float kLog2EOfFloat = 1.44269504f;

// 2^y in one instruction.
// Valid: every y; 0 where 2^y is below 2^-126.
// Error: relative 2^-22.
__device__ __forceinline__ float exp2_approx(float y) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(y));
  return power;
#elif defined(__CUDACC__)
  return y;  // the host's pass reads it and never runs it
#else
  return cuda_emulation::exp2_approx(y);
#endif
}

// e^x in a sum that has a term of 1, which cannot tell results below 2^-126 from 0.
// Valid: every x.
// Error: relative |x| 2^-24 + 2^-22; of double that of exp_of_negative.
__device__ __forceinline__ float exp_in_sum(float x) { return exp2_approx(x * kLog2EOfFloat); }
__device__ __forceinline__ double exp_in_sum(double x) { return math::exp_of_negative(x); }

// scale e^x, or (scale + tilt y) e^x, in a short form for results that are rounded to 16 bits.
// Valid: x <= 0.
// Error: relative |x| 2^-24 + 2^-19 in the short form, else that of exp_of_negative.
//
// In the short form results below 2^-126 must not become 0, because a large scale may lift them into what 16 bits can
// hold. So 2^64 e^x is computed, and the scale takes that excess out again. A scale below 2^-24 would lose digits by
// it, but its products with such results are 0 in 16 bits anyway, so there is no excess then. Beside a tilt the error
// is relative to the larger of both.
template <class A, bool kShort>
class ScaledExp {
  A scale_, tilt_;

 public:
  __device__ __forceinline__ ScaledExp() {}
  __device__ __forceinline__ explicit ScaledExp(A scale, A tilt = 0) : scale_(scale), tilt_(tilt) {}
  __device__ __forceinline__ A operator()(A x) const { return math::exp_of_negative(x) * scale_; }
  __device__ __forceinline__ A operator()(A x, A y) const { return math::exp_of_negative(x) * (scale_ + tilt_ * y); }
};

template <>
class ScaledExp<float, true> {
  float scale_, tilt_, excess_;

  __device__ __forceinline__ float exp(float x) const { return exp2_approx(x * kLog2EOfFloat + excess_); }

 public:
  __device__ __forceinline__ ScaledExp() {}
  __device__ __forceinline__ explicit ScaledExp(float scale, float tilt = 0) {
    const bool small = math::abs(scale) < 0x1p-24f && math::abs(tilt) < 0x1p-24f;
    scale_ = small ? scale : scale * 0x1p-64f;
    tilt_ = small ? tilt : tilt * 0x1p-64f;
    excess_ = small ? 0.0f : 64.0f;
  }
  __device__ __forceinline__ float operator()(float x) const { return exp(x) * scale_; }
  __device__ __forceinline__ float operator()(float x, float y) const { return exp(x) * (scale_ + tilt_ * y); }
};

}  // namespace torchce::cuda
