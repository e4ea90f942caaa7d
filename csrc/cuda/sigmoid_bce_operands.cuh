// The operands of sigmoid binary cross entropy: where those of a pack lie, and how a thread goes from pack to pack.
#pragma once

#include "../sigmoid_bce_element.h"
#include "launch_shape.h"
#include "pack.cuh"
#include "sigmoid_bce_layout.h"

namespace torchce::cuda::sigmoid_bce {

using namespace torchce::sigmoid_bce;

// Where the operands of one pack start.
template <Layout layout>
struct Place {
  int64_t index;   // of the first element
  int64_t column;  // in its row; only of Layout::columns

  __device__ __forceinline__ int64_t offset(Operand) const { return index; }
};

template <>
struct Place<Layout::strided> {
  int64_t of[kOperands];

  __device__ __forceinline__ int64_t offset(Operand operand) const { return of[operand]; }

  // Finds element `index` in the order of the merged dimensions, the outermost of which takes no division.
  template <class Index>
  __device__ __forceinline__ void find(const Elements& problem, Index index) {
#pragma unroll
    for (int operand = 0; operand < kOperands; ++operand) of[operand] = 0;
    for (int d = problem.dims - 1; d > 0; --d) {
      const Index size = Index(problem.sizes[d]), quotient = index / size;
      add(problem, d, index - quotient * size);
      index = quotient;
    }
    add(problem, 0, index);
  }

 private:
  __device__ __forceinline__ void add(const Elements& problem, int d, int64_t i) {
#pragma unroll
    for (int operand = 0; operand < kOperands; ++operand) of[operand] += i * problem.strides[operand][d];
  }
};

// A thread's way through the elements: from `index` on, `step` elements at a time.
template <Layout layout>
class Walk {
 public:
  __device__ __forceinline__ Walk(const Elements& problem, int64_t index, int64_t step)
      : problem_(problem), index_(index), step_(step) {
    if constexpr (layout == Layout::columns) {
      columns_ = problem.sizes[problem.dims - 1];
      column_ = remainder(index);
      column_step_ = remainder(step);
    }
  }

  __device__ __forceinline__ int64_t index() const { return index_; }

  __device__ __forceinline__ void advance() {
    index_ += step_;
    if constexpr (layout == Layout::columns) {
      column_ += column_step_;
      if (column_ >= columns_) column_ -= columns_;
    }
  }

  __device__ __forceinline__ Place<layout> place() const {
    if constexpr (layout == Layout::strided) {
      Place<layout> place;
      if (is_short()) {
        place.find(problem_, uint32_t(index_));
      } else {
        place.find(problem_, index_);
      }
      return place;
    } else {
      return {index_, column_};
    }
  }

 private:
  // Whether 32-bit divisions will do, which take a third of the time.
  __device__ __forceinline__ bool is_short() const { return problem_.numel < (int64_t(1) << 31); }

  __device__ __forceinline__ int64_t remainder(int64_t index) const {
    return is_short() && index < (int64_t(1) << 32) ? int64_t(uint32_t(index) % uint32_t(columns_)) : index % columns_;
  }

  const Elements& problem_;
  int64_t index_, step_;
  int64_t column_ = 0, column_step_ = 0, columns_ = 0;
};

// Loads V elements of an operand from `offset` on; where it repeats along the innermost dimension, one V times.
// Layouts that are not strided have no such operand here.
template <Layout layout, int V, class T>
__device__ __forceinline__ Pack<T, V> load_operand(const Elements& problem, Operand operand, int64_t offset) {
  const T* p = static_cast<const T*>(problem.data[operand]) + offset;
  if constexpr (layout == Layout::strided && V > 1) {
    if (problem.strides[operand][problem.dims - 1] == 0) return repeat<V>(*p);
  }
  return load_pack<V>(p, true);
}

// The class weights of a pack, `weight(v)` and `pos_weight(v)`.
template <Layout layout, class A, int V>
struct Weights {
  Pack<A, V> weights, pos_weights;

