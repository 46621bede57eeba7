// Panels: the sources that a block of targets needs, copied once into the order in which the kernels read them.
//
//   transposed  [row group][channel][column * R + row]   for scores: a vector of sources per channel
//   rows        [row group][column * R + row][channel]   for weighted sums: a vector of channels per source
//
// In units of two numbers, `transposed` has half as many channels and `rows` half as many sources.
//
// A row group is R neighboring rows of one plane. Rows that fill a group up are zero. The rim of columns that vectors
// may reach over is left as it is: scores there are masked, and nobody's weighted sum reads them.

#ifndef VICINAL_PANEL_H
#define VICINAL_PANEL_H

#include "simd.h"
#include "tiles.h"

namespace vicinal {
namespace {

VICINAL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
VICINAL_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
VICINAL_INLINE int64_t round_up(int64_t a, int64_t multiple) { return (a + multiple - 1) / multiple * multiple; }

constexpr float FAR_BELOW = -1e30f;  // the maximum before there is any score: exp2(score - FAR_BELOW) is never met
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LN_2 = 0.693147180559945309f;

// Memory that a unit takes from the thread's workspace, in one piece.
struct Arena {
    char* next;
    template <class Item>
    VICINAL_INLINE Item* take(int64_t count) {
        Item* taken = reinterpret_cast<Item*>(next);
        next += round_up(count * static_cast<int64_t>(sizeof(Item)), 64);
        return taken;
    }
};

// Natural logarithm of positive numbers, to about one unit in the last place.
VICINAL_INLINE float log_of(float value) {
    const uint32_t bits = bits_of_float(value), root = 0x3f3504f3u;  // of one half
    const int32_t exponent = static_cast<int32_t>(bits - root) >> 23;
    const float part = float_of_bits(bits - (static_cast<uint32_t>(exponent) << 23));
    const float s = (part - 1.0f) / (part + 1.0f), square = s * s;
    float series = square * (1.0f / 9.0f) + 1.0f / 7.0f;
    series = series * square + 1.0f / 5.0f;
    series = series * square + 1.0f / 3.0f;
    return exponent * LN_2 + 2.0f * (s + s * square * series);
}

// The sources of a block, in steps: planes, rows (from an anchor that vectors are aligned to) and columns.
struct Frame {
    int64_t plane_begin, plane_end;
    int64_t row_begin, row_end, row_origin;
    int64_t column_begin, column_end;
    int64_t groups;  // row groups of a plane
    int R, C;        // rows and columns of a vector
    const Interval* axis[3];

    int64_t row_groups() const { return (plane_end - plane_begin) * groups; }
};

// The part of a frame that is packed at a time: row groups counted over all planes, and columns.
//
// Targets are visited row by row, so a panel need not hold all row groups of a plane: with a ring it has room for as many
// as a row of tiles sees, and a group takes the place of one that no further row sees.
struct Chunk {
    int64_t group_begin, group_end, column_begin, column_end;
    int64_t ring;  // row groups of a plane that there is room for; 0: for all

