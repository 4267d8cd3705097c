// Uniform quantization, for compressors/native.py: what the arguments are, blocks.h says.

#include "blocks.h"

namespace espresso {

// With 1 to 8 bits; on the grid of absmax, if `symmetric`, else on that of minmax.
template <class Job>
struct Quantization : Job {
    int bits;
    bool symmetric;
};

}  // namespace espresso

#define ESPRESSO_SOURCE "quantize.inc"
#include "versions.h"

using espresso::Decoding;
using espresso::Encoding;
using espresso::over_blocks;
using espresso::Parts;
using espresso::Quantization;

extern "C" {

void espresso_quantize_encode(const float* x, const Parts* parts, const void* residual, void* kept, uint8_t* payload,
                              int64_t numel, int64_t narrow, int64_t bits, int64_t symmetric) {
    const Encoding job{x, residual, kept, narrow != 0, numel, payload, parts};
    over_blocks(ESPRESSO_PICK(quantize_encode), Quantization<Encoding>{job, static_cast<int>(bits), symmetric != 0});
}

void espresso_quantize_decode_sum(const uint8_t* rows, int64_t count, int64_t stride, float* out, int64_t numel, int64_t bits,
                                  int64_t symmetric, int64_t add) {
    const Decoding job{rows, count, stride, out, numel, add != 0};
    over_blocks(ESPRESSO_PICK(quantize_decode), Quantization<Decoding>{job, static_cast<int>(bits), symmetric != 0});
}

}  // extern "C"
