// One unit of work of the tiled strategy: a block of targets of one head, against all their sources.
//
//   for every list of sources (union members, turns of a wrapping axis, extra tokens)
//     for every chunk of its sources that fits the panel: pack it
//       for every tile of targets: a pass over each MOST_VECTORS vectors that the tile sees
//
// What a tile has summed up waits in the block's state between chunks; with a single chunk it goes straight out.

#ifndef VICINAL_TILES_KERNEL_H
#define VICINAL_TILES_KERNEL_H

#include "micro.h"

namespace vicinal {
namespace {

enum Slot { PANEL, STATE, SCRATCH, BIAS, WALK, PACKED };

// A head's bias table as vectors of sources read it, times log2(e): [plane][row - R + 1 ...][column - C ...][row of R],
// reversed on every axis where targets are keys.
struct BiasTable {
    const float* data = nullptr;
    const float* source = nullptr;  // the table as it was given
    int64_t plane, row;             // strides
    int64_t length[3];
    int R, C;

    VICINAL_INLINE int64_t at(int64_t plane_index, int64_t row_index, int64_t column_index) const {
        const int64_t rows = least(most(row_index, 1 - R), length[1] - 1) + R - 1;
        const int64_t columns = least(most(column_index, -C), length[2] - 1) + C;
        return plane_index * plane + rows * row + columns * R;
    }
};

VICINAL_INLINE int64_t bias_table_size(const int32_t* length, int R, int C) {
    const int64_t rows = static_cast<int64_t>(length[1]) + R - 1, columns = static_cast<int64_t>(length[2]) + 2 * C;
    return length[0] * rows * columns * R;
}

VICINAL_INLINE BiasTable bias_layout(const int32_t* length, int R, int C) {
    BiasTable table;
    table.row = (static_cast<int64_t>(length[2]) + 2 * C) * R;
    table.plane = table.row * (static_cast<int64_t>(length[1]) + R - 1);
    for (int a = 0; a < 3; ++a) table.length[a] = length[a];
    table.R = R;
    table.C = C;
    return table;
}

inline void fill_bias_table(const Job& job, int64_t head, const BiasTable& table, float* to) {
    const float* from = job.bias + head * job.bias_head;
    const int64_t columns = table.length[2] + 2 * table.C;
    for (int64_t plane = 0; plane < table.length[0]; ++plane) {
        for (int64_t row = 0; row < table.length[1] + table.R - 1; ++row) {
            for (int64_t column = 0; column < columns; ++column) {
                for (int r = 0; r < table.R; ++r) {
                    int64_t index[3] = {plane, row - table.R + 1 + r, column - table.C};
                    bool is_inside = true;
                    int64_t at = 0;
                    for (int a = 0; a < 3; ++a) {
                        is_inside = is_inside && index[a] >= 0 && index[a] < table.length[a];
                        if (job.bias_is_reversed) index[a] = table.length[a] - 1 - index[a];
                        at += index[a] * job.bias_stride[a];
                    }
                    to[plane * table.plane + row * table.row + column * table.R + r] = is_inside ? from[at] * LOG2_E : 0.0f;
                }
            }
        }
    }
}

// A few neighboring targets: one plane, T1 rows, T2 columns.
struct Tile {
    int64_t plane;      // target of the class on the first axis
    Run row, column;    // targets of the class on the others
    int row_tile;       // number within the class
    int column_tile;    // number within the block
    int count;          // of targets, column by column
    int64_t state;      // the first target's place in the block, and what a row adds
    int64_t state_row;

    VICINAL_INLINE int rows() const { return row.end - row.begin; }
    VICINAL_INLINE int columns() const { return column.end - column.begin; }
    VICINAL_INLINE int64_t state_at(int r, int c) const { return state + r * state_row + c; }
};

// Where the targets of a tile stand in a tensor: the first of them, and what a row and a column add.
struct Places {
    int64_t first, row, column;
    int rows, count;  // of the tile
    VICINAL_INLINE int64_t at(int r, int c) const { return first + r * row + c * column; }

    // Calls function(number in the tile, place) for each target, column by column.
    template <class Function>
    VICINAL_INLINE void each(const Function& function) const {
        int64_t top = first, place = first;
        int r = 0;
        for (int t = 0; t < count; ++t) {
            function(t, place);
            const bool ends = ++r == rows;
            top += ends ? column : 0;
            place = ends ? top : place + row;
            r = ends ? 0 : r;
        }
    }
};

// A block of targets and what is remembered of them between chunks.
struct Block {
    const Job& job;
    const Unit& unit;
    Run plane, row_tiles, column_tiles, row, column;  // targets and tiles of the class

