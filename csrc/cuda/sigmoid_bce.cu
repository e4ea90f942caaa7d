// The sigmoid_bce ops on CUDA: checks, memory, choice of kernel, launch.
#include "../host/sigmoid_bce.h"
#include "device.h"
#include "ops.h"
#include "scratch.h"
#include "sigmoid_bce.cuh"

namespace torchce::cuda {
namespace {

using namespace sigmoid_bce;
using host::sigmoid_bce::BackwardCall;

int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::float64:
    case DType::int64:
      return 8;
    case DType::float32:
    case DType::int32:
      return 4;
    case DType::uint8:
      return 1;
    default:
      return 2;
  }
}

// Whether packs of `pack` elements lie together in every operand or repeat one element, where words can reach them.
bool elements_are_packed(const Elements& problem, int pack) {
  const int inner = problem.dims - 1;
  if (problem.sizes[inner] % pack != 0) return false;
  for (int o = 0; o < kOperands; ++o) {
    const void* data = o == kOutput ? problem.output : problem.data[o];
    const bool of_the_shape = problem.reduction == Reduction::none || (o != kGradOutput && o != kOutput);
    const bool is_gradient = o == kOutput && problem.data[kGradOutput] != nullptr;
    if (data == nullptr || !(of_the_shape || is_gradient)) continue;
    const int64_t* strides = problem.strides[o];
    if (strides[inner] == 0) continue;
    if (strides[inner] != 1) return false;
    const int64_t word = std::min<int64_t>(16, pack * bytes_of(problem.dtypes[o]));
    if (reinterpret_cast<uintptr_t>(data) % word != 0) return false;
    for (int d = 0; d < inner; ++d) {
      if (strides[d] % pack != 0) return false;
    }
  }
  return true;
}

int64_t blocks_for(const DeviceScope& device, int64_t packs, int in_flight) {
  constexpr int64_t kBlocksPerProcessor = 8;  // of kThreads threads
  const int64_t needed = (packs + int64_t(kThreads) * in_flight - 1) / (int64_t(kThreads) * in_flight);
  return std::clamp<int64_t>(needed, 1, device.properties.multiprocessors * kBlocksPerProcessor);
}

template <class T, class U, int V>
void launch_forward(const DeviceScope& device, const Elements& problem, const Tensor& loss) {
  const int64_t blocks = blocks_for(device, problem.numel / V, kInFlight);
  const Scratch scratch(device, loss, blocks * int64_t(sizeof(Sums)));
  launch(device, forward<T, U, V>, Grid{blocks, {kThreads}}, problem,
         GridScratch{reinterpret_cast<Sums*>(scratch.data), scratch.counters});
}

template <class T, class U, Of of, int V>
void launch_backward(const DeviceScope& device, const Elements& problem) {
  launch(device, backward<T, U, of, V>, Grid{blocks_for(device, problem.numel / V, 1), {kThreads}}, problem);
}

template <Of of>
Tensor run_backward(const DeviceScope& device, const BackwardCall& call) {
  const Elements& problem = call.problem.elements;
  if (problem.numel == 0) return call.grad;
  with_types(problem, [&](auto logits_type, auto target_type) {
    using T = decltype(logits_type);
    using U = decltype(target_type);
    if constexpr (of == Of::logits || !std::is_integral_v<U>) {
      if (elements_are_packed(problem, kPack<T>)) {
        launch_backward<T, U, of, kPack<T>>(device, problem);
      } else {
        launch_backward<T, U, of, 1>(device, problem);
      }
    }
  });
  return call.grad;
}

}  // namespace

Tensor sigmoid_bce_forward(Tensor logits, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> pos_weight,
                           int64_t reduction, std::optional<ScalarType> dtype) {
  const DeviceScope device(logits);
  const auto call = host::sigmoid_bce::prepare_forward(logits, target, weight, pos_weight, reduction, dtype);
  const Elements& problem = call.problem.elements;
  if (problem.numel == 0 && problem.reduction == Reduction::none) return call.loss;
  with_types(problem, [&](auto logits_type, auto target_type) {
    using T = decltype(logits_type);
    using U = decltype(target_type);
    if (problem.numel > 0 && elements_are_packed(problem, kPack<T>)) {
      launch_forward<T, U, kPack<T>>(device, problem, call.loss);
    } else {
      launch_forward<T, U, 1>(device, problem, call.loss);
    }
  });
  return call.loss;
}

Tensor sigmoid_bce_backward(Tensor grad_output, Tensor logits, Tensor target, std::optional<Tensor> weight,
                            std::optional<Tensor> pos_weight, int64_t reduction) {
  const DeviceScope device(logits);
  return run_backward<Of::logits>(
      device, host::sigmoid_bce::prepare_backward(grad_output, logits, target, weight, pos_weight, reduction, logits));
}

void sigmoid_bce_backward_(Tensor grad_output, Tensor logits, Tensor target, std::optional<Tensor> weight,
                           std::optional<Tensor> pos_weight, int64_t reduction) {
  const DeviceScope device(logits);
  run_backward<Of::logits>(device, host::sigmoid_bce::prepare_backward(grad_output, logits, target, weight, pos_weight,
                                                                       reduction, logits, /*in_place=*/true));
}

Tensor sigmoid_bce_backward_target(Tensor grad_output, Tensor logits, Tensor target, std::optional<Tensor> weight,
                                   std::optional<Tensor> pos_weight, int64_t reduction) {
  const DeviceScope device(logits);
  return run_backward<Of::target>(
      device, host::sigmoid_bce::prepare_backward(grad_output, logits, target, weight, pos_weight, reduction, target));
}

}  // namespace torchce::cuda
