// Softmax cross entropy, backward: one read of the logits and one write of the gradient, which may be the same memory.
// Given the row statistics every element stands alone, so threads share nothing and wait for nobody.
#pragma once

#include "softmax_ce_row.cuh"

namespace torchce::cuda::softmax_ce {

constexpr int kBackwardThreads = 256;

// Writes the gradient of classes [begin, end) of one row, those of thread `thread` out of `threads` that share them;
// classes are adjacent in memory. `load(p, number)` is the thread's pack of that number, which lies at p.
template <class T, class Target, Of of, class A, class Load>
__device__ __forceinline__ void write_gradient(const Backward& call, int64_t r, int64_t begin, int64_t end, int thread,
                                               int threads, const RowGradient<Target, A, of>& row, Load load) {
  using P = typename ProbabilityType<Target, T>::type;
  using G = typename GradientType<Target, T, of>::type;
  constexpr int V = kPack<T>, kBatch = kUnroll<Target, A>;
  const Rows& rows = call.rows;
  const RowPosition at(rows, r);
  const T* x = at_row<T>(rows.logits, rows.logits_strides, at);
  const P* t = at_row<P>(rows.target, rows.target_strides, at);
  G* grad = static_cast<G*>(call.grad) + at.offset(call.grad_strides);
  const Coefficients<Target, A> coefficients(rows);
  const PackedClasses<V> classes(x, begin, end);
  const bool target_aligned = Target::kProbabilities && is_aligned<V>(t + classes.body);
  const bool grad_aligned = is_aligned<V>(grad + classes.body);

  const auto write_one = [&](int64_t k) {
    const A probability = Target::kProbabilities ? load_one<A>(t + k) : A(0);
    store_one(grad + k, row.at(k, load_one<A>(x + k), probability, coefficients));
  };
  classes.for_each_before(thread, threads, write_one);
  int64_t number = 0;
  for (int64_t first = thread; first < classes.packs; first += int64_t(kBatch) * threads, number += kBatch) {
    Pack<T, V> logits[kBatch];
    Pack<P, V> target[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t p = first + int64_t(i) * threads;
      if (p < classes.packs) {
        logits[i] = load(x + classes.body + p * V, number + i);
        if constexpr (Target::kProbabilities) target[i] = load_pack<V>(t + classes.body + p * V, target_aligned);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t p = first + int64_t(i) * threads;
      if (p < classes.packs) {
        Pack<G, V> gradient;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A probability = Target::kProbabilities ? get<A>(target[i], v) : A(0);
          set(gradient, v, row.at(classes.body + p * V + v, get<A>(logits[i], v), probability, coefficients));
        }
        store_pack(grad + classes.body + p * V, gradient, grad_aligned);
      }
    }
  }
  classes.for_each_after(thread, threads, write_one);
}

// Teams of `team` threads, a power of two, each take classes [i * part, (i + 1) * part) of one row after another.
template <class T, class Target, Of of>
__global__ __launch_bounds__(kBackwardThreads, kBlocksToFit) void backward_along(const Backward call, const int team,
                                                                                 const int64_t parts,
                                                                                 const int64_t part) {
  using A = Accumulate<T>;
  const Rows& rows = call.rows;
  const int64_t count = rows.outer * rows.inner;
  const int thread = threadIdx.x % team, teams = kBackwardThreads / team;
  for (int64_t task = int64_t(blockIdx.x) * teams + threadIdx.x / team; task < count * parts;
       task += int64_t(gridDim.x) * teams) {
    const int64_t r = task / parts, begin = task % parts * part;
    const int64_t end = begin + part < rows.classes ? begin + part : rows.classes;
    write_gradient<T>(call, r, begin, end, thread, team, RowGradient<Target, A, of>::of_row(call, r),
                      [](const T* p, int64_t) { return load_pack<kPack<T>, Cache::stream>(p, true); });
  }
}

// A thread a pack of V rows that are adjacent in memory, for classes [i * part, (i + 1) * part).
template <class T, class Target, Of of, int V>
__global__ __launch_bounds__(kBackwardThreads, kBlocksToFit) void backward_across(const Backward call,
                                                                                  const int64_t parts,
                                                                                  const int64_t part) {
  using A = Accumulate<T>;
  using P = typename ProbabilityType<Target, T>::type;
  using G = typename GradientType<Target, T, of>::type;
  constexpr int kClasses = V > 4 ? 2 : kUnroll<Target, A>;  // in flight
  const Rows& rows = call.rows;
  const int64_t packs = rows.outer * rows.inner / V;
  const Coefficients<Target, A> coefficients(rows);

  for (int64_t task = int64_t(blockIdx.x) * kBackwardThreads + threadIdx.x; task < packs * parts;
       task += int64_t(gridDim.x) * kBackwardThreads) {
    const int64_t r = task % packs * V, begin = task / packs * part;
    const int64_t end = begin + part < rows.classes ? begin + part : rows.classes;
    const RowPosition at(rows, r);
    const T* x = at_row<T>(rows.logits, rows.logits_strides, at);
    const P* t = at_row<P>(rows.target, rows.target_strides, at);
    G* grad = static_cast<G*>(call.grad) + at.offset(call.grad_strides);
    RowGradient<Target, A, of> row[V];
#pragma unroll
    for (int v = 0; v < V; ++v) row[v] = RowGradient<Target, A, of>::of_row(call, r + v);

    for (int64_t first = begin; first < end; first += kClasses) {
      Pack<T, V> logits[kClasses];
      Pack<P, V> target[kClasses];
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        if (first + i < end) {
          logits[i] = load_pack<V, Cache::stream>(x + (first + i) * rows.logits_strides.classes, true);
          if constexpr (Target::kProbabilities) {
            target[i] = load_pack<V>(t + (first + i) * rows.target_strides.classes, true);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        if (first + i < end) {
          Pack<G, V> gradient;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A probability = Target::kProbabilities ? get<A>(target[i], v) : A(0);
            set(gradient, v, row[v].at(first + i, get<A>(logits[i], v), probability, coefficients));
          }
          store_pack(grad + (first + i) * call.grad_strides.classes, gradient, true);
        }
      }
    }
  }
}

}  // namespace torchce::cuda::softmax_ce
