// sigmoid_bce on the CPU: elements spread over cores in chunks that do not depend on how many there are.
#include "backend.h"
#include "levels.h"
#include "memory.h"
#include "sigmoid_bce_parts.h"

namespace torchce::cpu {
void Backend::run(const Scope&, const host::sigmoid_bce::ForwardCall& call) {
  const auto& elements = call.problem.elements;
  if (elements.options.reduction == Reduction::none) advise_huge_pages(call.loss);
  const Partial total = for_each_part(elements, [](const auto& part, int64_t begin, int64_t end, Partial* partial) {
    kernels().sigmoid_bce_forward(part, begin, end, partial);
  });
  store_reduced(elements, total.loss);
}

void Backend::run(const Scope&, const host::sigmoid_bce::BackwardCall& call) {
  const auto& elements = call.problem.elements;
  if (!call.in_place()) advise_huge_pages(call.grad);
  const auto kernel =
      call.of == GradientOf::target ? kernels().sigmoid_bce_backward_target : kernels().sigmoid_bce_backward;
  for_each_part(elements, [&](const auto& part, int64_t begin, int64_t end, Partial*) { kernel(part, begin, end); });
}

}  // namespace torchce::cpu
