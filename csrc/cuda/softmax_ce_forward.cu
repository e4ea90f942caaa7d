// The forward of softmax_ce on CUDA: choice of kernel, scratch memory, launch.
#include "backend.h"
#include "scratch.h"
#include "softmax_ce_forward.cuh"
#include "softmax_ce_outputs.cuh"
#include "softmax_ce_plan.h"

namespace torchce::cuda {
namespace {

using host::softmax_ce::ForwardCall;
using namespace softmax_ce;

template <class T, class Target>
void launch_parts(const DeviceScope& device, const ForwardCall& call, const ForwardPlan& plan) {
  using Part = ClassSums<Accumulate<T>, Target::kSpread>;
  const int64_t count = call.problem.count(), of_rows = count * int64_t(sizeof(LossSums));
  const Scratch scratch(device, call.loss, of_rows + plan.blocks * int64_t(sizeof(Part)), unsigned(count) + 1);
  const auto rows = reinterpret_cast<LossSums*>(scratch.data);
  launch(device, forward_by_parts<T, Target>, Grid{plan.blocks, {kThreads}}, call.args, plan.parts, plan.part,
         PartScratch{rows + count, rows, scratch.counters + 1, scratch.counters});
}

template <class T, class Target>
void launch_along(const DeviceScope& device, const ForwardCall& call) {
  const int64_t classes = call.args.rows.classes;
  const int64_t slots = is_short_row(classes, kPack<T>)
                            ? device.resident_blocks(forward_by_lanes<T, Target>, {kThreads})
                            : device.resident_blocks(forward_by_block<T, Target>, {kThreads});
  const ForwardPlan plan = plan_forward(call.problem.count(), classes, kPack<T>, slots);
  if (plan.regime == Regime::parts) return launch_parts<T, Target>(device, call, plan);
  const Scratch scratch(device, call.loss, plan.blocks * int64_t(sizeof(LossSums)));
  const GridScratch shared{reinterpret_cast<LossSums*>(scratch.data), scratch.counters};
  const Grid grid{plan.blocks, {kThreads}};
  if (plan.regime == Regime::lanes) {
    launch(device, forward_by_lanes<T, Target>, grid, call.args, plan.lanes, shared);
  } else {
    launch(device, forward_by_block<T, Target>, grid, call.args, shared);
  }
}

template <class T, class Target, int V>
void launch_across_packs(const DeviceScope& device, const ForwardCall& call, const Forward& args) {
  const int64_t slots = device.resident_blocks(forward_across<T, Target, V>, {kThreads});
  const AcrossPlan plan =
      plan_forward_across(call.problem.count() / V, args.rows.classes, device.properties.multiprocessors, slots);
  const Scratch scratch(device, call.loss, plan.blocks * int64_t(sizeof(LossSums)));
  launch(device, forward_across<T, Target, V>, Grid{plan.blocks, {kThreads}}, args, plan.columns,
         GridScratch{reinterpret_cast<LossSums*>(scratch.data), scratch.counters});
}

template <class T, class Target>
void launch_across(const DeviceScope& device, const ForwardCall& call) {
  Forward args = call.args;
  if (args.rows.inner == 1) args.rows = turned(args.rows);
  const Rows& rows = args.rows;
  if constexpr (!kIsGeneral<Target>) {  // whose kernels would take the compiler minutes more
    const bool packed = rows_are_packed(rows, rows.logits, rows.logits_strides, kPack<T>) &&
                        (!Target::kProbabilities || rows_are_packed(rows, rows.target, rows.target_strides, kPack<T>));
    if (packed) return launch_across_packs<T, Target, kPack<T>>(device, call, args);
  }
  launch_across_packs<T, Target, 1>(device, call, args);
}

void launch_row_outputs(const DeviceScope& device, const Forward& args) {
  const int64_t count = args.rows.outer * args.rows.inner;
  with_float_type(args.rows.dtype, [&](auto logits_type) {
    using T = decltype(logits_type);
    if (args.rows.logits_strides.classes == 1) {
      launch_teams(device, row_outputs<T, true>, args, count, team_of_row(args.rows.classes, kPack<T>));
    } else {
      launch_teams(device, row_outputs<T, false>, args, count, 1);
    }
  });
}

}  // namespace

void Backend::run(const DeviceScope& device, const ForwardCall& call) {
  with_problem_types(call.args.rows, call.args.rows.is_general, [&](auto logits_type, auto target_type) {
    using T = decltype(logits_type);
    using Target = decltype(target_type);
    if (classes_are_adjacent(call.args.rows, Target::kProbabilities)) {
      launch_along<T, Target>(device, call);
    } else {
      launch_across<T, Target>(device, call);
    }
  });
  if (call.args.predictions != nullptr || call.args.entropy != nullptr) launch_row_outputs(device, call.args);
}

}  // namespace torchce::cuda
