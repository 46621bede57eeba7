// A tile for the matrix registers: 16 targets, one to a lane, against the sources that any of them sees, one to a row of
// registers. What is there for one source and all targets is a vector, so that softmax runs down the rows, and masks are
// 16 bits: those of the source's row times those of its column.
//
// Sources come in groups of up to 16 neighbors of one row. Two groups side by side are wide: weighted sums take them at
// once.

#ifndef VICINAL_AMX_KERNEL_H
#define VICINAL_AMX_KERNEL_H

#include "amx_panel.h"

namespace vicinal {
namespace {

constexpr int MOST_GROUPS = 32;  // of sources that are looked at together

struct AmxPass {
    int count;                                 // of groups
    int64_t place[MOST_GROUPS];                // of the first source in the panel
    int sources[MOST_GROUPS];                  // 1 to 16
    bool is_wide[MOST_GROUPS];                 // together with the next group
    uint16_t seen[MOST_GROUPS][TILE];          // whose targets see a source
    const float* bias[MOST_GROUPS];            // [source][lane] in the table or, where that has no such rows, in a room
    int64_t plane[MOST_GROUPS], row[MOST_GROUPS], column[MOST_GROUPS];  // of the first source, in steps; where asked for
};

// A head's bias as tiles read it, times log2(e): [plane][row][column][lane], where the lane of row r and column c of a
// tile finds what stands r rows and c columns before. Without that, each is looked up by itself.
struct AmxBias {
    const float* table = nullptr;
    const float* source = nullptr;  // as it was given
    int64_t rows, columns;
    bool is_even;  // the block's targets read the table one place apart
};

VICINAL_INLINE int64_t amx_bias_rows(const Job& job) { return job.bias_length[1] + job.tile_rows - 1; }
VICINAL_INLINE int64_t amx_bias_columns(const Job& job) { return job.bias_length[2] + job.tile_columns - 1; }
VICINAL_INLINE int64_t amx_bias_floats(const Job& job) {
    return (job.bias_length[0] * amx_bias_rows(job) * amx_bias_columns(job) + 2) * TILE;
}

// A tile may look at a source before those that anybody sees, and after them, though nothing comes of it.
constexpr int64_t BIAS_BEGIN = TILE;

// Calls function(place in the table, place in the bias) for all that tiles may read.
template <class Function>
inline void each_bias(const Job& job, const Function& function) {
    const int64_t rows = amx_bias_rows(job), columns = amx_bias_columns(job);
    for (int64_t plane = 0; plane < job.bias_length[0]; ++plane)
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t column = 0; column < columns; ++column)
                for (int r = 0; r < job.tile_rows; ++r)
                    for (int c = 0; c < job.tile_columns; ++c) {
                        int64_t index[3] = {plane, row - r, column - c};
                        if (index[1] < 0 || index[1] >= job.bias_length[1]) continue;
                        if (index[2] < 0 || index[2] >= job.bias_length[2]) continue;
                        int64_t at = 0;
                        for (int a = 0; a < 3; ++a) {
                            if (job.bias_is_reversed) index[a] = job.bias_length[a] - 1 - index[a];
                            at += index[a] * job.bias_stride[a];
                        }
                        function(BIAS_BEGIN + ((plane * rows + row) * columns + column) * TILE + r * job.tile_columns + c, at);
                    }
}

// The table of a head in the thread's workspace; kept while the head stays the same.
inline AmxBias amx_bias_of(const Job& job, const Block& block, int64_t head, const Workspace& workspace) {
    AmxBias bias;
    if (!job.bias) return bias;
    bias.rows = amx_bias_rows(job);
    bias.columns = amx_bias_columns(job);
    bias.source = job.bias + head * job.bias_head;
    const auto is_even = [&](int axis, const Run& run) {
        for (int list = 0; list < job.num_sources; ++list) {
            const int32_t* offset = block.unit.axis[axis]->sources[list].bias_offset;
            for (int32_t i = run.begin + 1; i < run.end; ++i)
                if (offset[i] != offset[i - 1] - 1) return false;
        }
        return true;
    };
    bias.is_even = !job.center[0] && is_even(1, block.row) && is_even(2, block.column);
    const int64_t floats = amx_bias_floats(job);
    char* memory = static_cast<char*>(workspace.get(AMX_BIAS, static_cast<size_t>(floats * 4 + 64)));
    RememberedBias* remembered = reinterpret_cast<RememberedBias*>(memory);
    float* table = reinterpret_cast<float*>(memory + 64);
    bias.table = table;
    if (remembered->serial != job.serial || remembered->head != head) {
        std::memset(table, 0, static_cast<size_t>(floats) * 4);
        each_bias(job, [&](int64_t to, int64_t from) { table[to] = with_plain_nan(bias.source[from] * LOG2_E); });
        remembered->serial = job.serial;
        remembered->head = head;
    }
    return bias;
}

// The columns that a column of tiles sees, and whose targets see each.
struct AmxColumns {
    int64_t low, count;
    const uint16_t* seen;  // with zeros behind it
};

// The groups that a tile looks at, a pass at a time.
struct AmxWalk {
    const Block& block;
    const Sources& sources;
    const Chunk& chunk;
    const AmxBias& bias;
    bool targets_are_queries;
    float* bias_room;  // [MOST_GROUPS][16][lane], where biases are looked up one by one
    AmxRow* rows;
    AmxColumns* columns;
    int64_t num_rows = 0;
    int64_t panel_columns;  // of a place

