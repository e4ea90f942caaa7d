// The backward of divergence on CUDA: choice of kernel, launch.
#include "backend.h"
#include "divergence_backward.cuh"
#include "divergence_launch.h"

namespace torchce::cuda {

void Backend::run(const DeviceScope& device, const host::divergence::BackwardCall& call) {
  using namespace divergence;
  const Rows& rows = call.args.rows;
  const auto is_adjacent = [](const Gradient& of) { return of.data == nullptr || of.strides.classes == 1; };
  with_kernel(rows, is_adjacent(call.args.first) && is_adjacent(call.args.other),
              [&](auto storage, auto sides, auto adjacent) {
                using T = decltype(storage);
                constexpr bool kAdjacent = decltype(adjacent)::value;
                launch_teams(device, backward_by_teams<T, decltype(sides), kAdjacent>, call.args, call.problem.count(),
                             team_of<T>(rows, kAdjacent));
              });
}

}  // namespace torchce::cuda
