// Sigmoid binary cross entropy: one read of every operand, one write of what is asked for, one launch.
//
// Threads take packs of V elements that are neighbours in the innermost dimension. Where an operand repeats along it
// (a weight of [C, 1, 1]) its one element serves the whole pack. V is 1 where a stride or an address forbids words.
#pragma once

#include "../sigmoid_bce_element.h"
#include "pack.cuh"
#include "reduce.cuh"

namespace torchce::cuda::sigmoid_bce {

using namespace torchce::sigmoid_bce;

constexpr int kThreads = 256;
constexpr int kInFlight = 2;  // packs of a thread

// Where the operands of one pack start.
struct Offsets {
  int64_t of[kOperands];

  // Of element `index`, in the order of the merged dimensions. 32-bit divisions, where they do, take a third of the
  // time.
  __device__ __forceinline__ Offsets(const Elements& problem, int64_t index) : of{} {
    if (problem.numel < (int64_t(1) << 31)) {
      add<uint32_t>(problem, uint32_t(index));
    } else {
      add<int64_t>(problem, index);
    }
  }

  template <class Index>
  __device__ __forceinline__ void add(const Elements& problem, Index index) {
    for (int d = problem.dims - 1; d >= 0; --d) {
      const Index size = Index(problem.sizes[d]), i = d == 0 ? index : index % size;
      index /= size;
#pragma unroll
      for (int operand = 0; operand < kOperands; ++operand) of[operand] += int64_t(i) * problem.strides[operand][d];
    }
  }
};

// One operand of a pack.
template <int V, class T>
__device__ __forceinline__ Pack<T, V> load_operand(const Elements& problem, Operand operand, const Offsets& offsets,
                                                   int64_t inner_stride) {
  const T* p = static_cast<const T*>(problem.data[operand]) + offsets.of[operand];
  if constexpr (V > 1) {
    if (inner_stride == 0) {
      Pack<T, V> pack;
#pragma unroll
      for (int v = 0; v < V; ++v) pack.elements[v] = *p;
      return pack;
    }
  }
  return load_pack<V>(p, true);
}

// What the formulas need of a pack: the accumulated values of logits, target and weights.
template <class T, class U, int V>
struct Inputs {
  using A = Accumulate<T>;
  Pack<T, V> logits;
  Pack<U, V> target;
  Pack<A, V> weight, pos_weight;

  __device__ __forceinline__ Inputs() {}
  __device__ __forceinline__ Inputs(const Elements& problem, const Offsets& offsets) {
    const auto inner_stride = [&](Operand operand) { return problem.strides[operand][problem.dims - 1]; };
    logits = load_operand<V, T>(problem, kLogits, offsets, inner_stride(kLogits));
    target = load_operand<V, U>(problem, kTarget, offsets, inner_stride(kTarget));
    weight = load_weight(problem, kWeight, offsets, inner_stride(kWeight));
    pos_weight = load_weight(problem, kPosWeight, offsets, inner_stride(kPosWeight));
  }

  __device__ __forceinline__ static Pack<A, V> load_weight(const Elements& problem, Operand operand,
                                                           const Offsets& offsets, int64_t inner_stride) {
    if (problem.data[operand] != nullptr) return load_operand<V, A>(problem, operand, offsets, inner_stride);
    Pack<A, V> ones;
#pragma unroll
    for (int v = 0; v < V; ++v) ones.elements[v] = 1;
    return ones;
  }
};

// Writes a pack whose dtype is known only at run time.
template <class A, int V>
__device__ __forceinline__ void store_output(const Elements& problem, int64_t offset, const Pack<A, V>& values) {
  with_float_type(problem.dtypes[kOutput], [&](auto storage) {
    using S = decltype(storage);
    store_pack(static_cast<S*>(problem.output) + offset, rounded<S>(values.elements), true);
  });
}

template <class T, class U, int V>
__global__ __launch_bounds__(kThreads, kBlocksToFit) void forward(const Elements problem, const GridScratch scratch) {
  using A = Accumulate<T>;
  const int64_t packs = problem.numel / V, threads = int64_t(gridDim.x) * kThreads;
  Sums total = Sums::identity();
  for (int64_t first = int64_t(blockIdx.x) * kThreads + threadIdx.x; first < packs; first += kInFlight * threads) {
    Inputs<T, U, V> inputs[kInFlight];
    int64_t output[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * threads < packs) {
        const Offsets offsets(problem, (first + i * threads) * V);
        inputs[i] = Inputs<T, U, V>(problem, offsets);
        output[i] = offsets.of[kOutput];
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (first + i * threads < packs) {
        Pack<A, V> losses;
        A sum = 0;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          losses.elements[v] = loss(get<A>(inputs[i].logits, v), get<A>(inputs[i].target, v),
                                    inputs[i].weight.elements[v], inputs[i].pos_weight.elements[v]);
          sum += losses.elements[v];
        }
        total.loss += sum;
        if (problem.reduction == Reduction::none) store_output(problem, output[i], losses);
      }
    }
  }
  if (problem.reduction == Reduction::none || !reduce_grid<kThreads>(total, scratch) || threadIdx.x != 0) return;
  const double divisor = problem.reduction == Reduction::mean ? double(problem.numel) : 1;
  store_as(problem.dtypes[kOutput], problem.output, 0, total.loss / divisor);
}

// Which gradient a backward computes.
enum class Of { logits, target };

template <class T, class U, Of of, int V>
__global__ __launch_bounds__(kThreads, kBlocksToFit) void backward(const Elements problem) {
  using A = Accumulate<T>;
  using G = decltype(pick<of == Of::target>(U{}, T{}));
  const int64_t packs = problem.numel / V, threads = int64_t(gridDim.x) * kThreads;
  const bool reduced = problem.reduction != Reduction::none;
  const A of_all = reduced ? grad_output_of_all<A>(problem) : A(0);
  for (int64_t p = int64_t(blockIdx.x) * kThreads + threadIdx.x; p < packs; p += threads) {
    const Offsets offsets(problem, p * V);
    const Inputs<T, U, V> inputs(problem, offsets);
    Pack<A, V> grad_output;
    if (reduced) {
#pragma unroll
      for (int v = 0; v < V; ++v) grad_output.elements[v] = of_all;
    } else {
      with_float_type(problem.dtypes[kGradOutput], [&](auto storage) {
        const auto pack = load_operand<V, decltype(storage)>(problem, kGradOutput, offsets,
                                                             problem.strides[kGradOutput][problem.dims - 1]);
#pragma unroll
        for (int v = 0; v < V; ++v) grad_output.elements[v] = get<A>(pack, v);
      });
    }
    A grad[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const A x = get<A>(inputs.logits, v), w = inputs.weight.elements[v] * grad_output.elements[v];
      const A c = inputs.pos_weight.elements[v];
      grad[v] = of == Of::target ? target_gradient(x, w, c) : gradient(x, get<A>(inputs.target, v), w, c);
    }
    store_pack(static_cast<G*>(problem.output) + offsets.of[kOutput], rounded<G>(grad), true);
  }
}

}  // namespace torchce::cuda::sigmoid_bce
