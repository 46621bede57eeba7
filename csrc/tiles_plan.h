// The plan of the tiled strategy: how vectors are shaped, and how axes are cut into tiles and blocks.

#ifndef VICINAL_TILES_PLAN_H
#define VICINAL_TILES_PLAN_H

#include <memory>
#include <vector>

#include "problem.h"
#include "tiles.h"

namespace vicinal {

// What the targets of one axis see there, target by target: one list of sources.
struct SourceAxis {
    std::vector<int32_t> low, high, first, bias_offset;
    int32_t step = 1;
    int32_t turn = 0;
};

struct SourceList {
    SourceAxis axis[AXES];
    int member;
};

// How targets see sources, and what a plan is chosen by besides.
struct PlanRequest {
    std::vector<SourceList> lists;
    int64_t targets[AXES], sources[AXES];  // the sample's own grids
    int lanes;
    int pair;                    // numbers in a unit
    bool targets_in_lanes;       // a tile is `lanes` targets, and sources are taken one by one
    int64_t key_dim, value_dim;  // channels of a score, and of a weighted sum
    int64_t floats;              // packed per source
    int64_t token_bytes;         // from one target or source to the next, in memory
    int64_t copies;              // batch times heads: how often the units are run
    int colours;                 // of units on an axis, if units of one colour should share no source; 0 if they may
    int64_t unit_bytes;          // at most, for a panel or a unit that does its whole backward; 0: as is best
};

// One class of targets on one axis, with the memory that its `Axis` points into.
struct ClassAxis {
    Axis axis;
    std::vector<Run> tiles, blocks;
    std::vector<int32_t> anchors;
    std::vector<Interval> sources;
    std::vector<std::vector<int32_t>> numbers;
};

struct Plan {
    int order[AXES];
    int rows_per_vector;
    int tile_rows, tile_columns;  // of targets, at most
    int64_t panel_bytes;
    bool is_far;  // what all heads read of a block does not stay in a second-level cache
    std::vector<ClassAxis> classes[AXES];  // on each axis in its new place
    std::vector<Unit> units;       // colour by colour
    std::vector<int64_t> colours;  // where each colour's units begin, and the end
    std::vector<int32_t> member_of_list;
    bool is_closed;  // units of one colour share no source, every source belongs to a unit, and those of each fit
    int64_t tiles, computed;  // of all classes
};

// Lists of sources for queries that look at keys, one per member.
std::vector<SourceList> forward_lists(const std::vector<Member>& members, const Group& group);

// Lists of sources for keys that are seen by queries: one per member, or more where an axis wraps.
std::vector<SourceList> backward_lists(const std::vector<Member>& members, const Group& group);

// Extra tokens that all queries see.
std::vector<SourceList> extra_lists(const Member& member, int64_t tokens);

std::shared_ptr<const Plan> make_plan(const PlanRequest& request);

// Whether a bias's centers are the coordinates themselves, as on one grid; if not, only queries can look it up.
bool has_plain_centers(const std::vector<Member>& members);

}  // namespace vicinal

#endif
