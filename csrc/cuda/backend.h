// CUDA's part of every op (ops.h): the choice of a kernel, its launch, the memory that its blocks share.
#pragma once

#include "../host/binary_divergence.h"
#include "../host/divergence.h"
#include "../host/sigmoid_bce.h"
#include "../host/softmax_ce.h"
#include "device.h"

namespace torchce::cuda {

struct Backend {
  using Scope = DeviceScope;

  static void run(const DeviceScope& device, const host::softmax_ce::ForwardCall& call);
  static void run(const DeviceScope& device, const host::softmax_ce::BackwardCall& call);
  static void run(const DeviceScope& device, const host::softmax_ce::ForwardBackwardCall& call);
  static void run(const DeviceScope& device, const host::sigmoid_bce::ForwardCall& call);
  static void run(const DeviceScope& device, const host::sigmoid_bce::BackwardCall& call);
  static void run(const DeviceScope& device, const host::binary_divergence::ForwardCall& call);
  static void run(const DeviceScope& device, const host::binary_divergence::BackwardCall& call);
  static void run(const DeviceScope& device, const host::divergence::ForwardCall& call);
  static void run(const DeviceScope& device, const host::divergence::BackwardCall& call);
};

}  // namespace torchce::cuda
