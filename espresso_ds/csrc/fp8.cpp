// fp8 with scales, for compressors/native_cast.py: what the arguments are, blocks.h says.

#include "blocks.h"

#define ESPRESSO_SOURCE "fp8.inc"
#include "versions.h"

using espresso::Decoding;
using espresso::Encoding;
using espresso::over_blocks;
using espresso::Parts;

extern "C" {

void espresso_e4m3_encode(const float* x, const Parts* parts, const void* residual, void* kept, uint8_t* payload,
                          int64_t numel, int64_t narrow) {
    over_blocks(ESPRESSO_PICK(e4m3_encode), Encoding{x, residual, kept, narrow != 0, numel, payload, parts});
}

void espresso_e5m2_encode(const float* x, const Parts* parts, const void* residual, void* kept, uint8_t* payload,
                          int64_t numel, int64_t narrow) {
    over_blocks(ESPRESSO_PICK(e5m2_encode), Encoding{x, residual, kept, narrow != 0, numel, payload, parts});
}

void espresso_e4m3_decode_sum(const uint8_t* rows, int64_t count, int64_t stride, float* out, int64_t numel, int64_t add) {
    over_blocks(ESPRESSO_PICK(e4m3_decode), Decoding{rows, count, stride, out, numel, add != 0});
}

void espresso_e5m2_decode_sum(const uint8_t* rows, int64_t count, int64_t stride, float* out, int64_t numel, int64_t add) {
    over_blocks(ESPRESSO_PICK(e5m2_decode), Decoding{rows, count, stride, out, numel, add != 0});
}

}  // extern "C"
