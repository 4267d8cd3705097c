// Casts, for compressors/native_cast.py: what the arguments are, blocks.h says.

#include "blocks.h"

#define ESPRESSO_SOURCE "cast.inc"
#include "versions.h"

using espresso::Decoding;
using espresso::Encoding;
using espresso::over_blocks;
using espresso::Parts;

extern "C" {

void espresso_fp16_encode(const float* x, const Parts* parts, const void* residual, void* kept, uint8_t* payload,
                          int64_t numel, int64_t narrow) {
    over_blocks(ESPRESSO_PICK(fp16_encode), Encoding{x, residual, kept, narrow != 0, numel, payload, parts});
}

void espresso_bf16_encode(const float* x, const Parts* parts, const void* residual, void* kept, uint8_t* payload,
                          int64_t numel, int64_t narrow) {
    over_blocks(ESPRESSO_PICK(bf16_encode), Encoding{x, residual, kept, narrow != 0, numel, payload, parts});
}

void espresso_fp16_decode_sum(const uint8_t* rows, int64_t count, int64_t stride, float* out, int64_t numel, int64_t add) {
    over_blocks(ESPRESSO_PICK(fp16_decode), Decoding{rows, count, stride, out, numel, add != 0});
}

void espresso_bf16_decode_sum(const uint8_t* rows, int64_t count, int64_t stride, float* out, int64_t numel, int64_t add) {
    over_blocks(ESPRESSO_PICK(bf16_decode), Decoding{rows, count, stride, out, numel, add != 0});
}

}  // extern "C"
