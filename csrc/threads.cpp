#include "threads.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <vector>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(_WIN32)
#include <malloc.h>
#else
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace vicinal {
namespace {

constexpr size_t ALIGNMENT = 64;
constexpr int SLOTS = 24;

std::atomic<bool> is_forked_child{false};

#if !defined(_WIN32)
// OpenMP's threads do not survive a fork, and libgomp waits for them forever.
[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });
#endif

// A panel of half a megabyte is read all over for every tile. Its 128 pages of 4 KB are more than a first-level TLB knows;
// where the system can, it lies in one large page.
constexpr size_t LARGE_PAGE = 2 << 20, LEAST_IN_LARGE_PAGES = 256 << 10;

void* allocate(size_t bytes) {
#if defined(_WIN32)
    void* memory = _aligned_malloc(bytes, ALIGNMENT);
#else
    void* memory = nullptr;
    const bool is_large = bytes >= LEAST_IN_LARGE_PAGES;
    if (is_large) bytes = (bytes + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    if (posix_memalign(&memory, is_large ? LARGE_PAGE : ALIGNMENT, bytes)) memory = nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (is_large && memory) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
#endif
    if (!memory) throw std::bad_alloc();
    return memory;
}

void release(void* memory) {
#if defined(_WIN32)
    _aligned_free(memory);
#else
    std::free(memory);
#endif
}

struct Workspace {
    void* memory[SLOTS] = {};
    size_t bytes[SLOTS] = {};
    ~Workspace() {
        for (void* piece : memory) release(piece);
    }
};

// Of a piece that is kept, a sanitizer lets nobody touch more than was asked for this time.
void allow_only([[maybe_unused]] void* memory, [[maybe_unused]] size_t asked, [[maybe_unused]] size_t all) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory, asked);
    __asan_poison_memory_region(static_cast<char*>(memory) + asked, all - asked);
#endif
}

thread_local Workspace held;
thread_local bool is_poisoned = false;

constexpr int POISON = 0xff;  // a NaN in every type

#if defined(_OPENMP)
// Units that one thread takes before it helps the others. From call to call they are the same, so that what they read
// and write is still in the caches of that thread's core.
class alignas(64) Stretch {
public:
    void open(int64_t begin, int64_t end) {
        next_ = begin;
        end_ = end;
    }
    // The next unit, or -1.
    int64_t take() {
        if (next_.load(std::memory_order_relaxed) >= end_) return -1;
        const int64_t unit = next_.fetch_add(1, std::memory_order_relaxed);
        return unit < end_ ? unit : -1;
    }

private:
    std::atomic<int64_t> next_{0};
    int64_t end_ = 0;
};
#endif

}  // namespace

void parallel_for(int64_t count, int64_t threads, const std::function<void(int64_t)>& work) {
    threads = std::min(threads, count);
#if defined(_OPENMP)
    if (threads > 1 && !is_forked_child) {
        std::exception_ptr problem;
        std::atomic<bool> has_failed{false};
        std::vector<Stretch> stretches(static_cast<size_t>(threads));
        for (int64_t i = 0; i < threads; ++i) stretches[i].open(count * i / threads, count * (i + 1) / threads);
        const auto run = [&](int64_t unit) {
            try {
                work(unit);
            } catch (...) {
                // an exception must not leave the region: the first one is kept
                if (!has_failed.exchange(true)) problem = std::current_exception();
            }
        };
#pragma omp parallel num_threads(int(threads))
        for (int64_t i = 0, own = omp_get_thread_num(); i < threads; ++i) {
            Stretch& stretch = stretches[(own + i) % threads];
            for (int64_t unit = stretch.take(); unit >= 0 && !has_failed.load(std::memory_order_relaxed);
                 unit = stretch.take())
                run(unit);
        }
        if (problem) std::rethrow_exception(problem);
        return;
    }
#endif
    for (int64_t unit = 0; unit < count; ++unit) work(unit);
}

void* workspace(int slot, size_t bytes) {
    bytes = std::max((bytes + ALIGNMENT - 1) / ALIGNMENT, size_t(1)) * ALIGNMENT;
    if (held.bytes[slot] < bytes) {
        release(held.memory[slot]);
        held.memory[slot] = nullptr;
        held.bytes[slot] = 0;
        held.memory[slot] = allocate(bytes);
        held.bytes[slot] = bytes;
        // kernels compute with numbers that nobody reads; denormal ones among them would take a hundred times as long
        std::memset(held.memory[slot], is_poisoned ? POISON : 0, bytes);
        std::memset(held.memory[slot], 0, ALIGNMENT);  // where users note what the rest holds
    }
    allow_only(held.memory[slot], bytes, held.bytes[slot]);
    return held.memory[slot];
}

size_t workspace_bytes() {
    size_t total = 0;
    for (size_t bytes : held.bytes) total += bytes;
    return total;
}

void poison_workspace() {
    is_poisoned = true;
    for (int slot = 0; slot < SLOTS; ++slot)
        if (held.bytes[slot]) {
            allow_only(held.memory[slot], held.bytes[slot], held.bytes[slot]);
            std::memset(held.memory[slot], POISON, held.bytes[slot]);
        }
}

}  // namespace vicinal
