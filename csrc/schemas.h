// The op schemas: the contract between Python and every device's kernels.
//
// A loss's options are one fragment, of the same fields in the same order as its Options in problem.h and in Python.
// They stand last, so that a new one is appended with a default. Shapes and meanings, with acc the accumulation dtype,
// which is float64 where the logits are float64, or probabilities or their weights are, else float32:
//
//   softmax_ce
//     logits       [C], [N, C] or [N, C, d1...dk], any strides
//     target       class indices, the logits' shape without C; or probabilities, the logits' shape, of the logits'
//                  dtype or float32; where acc is float64, logits and probabilities are of float32 or float64
//     weight       [C], acc
//     scale        a scalar, acc, which multiplies logit_scale; every value of a logit is NaN unless it is positive
//     loss         the index target's shape for reduction 0, else a scalar; of dtype, or the logits'
//     statistics   [2, rows] acc, max and sum of exp(x - max); a row more for probabilities, their total; and a last
//                  one where entropies are returned, the mean of x - max under softmax(x)
//     totals       [2] acc, the divisor of the mean, and what label smoothing's coefficients of a row add up to
//     lse          the index target's shape, acc; of ignored rows too
//     predictions  the index target's shape, the first class of the largest logit, of ignored rows too
//     entropy      the index target's shape, acc, that of softmax(x); of ignored rows too
//                  (all three are [0] where they are not wanted)
//     z_loss       times lse^2 is added to the loss of a row that is kept
//     softcap, logit_scale   softcap tanh(logit_scale x / softcap) stands for a logit x, with softcap 0 logit_scale x
//   sigmoid_bce
//     logits       any shape, any strides
//     target       the logits' shape; the logits' dtype, float32, bool, uint8 or int64
//     weight, pos_weight   broadcast to the logits' shape, acc
//     loss         the logits' shape and layout for reduction 0, else a scalar; of dtype, or the logits'
//   divergence, of a student and a teacher; acc is float64 where one of both is
//     input        the student's logits, as those of softmax_ce
//     target       the teacher's probabilities, or its logits where target_logits says so, of the input's shape and of
//                  any floating dtype; none where kind is 3
//     mask         bool or uint8, the input's shape without C; rows where it is 0 have no loss and no gradient
//     kind         0 KL(teacher || student), 1 KL(student || teacher), 2 JS, 3 the student's entropy
//     temperature  divides all logits
//     beta         JS is beta KL(teacher || M) + (1 - beta) KL(student || M), M = beta teacher + (1 - beta) student
//     loss         the input's shape without C for reduction 0, else a scalar; of dtype, or the input's
//     statistics   [n, rows] acc, what the backward needs of each row (problem.h)
//     totals       [1] acc, the number of rows that are kept, the divisor of a mean
//     needs_input, needs_target   which gradients are wanted; one that is not is [0]
//   binary_divergence, of a student's logit from a teacher's, elementwise
//     input        the student's logits, any shape, any strides
//     target       the teacher's probabilities, or its logits where target_logits says so, of the input's shape and of
//                  the input's dtype, or on the CPU float32; none for the entropy of the input
//     loss         as that of sigmoid_bce
//   all
//     grad_output  the loss's shape
//     a gradient   the shape, dtype and layout of the logits, or of the target; of the scale its rows' parts, in the
//                  index target's shape, acc
//     reduction    0 none, 1 mean, 2 sum
//
// The ops of outputs take every option, a scale, and the rows' lse and entropy and their gradients; probabilities
// beside those are of acc, and so are the logits where that is float64. softmax_ce_forward, _backward and _backward_
// are for plain losses.
//
// A name that ends in _ writes the gradient over the logits, whose memory must be dense. The CPU raises IndexError for
// a class index that is out of range and not ignore_index; CUDA makes that row NaN.
#pragma once

#define TORCHCE_SOFTMAX_CE_PLAIN_OPTIONS "int reduction, int ignore_index, float label_smoothing"
#define TORCHCE_SOFTMAX_CE_OPTIONS \
  TORCHCE_SOFTMAX_CE_PLAIN_OPTIONS ", float z_loss=0.0, float softcap=0.0, float logit_scale=1.0"
#define TORCHCE_SIGMOID_BCE_OPTIONS "int reduction"

#define TORCHCE_DIVERGENCE_OPTIONS "int kind, int reduction, bool target_logits, float temperature=1.0, float beta=0.5"
#define TORCHCE_BINARY_DIVERGENCE_OPTIONS "int reduction, bool target_logits"

#define TORCHCE_SOFTMAX_CE_TARGET "Tensor target, Tensor? weight, "
#define TORCHCE_SOFTMAX_CE_OF_FORWARD "Tensor statistics, Tensor totals, "
#define TORCHCE_SOFTMAX_CE_SAVED TORCHCE_SOFTMAX_CE_TARGET TORCHCE_SOFTMAX_CE_OF_FORWARD
#define TORCHCE_SOFTMAX_CE_SCALED TORCHCE_SOFTMAX_CE_TARGET "Tensor? scale, "
#define TORCHCE_SOFTMAX_CE_SCALED_SAVED TORCHCE_SOFTMAX_CE_SCALED TORCHCE_SOFTMAX_CE_OF_FORWARD
#define TORCHCE_SOFTMAX_CE_GRADIENTS "Tensor grad_output, Tensor? grad_lse, Tensor? grad_entropy, "
#define TORCHCE_DIVERGENCE_TARGET "Tensor input, Tensor? target, Tensor? mask, "
#define TORCHCE_SIGMOID_BCE_TARGET "Tensor target, Tensor? weight, Tensor? pos_weight, "
#define TORCHCE_SIGMOID_BCE_BACKWARD TORCHCE_SIGMOID_BCE_TARGET TORCHCE_SIGMOID_BCE_OPTIONS
#define TORCHCE_BINARY_DIVERGENCE_TARGET "Tensor input, Tensor? target, "