  __device__ __forceinline__ Weights(const Elements& problem, const Place<layout>& place)
      : weights(load(problem, kWeight, place)), pos_weights(load(problem, kPosWeight, place)) {}

  __device__ __forceinline__ A weight(int v) const { return weights.elements[v]; }
  __device__ __forceinline__ A pos_weight(int v) const { return pos_weights.elements[v]; }

  __device__ __forceinline__ static Pack<A, V> load(const Elements& problem, Operand operand,
                                                    const Place<layout>& place) {
    const A* data = static_cast<const A*>(problem.data[operand]);
    if (data == nullptr) return repeat<V>(A(1));
    if constexpr (layout == Layout::strided) {
      return load_operand<layout, V, A>(problem, operand, place.offset(operand));
    } else {
      const int inner = problem.dims - 1;
      if (problem.strides[operand][inner] == 0) return repeat<V>(*data);
      return load_columns(data, place.column, problem.sizes[inner]);
    }
  }

  // Rows whose length is a multiple of the pack have its columns side by side. In others the pack goes on in the next
  // row, or, where rows are shorter than it, in the ones after that.
  __device__ __forceinline__ static Pack<A, V> load_columns(const A* data, int64_t column, int64_t columns) {
    if (columns % V == 0 && is_aligned<V>(data)) return load_pack<V>(data + column, true);
    Pack<A, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      pack.elements[v] = data[column];
      if (++column == columns) column = 0;
    }
    return pack;
  }
};

template <class A, int V>
struct Weights<Layout::dense, A, V> {
  __device__ __forceinline__ Weights(const Elements&, const Place<Layout::dense>&) {}
  __device__ __forceinline__ One weight(int) const { return {}; }
  __device__ __forceinline__ One pos_weight(int) const { return {}; }
};

// The packs of logits and targets that a thread has asked for before it uses the first.
//
// Beyond the last pack the first is loaded again, so that no load waits for a condition.
template <class T, class U, Layout layout, int V, int kPacks>
struct Batch {
  Place<layout> places[kPacks];
  bool is_there[kPacks];
  Pack<T, V> logits[kPacks];
  Pack<U, V> target[kPacks];

  // Asks for the next kPacks packs before element `end`, of which the first exists, and steps beyond them.
  __device__ __forceinline__ Batch(const Elements& problem, Walk<layout>& walk, int64_t end) {
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      is_there[i] = i == 0 || walk.index() < end;
      places[i] = is_there[i] ? walk.place() : places[0];
      logits[i] = load_pack<V>(static_cast<const T*>(problem.data[kLogits]) + places[i].offset(kLogits), true);
      target[i] = load_pack<V>(static_cast<const U*>(problem.data[kTarget]) + places[i].offset(kTarget), true);
      walk.advance();
    }
  }
};

// Gives `use` this thread's share of all elements, in batches.
//
// Bulk: packs of V. Remainder: what numel leaves beyond them, element by element. 33 * 31 bfloat16 elements are 127
// packs of 8, and 7 single ones.
template <class T, class U, Layout layout, int V, int kPacks, class Use>
__device__ __forceinline__ void for_each_batch(const Elements& problem, Use& use) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x, threads = int64_t(gridDim.x) * kThreads;
  const int64_t end = problem.numel / V * V;
  if (thread * V < end) {
    for (Walk<layout> walk(problem, thread * V, threads * V); walk.index() < end;) {
      use(Batch<T, U, layout, V, kPacks>(problem, walk, end));
    }
  }
  if constexpr (V > 1 && layout != Layout::strided) {
    if (end + thread < problem.numel) {
      Walk<layout> walk(problem, end + thread, threads);
      use(Batch<T, U, layout, 1, 1>(problem, walk, problem.numel));
    }
  }
}

}  // namespace torchce::cuda::sigmoid_bce
