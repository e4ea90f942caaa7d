// Divergences, forward: one launch, the reduction included. The operands are read once, for a JS divergence a second
// time from the caches.
#pragma once

#include "divergence_row.cuh"

namespace torchce::cuda::divergence {

// The two terms of a JS divergence, of some of a row's classes.
template <class A>
struct MixtureShare {
  A first, other;

  __device__ __forceinline__ static MixtureShare identity() { return {0, 0}; }
  __device__ __forceinline__ MixtureShare of_lanes(int width) const {
    return {sum_of_lanes(first, width), sum_of_lanes(other, width)};
  }
};

// What the threads of a team have together, in all of them: a team is a part of a warp, or the block.
// Assumes: all threads of the block call it.
template <class Value>
__device__ __forceinline__ Value of_team(Value value, int team) {
  if (team <= kWarp) return value.of_lanes(team);
  __shared__ Value of_block;
  value = reduce_block(value);
  if (threadIdx.x == 0) of_block = value;
  __syncthreads();
  return of_block;  // which the next call writes after the barriers of reduce_block
}

// Each row belongs to a team of `team` neighbouring threads, a power of two up to a warp, or a block.
template <class T, class S, bool kAdjacent>
__global__ __launch_bounds__(kThreads, kBlocksToFit) void forward_by_teams(const Forward call, const int team,
                                                                           const GridScratch scratch) {
  using A = Accumulate<T>;
  const Rows& rows = call.rows;
  const Options& options = rows.options;
  const int64_t count = rows.outer * rows.inner, rows_of_block = kThreads / team, step = gridDim.x * rows_of_block;
  const int thread = threadIdx.x % team;
  LossSums total = LossSums::identity();
  for (int64_t first_row = blockIdx.x * rows_of_block; first_row < count; first_row += step) {
    const int64_t r = first_row + threadIdx.x / team;
    const RowPosition at(rows, r < count ? r : 0);
    const bool kept = r < count && is_kept(rows, at);
    RunningSums<A, S> running;
    if (kept) {
      for_each_class<S, kAdjacent, T>(rows, at, thread, team,
                                      [&](int64_t, const auto& f, const auto& o) { running.add(f, o); });
    }
    const auto row = of_team(running.share(), team).sums;
    A value, second_value = 0;
    if constexpr (S::kJs) {
      const auto sums = KnownSums<A>::of(row);
      const A beta = A(options.beta), rest = A(1 - options.beta);
      const Softmax<A, S::kFirst> p(row.against.first, sums.first, A(kLift));
      const Softmax<A, S::kOther> q(row.against.other, sums.other, A(kLift));
      math::CompensatedSum<A, true> of_first{0, 0}, of_other{0, 0};
      if (kept) {
        for_each_class<S, kAdjacent, T>(rows, at, thread, team, [&](int64_t, const auto& f, const auto& o) {
          constexpr int n = sizeof(f) / sizeof(A);
#pragma unroll
          for (int i = 0; i < n; ++i) {
            const A of_p = p.at(f[i]), of_q = q.at(o[i]);
            const MixtureLogs<A, A> logs(of_p, of_q, beta, rest);
            of_first.add(of_p * reachable_log(logs.first));
            of_other.add(of_q * reachable_log(logs.other));
          }
        });
      }
      const auto terms = of_team(MixtureShare<A>{of_first.sum, of_other.sum}, team);
      value = beta * (terms.first * A(1 / kLift));
      second_value = rest * (terms.other * A(1 / kLift));
    } else {
      value = kl<A>(row);
    }
    if (r >= count || thread != 0) continue;
    const Statistics<A> statistics(rows, call.statistics);
    if constexpr (S::kFirst == Side::logits) statistics.first_max[r] = row.against.first;
    statistics.first_sum[r] = row.first.sum;
    if constexpr (S::kOther == Side::logits) {
      statistics.other_max[r] = row.against.other;
      statistics.other_sum[r] = row.other.sum;
    }
    statistics.value[r] = value;
    if constexpr (S::kJs) statistics.second_value[r] = second_value;
    const A loss = kept ? sign_of<A>(rows) * value + second_value : A(0);
    total.loss += loss;
    total.weight += kept ? 1 : 0;
    if (options.reduction == Reduction::none) store_as(call.loss_dtype, call.loss, r, loss);
  }
  if (!reduce_grid(total, scratch)) return;
  if (threadIdx.x != 0) return;
  *static_cast<A*>(call.totals) = A(total.weight);
  if (options.reduction == Reduction::none) return;
  store_as(call.loss_dtype, call.loss, 0,
           options.reduction == Reduction::mean ? total.loss / total.weight : total.loss);
}

}  // namespace torchce::cuda::divergence
