// One row of a softmax_ce problem: where it stands, what its target says, what the upstream gradient gives it. The same
// for every device.
#pragma once

#include "math/softmax_ce.h"
#include "row_position.h"
#include "softmax_ce_logit.h"
#include "storage.h"

namespace torchce::softmax_ce {

// What the rows' targets can be. Logit is the kind of logit that goes with them (softmax_ce_logit.h).
struct Indices {
  static constexpr bool kProbabilities = false;
  static constexpr bool kSpread = false;  // the loss has terms for every class, not only for the target
  template <class A>
  using Logit = PlainLogit;
};
struct SmoothedIndices {
  static constexpr bool kProbabilities = false;
  static constexpr bool kSpread = true;
  template <class A>
  using Logit = PlainLogit;
};
template <class P>
struct Probabilities {
  static constexpr bool kProbabilities = true;
  static constexpr bool kSpread = true;
  using Storage = P;
  template <class A>
  using Logit = PlainLogit;
};

// The same with every option (Rows::is_general).
template <class Target>
struct General : Target {
  template <class A>
  using Logit = TransformedLogit<A>;
};
template <class Target>
constexpr bool kIsGeneral = false;
template <class Target>
constexpr bool kIsGeneral<General<Target>> = true;

// Calls f with the logits' storage type and the kind of target that knows every option.
template <class F>
inline __attribute__((always_inline)) void with_general_types(const Rows& rows, F f) {
  with_float_type(rows.dtype, [&](auto logits) {
    using T = decltype(logits);
    if (is_floating(rows.target_dtype)) return f(logits, General<Probabilities<Accumulate<T>>>{});
    if (rows.options.label_smoothing != 0) return f(logits, General<SmoothedIndices>{});
    f(logits, General<Indices>{});
  });
}

// Calls f with the logits' storage type and the kind of target. Other pairs of dtypes the host refuses (schemas.h).
template <class F>
inline __attribute__((always_inline)) void with_problem_types(const Rows& rows, bool is_general, F f) {
  if (is_general) return with_general_types(rows, f);
  if (is_floating(rows.target_dtype) && rows.accumulation == DType::float64) {
    const auto with_target = [&](auto logits) {
      if (rows.target_dtype == DType::float64) return f(logits, Probabilities<double>{});
      f(logits, Probabilities<float>{});
    };
    return rows.dtype == DType::float64 ? with_target(double{}) : with_target(FloatInDouble{});
  }
  with_float_type(rows.dtype, [&](auto logits) {
    using T = decltype(logits);
    if constexpr (!kInDouble<T>) {
      if (rows.target_dtype == rows.dtype) return f(logits, Probabilities<T>{});
      if (rows.target_dtype == DType::float32) return f(logits, Probabilities<float>{});
    }
    if (rows.options.label_smoothing != 0) return f(logits, SmoothedIndices{});
    f(logits, Indices{});
  });
}

// Calls f with a value of a class index's type.
template <class F>
TORCHCE_HD void with_index_type(DType dtype, F f) {
  switch (dtype) {
    case DType::int64:
      return f(int64_t{});
    case DType::int32:
      return f(int32_t{});
    default:
      return f(uint8_t{});
  }
}

// The class index of one row.
struct TargetClass : ClassIndex<int64_t> {
  TORCHCE_HD TargetClass(const Rows& rows, RowPosition at) : TargetClass(rows, target_at(rows, at)) {}
  TORCHCE_HD TargetClass(const Rows& rows, int64_t target)
      : ClassIndex(target, rows.options.ignore_index, rows.classes) {}

  TORCHCE_HD static int64_t target_at(const Rows& rows, RowPosition at) {
    int64_t target = 0;
    with_index_type(rows.target_dtype, [&](auto storage) TORCHCE_HD_LAMBDA {
      target = static_cast<const decltype(storage)*>(rows.target)[at.offset(rows.target_strides)];
    });
    return target;
  }
};

// The first row of [begin, end) whose target is no class, or -1.
TORCHCE_HD int64_t first_bad_row(const Rows& rows, int64_t begin, int64_t end) {
  RowPosition at(rows, begin);
  for (int64_t r = begin; r < end; ++r, at.advance(rows)) {
    if (TargetClass(rows, at).bad) return r;
  }
  return -1;
}

template <class A>
TORCHCE_HD Smoothing<A> smoothing_of(const Rows& rows) {
  return {rows.options.label_smoothing, rows.classes};
}

// IndexedRow is the class index of one row, with its weight in the mean and its h.
template <class A>
struct IndexedRow : TargetClass {
  A weight = 1;  // 0 where the row is ignored or bad: in the mean, bad rows do not count on CUDA
  A hot;         // NaN where the row is bad

  TORCHCE_HD IndexedRow(const Rows& rows, int64_t target, const Smoothing<A>& smoothing) : TargetClass(rows, target) {
    if (rows.weight != nullptr) weight = static_cast<const A*>(rows.weight)[index];
    hot = bad ? A(__builtin_nan("")) : smoothing.hot(weight);
    if (ignored || bad) weight = 0;
  }
};

// The upstream gradient of a row's loss, still to be divided by mean_divisor.
template <class A>
TORCHCE_HD A row_grad_output(const Backward& call, RowPosition at) {
  const bool each = call.rows.options.reduction == Reduction::none;
  return load_as<A>(call.grad_output_dtype, call.grad_output, each ? at.offset(call.grad_output_strides) : 0);
}
template <class A>
TORCHCE_HD A mean_divisor(const Backward& call) {
  return call.rows.options.reduction == Reduction::mean ? static_cast<const A*>(call.totals)[0] : A(1);
}

// U of a row with a class index: the same for all of them.
template <class A>
TORCHCE_HD A sum_of_index_coefficients(const Backward& call) {
  return static_cast<const A*>(call.totals)[1];
}

// Pointers into the row statistics.
template <class A>
struct Statistics {
  A* max;
  A* sum;
  A* coefficients;  // U = sum_k u_k, of probability targets
  A* mean_gaps;     // where entropies are returned
  TORCHCE_HD Statistics(const Rows& rows, const void* data)
      : max(static_cast<A*>(const_cast<void*>(data))),
        sum(max + rows.outer * rows.inner),
        coefficients(sum + rows.outer * rows.inner),
        mean_gaps(is_floating(rows.target_dtype) ? coefficients + rows.outer * rows.inner : coefficients) {}
};

}  // namespace torchce::softmax_ce
