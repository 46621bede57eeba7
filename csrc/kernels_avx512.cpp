// The kernels for processors with AVX-512.

#include "tiles.h"

#if defined(__AVX512F__)
#include "tiles_kernels_of.h"
namespace vicinal {
const TileKernels* avx512_kernels() { return kernels_of<Avx512>(); }
}  // namespace vicinal
#else
namespace vicinal {
const TileKernels* avx512_kernels() { return nullptr; }
}  // namespace vicinal
#endif
