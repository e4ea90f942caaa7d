// The gradient of a row, given its statistics: what it is made of, and how threads write their classes of it.
#pragma once

#include "exp.cuh"
#include "softmax_ce_classes.cuh"

namespace torchce::cuda::softmax_ce {

// The element type of a gradient: that of the logits, or the target's for the gradient of the target; of the scale,
// what its sums are made of.
template <class Target, class T, GradientOf of>
struct GradientType {
  using type = std::conditional_t<of == GradientOf::scale, Accumulate<T>, T>;
};
template <class Target, class T>
  requires Target::kProbabilities
struct GradientType<Target, T, GradientOf::target> {
  using type = typename Target::Storage;
};

// What the upstream gradient, the forward's statistics and the target say of a row: all that is read of it beside its
// logits.
template <class A>
struct RowInputs {
  uint64_t grad_output_bits;
  A divisor;  // mean_divisor
  uint64_t target_bits;
  A max, sum, coefficients;  // the last one is sum_k u_k, where the target has any
  A grad_lse, grad_entropy, mean_gap;

  // Whether lse or entropy have a gradient there, which an ignored row has as well.
  __device__ __forceinline__ bool has_outputs() const { return (grad_lse != 0 || grad_entropy != 0) && sum == sum; }
};

// Loads the bits of the upstream gradients of n neighbouring rows.
template <int n>
__device__ __forceinline__ void load_grad_output_bits(const Backward& call, RowPosition at, uint64_t (&bits)[n]) {
  const bool each = call.rows.options.reduction == Reduction::none;
  load_bits(call.grad_output, bytes_of(call.grad_output_dtype), each ? at.offset(call.grad_output_strides) : 0,
            each ? call.grad_output_strides.inner : 0, bits);
}

// Loads the inputs of n neighbouring rows from row r on, in loads of which none waits for another.
template <class Target, GradientOf of, int n, class A>
__device__ __forceinline__ void load_row_inputs(const Backward& call, int64_t r, RowPosition at,
                                                RowInputs<A> (&inputs)[n]) {
  const Rows& rows = call.rows;
  const Statistics<A> statistics(rows, call.statistics);
  uint64_t targets[n], grad_outputs[n];
  load_target_bits<Target>(rows, at, targets);
  load_grad_output_bits(call, at, grad_outputs);
  const A divisor = mean_divisor<A>(call);
  A coefficients_of_all = 0;
  if constexpr (!Target::kProbabilities && Target::kSpread) coefficients_of_all = sum_of_index_coefficients<A>(call);
#pragma unroll
  for (int v = 0; v < n; ++v) {
    inputs[v] = {grad_outputs[v],
                 divisor,
                 targets[v],
                 statistics.max[r + v],
                 statistics.sum[r + v],
                 coefficients_of_all,
                 A(0),
                 A(0),
                 A(0)};
    if constexpr (Target::kProbabilities && of != GradientOf::target)
      inputs[v].coefficients = statistics.coefficients[r + v];
  }
  if constexpr (!kIsGeneral<Target>) return;
  if (call.grad_lse != nullptr) {
    const A* grad_lse = static_cast<const A*>(call.grad_lse) + at.offset(call.grad_lse_strides);
#pragma unroll
    for (int v = 0; v < n; ++v) inputs[v].grad_lse = grad_lse[v * call.grad_lse_strides.inner];
  }
  if (call.grad_entropy != nullptr) {
    const A* grad_entropy = static_cast<const A*>(call.grad_entropy) + at.offset(call.grad_entropy_strides);
#pragma unroll
    for (int v = 0; v < n; ++v) {
      inputs[v].grad_entropy = grad_entropy[v * call.grad_entropy_strides.inner];
      inputs[v].mean_gap = statistics.mean_gaps[r + v];
    }
  }
}

// A logit's gradient from that of its value: asked for last, when the target class's part is in it.
template <GradientOf of, class Logit, class A>
__device__ __forceinline__ A of_logit(const Logit& logit, A value, A gradient) {
  if constexpr (of == GradientOf::logits) {
    return logit.slope(value) * gradient;
  } else {
    return gradient;
  }
}

// The gradient of a row with logits of type T, class by class.
template <class T, class Target, GradientOf of>
struct RowGradient {
  using A = Accumulate<T>;
  static constexpr bool kShort = kSixteenBits<typename GradientType<Target, T, of>::type>;
  ScaledExp<A, kShort> scaled_exp;
  A max;
  A spread;
  A hot;                   // subtracted at the target class
  A grad_output, log_sum;  // what the target's gradient takes instead
  int64_t index;           // the target class, 0 where it is none; -1 of probabilities
  bool ignored;

