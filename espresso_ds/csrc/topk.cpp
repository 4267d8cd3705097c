// TopK, exact and by a sampled threshold, and DGC: one pass over memory that adds the residual, lists what reaches a threshold
// guessed from a sample, and writes what is kept as if all that is listed were sent; then the k largest of the list are chosen,
// and the others put back. Lists hold about 1.2 k elements. compressors/topk.py has the payload and the
// same in torch; threshold.py the sample.
//
// Whatever the guess, a list that gets too long is reduced to its k largest, and nothing below these is listed any more. So the
// result is the k largest of all that reaches the guess, ties going to the lowest index, for any room and any cut into pieces.
//
// Exact selection looks again where fewer than k reach the guess. By then p has been written over the residual if they share
// memory. In float32 nothing is lost by that: `kept` is p but for what is listed, where p is put back. In bfloat16 p could
// not be had back, so the first look writes nothing, and a second pass does when the selection is known.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "topk.h"

#define ESPRESSO_SOURCE "topk.inc"
#include "versions.h"

namespace espresso::topk {

namespace {

constexpr int64_t MOST_PIECES = 16, PIECE_BLOCKS = 2;

enum Result { DONE = 0, NO_MEMORY = 1, NOT_A_PAYLOAD = 2 };

// Uninitialised memory that only grows: untouched pages cost nothing.
template <class Element>
class Buffer {
public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { std::free(data_); }

    Element* of(int64_t size) {
        if (size > size_) {
            std::free(data_);
            data_ = static_cast<Element*>(std::malloc(static_cast<size_t>(size) * sizeof(Element)));
            if (!data_) {
                size_ = 0;
                throw std::bad_alloc();
            }
            size_ = size;
        }
        return data_;
    }

private:
    Element* data_ = nullptr;
    int64_t size_ = 0;
};

// What one thread's encodings use, kept for the next.
struct Scratch {
    Buffer<int32_t> counts;
    Buffer<float> values, velocities;
    Buffer<uint16_t> places;
    Buffer<uint32_t> pools, sample, chosen;
    List lists[MOST_PIECES];
};

// The blocks in pieces of about equal size, one list each.
int64_t cut(const Job& job, Scratch& scratch) {
    const int64_t blocks = (job.numel + BLOCK - 1) / BLOCK;
    const int64_t pieces = std::clamp<int64_t>(blocks / PIECE_BLOCKS, 1, MOST_PIECES), each = (blocks + pieces - 1) / pieces;
    const int64_t needed = job.k + std::max<int64_t>(job.k / 2, 4 * CHUNK) + CHUNK;
    const int64_t capacity = std::min(needed, std::min(each * BLOCK, job.numel) + CHUNK), room = capacity + GROUP;
    int32_t* counts = scratch.counts.of(blocks);
    float* values = scratch.values.of(room * pieces);
    float* velocities = job.turns() ? scratch.velocities.of(room * pieces) : nullptr;
    uint16_t* places = scratch.places.of(room * pieces);
    uint32_t* pools = scratch.pools.of(room * pieces);
    for (int64_t i = 0; i < pieces; ++i) {
        const int64_t first = std::min(i * each, blocks), last = std::min(first + each, blocks);
        scratch.lists[i] = List{first, last, 0, 0, capacity, counts + first, values + i * room,
                                velocities ? velocities + i * room : nullptr, places + i * room, pools + i * room};
    }
    return pieces;
}

// The rank-th largest magnitude of the sample; `least` if that is less or the sample has not as many.
uint32_t guess(const uint32_t* sample, int64_t size, int64_t rank, uint32_t least, uint32_t* pool) {
    if (rank > size) return least;
    std::copy(sample, sample + size, pool);
    return std::clamp(ESPRESSO_PICK(kth_largest)(pool, size, rank), least, INFINITE_SIZE);
}

// Reduce the lists to the k largest of all: ties go to the first lists.
void choose(const Job& job, List* lists, int64_t pieces, int64_t total, Buffer<uint32_t>& room) {
    uint32_t* pool = room.of(total + GROUP);
    int64_t filled = 0, above[MOST_PIECES], ties[MOST_PIECES];
    for (int64_t i = 0; i < pieces; filled += lists[i++].count) {
        ESPRESSO_PICK(sizes_of)(lists[i].values, lists[i].count, pool + filled);
    }
    const uint32_t threshold = ESPRESSO_PICK(kth_largest)(pool, total, job.k);
    int64_t left = job.k;
    for (int64_t i = 0; i < pieces; ++i) left -= above[i] = ESPRESSO_PICK(count_above)(lists[i], threshold);
    const uint32_t equal = threshold - 1;  // what is above this and not above the threshold
    for (int64_t i = 0; i < pieces; left -= ties[i++]) {
        const int64_t reached = threshold == 0 ? lists[i].count : ESPRESSO_PICK(count_above)(lists[i], equal);
        ties[i] = std::min(left, reached - above[i]);
    }
    parallel(pieces, total, [&](int64_t i) { ESPRESSO_PICK(filter)(job, lists[i], threshold, ties[i]); });
}

void encode_all(const Job& job, unsigned char* payload, int64_t size, int64_t rank, bool exact) {
    thread_local Scratch scratch;
    List* const lists = scratch.lists;
    const int64_t pieces = cut(job, scratch);
    uint32_t* const sample = scratch.sample.of(2 * size + GROUP);
    ESPRESSO_PICK(sample)(job, size, sample);

    Job look = job;
    const bool in_place = job.residual.kept && job.residual.kept == job.residual.old;
    const bool later = exact && in_place && job.residual.narrow;
    if (later) look.residual.kept = nullptr;
    int64_t total = 0;
    for (;; rank *= 8) {
        const uint32_t low = guess(sample, size, rank, exact ? 0 : 1, sample + size);
        parallel(pieces, job.numel, [&](int64_t i) { ESPRESSO_PICK(collect)(look, low, lists[i]); });
        total = 0;
        for (int64_t i = 0; i < pieces; ++i) total += lists[i].count;
        if (!exact || total >= job.k) break;
        if (in_place && !later) {
            parallel(pieces, total, [&](int64_t i) { ESPRESSO_PICK(restore)(job, lists[i]); });
            look.x = job.residual.kept;
            look.residual.old = nullptr;
        }
    }
    if (total > job.k) choose(look, lists, pieces, total, scratch.chosen);
    if (later) parallel(pieces, job.numel, [&](int64_t i) { ESPRESSO_PICK(rewrite)(job, lists[i]); });

    const int64_t blocks = (job.numel + BLOCK - 1) / BLOCK;
    int32_t* counts = reinterpret_cast<int32_t*>(payload);
    uint16_t* values = reinterpret_cast<uint16_t*>(counts + blocks);
    uint16_t* places = values + job.k;
    int64_t starts[MOST_PIECES], end = 0;
    for (int64_t i = 0; i < pieces; ++i) {
        starts[i] = end;
        end += lists[i].count;
    }
    parallel(pieces, end, [&](int64_t i) { ESPRESSO_PICK(write)(lists[i], starts[i], counts, values, places); });
    std::fill(values + end, values + job.k, uint16_t{0});
    std::fill(places + end, places + job.k, uint16_t{0});
}

int encode(const Job& job, unsigned char* payload, int64_t size, int64_t rank, bool exact) {
    try {
        encode_all(job, payload, size, rank, exact);
    } catch (const std::bad_alloc&) {
        return NO_MEMORY;
    }
    return DONE;
}

}  // namespace

}  // namespace espresso::topk

