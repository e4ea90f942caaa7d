// The gradient of the scale that multiplies the logits: of each row its part, the sum over its classes of the gradient
// of a value times the value's derivative by the scale.
#pragma once

#include "reduce.cuh"
#include "softmax_ce_gradient.cuh"

namespace torchce::cuda::softmax_ce {

// Each row belongs to a team of `team` neighbouring threads, a power of two up to a warp, or a block.
template <class T, class Target>
__global__ __launch_bounds__(kThreads, kBlocksToFit) void backward_scale(const Backward call, const int team) {
  using A = Accumulate<T>;
  using P = typename ProbabilityType<Target, T>::type;
  const Rows& rows = call.rows;
  const LogitOf<Target, T> logit(rows);
  const ClassCoefficients<Target, A> coefficients(rows);
  const int64_t count = rows.outer * rows.inner, rows_of_block = kThreads / team, step = gridDim.x * rows_of_block;
  const int thread = threadIdx.x % team;
  for (int64_t first = blockIdx.x * rows_of_block; first < count; first += step) {
    const int64_t r = first + threadIdx.x / team;
    math::CompensatedSum<A, true> total{};
    if (r < count) {
      const RowPosition at(rows, r);
      const T* x = at_row<T>(rows.logits, rows.logits_strides, at);
      const P* t = at_row<P>(rows.target, rows.target_strides, at);
      RowInputs<A> inputs[1];
      load_row_inputs<Target, GradientOf::scale>(call, r, at, inputs);
      const RowGradient<T, Target, GradientOf::scale> row(call, inputs[0]);
      for (int64_t k = thread; k < rows.classes && !row.ignored; k += team) {
        const A stored = load_one<A>(x + k * rows.logits_strides.classes), value = logit.value(stored);
        const A of_target = Target::kProbabilities ? load_one<A>(t + k * rows.target_strides.classes) : A(0);
        A gradient[1] = {row.at(k, value, of_target, coefficients)};
        row.subtract_hot(gradient, k);
        total.add(gradient[0] * logit.slope_by_scale(stored, value));
      }
    }
    const Sum<A> of_thread{total.sum}, of_row = team > kWarp ? reduce_block(of_thread) : of_thread.of_lanes(team);
    if (r < count && thread == 0) static_cast<A*>(call.grad)[r] = of_row.value;
  }
}

}  // namespace torchce::cuda::softmax_ce
