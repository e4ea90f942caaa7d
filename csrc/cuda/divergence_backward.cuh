// Divergences, backward: one read of both operands, and one write of each gradient that is wanted. Given the row
// statistics every class stands alone.
#pragma once

#include "divergence_row.cuh"

namespace torchce::cuda::divergence {

// The gradients of a row's classes (math/divergence.h), given what the forward found.
template <class A, class S>
struct RowGradients {
  A upstream, of_logits;  // the latter is divided by the temperature
  A temperature, rest;
  Offsets<A> offsets;
  A beta, other_share, first_term, other_term;
  Softmax<A, S::kFirst> f;
  Softmax<A, S::kOther> o;
  Bounds<A> bounds;

  struct Inputs {
    A upstream, first_max, first_sum, other_max, other_sum, value, second_value;
  };

  __device__ __forceinline__ static Inputs load(const Backward& call, int64_t r, RowPosition at) {
    const Rows& rows = call.rows;
    const Statistics<A> statistics(rows, call.statistics, r);
    const bool each = rows.options.reduction == Reduction::none;
    const A divisor = rows.options.reduction == Reduction::mean ? *static_cast<const A*>(call.totals) : A(1);
    const A sign = rows.options.kind == Kind::entropy ? -1 : 1;  // which is a negative divergence
    const A g = load_as<A>(call.grad_output_dtype, call.grad_output, each ? at.offset(call.grad_output_strides) : 0);
    Inputs in{sign * g / divisor, 0, *statistics.first_sum, 0, 1, *statistics.value, 0};
    if constexpr (S::kFirst == Side::logits) in.first_max = *statistics.first_max;
    if constexpr (S::kOther == Side::logits) {
      in.other_max = *statistics.other_max;
      in.other_sum = *statistics.other_sum;
    }
    if constexpr (S::kJs) in.second_value = *statistics.second_value;
    return in;
  }

  __device__ __forceinline__ RowGradients(const Options& options, const Inputs& in)
      : upstream(in.upstream),
        of_logits(in.upstream / A(options.temperature)),
        temperature(A(options.temperature)),
        offsets(Offsets<A>::template near<A>(in.first_max, in.other_max)),
        beta(A(options.beta)),
        other_share(A(1 - options.beta)),
        first_term(in.value),
        other_term(in.second_value),
        f(in.first_max, in.first_sum, S::kJs ? A(1) : of_logits),
        o(in.other_max, in.other_sum,
          S::kJs ? A(1) : of_logits * (S::kFirst == Side::probabilities ? in.first_sum : A(1))) {
    constexpr bool kFirstIsKnown = S::kFirst == Side::probabilities;
    const A k = remainder(offsets, in.first_max, in.other_max, kFirstIsKnown ? A(1) : in.first_sum, in.other_sum);
    rest = kFirstIsKnown ? k - A(1) : k + in.value;
  }

  // Turns the values of a class into their gradients.
  __device__ __forceinline__ void turn(A& first, A& other) const {
    if constexpr (S::kJs) {
      const A p = f.at(first), q = o.at(other);
      const MixtureLogs<A, A> logs(p, q, beta, other_share);
      other = of_logits * (q * (other_share * bounds.within(logs.other) - other_term));
      if constexpr (S::kFirst == Side::logits) {
        first = of_logits * (p * (beta * bounds.within(logs.first) - first_term));
      } else {
        first = upstream * (beta * logs.first);
      }
    } else {
      const A f_part = f.at(first), value = other;
      A other_value = 0;
      if constexpr (S::kOther == Side::logits) {
        other_value = value;
        other = math::rounded_difference(o.at(value), f_part);
      } else if constexpr (S::kOther == Side::probabilities) {
        other_value = math::log_of_positive(value);
        const A part = -temperature * f_part;
        other = part == 0 ? A(0) : part / value;
      }
      if constexpr (S::kFirst == Side::logits) {
        first = f_part * (bounds.within(offsets.gap(first, other_value)) - rest);
      } else {
        first = upstream * (offsets.gap(math::log_of_positive(first), other_value) - rest);
      }
    }
  }
};

// Stores a pack of gradients, or zeros for a row that is left out.
template <class T, class A, int n>
__device__ __forceinline__ void store_gradients(const Gradient& of, RowPosition at, int64_t k, const A (&values)[n]) {
  if (of.data == nullptr) return;
  T* grad = static_cast<T*>(of.data) + at.offset(of.strides) + k * of.strides.classes;
  store_pack(grad, rounded<T>(values), is_aligned<n>(grad));
}

// Each row belongs to a team of `team` neighbouring threads, a power of two up to a warp, or a block. kAdjacent: the
// classes of operands and gradients are adjacent in memory.
template <class T, class S, bool kAdjacent>
__global__ __launch_bounds__(kThreads, kBlocksToFit) void backward(const Backward call, const int team) {
  using A = Accumulate<T>;
  const Rows& rows = call.rows;
  const int64_t count = rows.outer * rows.inner, rows_of_block = kThreads / team, step = gridDim.x * rows_of_block;
  const int thread = threadIdx.x % team;
  for (int64_t first_row = blockIdx.x * rows_of_block; first_row < count; first_row += step) {
    const int64_t r = first_row + threadIdx.x / team;
    if (r >= count) continue;
    const RowPosition at(rows, r);
    const bool kept = is_kept(rows, at);
    const RowGradients<A, S> row(rows.options, RowGradients<A, S>::load(call, r, at));
    for_each_class<S, kAdjacent, T>(rows, at, thread, team, [&](int64_t k, auto& f, auto& o) {
      constexpr int n = sizeof(f) / sizeof(A);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        row.turn(f[i], o[i]);
        f[i] = kept ? f[i] : A(0);
        o[i] = kept ? o[i] : A(0);
      }
      store_gradients<T>(call.first, at, k, f);
      if constexpr (S::kOther != Side::none) store_gradients<T>(call.other, at, k, o);
    });
  }
}

}  // namespace torchce::cuda::divergence