    Block(const Job& j, const Unit& u) : job(j), unit(u) {
        const Run p = u.axis[0]->blocks[u.block[0]];
        plane = {u.axis[0]->tiles[p.begin].begin, u.axis[0]->tiles[p.end - 1].end};
        row_tiles = u.axis[1]->blocks[u.block[1]];
        column_tiles = u.axis[2]->blocks[u.block[2]];
        row = {u.axis[1]->tiles[row_tiles.begin].begin, u.axis[1]->tiles[row_tiles.end - 1].end};
        column = {u.axis[2]->tiles[column_tiles.begin].begin, u.axis[2]->tiles[column_tiles.end - 1].end};
    }
    VICINAL_INLINE int64_t targets() const {
        return static_cast<int64_t>(plane.end - plane.begin) * (row.end - row.begin) * (column.end - column.begin);
    }
    // Calls open(tile) where a row of tiles begins, and function(tile) for each of them.
    template <class Open, class Function>
    VICINAL_INLINE void each_tile(const Open& open, const Function& function) const {
        const int64_t rows = row.end - row.begin, columns = column.end - column.begin;
        for (int32_t p = plane.begin; p < plane.end; ++p)
            for (int32_t r = row_tiles.begin; r < row_tiles.end; ++r) {
                Tile tile;
                tile.plane = p;
                tile.row_tile = r;
                tile.row = unit.axis[1]->tiles[r];
                tile.state_row = columns;
                const int64_t first = ((p - plane.begin) * rows + (tile.row.begin - row.begin)) * columns;
                open(tile);
                for (int32_t c = column_tiles.begin; c < column_tiles.end; ++c) {
                    tile.column_tile = c - column_tiles.begin;
                    tile.column = unit.axis[2]->tiles[c];
                    tile.count = tile.rows() * tile.columns();
                    tile.state = first + tile.column.begin - column.begin;
                    function(tile);
                }
            }
    }
    template <class Function>
    VICINAL_INLINE void each_tile(const Function& function) const {
        each_tile([](const Tile&) VICINAL_LAMBDA {}, function);
    }
    // Calls function(number in the tile, row and column within it) for each target, column by column.
    template <class Function>
    VICINAL_INLINE void each_target(const Tile& tile, const Function& function) const {
        const int rows = tile.rows(), columns = tile.columns();
        int number = 0;
        for (int c = 0; c < columns; ++c)
            for (int r = 0; r < rows; ++r, ++number) function(number, r, c);
    }
    // Calls function(number in the tile, coordinates on the three axes) for each target.
    template <class Function>
    VICINAL_INLINE void each_coordinate(const Tile& tile, const Function& function) const {
        const Axis &a = *unit.axis[0], &b = *unit.axis[1], &c = *unit.axis[2];
        const int64_t plane_at = a.first + static_cast<int64_t>(a.step) * tile.plane;
        each_target(tile, [&](int number, int row_in, int column_in) {
            function(number, plane_at, b.first + static_cast<int64_t>(b.step) * (tile.row.begin + row_in),
                     c.first + static_cast<int64_t>(c.step) * (tile.column.begin + column_in));
        });
    }
    VICINAL_INLINE Places places(const Tile& tile, const int64_t* strides, int64_t base) const {
        const Axis &a = *unit.axis[0], &b = *unit.axis[1], &c = *unit.axis[2];
        const int64_t plane_at = a.first + static_cast<int64_t>(a.step) * tile.plane;
        const int64_t row_at = b.first + static_cast<int64_t>(b.step) * tile.row.begin;
        const int64_t column_at = c.first + static_cast<int64_t>(c.step) * tile.column.begin;
        return {base + plane_at * strides[0] + row_at * strides[1] + column_at * strides[2], b.step * strides[1],
                c.step * strides[2], tile.rows(), tile.count};
    }
    // Places in what is remembered of the block.
    VICINAL_INLINE Places state_places(const Tile& tile) const { return {tile.state, tile.state_row, 1, tile.rows(), tile.count}; }
};

// Where the next tile's targets stand, seen from this one's: beside it, or at the beginning of the next row.
VICINAL_INLINE int64_t next_tile(const Block& block, const Tile& tile, const Places& places) {
    if (tile.column.end < block.column.end) return places.column * tile.columns();
    return places.row * places.rows - places.column * (tile.column.begin - block.column.begin);
}

// Fetches what the next tile reads of its targets.
VICINAL_INLINE void ask_for_next(const Block& block, const Tile& tile, const Operand& operand, const Places& places) {
    const int64_t bytes = bytes_of(block.job.dtype), size = operand.dim * bytes, further = next_tile(block, tile, places);
    places.each([&](int, int64_t place) VICINAL_LAMBDA {
        for (int64_t byte = 0; byte < size; byte += 64)
            VICINAL_PREFETCH(operand.data + (place + further) * bytes + byte);
    });
}

// Notes what this tile will write, and what the next one reads.
VICINAL_INLINE void note_targets(const Block& block, const Tile& tile, const Operand& operand, int64_t base, bool next,
                                 Errands& errands) {
    const Places places = block.places(tile, operand.axis, base);
    const int64_t item = bytes_of(block.job.dtype), further = next ? next_tile(block, tile, places) : 0;
    places.each([&](int, int64_t place) VICINAL_LAMBDA { errands.note(operand, place + further, item); });
}

// The targets of a tile as `dot` reads them.
template <class S>
VICINAL_APART void load_targets(const Block& block, const Tile& tile, const Operand& operand, int64_t base, float* to,
                                bool asks = true) {
    const int64_t dtype = block.job.dtype;
    const Places places = block.places(tile, operand.axis, base);
    if (asks) ask_for_next(block, tile, operand, places);
    constexpr int64_t BLOCK = DIM_BLOCK * S::PAIR;  // channels
    if (operand.dim <= BLOCK) {
        places.each([&](int t, int64_t place) VICINAL_LAMBDA {
            load_units<S>(dtype, operand, place, to + t * DIM_BLOCK);
        });
        return;
    }
    Operand part = operand;
    for (int64_t begin = 0; begin < operand.dim; begin += BLOCK) {
        part.dim = static_cast<int32_t>(least(BLOCK, operand.dim - begin));
        places.each([&](int t, int64_t place) VICINAL_LAMBDA {
            load_units<S>(dtype, part, place + begin * operand.channel, to + (begin / BLOCK * MOST_TARGETS + t) * DIM_BLOCK);
        });
    }
}

// One list of sources of a block: its frame, and what masks and biases need.
struct Sources {
    Frame frame;
    Interval extra[3];  // the axes of extra tokens
    bool is_extra;
    int list;

