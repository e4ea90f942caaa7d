// What rows give beside loss and lse: predictions, of each row the first class of its largest logit as torch.argmax has
// it, and entropies.
//
// A kernel of its own, behind the forward, whose statistics it needs: one more read of the logits for both, and no
// register of theirs in a forward without them.
#pragma once

#include "exp.cuh"
#include "reduce.cuh"
#include "softmax_ce_classes.cuh"

namespace torchce::cuda::softmax_ce {

// The class that is ahead among some of a row: that of the first NaN, else the first of the largest logit.
template <class A>
struct Prediction {
  A logit;
  int64_t index;  // beyond every class where there is none yet

  __device__ __forceinline__ static Prediction identity() { return {-math::kInfinity<A>, INT64_MAX}; }
  __device__ __forceinline__ void add(const Prediction& other) {
    const bool is_nan = logit != logit, other_is_nan = other.logit != other.logit;
    const bool same = logit == other.logit || (is_nan && other_is_nan);
    const bool is_larger = !is_nan && (other.logit > logit || other_is_nan);
    if (is_larger || (same && other.index < index)) *this = other;
  }
  __device__ __forceinline__ Prediction of_lanes(int width) const {
    Prediction all = *this;
    for (int step = width / 2; step > 0; step /= 2) {
      all.add({__shfl_xor_sync(kAllLanes, all.logit, step), __shfl_xor_sync(kAllLanes, all.index, step)});
    }
    return all;
  }
};

// What some classes of a row add to its outputs.
template <class A>
struct RowOutputs {
  Prediction<A> best;
  A weighted_gaps;

  __device__ __forceinline__ static RowOutputs identity() { return {Prediction<A>::identity(), 0}; }
  __device__ __forceinline__ RowOutputs of_lanes(int width) const {
    return {best.of_lanes(width), sum_of_lanes(weighted_gaps, width)};
  }
};

template <class A>
__device__ __forceinline__ void write_outputs(const Forward& call, int64_t r, const RowOutputs<A>& row) {
  if (call.predictions != nullptr) call.predictions[r] = row.best.index;
  if (call.entropy == nullptr) return;
  const Statistics<A> statistics(call.rows, call.statistics);
  const A mean_gap = row.weighted_gaps / statistics.sum[r];
  statistics.mean_gaps[r] = mean_gap;
  static_cast<A*>(call.entropy)[r] = math::log(statistics.sum[r]) - mean_gap;
}

// Each row belongs to a team of `team` neighbouring threads, a power of two up to a warp, or a block. kAdjacent: so are
// its classes.
template <class T, bool kAdjacent>
__global__ __launch_bounds__(kThreads) void row_outputs(const Forward call, const int team) {
  using A = Accumulate<T>;
  constexpr int V = kAdjacent ? kPack<T> : 1;
  const Rows& rows = call.rows;
  const LogitOf<General<Indices>, T> logit(rows);
  const bool has_predictions = call.predictions != nullptr, has_entropy = call.entropy != nullptr;
  const int64_t count = rows.outer * rows.inner, rows_of_block = kThreads / team, step = gridDim.x * rows_of_block;
  const int thread = threadIdx.x % team;
  for (int64_t first = blockIdx.x * rows_of_block; first < count; first += step) {
    const int64_t r = first + threadIdx.x / team;
    auto best = Prediction<A>::identity();
    math::CompensatedSum<A, true> weighted_gaps{};
    if (r < count) {
      const T* x = at_row<T>(rows.logits, rows.logits_strides, RowPosition(rows, r));
      const A max = Statistics<A>(rows, call.statistics).max[r];
      const auto add = [&](const auto& pack, int64_t k) {
        constexpr int n = sizeof(pack) / sizeof(T);
        if (has_predictions) {
#pragma unroll
          for (int i = 0; i < n; ++i) best.add({get<A>(pack, i), k + i});
        }
        if (!has_entropy) return;
        weighted_gaps.add(math::sum_in_pairs<n>(0, [&](int i) {
          const A gap = logit.value(get<A>(pack, i)) - max;
          return weighted_gap(exp_in_sum(gap), gap);
        }));
      };
      const auto add_one = [&](int64_t k) { add(Pack<T, 1>{{x[k * rows.logits_strides.classes]}}, k); };
      if constexpr (kAdjacent) {
        const PackedClasses<V> classes(x, 0, rows.classes);
        classes.for_each_before(thread, team, add_one);
        for (int64_t p = thread; p < classes.packs; p += team) {
          const int64_t k = classes.body + p * V;
          add(load_pack<V>(x + k, true), k);
        }
        classes.for_each_after(thread, team, add_one);
      } else {
        for (int64_t k = thread; k < rows.classes; k += team) add_one(k);
      }
    }
    RowOutputs<A> outputs{best, weighted_gaps.sum};
    outputs = team > kWarp ? reduce_block(outputs) : outputs.of_lanes(team);
    if (r < count && thread == 0) write_outputs(call, r, outputs);
  }
}

}  // namespace torchce::cuda::softmax_ce