namespace torchce {

// Defines the ops in a library's namespace.
template <class Library>
void define_ops(Library& m) {
  m.def("softmax_ce_forward(Tensor logits, " TORCHCE_SOFTMAX_CE_TARGET
        "ScalarType? dtype, " TORCHCE_SOFTMAX_CE_PLAIN_OPTIONS ") -> (Tensor loss, Tensor statistics, Tensor totals)");
  m.def(
      "softmax_ce_backward(Tensor grad_output, Tensor "
      "logits, " TORCHCE_SOFTMAX_CE_SAVED TORCHCE_SOFTMAX_CE_PLAIN_OPTIONS ") -> Tensor");
  m.def(
      "softmax_ce_backward_(Tensor grad_output, Tensor(a!) "
      "logits, " TORCHCE_SOFTMAX_CE_SAVED TORCHCE_SOFTMAX_CE_PLAIN_OPTIONS ") -> ()");
  m.def("softmax_ce_forward_outputs(Tensor logits, " TORCHCE_SOFTMAX_CE_SCALED
        "ScalarType? dtype, bool returns_lse, bool returns_predictions, bool "
        "returns_entropy, " TORCHCE_SOFTMAX_CE_OPTIONS
        ") -> (Tensor loss, Tensor lse, Tensor predictions, Tensor entropy, Tensor statistics, Tensor totals)");
  m.def("softmax_ce_backward_outputs(" TORCHCE_SOFTMAX_CE_GRADIENTS
        "Tensor logits, " TORCHCE_SOFTMAX_CE_SCALED_SAVED TORCHCE_SOFTMAX_CE_OPTIONS ") -> Tensor");
  m.def("softmax_ce_backward_outputs_(" TORCHCE_SOFTMAX_CE_GRADIENTS
        "Tensor(a!) logits, " TORCHCE_SOFTMAX_CE_SCALED_SAVED TORCHCE_SOFTMAX_CE_OPTIONS ") -> ()");
  m.def("softmax_ce_backward_scale(" TORCHCE_SOFTMAX_CE_GRADIENTS
        "Tensor logits, " TORCHCE_SOFTMAX_CE_SCALED_SAVED TORCHCE_SOFTMAX_CE_OPTIONS ") -> Tensor");
  m.def(
      "softmax_ce_backward_target(Tensor grad_output, Tensor "
      "logits, " TORCHCE_SOFTMAX_CE_SCALED_SAVED TORCHCE_SOFTMAX_CE_OPTIONS ") -> Tensor");
  m.def("softmax_ce_forward_backward_(Tensor grad_output, Tensor(a!) logits, " TORCHCE_SOFTMAX_CE_TARGET
        "ScalarType? dtype, " TORCHCE_SOFTMAX_CE_OPTIONS ") -> Tensor");
  m.def("divergence_forward(" TORCHCE_DIVERGENCE_TARGET "ScalarType? dtype, " TORCHCE_DIVERGENCE_OPTIONS
        ") -> (Tensor loss, Tensor statistics, Tensor totals)");
  m.def("divergence_backward(Tensor grad_output, " TORCHCE_DIVERGENCE_TARGET
        "Tensor statistics, Tensor totals, bool needs_input, bool needs_target, " TORCHCE_DIVERGENCE_OPTIONS
        ") -> (Tensor grad_input, Tensor grad_target)");
  m.def("sigmoid_bce_forward(Tensor logits, " TORCHCE_SIGMOID_BCE_TARGET
        "ScalarType? dtype, " TORCHCE_SIGMOID_BCE_OPTIONS ") -> Tensor");
  m.def("sigmoid_bce_backward(Tensor grad_output, Tensor logits, " TORCHCE_SIGMOID_BCE_BACKWARD ") -> Tensor");
  m.def("sigmoid_bce_backward_(Tensor grad_output, Tensor(a!) logits, " TORCHCE_SIGMOID_BCE_BACKWARD ") -> ()");
  m.def("sigmoid_bce_backward_target(Tensor grad_output, Tensor logits, " TORCHCE_SIGMOID_BCE_BACKWARD ") -> Tensor");
  m.def("binary_divergence_forward(" TORCHCE_BINARY_DIVERGENCE_TARGET
        "ScalarType? dtype, " TORCHCE_BINARY_DIVERGENCE_OPTIONS ") -> Tensor");
  m.def(
      "binary_divergence_backward(Tensor "
      "grad_output, " TORCHCE_BINARY_DIVERGENCE_TARGET TORCHCE_BINARY_DIVERGENCE_OPTIONS ") -> Tensor");
  m.def(
      "binary_divergence_backward_target(Tensor "
      "grad_output, " TORCHCE_BINARY_DIVERGENCE_TARGET TORCHCE_BINARY_DIVERGENCE_OPTIONS ") -> Tensor");
}

}  // namespace torchce
