// Advice to the operating system about memory that a kernel is about to fill.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../host/tensor.h"

namespace torchce::cpu {

// Asks for huge pages under a large tensor, before anything is written to it. The allocator hands out blocks beyond 32
// MiB as fresh pages, which the kernel clears one fault at a time: at 4 KiB a page, that takes three times as long as
// computing a 64 MiB gradient (docs/decisions.md). Only whole huge pages inside the tensor are named, so it takes up no
// more memory than it did. Where the advice is refused, nothing changes.
inline void advise_huge_pages(const torch::stable::Tensor& t) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;  // of x86-64, and of AArch64 with 4 KiB pages
  constexpr size_t kWorthwhile = 4 * kHugePage;
  const size_t bytes = t.numel() * t.element_size();
  if (bytes < kWorthwhile) return;
  const uintptr_t data = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  const uintptr_t begin = (data + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (data + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace torchce::cpu
