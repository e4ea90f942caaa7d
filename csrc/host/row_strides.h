// Where rows [N, C, S] lie in a tensor.
//
// Logits come as [C], [N, C] or [N, C, d1...dk]; the dimensions after the classes are one dimension S in disguise
// whenever one stride leads through them all, as in every contiguous, channels_last or transposed tensor. Where none
// does (a slice of an inner dimension, say) that operand is copied. Views made in Python would do the same at
// microseconds each.
#pragma once

#include <algorithm>
#include <optional>

#include "tensor.h"

namespace torchce::host {

// The rows of logits of `sizes`; their own sizes are put into row_sizes.
inline RowShape row_shape(const Sizes& sizes, const char* name, Sizes& row_sizes) {
  check(!sizes.empty(), name, ": expected at least one dimension, got a scalar");
  const size_t class_dim = sizes.size() == 1 ? 0 : 1;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (d != class_dim) row_sizes.push_back(sizes[d]);
  }
  RowShape rows{class_dim == 1 ? sizes[0] : 1, sizes[class_dim], 1};
  check(rows.classes > 0, name, ": expected at least one class, got shape ", sizes);
  for (size_t d = 2; d < sizes.size(); ++d) rows.inner *= sizes[d];
  return rows;
}

// The stride that leads through dimensions [first, end) in order, if there is one. Sizes of 1 have no say, and any
// stride leads through no elements at all.
inline std::optional<int64_t> merged_stride(const Sizes& sizes, const Sizes& strides, size_t first) {
  int64_t stride = 1, expected = 0;
  bool any = false;
  for (size_t d = sizes.size(); d-- > first;) {
    if (sizes[d] == 0) return 0;
    if (sizes[d] == 1) continue;
    if (!any) {
      stride = strides[d];
    } else if (strides[d] != expected) {
      return std::nullopt;
    }
    any = true;
    expected = strides[d] * sizes[d];
  }
  return stride;
}

// Strides of an operand shaped as the logits (classes: 1) or as the logits without their classes (classes: 0). `t`
// becomes a contiguous copy where no strides describe it.
inline RowStrides row_strides(Tensor& t, int classes) {
  for (;;) {
    const Sizes sizes = sizes_of(t), strides = strides_of(t);
    const bool batched = int64_t(sizes.size()) > classes;
    const auto inner = merged_stride(sizes, strides, batched ? 1 + classes : sizes.size());
    const bool no_elements = std::find(sizes.begin(), sizes.end(), 0) != sizes.end();
    if (inner || no_elements) {  // no copy would change the strides of an empty tensor
      RowStrides result{};
      if (batched) result.outer = strides[0];
      if (classes == 1) result.classes = strides[batched ? 1 : 0];
      result.inner = inner.value_or(1);
      return result;
    }
    t = torch::stable::contiguous(t);
  }
}

// Allocates a gradient laid out as `like`, or contiguous where no single stride leads through the inner dimensions.
// torchce/ops.py has the same choice in its fakes.
inline Tensor empty_gradient(const Tensor& like) {
  {
    const Tensor grad = empty_like(like, like.scalar_type());
    if (merged_stride(sizes_of(grad), strides_of(grad), 2)) return grad;
  }
  return empty(sizes_of(like), like.scalar_type(), like);
}

}  // namespace torchce::host
