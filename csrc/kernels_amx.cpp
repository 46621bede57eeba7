// The kernels for bfloat16 on processors with matrix registers.

#include "tiles.h"

#if defined(VICINAL_WITH_AMX)
#include "amx_backward.h"

namespace vicinal {
const TileKernels* amx_kernels() {
    static const TileKernels kernels = [] {
        TileKernels all = {};
        all.lanes = TILE;
        all.pair = 2;
        all.targets_in_lanes = true;
        all.row_sums = row_sums_unit<Avx512>;
        all.forward = amx_forward_unit;
        all.grad_query = amx_grad_query_unit;
        all.grad_key_value = amx_grad_key_value_unit;
        all.grad_bias_floats = amx_bias_floats;
        all.fold_grad_bias = fold_bias_gradient;
        return all;
    }();
    return &kernels;
}
}  // namespace vicinal
#else
namespace vicinal {
const TileKernels* amx_kernels() { return nullptr; }
}  // namespace vicinal
#endif
