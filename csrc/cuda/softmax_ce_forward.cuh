// Softmax cross entropy, forward: one read of the logits, one launch, the reduction included.
//
// Rows whose classes are adjacent in memory are read along the classes, by
// - a part of a warp each (short rows),
// - a block each (long rows),
// - several blocks each, where there are fewer rows than would fill the device.
// All other rows are read across: threads hold neighbouring rows, which are adjacent in memory wherever [N, C, d1...]
// is contiguous, and the classes come one after another.
#pragma once

#include "softmax_ce_row.cuh"

namespace torchce::cuda::softmax_ce {

constexpr int kThreads = 256;

// Adds classes [begin, end) of one row to the sums of thread `thread` out of `threads` that share them. `keep` is given
// every pack of the thread, and its number among them.
template <class T, class Target, class A, class Keep>
__device__ __forceinline__ void add_classes(const Rows& rows, int64_t r, int64_t begin, int64_t end, int thread,
                                            int threads, RowSums<A, Target::kSpread>& sums, Keep keep) {
  using P = typename ProbabilityType<Target, T>::type;
  constexpr int V = kPack<T>, kBatch = kUnroll<Target, A>;
  const RowPosition at(rows, r);
  const T* x = at_row<T>(rows.logits, rows.logits_strides, at);
  const P* t = at_row<P>(rows.target, rows.target_strides, at);
  const Coefficients<Target, A> coefficients(rows);
  const PackedClasses<V> classes(x, begin, end);
  const bool target_aligned = Target::kProbabilities && is_aligned<V>(t + classes.body);

  const auto add_one = [&](int64_t k) {
    sums.template add<1>([&](int) { return load_one<A>(x + k); },
                         [&](int) { return coefficients.at(k, Target::kProbabilities ? load_one<A>(t + k) : A(0)); });
  };
  const auto add_packs = [&](auto count, int64_t first, int64_t number) {
    constexpr int n = decltype(count)::value;
    Pack<T, V> logits[n];
    Pack<P, V> target[n];
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const int64_t k = classes.body + (first + int64_t(i) * threads) * V;
      logits[i] = load_pack<V>(x + k, true);
      if constexpr (Target::kProbabilities) target[i] = load_pack<V>(t + k, target_aligned);
    }
    sums.template add<n * V>([&](int i) { return get<A>(logits[i / V], i % V); },
                             [&](int i) {
                               const int64_t k = classes.body + (first + int64_t(i / V) * threads) * V + i % V;
                               return coefficients.at(k, Target::kProbabilities ? get<A>(target[i / V], i % V) : A(0));
                             });
#pragma unroll
    for (int i = 0; i < n; ++i) keep(logits[i], number + i);
  };

  classes.for_each_before(thread, threads, add_one);
  int64_t pack = thread, number = 0;
  for (; pack + int64_t(kBatch - 1) * threads < classes.packs; pack += int64_t(kBatch) * threads, number += kBatch) {
    add_packs(std::integral_constant<int, kBatch>{}, pack, number);
  }
  for (; pack < classes.packs; pack += threads, ++number) add_packs(std::integral_constant<int, 1>{}, pack, number);
  classes.for_each_after(thread, threads, add_one);
}

template <class T, class Target, class A>
__device__ __forceinline__ void add_classes(const Rows& rows, int64_t r, int64_t begin, int64_t end, int thread,
                                            int threads, RowSums<A, Target::kSpread>& sums) {
  add_classes<T, Target>(rows, r, begin, end, thread, threads, sums, [](const Pack<T, kPack<T>>&, int64_t) {});
}

// Rows that need no pass over their classes.
template <class Target, class A>
__device__ __forceinline__ bool is_ignored(const Rows& rows, int64_t r) {
  if constexpr (Target::kProbabilities) return false;
  return IndexedRow<A>::target_at(rows, RowPosition(rows, r)) == rows.ignore_index;
}

// `lanes` neighbouring threads a row, a power of two up to a warp.
template <class T, class Target>
__global__ __launch_bounds__(kThreads, kBlocksToFit) void forward_by_lanes(const Forward call, const int lanes,
                                                                           const GridScratch scratch) {
  using A = Accumulate<T>;
  const int64_t count = call.rows.outer * call.rows.inner, rows_of_block = kThreads / lanes;
  Sums total = Sums::identity();
  for (int64_t first = blockIdx.x * rows_of_block; first < count; first += gridDim.x * rows_of_block) {
    const int64_t r = first + threadIdx.x / lanes;
    const int lane = threadIdx.x % lanes;
    auto sums = RowSums<A, Target::kSpread>::identity();
    if (r < count && !is_ignored<Target, A>(call.rows, r)) {
      add_classes<T, Target, A>(call.rows, r, 0, call.rows.classes, lane, lanes, sums);
    }
    sums = reduce_lanes(sums, lanes);
    if (r < count && lane == 0) finish_row<T, Target, A>(call, r, sums, total);
  }
  if (reduce_grid<kThreads>(total, scratch)) finish_launch<Target, A, kThreads>(call, total);
}

