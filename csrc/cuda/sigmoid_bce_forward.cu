// The forward of sigmoid_bce on CUDA: choice of kernel, scratch memory, launch.
#include "backend.h"
#include "scratch.h"
#include "sigmoid_bce.cuh"
#include "sigmoid_bce_launch.h"

namespace torchce::cuda {
namespace {

using namespace sigmoid_bce;

template <class T, class U, Layout layout, int V>
void launch_forward(const DeviceScope& device, const Elements& problem, const host::Tensor& loss) {
  const auto kernel = forward<T, U, layout, V>;
  const Grid grid = grid_for(device, kernel, problem.numel / V);
  const Scratch scratch(device, loss, grid.blocks * int64_t(sizeof(LossSums)));
  launch(device, kernel, grid, problem, GridScratch{reinterpret_cast<LossSums*>(scratch.data), scratch.counters});
}

}  // namespace

void Backend::run(const DeviceScope& device, const host::sigmoid_bce::ForwardCall& call) {
  const Elements& problem = call.problem.elements;
  if (problem.numel == 0 && problem.options.reduction == Reduction::none) return;
  with_kernel(problem, [&](auto logits, auto target, auto layout, auto pack) {
    launch_forward<decltype(logits), decltype(target), layout(), pack()>(device, problem, call.loss);
  });
}

}  // namespace torchce::cuda
