// Softmax cross entropy, backward: one read of the logits and one write of the gradient, which may be the same memory.
// Given the row statistics every element stands alone, so threads share nothing and wait for nobody.
#pragma once

#include "softmax_ce_row.cuh"

namespace torchce::cuda::softmax_ce {

constexpr int kBackwardThreads = 256;

// Teams of `team` threads, a power of two, each take classes [i * part, (i + 1) * part) of one row after another;
// classes are adjacent in memory. Bulk and remainder as in the forward: packs start where the logits are aligned.
template <class T, class Target, Of of>
__global__ __launch_bounds__(kBackwardThreads, kBlocksToFit) void backward_along(const Backward call, const int team,
                                                                                 const int64_t parts,
                                                                                 const int64_t part) {
  using A = Accumulate<T>;
  using P = typename ProbabilityType<Target, T>::type;
  using G = typename GradientType<Target, T, of>::type;
  constexpr int V = kPack<T>, kInFlight = kUnroll<Target, A>;
  const Rows& rows = call.rows;
  const int64_t count = rows.outer * rows.inner;
  const Coefficients<Target, A> coefficients(rows);
  const int thread = threadIdx.x % team, teams = kBackwardThreads / team;

  for (int64_t task = int64_t(blockIdx.x) * teams + threadIdx.x / team; task < count * parts;
       task += int64_t(gridDim.x) * teams) {
    const int64_t r = task / parts, begin = task % parts * part;
    const int64_t end = begin + part < rows.classes ? begin + part : rows.classes;
    const RowPosition at(rows, r);
    const T* x = at_row<T>(rows.logits, rows.logits_strides, at);
    const P* t = at_row<P>(rows.target, rows.target_strides, at);
    G* grad = static_cast<G*>(call.grad) + at.offset(call.grad_strides);
    const RowGradient<Target, A, of> row(call, r);

    const auto write_one = [&](int64_t k) {
      const A probability = Target::kProbabilities ? load_one<A>(t + k) : A(0);
      store_one(grad + k, row.at(k, load_one<A>(x + k), probability, coefficients));
    };
    const int64_t misaligned = int64_t(reinterpret_cast<uintptr_t>(x + begin) % 16 / sizeof(T));
    int64_t body = begin + (misaligned == 0 ? 0 : V - misaligned);
    if (body > end) body = end;
    const int64_t packs = (end - body) / V;
    const bool target_aligned = Target::kProbabilities && is_aligned<V>(t + body);
    const bool grad_aligned = is_aligned<V>(grad + body);
    for (int64_t k = begin + thread; k < body; k += team) write_one(k);
    for (int64_t first = thread; first < packs; first += int64_t(kInFlight) * team) {
      Pack<T, V> logits[kInFlight];
      Pack<P, V> target[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t p = first + int64_t(i) * team;
        if (p < packs) {
          logits[i] = load_pack<V, Cache::stream>(x + body + p * V, true);
          if constexpr (Target::kProbabilities) target[i] = load_pack<V>(t + body + p * V, target_aligned);
        }
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int64_t p = first + int64_t(i) * team;
        if (p < packs) {
          Pack<G, V> gradient;
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A probability = Target::kProbabilities ? get<A>(target[i], v) : A(0);
            set(gradient, v, row.at(body + p * V + v, get<A>(logits[i], v), probability, coefficients));
          }
          store_pack(grad + body + p * V, gradient, grad_aligned);
        }
      }
    }
    for (int64_t k = body + packs * V + thread; k < end; k += team) write_one(k);
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
    for (int v = 0; v < V; ++v) row[v] = RowGradient<Target, A, of>(call, r + v);

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
