// How the elements of a sigmoid_bce problem lie in memory, as far as the kernels differ in it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../storage.h"

namespace torchce::cuda::sigmoid_bce {

using namespace torchce::sigmoid_bce;

enum class Layout {
  dense,    // all operands side by side in one order, without weights
  columns,  // the same, with weights that all rows share: one for each column, or one for all
  strided,  // anything else: every operand has its own strides
};

struct Plan {
  Layout layout;
  bool packs;  // words of up to 16 bytes, or else single elements
};

// Whether an operand is there and has an element for each of the logits, unlike a reduced loss and its gradient.
inline bool has_the_shape(const Elements& problem, Operand operand) {
  const bool is_gradient = operand == kOutput && problem.data[kGradOutput] != nullptr;
  if ((operand == kOutput && !is_gradient) || operand == kGradOutput) {
    if (problem.options.reduction != Reduction::none) return false;
  }
  return operand == kOutput || problem.data[operand] != nullptr;
}

// Whether a pack's elements can be read as words, where they are side by side.
inline bool has_words(const Elements& problem, Operand operand, int pack) {
  const void* data = operand == kOutput ? problem.output : problem.data[operand];
  const int64_t word = std::min<int64_t>(16, pack * bytes_of(problem.dtypes[operand]));
  return reinterpret_cast<uintptr_t>(data) % word == 0;
}

// Whether the operand's elements are side by side, in the problem's order.
inline bool is_dense(const Elements& problem, Operand operand) {
  int64_t stride = 1;
  for (int d = problem.dims - 1; d >= 0; --d) {
    if (problem.strides[operand][d] != stride) return false;
    stride *= problem.sizes[d];
  }
  return true;
}

// Whether the operand repeats from row to row.
inline bool repeats_rows(const Elements& problem, Operand operand) {
  const int64_t* strides = problem.strides[operand];
  return std::all_of(strides, strides + problem.dims - 1, [](int64_t stride) { return stride == 0; });
}

// Whether the operand has one element for all.
inline bool repeats(const Elements& problem, Operand operand) {
  return repeats_rows(problem, operand) && problem.strides[operand][problem.dims - 1] == 0;
}

// Whether every pack of the innermost dimension can be read as words; weights and upstream gradients may repeat in it.
inline bool has_packs(const Elements& problem, int pack) {
  const int inner = problem.dims - 1;
  if (problem.sizes[inner] % pack != 0) return false;
  for (const Operand operand : {kLogits, kTarget, kWeight, kPosWeight, kGradOutput, kOutput}) {
    if (!has_the_shape(problem, operand)) continue;
    const int64_t* strides = problem.strides[operand];
    const bool may_repeat = operand == kWeight || operand == kPosWeight || operand == kGradOutput;
    if (may_repeat && strides[inner] == 0) continue;
    if (strides[inner] != 1 || !has_words(problem, operand, pack)) return false;
    if (std::any_of(strides, strides + inner, [&](int64_t stride) { return stride % pack != 0; })) return false;
  }
  return true;
}

// Chooses the layout, and whether threads take packs; `pack` elements of logits are 16 bytes.
inline Plan plan(const Elements& problem, int pack) {
  if (problem.numel == 0) return {Layout::strided, false};  // no kernel will look
  bool dense = true, weighted = false;
  for (const Operand operand : {kLogits, kTarget, kGradOutput, kOutput}) {
    if (!has_the_shape(problem, operand) || (operand == kGradOutput && repeats(problem, operand))) continue;
    dense = dense && is_dense(problem, operand) && has_words(problem, operand, pack);
  }
  for (const Operand operand : {kWeight, kPosWeight}) {
    if (problem.data[operand] == nullptr) continue;
    weighted = true;
    dense = dense && repeats_rows(problem, operand) && problem.strides[operand][problem.dims - 1] <= 1;
  }
  if (dense) return {weighted ? Layout::columns : Layout::dense, true};
  return {Layout::strided, has_packs(problem, pack)};
}

}  // namespace torchce::cuda::sigmoid_bce