// A block a row.
template <class T, class Target>
__global__ __launch_bounds__(kThreads, kBlocksToFit) void forward_by_block(const Forward call,
                                                                           const GridScratch scratch) {
  using A = Accumulate<T>;
  const int64_t count = call.rows.outer * call.rows.inner;
  Sums total = Sums::identity();
  for (int64_t r = blockIdx.x; r < count; r += gridDim.x) {
    auto sums = RowSums<A, Target::kSpread>::identity();
    if (!is_ignored<Target, A>(call.rows, r)) {
      add_classes<T, Target, A>(call.rows, r, 0, call.rows.classes, threadIdx.x, kThreads, sums);
    }
    sums = reduce_block<kThreads>(sums);
    if (threadIdx.x == 0) finish_row<T, Target, A>(call, r, sums, total);
  }
  if (reduce_grid<kThreads>(total, scratch)) finish_launch<Target, A, kThreads>(call, total);
}

// `parts` blocks a row, each `part` classes; what they find meets in `of_parts`, [rows, parts]. The last block to come
// there finishes all rows, a warp each.
template <class T, class Target>
__global__ __launch_bounds__(kThreads, kBlocksToFit) void forward_by_parts(const Forward call, const int parts,
                                                                           const int64_t part, void* const of_parts,
                                                                           unsigned* const counter) {
  using A = Accumulate<T>;
  using Part = RowSums<A, Target::kSpread>;
  const int64_t count = call.rows.outer * call.rows.inner;
  {
    const int64_t r = blockIdx.x / parts, begin = blockIdx.x % parts * part;
    const int64_t end = begin + part < call.rows.classes ? begin + part : call.rows.classes;
    auto sums = Part::identity();
    add_classes<T, Target, A>(call.rows, r, begin, end, threadIdx.x, kThreads, sums);
    sums = reduce_block<kThreads>(sums);
    if (threadIdx.x == 0) static_cast<Part*>(of_parts)[blockIdx.x] = sums;
  }
  if (!is_last_block(counter)) return;
  Sums total = Sums::identity();
  const int lane = threadIdx.x % kWarp;
  for (int64_t r = threadIdx.x / kWarp; r < count; r += kThreads / kWarp) {
    auto sums = Part::identity();
    for (int p = lane; p < parts; p += kWarp) sums.merge(static_cast<const Part*>(of_parts)[r * parts + p]);
    sums = reduce_lanes(sums, kWarp);
    if (lane == 0) finish_row<T, Target, A>(call, r, sums, total);
  }
  total = reduce_block<kThreads>(total);
  finish_launch<Target, A, kThreads>(call, total);
}

// Packs of V rows that are adjacent in memory: `columns` packs a block, a power of two, and kThreads / columns threads
// a pack, which share its classes.
template <class T, class Target, int V>
__global__ __launch_bounds__(kThreads, kBlocksToFit) void forward_across(const Forward call, const int columns,
                                                                         const GridScratch scratch) {
  using A = Accumulate<T>;
  using P = typename ProbabilityType<Target, T>::type;
  using Share = RowSums<A, Target::kSpread>;
  __shared__ Share of_threads[kThreads * V];  // [class shares, columns, V]
  const Rows& rows = call.rows;
  const int64_t count = rows.outer * rows.inner, packs = count / V;
  const int column = threadIdx.x % columns, share = threadIdx.x / columns, shares = kThreads / columns;
  const Coefficients<Target, A> coefficients(rows);
  Sums total = Sums::identity();

  for (int64_t first = int64_t(blockIdx.x) * columns; first < packs; first += int64_t(gridDim.x) * columns) {
    Share sums[V];
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] = Share::identity();
    if (first + column < packs) {
      const RowPosition at(rows, (first + column) * V);
      const T* x = at_row<T>(rows.logits, rows.logits_strides, at);
      const P* t = at_row<P>(rows.target, rows.target_strides, at);
      const auto add_classes = [&](auto number, int64_t k) {
        constexpr int n = decltype(number)::value;
        Pack<T, V> logits[n];
        Pack<P, V> target[n];
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const int64_t class_i = k + int64_t(i) * shares;
          logits[i] = load_pack<V>(x + class_i * rows.logits_strides.classes, true);
          if constexpr (Target::kProbabilities) {
            target[i] = load_pack<V>(t + class_i * rows.target_strides.classes, true);
          }
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
          sums[v].template add<n>([&](int i) { return get<A>(logits[i], v); },
                                  [&](int i) {
                                    return coefficients.at(k + int64_t(i) * shares,
                                                           Target::kProbabilities ? get<A>(target[i], v) : A(0));
                                  });
        }
      };
      int64_t k = share;
      for (; k + int64_t(kUnroll<Target, A> - 1) * shares < rows.classes; k += int64_t(kUnroll<Target, A>) * shares) {
        add_classes(std::integral_constant<int, kUnroll<Target, A>>{}, k);
      }
      for (; k < rows.classes; k += shares) add_classes(std::integral_constant<int, 1>{}, k);
    }
    __syncthreads();  // the rows before may still be read
#pragma unroll
    for (int v = 0; v < V; ++v) of_threads[threadIdx.x * V + v] = sums[v];
    __syncthreads();
    for (int row = threadIdx.x; row < columns * V; row += kThreads) {
      const int64_t r = first * V + row;
      if (r >= count) break;
      Share whole = of_threads[row];
      for (int s = 1; s < shares; ++s) whole.merge(of_threads[s * columns * V + row]);
      finish_row<T, Target, A>(call, r, whole, total);
    }
  }
  if (reduce_grid<kThreads>(total, scratch)) finish_launch<Target, A, kThreads>(call, total);
}

}  // namespace torchce::cuda::softmax_ce
