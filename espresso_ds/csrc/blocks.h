// Codecs with a scale per block: what they encode from, how they cut it into pieces for threads.

#pragma once

#include <cstdint>

#include "pool.h"

namespace espresso {

constexpr int BLOCK = 4096;       // elements with a scale of their own
constexpr int GROUP = 64;         // kernels work on multiples of this many; shorter ends are copied and filled up
constexpr int64_t PER_PIECE = 8;  // blocks in a piece: some 10 microseconds of work

inline int64_t blocks_of(int64_t numel) { return (numel + BLOCK - 1) / BLOCK; }

inline int64_t packed_nbytes(int64_t numel, int bits) { return (numel + 7) / 8 * bits; }

// p = x + residual is to be encoded, p - decode to be left in `kept`. Both are float, or both bfloat16 (`narrow`); each may be
// null, and they may be the same memory.
struct Encoding {
    const float* x;
    const void* residual;
    void* kept;
    bool narrow;
    int64_t numel;
    uint8_t* payload;
};

// Payloads, `stride` bytes apart, whose decoded sum goes into `out`, or is added to it.
struct Decoding {
    const uint8_t* rows;
    int64_t count, stride;
    float* out;
    int64_t numel;
    bool add;
};

// work(job, first block, last block) for all blocks, on the threads of the pool.
template <class Job>
void over_blocks(void (*work)(const Job&, int64_t, int64_t), const Job& job) {
    const int64_t blocks = blocks_of(job.numel);
    parallel((blocks + PER_PIECE - 1) / PER_PIECE, job.numel, [&](int64_t piece) {
        const int64_t first = piece * PER_PIECE, last = first + PER_PIECE;
        work(job, first, last < blocks ? last : blocks);
    });
}

}  // namespace espresso
