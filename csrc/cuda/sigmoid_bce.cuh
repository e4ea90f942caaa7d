// Sigmoid binary cross entropy: one read of every operand, one write of what is asked for, one launch.
//
// Threads take packs of V elements that are neighbours in the innermost dimension. V is 1 where a stride or an address
// forbids words.
#pragma once

#include <algorithm>
#include <type_traits>

#include "exp.cuh"
#include "reduce.cuh"
#include "sigmoid_bce_operands.cuh"

namespace torchce::cuda::sigmoid_bce {

// A thread asks for so many packs of logits and targets at once: up to four in 128 bytes, up to two in 64 where
// offsets and weights take registers. Twice as many would cost a multiprocessor one of its three blocks.
template <Layout layout, class T, class U, int V>
struct InFlight {
  static constexpr int kMost = layout == Layout::dense && sizeof(T) <= sizeof(float) ? 4 : 2;
  static constexpr int kPacks = std::clamp(kMost * 32 / int(V * (sizeof(T) + sizeof(U))), 1, kMost);
};

// Blocks that must fit on a multiprocessor at once: only two where conversions of integers or double formulas take
// more registers.
template <class T, class U>
constexpr int kBlocks = std::is_same_v<T, U> && sizeof(T) <= sizeof(float) ? kBlocksOfPlain : kBlocksToFit;

// Writes a pack whose dtype is known only at run time.
template <class A, int V>
__device__ __forceinline__ void store_output(const Elements& problem, int64_t offset, const Pack<A, V>& values) {
  with_float_type(problem.dtypes[kOutput], [&](auto storage) {
    using S = decltype(storage);
    store_pack(static_cast<S*>(problem.output) + offset, rounded<S>(values.elements), true);
  });
}

// Adds up what every block has, and writes the one loss of all elements, if there is one.
__device__ __forceinline__ void store_total(const Elements& problem, LossSums& total, const GridScratch& scratch) {
  if (problem.options.reduction == Reduction::none || !reduce_grid(total, scratch) || threadIdx.x != 0) return;
  const double divisor = problem.options.reduction == Reduction::mean ? double(problem.numel) : 1;
  store_as(problem.dtypes[kOutput], problem.output, 0, total.loss / divisor);
}

// Adds up the losses, or writes each.
template <class A>
struct Losses {
  const Elements& problem;
  LossSums total = LossSums::identity();

  template <class T, class U, Layout layout, int V, int kPacks>
  __device__ __forceinline__ void operator()(const Batch<T, U, layout, V, kPacks>& batch) {
    const bool reduced = problem.options.reduction != Reduction::none;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (!batch.is_there[i]) continue;
      if (layout == Layout::dense && reduced) {
        UnweightedSum<A> sum;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A x = get<A>(batch.logits[i], v);
          sum.add(linear_part(x, get<A>(batch.target[i], v), One{}), smaller_odds(x));
        }
        total.loss += sum.value();
      } else {
        const Weights<layout, A, V> weights(problem, batch.places[i]);
        Pack<A, V> losses;
        A sum = 0;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          losses.elements[v] =
              loss(get<A>(batch.logits[i], v), get<A>(batch.target[i], v), weights.weight(v), weights.pos_weight(v));
          sum += losses.elements[v];
        }
        if (reduced) {
          total.loss += sum;
        } else {
          store_output(problem, batch.places[i].offset(kOutput), losses);
        }
      }
    }
  }
};

template <class T, class U, Layout layout, int V>
__global__ __launch_bounds__(kThreads, kBlocks<T, U>) void forward(const Elements problem, const GridScratch scratch) {
  Losses<Accumulate<T>> losses{problem};
  for_each_batch<T, U, layout, V, InFlight<layout, T, U, V>::kPacks>(problem, losses);
  store_total(problem, losses.total, scratch);
}