    // of a target of the class on an axis
    VICINAL_INLINE int64_t low(int axis, int64_t target) const { return is_extra ? 0 : frame.axis[axis]->low[target]; }
    VICINAL_INLINE int64_t high(int axis, int64_t target) const {
        return is_extra ? (axis == 2 ? frame.column_end : 1) : frame.axis[axis]->high[target];
    }
};

// Where vectors may begin: units of two neighboring sources must not be torn apart.
template <class S>
VICINAL_INLINE int64_t even_column(int R, int64_t column) {
    return S::PAIR == 2 && R == 1 ? column & ~static_cast<int64_t>(1) : column;
}

template <class S>
VICINAL_INLINE void open_sources(const Block& block, int list, Sources& to) {
    Frame& f = to.frame;
    to.is_extra = false;
    to.list = list;
    for (int a = 0; a < 3; ++a) f.axis[a] = &block.unit.axis[a]->sources[list];
    f.R = block.job.rows_per_vector;
    f.C = S::LANES / f.R;
    f.plane_begin = f.axis[0]->low[block.plane.begin];
    f.plane_end = most(f.axis[0]->high[block.plane.end - 1], f.plane_begin);
    f.row_begin = f.axis[1]->low[block.row.begin];
    f.row_end = most(f.axis[1]->high[block.row.end - 1], f.row_begin);
    f.column_begin = even_column<S>(f.R, f.axis[2]->low[block.column.begin]);
    f.column_end = most(f.axis[2]->high[block.column.end - 1], f.column_begin);
    const int64_t anchor = block.unit.axis[1]->anchors[block.unit.block[1] * block.job.num_sources + list];
    int64_t beyond = (f.row_begin - anchor) % f.R;
    if (beyond < 0) beyond += f.R;
    f.row_origin = f.row_begin - beyond;
    f.groups = (f.row_end - f.row_origin + f.R - 1) / f.R;
    if (f.row_end == f.row_begin || f.column_end == f.column_begin) f.plane_end = f.plane_begin;
}

template <class S>
VICINAL_INLINE void open_extra(int64_t tokens, Sources& to) {
    Frame& f = to.frame;
    to.is_extra = true;
    to.list = -1;
    for (int a = 0; a < 3; ++a) {
        to.extra[a] = {nullptr, nullptr, nullptr, 0, 1, 0};
        f.axis[a] = &to.extra[a];
    }
    f.R = 1;
    f.C = S::LANES;
    f.plane_begin = f.row_begin = f.row_origin = f.column_begin = 0;
    f.plane_end = f.row_end = f.groups = 1;
    f.column_end = tokens;
}

// How much of a list of sources goes into the panel at once, `floats` per source.
struct Cut {
    int64_t groups, columns, ring;
    int64_t group_chunks, column_chunks;
};

// The most row groups of a plane that a row of tiles sees.
inline int64_t groups_in_sight(const Block& block, const Sources& sources) {
    const Frame& f = sources.frame;
    int64_t in_sight = 1;
    for (int32_t tile = block.row_tiles.begin; tile < block.row_tiles.end; ++tile) {
        const Run run = block.unit.axis[1]->tiles[tile];
        const int64_t low = sources.low(1, run.begin) - f.row_origin, high = sources.high(1, run.end - 1) - f.row_origin;
        in_sight = most(in_sight, (high + f.R - 1) / f.R - low / f.R);
    }
    return in_sight;
}

inline Cut cut_sources(const Block& block, const Sources& sources, int64_t panel_bytes, int64_t floats) {
    Cut cut;
    const Frame& frame = sources.frame;
    const int64_t columns = frame.column_end - frame.column_begin, groups = frame.row_groups();
    const int64_t room = most(panel_bytes / (4 * floats), 64);  // sources
    cut.columns = columns;
    cut.ring = 0;
    const int64_t width = panel_width(most(columns, 1), frame.R, frame.C);
    // a further plane of targets would need again what the ring has lost
    if (groups * width > room && block.plane.end - block.plane.begin == 1) {
        const int64_t ring = groups_in_sight(block, sources);
        if ((frame.plane_end - frame.plane_begin) * ring * width <= room) return {groups, columns, ring, 1, 1};
    }
    if (panel_width(columns, frame.R, frame.C) > room)
        cut.columns = most(round_up(room / frame.R - frame.C, frame.C) - frame.C, frame.C);
    cut.columns = least(round_up(cut.columns, 2), columns);  // a chunk begins where a unit does
    cut.groups = least(most(room / panel_width(most(cut.columns, 1), frame.R, frame.C), 1), most(groups, 1));
    cut.group_chunks = groups ? (groups + cut.groups - 1) / cut.groups : 0;
    cut.column_chunks = columns ? (columns + cut.columns - 1) / cut.columns : 0;
    return cut;
}

VICINAL_INLINE bool sees_earlier(const Earlier& earlier, int axis, int64_t query, int64_t key) {
    int64_t distance = key - earlier.start[axis][query];
    if (earlier.wraps[axis]) {
        distance %= earlier.length[axis];
        if (distance < 0) distance += earlier.length[axis];
    }
    return distance >= 0 && distance % earlier.step[axis] == 0 &&
           distance / earlier.step[axis] < earlier.count[axis][query];
}

constexpr int MOST_KEPT = 8;  // vectors of a row of a tile whose masks are remembered

// A row group that a row of tiles sees, and which of its lanes each target of a tile sees: its row of targets, as often
// as a tile has columns.
struct SeenRow {
    int64_t plane, row;  // in steps
    int64_t group;       // within the chunk
    int64_t place;       // within the panel
    uint32_t any;
    uint32_t lanes[MOST_TARGETS];
};

// The columns that a column of tiles sees, and which of their lanes each target of a tile sees.
struct SeenColumns {
    int64_t low, vectors;
    bool is_repeated;  // masks and biases are those of the tile before
    uint32_t any[MOST_KEPT], lanes[MOST_KEPT][MOST_TARGETS];  // where there are so few vectors
};

// The vectors that a tile looks at, a pass at a time. Masks are products of rows and columns; those of a row of tiles
// and those of a column of tiles are made once.
template <class S>
struct Walk {
    static constexpr int W = S::LANES;
    const Block& block;
    const Sources& sources;
    const Chunk& chunk;
    const BiasTable& bias;
    bool targets_are_queries;
    float* bias_room;  // [MOST_VECTORS][MOST_TARGETS][LANES], where biases must be looked up one by one
    SeenRow* rows;
    SeenColumns* columns;
    int64_t num_rows;
    int64_t coming_begin = 0, coming_end = 0;  // row groups of a plane that the next row of tiles sees beside these
    int rows_of_tile;  // that `columns` were made for
    int walked = -1;   // the tile of this row whose vectors stand in the pass, all of them

