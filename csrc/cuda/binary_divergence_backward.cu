// The backwards of binary_divergence on CUDA: choice of kernel, launch.
#include "backend.h"
#include "binary_divergence.cuh"
#include "binary_divergence_launch.h"

namespace torchce::cuda {
namespace {

using namespace binary_divergence;

template <GradientOf gradient_of>
void run_kernel(const DeviceScope& device, Formula formula, const Elements& problem) {
  if (problem.numel == 0) return;
  with_kernel_of(formula, problem, [&](auto terms, auto storage, auto layout, auto pack) {
    if constexpr (gradient_of == GradientOf::logits || !std::is_same_v<decltype(terms), Entropy>) {
      const auto kernel = binary_backward<decltype(terms), decltype(storage), gradient_of, layout(), pack()>;
      launch(device, kernel, grid_for(device, kernel, problem.numel / pack()), problem);
    }
  });
}

}  // namespace

void Backend::run(const DeviceScope& device, const host::binary_divergence::BackwardCall& call) {
  if (call.elements.of == GradientOf::target) {
    run_kernel<GradientOf::target>(device, call.formula, call.elements.problem.elements);
  } else {
    run_kernel<GradientOf::logits>(device, call.formula, call.elements.problem.elements);
  }
}

}  // namespace torchce::cuda