    AmxWalk(const Block& b, const Sources& s, const Chunk& c, const AmxBias& table, bool queries, const Workspace& workspace)
        : block(b), sources(s), chunk(c), bias(table), targets_are_queries(queries) {
        const int64_t tiles = b.column_tiles.end - b.column_tiles.begin, groups = c.group_end - c.group_begin;
        panel_columns = columns_of_place(c);
        int64_t masks = 0;
        for (int64_t tile = 0; tile < tiles; ++tile) masks += columns_of(tile).count + 2 * TILE;
        const bool looks_up = b.job.bias && !s.is_extra && !table.is_even;
        Arena arena{static_cast<char*>(workspace.get(
            AMX_WALK, static_cast<size_t>(tiles * sizeof(AmxColumns) + groups * sizeof(AmxRow) + masks * 2 +
                                          (looks_up ? MOST_GROUPS * TILE * TILE * 4 : 0) + 64 * 5)))};
        columns = arena.take<AmxColumns>(tiles);
        rows = arena.take<AmxRow>(groups);
        uint16_t* seen = arena.take<uint16_t>(masks);
        bias_room = looks_up ? arena.take<float>(MOST_GROUPS * TILE * TILE) : nullptr;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            columns[tile] = columns_of(tile);
            if (tile && sees_alike(tile, tile - 1)) {
                columns[tile].seen = columns[tile - 1].seen;
                continue;
            }
            columns[tile].seen = seen;
            fill_columns(tile, seen);
            seen += columns[tile].count + 2 * TILE;
        }
    }

    VICINAL_INLINE Run targets_of(int64_t tile) const { return block.unit.axis[2]->tiles[block.column_tiles.begin + tile]; }

    VICINAL_INLINE AmxColumns columns_of(int64_t tile) const {
        const Run run = targets_of(tile);
        int64_t low = most(sources.low(2, run.begin), chunk.column_begin);
        low -= (low - chunk.column_begin) & 1;  // pairs are not torn apart
        return {low, most(least(sources.high(2, run.end - 1), chunk.column_end) - low, 0), nullptr};
    }

    // What a target sees of a tile's columns.
    VICINAL_INLINE Run seen_by(int64_t tile, int32_t column) const {
        const AmxColumns& own = columns[tile];
        return {static_cast<int32_t>(most(sources.low(2, column) - own.low, 0)),
                static_cast<int32_t>(least(sources.high(2, column) - own.low, own.count))};
    }

    // Whether two tiles have the same masks, as most neighbors do.
    VICINAL_INLINE bool sees_alike(int64_t tile, int64_t other) const {
        const Run run = targets_of(tile), before = targets_of(other);
        if (columns[tile].count != columns[other].count || run.end - run.begin != before.end - before.begin) return false;
        for (int32_t i = 0; i < run.end - run.begin; ++i) {
            const Run a = seen_by(tile, run.begin + i), b = seen_by(other, before.begin + i);
            if (a.begin != b.begin || a.end != b.end) return false;
        }
        return true;
    }

    inline void fill_columns(int64_t tile, uint16_t* seen) const {
        const AmxColumns& own = columns[tile];
        const Run run = targets_of(tile);
        for (int64_t i = 0; i < own.count + 2 * TILE; ++i) seen[i] = 0;
        for (int32_t column = run.begin; column < run.end; ++column) {
            uint16_t lanes = 0;
            for (int r = 0; r < block.job.tile_rows; ++r)
                lanes = static_cast<uint16_t>(lanes | 1u << (r * block.job.tile_columns + column - run.begin));
            const Run sees = seen_by(tile, column);
            for (int64_t i = sees.begin; i < sees.end; ++i) seen[i] = static_cast<uint16_t>(seen[i] | lanes);
        }
    }

