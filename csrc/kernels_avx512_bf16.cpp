// The kernels for bfloat16 on processors that multiply it in pairs.

#include "tiles.h"

#if defined(__AVX512BF16__)
#include "tiles_kernels_of.h"
namespace vicinal {
const TileKernels* avx512_bf16_kernels() { return kernels_of<Avx512Bf16>(); }
}  // namespace vicinal
#else
namespace vicinal {
const TileKernels* avx512_bf16_kernels() { return nullptr; }
}  // namespace vicinal
#endif
