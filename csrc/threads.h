// Running work on several threads.

#ifndef VICINAL_THREADS_H
#define VICINAL_THREADS_H

#include <cstddef>
#include <cstdint>
#include <functional>

namespace vicinal {

// Calls work(0) ... work(count - 1) on at most `threads` threads, in any order; the first exception is thrown again.
// Each thread begins with a stretch of its own, the same from call to call, and then helps the others.
// Serial where there is one unit or thread, in a child that was forked after this library was loaded (where OpenMP's
// threads are gone), and where built without OpenMP.
void parallel_for(int64_t count, int64_t threads, const std::function<void(int64_t)>& work);

// Memory of the calling thread, at least so many bytes, aligned to 64; kept for the next call. The first 64 bytes are
// zero when it is new, the rest is what earlier calls left: floats, never denormal ones but those of the tensors.
// `slot` tells apart pieces that are held at the same time.
void* workspace(int slot, size_t bytes);
size_t workspace_bytes();

// Fills the calling thread's workspace with NaN, now and whenever it grows: for tests.
void poison_workspace();

}  // namespace vicinal

#endif