    VICINAL_INLINE int64_t place_of(int64_t plane, int64_t group_of_plane, int64_t group) const {
        return ring ? plane * ring + group_of_plane % ring : group;
    }
    VICINAL_INLINE int64_t places(int64_t planes) const { return ring ? planes * ring : group_end - group_begin; }
};

struct Panel {
    int64_t width;  // floats of one channel of one row group: columns * R, and a rim
    float* transposed[2];
    float* rows[2];
    float* lanes[2];  // one number per source
};

VICINAL_INLINE int64_t source_coordinate(const Interval& axis, int64_t place) {
    if (axis.turn) {
        place %= axis.turn;
        if (place < 0) place += axis.turn;
    }
    return axis.first + axis.step * place;
}

VICINAL_INLINE int64_t bytes_of(int64_t dtype) { return dtype == VICINAL_FLOAT32 ? 4 : 2; }

// One row of channels as float32; `channel` is 1 for all but unusual views.
template <class S>
VICINAL_INLINE void load_row(int64_t dtype, const Operand& operand, int64_t offset, float* to) {
    constexpr int W = S::LANES;
    const int64_t dim = operand.dim, stride = operand.channel;
    int64_t d = 0;
    if (dtype == VICINAL_FLOAT32) {
        const float* from = reinterpret_cast<const float*>(operand.data) + offset;
        if (stride == 1)
            for (; d + W <= dim; d += W) S::store(to + d, S::load(from + d));
        for (; d < dim; ++d) to[d] = from[d * stride];
    } else {
        const uint16_t* from = reinterpret_cast<const uint16_t*>(operand.data) + offset;
        if (dtype == VICINAL_BFLOAT16) {
            if (stride == 1)
                for (; d + W <= dim; d += W) S::store(to + d, S::widen_bfloat16(from + d));
            for (; d < dim; ++d) to[d] = float_of_bfloat16(from[d * stride]);
        } else {
            if (stride == 1)
                for (; d + W <= dim; d += W) S::store(to + d, S::widen_float16(from + d));
            for (; d < dim; ++d) to[d] = float_of_float16(from[d * stride]);
        }
    }
}

// One row of channels as units.
template <class S>
VICINAL_INLINE void load_units(int64_t dtype, const Operand& operand, int64_t offset, float* to) {
    if constexpr (S::PAIR == 1) {
        load_row<S>(dtype, operand, offset, to);
    } else {
        const uint16_t* from = reinterpret_cast<const uint16_t*>(operand.data) + offset;
        const int64_t dim = operand.dim, stride = operand.channel;
        int64_t d = 0;
        if (stride == 1) {
            for (; d + 2 * S::LANES <= dim; d += 2 * S::LANES)
                S::store(to + d / 2, S::load(reinterpret_cast<const float*>(from + d)));
        }
        for (; d < dim; d += 2) {
            const uint32_t low = from[d * stride], high = d + 1 < dim ? from[(d + 1) * stride] : 0u;
            to[d / 2] = float_of_bits(low | high << 16);
        }
    }
}

template <class S>
VICINAL_INLINE void store_row(int64_t dtype, const Operand& operand, int64_t offset, const float* from, float factor) {
    constexpr int W = S::LANES;
    const int64_t dim = operand.dim, stride = operand.channel;
    int64_t d = 0;
    if (dtype == VICINAL_FLOAT32) {
        float* to = reinterpret_cast<float*>(const_cast<char*>(operand.data)) + offset;
        if (stride == 1) {
            const typename S::F by = S::all(factor);
            for (; d + W <= dim; d += W) S::store(to + d, S::mul(S::load(from + d), by));
        }
        for (; d < dim; ++d) to[d * stride] = from[d] * factor;
    } else {
        uint16_t* to = reinterpret_cast<uint16_t*>(const_cast<char*>(operand.data)) + offset;
        if (dtype == VICINAL_BFLOAT16) {
            if (stride == 1)  // apart, for compilers that then take many at once
                for (; d < dim; ++d) to[d] = bfloat16_of_float(from[d] * factor);
            for (; d < dim; ++d) to[d * stride] = bfloat16_of_float(from[d] * factor);
        } else
            for (; d < dim; ++d) to[d * stride] = float16_of_float(from[d] * factor);
    }
}

// The same past the caches, where that can be. A line that is written whole need not be read first.
template <class S>
VICINAL_INLINE void stream_row(int64_t dtype, const Operand& operand, int64_t offset, const float* from, float factor) {
    constexpr int W = S::LANES;
    float* to = reinterpret_cast<float*>(const_cast<char*>(operand.data)) + offset;
    const bool is_whole = operand.channel == 1 && operand.dim % 16 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0;
    if (dtype != VICINAL_FLOAT32 || !is_whole) return store_row<S>(dtype, operand, offset, from, factor);
    const typename S::F by = S::all(factor);
    for (int64_t d = 0; d < operand.dim; d += W) S::stream(to + d, S::mul(S::load(from + d), by));
}

// Rows of tensors that are fetched while other things are computed, some at a time: a core waits for sixteen lines at
// once, and whoever asks for more stands still.
struct Errands {
    static constexpr int MOST = 10 * MOST_TARGETS;
    const char* row[MOST];
    int64_t bytes[MOST];
    int count = 0, done = 0;

    VICINAL_INLINE void note(const Operand& operand, int64_t place, int64_t item) {
        row[count] = operand.data + place * item;
        bytes[count++] = operand.dim * item;
    }
    // One of so many parts.
    VICINAL_INLINE void run(int parts) {
        const int end = static_cast<int>(least(count, done + (count + parts - 1) / parts));
        for (; done < end; ++done)
            for (int64_t byte = 0; byte < bytes[done]; byte += 64) VICINAL_PREFETCH(row[done] + byte);
    }
};

// Where a panel's rows and columns stand on the axes of the tensors; -1 where there is nothing.
template <class S>
struct Packer {
    static constexpr int W = S::LANES;
    int64_t dtype;
    const Frame& frame;
    const Chunk& chunk;
    int64_t width;
    const int32_t* columns;  // coordinates of the chunk's columns, and -1 up to a full vector
    float* scratch;          // [W][dim rounded up], for rows that cannot be read where they lie
    const float* zeros;      // [dim rounded up]

