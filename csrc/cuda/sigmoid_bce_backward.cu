// The backwards of sigmoid_bce on CUDA: choice of kernel, launch.
#include "backend.h"
#include "sigmoid_bce.cuh"
#include "sigmoid_bce_launch.h"

namespace torchce::cuda {
namespace {

using namespace sigmoid_bce;

template <class T, class U, GradientOf of, Layout layout, int V>
void launch_backward(const DeviceScope& device, const Elements& problem) {
  const auto kernel = backward<T, U, of, layout, V>;
  launch(device, kernel, grid_for(device, kernel, problem.numel / V), problem);
}

template <GradientOf of>
void run_kernel(const DeviceScope& device, const Elements& problem) {
  if (problem.numel == 0) return;
  with_kernel(problem, [&](auto logits, auto target, auto layout, auto pack) {
    using U = decltype(target);
    if constexpr (of == GradientOf::logits || !std::is_integral_v<U>) {
      launch_backward<decltype(logits), U, of, layout(), pack()>(device, problem);
    }
  });
}

}  // namespace

void Backend::run(const DeviceScope& device, const host::sigmoid_bce::BackwardCall& call) {
  if (call.of == GradientOf::target) {
    run_kernel<GradientOf::target>(device, call.problem.elements);
  } else {
    run_kernel<GradientOf::logits>(device, call.problem.elements);
  }
}

}  // namespace torchce::cuda
