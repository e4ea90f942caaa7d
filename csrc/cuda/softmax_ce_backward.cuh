// Softmax cross entropy, backward: one read of the logits and one write of the gradient, which may be the same memory.
// Given the row statistics every element stands alone, so threads share nothing and wait for nobody.
#pragma once

#include "softmax_ce_gradient.cuh"

namespace torchce::cuda::softmax_ce {

// Teams of `team` threads, a power of two, each take classes [i * part, (i + 1) * part) of one row after another.
template <class T, class Target, GradientOf of>
__global__ __launch_bounds__(kThreads, kBlocks<Target, T>) void backward_along(const Backward call, const int team,
                                                                               const int64_t parts,
                                                                               const int64_t part) {
  const Rows& rows = call.rows;
  const int64_t count = rows.outer * rows.inner;
  const int thread = threadIdx.x % team, teams = kThreads / team;
  for (int64_t task = int64_t(blockIdx.x) * teams + threadIdx.x / team; task < count * parts;
       task += int64_t(gridDim.x) * teams) {
    const int64_t r = quotient(task, parts), begin = (task - r * parts) * part;
    const int64_t end = begin + part < rows.classes ? begin + part : rows.classes;
    const RowPosition at(rows, r);
    write_gradient<T, Target, of, /*kInPlace=*/false>(
        call, at, begin, end, thread, team,
        [&] {
          RowInputs<Accumulate<T>> inputs[1];
          load_row_inputs<Target, of>(call, r, at, inputs);
          return RowGradient<T, Target, of>(call, inputs[0]);
        },
        [](const T* p, int) { return load_pack<kPack<T>, Cache::stream>(p, true); });
  }
}

// Each thread takes a pack of V rows that are adjacent in memory, and of them classes [i * part, (i + 1) * part).
template <class T, class Target, GradientOf of, int V>
__global__ __launch_bounds__(kThreads, kBlocksToFit) void backward_across(const Backward call, const int64_t parts,
                                                                          const int64_t part) {
  using A = Accumulate<T>;
  using P = typename ProbabilityType<Target, T>::type;
  using G = typename GradientType<Target, T, of>::type;
  constexpr int kClasses = kUnroll<Target, T>;  // in flight
  const Rows& rows = call.rows;
  const int64_t packs = quotient(rows.outer * rows.inner, V);
  const LogitOf<Target, T> logit(rows);
  const ClassCoefficients<Target, A> coefficients(rows);

  for (int64_t task = int64_t(blockIdx.x) * kThreads + threadIdx.x; task < packs * parts;
       task += int64_t(gridDim.x) * kThreads) {
    const int64_t part_of_task = quotient(task, packs), r = (task - part_of_task * packs) * V;
    const int64_t begin = part_of_task * part;
    const int count = int((begin + part < rows.classes ? begin + part : rows.classes) - begin);
    const RowPosition at(rows, r);
    const T* x = at_row<T>(rows.logits, rows.logits_strides, at) + begin * rows.logits_strides.classes;
    const P* t = at_row<P>(rows.target, rows.target_strides, at) + begin * rows.target_strides.classes;
    G* grad = static_cast<G*>(call.grad) + at.offset(call.grad_strides) + begin * call.grad_strides.classes;

    Pack<T, V> logits[kClasses];
    Pack<P, V> target[kClasses];
    const auto load_batch = [&](int first) {
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        if (first + i < count) {
          logits[i] = load_pack<V, Cache::stream>(x + (first + i) * rows.logits_strides.classes, true);
          if constexpr (Target::kProbabilities) {
            target[i] = load_pack<V>(t + (first + i) * rows.target_strides.classes, true);
          }
        }
      }
    };
    load_batch(0);
    RowInputs<A> inputs[V];
    load_row_inputs<Target, of>(call, r, at, inputs);
    RowGradient<T, Target, of> row[V];
    int hot[V];       // the target class within the part; another number where it lies elsewhere
    Pack<G, V> kept;  // all bits of a row that is not ignored
#pragma unroll
    for (int v = 0; v < V; ++v) {
      row[v] = RowGradient<T, Target, of>(call, inputs[v]);
      const int64_t place = row[v].index - begin;
      hot[v] = 0 <= place && place < part ? int(place) : -1;
      std::memset(&kept.elements[v], row[v].ignored ? 0 : 0xff, sizeof(G));
    }

    for (int first = 0; first < count; first += kClasses) {
#pragma unroll
      for (int i = 0; i < kClasses; ++i) {
        if (first + i < count) {
          const auto value = [&](int v) { return logit.value(get<A>(logits[i], v)); };
          A gradient[V];
#pragma unroll
          for (int v = 0; v < V; ++v) {
            const A of_target = Target::kProbabilities ? get<A>(target[i], v) : A(0);
            gradient[v] = row[v].at(begin + first + i, value(v), of_target, coefficients);
            if (!Target::kProbabilities && hot[v] == first + i) gradient[v] -= row[v].hot;
            gradient[v] = of_logit<of>(logit, value(v), gradient[v]);
          }
          store_pack(grad + (first + i) * call.grad_strides.classes, masked(rounded<G>(gradient), kept), true);
        }
      }
      load_batch(first + kClasses);
    }
  }
}

}  // namespace torchce::cuda::softmax_ce
