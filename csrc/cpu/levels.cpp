#include "levels.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace torchce::cpu {
namespace {

constexpr int kLevels = 3;

struct Available {
  const Kernels* kernels[kLevels + 1] = {};
  const char* names[kLevels + 1] = {};

  Available() {
    int count = 0;
    const auto add = [&](const Kernels& level) {
      kernels[count] = &level;
      names[count++] = level.name;
    };
#ifdef TORCHCE_X86_LEVELS
    // The features of the two levels that the kernels' instructions come from.
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512cd");
    if (v4) add(kX86V4Kernels);
    if (v3) add(kX86V3Kernels);
#endif
    add(kBaselineKernels);
  }
};

const Available& available() {
  static const Available instance;
  return instance;
}

const Kernels& choose() {
  const char* wanted = std::getenv("TORCHCE_CPU_LEVEL");
  if (wanted == nullptr || *wanted == '\0') return *available().kernels[0];
  std::string names;
  for (int i = 0; available().names[i] != nullptr; ++i) {
    if (std::strcmp(wanted, available().names[i]) == 0) return *available().kernels[i];
    names += std::string(i == 0 ? "" : ", ") + available().names[i];
  }
  throw std::runtime_error("TORCHCE_CPU_LEVEL is '" + std::string(wanted) + "', but this machine has " + names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* const* available_levels() { return available().names; }

}  // namespace torchce::cpu
