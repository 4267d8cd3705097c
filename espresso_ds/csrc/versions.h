// Compiles the kernel source ESPRESSO_SOURCE once per level of cpu.h, in the namespaces espresso::baseline, avx2 and avx512.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu.h"
#include "pool.h"

#if ESPRESSO_X86
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says so of its own AVX-512 headers (bug 105593)
#endif

#define ESPRESSO_LEVEL 0
namespace espresso::baseline {
#include ESPRESSO_SOURCE
}
#undef ESPRESSO_LEVEL

#if ESPRESSO_X86

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,bmi,bmi2,f16c,lzcnt,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,f16c,lzcnt,popcnt")
#endif
#define ESPRESSO_LEVEL 1
namespace espresso::avx2 {
#include ESPRESSO_SOURCE
}
#undef ESPRESSO_LEVEL
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,bmi,bmi2,f16c,lzcnt,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,bmi,bmi2,f16c,lzcnt,popcnt,prefer-vector-width=512")
#endif
#define ESPRESSO_LEVEL 2
namespace espresso::avx512 {
#include ESPRESSO_SOURCE
}
#undef ESPRESSO_LEVEL
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#define ESPRESSO_PICK(name) espresso::pick(espresso::baseline::name, espresso::avx2::name, espresso::avx512::name)

#else

#define ESPRESSO_PICK(name) (&espresso::baseline::name)

#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
