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

// Minus infinity as it lies in memory: a class that is not there.
template <class T>
__device__ __forceinline__ T no_logit() {
  T x;
  store_one(&x, -math::kInfinity<Accumulate<T>>);
  return x;
}

// Sums over classes [begin, end) of one row, those of thread `thread` out of `threads` that share them. `keep` is given
// every pack of the thread, and its number among them.
//
// Bulk and remainder: for C = 32000 bfloat16 and 256 threads, 3 batches of 4 packs for every thread and one that has
// 3 packs for some threads and 4 for the others, in which a class that is not there counts as minus infinity.
template <class T, class Target, class Keep>
__device__ __forceinline__ RowSums<Accumulate<T>, Target::kSpread> sum_classes(const Rows& rows, RowPosition at,
                                                                               int64_t begin, int64_t end, int thread,
                                                                               int threads, Keep keep) {
  using A = Accumulate<T>;
  using P = typename ProbabilityType<Target, T>::type;
  constexpr int V = kPack<T>, kBatch = kUnroll<Target, A>;
  const T* x = at_row<T>(rows.logits, rows.logits_strides, at);
  const P* t = at_row<P>(rows.target, rows.target_strides, at);
  const Coefficients<Target, A> coefficients(rows);
  const PackedClasses<V> classes(x, begin, end);
  const bool target_aligned = Target::kProbabilities && is_aligned<V>(t + classes.body);

  RunningSums<A, Target::kSpread> of_row;
  const auto add_one = [&](int64_t k) {
    of_row.template add<1>([&](int) { return load_one<A>(x + k); },
                           [&](int) { return coefficients.at(k, Target::kProbabilities ? load_one<A>(t + k) : A(0)); });
  };
  const auto add_batch = [&](auto whole, int64_t first, int number) {
    const auto is_there = [&](int i) { return decltype(whole)::value || first + int64_t(i) * threads < classes.packs; };
    const auto class_of = [&](int i) { return classes.body + (first + int64_t(i) * threads) * V; };
    Pack<T, V> logits[kBatch];
    Pack<P, V> target[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (is_there(i)) {
        logits[i] = load_pack<V>(x + class_of(i), true);
        if constexpr (Target::kProbabilities) target[i] = load_pack<V>(t + class_of(i), target_aligned);
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) logits[i].elements[v] = no_logit<T>();
      }
    }
    of_row.template add<kBatch * V>(
        [&](int i) { return get<A>(logits[i / V], i % V); },
        [&](int i) {
          if (!is_there(i / V)) return A(0);
          return coefficients.at(class_of(i / V) + i % V, Target::kProbabilities ? get<A>(target[i / V], i % V) : A(0));
        });
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (is_there(i)) keep(logits[i], number + i);
    }
  };

  classes.for_each_before(thread, threads, add_one);
  int64_t first = 0;
  int number = 0;
  for (; first + int64_t(kBatch) * threads <= classes.packs; first += int64_t(kBatch) * threads, number += kBatch) {
    add_batch(std::true_type{}, first + thread, number);
  }
  if (first + thread < classes.packs) add_batch(std::false_type{}, first + thread, number);
  classes.for_each_after(thread, threads, add_one);
  return of_row.rebased();
}

template <class T, class Target>
__device__ __forceinline__ RowSums<Accumulate<T>, Target::kSpread> sum_classes(const Rows& rows, RowPosition at,
                                                                               int64_t begin, int64_t end, int thread,
                                                                               int threads) {
  return sum_classes<T, Target>(rows, at, begin, end, thread, threads, [](const Pack<T, kPack<T>>&, int) {});
}

// `lanes` neighbouring threads a row, a power of two up to a warp.
template <class T, class Target>
__global__ __launch_bounds__(kThreads, kBlocks<Target, T>) void forward_by_lanes(const Forward call, const int lanes,
                                                                                 const GridScratch scratch) {
  using A = Accumulate<T>;
  const Rows& rows = call.rows;
  const int64_t count = rows.outer * rows.inner, rows_of_block = kThreads / lanes, step = gridDim.x * rows_of_block;
  const int lane = threadIdx.x % lanes;
  int64_t r = blockIdx.x * rows_of_block + threadIdx.x / lanes;
  TargetAhead<Target> ahead(rows, r);
  Sums total = Sums::identity();
  for (int64_t first = blockIdx.x * rows_of_block; first < count; first += step, r += step) {
    const int64_t target = ahead.get();
    ahead.ask_for(r + step);
    auto sums = RowSums<A, Target::kSpread>::identity();
    T hot_logit{};
    if (r < count && !is_ignored<Target>(rows, target)) {
      const RowPosition at(rows, r);
      if (lane == 0) hot_logit = load_hot_logit<T, Target>(rows, at, target);
      sums = sum_classes<T, Target>(rows, at, 0, rows.classes, lane, lanes);
    }
    sums = sums.of_lanes(lanes);
    if (r < count && lane == 0) finish_row<T, Target>(call, r, sums, target, hot_logit, total);
  }
  if (reduce_grid<kThreads>(total, scratch)) finish_launch<Target, A, kThreads>(call, total);
}

