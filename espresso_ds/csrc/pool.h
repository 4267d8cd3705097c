// Pieces of a kernel's work on several threads, which sleep in between.

#pragma once

#include <cstdint>

namespace espresso {

using Piece = void (*)(const void* body, int64_t piece);

void run_pieces(int64_t pieces, Piece piece, const void* body);

bool worth_threads(int64_t numel);

// Call body(piece) for piece = 0..pieces-1, on as many threads as `espresso_threads` says, the caller among them, and return when
// all are done; on the caller alone if there are fewer elements than it says. Who calls while another thread has the pool does all pieces alone. Pieces run in any order at any time and must
// not throw; whoever cuts work into pieces does it by its size alone, so that results do not depend on the number of threads. A
// piece is worth waking a thread from 10 to 20 microseconds up.
template <class Body>
void parallel(int64_t pieces, int64_t numel, const Body& body) {
    if (pieces == 1 || !worth_threads(numel)) {
        for (int64_t i = 0; i < pieces; ++i) body(i);
        return;
    }
    run_pieces(
        pieces, [](const void* of, int64_t piece) { (*static_cast<const Body*>(of))(piece); }, &body);
}

}  // namespace espresso
