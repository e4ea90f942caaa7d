// sigmoid_bce on the CPU: elements spread over cores in chunks that do not depend on how many there are.
#include "backend.h"
#include "levels.h"
#include "memory.h"
#include "reduce.h"
#include "sigmoid_bce_tiles.h"

namespace torchce::cpu {
namespace {

constexpr int64_t kChunk = 1 << 14;  // elements

// Calls f(problem, its first element, its last one's successor, where its losses are added) for chunks of the elements,
// or for tiles where an operand's fast dimension is not the others'; gives the sum of the losses.
template <class F>
Partial for_each_part(const sigmoid_bce::Elements& elements, const F& f) {
  const Tiles tiles = tiles_of(elements);
  if (tiles.count == 0) {
    return sum_over_chunks(elements.numel, kChunk,
                           [&](int64_t begin, int64_t end, Partial* partial) { f(elements, begin, end, partial); });
  }
  return sum_over_chunks(tiles.count, 1, [&](int64_t number, int64_t, Partial* partial) {
    const sigmoid_bce::Elements tile = tile_of(elements, tiles, number);
    f(tile, 0, tile.sizes[0] * tile.sizes[1], partial);
  });
}

}  // namespace

void Backend::run(const Scope&, const host::sigmoid_bce::ForwardCall& call) {
  const auto& elements = call.problem.elements;
  if (elements.options.reduction == Reduction::none) advise_huge_pages(call.loss);
  const Partial total = for_each_part(elements, [](const auto& part, int64_t begin, int64_t end, Partial* partial) {
    kernels().sigmoid_bce_forward(part, begin, end, partial);
  });
  store_reduced(elements.options.reduction, total.loss, double(elements.numel), elements.dtypes[sigmoid_bce::kOutput],
                elements.output);
}

void Backend::run(const Scope&, const host::sigmoid_bce::BackwardCall& call) {
  const auto& elements = call.problem.elements;
  if (!call.in_place()) advise_huge_pages(call.grad);
  const auto kernel =
      call.of == GradientOf::target ? kernels().sigmoid_bce_backward_target : kernels().sigmoid_bce_backward;
  for_each_part(elements, [&](const auto& part, int64_t begin, int64_t end, Partial*) { kernel(part, begin, end); });
}

}  // namespace torchce::cpu
