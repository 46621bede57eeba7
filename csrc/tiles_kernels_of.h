// The kernels for one instruction set, as a table of functions.

#ifndef VICINAL_TILES_KERNELS_OF_H
#define VICINAL_TILES_KERNELS_OF_H

#include "tiles_backward.h"

namespace vicinal {
namespace {

template <class S>
const TileKernels* kernels_of() {
    static const TileKernels kernels = {S::LANES, S::PAIR, row_sums_unit<S>, forward_unit<S>, grad_query_unit<S>,
                                        grad_key_value_unit<S>};
    return &kernels;
}

}  // namespace
}  // namespace vicinal

#endif
