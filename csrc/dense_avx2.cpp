// The dense strategy's kernels for processors with AVX2.

#include "dense.h"

#if defined(__AVX2__)
#include "dense_kernel.h"
namespace vicinal {
const DenseKernels* dense_avx2_kernels() { return dense_kernels_of<Avx2>(); }
}  // namespace vicinal
#else
namespace vicinal {
const DenseKernels* dense_avx2_kernels() { return nullptr; }
}  // namespace vicinal
#endif
