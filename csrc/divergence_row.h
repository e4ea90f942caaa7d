// One row of a divergence problem: where its statistics lie, whether it is kept, what the upstream gradient gives it.
// The same for every device.
#pragma once

#include "math/divergence.h"
#include "row_position.h"
#include "storage.h"

namespace torchce::divergence {

// Pointers to the statistics of row 0, in the order of statistics_of (problem.h).
template <class A>
struct Statistics {
  A *first_max = nullptr, *first_sum, *other_max = nullptr, *other_sum = nullptr, *value, *second_value;

  TORCHCE_HD Statistics(const Rows& rows, const void* data) {
    A* next = static_cast<A*>(const_cast<void*>(data));
    const auto take = [&]() TORCHCE_HD_LAMBDA {
      A* mine = next;
      next += rows.outer * rows.inner;
      return mine;
    };
    if (rows.first.side == Side::logits) first_max = take();
    first_sum = take();
    if (rows.other.side == Side::logits) {
      other_max = take();
      other_sum = take();
    }
    value = take();
    second_value = next;  // of a JS divergence
  }
};

TORCHCE_HD bool is_kept(const Rows& rows, RowPosition at) {
  return rows.mask == nullptr || rows.mask[at.offset(rows.mask_strides)] != 0;
}

// What the loss of a row is times its divergence: an entropy is a negative one.
template <class A>
TORCHCE_HD A sign_of(const Rows& rows) {
  return rows.options.kind == Kind::entropy ? A(-1) : A(1);
}

// The upstream gradient of a row's divergence, a mean's divisor and the sign in it.
template <class A>
TORCHCE_HD A upstream_of(const Backward& call, RowPosition at) {
  const Reduction reduction = call.rows.options.reduction;
  const int64_t place = reduction == Reduction::none ? at.offset(call.grad_output_strides) : 0;
  const A divisor = reduction == Reduction::mean ? *static_cast<const A*>(call.totals) : A(1);
  return sign_of<A>(call.rows) * load_as<A>(call.grad_output_dtype, call.grad_output, place) / divisor;
}

}  // namespace torchce::divergence