    // Finds the rows of sources that a row of tiles sees.
    VICINAL_INLINE void open_row(const Tile& tile) {
        const Frame& f = sources.frame;
        const int64_t low = sources.low(1, tile.row.begin), high = sources.high(1, tile.row.end - 1);
        const uint32_t all = (1u << block.job.tile_columns) - 1u;
        num_rows = 0;
        for (int64_t plane = sources.low(0, tile.plane); plane < sources.high(0, tile.plane); ++plane) {
            const int64_t base = (plane - f.plane_begin) * f.groups - f.row_origin;  // of row 0
            const int64_t begin = most(low, chunk.group_begin - base), end = least(high, chunk.group_end - base);
            for (int64_t row = begin; row < end; ++row) {
                uint32_t lanes = 0;
                for (int r = 0; r < tile.rows(); ++r)
                    if (row >= sources.low(1, tile.row.begin + r) && row < sources.high(1, tile.row.begin + r))
                        lanes |= all << (r * block.job.tile_columns);
                if (!lanes) continue;
                const int64_t group = base + row - chunk.group_begin;
                rows[num_rows++] = {plane, row, group, chunk.place_of(plane - f.plane_begin, row - f.row_origin, group), lanes};
            }
        }
    }

    // Notes up to 16 sources; false where nobody sees any of them.
    VICINAL_INLINE bool note(AmxPass& pass, int n, const AmxRow& row, const AmxColumns& across, int64_t first) const {
        const __m256i lanes = _mm256_set1_epi16(static_cast<int16_t>(row.lanes));
        const __m256i seen = _mm256_and_si256(lanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(across.seen + first)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(pass.seen[n]), seen);
        pass.place[n] = row.place * panel_columns + across.low + first - chunk.column_begin;
        pass.sources[n] = static_cast<int>(most(least(across.count - first, TILE), 0));
        pass.is_wide[n] = false;
        return !_mm256_testz_si256(seen, seen);
    }

    // What members and biases ask of it besides.
    VICINAL_INLINE void note_where(AmxPass& pass, int n, const AmxRow& row, const AmxColumns& across, int64_t first) const {
        pass.plane[n] = row.plane;
        pass.row[n] = row.row;
        pass.column[n] = across.low + first;
    }

    // Calls flush(pass) for every pass.
    template <class Flush>
    VICINAL_INLINE void operator()(const Tile& tile, AmxPass& pass, const Flush& flush) const {
        const AmxColumns& across = columns[tile.column_tile];
        const bool has_earlier = !sources.is_extra && block.job.num_earlier[sources.list] > 0;
        const bool has_bias = !sources.is_extra && bias.table;
        pass.count = 0;
        for (int64_t i = 0; i < num_rows; ++i)
            for (int64_t first = 0; first < across.count; first += 2 * TILE) {
                const int n = pass.count, groups = across.count - first > TILE ? 2 : 1;
                bool is_seen = false;
                for (int g = 0; g < groups; ++g)
                    is_seen |= note(pass, n + g, rows[i], across, first + g * TILE);
                if (!is_seen) continue;
                pass.is_wide[n] = groups == 2;
                for (int g = n; g < n + groups && (has_earlier || has_bias); ++g) {
                    note_where(pass, g, rows[i], across, first + (g - n) * TILE);
                    if (has_earlier) leave_out_earlier(tile, pass, g);
                    if (has_bias) find_bias(tile, pass, g);
                }
                pass.count += groups;
                if (pass.count + 2 > MOST_GROUPS) {
                    flush(pass);
                    pass.count = 0;
                }
            }
        if (pass.count) flush(pass);
    }

    // Calls function(lane, targets of the class on the last two axes).
    template <class Function>
    VICINAL_INLINE void each_lane_of(const Tile& tile, const Function& function) const {
        for (int32_t r = tile.row.begin; r < tile.row.end; ++r)
            for (int32_t c = tile.column.begin; c < tile.column.end; ++c)
                function((r - tile.row.begin) * block.job.tile_columns + c - tile.column.begin, r, c);
    }

    // Clears what an earlier member of a union has.
    VICINAL_APART void leave_out_earlier(const Tile& tile, AmxPass& pass, int n) const {
        const Frame& f = sources.frame;
        const Axis* const* axis = block.unit.axis;
        for (int i = 0; i < pass.sources[n]; ++i) {
            const int64_t source[3] = {source_coordinate(*f.axis[0], pass.plane[n]),
                                       source_coordinate(*f.axis[1], pass.row[n]),
                                       source_coordinate(*f.axis[2], pass.column[n] + i)};
            each_lane_of(tile, [&](int lane, int32_t r, int32_t c) {
                if (!(pass.seen[n][i] >> lane & 1u)) return;
                const int64_t target[3] = {axis[0]->first + static_cast<int64_t>(axis[0]->step) * tile.plane,
                                           axis[1]->first + static_cast<int64_t>(axis[1]->step) * r,
                                           axis[2]->first + static_cast<int64_t>(axis[2]->step) * c};
                for (int m = 0; m < block.job.num_earlier[sources.list]; ++m) {
                    bool is_seen = true;
                    for (int a = 0; a < 3 && is_seen; ++a)
                        is_seen = sees_earlier(block.job.earlier[m], a, targets_are_queries ? target[a] : source[a],
                                               targets_are_queries ? source[a] : target[a]);
                    if (is_seen) pass.seen[n][i] = static_cast<uint16_t>(pass.seen[n][i] & ~(1u << lane));
                }
            });
        }
    }