    // Sources that are asked for before they are packed. Neighbors stand far apart in memory, a page for every few, where
    // no machine sees by itself what comes next. Asking for what is never read costs more than this gains.
    static constexpr int64_t AHEAD = 4 * W;
    static constexpr int64_t FAR_APART = 2048;  // bytes from one source to the next

    VICINAL_INLINE void row_coordinates(int64_t group, int64_t* plane, int64_t* rows) const {
        const int64_t within = group % frame.groups;
        *plane = source_coordinate(*frame.axis[0], frame.plane_begin + group / frame.groups);
        for (int r = 0; r < frame.R; ++r) {
            const int64_t row = frame.row_origin + within * frame.R + r;
            const bool is_there = row >= frame.row_begin && row < frame.row_end;
            rows[r] = is_there ? source_coordinate(*frame.axis[1], row) : -1;
        }
    }

    // Whether all rows of the group are there.
    VICINAL_INLINE bool row_offsets(const Operand& operand, int64_t base, int64_t group, int64_t* offset) const {
        int64_t plane, row[W];
        row_coordinates(group, &plane, row);
        bool is_whole = true;
        for (int r = 0; r < frame.R; ++r) {
            offset[r] = row[r] < 0 ? -1 : base + plane * operand.axis[0] + row[r] * operand.axis[1];
            is_whole = is_whole && row[r] >= 0;
        }
        return is_whole;
    }

    // Calls function(lane within the row group, place in the operand) for the sources that are there.
    template <class Function>
    VICINAL_INLINE void each_source(const Operand& operand, int64_t base, int64_t group, const Function& function) const {
        int64_t offset[W];
        row_offsets(operand, base, group, offset);
        for (int64_t column = 0; column < chunk.column_end - chunk.column_begin; ++column)
            for (int r = 0; r < frame.R; ++r)
                if (offset[r] >= 0) function(column * frame.R + r, offset[r] + columns[column] * operand.axis[2]);
    }

    // Asks for a row group of one operand, where its sources stand far apart: no machine sees by itself what comes next.
    VICINAL_INLINE void ask_for(const Operand& operand, int64_t base, int64_t group) const {
        const int64_t bytes = bytes_of(dtype), count = chunk.column_end - chunk.column_begin;
        if (count < 2 || count * frame.R > AHEAD || (columns[1] - columns[0]) * operand.axis[2] * bytes < FAR_APART) return;
        each_source(operand, base, group, [&](int64_t, int64_t place) VICINAL_LAMBDA {
            for (int64_t byte = 0; byte < operand.dim * bytes; byte += 64) VICINAL_PREFETCH(operand.data + place * bytes + byte);
        });
    }

    // Fetches some columns of a row group that is packed later.
    VICINAL_INLINE void ask_early(const Operand& operand, int64_t base, int64_t group, int64_t begin, int64_t end) const {
        const int64_t bytes = bytes_of(dtype), size = operand.dim * bytes;
        int64_t offset[W];
        row_offsets(operand, base, group, offset);
        for (int64_t column = begin; column < end; ++column)
            for (int r = 0; r < frame.R; ++r) {
                if (offset[r] < 0) continue;
                const char* at = operand.data + (offset[r] + columns[column] * operand.axis[2]) * bytes;
                for (int64_t byte = 0; byte < size; byte += 64) VICINAL_PREFETCH_FAR(at + byte);
            }
    }