  __device__ __forceinline__ RowGradient() {}
  __device__ __forceinline__ RowGradient(const Backward& call, const RowInputs<A>& in)
      : max(in.max), spread(0), hot(0), grad_output(0), log_sum(0), index(-1), ignored(false) {
    const Rows& rows = call.rows;
    const A of_loss = float_of<A>(call.grad_output_dtype, in.grad_output_bits);
    if constexpr (of == GradientOf::target) {
      grad_output = of_loss / in.divisor;
      log_sum = math::log(in.sum);
    } else if constexpr (Target::kProbabilities) {
      const A g = of_loss / in.divisor;
      set(call, in, g, A(1), probability_factors(g, in.coefficients, in.sum));
    } else {
      const DividedGradient<A> upstream(of_loss, in.divisor);
      const auto smoothing = smoothing_of<A>(rows);
      const IndexedRow<A> row(rows, target_of(rows, in.target_bits), smoothing);
      ignored = row.ignored && !(kIsGeneral<Target> && in.has_outputs());
      index = row.index;
      const A g = kIsGeneral<Target> && row.ignored ? A(0) : upstream.g;
      set(call, in, g, upstream.rest,
          index_factors<Target::kSpread>(g, upstream.rest, row.hot, smoothing, in.coefficients, in.sum));
    }
  }
  // Takes the row's factors, of an upstream gradient whose DividedGradient is `g` and `rest`, and adds what comes by
  // way of lse and entropy. Then a row without an upstream gradient has no part of the loss, be that infinite.
  __device__ __forceinline__ void set(const Backward& call, const RowInputs<A>& in, A g, A rest,
                                      GradientFactors<A> factors) {
    if constexpr (kIsGeneral<Target>) {
      const A z = A(call.rows.options.z_loss);
      if (call.grad_lse != nullptr || call.grad_entropy != nullptr) factors = factors.unless(g == 0);
      if (z != 0 || in.grad_lse != 0) {
        const A lse = LossTerms<A>{in.max, math::log(in.sum)}.lse();
        factors.scale += slope_of_lse(in.grad_lse, g, rest, z, lse) / in.sum;
      }
      if (in.grad_entropy != 0) factors.add_entropy(in.grad_entropy, in.mean_gap, in.sum);
    }
    scaled_exp = ScaledExp<A, kShort>(factors.scale, factors.tilt);
    spread = factors.spread;
    hot = factors.hot;
  }

  // The gradient of class k, whose logit has value x, without the part that only the target class has.
  __device__ __forceinline__ A at(int64_t k, A x, A target, const ClassCoefficients<Target, A>& coefficients) const {
    if constexpr (of == GradientOf::target) {
      return target_gradient(x, coefficients.smoothing, grad_output, coefficients.weight_of(k), max, log_sum);
    } else {
      A g = kIsGeneral<Target> ? scaled_exp(x - max, reachable_gap(x - max)) : scaled_exp(x - max);
      if constexpr (Target::kSpread) g = class_gradient(g, spread, coefficients.at(k, target).of_gradient());
      return g;
    }
  }