    VICINAL_INLINE void find_bias(const Tile& tile, AmxPass& pass, int n) const {
        if (bias.is_even) {
            const Interval* const* axis = sources.frame.axis;
            const int64_t plane = axis[0]->bias_offset[tile.plane] + pass.plane[n];
            const int64_t row = axis[1]->bias_offset[tile.row.begin] + pass.row[n];
            const int64_t column = axis[2]->bias_offset[tile.column.begin] + pass.column[n];
            pass.bias[n] = bias.table + BIAS_BEGIN + ((plane * bias.rows + row) * bias.columns + column) * TILE;
        } else {
            pass.bias[n] = bias_room + n * TILE * TILE;
            look_up_bias(tile, pass, n);
        }
    }

    // Where the bias has a pair that sees each other.
    VICINAL_INLINE int64_t bias_place(const int32_t* target, const int64_t* place, const int64_t* target_at) const {
        const Job& job = block.job;
        int64_t at = 0;
        for (int d = 0; d < 3; ++d) {
            const Interval& axis = *sources.frame.axis[d];
            int64_t index = axis.bias_offset[target[d]] + place[d];
            if (job.center[0]) {
                const int64_t center = job.center[d][axis.first + axis.step * place[d]];
                // key and center differ by whole steps; bias_offset is half the table less the key's place in steps
                const int64_t beyond = (target_at[d] % axis.step - center) / axis.step;
                index = job.bias_length[d] - 1 - axis.bias_offset[target[d]] + beyond;
            } else if (job.bias_is_reversed) {
                index = job.bias_length[d] - 1 - index;
            }
            at += index * job.bias_stride[d];
        }
        return at;
    }

    // Calls function(source of the group, lane, place in the bias) for pairs that see each other.
    template <class Function>
    inline void each_looked_up(const Tile& tile, const AmxPass& pass, int n, const Function& function) const {
        const Axis* const* axis = block.unit.axis;
        for (int i = 0; i < pass.sources[n]; ++i)
            each_lane_of(tile, [&](int lane, int32_t r, int32_t c) {
                if (!(pass.seen[n][i] >> lane & 1u)) return;
                const int32_t target[3] = {static_cast<int32_t>(tile.plane), r, c};
                const int64_t place[3] = {pass.plane[n], pass.row[n], pass.column[n] + i};
                const int64_t at[3] = {axis[0]->first + static_cast<int64_t>(axis[0]->step) * tile.plane,
                                       axis[1]->first + static_cast<int64_t>(axis[1]->step) * r,
                                       axis[2]->first + static_cast<int64_t>(axis[2]->step) * c};
                function(i, lane, bias_place(target, place, at));
            });
    }

    VICINAL_APART void look_up_bias(const Tile& tile, AmxPass& pass, int n) const {
        float* to = bias_room + n * TILE * TILE;
        for (int i = 0; i < TILE * TILE; ++i) to[i] = 0.0f;
        each_looked_up(tile, pass, n, [&](int i, int lane, int64_t at) {
            to[i * TILE + lane] = with_plain_nan(bias.source[at] * LOG2_E);
        });
    }

    // Adds gradients of scores, which stand as [group][source][lane], to those of the bias.
    VICINAL_APART void add_bias_gradient(const Tile& tile, const AmxPass& pass, const float* grads, float* grad_bias) const {
        for (int n = 0; n < pass.count; ++n) {
            const float* from = grads + n * TILE * TILE;
            if (bias.is_even) {
                float* to = grad_bias + (pass.bias[n] - bias.table);
                for (int i = 0; i < pass.sources[n]; ++i, from += TILE, to += TILE)
                    S::store(to, S::add(S::load(to), S::load(from)));
            } else {
                // lane 0 of the table's places is what stands 0 rows and columns before
                each_looked_up(tile, pass, n, [&](int i, int lane, int64_t at) {
                    grad_bias[plain_place(at)] += from[i * TILE + lane];
                });
            }
        }
    }

    VICINAL_INLINE int64_t plain_place(int64_t at) const {
        const Job& job = block.job;
        int64_t index[3];
        for (int a = 0; a < 3; ++a) index[a] = at / job.bias_stride[a] % job.bias_length[a];
        return BIAS_BEGIN + ((index[0] * bias.rows + index[1]) * bias.columns + index[2]) * TILE;
    }
};

// Whether tensors are so large that their lines are worth asking for one by one; those of smaller ones are at hand.
VICINAL_INLINE bool is_worth_errands(const Job& job) { return job.batch * job.query.batch * 2 > (2 << 20); }

