// softmax_ce on the CPU: rows spread over cores in chunks that do not depend on how many there are.
#include <algorithm>

#include "../softmax_ce_row.h"
#include "backend.h"
#include "levels.h"
#include "memory.h"
#include "reduce.h"

namespace torchce::cpu {
namespace {

using host::softmax_ce::BackwardCall;
using host::softmax_ce::ForwardBackwardCall;
using host::softmax_ce::ForwardCall;
using softmax_ce::Rows;

// A chunk has rows of some 2^15 logits, so that small problems stay on one core, and whole groups or strips of rows
// where as many fit.
int64_t rows_per_chunk(const Rows& rows) {
  constexpr int64_t kLogits = 1 << 15;
  const bool adjacent_classes = rows.logits_strides.classes == 1;
  const int64_t together = adjacent_classes ? kernels().rows_along : kernels().rows_across;
  const int64_t fitting = kLogits / std::max<int64_t>(rows.classes, 1);
  if (fitting >= together) return fitting / together * together;
  return adjacent_classes ? std::max<int64_t>(fitting, 1) : together;
}

// U of a row with a class index; 0 without smoothing, and beside probabilities.
template <class A>
double sum_of_coefficients(const Rows& rows) {
  const double label_smoothing = rows.options.label_smoothing;
  if (label_smoothing == 0 || is_floating(rows.target_dtype)) return 0;
  if (rows.weight == nullptr) return label_smoothing;
  const A* weight = static_cast<const A*>(rows.weight);
  math::StridedSum<8, double> sum;  // added one after the other, they would take as long as a row's exponentials
  sum.add(rows.classes, [&](int64_t k) { return double(weight[k]); });
  return sum.value() / double(rows.classes) * label_smoothing;
}

template <class A>
void write_totals(const softmax_ce::Forward& call, double divisor) {
  A* totals = static_cast<A*>(call.totals);
  totals[0] = A(divisor);
  totals[1] = A(sum_of_coefficients<A>(call.rows));
}

void write_totals(const softmax_ce::Forward& call, double divisor) {
  if (call.rows.accumulation == DType::float64) {
    write_totals<double>(call, divisor);
  } else {
    write_totals<float>(call, divisor);
  }
}

[[noreturn]] void throw_bad_target(const ForwardCall& call, int64_t row) {
  const auto& rows = call.problem.rows;
  std::ostringstream message;
  message << "Target " << softmax_ce::TargetClass::target_at(rows, RowPosition(rows, row)) << " is out of bounds. (row "
          << row << " of " << call.problem.count() << ", " << rows.classes << " classes)";
  throw std::out_of_range(message.str());
}

// The first row whose target is no class, or -1; looked for on all cores.
int64_t first_bad_row(const Rows& rows) {
  constexpr int64_t kRows = 1 << 15;  // of one chunk
  if (is_floating(rows.target_dtype)) return -1;
  const auto look = [&](int64_t begin, int64_t end, Partial* partial) {
    partial->bad_row = softmax_ce::first_bad_row(rows, begin, end);
  };
  return sum_over_chunks(rows.outer * rows.inner, kRows, look).bad_row;
}

}  // namespace

void Backend::run(const Scope&, const ForwardCall& call) {
  const Rows& rows = call.problem.rows;
  const int64_t count = call.problem.count();
  const Partial total = sum_over_chunks(count, rows_per_chunk(rows), [&](int64_t begin, int64_t end, Partial* partial) {
    kernels().softmax_ce_forward(call.args, begin, end, partial);
    if (call.args.predictions != nullptr) kernels().softmax_ce_predict(call.args, begin, end);
    if (call.args.entropy != nullptr) kernels().softmax_ce_entropies(call.args, begin, end);
  });
  if (total.bad_row >= 0) throw_bad_target(call, total.bad_row);
  const double divisor = call.problem.probabilities() ? double(count) : total.weight;
  write_totals(call.args, divisor);
  store_reduced(rows.options.reduction, total.loss, divisor, call.args.loss_dtype, call.args.loss);
}

void Backend::run(const Scope&, const BackwardCall& call) {
  if (!call.in_place()) advise_huge_pages(call.grad);
  const auto kernel = call.of == GradientOf::target  ? kernels().softmax_ce_backward_target
                      : call.of == GradientOf::scale ? kernels().softmax_ce_backward_scale
                                                     : kernels().softmax_ce_backward;
  for_each_chunk(call.problem.count(), rows_per_chunk(call.problem.rows),
                 [&](int64_t begin, int64_t end) { kernel(call.args, begin, end); });
}

// Forward and backward take turns chunk by chunk, so that the backward finds the logits in cache. Targets are checked
// before, while the logits are still there.
void Backend::run(const Scope&, const ForwardBackwardCall& call) {
  const ForwardCall& forward = call.forward;
  const Rows& rows = forward.problem.rows;
  const int64_t bad_row = first_bad_row(rows);
  if (bad_row >= 0) throw_bad_target(forward, bad_row);
  write_totals(forward.args, 1);
  const Partial total =
      sum_over_chunks(forward.problem.count(), rows_per_chunk(rows), [&](int64_t begin, int64_t end, Partial* partial) {
        kernels().softmax_ce_forward(forward.args, begin, end, partial);
        kernels().softmax_ce_backward(call.backward.args, begin, end);
      });
  store_reduced(rows.options.reduction, total.loss, 1, forward.args.loss_dtype, forward.args.loss);
}

}  // namespace torchce::cpu