    // Packs a row group of one operand of one head: transposed where `transposed` is given, as rows where `rows` is.
    void pack(const Operand& operand, int64_t base, int64_t group, float* transposed, float* rows) const {
        const int64_t dim = operand.dim, padded = round_up(dim, W), units = (dim + S::PAIR - 1) / S::PAIR;
        // rows can be read where they lie if they hold whole units
        const bool direct = operand.channel == 1 && dim % S::PAIR == 0 && (S::PAIR == 2 || dtype == VICINAL_FLOAT32);
        const int64_t bytes = bytes_of(dtype), step = operand.axis[2], mask = frame.R - 1;
        const int64_t filled = (chunk.column_end - chunk.column_begin) * frame.R;
        int shift = 0;
        while ((1 << shift) < frame.R) ++shift;
        int64_t offset[W];
        const bool is_whole = row_offsets(operand, base, group, offset);
        const int64_t ahead = AHEAD / frame.R * step * bytes;
        for (int64_t begin = 0; begin < filled; begin += W) {
            const float* from[W];
            if (begin + AHEAD < filled) {
                for (int lane = 0; lane < W; ++lane) {
                    const char* at = operand.data + (offset[lane & mask] + columns[(begin + lane) >> shift] * step) * bytes;
                    for (int64_t byte = 0; byte < dim * bytes; byte += 64) VICINAL_PREFETCH(at + ahead + byte);
                }
            }
            if (direct && is_whole && begin + W <= filled) {
                const float** to = from;
                for (int64_t column = begin >> shift; to < from + W; ++column) {
                    const char* at = operand.data + columns[column] * step * bytes;
                    for (int r = 0; r < frame.R; ++r) *to++ = reinterpret_cast<const float*>(at + offset[r] * bytes);
                }
            } else {
                for (int lane = 0; lane < W; ++lane) {
                    const int64_t column = columns[(begin + lane) >> shift], row_at = offset[lane & mask];
                    if (column < 0 || row_at < 0) {
                        from[lane] = zeros;
                        continue;
                    }
                    const int64_t at = row_at + column * step;
                    if (direct) {
                        from[lane] = reinterpret_cast<const float*>(operand.data + at * bytes);
                    } else {
                        load_units<S>(dtype, operand, at, scratch + lane * padded);
                        from[lane] = scratch + lane * padded;
                    }
                }
            }
            if (transposed) {
                int64_t d = 0;
                for (; d + W <= units; d += W) S::transpose(from, d, transposed + d * width + begin, width);
                for (; d < units; ++d)
                    for (int lane = 0; lane < W; ++lane)
                        std::memcpy(transposed + d * width + begin + lane, from[lane] + d, 4);
            }
            if (rows) copy_rows(from, dim, padded, rows + begin / S::PAIR * padded);
        }
    }

    VICINAL_INLINE void copy_rows(const float* const* from, int64_t dim, int64_t padded, float* to) const {
        for (int lane = 0; lane < W; lane += S::PAIR, to += padded) {
            int64_t d = 0;
            if constexpr (S::PAIR == 1) {
                for (; d + W <= dim; d += W) S::store(to + d, S::load(from[lane] + d));
                for (; d < padded; ++d) to[d] = d < dim ? from[lane][d] : 0.0f;
            } else {
                const uint16_t* low = reinterpret_cast<const uint16_t*>(from[lane]);
                const uint16_t* high = reinterpret_cast<const uint16_t*>(from[lane + 1]);
                for (; d + W <= dim; d += W) S::store(to + d, S::interleave(low + d, high + d));
                for (; d < padded; ++d)
                    to[d] = d < dim ? float_of_bits(low[d] | static_cast<uint32_t>(high[d]) << 16) : 0.0f;
            }
        }
    }

    // One number per source of a row group: factor * numbers, 0 where there is none or where it is -inf.
    void pack_lanes(const float* numbers, const int64_t* strides, int64_t base, int64_t group, float factor, float* to) const {
        const int64_t filled = (chunk.column_end - chunk.column_begin) * frame.R;
        int shift = 0;
        while ((1 << shift) < frame.R) ++shift;
        int64_t plane, row[W];
        row_coordinates(group, &plane, row);
        for (int64_t lane = 0; lane < filled; ++lane) {
            const int64_t column = columns[lane >> shift], at = row[lane & (frame.R - 1)];
            float number = 0.0f;
            if (column >= 0 && at >= 0) number = numbers[base + plane * strides[0] + at * strides[1] + column * strides[2]];
            to[lane] = number == -INFINITY ? 0.0f : number * factor;
        }
    }
};

// Floats of one channel of a row group: the columns, and a rim to reach over. An odd number of cache lines, so that
// channels fall on all sets of the cache alike.
VICINAL_INLINE int64_t panel_width(int64_t columns, int R, int C) {
    const int64_t lines = ((columns + C - 1) * R + 15) / 16;
    return (lines | 1) * 16;
}

}  // namespace
}  // namespace vicinal

#endif