// Notes a tile's share of the sources that the next row of tiles is the first to see.
inline void note_next_sources(const AmxWalk& walk, const AmxFiller& filler, const Tile& tile, Errands& errands) {
    const Frame& f = walk.sources.frame;
    const int64_t tiles = walk.block.column_tiles.end - walk.block.column_tiles.begin;
    const int64_t begin = filler.columns * tile.column_tile / tiles, end = filler.columns * (tile.column_tile + 1) / tiles;
    for (int64_t i = 0; i < walk.num_rows; ++i) {
        const AmxRow& last = walk.rows[i];
        if (i + 1 < walk.num_rows && walk.rows[i + 1].plane == last.plane) continue;
        for (int64_t j = 1; j <= tile.rows(); ++j) {
            if (last.row + j >= f.row_origin + f.groups || last.group + j >= walk.chunk.group_end - walk.chunk.group_begin) break;
            if (!filler.is_packed[last.group + j]) filler.note(last.plane, last.row + j, begin, end, errands);
        }
    }
}

// Adds what `add_bias_gradient` has summed up to the gradient of a head's bias.
inline void fold_bias_gradient(const Job& job, const float* table, float* to) {
    each_bias(job, [&](int64_t from, int64_t at) { to[at] += table[from]; });
}

// ---- products

// Scores of N groups: to[group][source][lane]. `rows` is the panel's, `targets` was laid by lay_pairs.
template <int N>
VICINAL_INLINE void score_groups(const AmxPass& pass, int first, const uint16_t* rows, int64_t padded,
                                 const uint16_t* targets, float* to) {
    const uint16_t* from[N];
    VICINAL_UNROLL
    for (int n = 0; n < N; ++n) from[n] = rows + pass.place[first + n] * padded;
    Matrix::clear<SUM>();
    if constexpr (N > 1) Matrix::clear<SUM + 1>();
    if constexpr (N > 2) Matrix::clear<SUM + 2>();
    if constexpr (N > 3) Matrix::clear<SUM + 3>();
    for (int64_t d = 0; d < padded; d += MATRIX_DEPTH) {
        Matrix::load<RIGHT>(targets + d * TILE, 64);
        Matrix::load<LEFT>(from[0] + d, 2 * padded);
        Matrix::multiply<SUM, LEFT, RIGHT>();
        if constexpr (N > 1) {
            Matrix::load<LEFT>(from[1] + d, 2 * padded);
            Matrix::multiply<SUM + 1, LEFT, RIGHT>();
        }
        if constexpr (N > 2) {
            Matrix::load<LEFT>(from[2] + d, 2 * padded);
            Matrix::multiply<SUM + 2, LEFT, RIGHT>();
        }
        if constexpr (N > 3) {
            Matrix::load<LEFT>(from[3] + d, 2 * padded);
            Matrix::multiply<SUM + 3, LEFT, RIGHT>();
        }
    }
    constexpr int64_t GROUP = TILE * TILE;
    Matrix::store<SUM>(to + first * GROUP, 4 * TILE);
    if constexpr (N > 1) Matrix::store<SUM + 1>(to + (first + 1) * GROUP, 4 * TILE);
    if constexpr (N > 2) Matrix::store<SUM + 2>(to + (first + 2) * GROUP, 4 * TILE);
    if constexpr (N > 3) Matrix::store<SUM + 3>(to + (first + 3) * GROUP, 4 * TILE);
}

VICINAL_INLINE void score_some(const AmxPass& pass, int first, int count, const AmxPanel& panel, int side,
                               const uint16_t* targets, float* to) {
    const uint16_t* rows = panel.rows[side];
    const int64_t padded = panel.padded[side];
    switch (count) {
        case 1: return score_groups<1>(pass, first, rows, padded, targets, to);
        case 2: return score_groups<2>(pass, first, rows, padded, targets, to);
        case 3: return score_groups<3>(pass, first, rows, padded, targets, to);
        default: return score_groups<4>(pass, first, rows, padded, targets, to);
    }
}

// Runs some of the errands for every group or two that are turned together.
VICINAL_INLINE void run_errands(Errands& errands, const AmxPass& pass) { errands.run((pass.count + 1) / 2); }

// Calls function(first, count) for the groups of a pass, up to four at a time.
template <class Function>
VICINAL_INLINE void each_four(const AmxPass& pass, const Function& function) {
    for (int first = 0; first < pass.count; first += SUMS) function(first, static_cast<int>(least(SUMS, pass.count - first)));
}

// Groups whose weights are turned together: one after another of a row, two of different rows, or one alone.
VICINAL_INLINE int groups_together(const AmxPass& pass, int n) {
    return pass.is_wide[n] || (n + 1 < pass.count && !pass.is_wide[n + 1]) ? 2 : 1;
}

