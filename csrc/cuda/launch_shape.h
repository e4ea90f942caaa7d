// The shape of every launch's blocks.
#pragma once

namespace torchce::cuda {

constexpr int kThreads = 256;  // of a block, in every kernel

// Blocks that must fit on a multiprocessor at once, for __launch_bounds__: three leave a thread 80 registers, enough
// for the plain kernels of float and 16-bit logits; two leave it 128. Left to itself, ptxas 13.0 rounds registers down
// to the next step of occupancy and spills what that costs.
constexpr int kBlocksOfPlain = 3;
constexpr int kBlocksToFit = 2;

}  // namespace torchce::cuda
