// The sigmoid_bce ops on the CPU: elements spread over cores in chunks that do not depend on how many there are.
#include "../host/sigmoid_bce.h"

#include "levels.h"
#include "memory.h"
#include "reduce.h"

namespace torchce::cpu {
namespace {

using namespace host;
using host::sigmoid_bce::BackwardCall;

constexpr int64_t kChunk = 1 << 14;  // elements

Tensor forward(Tensor logits, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> pos_weight,
               int64_t reduction, std::optional<ScalarType> dtype) {
  auto call = host::sigmoid_bce::prepare_forward(logits, target, weight, pos_weight, reduction, dtype);
  const auto& elements = call.problem.elements;
  if (elements.reduction == Reduction::none) advise_huge_pages(call.loss);
  const Partial total = sum_over_chunks(elements.numel, kChunk, [&](int64_t begin, int64_t end, Partial* partial) {
    kernels().sigmoid_bce_forward(elements, begin, end, partial);
  });
  store_reduced(elements.reduction, total.loss, double(elements.numel), elements.dtypes[torchce::sigmoid_bce::kOutput],
                elements.output);
  return call.loss;
}

template <class Kernel>
Tensor run_backward(const BackwardCall& call, Kernel kernel) {
  const auto& elements = call.problem.elements;
  if (elements.output != elements.data[torchce::sigmoid_bce::kLogits]) advise_huge_pages(call.grad);
  for_each_chunk(elements.numel, kChunk, [&](int64_t begin, int64_t end) { kernel(elements, begin, end); });
  return call.grad;
}

Tensor backward(Tensor grad_output, Tensor logits, Tensor target, std::optional<Tensor> weight,
                std::optional<Tensor> pos_weight, int64_t reduction) {
  return run_backward(
      host::sigmoid_bce::prepare_backward(grad_output, logits, target, weight, pos_weight, reduction, logits),
      kernels().sigmoid_bce_backward);
}

void backward_in_place(Tensor grad_output, Tensor logits, Tensor target, std::optional<Tensor> weight,
                       std::optional<Tensor> pos_weight, int64_t reduction) {
  run_backward(host::sigmoid_bce::prepare_backward(grad_output, logits, target, weight, pos_weight, reduction, logits,
                                                   /*in_place=*/true),
               kernels().sigmoid_bce_backward);
}

Tensor backward_target(Tensor grad_output, Tensor logits, Tensor target, std::optional<Tensor> weight,
                       std::optional<Tensor> pos_weight, int64_t reduction) {
  return run_backward(
      host::sigmoid_bce::prepare_backward(grad_output, logits, target, weight, pos_weight, reduction, target),
      kernels().sigmoid_bce_backward_target);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(torchce, CPU, m) {
  m.impl("sigmoid_bce_forward", TORCH_BOX(&forward));
  m.impl("sigmoid_bce_backward", TORCH_BOX(&backward));
  m.impl("sigmoid_bce_backward_", TORCH_BOX(&backward_in_place));
  m.impl("sigmoid_bce_backward_target", TORCH_BOX(&backward_target));
}

}  // namespace torchce::cpu