  // Subtracts the target class's own part if it is one of the V classes from k on: asked once for all of them.
  template <int V>
  __device__ __forceinline__ void subtract_hot(A (&gradient)[V], int64_t k) const {
    if constexpr (!Target::kProbabilities) {
      const uint64_t place = uint64_t(index - k);
      if (place >= uint64_t(V)) return;
#pragma unroll
      for (int v = 0; v < V; ++v) gradient[v] -= v == int(place) ? hot : A(0);
    }
  }
};

// Writes the gradient of classes [begin, end) of one row, those of thread `thread` out of `threads` that share them;
// classes are adjacent in memory. `load(p, number)` is the thread's pack of that number, which lies at p. `get_row()`
// is the row's gradient, asked for when the first logits are on their way: what it reads need not come before them.
// kInPlace: the gradient lies where the logits do.
template <class T, class Target, GradientOf of, bool kInPlace, class GetRow, class Load>
__device__ __forceinline__ void write_gradient(const Backward& call, RowPosition at, int64_t begin, int64_t end,
                                               int thread, int threads, GetRow get_row, Load load) {
  using A = Accumulate<T>;
  using P = typename ProbabilityType<Target, T>::type;
  using G = typename GradientType<Target, T, of>::type;
  constexpr int V = kPack<T>, kBatch = kUnroll<Target, T>;
  const Rows& rows = call.rows;
  const T* x = at_row<T>(rows.logits, rows.logits_strides, at);
  const P* t = at_row<P>(rows.target, rows.target_strides, at);
  G* grad;
  if constexpr (kInPlace) {
    grad = const_cast<G*>(x);
  } else {
    grad = static_cast<G*>(call.grad) + at.offset(call.grad_strides);
  }
  const LogitOf<Target, T> logit(rows);
  const ClassCoefficients<Target, A> coefficients(rows);
  const PackedClasses<V> classes(x, begin, end);
  const bool target_aligned = Target::kProbabilities && is_aligned<V>(t + classes.body);
  const bool grad_aligned = kInPlace || is_aligned<V>(grad + classes.body);

  Pack<T, V> logits[kBatch];
  Pack<P, V> target[kBatch];
  const auto load_batch = [&](int64_t first, int number) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t p = first + int64_t(i) * threads;
      if (p < classes.packs) {
        logits[i] = load(x + classes.body + p * V, number + i);
        if constexpr (Target::kProbabilities) target[i] = load_pack<V>(t + classes.body + p * V, target_aligned);
      }
    }
  };
  load_batch(thread, 0);
  const RowGradient<T, Target, of> row = get_row();

  const auto write_one = [&](int64_t k) {
    A gradient[1] = {0};
    if (!row.ignored) {
      const A value = logit.value(load_one<A>(x + k));
      gradient[0] = row.at(k, value, Target::kProbabilities ? load_one<A>(t + k) : A(0), coefficients);
      row.subtract_hot(gradient, k);
      gradient[0] = of_logit<of>(logit, value, gradient[0]);
    }
    store_one(grad + k, gradient[0]);
  };
  const auto write_batch = [&](int64_t first) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t p = first + int64_t(i) * threads, k = classes.body + p * V;
      if (p >= classes.packs) break;
      A gradient[V] = {};
      if (!row.ignored) {
        A values[V];
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const A of_target = Target::kProbabilities ? get<A>(target[i], v) : A(0);
          values[v] = logit.value(get<A>(logits[i], v));
          gradient[v] = row.at(k + v, values[v], of_target, coefficients);
        }
        row.subtract_hot(gradient, k);
#pragma unroll
        for (int v = 0; v < V; ++v) gradient[v] = of_logit<of>(logit, values[v], gradient[v]);
      }
      store_pack(grad + k, rounded<G>(gradient), grad_aligned);
    }
  };
  classes.for_each_before(thread, threads, write_one);
  classes.for_each_after(thread, threads, write_one);
  int64_t first = thread;
  for (int number = kBatch; first < classes.packs; number += kBatch) {
    write_batch(first);
    first += int64_t(kBatch) * threads;
    load_batch(first, number);
  }
}

}  // namespace torchce::cuda::softmax_ce