    Walk(const Block& b, const Sources& s, const Chunk& c, const BiasTable& table, bool queries, float* room,
         const Workspace& workspace)
        : block(b), sources(s), chunk(c), bias(table), targets_are_queries(queries), bias_room(room), num_rows(0),
          rows_of_tile(0) {
        const int64_t tiles = b.column_tiles.end - b.column_tiles.begin, groups = c.group_end - c.group_begin;
        char* memory = static_cast<char*>(
            workspace.get(WALK, tiles * sizeof(SeenColumns) + groups * sizeof(SeenRow)));
        columns = reinterpret_cast<SeenColumns*>(memory);
        rows = reinterpret_cast<SeenRow*>(memory + tiles * sizeof(SeenColumns));
    }

    // The masks of targets one after another, each for all the rows of a tile.
    VICINAL_INLINE uint32_t column_masks(const Run& run, int64_t begin, uint32_t* lanes) const {
        constexpr uint32_t ALL = (1u << W) - 1u;
        const int64_t end = begin + sources.frame.C;
        if (begin >= most(sources.low(2, run.end - 1), chunk.column_begin) &&
            end <= least(sources.high(2, run.begin), chunk.column_end)) {  // as in the middle of wide windows
            for (int t = 0; t < MOST_TARGETS; ++t) lanes[t] = ALL;
            return ALL;
        }
        uint32_t any = 0;
        int t = 0;
        for (int32_t column = run.begin; column < run.end; ++column) {
            const uint32_t mask = column_mask(column, begin);
            any |= mask;
            for (int r = 0; r < rows_of_tile; ++r) lanes[t++] = mask;
        }
        for (; t < MOST_TARGETS; ++t) lanes[t] = 0;
        return any;
    }

