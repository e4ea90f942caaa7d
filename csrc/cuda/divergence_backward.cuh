// Divergences, backward: one read of both operands, and one write of each gradient that is wanted. Given the row
// statistics every class stands alone.
#pragma once

#include "divergence_row.cuh"

namespace torchce::cuda::divergence {

template <class S, class A>
__device__ __forceinline__ RowInputs<A> load_row_inputs(const Backward& call, int64_t r, RowPosition at) {
  const Statistics<A> statistics(call.rows, call.statistics);
  RowInputs<A> in{upstream_of<A>(call, at), 0, statistics.first_sum[r], 0, 1, statistics.value[r], 0};
  if constexpr (S::kFirst == Side::logits) in.first_max = statistics.first_max[r];
  if constexpr (S::kOther == Side::logits) {
    in.other_max = statistics.other_max[r];
    in.other_sum = statistics.other_sum[r];
  }
  if constexpr (S::kJs) in.second_value = statistics.second_value[r];
  return in;
}

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
__global__ __launch_bounds__(kThreads, kBlocksToFit) void backward_by_teams(const Backward call, const int team) {
  using A = Accumulate<T>;
  const Rows& rows = call.rows;
  const int64_t count = rows.outer * rows.inner, rows_of_block = kThreads / team, step = gridDim.x * rows_of_block;
  const int thread = threadIdx.x % team;
  const bool of_first = call.first.data != nullptr, of_other = call.other.data != nullptr;
  for (int64_t first_row = blockIdx.x * rows_of_block; first_row < count; first_row += step) {
    const int64_t r = first_row + threadIdx.x / team;
    if (r >= count) continue;
    const RowPosition at(rows, r);
    const bool kept = is_kept(rows, at);
    const RowGradients<A, A, S, Softmax<A, S::kFirst>, Softmax<A, S::kOther>> row(
        rows.options, load_row_inputs<S, A>(call, r, at), of_first);
    for_each_class<S, kAdjacent, T>(rows, at, thread, team, [&](int64_t k, auto& f, auto& o) {
      constexpr int n = sizeof(f) / sizeof(A);
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if constexpr (S::kOther == Side::none) {
          row.template turn<true, false>(f[i], o[i]);
        } else if (of_first && of_other) {
          row.template turn<true, true>(f[i], o[i]);
        } else if (of_first) {
          row.template turn<true, false>(f[i], o[i]);
        } else {
          row.template turn<false, true>(f[i], o[i]);
        }
        f[i] = kept ? f[i] : A(0);
        o[i] = kept ? o[i] : A(0);
      }
      store_gradients<T>(call.first, at, k, f);
      if constexpr (S::kOther != Side::none) store_gradients<T>(call.other, at, k, o);
    });
  }
}

}  // namespace torchce::cuda::divergence
