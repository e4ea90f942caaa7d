// What one op of softmax_ce launches for another.
#pragma once

#include "../host/softmax_ce.h"
#include "device.h"

namespace torchce::cuda {

void launch_softmax_ce_forward(const DeviceScope& device, const host::softmax_ce::ForwardCall& call);

// The gradient of the logits.
void launch_softmax_ce_backward(const DeviceScope& device, const host::softmax_ce::BackwardCall& call);

}  // namespace torchce::cuda
