// The forward of sigmoid_bce on CUDA: choice of kernel, scratch memory, launch.
#include "backend.h"
#include "sigmoid_bce.cuh"
#include "sigmoid_bce_launch.h"

namespace torchce::cuda {
void Backend::run(const DeviceScope& device, const host::sigmoid_bce::ForwardCall& call) {
  using namespace sigmoid_bce;
  const Elements& problem = call.problem.elements;
  if (problem.numel == 0 && problem.options.reduction == Reduction::none) return;
  with_kernel(problem, [&](auto logits, auto target, auto layout, auto pack) {
    const auto kernel = forward<decltype(logits), decltype(target), layout(), pack()>;
    launch_forward(device, kernel, problem, pack(), call.loss);
  });
}

}  // namespace torchce::cuda
