#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// The target stands before every include, because no function of this file may be compiled for another one.
#pragma GCC target("arch=x86-64-v3")
#define TORCHCE_LEVEL x86_v3
#define TORCHCE_LEVEL_BYTES 32
#include "divergence_kernels.h"
#endif