// Where the pairs of a group begin, from a channel on.
VICINAL_INLINE const uint16_t* paired_of(const AmxPanel& panel, int side, const AmxPass& pass, int n, int64_t channel) {
    return panel.paired[side] + pass.place[n] * panel.padded[side] + 2 * channel;
}

// Sums of up to four times 16 channels in registers: [lane][channel], `row` floats from lane to lane.
template <int N>
struct Sums {
    static VICINAL_INLINE void open(const float* from, int64_t row) {
        if (!from) {
            Matrix::clear<SUM>();
            if constexpr (N > 1) Matrix::clear<SUM + 1>();
            if constexpr (N > 2) Matrix::clear<SUM + 2>();
            if constexpr (N > 3) Matrix::clear<SUM + 3>();
            return;
        }
        Matrix::load<SUM>(from, 4 * row);
        if constexpr (N > 1) Matrix::load<SUM + 1>(from + 16, 4 * row);
        if constexpr (N > 2) Matrix::load<SUM + 2>(from + 32, 4 * row);
        if constexpr (N > 3) Matrix::load<SUM + 3>(from + 48, 4 * row);
    }
    static VICINAL_INLINE void close(float* to, int64_t row) {
        Matrix::store<SUM>(to, 4 * row);
        if constexpr (N > 1) Matrix::store<SUM + 1>(to + 16, 4 * row);
        if constexpr (N > 2) Matrix::store<SUM + 2>(to + 32, 4 * row);
        if constexpr (N > 3) Matrix::store<SUM + 3>(to + 48, 4 * row);
    }
    // Weights [lane][source], `bytes` from lane to lane, times pairs of sources.
    template <int L, int R>
    static VICINAL_INLINE void add_rows(const void* weights, int64_t bytes, const uint16_t* pairs, int64_t padded) {
        Matrix::load<L>(weights, bytes);
        Matrix::load<R>(pairs, 4 * padded);
        Matrix::multiply<SUM, L, R>();
        if constexpr (N > 1) {
            Matrix::load<R>(pairs + 32, 4 * padded);
            Matrix::multiply<SUM + 1, L, R>();
        }
        if constexpr (N > 2) {
            Matrix::load<R>(pairs + 64, 4 * padded);
            Matrix::multiply<SUM + 2, L, R>();
        }
        if constexpr (N > 3) {
            Matrix::load<R>(pairs + 96, 4 * padded);
            Matrix::multiply<SUM + 3, L, R>();
        }
    }
    // Adds the weights of a group and those turned together with it, [lane][source].
    static VICINAL_INLINE void add(const AmxPanel& panel, int side, const AmxPass& pass, int n, int64_t channel,
                                   const float* weights) {
        const float* own = weights + n * TILE * TILE;
        const uint16_t* pairs = paired_of(panel, side, pass, n, channel);
        if (pass.is_wide[n]) return add_rows<LEFT, RIGHT>(own, 64, pairs, panel.padded[side]);
        add_rows<SHORT_LEFT, SHORT_RIGHT>(own, 64, pairs, panel.padded[side]);
        if (groups_together(pass, n) == 2)
            add_rows<SHORT_LEFT, SHORT_RIGHT>(own + TILE / 2, 64, paired_of(panel, side, pass, n + 1, channel),
                                              panel.padded[side]);
    }
};

template <int N>
VICINAL_INLINE void mix_channels_of(const AmxPanel& panel, int side, const AmxPass& pass, const float* weights,
                                    int64_t channel, int64_t row, float* sums, bool is_fresh) {
    Sums<N>::open(is_fresh ? nullptr : sums + channel, row);
    for (int n = 0; n < pass.count; n += groups_together(pass, n)) Sums<N>::add(panel, side, pass, n, channel, weights);
    Sums<N>::close(sums + channel, row);
}

// sums[lane][channel] += weights times sources, from a channel on.
VICINAL_INLINE void mix_from(const AmxPanel& panel, int side, const AmxPass& pass, const float* weights, int64_t channel,
                             int64_t channels, float* sums, bool is_fresh) {
    const int64_t row = round_up(channels, TILE);
    for (; channel < channels; channel += SUMS * TILE) switch (least((row - channel) / TILE, SUMS)) {
            case 1: mix_channels_of<1>(panel, side, pass, weights, channel, row, sums, is_fresh); break;
            case 2: mix_channels_of<2>(panel, side, pass, weights, channel, row, sums, is_fresh); break;
            case 3: mix_channels_of<3>(panel, side, pass, weights, channel, row, sums, is_fresh); break;
            default: mix_channels_of<4>(panel, side, pass, weights, channel, row, sums, is_fresh); break;
        }
}

