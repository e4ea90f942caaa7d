// The classes of a row as the softmax_ce kernels read them: in packs, with their coefficients, and the row's target.
#pragma once

#include "../softmax_ce_row.h"
#include "launch_shape.h"
#include "pack.cuh"
#include "packed_classes.cuh"

namespace torchce::cuda::softmax_ce {

using namespace torchce::softmax_ce;

// Blocks of a kernel that must fit on a multiprocessor at once: three, but two where the exponentials of float64 or
// the coefficients of every class, or a tanh, need the registers.
template <class Target, class T>
constexpr int kBlocks = kInDouble<T> || Target::kSpread || kIsGeneral<Target> ? kBlocksToFit : kBlocksOfPlain;

// Whether target probabilities come in two words a pack of logits of type T.
template <class Target, class T>
constexpr bool kIsWider = false;
template <class P, class T>
constexpr bool kIsWider<Probabilities<P>, T> = kPack<T> * sizeof(P) > 16;
template <class Target, class T>
constexpr bool kIsWider<General<Target>, T> = kIsWider<Target, T>;

// Packs of logits a thread has in flight: four, halved for the exponentials of float64, halved for the coefficients of
// every class or a tanh, and once more for those that come in two words a pack: all of them need the registers.
template <class Target, class T>
constexpr int kUnroll =
    4 / (kInDouble<T> ? 2 : 1) / (Target::kSpread || kIsGeneral<Target> ? 2 : 1) / (kIsWider<Target, T> ? 2 : 1);

// The coefficients u_k of one row.
template <class Target, class A>
struct ClassCoefficients {
  static constexpr bool kUsed = Target::kSpread;
  const A* weight;
  Smoothing<A> smoothing;

  __device__ __forceinline__ explicit ClassCoefficients(const Rows& rows)
      : weight(static_cast<const A*>(rows.weight)), smoothing(smoothing_of<A>(rows)) {}

  __device__ __forceinline__ A weight_of(int64_t k) const { return weight == nullptr ? A(1) : weight[k]; }

  // u_k of class k, 0 where it is not there; `probability` is what the target says of it, where it holds probabilities.
  // kUnweighted: there are no weights. kWhole: every class is there.
  template <bool kUnweighted = false, bool kWhole = true>
  __device__ __forceinline__ auto at(int64_t k, A probability, bool is_there = true) const {
    constexpr bool kEven = kWhole && !Target::kProbabilities;
    const A share_of_class = Target::kProbabilities ? smoothing.share(probability) : smoothing.even_share();
    const A share = kWhole || is_there ? share_of_class : A(0);
    if constexpr (kUnweighted) {
      return Coefficient<math::One, A, kEven>{{}, share};
    } else {
      return Coefficient<A, A, kEven>{kWhole || is_there ? weight_of(k) : A(0), share};
    }
  }
};

// The element type of target probabilities; where there are none, that of the logits, so that a pointer has a type.
template <class Target, class T>
struct ProbabilityType {
  using type = T;
};
template <class Target, class T>
  requires Target::kProbabilities
struct ProbabilityType<Target, T> {
  using type = typename Target::Storage;
};

template <class T>
__device__ __forceinline__ const T* at_row(const void* data, const RowStrides& strides, RowPosition at) {
  return static_cast<const T*>(data) + at.offset(strides);
}

// The bits of n elements of `bytes` bytes each, from number `first` on, `step` apart. Nothing waits for them before a
// number is made of them. Their width is asked once for all: loads on both sides of a branch would wait for each other.
template <int n>
__device__ __forceinline__ void load_bits(const void* data, int bytes, int64_t first, int64_t step,
                                          uint64_t (&bits)[n]) {
  const auto load = [&](auto storage) {
#pragma unroll
    for (int v = 0; v < n; ++v) bits[v] = static_cast<const decltype(storage)*>(data)[first + v * step];
  };
  if (bytes == 8) {
    load(uint64_t{});
  } else if (bytes == 4) {
    load(uint32_t{});
  } else if (bytes == 2) {
    load(uint16_t{});
  } else {
    load(uint8_t{});
  }
}
template <class A>
__device__ __forceinline__ A float_of(DType dtype, uint64_t bits) {
  A value{};
  with_float_type(dtype, [&](auto element) {
    std::memcpy(&element, &bits, sizeof element);
    value = A(load_one<A>(&element));
  });
  return value;
}

// The targets of n neighbouring rows.
template <class Target, int n>
__device__ __forceinline__ void load_target_bits(const Rows& rows, RowPosition at, uint64_t (&bits)[n]) {
  if constexpr (Target::kProbabilities) {
#pragma unroll
    for (int v = 0; v < n; ++v) bits[v] = 0;
  } else {
    load_bits(rows.target, bytes_of(rows.target_dtype), at.offset(rows.target_strides), rows.target_strides.inner,
              bits);
  }
}
template <class Target>
__device__ __forceinline__ uint64_t load_target_bits(const Rows& rows, RowPosition at) {
  uint64_t bits[1];
  load_target_bits<Target>(rows, at, bits);
  return bits[0];
}
__device__ __forceinline__ int64_t target_of(const Rows& rows, uint64_t bits) {
  return rows.target_dtype == DType::int32 ? int64_t(int32_t(uint32_t(bits))) : int64_t(bits);
}

// Whether a row needs no pass over its classes.
template <class Target>
__device__ __forceinline__ bool is_ignored(const Rows& rows, int64_t target) {
  if (kIsGeneral<Target> && rows.every_row) return false;
  return !Target::kProbabilities && TargetClass(rows, target).ignored;
}

// The target of the row that comes next among those that a thread goes through. It is asked for while the row before
// is worked on: whether a row is ignored must be known before its logits are asked for, which would have to wait.
template <class Target>
class TargetAhead {
  const Rows& rows_;
  const int64_t count_;
  uint64_t bits_;

 public:
  __device__ __forceinline__ TargetAhead(const Rows& rows, int64_t first)
      : rows_(rows), count_(rows.outer * rows.inner) {
    ask_for(first);
  }
  __device__ __forceinline__ void ask_for(int64_t r) {
    bits_ = r < count_ ? load_target_bits<Target>(rows_, RowPosition(rows_, r)) : 0;
  }
  __device__ __forceinline__ int64_t get() const { return target_of(rows_, bits_); }
};

// Loads the logit of a row's target class, or of class 0 where the target is no class. It is asked for before the
// row's sums, looked at after them, and read before a gradient is written there.
template <class T, class Target>
__device__ __forceinline__ T load_hot_logit(const Rows& rows, RowPosition at, int64_t target) {
  if constexpr (Target::kProbabilities) return T{};
  const int64_t index = TargetClass(rows, target).index;
  return at_row<T>(rows.logits, rows.logits_strides, at)[index * rows.logits_strides.classes];
}

}  // namespace torchce::cuda::softmax_ce
