// Which vector instructions may be used: what the machine and its operating system have, and what this library was
// built with. The build defines VICINAL_WITH_AVX2, VICINAL_WITH_AVX512 and VICINAL_WITH_AVX512_BF16 where the compiler
// takes the flags of the files that need them.

#ifndef VICINAL_ISA_H
#define VICINAL_ISA_H

#include "vicinal.h"

namespace vicinal {

vicinal_isa best_isa();

// What a call uses that leaves it open.
vicinal_isa usual_isa(int64_t dtype);

}  // namespace vicinal

#endif