// The same where some number is infinite or none: nobody's sum takes what it does not see.
VICINAL_APART void mix_with_care(const AmxPanel& panel, int side, const AmxPass& pass, const float* weights,
                                 int64_t channels, float* sums, bool is_fresh) {
    const int64_t row = round_up(channels, TILE);
    if (is_fresh)
        for (int64_t i = 0; i < row * TILE; ++i) sums[i] = 0.0f;
    for (int first = 0; first < pass.count; first += groups_together(pass, first))
        for (int n = first; n < first + groups_together(pass, first); ++n) {
            const uint16_t* own = reinterpret_cast<const uint16_t*>(weights + first * TILE * TILE) + (n - first) * TILE;
            const uint16_t* pairs = paired_of(panel, side, pass, n, 0);
            for (int i = 0; i < pass.sources[n]; ++i)
                for (int lane = 0; lane < TILE; ++lane) {
                    if (!(pass.seen[n][i] >> lane & 1u)) continue;
                    const float weight = float_of_bfloat16(own[lane * 2 * TILE + i]);
                    const uint16_t* source = pairs + i / 2 * 2 * panel.padded[side] + i % 2;
                    for (int64_t d = 0; d < channels; ++d)
                        sums[lane * row + d] += weight * float_of_bfloat16(source[2 * d]);
                }
        }
}

VICINAL_INLINE void mix_all(const AmxPanel& panel, int side, const AmxPass& pass, const float* weights, int64_t channels,
                            float* sums, bool is_fresh) {
    if (panel.is_finite[side])
        mix_from(panel, side, pass, weights, 0, channels, sums, is_fresh);
    else
        mix_with_care(panel, side, pass, weights, channels, sums, is_fresh);
}

// ---- numbers of one source and all targets

// Two rows as pairs of bfloat16, rounded to the nearest.
VICINAL_INLINE void store_pair_rows(float* to, F even, F odd) {
    const __m512i half = _mm512_set1_epi32(0x8000);
    const __m512i low = _mm512_srli_epi32(_mm512_add_epi32(_mm512_castps_si512(even), half), 16);
    const __m512i high = _mm512_add_epi32(_mm512_castps_si512(odd), half);
    _mm512_storeu_si512(to, _mm512_mask_blend_epi16(0xaaaaaaaau, low, high));
}

// Clears the pairs of a group that has so few sources that some are missing.
VICINAL_INLINE void clear_pairs(float* pairs, int sources) {
    for (int pair = (sources + 1) / 2; pair < TILE / 2; ++pair) S::store(pairs + pair * TILE, S::zero());
}

// Turns 16 rows of pairs, [pair of sources][lane], into [lane][source]; those of a group alone are 8.
VICINAL_INLINE void turn_pairs(float* pairs, int groups) {
    __m512 from[16], turned[16];
    VICINAL_UNROLL
    for (int i = 0; i < 8; ++i) from[i] = S::load(pairs + i * TILE);
    VICINAL_UNROLL
    for (int i = 8; i < 16; ++i) from[i] = groups == 2 ? S::load(pairs + i * TILE) : S::zero();
    S::transpose(from, turned);
    VICINAL_UNROLL
    for (int i = 0; i < 16; ++i) S::store(pairs + i * TILE, turned[i]);
}

