// Memory that the blocks of one launch share.
#pragma once

#include "device.h"

namespace torchce::cuda {

// Memory for `bytes` bytes, allocated as doubles, and behind it a place for the counters (device.h).
struct Scratch {
  torch::stable::Tensor memory;
  double* data;
  unsigned* counters;  // each zero before the launch, and again after it

  Scratch(const DeviceScope& device, const torch::stable::Tensor& like, int64_t bytes, unsigned count = 1) {
    const auto doubles_of = [](int64_t size) { return (size + int64_t(sizeof(double)) - 1) / int64_t(sizeof(double)); };
    memory = host::empty({doubles_of(bytes) + doubles_of(int64_t(count) * int64_t(sizeof(unsigned)))},
                         host::ScalarType::Double, like);
    data = static_cast<double*>(memory.mutable_data_ptr());
    counters = device.counters(count, data + doubles_of(bytes));
  }
};

}  // namespace torchce::cuda
