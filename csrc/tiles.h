// The tiled strategy: what its plan hands to the kernels. Plain data, because the kernels are compiled once per
// instruction set and must share no code with the rest.
//
// The kernels know *targets* and *sources*. In the forward and for grad_query, targets are queries and sources the
// keys they see; for grad_key and grad_value, targets are keys and sources the queries that see them. A target's
// sources are one interval per axis, in units of the axis's step.
//
// Sources are packed into a panel, in vectors of LANES sources: R neighbors on the middle axis times LANES / R on the
// last, lane = column * R + row. A tile is a few neighboring targets, T1 on the middle axis times T2 on the last, and
// is computed against all vectors that any of them sees, with one bit per (target, source) for what it really sees.

#ifndef VICINAL_TILES_H
#define VICINAL_TILES_H

#include <cstddef>
#include <cstdint>

#include "vicinal.h"

namespace vicinal {

constexpr int MOST_TARGETS = 8;    // targets of a tile
constexpr int MOST_VECTORS = 32;   // vectors of scores held at once
constexpr int DIM_BLOCK = 128;     // units of a dot product taken at once

// The sources of the targets of one class (one residue of the step), on one axis.
struct Interval {
    const int32_t* low;          // [targets of the class]: first source, in steps
    const int32_t* high;         // one past the last
    const int32_t* bias_offset;  // a source `u` steps on reads the bias at bias_offset + u; null where there is none
    int32_t first;               // source u stands at coordinate first + step * u
    int32_t step;
    int32_t turn;                // where the axis wraps: u is taken modulo this; 0 elsewhere
};

// A member that came earlier: its keys are left out. Plain tables, in the natural coordinates of queries and keys.
struct Earlier {
    const int32_t* start[3];
    const int32_t* count[3];
    int32_t step[3];
    int32_t length[3];
    bool wraps[3];
};

struct Run {  // of targets or of tiles
    int32_t begin, end;
};

// One axis of a class of targets: target i stands at first + step * i.
struct Axis {
    int32_t first, step, targets;
    int32_t num_tiles, num_blocks;
    const Run* tiles;                    // of targets
    const Run* blocks;                   // of tiles
    const int32_t* anchors;              // [blocks][source lists]: vectors of rows begin here, or R steps further
    const Interval* sources;             // per source list
};

// One class of targets on all three axes, and one block of its tiles.
struct Unit {
    const Axis* axis[3];
    int32_t block[3];
    // In the backward at once: on each axis, sources below `shared_low` and from `shared_high` on are also those of
    // blocks of an earlier colour.
    int32_t shared_low[3], shared_high[3];
};

struct Operand {
    const char* data;
    int64_t batch, head, axis[3], channel;  // strides in elements
    int32_t dim;
};

// All that is the same for the units of one (row of tables, head group, direction).
struct Job {
    int64_t dtype;
    int32_t num_sources;        // source lists: union members, and for wrapping transposed tables their turns
    int32_t rows_per_vector;
    int32_t tile_rows, tile_columns;  // of targets, at most
    const Earlier* earlier;     // of all members; source list s leaves out the first num_earlier[s]
    const int32_t* num_earlier;
    int64_t panel_bytes;        // memory of a panel
    bool streams;               // what is written is too much for the caches
    bool is_far;                // what all heads read of a block does not stay in a second-level cache
    int32_t order[3];           // which axis of the problem each axis here is
    // relative position bias: [heads of the group, *bias_length], in the axes' order here; null where there is none
    const float* bias;
    int32_t bias_length[3];
    int64_t bias_stride[3], bias_head;
    bool bias_is_reversed;      // targets are keys: the index falls with the source
    const int32_t* center[3];   // of queries; used where targets are keys and centers are not the coordinates
    int64_t serial;             // tells calls apart, for what threads remember
    int64_t batch, first_head, heads, shared;
    int32_t extra_tokens;
    const int64_t* extra_lengths;
    float scale;
    Operand query, key, value, extra_key, extra_value, out, grad_out;  // axes in the order here
    Operand grad_query, grad_key, grad_value;
    float* lse;                 // strides below, as for grad_lse
    const float* grad_lse;
    int64_t lse_batch, lse_head, lse_axis[3];
    int64_t grad_lse_batch, grad_lse_head, grad_lse_axis[3];
    float* row_sums;            // strides of a contiguous lse
    int64_t sums_batch, sums_head, sums_axis[3];
};

// Where a kernel gets its memory.
struct Workspace {
    void* (*get)(int slot, size_t bytes);
};

struct TileKernels {
    int lanes;
    int pair;  // numbers in a unit of a dot product: 2 for bfloat16 where it has instructions
    bool targets_in_lanes;  // a tile is `lanes` targets, and sources are taken one by one
    // Room for the gradient of one head's bias, and what adds that to the table of the head.
    int64_t (*grad_bias_floats)(const Job& job);
    void (*fold_grad_bias)(const Job& job, const float* from, float* to);
    // row_sums = sum over channels of grad_out * out, minus grad_lse, for the targets of a unit
    void (*row_sums)(const Job& job, const Unit& unit, int64_t sample, int64_t head, const Workspace& workspace);
    void (*forward)(const Job& job, const Unit& unit, int64_t sample, int64_t head, const Workspace& workspace);
    // grad_bias: room for this head's table, added to; or null
    void (*grad_query)(const Job& job, const Unit& unit, int64_t sample, int64_t head, float* grad_bias,
                       const Workspace& workspace);
    // head is a key head; the query heads that share it are summed here
    void (*grad_key_value)(const Job& job, const Unit& unit, int64_t sample, int64_t head, const Workspace& workspace);
    // all of the backward at once, for a unit of queries whose keys no other unit sees meanwhile; null where there is
    // none. head is a key head; grad_bias as above, only where a key head has one query head
    void (*closed)(const Job& job, const Unit& unit, int64_t sample, int64_t head, float* grad_bias,
                   const Workspace& workspace);
};

const TileKernels* base_kernels();
const TileKernels* avx2_kernels();    // null where the compiler could not build them
const TileKernels* avx512_kernels();
const TileKernels* avx512_bf16_kernels();  // for bfloat16 only
const TileKernels* amx_kernels();          // for bfloat16 only

}  // namespace vicinal

#endif
