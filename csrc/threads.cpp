#include "threads.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>

#if defined(_WIN32)
#include <malloc.h>
#else
#include <pthread.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vicinal {
namespace {

constexpr size_t ALIGNMENT = 64;
constexpr int SLOTS = 16;

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

thread_local Workspace held;
thread_local bool is_poisoned = false;

constexpr int POISON = 0xff;  // a NaN in every type

}  // namespace

void parallel_for(int64_t count, int64_t threads, const std::function<void(int64_t)>& work) {
    threads = std::min(threads, count);
#if defined(_OPENMP)
    if (threads > 1 && !is_forked_child) {
        std::exception_ptr problem;
        std::atomic<bool> has_failed{false};
#pragma omp parallel for schedule(dynamic, 1) num_threads(int(threads))
        for (int64_t unit = 0; unit < count; ++unit) {
            if (has_failed.load(std::memory_order_relaxed)) continue;
            try {
                work(unit);
            } catch (...) {
                // an exception must not leave the region: the first one is kept
                if (!has_failed.exchange(true)) problem = std::current_exception();
            }
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
        if (held.bytes[slot]) std::memset(held.memory[slot], POISON, held.bytes[slot]);
}

}  // namespace vicinal