    VICINAL_APART void open_columns() {
        const int64_t tiles = block.column_tiles.end - block.column_tiles.begin;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const Run run = block.unit.axis[2]->tiles[block.column_tiles.begin + tile];
            SeenColumns& seen = columns[tile];
            seen.low = even_column<S>(sources.frame.R, most(sources.low(2, run.begin), chunk.column_begin));
            seen.vectors =
                (least(sources.high(2, run.end - 1), chunk.column_end) - seen.low + sources.frame.C - 1) / sources.frame.C;
            if (seen.vectors <= MOST_KEPT)
                for (int64_t v = 0; v < seen.vectors; ++v)
                    seen.any[v] = column_masks(run, seen.low + v * sources.frame.C, seen.lanes[v]);
            seen.is_repeated = tile > 0 && repeats(run, tile);
        }
    }

    inline bool repeats(const Run& run, int64_t tile) const {
        const SeenColumns &seen = columns[tile], &before = columns[tile - 1];
        const Run last = block.unit.axis[2]->tiles[block.column_tiles.begin + tile - 1];
        if (run.end - run.begin != last.end - last.begin || seen.vectors != before.vectors || seen.vectors > MOST_KEPT)
            return false;
        for (int64_t v = 0; v < seen.vectors; ++v)
            for (int t = 0; t < MOST_TARGETS; ++t)
                if (seen.lanes[v][t] != before.lanes[v][t]) return false;
        if (sources.is_extra || !bias.data) return true;
        const int32_t* offset = sources.frame.axis[2]->bias_offset;
        for (int i = 0; i < run.end - run.begin; ++i)
            if (offset[run.begin + i] + seen.low != offset[last.begin + i] + before.low) return false;
        return !block.job.center[0];
    }

