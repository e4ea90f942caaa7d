// The forward of binary_divergence on CUDA: choice of kernel, scratch memory, launch.
#include "backend.h"
#include "binary_divergence.cuh"
#include "binary_divergence_launch.h"

namespace torchce::cuda {

void Backend::run(const DeviceScope& device, const host::binary_divergence::ForwardCall& call) {
  using namespace binary_divergence;
  const Elements& problem = call.elements.problem.elements;
  if (problem.numel == 0 && problem.options.reduction == Reduction::none) return;
  with_kernel_of(call.formula, problem, [&](auto terms, auto storage, auto layout, auto pack) {
    const auto kernel = binary_forward<decltype(terms), decltype(storage), layout(), pack()>;
    launch_forward(device, kernel, problem, pack(), call.elements.loss);
  });
}

}  // namespace torchce::cuda
