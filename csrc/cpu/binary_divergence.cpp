// binary_divergence on the CPU, spread over cores as sigmoid_bce is.
#include "backend.h"
#include "memory.h"
#include "sigmoid_bce_parts.h"

namespace torchce::cpu {

void Backend::run(const Scope&, const host::binary_divergence::ForwardCall& call) {
  const auto& elements = call.elements.problem.elements;
  if (elements.options.reduction == Reduction::none) advise_huge_pages(call.elements.loss);
  const Partial total = for_each_part(elements, [&](const auto& part, int64_t begin, int64_t end, Partial* partial) {
    kernels().binary_divergence_forward(part, call.formula, begin, end, partial);
  });
  store_reduced(elements, total.loss);
}

void Backend::run(const Scope&, const host::binary_divergence::BackwardCall& call) {
  advise_huge_pages(call.elements.grad);
  for_each_part(call.elements.problem.elements, [&](const auto& part, int64_t begin, int64_t end, Partial*) {
    kernels().binary_divergence_backward(part, call.formula, call.elements.of, begin, end);
  });
}

}  // namespace torchce::cpu
