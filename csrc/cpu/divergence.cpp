// divergence on the CPU: rows spread over cores in chunks that do not depend on how many there are.
#include <algorithm>

#include "backend.h"
#include "levels.h"
#include "memory.h"
#include "reduce.h"

namespace torchce::cpu {
namespace {

using divergence::Rows;

// A chunk has rows of some 2^15 classes, so that small problems stay on one core, and whole strips of rows where as
// many fit.
int64_t rows_per_chunk(const Rows& rows) {
  constexpr int64_t kClasses = 1 << 15;
  const int64_t together = kernels().rows_across;
  const int64_t fitting = kClasses / std::max<int64_t>(rows.classes, 1);
  if (fitting >= together) return fitting / together * together;
  return rows.first.strides.classes == 1 ? std::max<int64_t>(fitting, 1) : together;
}

}  // namespace

void Backend::run(const Scope&, const host::divergence::ForwardCall& call) {
  const Rows& rows = call.args.rows;
  const Partial total =
      sum_over_chunks(call.problem.count(), rows_per_chunk(rows), [&](int64_t begin, int64_t end, Partial* partial) {
        kernels().divergence_forward(call.args, begin, end, partial);
      });
  store_as(rows.accumulation, call.args.totals, 0, total.weight);
  store_reduced(rows.options.reduction, total.loss, total.weight, call.args.loss_dtype, call.args.loss);
}

void Backend::run(const Scope&, const host::divergence::BackwardCall& call) {
  if (call.args.first.data != nullptr) advise_huge_pages(call.first());
  if (call.args.other.data != nullptr) advise_huge_pages(call.other());
  for_each_chunk(call.problem.count(), rows_per_chunk(call.args.rows),
                 [&](int64_t begin, int64_t end) { kernels().divergence_backward(call.args, begin, end); });
}

}  // namespace torchce::cpu
