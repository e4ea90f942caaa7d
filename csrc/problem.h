// The two canonical problems, as plain structs: what the host code of an op hands to a CPU or CUDA kernel.
// No torch header here, so that kernels and their emulation need none.
#pragma once

#include <cstdint>
#include <tuple>

namespace torchce {

enum class Reduction : int64_t { none = 0, mean = 1, sum = 2 };  // torch's numbers
enum class GradientOf { logits, target, scale };                 // which one a backward computes

// Element types the kernels read.
enum class DType : int { float64, float32, bfloat16, float16, int64, int32, uint8 };

constexpr bool is_floating(DType dtype) { return dtype <= DType::float16; }

// Steps, in elements, along the outer (N), class (C) and inner (S) dimension. Operands without classes leave that 0.
struct RowStrides {
  int64_t outer;
  int64_t classes;
  int64_t inner;
};

namespace softmax_ce {

// What a call asks for beside its tensors. kFields is the order of the schemas' fragment (schemas.h) and of the Options
// in torchce/softmax_ce_formulas.py; a new option comes last, with a default.
struct Options {
  Reduction reduction;
  int64_t ignore_index;
  double label_smoothing;
  double z_loss = 0;
  double softcap = 0;  // 0: none
  double logit_scale = 1;

  static constexpr std::tuple kFields{&Options::reduction, &Options::ignore_index, &Options::label_smoothing,
                                      &Options::z_loss,    &Options::softcap,      &Options::logit_scale};

  constexpr bool transforms() const { return softcap != 0 || logit_scale != 1; }
  constexpr bool are_plain() const { return z_loss == 0 && !transforms(); }
};

// Torch's own options, which are all that an op for plain losses takes: each further one would cost a call 0.2 us.
struct PlainOptions : Options {
  static constexpr std::tuple kFields{&Options::reduction, &Options::ignore_index, &Options::label_smoothing};
};

// Rows of logits [N, C, S]; row r = n * S + s. Shared by forward and backward.
struct Rows {
  int64_t outer;       // N
  int64_t classes;     // C
  int64_t inner;       // S
  const void* logits;  // [N, C, S]
  RowStrides logits_strides;
  DType dtype;         // of the logits
  const void* target;  // indices [N, S] or probabilities [N, C, S]
  RowStrides target_strides;
  DType target_dtype;  // an integer type: indices
  const void* weight;  // [C] of the accumulation type, or null: all ones
  const void* scale;   // one element of the accumulation type, which multiplies options.logit_scale, or null: 1
  DType accumulation;  // acc of schemas.h
  Options options;
  bool is_general;  // whether an option or output is asked for that a plain loss has not
  bool every_row;   // whether an ignored row is read as well: more than its loss is wanted

  // Whether the loss is of something else than the logits (softmax_ce_logit.h).
  constexpr bool are_transformed() const { return options.transforms() || scale != nullptr; }
};

// Row statistics are [2, N * S] = (max, sum exp(x - max)), and with probabilities a row more, U = sum_k u_k
// (math/softmax_ce.h); where entropies are returned a last one, the mean of x - max under softmax(x). totals is [2] =
// (divisor of the mean, U of a row with a class index). Both are of the accumulation type.
struct Forward {
  Rows rows;
  void* loss;  // [N, S] contiguous, or one element
  DType loss_dtype;
  void* statistics;
  void* totals;
  void* lse;             // [N, S] contiguous, of the accumulation type, or null
  int64_t* predictions;  // [N, S] contiguous, or null
  void* entropy;         // [N, S] contiguous, of the accumulation type, or null
};

struct Backward {
  Rows rows;
  const void* grad_output;  // [N, S] with strides, or one element
  RowStrides grad_output_strides;
  DType grad_output_dtype;
  const void* grad_lse;  // [N, S] with strides, of the accumulation type, or null
  RowStrides grad_lse_strides;
  const void* grad_entropy;  // [N, S] with strides, of the accumulation type, or null
  RowStrides grad_entropy_strides;
  const void* statistics;
  const void* totals;
  void* grad;  // [N, C, S] in the logits' (for the target's gradient, the target's) dtype; may be the logits
               // themselves; for the scale's gradient [N, S] contiguous, of the accumulation type
  RowStrides grad_strides;
};

}  // namespace softmax_ce

namespace sigmoid_bce {

// What a call asks for beside its tensors: the same contract as softmax_ce::Options has.
struct Options {
  Reduction reduction;

  static constexpr std::tuple kFields{&Options::reduction};
};

constexpr int kMaxDims = 16;

// Elements of one shape, after dimensions that all operands step through evenly were merged: the last is the innermost.
// A broadcast operand has stride 0 where it repeats, so weights of shape [C] or [C, 1, 1] cost no memory.
enum Operand { kLogits, kTarget, kWeight, kPosWeight, kGradOutput, kOutput, kOperands };

struct Elements {
  int dims;
  int64_t sizes[kMaxDims];
  int64_t strides[kOperands][kMaxDims];
  int64_t numel;
  const void* data[kOperands];  // null: an operand that is absent (weights of one; no unreduced loss)
  DType dtypes[kOperands];      // weights are of the accumulation type
  Options options;
  void* output;  // unreduced loss, gradient (may be the logits themselves), or the one reduced loss
};

}  // namespace sigmoid_bce
}  // namespace torchce
