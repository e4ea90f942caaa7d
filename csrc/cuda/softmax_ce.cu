// The forward op of softmax_ce on CUDA: checks, memory, choice of kernel, launch.
#include "ops.h"
#include "scratch.h"
#include "softmax_ce_forward.cuh"
#include "softmax_ce_launch.h"
#include "softmax_ce_plan.h"

namespace torchce::cuda {
namespace {

using host::softmax_ce::ForwardCall;
using namespace softmax_ce;

template <class T, class Target>
void launch_along(const DeviceScope& device, const ForwardCall& call) {
  using A = Accumulate<T>;
  const int64_t count = call.problem.count();
  const ForwardPlan plan = plan_forward(count, call.args.rows.classes, kPack<T>, device.properties.multiprocessors);
  if (plan.regime == Regime::parts) {
    const Scratch scratch(device, call.loss, plan.blocks * int64_t(sizeof(RowSums<A, Target::kSpread>)));
    launch(device, forward_by_parts<T, Target>, Grid{plan.blocks, kThreads}, call.args, plan.parts, plan.part,
           static_cast<void*>(scratch.data), scratch.counter);
    return;
  }
  const Scratch scratch(device, call.loss, plan.blocks * int64_t(sizeof(Sums)));
  const GridScratch shared{reinterpret_cast<Sums*>(scratch.data), scratch.counter};
  if (plan.regime == Regime::lanes) {
    launch(device, forward_by_lanes<T, Target>, Grid{plan.blocks, kThreads}, call.args, plan.lanes, shared);
  } else {
    launch(device, forward_by_block<T, Target>, Grid{plan.blocks, kThreads}, call.args, shared);
  }
}

template <class T, class Target, int V>
void launch_across_packs(const DeviceScope& device, const ForwardCall& call, const Forward& args) {
  const AcrossPlan plan =
      plan_forward_across(call.problem.count() / V, args.rows.classes, device.properties.multiprocessors);
  const Scratch scratch(device, call.loss, plan.blocks * int64_t(sizeof(Sums)));
  launch(device, forward_across<T, Target, V>, Grid{plan.blocks, kThreads}, args, plan.columns,
         GridScratch{reinterpret_cast<Sums*>(scratch.data), scratch.counter});
}

template <class T, class Target>
void launch_across(const DeviceScope& device, const ForwardCall& call) {
  Forward args = call.args;
  if (args.rows.inner == 1) args.rows = turned(args.rows);
  const Rows& rows = args.rows;
  const bool packed = rows_are_packed(rows, rows.logits, rows.logits_strides, kPack<T>) &&
                      (!Target::kProbabilities || rows_are_packed(rows, rows.target, rows.target_strides, kPack<T>));
  if (packed) {
    launch_across_packs<T, Target, kPack<T>>(device, call, args);
  } else {
    launch_across_packs<T, Target, 1>(device, call, args);
  }
}

}  // namespace

void launch_softmax_ce_forward(const DeviceScope& device, const ForwardCall& call) {
  with_problem_types(call.args.rows, [&](auto logits_type, auto target_type) {
    using T = decltype(logits_type);
    using Target = decltype(target_type);
    if (classes_are_adjacent(call.args.rows, Target::kProbabilities)) {
      launch_along<T, Target>(device, call);
    } else {
      launch_across<T, Target>(device, call);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> softmax_ce_forward(Tensor logits, Tensor target, std::optional<Tensor> weight,
                                                      int64_t reduction, int64_t ignore_index, double label_smoothing,
                                                      std::optional<ScalarType> dtype) {
  const DeviceScope device(logits);
  const ForwardCall call =
      host::softmax_ce::prepare_forward(logits, target, weight, reduction, ignore_index, label_smoothing, dtype);
  launch_softmax_ce_forward(device, call);
  return {call.loss, call.statistics, call.totals};
}

}  // namespace torchce::cuda