    // Finds the row groups that a row of tiles sees.
    VICINAL_INLINE void open_row(const Tile& tile) {
        const Frame& f = sources.frame;
        if (rows_of_tile != tile.rows()) {
            rows_of_tile = tile.rows();
            open_columns();
        }
        const int64_t low = sources.low(1, tile.row.begin), high = sources.high(1, tile.row.end - 1);
        const int64_t group_low = (low - f.row_origin) / f.R, group_high = (high - f.row_origin + f.R - 1) / f.R;
        num_rows = 0;
        walked = -1;
        coming_begin = coming_end = group_high;
        if (tile.row_tile + 1 < block.row_tiles.end) {
            const int64_t further = sources.high(1, block.unit.axis[1]->tiles[tile.row_tile + 1].end - 1);
            coming_end = (further - f.row_origin + f.R - 1) / f.R;
        }
        if (low >= high) return;
        for (int64_t plane = sources.low(0, tile.plane); plane < sources.high(0, tile.plane); ++plane) {
            const int64_t base = (plane - f.plane_begin) * f.groups;
            const int64_t begin = most(group_low, chunk.group_begin - base), end = least(group_high, chunk.group_end - base);
            for (int64_t group = begin; group < end; ++group) {
                SeenRow& seen = rows[num_rows++];
                seen.plane = plane;
                seen.row = f.row_origin + group * f.R;
                seen.group = base + group - chunk.group_begin;
                seen.place = chunk.place_of(plane - f.plane_begin, group, seen.group);
                seen.any = 0;
                for (int32_t r = tile.row.begin; r < tile.row.end; ++r) {
                    const uint32_t mask = row_lanes(sources.low(1, r), sources.high(1, r), seen.row);
                    seen.any |= mask;
                    for (int t = r - tile.row.begin; t < MOST_TARGETS; t += rows_of_tile) seen.lanes[t] = mask;
                }
            }
        }
    }

    VICINAL_INLINE uint32_t column_lanes(int64_t low, int64_t high, int64_t begin) const {
        const int R = sources.frame.R;
        const int64_t from = least(most((low - begin) * R, 0), W), to = least(most((high - begin) * R, 0), W);
        return from < to ? ((1u << (to - from)) - 1u) << from : 0u;
    }

    // Lanes of the rows low <= row < high of the group that begins at `begin`.
    VICINAL_INLINE uint32_t row_lanes(int64_t low, int64_t high, int64_t begin) const {
        const int R = sources.frame.R;
        const int64_t from = least(most(low - begin, 0), R), to = least(most(high - begin, 0), R);
        if (from >= to) return 0u;
        uint32_t pattern = ((1u << (to - from)) - 1u) << from;
        for (int width = R; width < W; width *= 2) pattern |= pattern << width;
        return pattern & ((1u << W) - 1u);
    }

    // Lanes among `seen` that an earlier member has, for one target. The other lanes may stand beyond the tables.
    inline uint32_t earlier_lanes(uint32_t seen, const int64_t* target, int64_t plane, int64_t row, int64_t column) const {
        const Frame& f = sources.frame;
        uint32_t lanes = 0;
        for (int lane = 0; lane < W; ++lane) {
            if (!(seen >> lane & 1u)) continue;
            const int64_t source[3] = {source_coordinate(*f.axis[0], plane),
                                       source_coordinate(*f.axis[1], row + lane % f.R),
                                       source_coordinate(*f.axis[2], column + lane / f.R)};
            bool is_seen = false;
            for (int m = 0; m < block.job.num_earlier[sources.list] && !is_seen; ++m) {
                is_seen = true;
                for (int a = 0; a < 3; ++a) {
                    const int64_t query = targets_are_queries ? target[a] : source[a];
                    const int64_t key = targets_are_queries ? source[a] : target[a];
                    is_seen = is_seen && sees_earlier(block.job.earlier[m], a, query, key);
                }
            }
            lanes |= is_seen ? 1u << lane : 0u;
        }
        return lanes;
    }

