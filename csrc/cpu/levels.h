// The SIMD levels the CPU kernels are compiled for, and the choice among them at run time.
//
// level_*.cpp each compile kernels.inc for one level, with the level's namespace and vector width as macros. Explicit
// levels rather than GCC's target_clones: clones cannot be templates, their choice cannot be overridden from outside,
// and vectors wider than the baseline's would be split before the clone's target applies.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace torchce::cpu {

// What one chunk of rows or elements adds to the reduced loss. Chunks are the same for every number of threads, and are
// summed in order.
struct Partial {
  double loss = 0;
  double weight = 0;     // of the rows kept: the divisor of a mean over class indices, or of a divergence's
  int64_t bad_row = -1;  // first row whose target is no class, or -1
};

struct Kernels {
  const char* name;
  // Rows of which a chunk of softmax_ce holds a whole number.
  int64_t rows_along;   // a group, where lanes run along each row
  int64_t rows_across;  // two strips, where lanes run across the rows
  void (*softmax_ce_forward)(const softmax_ce::Forward&, int64_t row_begin, int64_t row_end, Partial*);
  // The next two take rows that the forward is through with.
  void (*softmax_ce_predict)(const softmax_ce::Forward&, int64_t row_begin, int64_t row_end);
  void (*softmax_ce_entropies)(const softmax_ce::Forward&, int64_t row_begin, int64_t row_end);
  void (*softmax_ce_backward)(const softmax_ce::Backward&, int64_t row_begin, int64_t row_end);
  void (*softmax_ce_backward_target)(const softmax_ce::Backward&, int64_t row_begin, int64_t row_end);
  void (*softmax_ce_backward_scale)(const softmax_ce::Backward&, int64_t row_begin, int64_t row_end);
  void (*sigmoid_bce_forward)(const sigmoid_bce::Elements&, int64_t begin, int64_t end, Partial*);
  void (*sigmoid_bce_backward)(const sigmoid_bce::Elements&, int64_t begin, int64_t end);
  void (*sigmoid_bce_backward_target)(const sigmoid_bce::Elements&, int64_t begin, int64_t end);
  void (*binary_divergence_forward)(const sigmoid_bce::Elements&, binary_divergence::Formula, int64_t begin,
                                    int64_t end, Partial*);
  void (*binary_divergence_backward)(const sigmoid_bce::Elements&, binary_divergence::Formula, GradientOf,
                                     int64_t begin, int64_t end);
  void (*divergence_forward)(const divergence::Forward&, int64_t row_begin, int64_t row_end, Partial*);
  void (*divergence_backward)(const divergence::Backward&, int64_t row_begin, int64_t row_end);
};

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define TORCHCE_X86_LEVELS 1
extern const Kernels kX86V4Kernels;  // AVX-512
extern const Kernels kX86V3Kernels;  // AVX2 and FMA
#endif
extern const Kernels kBaselineKernels;

// The widest level of this machine, or the one that the environment variable TORCHCE_CPU_LEVEL names.
const Kernels& kernels();

// Names of the levels this machine can run, widest first, ending with a null.
const char* const* available_levels();

}  // namespace torchce::cpu
