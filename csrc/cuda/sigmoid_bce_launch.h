// How the kernels of sigmoid_bce are chosen and laid over a problem.
#pragma once

#include "device.h"
#include "pack.cuh"
#include "reduce.cuh"
#include "scratch.h"
#include "sigmoid_bce_layout.h"
#include "sigmoid_bce_operands.cuh"

namespace torchce::cuda::sigmoid_bce {

template <Layout value>
using LayoutConstant = std::integral_constant<Layout, value>;
template <int value>
using PackConstant = std::integral_constant<int, value>;

// Calls f with the storage types of logits and targets, a layout and the elements of a pack.
template <class F>
void with_kernel(const Elements& problem, F f) {
  with_types(problem, [&](auto logits, auto target) {
    constexpr int kElements = kPack<decltype(logits)>;
    const Plan chosen = plan(problem, kElements);
    if (!chosen.packs) return f(logits, target, LayoutConstant<Layout::strided>{}, PackConstant<1>{});
    switch (chosen.layout) {
      case Layout::dense:
        return f(logits, target, LayoutConstant<Layout::dense>{}, PackConstant<kElements>{});
      case Layout::columns:
        return f(logits, target, LayoutConstant<Layout::columns>{}, PackConstant<kElements>{});
      case Layout::strided:
        return f(logits, target, LayoutConstant<Layout::strided>{}, PackConstant<kElements>{});
    }
  });
}

// The grid gives every thread one pack until the device is full.
template <class... Parameters>
Grid grid_for(const DeviceScope& device, void (*kernel)(Parameters...), int64_t packs) {
  const int64_t needed = (packs + kThreads - 1) / kThreads;
  return {std::clamp<int64_t>(needed, 1, std::max<int64_t>(device.resident_blocks(kernel, {kThreads}), 1)), {kThreads}};
}

// Launches a forward kernel whose threads take packs of so many elements, with the memory that its blocks share.
inline void launch_forward(const DeviceScope& device, void (*kernel)(Elements, GridScratch), const Elements& problem,
                           int pack, const host::Tensor& loss) {
  const Grid grid = grid_for(device, kernel, problem.numel / pack);
  const Scratch scratch(device, loss, grid.blocks * int64_t(sizeof(LossSums)));
  launch(device, kernel, grid, problem, GridScratch{reinterpret_cast<LossSums*>(scratch.data), scratch.counters});
}

}  // namespace torchce::cuda::sigmoid_bce
