// SignSGD, for compressors/native_cast.py: what the arguments are, blocks.h says.

#include "blocks.h"

namespace espresso {

// `unsound` is set by every piece where something is not finite.
struct Ballot : Encoding {
    int32_t* unsound;
};

}  // namespace espresso

#define ESPRESSO_SOURCE "signsgd.inc"
#include "versions.h"

using espresso::Ballot;
using espresso::Decoding;
using espresso::over_blocks;
using espresso::Parts;

extern "C" {

void espresso_signsgd_encode(const float* x, const Parts* parts, const void* residual, void* kept, uint8_t* payload,
                             int64_t numel, int64_t narrow) {
    if (numel == 0) return;
    int32_t unsound = 0;
    over_blocks(ESPRESSO_PICK(signsgd_encode), Ballot{{x, residual, kept, narrow != 0, numel, payload, parts}, &unsound});
    const uint32_t unit = unsound ? 0x7FC00000 : 0x3F800000;  // NaN, 1
    std::memcpy(payload, &unit, sizeof unit);
}

void espresso_signsgd_decode_sum(const uint8_t* rows, int64_t count, int64_t stride, float* out, int64_t numel, int64_t add,
                                 int64_t majority) {
    const Decoding job{rows, count, stride, out, numel, add != 0};
    over_blocks(majority ? ESPRESSO_PICK(signsgd_majority) : ESPRESSO_PICK(signsgd_sum), job);
}

}  // extern "C"