// A block a row.
template <class T, class Target>
__global__ __launch_bounds__(kThreads, kBlocks<Target, T>) void forward_by_block(const Forward call,
                                                                                 const GridScratch scratch) {
  using A = Accumulate<T>;
  const Rows& rows = call.rows;
  const int64_t count = rows.outer * rows.inner;
  TargetAhead<Target> ahead(rows, blockIdx.x);
  Sums total = Sums::identity();
  for (int64_t r = blockIdx.x; r < count; r += gridDim.x) {
    const int64_t target = ahead.get();
    ahead.ask_for(r + gridDim.x);
    auto sums = RowSums<A, Target::kSpread>::identity();
    T hot_logit{};
    if (!is_ignored<Target>(rows, target)) {
      const RowPosition at(rows, r);
      if (threadIdx.x == 0) hot_logit = load_hot_logit<T, Target>(rows, at, target);
      sums = sum_classes<T, Target>(rows, at, 0, rows.classes, threadIdx.x, kThreads);
    }
    sums = reduce_block<kThreads>(sums);
    if (threadIdx.x == 0) finish_row<T, Target>(call, r, sums, target, hot_logit, total);
  }
  if (reduce_grid<kThreads>(total, scratch)) finish_launch<Target, A, kThreads>(call, total);
}

// What the blocks of forward_by_parts share.
struct PartScratch {
  void* of_parts;              // [rows, parts], the parts' RowSums
  Sums* of_rows;               // [rows]
  unsigned* counters_of_rows;  // [rows], each zero before the launch, and again after it
  unsigned* counter;           // the same, of all rows
};

// `parts` blocks a row, each `part` classes. The last block of a row to come there finishes the row, and the last one
// of those the launch.
template <class T, class Target>
__global__ __launch_bounds__(kThreads, kBlocks<Target, T>) void forward_by_parts(const Forward call, const int parts,
                                                                                 const int64_t part,
                                                                                 const PartScratch scratch) {
  using A = Accumulate<T>;
  using Part = RowSums<A, Target::kSpread>;
  const Rows& rows = call.rows;
  const int64_t count = rows.outer * rows.inner, r = blockIdx.x / unsigned(parts);
  const int64_t begin = blockIdx.x % unsigned(parts) * part;
  const int64_t end = begin + part < rows.classes ? begin + part : rows.classes;
  const RowPosition at(rows, r);
  const uint64_t target_bits = load_target_bits<Target>(rows, at);
  auto sums = sum_classes<T, Target>(rows, at, begin, end, threadIdx.x, kThreads);
  sums = reduce_block<kThreads>(sums);
  const int64_t target = target_of(rows, target_bits);
  T hot_logit{};
  if (threadIdx.x == 0) {
    static_cast<Part*>(scratch.of_parts)[blockIdx.x] = sums;
    hot_logit = load_hot_logit<T, Target>(rows, at, target);
  }
  if (!is_last_block(scratch.counters_of_rows + r, unsigned(parts))) return;
  if (threadIdx.x < kWarp) {
    Sums total = Sums::identity();
    const Part* of_lane = static_cast<const Part*>(scratch.of_parts) + r * parts + threadIdx.x;
    const int of_this_lane = (parts - int(threadIdx.x) + kWarp - 1) / kWarp;
    sums = Part::of_each(of_this_lane, [&](int i) { return of_lane[i * kWarp]; }).of_lanes(kWarp);
    if (threadIdx.x == 0) {
      finish_row<T, Target>(call, r, sums, target, hot_logit, total);
      scratch.of_rows[r] = total;
    }
  }
  if (!is_last_block(scratch.counter, unsigned(count))) return;
  finish_launch<Target, A, kThreads>(call, sum_of<kThreads>(scratch.of_rows, count));
}

