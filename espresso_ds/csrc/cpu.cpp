// The choice of cpu.h.

#include "cpu.h"

#include <atomic>

namespace espresso {

namespace {

std::atomic<int> allowed{AVX512};

int detect() {
#if ESPRESSO_X86
    __builtin_cpu_init();
    if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
          __builtin_cpu_supports("popcnt") && __builtin_cpu_supports("fma"))) {
        return BASELINE;  // fma stands in for f16c and lzcnt, which came with it and which not every compiler can ask for
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        return AVX512;
    }
    return AVX2;
#else
    return BASELINE;
#endif
}

}  // namespace

int cpu_level() {
    static const int found = detect();
    const int limit = allowed.load(std::memory_order_relaxed);
    return found < limit ? found : limit;
}

}  // namespace espresso

extern "C" {

// The level in use: 0 baseline, 1 AVX2, 2 AVX-512.
int espresso_cpu_level() { return espresso::cpu_level(); }

// Allows levels up to `level` only, for tests; 2 allows all. Results do not depend on it.
void espresso_cpu_limit(int level) { espresso::allowed.store(level, std::memory_order_relaxed); }

}  // extern "C"
