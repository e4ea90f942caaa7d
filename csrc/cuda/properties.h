// What plans ask of a device.
#pragma once

namespace torchce::cuda {

constexpr int kPortableCluster = 8;  // blocks, that every device with clusters can place

struct Properties {
  int multiprocessors = 0;
  int shared_memory_of_block = 0;  // bytes, at most
  int largest_cluster = 1;         // blocks to ask for; 1: the device, or the code compiled for it, has no clusters
};

}  // namespace torchce::cuda
