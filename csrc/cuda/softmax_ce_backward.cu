// The backwards of softmax_ce on CUDA: choice of kernel, launch.
#include "backend.h"
#include "softmax_ce_backward.cuh"
#include "softmax_ce_plan.h"
#include "softmax_ce_scale.cuh"

namespace torchce::cuda {
namespace {

using host::softmax_ce::BackwardCall;
using namespace softmax_ce;

template <class T, class Target, GradientOf of>
void launch_along(const DeviceScope& device, const Backward& args) {
  const int64_t slots = device.resident_blocks(backward_along<T, Target, of>, {kThreads});
  const BackwardPlan plan = plan_backward(args.rows.outer * args.rows.inner, args.rows.classes, kPack<T>, slots);
  launch(device, backward_along<T, Target, of>, Grid{plan.blocks, {kThreads}}, args, plan.team, plan.parts, plan.part);
}

template <class T, class Target, GradientOf of, int V>
void launch_across_packs(const DeviceScope& device, const Backward& args) {
  const BackwardPlan plan =
      plan_backward_across(args.rows.outer * args.rows.inner / V, args.rows.classes, device.properties.multiprocessors);
  launch(device, backward_across<T, Target, of, V>, Grid{plan.blocks, {kThreads}}, args, plan.parts, plan.part);
}

template <class T, class Target, GradientOf of>
void launch_across(const DeviceScope& device, Backward args) {
  if (args.rows.inner == 1) {
    args.rows = turned(args.rows);
    args.grad_output_strides = turned(args.grad_output_strides);
    args.grad_lse_strides = turned(args.grad_lse_strides);
    args.grad_entropy_strides = turned(args.grad_entropy_strides);
    args.grad_strides = turned(args.grad_strides);
  }
  const Rows& rows = args.rows;
  if constexpr (!kIsGeneral<Target>) {  // as in the forward
    const bool packed = rows_are_packed(rows, rows.logits, rows.logits_strides, kPack<T>) &&
                        rows_are_packed(rows, args.grad, args.grad_strides, kPack<T>) &&
                        (!Target::kProbabilities || rows_are_packed(rows, rows.target, rows.target_strides, kPack<T>));
    if (packed) return launch_across_packs<T, Target, of, kPack<T>>(device, args);
  }
  launch_across_packs<T, Target, of, 1>(device, args);
}

void run_scale_kernel(const DeviceScope& device, const BackwardCall& call) {
  const Rows& rows = call.args.rows;
  with_general_types(rows, [&](auto logits_type, auto target_type) {
    using T = decltype(logits_type);
    using Target = decltype(target_type);
    const int team = classes_are_adjacent(rows, Target::kProbabilities) ? team_of_row(rows.classes, kPack<T>) : 1;
    launch_teams(device, backward_scale<T, Target>, call.args, call.problem.count(), team);
  });
}

template <GradientOf of>
void run_kernel(const DeviceScope& device, const BackwardCall& call) {
  const Backward& args = call.args;
  if (call.problem.count() == 0) return;
  with_problem_types(args.rows, args.rows.is_general, [&](auto logits_type, auto target_type) {
    using T = decltype(logits_type);
    using Target = decltype(target_type);
    if constexpr (of == GradientOf::logits || Target::kProbabilities) {
      if (classes_are_adjacent(args.rows, Target::kProbabilities) && args.grad_strides.classes == 1) {
        launch_along<T, Target, of>(device, args);
      } else {
        launch_across<T, Target, of>(device, args);
      }
    }
  });
}

}  // namespace

void Backend::run(const DeviceScope& device, const BackwardCall& call) {
  switch (call.of) {
    case GradientOf::logits:
      return run_kernel<GradientOf::logits>(device, call);
    case GradientOf::target:
      return run_kernel<GradientOf::target>(device, call);
    case GradientOf::scale:
      return run_scale_kernel(device, call);
  }
}

}  // namespace torchce::cuda
