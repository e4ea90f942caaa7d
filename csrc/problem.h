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

// Rows [N, C, S], each of C classes; row r = n * S + s.
struct RowShape {
  int64_t outer;    // N
  int64_t classes;  // C
  int64_t inner;    // S
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

// Rows of logits. Shared by forward and backward.
struct Rows : RowShape {
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

namespace divergence {

// Of a student Q, which is softmax(input / temperature), and a teacher P: sum_k P_k log(P_k / Q_k), the same with both
// in each other's place, beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q; or the entropy of Q.
enum class Kind : int64_t { kl = 0, reverse_kl = 1, js = 2, entropy = 3 };

// What a call asks for beside its tensors: the same contract as softmax_ce::Options has.
struct Options {
  Kind kind;
  Reduction reduction;
  bool target_logits;  // whether the target holds the teacher's logits, not its probabilities
  double temperature = 1;
  double beta = 0.5;

  static constexpr std::tuple kFields{&Options::kind, &Options::reduction, &Options::target_logits,
                                      &Options::temperature, &Options::beta};
};

// What an operand says of a distribution; `none`: there is no such operand.
enum class Side { none, logits, probabilities };

struct Operand {
  Side side;
  const void* data;  // [N, C, S]
  RowStrides strides;
  DType dtype;
};

// Rows of two distributions, by the part they have in the kernels' formulas (math/divergence.h): `first` weighs the
// logarithms of a KL divergence, and is the teacher of a JS divergence. An entropy has no other one.
struct Rows : RowShape {
  Operand first, other;
  const uint8_t* mask;  // [N, S], 0 where a row is left out, or null
  RowStrides mask_strides;
  DType accumulation;
  Options options;

  constexpr bool are_js() const { return options.kind == Kind::js; }
};

// How many statistics a row has: of logits the largest and sum exp(x - largest), of the first one's probabilities their
// sum; then the KL divergence (of an entropy its negative), or the two terms of a JS divergence.
constexpr int statistics_of(Side side, bool is_first) {
  return side == Side::logits ? 2 : side == Side::probabilities && is_first ? 1 : 0;
}
constexpr int statistics_of(const Rows& rows) {
  return statistics_of(rows.first.side, true) + statistics_of(rows.other.side, false) + (rows.are_js() ? 2 : 1);
}

// totals is one element, the number of rows that are kept. It and the statistics are of the accumulation type.
struct Forward {
  Rows rows;
  void* loss;  // [N, S] contiguous, or one element
  DType loss_dtype;
  void* statistics;
  void* totals;
};

// A gradient that is wanted, of the operand's dtype; else `data` is null.
struct Gradient {
  void* data;
  RowStrides strides;
};

struct Backward {
  Rows rows;
  const void* grad_output;  // [N, S] with strides, or one element
  RowStrides grad_output_strides;
  DType grad_output_dtype;
  const void* statistics;
  const void* totals;
  Gradient first, other;
};

}  // namespace divergence

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

namespace binary_divergence {

// The same contract as softmax_ce::Options has.
struct Options {
  Reduction reduction;
  bool target_logits;

  static constexpr std::tuple kFields{&Options::reduction, &Options::target_logits};
};

// What is computed of every element of a sigmoid_bce problem without weights: KL(target || logits) of a target that is
// a logit or a probability, or the entropy of the logits, which are the target then too.
enum class Formula { of_logits, of_probability, entropy };

}  // namespace binary_divergence
}  // namespace torchce
