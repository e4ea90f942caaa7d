// Stands in for CUDA's header of this name, as cuda_runtime.h does: clusters.
#pragma once

#include "machine.h"

namespace cooperative_groups {

struct cluster_group {
  static void sync(cuda_emulation::Site site = cuda_emulation::Site::current()) {
    cuda_emulation::cluster_barrier(site);
  }

  template <class T>
  static T* map_shared_rank(T* p, unsigned rank, cuda_emulation::Site site = cuda_emulation::Site::current()) {
    return static_cast<T*>(cuda_emulation::shared_memory_of(p, rank, site));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
