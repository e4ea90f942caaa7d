// How the softmax_ce kernels are laid over a problem: which regime, how many threads share a row, how many blocks.
//
// `slots` are the blocks of the kernel in question that the device runs at the same time: its multiprocessors times
// what registers and shared memory leave room for (DeviceScope::resident_blocks).
#pragma once

#include <algorithm>
#include <cstdint>

#include "../problem.h"
#include "launch_shape.h"
#include "properties.h"

namespace torchce::cuda::softmax_ce {

using namespace torchce::softmax_ce;

constexpr int kMostLanes = 32;
constexpr int kPacksInFlight = 4;  // a thread's

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

// Whether lanes of a warp take a row: its packs are at most 16 for each of them.
inline bool is_short_row(int64_t classes, int pack) {
  constexpr int64_t kPacksOfLane = 16;
  return ceil_div(classes, pack) <= kMostLanes * kPacksOfLane;
}

// How many lanes share a row: they have some packs each, as long as a warp has lanes.
inline int lanes_of_row(int64_t classes, int pack) {
  return power_of_two(ceil_div(ceil_div(classes, pack), kPacksInFlight), kMostLanes);
}

// How many threads share a row whose classes are adjacent, where no block shares it with another: a block for a long
// one.
inline int team_of_row(int64_t classes, int pack) {
  return is_short_row(classes, pack) ? lanes_of_row(classes, pack) : kThreads;
}

// Into how many parts each of a few long rows is cut, so that there is a block for every slot. A part is so long that
// two warps of its block have a pack each.
inline int64_t parts_to_fill(int64_t rows, int64_t classes, int pack, int64_t slots) {
  constexpr int64_t kThreadsAtWork = 64;
  return std::clamp<int64_t>(classes / (kThreadsAtWork * pack), 1,
                             std::max<int64_t>(slots / std::max<int64_t>(rows, 1), 1));
}

// How long `blocks` blocks of equal length take, where a device full of them takes as long as there are slots. The last
// of them run alone: half of the slots still keep the memory busy, fewer do not.
inline int64_t duration_of(int64_t blocks, int64_t slots) {
  const int64_t last = blocks % slots;
  return blocks - last + (last == 0 ? 0 : std::max(last, slots / 2));
}

// Into how many parts rows are cut because whole rows would leave the device half empty, at first or in the end; 1:
// they stay whole. The fewest parts are taken that come within a twentieth of the best.
inline int64_t parts_of_row(int64_t rows, int64_t classes, int pack, int64_t slots) {
  constexpr int64_t kMostParts = 4, kMostWaves = 8;
  constexpr double kGood = 1.05;
  if (rows == 0) return 1;
  if (rows <= slots / 2) return parts_to_fill(rows, classes, pack, slots);
  const int64_t whole_batches = classes / (int64_t(kThreads) * kPacksInFlight * pack);
  const int64_t most = std::clamp<int64_t>(std::min(kMostWaves * slots / rows, whole_batches), 1, kMostParts);
  const auto duration = [&](int64_t parts) { return double(duration_of(rows * parts, slots)) / double(parts); };
  double best = duration(1);
  for (int64_t parts = 2; parts <= most; ++parts) best = std::min(best, duration(parts));
  int64_t parts = 1;
  while (duration(parts) > kGood * best) ++parts;
  return parts;
}

// Classes of a part where a row is cut into `parts`, in whole packs.
inline int64_t part_of_row(int64_t classes, int64_t parts, int pack) {
  return ceil_div(ceil_div(classes, parts), pack) * pack;
}

// Plans a forward along the rows; `pack` classes are 16 bytes.
inline ForwardPlan plan_forward(int64_t rows, int64_t classes, int pack, int64_t slots) {
  if (is_short_row(classes, pack)) {
    const int lanes = lanes_of_row(classes, pack);
    return {Regime::lanes, lanes, 1, classes, std::min(slots, ceil_div(rows, kThreads / lanes))};
  }
  const int64_t parts = parts_of_row(rows, classes, pack, slots);
  if (parts > 1) {
    const int64_t part = part_of_row(classes, parts, pack);
    return {Regime::parts, 0, int(ceil_div(classes, part)), part, rows * ceil_div(classes, part)};
  }
  return {Regime::block, kThreads, 1, classes, std::min(slots, rows)};
}

// Threads for each multiprocessor that keep memory busy when they have four packs each in flight: 24 KiB.
constexpr int64_t kBusyThreads = 384;

struct AcrossPlan {
  int columns;  // packs of rows a block takes
  int64_t blocks;
};

// Plans a forward across the rows, in `packs` packs of them. As few threads share a pack's classes as keep the memory
// busy, and at most as many as leave 8 packs, a full line of memory, side by side. There are so many blocks that the
// last of them hardly count.
inline AcrossPlan plan_forward_across(int64_t packs, int64_t classes, int multiprocessors, int64_t slots) {
  constexpr int kFewestColumns = 8;
  constexpr int64_t kWaves = 8;
  const int64_t wanted = multiprocessors * kBusyThreads;
  int columns = kThreads;
  while (columns > kFewestColumns && packs * (kThreads / columns) < wanted && kThreads / columns < classes)
    columns /= 2;
  return {columns, std::min(kWaves * slots, ceil_div(packs, columns))};
}

struct BackwardPlan {
  int team;       // threads that share a part of a row
  int64_t parts;  // of a row
  int64_t part;   // classes of each
  int64_t blocks;
};

// Plans a backward along the rows. A short row gets enough threads that they write side by side, two packs each; a
// long one is cut into parts of one batch of packs, or into more where there are few rows.
inline BackwardPlan plan_backward(int64_t rows, int64_t classes, int pack, int64_t slots) {
  constexpr int64_t kSideBySide = 4;  // threads, for rows of less than two packs
  const int64_t packs = ceil_div(classes, pack);
  const bool is_short = packs <= kMostLanes * kPacksInFlight;
  int team = is_short ? power_of_two(std::max(ceil_div(packs, 2), std::min(classes, kSideBySide)), kMostLanes)
                      : power_of_two(ceil_div(packs, kPacksInFlight), kThreads);
  int64_t part = is_short ? classes : int64_t(team) * pack * kPacksInFlight;
  const int64_t more_parts = parts_to_fill(rows, classes, pack, slots);
  if (!is_short && more_parts > ceil_div(classes, part)) {
    team = kThreads;
    part = part_of_row(classes, more_parts, pack);
  }
  const int64_t parts = ceil_div(classes, part);
  return {team, parts, part, ceil_div(rows * parts, kThreads / team)};
}

// Plans a backward across the rows, in `packs` packs of them. Classes are cut into parts only where rows alone would
// not keep the memory busy. A part's classes can be counted in 32 bits.
inline BackwardPlan plan_backward_across(int64_t packs, int64_t classes, int multiprocessors) {
  constexpr int64_t kPart = 16;  // classes, at the least, to spread what a thread reads of its rows first
  constexpr int64_t kMostClasses = int64_t(1) << 30;
  const int64_t wanted = multiprocessors * kBusyThreads;
  const int64_t parts = std::max(
      {int64_t(1), std::min(wanted / std::max<int64_t>(packs, 1), classes / kPart), ceil_div(classes, kMostClasses)});
  const int64_t part = ceil_div(classes, parts);
  return {1, ceil_div(classes, part), part, ceil_div(packs * ceil_div(classes, part), kThreads)};
}

struct ForwardBackwardPlan {
  int lanes;       // that share a row; 0: a cluster takes it
  int cluster;     // blocks
  int kept;        // packs that each thread holds in shared memory; those beyond are read again
  int64_t blocks;  // for every row its own; a launch takes no more than the device runs at once
};

constexpr int kBytesOfKeptPack = kThreads * 16;  // of a block's shared memory
constexpr int kDeclaredSharedMemory = 2 << 10;   // bytes that the kernels declare themselves, rounded up

// Whether forward_backward has enough blocks: clusters are few where the other kernels cut a row into many parts.
// Larger ones than every device places are not counted on.
inline bool forward_backward_fills(int64_t rows, int64_t classes, int pack, const Properties& device) {
  const int cluster = std::min(device.largest_cluster, kPortableCluster);
  return is_short_row(classes, pack) || rows * cluster >= device.multiprocessors;
}

// Plans a forward_backward along the rows, in clusters of at most `largest_cluster` blocks.
inline ForwardBackwardPlan plan_forward_backward(int64_t rows, int64_t classes, int pack, const Properties& device,
                                                 int largest_cluster) {
  // A thread keeps so many packs that an H100's multiprocessor has shared memory and registers for three such blocks,
  // of which some read while others write.
  constexpr int kWanted = 16;
  const int64_t packs = ceil_div(classes, pack);
  const int most_kept = (device.shared_memory_of_block - kDeclaredSharedMemory) / kBytesOfKeptPack;
  if (packs <= kMostLanes * kPacksInFlight) {
    const int lanes = lanes_of_row(classes, pack);
    const int kept = int(std::min<int64_t>(ceil_div(packs, lanes), most_kept));
    return {lanes, 1, kept, ceil_div(rows, kThreads / lanes)};
  }
  int cluster = 1;
  const auto packs_of_thread = [&] { return ceil_div(packs, int64_t(cluster) * kThreads); };
  const auto idle = [&] { return rows * cluster < device.multiprocessors && packs_of_thread() > kPacksInFlight; };
  while (cluster < largest_cluster && (packs_of_thread() > kWanted || idle())) cluster *= 2;
  const int kept = int(std::min<int64_t>(packs_of_thread(), most_kept));
  return {0, cluster, kept, cluster * rows};
}

}  // namespace torchce::cuda::softmax_ce
