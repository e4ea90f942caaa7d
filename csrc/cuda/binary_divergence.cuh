// Binary divergences and entropies: elements are walked as those of sigmoid_bce without weights.
#pragma once

#include "../math/binary_divergence.h"
#include "sigmoid_bce.cuh"

namespace torchce::cuda::binary_divergence {

using namespace torchce::binary_divergence;
using namespace torchce::cuda::sigmoid_bce;

// Adds up the divergences, or writes each.
template <class Terms, class A>
struct Divergences {
  const Elements& problem;
  LossSums total = LossSums::identity();

  template <class T, Layout layout, int V, int kPacks>
  __device__ __forceinline__ void operator()(const Batch<T, T, layout, V, kPacks>& batch) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (!batch.is_there[i]) continue;
      Pack<A, V> values;
      A sum = 0;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        values.elements[v] = Terms::value(get<A>(batch.logits[i], v), get<A>(batch.target[i], v));
        sum += values.elements[v];
      }
      if (problem.options.reduction != Reduction::none) {
        total.loss += sum;
      } else {
        store_output(problem, batch.places[i].offset(kOutput), values);
      }
    }
  }
};

template <class Terms, class T, Layout layout, int V>
__global__ __launch_bounds__(kThreads, kBlocksToFit) void binary_forward(const Elements problem,
                                                                         const GridScratch scratch) {
  Divergences<Terms, Accumulate<T>> divergences{problem};
  for_each_batch<T, T, layout, V, InFlight<layout, T, T, V>::kPacks>(problem, divergences);
  store_total(problem, divergences.total, scratch);
}

// Writes the gradients.
template <class Terms, class A, GradientOf of>
struct DivergenceGradients {
  const Elements& problem;
  GradOutputs<A> grad_outputs;

  template <class T, Layout layout, int V, int kPacks>
  __device__ __forceinline__ void operator()(const Batch<T, T, layout, V, kPacks>& batch) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (!batch.is_there[i]) continue;
      const auto grad_output = grad_outputs.template load<layout, V>(batch.places[i].offset(kGradOutput));
      A grad[V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const A x = get<A>(batch.logits[i], v), t = get<A>(batch.target[i], v);
        if constexpr (of == GradientOf::target) {
          grad[v] = Terms::by_target(x, t);
        } else {
          grad[v] = Terms::by_logit(x, t);
        }
      }
      grad_outputs.scale(grad, grad_output, Weights<Layout::dense, A, V>(problem, {}));
      store_pack(static_cast<T*>(problem.output) + batch.places[i].offset(kOutput), rounded<T>(grad), true);
    }
  }
};

template <class Terms, class T, GradientOf of, Layout layout, int V>
__global__ __launch_bounds__(kThreads, kBlocksToFit) void binary_backward(const Elements problem) {
  using A = Accumulate<T>;
  DivergenceGradients<Terms, A, of> gradients{problem, grad_outputs<A, layout>(problem)};
  for_each_batch<T, T, layout, V, InFlight<layout, T, T, V>::kPacks>(problem, gradients);
}

}  // namespace torchce::cuda::binary_divergence
