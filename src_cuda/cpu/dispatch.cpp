// Picks the kernels of the best instruction set this processor and operating system run, once.
// NEUROGEN_CPU_ISA=baseline|avx2|avx512 asks for a lower one (tests, comparisons); a set that the machine
// lacks is refused.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "neurogen/model.h"

namespace neurogen {
namespace cpu {

extern const Kernels kernels_baseline, kernels_avx2, kernels_avx512;

namespace {

const Kernels& choose() {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  const Kernels& best = avx512 ? kernels_avx512 : avx2 ? kernels_avx2 : kernels_baseline;
  const char* asked = std::getenv("NEUROGEN_CPU_ISA");
  if (!asked || !*asked || !std::strcmp(asked, best.name)) return best;
  if (!std::strcmp(asked, "baseline")) return kernels_baseline;
  if (!std::strcmp(asked, "avx2") && avx2) return kernels_avx2;
  throw std::invalid_argument(std::string("NEUROGEN_CPU_ISA: expected baseline, avx2 or avx512, at most ") + best.name +
                              " on this machine, got " + asked);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace cpu

const char* cpu_instruction_set() { return cpu::kernels().name; }

}  // namespace neurogen
