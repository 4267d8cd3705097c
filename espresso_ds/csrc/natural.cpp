// Natural compression, for compressors/native_cast.py: what the arguments are, blocks.h says.

#include "blocks.h"

namespace espresso {

struct Drawing : Encoding {
    uint64_t seed;
};

}  // namespace espresso

#define ESPRESSO_SOURCE "natural.inc"
#include "versions.h"

using espresso::Decoding;
using espresso::Drawing;
using espresso::over_blocks;
using espresso::Parts;

extern "C" {

void espresso_natural_encode(const float* x, const Parts* parts, const void* residual, void* kept, uint8_t* payload,
                             int64_t numel, int64_t narrow, uint64_t seed) {
    over_blocks(ESPRESSO_PICK(natural_encode), Drawing{{x, residual, kept, narrow != 0, numel, payload, parts}, seed});
}

void espresso_natural_decode_sum(const uint8_t* rows, int64_t count, int64_t stride, float* out, int64_t numel, int64_t add) {
    over_blocks(ESPRESSO_PICK(natural_decode), Decoding{rows, count, stride, out, numel, add != 0});
}

}  // extern "C"
