#include "problem.h"

namespace vicinal {

void tiles_forward(const Problem&) { throw BadArgument("the tiled strategy is not built"); }
void tiles_backward(const Problem&) { throw BadArgument("the tiled strategy is not built"); }
void tiles_describe(const Problem&, vicinal_description*) { throw BadArgument("the tiled strategy is not built"); }
vicinal_strategy choose_strategy(const Problem&) { return VICINAL_SIMPLE; }

}  // namespace vicinal
