// The predictions of rows: of each the first class of its largest logit, as torch.argmax has it.
//
// A kernel of its own, behind the forward, so that a forward without predictions has no register of theirs.
#pragma once

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

// Each row belongs to `lanes` neighbouring threads, a power of two up to a warp. kAdjacent: so are its classes.
template <class T, bool kAdjacent>
__global__ __launch_bounds__(kThreads) void predict(const Forward call, const int lanes) {
  using A = Accumulate<T>;
  constexpr int V = kAdjacent ? kPack<T> : 1;
  const Rows& rows = call.rows;
  const int64_t count = rows.outer * rows.inner, rows_of_block = kThreads / lanes, step = gridDim.x * rows_of_block;
  const int lane = threadIdx.x % lanes;
  for (int64_t first = blockIdx.x * rows_of_block; first < count; first += step) {
    const int64_t r = first + threadIdx.x / lanes;
    auto best = Prediction<A>::identity();
    if (r < count) {
      const T* x = at_row<T>(rows.logits, rows.logits_strides, RowPosition(rows, r));
      const auto add = [&](int64_t k) { best.add({load_one<A>(x + k * rows.logits_strides.classes), k}); };
      if constexpr (kAdjacent) {
        const PackedClasses<V> classes(x, 0, rows.classes);
        classes.for_each_before(lane, lanes, add);
        for (int64_t p = lane; p < classes.packs; p += lanes) {
          const int64_t k = classes.body + p * V;
          const auto logits = load_pack<V>(x + k, true);
#pragma unroll
          for (int v = 0; v < V; ++v) best.add({get<A>(logits, v), k + v});
        }
        classes.for_each_after(lane, lanes, add);
      } else {
        for (int64_t k = lane; k < rows.classes; k += lanes) add(k);
      }
    }
    best = best.of_lanes(lanes);
    if (r < count && lane == 0) call.predictions[r] = best.index;
  }
}

}  // namespace torchce::cuda::softmax_ce
