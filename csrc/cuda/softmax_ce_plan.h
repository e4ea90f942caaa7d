// How the softmax_ce kernels are laid over a problem: which regime, how many threads share a row, how many blocks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../problem.h"
#include "properties.h"

namespace torchce::cuda::softmax_ce {

using namespace torchce::softmax_ce;

constexpr int kMostLanes = 32;
constexpr int kBlock = 256;             // threads, in every kernel
constexpr int kBlocksPerProcessor = 8;  // of that many threads a multiprocessor holds at most 8
constexpr int kPacksInFlight = 4;       // a thread's

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest power of two that is not less, up to `most`.
inline int power_of_two(int64_t at_least, int most) {
  int power = 1;
  while (power < at_least && power < most) power *= 2;
  return power;
}

// Whether kernels run along the rows: their classes are adjacent in memory, in every operand that has classes.
inline bool classes_are_adjacent(const Rows& rows, bool probabilities) {
  return rows.logits_strides.classes == 1 && (!probabilities || rows.target_strides.classes == 1);
}

// Rows without an inner dimension, seen as one image of rows: those that follow each other in N are then neighbours.
inline RowStrides turned(const RowStrides& strides) { return {0, strides.classes, strides.outer}; }
inline Rows turned(Rows rows) {
  rows.inner = rows.outer;
  rows.outer = 1;
  rows.logits_strides = turned(rows.logits_strides);
  rows.target_strides = turned(rows.target_strides);
  return rows;
}

// Whether packs of `pack` neighbouring rows lie together in an operand, where words can reach them.
inline bool rows_are_packed(const Rows& rows, const void* data, const RowStrides& strides, int pack) {
  return strides.inner == 1 && rows.inner % pack == 0 && strides.outer % pack == 0 && strides.classes % pack == 0 &&
         reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

enum class Regime { lanes, block, parts };

struct ForwardPlan {
  Regime regime;
  int lanes;     // that share a row
  int parts;     // blocks that share a row
  int64_t part;  // classes of each
  int64_t blocks;
};

// Parts to cut each of a few long rows into, or 1. Two blocks for each multiprocessor are enough to hide what one waits
// for; a part is so long that two warps of its block have a pack each.
inline int64_t parts_of_row(int64_t rows, int64_t classes, int pack, int multiprocessors) {
  constexpr int64_t kThreadsAtWork = 64;
  if (rows == 0 || rows >= multiprocessors) return 1;
  return std::clamp<int64_t>(classes / (kThreadsAtWork * pack), 1, ceil_div(2 * multiprocessors, rows));
}

// Classes of each of that many parts, in whole packs.
inline int64_t part_of_row(int64_t classes, int64_t parts, int pack) {
  return ceil_div(ceil_div(classes, parts), pack) * pack;
}

// Along the rows, `pack` classes in 16 bytes.
inline ForwardPlan plan_forward(int64_t rows, int64_t classes, int pack, int multiprocessors) {
  constexpr int64_t kPacksOfLane = 16;  // at most: then a block takes the row
  const int64_t resident = int64_t(multiprocessors) * kBlocksPerProcessor;
  const int64_t packs = ceil_div(classes, pack);
  if (packs <= kMostLanes * kPacksOfLane) {
    const int lanes = power_of_two(ceil_div(packs, kPacksInFlight), kMostLanes);
    return {Regime::lanes, lanes, 1, classes, std::min(resident, ceil_div(rows, kBlock / lanes))};
  }
  const int64_t parts = parts_of_row(rows, classes, pack, multiprocessors);
  if (parts > 1) {
    const int64_t part = part_of_row(classes, parts, pack);
    return {Regime::parts, 0, int(ceil_div(classes, part)), part, rows * ceil_div(classes, part)};
  }
  return {Regime::block, kBlock, 1, classes, std::min(resident, rows)};
}

struct AcrossPlan {
  int columns;  // packs of rows a block takes
  int64_t blocks;
};

// Across the rows, in `packs` packs of them: as few threads share a pack's classes as will fill the device, and at most
// as leave 8 packs, a full line of memory, side by side.
inline AcrossPlan plan_forward_across(int64_t packs, int64_t classes, int multiprocessors) {
  constexpr int kFewestColumns = 8;
  const int64_t wanted = int64_t(multiprocessors) * kBlocksPerProcessor * kBlock;  // threads
  int columns = kBlock;
  while (columns > kFewestColumns && packs * (kBlock / columns) < wanted && kBlock / columns < classes) columns /= 2;
  const int64_t resident = int64_t(multiprocessors) * kBlocksPerProcessor;
  return {columns, std::min(resident, ceil_div(packs, columns))};
}

struct BackwardPlan {
  int team;       // threads that share a part of a row
  int64_t parts;  // of a row
  int64_t part;   // classes of each
  int64_t blocks;
};

// Along the rows. A short row gets enough threads that they write side by side, two packs each; a long one is cut into
// parts of one batch of packs, or into more where there are few rows.
inline BackwardPlan plan_backward(int64_t rows, int64_t classes, int pack, int multiprocessors) {
  constexpr int64_t kSideBySide = 4;  // threads, for rows of less than two packs
  const int64_t packs = ceil_div(classes, pack);
  const bool is_short = packs <= kMostLanes * kPacksInFlight;
  int team = is_short ? power_of_two(std::max(ceil_div(packs, 2), std::min(classes, kSideBySide)), kMostLanes)
                      : power_of_two(ceil_div(packs, kPacksInFlight), kBlock);
  int64_t part = is_short ? classes : int64_t(team) * pack * kPacksInFlight;
  const int64_t more_parts = parts_of_row(rows, classes, pack, multiprocessors);
  if (!is_short && more_parts > ceil_div(classes, part)) {
    team = kBlock;
    part = part_of_row(classes, more_parts, pack);
  }
  const int64_t parts = ceil_div(classes, part);
  return {team, parts, part, ceil_div(rows * parts, kBlock / team)};
}

// Across the rows, in `packs` packs of them: parts of the classes only where rows alone would not fill the device.
inline BackwardPlan plan_backward_across(int64_t packs, int64_t classes, int multiprocessors) {
  constexpr int64_t kPart = 16;  // classes, at the least, to spread what a thread reads of its rows first
  const int64_t wanted = int64_t(multiprocessors) * kBlocksPerProcessor * kBlock;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted / std::max<int64_t>(packs, 1), classes / kPart));
  const int64_t part = ceil_div(classes, parts);
  return {1, ceil_div(classes, part), part, ceil_div(packs * ceil_div(classes, part), kBlock)};
}