// Sums over classes share, share + shares, ... of V rows that are adjacent in memory, from row r on.
//
// Bulk and remainder: for 19 classes and one thread, 4 batches of 4 classes and one of 3, in which the fourth counts as
// minus infinity.
template <int V, class T, class Target, class A>
__device__ __forceinline__ void sum_across(const Rows& rows, int64_t r, int share, int shares,
                                           RowSums<A, Target::kSpread> (&sums)[V]) {
  using P = typename ProbabilityType<Target, T>::type;
  constexpr int kBatch = kUnroll<Target, A>;
  const RowPosition at(rows, r);
  const T* x = at_row<T>(rows.logits, rows.logits_strides, at);
  const P* t = at_row<P>(rows.target, rows.target_strides, at);
  const Coefficients<Target, A> coefficients(rows);
  RunningSums<A, Target::kSpread> of_rows[V];

  const auto add_batch = [&](auto whole, int64_t k) {
    const auto class_of = [&](int i) { return k + int64_t(i) * shares; };
    const auto is_there = [&](int i) { return decltype(whole)::value || class_of(i) < rows.classes; };
    Pack<T, V> logits[kBatch];
    Pack<P, V> target[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (is_there(i)) {
        logits[i] = load_pack<V>(x + class_of(i) * rows.logits_strides.classes, true);
        if constexpr (Target::kProbabilities) {
          target[i] = load_pack<V>(t + class_of(i) * rows.target_strides.classes, true);
        }
      } else {
#pragma unroll
        for (int v = 0; v < V; ++v) logits[i].elements[v] = no_logit<T>();
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      of_rows[v].template add<kBatch>([&](int i) { return get<A>(logits[i], v); },
                                      [&](int i) {
                                        if (!is_there(i)) return A(0);
                                        return coefficients.at(class_of(i),
                                                               Target::kProbabilities ? get<A>(target[i], v) : A(0));
                                      });
    }
  };
  int64_t k = share;
  for (; k + int64_t(kBatch - 1) * shares < rows.classes; k += int64_t(kBatch) * shares) add_batch(std::true_type{}, k);
  if (k < rows.classes) add_batch(std::false_type{}, k);
#pragma unroll
  for (int v = 0; v < V; ++v) sums[v] = of_rows[v].rebased();
}

// The ends of n adjacent rows of one image, from row r on: what they wait for is asked for at once.
template <int n, class T, class Target, class A>
__device__ __forceinline__ void finish_rows(const Forward& call, int64_t r,
                                            const RowSums<A, Target::kSpread> (&sums)[n], Sums& total) {
  const Rows& rows = call.rows;
  const RowPosition at(rows, r);
  uint64_t target_bits[n];
  load_target_bits<Target>(rows, at, target_bits);
  T hot_logits[n];
#pragma unroll
  for (int v = 0; v < n; ++v) {
    hot_logits[v] = load_hot_logit<T, Target>(rows, at.plus(v), target_of(rows, target_bits[v]));
  }
#pragma unroll
  for (int v = 0; v < n; ++v) {
    finish_row<T, Target>(call, r + v, sums[v], target_of(rows, target_bits[v]), hot_logits[v], total);
  }
}

// Packs of V rows that are adjacent in memory: `columns` packs a block, a power of two, and kThreads / columns threads
// a pack, which share its classes. A thread that has a pack to itself finishes its rows from registers.
template <class T, class Target, int V>
__global__ __launch_bounds__(kThreads, kBlocksToFit) void forward_across(const Forward call, const int columns,
                                                                         const GridScratch scratch) {
  using A = Accumulate<T>;
  using Share = RowSums<A, Target::kSpread>;
  __shared__ Share of_threads[kThreads * V];  // [class shares, columns, V]
  const Rows& rows = call.rows;
  const int64_t count = rows.outer * rows.inner, packs = count / V;
  const int column = threadIdx.x % columns, share = threadIdx.x / columns, shares = kThreads / columns;
  Sums total = Sums::identity();

  for (int64_t first = int64_t(blockIdx.x) * columns; first < packs; first += int64_t(gridDim.x) * columns) {
    const bool has_pack = first + column < packs;
    Share sums[V];
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] = Share::identity();
    if (has_pack) sum_across<V, T, Target>(rows, (first + column) * V, share, shares, sums);
    if (shares == 1) {
      if (has_pack) finish_rows<V, T, Target>(call, (first + column) * V, sums, total);
      continue;
    }
    __syncthreads();  // the rows before may still be read
#pragma unroll
    for (int v = 0; v < V; ++v) of_threads[threadIdx.x * V + v] = sums[v];
    __syncthreads();
    for (int row = threadIdx.x; row < columns * V; row += kThreads) {
      const int64_t r = first * V + row;
      if (r >= count) break;
      const Share whole[1] = {Share::of_each(shares, [&](int s) { return of_threads[s * columns * V + row]; })};
      finish_rows<1, T, Target>(call, r, whole, total);
    }
  }
  if (reduce_grid<kThreads>(total, scratch)) finish_launch<Target, A, kThreads>(call, total);
}

}  // namespace torchce::cuda::softmax_ce
