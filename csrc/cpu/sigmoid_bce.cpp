// sigmoid_bce on the CPU: elements spread over cores in chunks that do not depend on how many there are.
#include "backend.h"
#include "levels.h"
#include "memory.h"
#include "reduce.h"

namespace torchce::cpu {
namespace {

constexpr int64_t kChunk = 1 << 14;  // elements

}  // namespace

void Backend::run(const Scope&, const host::sigmoid_bce::ForwardCall& call) {
  const auto& elements = call.problem.elements;
  if (elements.options.reduction == Reduction::none) advise_huge_pages(call.loss);
  const Partial total = sum_over_chunks(elements.numel, kChunk, [&](int64_t begin, int64_t end, Partial* partial) {
    kernels().sigmoid_bce_forward(elements, begin, end, partial);
  });
  store_reduced(elements.options.reduction, total.loss, double(elements.numel), elements.dtypes[sigmoid_bce::kOutput],
                elements.output);
}

void Backend::run(const Scope&, const host::sigmoid_bce::BackwardCall& call) {
  const auto& elements = call.problem.elements;
  if (!call.in_place()) advise_huge_pages(call.grad);
  const auto kernel =
      call.of == GradientOf::target ? kernels().sigmoid_bce_backward_target : kernels().sigmoid_bce_backward;
  for_each_chunk(elements.numel, kChunk, [&](int64_t begin, int64_t end) { kernel(elements, begin, end); });
}

}  // namespace torchce::cpu