extern "C" {

using namespace espresso::topk;

// How to encode tensors of one size. Kinds: bit 0 for a residual in bfloat16, bit 1 for a velocity in bfloat16.
struct EspressoTopK {
    int64_t numel, k, sample, rank;
    int32_t exact, kinds;
};

// All but `x` and `payload` may be null; there is momentum if `velocity` is not. One argument: each costs Python as much as
// some hundred elements.
struct EspressoTopKArrays {
    const void *x, *residual, *velocity;
    void *kept, *velocity_kept, *payload;
    float momentum, scale;
};

// Compress at least one element.
int espresso_topk_encode(const EspressoTopKArrays* arrays, const EspressoTopK* how) {
    const Job job{static_cast<const char*>(arrays->x),
                  {static_cast<const char*>(arrays->residual), static_cast<char*>(arrays->kept), (how->kinds & 1) != 0},
                  {static_cast<const char*>(arrays->velocity), static_cast<char*>(arrays->velocity_kept), (how->kinds & 2) != 0},
                  arrays->momentum,
                  arrays->scale,
                  how->numel,
                  how->k};
    return encode(job, static_cast<unsigned char*>(arrays->payload), how->sample, how->rank, how->exact != 0);
}

// Add `count` payloads, `stride` bytes apart, to `out`, or overwrite it by their sum.
int espresso_topk_decode_sum(const void* rows, int64_t count, int64_t stride, void* out, int64_t numel, int64_t k, int add) {
    const int64_t blocks = (numel + BLOCK - 1) / BLOCK, pieces = (blocks + PIECE_BLOCKS - 1) / PIECE_BLOCKS;
    std::atomic<bool> right{true};
    espresso::parallel(pieces, numel, [&](int64_t i) {
        const int64_t first = i * PIECE_BLOCKS, last = std::min(first + PIECE_BLOCKS, blocks);
        if (!ESPRESSO_PICK(scatter)(static_cast<const unsigned char*>(rows), count, stride, first, last,
                                    static_cast<float*>(out), numel, k, add != 0)) {
            right.store(false, std::memory_order_relaxed);
        }
    });
    return right ? DONE : NOT_A_PAYLOAD;
}

}  // extern "C"
