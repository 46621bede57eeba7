// The kernels for any processor.

#include "tiles_kernels_of.h"

namespace vicinal {
const TileKernels* base_kernels() { return kernels_of<Base>(); }
}  // namespace vicinal