    // Calls flush(pass) for every pass; vectors that nobody sees are left out.
    template <class Flush>
    VICINAL_INLINE void operator()(const Tile& tile, Pass& pass, const Flush& flush) {
        const Frame& f = sources.frame;
        const SeenColumns& across = columns[tile.column_tile];
        const bool has_earlier = !sources.is_extra && block.job.num_earlier[sources.list] > 0;
        const bool has_bias = !sources.is_extra && bias.data, is_kept = across.vectors <= MOST_KEPT;
        bool is_only = true;
        if (across.is_repeated && walked == tile.column_tile - 1) {
            const int64_t further = (across.low - columns[tile.column_tile - 1].low) * f.R;
            for (int n = 0; n < pass.count; ++n) pass.at[n] += further;
            walked = tile.column_tile;
            if (pass.count) flush(pass);
            return;
        }
        walked = -1;
        uint32_t room[MOST_TARGETS];
        pass.count = 0;
        for (int64_t i = 0; i < num_rows; ++i) {
            const SeenRow& down = rows[i];
            for (int64_t v = 0; v < across.vectors; ++v) {
                const int64_t column = across.low + v * f.C;
                const int n = pass.count;
                const uint32_t* lanes = is_kept ? across.lanes[v] : room;
                // masks are products of rows and columns, and so is what any target sees
                uint32_t any = down.any & (is_kept ? across.any[v] : column_masks(tile.column, column, room));
                for (int t = 0; t < MOST_TARGETS; ++t) pass.seen[n][t] = down.lanes[t] & lanes[t];
                if (has_earlier) any = without_earlier(tile, pass.seen[n], down.plane, down.row, column);
                if (!any) continue;
                pass.any[n] = any;
                pass.group[n] = down.place;
                pass.at[n] = (column - chunk.column_begin) * f.R;
                if (has_bias) {
                    if (block.job.center[0])
                        look_up_bias(tile, pass.bias[n], n, down.plane, down.row, column);
                    else
                        add_bias(tile, pass.bias[n], down.plane, down.row, column);
                }
                if (++pass.count == MOST_VECTORS) {
                    flush(pass);
                    pass.count = 0;
                    is_only = false;
                }
            }
        }
        if (pass.count) flush(pass);
        if (is_only && !has_earlier) walked = tile.column_tile;
    }

    VICINAL_INLINE uint32_t column_mask(int64_t target, int64_t begin) const {
        const int64_t low = most(sources.low(2, target), chunk.column_begin);
        const int64_t high = least(sources.high(2, target), chunk.column_end);
        return column_lanes(low, high, begin);
    }

    inline uint32_t without_earlier(const Tile& tile, uint32_t* seen, int64_t plane, int64_t row, int64_t column) const {
        uint32_t any = 0;
        block.each_coordinate(tile, [&](int t, int64_t a, int64_t b, int64_t c) {
            const int64_t target[3] = {a, b, c};
            seen[t] &= ~earlier_lanes(seen[t], target, plane, row, column);
            any |= seen[t];
        });
        return any;
    }

    // Where targets are keys and the centers of queries are not their coordinates, as between two grids.
    inline void look_up_bias(const Tile& tile, const float** to, int vector, int64_t plane, int64_t row, int64_t column) const {
        const Frame& f = sources.frame;
        const Job& job = block.job;
        block.each_coordinate(tile, [&](int t, int64_t a, int64_t b, int64_t c) {
            const int64_t key[3] = {a, b, c};
            const int64_t target[3] = {tile.plane, tile.row.begin + t % tile.rows(), tile.column.begin + t / tile.rows()};
            float* room = bias_room + (vector * MOST_TARGETS + t) * W;
            for (int lane = 0; lane < W; ++lane) {
                const int64_t place[3] = {plane, row + lane % f.R, column + lane / f.R};
                float number = 0.0f;
                int64_t at = 0;
                for (int d = 0; d < 3; ++d) {
                    const Interval& axis = *f.axis[d];
                    if (place[d] < axis.low[target[d]] || place[d] >= axis.high[target[d]]) break;
                    const int64_t center = job.center[d][axis.first + axis.step * place[d]];
                    // key and center differ by whole steps; bias_offset is half the table less the key's place in steps
                    const int64_t beyond = (key[d] % axis.step - center) / axis.step;
                    at += (job.bias_length[d] - 1 - axis.bias_offset[target[d]] + beyond) * job.bias_stride[d];
                    if (d == 2) number = bias.source[at] * LOG2_E;
                }
                room[lane] = number;
            }
            to[t] = room;
        });
    }

    VICINAL_INLINE void add_bias(const Tile& tile, const float** to, int64_t plane, int64_t row, int64_t column) const {
        const Frame& f = sources.frame;
        const int64_t plane_at = f.axis[0]->bias_offset[tile.plane] + plane;
        int t = 0;
        for (int32_t c = tile.column.begin; c < tile.column.end; ++c) {
            const int64_t column_at = f.axis[2]->bias_offset[c] + column;
            for (int32_t r = tile.row.begin; r < tile.row.end; ++r, ++t)
                to[t] = bias.data + bias.at(plane_at, f.axis[1]->bias_offset[r] + row, column_at);
        }
    }
};

}  // namespace
}  // namespace vicinal

#endif