// A product that compilers do not join with what is taken from it: the largest score less itself is 0 however large it is.
VICINAL_INLINE F rounded_product(F a, F b) {
    return _mm512_mul_round_ps(a, b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// 2^a where seen, 0 elsewhere and where that is no normal number; relative error at most 1.6e-7. NaN stays.
VICINAL_INLINE F weight_of(F a, uint32_t seen) {
    const F shift = S::all(12582912.0f);  // 2^23 + 2^22: adding it leaves whole numbers, in the lowest bits
    const F shifted = S::add(a, shift), part = S::sub(a, S::sub(shifted, shift));
    F value = S::all(1.3276472e-3f);
    value = S::fma(value, part, S::all(9.6755410e-3f));
    value = S::fma(value, part, S::all(5.5507131e-2f));
    value = S::fma(value, part, S::all(2.4022120e-1f));
    value = S::fma(value, part, S::all(6.9314694e-1f));
    value = S::fma(value, part, S::all(1.0f));
    const __mmask16 counts = _mm512_mask_cmp_ps_mask(static_cast<__mmask16>(seen), a, S::all(-125.0f), _CMP_NLT_UQ);
    const __m512i power = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(counts, _mm512_castps_si512(value), power));
}

// ---- targets

// Where the targets of a tile stand in a tensor, lane by lane.
template <class Function>
VICINAL_INLINE void each_target_of(const Block& block, const Tile& tile, const int64_t* strides, int64_t base,
                                   const Function& function) {
    const Places places = block.places(tile, strides, base);
    const int columns = tile.columns();
    for (int r = 0; r < tile.rows(); ++r)
        for (int c = 0; c < columns; ++c) function(r * block.job.tile_columns + c, places.at(r, c));
}

// The targets of a tile as the right side of scores; `room` holds 17 rows of channels, the last of them zeros.
[[maybe_unused]] VICINAL_APART void load_tile(const Block& block, const Tile& tile, const Operand& operand, int64_t base, uint16_t* room,
                             uint16_t* to) {
    const int64_t padded = padded_channels(operand.dim);
    const Rows from(operand, room, room + TILE * padded);
    const uint16_t* row[TILE];
    for (int lane = 0; lane < TILE; ++lane) row[lane] = from.zeros;
    each_target_of(block, tile, operand.axis, base,
                   [&](int lane, int64_t place) VICINAL_LAMBDA { row[lane] = from.at(place, lane); });
    lay_pairs(row, padded, to);
}

// One float per lane; `other` for lanes nobody has.
VICINAL_INLINE void load_lanes(const Block& block, const Tile& tile, const float* numbers, const int64_t* strides,
                               int64_t base, float other, float* to) {
    S::store(to, S::all(other));
    each_target_of(block, tile, strides, base,
                   [&](int lane, int64_t place) VICINAL_LAMBDA { to[lane] = with_plain_nan(numbers[place]); });
}

// Writes factor times a row of sums, which goes on to a multiple of 16.
VICINAL_INLINE void store_narrow_row(const Operand& operand, int64_t place, const float* from, float factor) {
    uint16_t* to = reinterpret_cast<uint16_t*>(const_cast<char*>(operand.data)) + place;
    const F by = S::all(factor);
    if (operand.channel == 1) {
        for (int64_t d = 0; d < operand.dim; d += MATRIX_DEPTH) {
            const F low = S::mul(S::load(from + d), by);
            const F high = operand.dim - d > TILE ? S::mul(S::load(from + d + TILE), by) : S::zero();
            const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
            _mm512_mask_storeu_epi16(to + d, channels_there(operand.dim - d), both);
        }
    } else {
        for (int64_t d = 0; d < operand.dim; ++d) to[d * operand.channel] = bfloat16_of_float(from[d] * factor);
    }
}

// Writes factors[lane] * sums[lane][channel], or adds that to what is there.
[[maybe_unused]] VICINAL_APART void store_tile(const Block& block, const Tile& tile, const Operand& operand, int64_t base, const float* sums,
                              F factor, bool adds) {
    const int64_t dim = operand.dim, row = round_up(dim, TILE);
    alignas(64) float factors[TILE];
    S::store(factors, factor);
    each_target_of(block, tile, operand.axis, base, [&](int lane, int64_t place) VICINAL_LAMBDA {
        const float* from = sums + lane * row;
        if (!adds) return store_narrow_row(operand, place, from, factors[lane]);
        uint16_t* to = reinterpret_cast<uint16_t*>(const_cast<char*>(operand.data)) + place;
        for (int64_t d = 0; d < dim; ++d) {
            uint16_t& at = to[d * operand.channel];
            at = bfloat16_of_float(from[d] * factors[lane] + float_of_bfloat16(at));
        }
    });
}

// ---- units

// Calls visit(tile, walk, filler) for every tile of a block, panel by panel of one list of sources.
template <class Visit>
inline void each_tile_of(const Block& block, const Sources& sources, const AmxPacking& packing, const AmxBias& bias,
                         bool targets_are_queries, const Workspace& workspace, const Visit& visit) {
    each_chunk<S>(block, sources, packing.floats<S>(), [&](const Chunk& chunk) VICINAL_LAMBDA {
        AmxFiller filler(block.job, sources, chunk, packing, workspace);
        AmxWalk walk(block, sources, chunk, bias, targets_are_queries, workspace);
        const auto open_row = [&](const Tile& tile) VICINAL_LAMBDA {
            walk.open_row(tile);
            filler.open_row(walk.rows, walk.num_rows);
        };
        block.each_tile(open_row, [&](const Tile& tile) VICINAL_LAMBDA { visit(tile, walk, filler); });
    });
}

// A tile's number within its block.
VICINAL_INLINE int64_t tile_number(const Block& block, const Tile& tile) {
    const int64_t rows = block.row_tiles.end - block.row_tiles.begin, columns = block.column_tiles.end - block.column_tiles.begin;
    return ((tile.plane - block.plane.begin) * rows + tile.row_tile - block.row_tiles.begin) * columns + tile.column_tile;
}

VICINAL_INLINE int64_t tiles_of(const Block& block) {
    return static_cast<int64_t>(block.plane.end - block.plane.begin) * (block.row_tiles.end - block.row_tiles.begin) *
           (block.column_tiles.end - block.column_tiles.begin);
}

}  // namespace
}  // namespace vicinal

#endif
