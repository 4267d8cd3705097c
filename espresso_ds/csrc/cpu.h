// Kernels for the CPU found at run time: one source, compiled for several levels of instructions, chosen once.
//
// How to add a kernel `foo`:
//  1. foo.inc holds the work on some blocks, as functions with internal linkage. It is compiled once per level, in a namespace of
//     each, so it includes nothing but other .inc files: headers go into foo.cpp. It uses no templates of the standard library
//     and no lambdas, which could be compiled for one level and linked into another. `ESPRESSO_LEVEL` is one of the numbers
//     below; what differs by level belongs into lanes.inc (vectors) or bits.inc (packing). Every level must write the same
//     bytes: sums go in a fixed number of lanes.
//  2. foo.cpp says
//         #define ESPRESSO_SOURCE "foo.inc"
//         #include "versions.h"
//     and has the functions of the library, extern "C", `espresso_foo_<verb>`: they choose a level by ESPRESSO_PICK(function) and
//     cut the work into pieces, fixed by its size alone, for `parallel` of pool.h.
//  3. compressors/native.py declares and wraps them.
//
// Compiled without contraction (-ffp-contract=off): a level with fused multiply-add rounds like the others.

#pragma once

#if defined(__x86_64__) || defined(_M_X64)
#define ESPRESSO_X86 1
#else
#define ESPRESSO_X86 0
#endif

namespace espresso {

enum Level { BASELINE = 0, AVX2 = 1, AVX512 = 2 };

// The highest level that the CPU has and `espresso_cpu_limit` allows.
int cpu_level();

// The one of a kernel's versions to call.
template <class Function>
Function* pick(Function* baseline, Function* avx2, Function* avx512) {
    const int level = cpu_level();
    return level == AVX512 ? avx512 : level == AVX2 ? avx2 : baseline;
}

}  // namespace espresso
