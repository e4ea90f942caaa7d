// Memory that the blocks of one launch share.
#pragma once

#include "device.h"

namespace torchce::cuda {

// As doubles, of which one more than asked for is the place of the counter (device.h).
struct Scratch {
  torch::stable::Tensor memory;
  double* data;
  unsigned* counter;

  Scratch(const DeviceScope& device, const torch::stable::Tensor& like, int64_t bytes) {
    const int64_t doubles = (bytes + int64_t(sizeof(double)) - 1) / int64_t(sizeof(double));
    memory = host::empty({doubles + 1}, host::ScalarType::Double, like);
    data = static_cast<double*>(memory.mutable_data_ptr());
    counter = device.counter(data + doubles);
  }
};

}  // namespace torchce::cuda