// exp(-|x|) for a gradient of type G. The special function unit is exact enough for 16 bits, but flushes subnormal
// results, which bfloat16 has; so it is asked for 2^64 times as much.
// Valid: every x.
// Error: relative |x| 2^-24 + 2^-19 for 16 bits, else that of smaller_odds.
template <class G, class A>
__device__ __forceinline__ A odds_of_gradient(A x) {
  if constexpr (kSixteenBits<G>) {
    return exp2_approx(-math::abs(x) * kLog2EOfFloat + 64.0f) * 0x1p-64f;
  } else {
    return smaller_odds(x);
  }
}

// The upstream gradients of a thread's packs.
template <class A>
struct GradOutputs {
  const Elements& problem;
  bool one_for_all;
  GradOutputOfAll<A> of_all;

  // Multiplies by upstream gradients and weights, where there are any.
  template <Layout layout, int V>
  __device__ __forceinline__ void scale(A (&grad)[V], const Pack<A, V>& grad_output,
                                        const Weights<layout, A, V>& weights) const {
    if (layout == Layout::dense || problem.data[kWeight] == nullptr) {
#pragma unroll
      for (int v = 0; v < V; ++v) grad[v] = math::product_in_range(grad[v], grad_output.elements[v], One{});
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) grad[v] = math::product_in_range(grad[v], grad_output.elements[v], weights.weight(v));
    }
    if (of_all.rest != A(1)) {
#pragma unroll
      for (int v = 0; v < V; ++v) grad[v] *= of_all.rest;
    }
  }

  template <Layout layout, int V>
  __device__ __forceinline__ Pack<A, V> load(int64_t offset) const {
    Pack<A, V> grad_output = repeat<V>(of_all.value);
    if (!one_for_all) {
      with_float_type(problem.dtypes[kGradOutput], [&](auto storage) {
        const auto pack = load_operand<layout, V, decltype(storage)>(problem, kGradOutput, offset);
#pragma unroll
        for (int v = 0; v < V; ++v) grad_output.elements[v] = get<A>(pack, v);
      });
    }
    return grad_output;
  }
};

template <class A, Layout layout>
__device__ __forceinline__ GradOutputs<A> grad_outputs(const Elements& problem) {
  const bool one_for_all = problem.options.reduction != Reduction::none ||
                           (layout != Layout::strided && problem.strides[kGradOutput][problem.dims - 1] == 0);
  return {problem, one_for_all, one_for_all ? grad_output_of_all<A>(problem) : GradOutputOfAll<A>{A(0), A(1)}};
}

// Writes the gradients.
template <class A, GradientOf of>
struct Gradients {
  const Elements& problem;
  GradOutputs<A> grad_outputs;

  template <class T, class U, Layout layout, int V, int kPacks>
  __device__ __forceinline__ void operator()(const Batch<T, U, layout, V, kPacks>& batch) {
    using G = decltype(pick<of == GradientOf::target>(U{}, T{}));
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (batch.is_there[i]) {
        const Weights<layout, A, V> weights(problem, batch.places[i]);
        const auto grad_output = grad_outputs.template load<layout, V>(batch.places[i].offset(kGradOutput));
        A grad[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A x = get<A>(batch.logits[i], v);
          const auto c = weights.pos_weight(v);
          grad[v] = of == GradientOf::target ? target_gradient(x, c)
                                             : gradient(x, get<A>(batch.target[i], v), c, odds_of_gradient<G>(x));
        }
        grad_outputs.scale(grad, grad_output, weights);
        store_pack(static_cast<G*>(problem.output) + batch.places[i].offset(kOutput), rounded<G>(grad), true);
      }
    }
  }
};

template <class T, class U, GradientOf of, Layout layout, int V>
__global__ __launch_bounds__(kThreads, kBlocks<T, U>) void backward(const Elements problem) {
  using A = Accumulate<T>;
  Gradients<A, of> gradients{problem, grad_outputs<A, layout>(problem)};
  for_each_batch<T, U, layout, V, InFlight<layout, T, U, V>::kPacks>(problem, gradients);
}

}  // namespace torchce::cuda::sigmoid_bce
