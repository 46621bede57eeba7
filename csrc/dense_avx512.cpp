// The dense strategy's kernels for processors with AVX-512.

#include "dense.h"

#if defined(__AVX512F__)
#include "dense_kernel.h"
namespace vicinal {
const DenseKernels* dense_avx512_kernels() { return dense_kernels_of<Avx512>(); }
}  // namespace vicinal
#else
namespace vicinal {
const DenseKernels* dense_avx512_kernels() { return nullptr; }
}  // namespace vicinal
#endif
