// The thread pool of pool.h: one for the process, its threads started when first asked for.

#include "pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace espresso {

namespace {

constexpr int MOST_THREADS = 256;

std::atomic<int> threads{1};
std::atomic<int64_t> least_numel{0};

class Pool {
public:
    void run(int64_t pieces, Piece piece, const void* body) {
        const int helpers = static_cast<int>(std::min<int64_t>(threads.load(std::memory_order_relaxed), pieces)) - 1;
        std::unique_lock<std::mutex> mine(taken_, std::defer_lock);
        if (helpers <= 0 || !mine.try_lock()) {
            for (int64_t i = 0; i < pieces; ++i) piece(body, i);
            return;
        }
        grow(helpers);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            piece_ = piece, body_ = body, pieces_ = pieces, wanted_ = helpers;
            next_.store(0, std::memory_order_relaxed);
        }
        for (int i = 0; i < helpers; ++i) wake_.notify_one();
        work(piece, body, pieces);
        std::unique_lock<std::mutex> lock(mutex_);
        wanted_ = 0;  // who has not woken up by now is not waited for
        done_.wait(lock, [this] { return working_ == 0; });
    }

private:
    std::mutex taken_;  // held by the one thread whose pieces these are
    std::mutex mutex_;  // guards what follows, up to next_
    std::condition_variable wake_, done_;
    Piece piece_ = nullptr;
    const void* body_ = nullptr;
    int64_t pieces_ = 0;
    int wanted_ = 0, working_ = 0, started_ = 0;
    std::atomic<int64_t> next_{0};

    void work(Piece piece, const void* body, int64_t pieces) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < pieces;) piece(body, i);
    }

    void grow(int helpers) {
        while (started_ < helpers) {
            try {
                std::thread([this] { serve(); }).detach();
            } catch (const std::system_error&) {
                return;  // no more threads to be had: those that there are do the work
            }
            ++started_;
        }
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return wanted_ > 0; });
            --wanted_;
            ++working_;
            const Piece piece = piece_;
            const void* const body = body_;
            const int64_t pieces = pieces_;
            lock.unlock();
            work(piece, body, pieces);
            lock.lock();
            if (--working_ == 0) done_.notify_one();
        }
    }
};

// Never destroyed: its threads sleep in it until the process is gone.
alignas(Pool) unsigned char storage[sizeof(Pool)];

Pool* fresh() { return new (storage) Pool; }

Pool& pool() {
    static Pool* const one = [] {
        // A forked child has none of the threads, and maybe locks that nobody will open: it begins anew in the same place.
        pthread_atfork(nullptr, nullptr, [] { fresh(); });
        return fresh();
    }();
    return *one;
}

}  // namespace

bool worth_threads(int64_t numel) { return numel >= least_numel.load(std::memory_order_relaxed); }

void run_pieces(int64_t pieces, Piece piece, const void* body) { pool().run(pieces, piece, body); }

}  // namespace espresso

extern "C" {

// Sets on how many threads kernels work, the calling one among them, 1 at first; and from how many elements on. Results do not
// depend on it.
void espresso_threads(int count, int64_t least) {
    espresso::threads.store(std::clamp(count, 1, espresso::MOST_THREADS));
    espresso::least_numel.store(least);
}

}  // extern "C"
