// Which function implements which op on CUDA.
#pragma once

#include <torch/csrc/stable/library.h>

#include "ops.h"

namespace torchce::cuda {

template <class Library>
void implement_ops(Library& m) {
  m.impl("softmax_ce_forward", TORCH_BOX(&softmax_ce_forward));
  m.impl("softmax_ce_backward", TORCH_BOX(&softmax_ce_backward));
  m.impl("softmax_ce_backward_", TORCH_BOX(&softmax_ce_backward_));
  m.impl("softmax_ce_backward_target", TORCH_BOX(&softmax_ce_backward_target));
  m.impl("softmax_ce_forward_backward_", TORCH_BOX(&softmax_ce_forward_backward_));
  m.impl("sigmoid_bce_forward", TORCH_BOX(&sigmoid_bce_forward));
  m.impl("sigmoid_bce_backward", TORCH_BOX(&sigmoid_bce_backward));
  m.impl("sigmoid_bce_backward_", TORCH_BOX(&sigmoid_bce_backward_));
  m.impl("sigmoid_bce_backward_target", TORCH_BOX(&sigmoid_bce_backward_target));
}

}  // namespace torchce::cuda
