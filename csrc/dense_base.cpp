// The dense strategy's kernels for any processor.

#include "dense_kernel.h"
namespace vicinal {
const DenseKernels* dense_base_kernels() { return dense_kernels_of<Base>(); }
}  // namespace vicinal
