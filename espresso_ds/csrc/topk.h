// What the kernels of topk.inc work on.

#pragma once

#include <cstddef>
#include <cstdint>

namespace espresso::topk {

constexpr int64_t BLOCK = 1 << 16;  // elements that share a count in the payload: places in it fit 16 bits
constexpr int64_t CHUNK = 1 << 10;  // elements formed at a time, so that they are still in the first cache when they are listed
constexpr int64_t GROUP = 16;       // elements with one mask
constexpr int64_t RUN = 16;         // neighbours that are sampled together, a line of the cache
constexpr int64_t LEAST_SAMPLE = 512;  // elements; fewer are all sampled

// Magnitudes are compared as integers, which orders them as floats are, with NaN above infinity.
constexpr uint32_t ALL_BUT_SIGN = 0x7FFFFFFF, INFINITE_SIZE = 0x7F800000;
constexpr uint32_t NOTHING = 0x80000000;  // above all magnitudes

// A memory of what was not sent, as it was and as it will be, which may be one array: float32, or bfloat16 if `narrow`. Null for
// none.
struct Memory {
    const char* old;
    char* kept;
    bool narrow;

    int64_t width() const { return narrow ? 2 : 4; }
};

// p = x + residual, or with a velocity u: u' = momentum u + scale x, p = residual + u'.
struct Job {
    const char* x;
    Memory residual, velocity;
    float momentum, scale;
    int64_t numel, k;

    bool turns() const { return velocity.old != nullptr; }
};

// Elements that are to be sent, as far as known, of consecutive blocks, ascending. In `kept` stands already what remains when
// these are sent; whoever takes one off the list puts back what was there.
struct List {
    int64_t first, last;  // blocks
    int64_t walked;       // blocks that `counts` holds, the last one maybe in part
    int64_t count, capacity;
    int32_t* counts;
    float* values;        // p; room for GROUP more than `capacity`, like the others
    float* velocities;    // u'; null without
    uint16_t* places;     // in the block
    uint32_t* pool;       // scratch
};

}  // namespace espresso::topk
