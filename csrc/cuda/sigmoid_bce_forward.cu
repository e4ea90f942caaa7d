// The forward of sigmoid_bce on CUDA: checks, memory, choice of kernel, launch.
#include "../host/sigmoid_bce.h"
#include "ops.h"
#include "scratch.h"
#include "sigmoid_bce.cuh"
#include "sigmoid_bce_launch.h"

namespace torchce::cuda {
namespace {

using namespace sigmoid_bce;

template <class T, class U, Layout layout, int V>
void launch_forward(const DeviceScope& device, const Elements& problem, const Tensor& loss) {
  const auto kernel = forward<T, U, layout, V>;
  const Grid grid = grid_for(device, kernel, problem.numel / V);
  const Scratch scratch(device, loss, grid.blocks * int64_t(sizeof(LossSums)));
  launch(device, kernel, grid, problem, GridScratch{reinterpret_cast<LossSums*>(scratch.data), scratch.counters});
}

}  // namespace

Tensor sigmoid_bce_forward(Tensor logits, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> pos_weight,
                           int64_t reduction, std::optional<ScalarType> dtype) {
  const DeviceScope device(logits);
  const auto call = host::sigmoid_bce::prepare_forward(logits, target, weight, pos_weight, reduction, dtype);
  const Elements& problem = call.problem.elements;
  if (problem.numel == 0 && problem.reduction == Reduction::none) return call.loss;
  with_kernel(problem, [&](auto logits, auto target, auto layout, auto pack) {
    launch_forward<decltype(logits), decltype(target), layout(), pack()>(device, problem, call.loss);
  });
  return call.loss;
}

}  // namespace torchce::cuda
