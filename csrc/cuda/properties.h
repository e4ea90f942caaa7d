// What plans ask of a device.
#pragma once

namespace torchce::cuda {

struct Properties {
  int multiprocessors = 0;
  int shared_memory_of_block = 0;           // bytes, at most
  int shared_memory_of_multiprocessor = 0;  // bytes
  int largest_cluster = 1;                  // blocks; 1: the device, or the code compiled for it, has no clusters
};

}  // namespace torchce::cuda
