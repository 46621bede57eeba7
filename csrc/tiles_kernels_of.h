// The kernels for one instruction set, as a table of functions.

#ifndef VICINAL_TILES_KERNELS_OF_H
#define VICINAL_TILES_KERNELS_OF_H

#include "tiles_closed.h"

namespace vicinal {
namespace {

template <class S>
TileKernels all_of() {
    TileKernels kernels = {};
    kernels.lanes = S::LANES;
    kernels.pair = S::PAIR;
    kernels.grad_bias_floats = [](const Job& job) { return grad_bias_floats(job, S::LANES); };
    kernels.fold_grad_bias = [](const Job& job, const float* from, float* to) { fold_grad_bias(job, S::LANES, from, to); };
    kernels.row_sums = row_sums_unit<S>;
    kernels.forward = forward_unit<S>;
    kernels.grad_query = grad_query_unit<S>;
    kernels.grad_key_value = grad_key_value_unit<S>;
    if constexpr (S::PAIR == 1) kernels.closed = closed_unit<S>;
    return kernels;
}

template <class S>
const TileKernels* kernels_of() {
    static const TileKernels kernels = all_of<S>();
    return &kernels;
}

}  // namespace
}  // namespace vicinal

#endif
