// The forward of divergence on CUDA: choice of kernel, scratch memory, launch.
#include "backend.h"
#include "divergence_forward.cuh"
#include "divergence_launch.h"
#include "scratch.h"

namespace torchce::cuda {

void Backend::run(const DeviceScope& device, const host::divergence::ForwardCall& call) {
  using namespace divergence;
  const Rows& rows = call.args.rows;
  with_kernel(rows, /*gradients_are_adjacent=*/true, [&](auto storage, auto sides, auto adjacent) {
    using T = decltype(storage);
    constexpr bool kAdjacent = decltype(adjacent)::value;
    const auto kernel = forward_by_teams<T, decltype(sides), kAdjacent>;
    const int team = team_of<T>(rows, kAdjacent);
    const int64_t blocks = std::min(device.resident_blocks(kernel, {kThreads}),
                                    softmax_ce::ceil_div(call.problem.count(), kThreads / team));
    const Scratch scratch(device, call.loss, blocks * int64_t(sizeof(LossSums)));
    launch(device, kernel, Grid{blocks, {kThreads}}, call.args, team,
           GridScratch{reinterpret_cast<LossSums*>(scratch.data), scratch.counters});
  });
}

}  // namespace torchce::cuda