struct FusedPlan {
  int lanes;    // that share a row; 0: a cluster takes it
  int cluster;  // blocks
  int kept;     // packs that each thread holds in shared memory; those beyond are read again
  int64_t blocks;
};

constexpr int kBytesOfKeptPack = kBlock * 16;   // of a block's shared memory
constexpr int kDeclaredSharedMemory = 2 << 10;  // bytes that the kernels declare themselves, rounded up

// Whether one pass has enough blocks: clusters are few where the other kernels cut a row into many parts.
inline bool one_pass_fills(int64_t rows, int64_t classes, int pack, const Properties& device) {
  const bool is_cut = plan_forward(rows, classes, pack, device.multiprocessors).regime == Regime::parts;
  return !is_cut || rows * device.largest_cluster >= device.multiprocessors;
}

// Forward and backward in one, along the rows.
inline FusedPlan plan_fused(int64_t rows, int64_t classes, int pack, const Properties& device) {
  // Packs a thread keeps: an H100's multiprocessor has shared memory for three such blocks, and registers for two at
  // least, of which one writes while the other reads.
  constexpr int kWanted = 16;
  const int64_t packs = ceil_div(classes, pack);
  const int most_kept = (device.shared_memory_of_block - kDeclaredSharedMemory) / kBytesOfKeptPack;
  const auto resident = [&](int kept) {
    const int fitting = device.shared_memory_of_multiprocessor / (kept * kBytesOfKeptPack + kDeclaredSharedMemory);
    return int64_t(device.multiprocessors) * std::clamp(fitting, 1, kBlocksPerProcessor);
  };
  if (packs <= kMostLanes * kPacksInFlight) {
    const int lanes = power_of_two(ceil_div(packs, kPacksInFlight), kMostLanes);
    const int kept = int(std::min<int64_t>(ceil_div(packs, lanes), most_kept));
    return {lanes, 1, kept, std::min(resident(kept), ceil_div(rows, kBlock / lanes))};
  }
  int cluster = 1;
  const auto packs_of_thread = [&] { return ceil_div(packs, int64_t(cluster) * kBlock); };
  const auto idle = [&] { return rows * cluster < device.multiprocessors && packs_of_thread() > kPacksInFlight; };
  while (cluster < device.largest_cluster && (packs_of_thread() > kWanted || idle())) cluster *= 2;
  const int kept = int(std::min<int64_t>(packs_of_thread(), most_kept));
  return {0, cluster, kept, cluster * std::clamp<int64_t>(rows, 1, std::max<int64_t>(resident(kept) / cluster, 1))};
}

}  // namespace torchce::cuda::softmax_ce
