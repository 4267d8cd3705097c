// Codecs with a scale per block: what they encode from, how they cut it into pieces for threads.

#pragma once

#include <algorithm>
#include <cstdint>

#include "pool.h"

namespace espresso {

constexpr int BLOCK = 4096;       // elements with a scale of their own
constexpr int GROUP = 64;         // kernels work on multiples of this many; shorter ends are copied and filled up
constexpr int64_t PER_PIECE = 8;  // blocks in a piece: some 10 microseconds of work

inline int64_t blocks_of(int64_t numel) { return (numel + BLOCK - 1) / BLOCK; }

inline int64_t packed_nbytes(int64_t numel, int bits) { return (numel + 7) / 8 * bits; }

// Elements that lie apart (compressors/parts.py): part i holds those from ends[i - 1] to ends[i] - 1 of `factor` times what begins
// at element `start`. A part may be empty.
struct Parts {
    const float* const* at;
    const int64_t* ends;
    int64_t start;
    float factor;
};

// p = x + residual is to be encoded, p - decode to be left in `kept`. Both are float, or both bfloat16 (`narrow`); each may be
// null, and they may be the same memory. Elements of x are those of `parts`, unless that is null.
struct Encoding {
    const float* x;
    const void* residual;
    void* kept;
    bool narrow;
    int64_t numel;
    uint8_t* payload;
    const Parts* parts = nullptr;
};

// Elements of x from `start` on, brought together in `room` if they lie apart.
inline const float* elements(const Encoding& job, int64_t start, int count, float* room) {
    if (!job.parts) return job.x + start;
    const Parts& parts = *job.parts;
    int64_t at = parts.start + start;
    int64_t part = 0;
    while (parts.ends[part] <= at) ++part;
    for (int done = 0; done < count; ++part) {
        const float* const from = parts.at[part] + (at - (part ? parts.ends[part - 1] : 0));
        const int here = static_cast<int>(std::min<int64_t>(parts.ends[part] - at, count - done));
        for (int i = 0; i < here; ++i) room[done + i] = from[i] * parts.factor;
        done += here;
        at += here;
    }
    return room;
}

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
