// The ops on CUDA tensors; library.cpp registers them, torchce/ops.py gives their shapes.
#pragma once

#include <optional>
#include <tuple>

#include "../host/tensor.h"

namespace torchce::cuda {

using host::ScalarType;
using host::Tensor;

std::tuple<Tensor, Tensor, Tensor> softmax_ce_forward(Tensor logits, Tensor target, std::optional<Tensor> weight,
                                                      int64_t reduction, int64_t ignore_index, double label_smoothing,
                                                      std::optional<ScalarType> dtype);
Tensor softmax_ce_backward(Tensor grad_output, Tensor logits, Tensor target, std::optional<Tensor> weight,
                           Tensor statistics, Tensor totals, int64_t reduction, int64_t ignore_index,
                           double label_smoothing);
void softmax_ce_backward_(Tensor grad_output, Tensor logits, Tensor target, std::optional<Tensor> weight,
                          Tensor statistics, Tensor totals, int64_t reduction, int64_t ignore_index,
                          double label_smoothing);
Tensor softmax_ce_backward_target(Tensor grad_output, Tensor logits, Tensor target, std::optional<Tensor> weight,
                                  Tensor statistics, Tensor totals, int64_t reduction, double label_smoothing);
Tensor softmax_ce_forward_backward_(Tensor grad_output, Tensor logits, Tensor target, std::optional<Tensor> weight,
                                    int64_t reduction, int64_t ignore_index, double label_smoothing,
                                    std::optional<ScalarType> dtype);

Tensor sigmoid_bce_forward(Tensor logits, Tensor target, std::optional<Tensor> weight, std::optional<Tensor> pos_weight,
                           int64_t reduction, std::optional<ScalarType> dtype);
Tensor sigmoid_bce_backward(Tensor grad_output, Tensor logits, Tensor target, std::optional<Tensor> weight,
                            std::optional<Tensor> pos_weight, int64_t reduction);
void sigmoid_bce_backward_(Tensor grad_output, Tensor logits, Tensor target, std::optional<Tensor> weight,
                           std::optional<Tensor> pos_weight, int64_t reduction);
Tensor sigmoid_bce_backward_target(Tensor grad_output, Tensor logits, Tensor target, std::optional<Tensor> weight,
                                   std::optional<Tensor> pos_weight, int64_t reduction);

}  // namespace torchce::cuda
