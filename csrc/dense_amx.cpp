// The dense strategy's kernels for bfloat16 on processors with matrix registers.

#include "dense.h"

#if defined(VICINAL_WITH_AMX)
#include "amx_dense.h"
namespace vicinal {
const DenseKernels* dense_amx_kernels() {
    static const DenseKernels kernels = {TILE, amx_dense_forward, amx_dense_backward};
    return &kernels;
}
}  // namespace vicinal
#else
namespace vicinal {
const DenseKernels* dense_amx_kernels() { return nullptr; }
}  // namespace vicinal
#endif
