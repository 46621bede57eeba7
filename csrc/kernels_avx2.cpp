// The kernels for processors with AVX2 and FMA.

#include "tiles.h"

#if defined(__AVX2__)
#include "tiles_kernels_of.h"
namespace vicinal {
const TileKernels* avx2_kernels() { return kernels_of<Avx2>(); }
}  // namespace vicinal
#else
namespace vicinal {
const TileKernels* avx2_kernels() { return nullptr; }
}  // namespace vicinal
#endif
