#define TORCHCE_LEVEL baseline
#define TORCHCE_LEVEL_BYTES 16
#include "divergence_kernels.h"
