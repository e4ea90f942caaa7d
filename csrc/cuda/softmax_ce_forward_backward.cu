// Loss and gradient of softmax_ce on CUDA at once, the gradient over the logits: choice of kernel, launch.
#include "backend.h"
#include "scratch.h"
#include "softmax_ce_forward_backward.cuh"
#include "softmax_ce_plan.h"

namespace torchce::cuda {
namespace {

using host::softmax_ce::ForwardBackwardCall;
using namespace softmax_ce;

template <class T, class Target>
void launch_along(const DeviceScope& device, const ForwardBackwardCall& call) {
  const Forward& forward = call.forward.args;
  const Backward& backward = call.backward.args;
  const int64_t count = call.forward.problem.count(), classes = forward.rows.classes;
  ForwardBackwardPlan plan{};
  BlockShape shape{};
  int64_t slots = 0;
  for (int largest = device.properties.largest_cluster; slots == 0; largest = plan.cluster / 2) {  // until one fits
    plan = plan_forward_backward(count, classes, kPack<T>, device.properties, largest);
    shape = {kThreads, plan.kept * kBytesOfKeptPack, plan.cluster};
    slots = plan.lanes > 0 ? device.resident_blocks(forward_backward_by_lanes<T, Target>, shape)
                           : device.resident_blocks(forward_backward_by_cluster<T, Target>, shape);
    host::check(slots > 0 || plan.cluster > 1, "softmax_ce_forward_backward_: no block fits on the device");
  }
  const Grid grid{std::clamp<int64_t>(plan.blocks, plan.cluster, slots), shape};
  const Scratch scratch(device, call.forward.loss, grid.blocks * int64_t(sizeof(LossSums)));
  const GridScratch shared{reinterpret_cast<LossSums*>(scratch.data), scratch.counters};
  if (plan.lanes > 0) {
    launch(device, forward_backward_by_lanes<T, Target>, grid, forward, backward, plan.lanes, plan.kept, shared);
  } else {
    launch(device, forward_backward_by_cluster<T, Target>, grid, forward, backward, plan.cluster, plan.kept, shared);
  }
}

}  // namespace

void Backend::run(const DeviceScope& device, const ForwardBackwardCall& call) {
  with_problem_types(
      call.forward.args.rows, call.forward.args.rows.is_general, [&](auto logits_type, auto target_type) {
        using T = decltype(logits_type);
        using Target = decltype(target_type);
        const Rows& rows = call.forward.args.rows;
        if constexpr (!kIsGeneral<Target>) {  // whose kernels would take the compiler minutes more
          if (classes_are_adjacent(rows, Target::kProbabilities) &&
              forward_backward_fills(call.forward.problem.count(), rows.classes, kPack<T>, device.properties)) {
            return launch_along<T, Target>(device, call);
          }
        }
        run(device, call.forward);
        run(device, call.backward);
      });
}

}  // namespace torchce::cuda
