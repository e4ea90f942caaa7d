#define TORCHCE_LEVEL baseline
#define TORCHCE_LEVEL_BYTES 16
#include "kernels.inc"

namespace torchce::cpu {
const Kernels kBaselineKernels = TORCHCE_KERNELS("baseline");
}
