// The operands of sigmoid_bce along a run of the innermost dimension.
#pragma once

#include "../sigmoid_bce_element.h"
#include "vector.h"

namespace torchce::cpu::TORCHCE_LEVEL {

namespace bce {

using namespace sigmoid_bce;

// One operand along a run of the innermost dimension.
template <class T>
struct Run {
  T* data;
  int64_t stride;

  template <class A>
  TORCHCE_SIMD Lanes<A> at(int64_t i, int count) const {
    if (stride == 0) return broadcast(load_one<A>(data));
    if (stride == 1 && count == kLanes<A>) return load<A>(data + i);
    Lanes<A> v{};  // the remainder of a run, or a stride
    for (int l = 0; l < count; ++l) v[l] = load_one<A>(data + (i + l) * stride);
    return v;
  }

  template <class V>
  TORCHCE_SIMD void put(int64_t i, int count, V v) const {
    constexpr int L = sizeof(V) / sizeof(v[0]);
    if (stride == 1 && count == L) return store(data + i, v);
    for (int l = 0; l < count; ++l) store_one(data + (i + l) * stride, v[l]);
  }
};

// A weight operand along a run: it is of the accumulation type, and one where it is absent.
template <class A>
Run<const A> weight_run(const Elements& problem, Operand operand, const int64_t* offsets) {
  static constexpr A kOne = 1;
  if (problem.data[operand] == nullptr) return {&kOne, 0};
  return {static_cast<const A*>(problem.data[operand]) + offsets[operand], problem.strides[operand][problem.dims - 1]};
}

template <class T>
Run<T> run_of(const Elements& problem, Operand operand, const void* data, const int64_t* offsets) {
  return {static_cast<T*>(const_cast<void*>(data)) + offsets[operand], problem.strides[operand][problem.dims - 1]};
}

// Splits elements [begin, end) into runs of the innermost dimension: body(offsets of the operands, length).
template <class F>
TORCHCE_SIMD void for_each_run(const Elements& problem, int64_t begin, int64_t end, F body) {
  const int inner = problem.dims - 1;
  while (begin < end) {
    int64_t index = begin, offsets[kOperands] = {}, inner_index = 0;
    for (int d = inner; d >= 0; --d) {
      const int64_t i = index % problem.sizes[d];
      index /= problem.sizes[d];
      if (d == inner) inner_index = i;
      for (int operand = 0; operand < kOperands; ++operand) offsets[operand] += i * problem.strides[operand][d];
    }
    const int64_t left = problem.sizes[inner] - inner_index;
    const int64_t length = left < end - begin ? left : end - begin;
    body(offsets, length);
    begin += length;
  }
}

// Calls body(i, lanes that count) for the vectors of a run from element i on.
template <class A, class F>
TORCHCE_SIMD void for_each_vector(int64_t i, int64_t length, F body) {
  constexpr int L = kLanes<A>;
  for (; i + L <= length; i += L) body(i, L);
  if (i < length) body(i, int(length - i));
}

}  // namespace bce

}  // namespace torchce::cpu::TORCHCE_LEVEL
