// What the host code of every op needs from torch's stable ABI: checks, element types, shapes, allocation.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../problem.h"
#include "torch_version.h"

namespace torchce::host {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

inline std::ostream& operator<<(std::ostream& out, const Sizes& sizes) {
  for (size_t d = 0; d < sizes.size(); ++d) out << (d == 0 ? "[" : ", ") << sizes[d];
  return out << (sizes.empty() ? "[]" : "]");
}

// torchce.functional checks what a user passed and explains it; the ops check what keeps memory safe. The message is
// put together only when it is needed: building strings would cost a small problem more than its kernel.
template <class... Parts>
void check(bool condition, const Parts&... parts) {
  if (__builtin_expect(!condition, 0)) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }
}

inline Sizes sizes_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

inline Sizes strides_of(const Tensor& t) {
  const auto strides = t.strides();
  return Sizes(strides.begin(), strides.end());
}

inline DType dtype_of(ScalarType type, const char* name) {
  switch (type) {
    case ScalarType::Double:
      return DType::float64;
    case ScalarType::Float:
      return DType::float32;
    case ScalarType::BFloat16:
      return DType::bfloat16;
    case ScalarType::Half:
      return DType::float16;
    case ScalarType::Long:
      return DType::int64;
    case ScalarType::Int:
      return DType::int32;
    case ScalarType::Byte:
    case ScalarType::Bool:
      return DType::uint8;
    default:
      check(false, name, ": no kernel reads dtype ", torch::headeronly::toString(type));
      return DType::float32;
  }
}

inline DType dtype_of(const Tensor& t, const char* name) { return dtype_of(t.scalar_type(), name); }

inline DType float_dtype_of(const Tensor& t, const char* name) {
  const DType dtype = dtype_of(t, name);
  check(is_floating(dtype), name, ": expected a floating dtype, got ", torch::headeronly::toString(t.scalar_type()));
  return dtype;
}

inline ScalarType accumulation_type(DType dtype) {
  return dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
}

inline void check_same_device(const Tensor& t, const Tensor& logits, const char* name) {
  check(t.device() == logits.device(), name, " and logits are on different devices");
}

inline Sizes contiguous_strides(const Sizes& sizes) {
  Sizes strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = step;
    step *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return strides;
}

// Whether the elements fill one block of memory, each place once, in whatever order of dimensions.
inline bool is_dense(const Sizes& sizes, const Sizes& strides) {
  std::vector<size_t> left;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] > 1) left.push_back(d);
  }
  for (int64_t expected = 1; !left.empty();) {
    size_t i = 0;
    while (i < left.size() && strides[left[i]] != expected) ++i;
    if (i == left.size()) return false;
    expected *= sizes[left[i]];
    left.erase(left.begin() + i);
  }
  return true;
}

// A C++ value as the stable interface's, or one of those as a C++ value; the only use of names that torch's stable
// headers keep to themselves. A tensor that is cast from a value becomes its owner.
template <class To, class From>
To stable_cast(const From& value) {
  if constexpr (std::is_same_v<To, StableIValue>) {
    return torch::stable::detail::from(value);
  } else {
    return torch::stable::detail::to<To>(value);
  }
}

// The number that torch's C interface has for a dtype or a kind of device.
template <class Name>
int32_t number_of(Name name) {
  return stable_cast<int32_t>(stable_cast<StableIValue>(name));
}

inline Tensor empty_strided(const Sizes& sizes, const Sizes& strides, ScalarType type, const Tensor& like) {
  AtenTensorHandle handle = nullptr;
  const auto device = like.device();
  TORCHCE_CHECK_TORCH(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(), number_of(type),
                                               number_of(device.type()), device.index(), &handle));
  return Tensor(handle);
}

inline Tensor empty(const Sizes& sizes, ScalarType type, const Tensor& like) {
  return empty_strided(sizes, contiguous_strides(sizes), type, like);
}

// Allocates as torch.empty_like does: in the layout of t where it is dense, else in the one that torch chooses.
inline Tensor empty_like(const Tensor& t, ScalarType type) {
  const Sizes sizes = sizes_of(t), strides = strides_of(t);
  if (is_dense(sizes, strides)) return empty_strided(sizes, strides, type, t);
  Sizes chosen;
  {
    const Tensor like = torch::stable::empty_like(t);
    if (like.scalar_type() == type) return like;
    chosen = strides_of(like);
  }  // freed, so that no two tensors of this size are held at once
  return empty_strided(sizes, chosen, type, t);
}

inline Reduction reduction_of(int64_t reduction) {
  check(0 <= reduction && reduction <= 2, "reduction: expected 0 (none), 1 (mean) or 2 (sum), got ", reduction);
  return Reduction(reduction);
}

inline torchce::divergence::Kind kind_of(int64_t kind) {
  check(0 <= kind && kind <= 3, "kind: expected 0 (kl), 1 (reverse kl), 2 (js) or 3 (entropy), got ", kind);
  return torchce::divergence::Kind(kind);
}

}  // namespace torchce::host
