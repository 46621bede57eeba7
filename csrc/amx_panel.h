// Panels for the matrix registers: the sources that a block of targets needs, in bfloat16 and in their own order.
//
//   rows    [place][column][channel]         left of scores: a row of numbers per source
//   paired  [place][column / 2][channel][2]  right of weighted sums: a row of pairs for every two neighboring sources
//
// A place is a row of sources of one plane. Channels are filled up to 32 with zeros. Behind the columns of `paired` stand
// zeros, which weights of 0 are multiplied with; what stands behind those of `rows` is never looked at. All that matrix
// registers load are whole cache lines: a row that stands in two takes six times as long.

#ifndef VICINAL_AMX_PANEL_H
#define VICINAL_AMX_PANEL_H

#include "amx.h"
#include "tiles_forward.h"

namespace vicinal {
namespace {

using S = Avx512;
using F = S::F;

enum AmxSlot { AMX_PANEL = 16, AMX_STATE, AMX_SCRATCH, AMX_BIAS, AMX_WALK, AMX_PASS };

constexpr int TILE = 16;  // targets of a tile, one to a lane

VICINAL_INLINE int64_t padded_channels(int64_t dim) { return round_up(dim, MATRIX_DEPTH); }

// Two rows of channels as pairs. `is_finite` is cleared where a number is not.
VICINAL_INLINE void pair_rows(const uint16_t* even, const uint16_t* odd, int64_t channels, uint16_t* to, bool& is_finite) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    // pairs come in quarters of four: of these channels, and of those 4 further on
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int64_t d = 0; d < channels; d += MATRIX_DEPTH) {
        const __m512i a = _mm512_loadu_si512(even + d), b = _mm512_loadu_si512(odd + d);
        const __mmask32 infinite = _mm512_cmpeq_epi16_mask(_mm512_and_si512(a, exponent), exponent) |
                                   _mm512_cmpeq_epi16_mask(_mm512_and_si512(b, exponent), exponent);
        if (infinite) is_finite = false;
        const __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
        _mm512_storeu_si512(to + 2 * d, _mm512_permutex2var_epi32(low, first, high));
        _mm512_storeu_si512(to + 2 * d + MATRIX_DEPTH, _mm512_permutex2var_epi32(low, second, high));
    }
}

// Of 32 channels those that are there, where so many are left.
VICINAL_INLINE uint32_t channels_there(int64_t left) { return left >= 32 ? ~0u : (1u << most(left, 0)) - 1u; }

// Rows of channels as the kernels read them: where they lie if they can be, else copied.
struct Rows {
    const Operand& operand;
    int64_t padded;
    bool lie;           // whole vectors of neighboring channels
    uint16_t* scratch;  // [16][padded]
    const uint16_t* zeros;

    Rows(const Operand& from, uint16_t* room, const uint16_t* nothing)
        : operand(from), padded(padded_channels(from.dim)), lie(from.channel == 1 && from.dim % MATRIX_DEPTH == 0),
          scratch(room), zeros(nothing) {}

    VICINAL_INLINE const uint16_t* at(int64_t place, int number) const {
        const uint16_t* from = reinterpret_cast<const uint16_t*>(operand.data) + place;
        return lie ? from : copied(from, scratch + number * padded);
    }
    VICINAL_INLINE const uint16_t* copied(const uint16_t* from, uint16_t* to) const {
        if (operand.channel != 1) return copied_one_by_one(from, to);
        for (int64_t d = 0; d < padded; d += MATRIX_DEPTH)
            _mm512_storeu_si512(to + d, _mm512_maskz_loadu_epi16(channels_there(operand.dim - d), from + d));
        return to;
    }
    VICINAL_APART const uint16_t* copied_one_by_one(const uint16_t* from, uint16_t* to) const {
        for (int64_t d = 0; d < operand.dim; ++d) to[d] = from[d * operand.channel];
        for (int64_t d = operand.dim; d < padded; ++d) to[d] = 0;
        return to;
    }
};

// The targets of a tile as the right side of products: [32 channels][pair][lane], with zeros for lanes nobody has.
VICINAL_INLINE void lay_pairs(const uint16_t* const* rows, int64_t channels, uint16_t* to) {
    for (int64_t d = 0; d < channels; d += MATRIX_DEPTH) {
        __m512 from[16], turned[16];
        VICINAL_UNROLL
        for (int i = 0; i < 16; ++i) from[i] = _mm512_loadu_ps(rows[i] + d);
        S::transpose(from, turned);
        VICINAL_UNROLL
        for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + d * TILE + 2 * TILE * i, turned[i]);
    }
}

// What a list of sources is packed from, and how.
struct AmxPacking {
    Operand operand[2];
    int64_t base[2];
    bool rows[2], paired[2];
    bool lanes;  // lse and row sums too
    int64_t lse_base, sums_base;

    template <class>
    int64_t floats() const {  // per source
        int64_t total = lanes ? 2 : 0;
        for (int i = 0; i < 2; ++i) total += (rows[i] + paired[i]) * padded_channels(operand[i].dim) / 2;
        return total;
    }
};

struct AmxPanel {
    int64_t columns;  // of a place
    int64_t padded[2];
    uint16_t* rows[2];
    uint16_t* paired[2];
    float* lanes[2];    // one number per source: log-sum-exp times log2(e), row sums
    bool is_finite[2];  // what stands in `paired`
};

// A row of sources that a row of tiles sees.
struct AmxRow {
    int64_t plane, row;  // in steps
    int64_t group;       // within the chunk
    int64_t place;       // within the panel
    uint32_t lanes;      // whose targets see it
};

// Columns of a place, with those behind that nobody sees.
VICINAL_INLINE int64_t columns_of_place(const Chunk& chunk) {
    return round_up(chunk.column_end - chunk.column_begin, 2) + TILE;
}

// Packs rows of sources when a row of tiles first sees them.
struct AmxFiller {
    const Job& job;
    const Sources& sources;
    const AmxPacking& packing;
    const Chunk chunk;
    AmxPanel panel;
    int64_t columns;       // to be packed
    int32_t* coordinates;  // of columns
    uint16_t* scratch;
    uint16_t* zeros;
    bool* is_packed;  // by row

    AmxFiller(const Job& j, const Sources& s, const Chunk& c, const AmxPacking& p, const Workspace& workspace)
        : job(j), sources(s), packing(p), chunk(c), columns(c.column_end - c.column_begin) {
        const int64_t groups = chunk.group_end - chunk.group_begin;
        const int64_t places = chunk.places(s.frame.plane_end - s.frame.plane_begin);
        const int64_t most_padded = most(padded_channels(p.operand[0].dim), padded_channels(p.operand[1].dim));
        panel.columns = columns_of_place(chunk);
        const int64_t numbers = places * panel.columns + TILE;
        Arena arena{static_cast<char*>(workspace.get(AMX_PANEL, static_cast<size_t>(numbers * p.floats<S>() * 4 + 64 * 8)))};
        for (int i = 0; i < 2; ++i) {
            const int64_t padded = panel.padded[i] = padded_channels(p.operand[i].dim);
            panel.rows[i] = p.rows[i] ? arena.take<uint16_t>(numbers * padded) : nullptr;
            panel.paired[i] = p.paired[i] ? arena.take<uint16_t>(numbers * padded) : nullptr;
            panel.lanes[i] = p.lanes ? arena.take<float>(numbers) : nullptr;
            panel.is_finite[i] = true;
        }
        Arena small{static_cast<char*>(workspace.get(
            AMX_SCRATCH, columns * 4 + most_padded * (TILE + 1) * 2 + groups + 64 * 4))};
        coordinates = small.take<int32_t>(columns);
        scratch = small.take<uint16_t>(most_padded * TILE);
        zeros = small.take<uint16_t>(most_padded);
        is_packed = small.take<bool>(groups);
        for (int64_t i = 0; i < columns; ++i)
            coordinates[i] = static_cast<int32_t>(source_coordinate(*s.frame.axis[2], c.column_begin + i));
        std::memset(zeros, 0, static_cast<size_t>(most_padded) * 2);
        std::memset(is_packed, 0, static_cast<size_t>(groups));
    }

    // Columns that are asked for before they are packed: they may stand a page apart.
    static constexpr int64_t AHEAD = 2 * TILE;

    static VICINAL_INLINE void ask(const Operand& operand, int64_t at) {
        for (int64_t byte = 0; byte < 2 * operand.dim; byte += 64) VICINAL_PREFETCH(operand.data + 2 * at + byte);
    }

    VICINAL_INLINE void pack_side(int side, int64_t offset, int64_t place) {
        const Operand& operand = packing.operand[side];
        const int64_t padded = panel.padded[side], step = operand.axis[2];
        const Rows from(operand, scratch, zeros);
        uint16_t* rows = packing.rows[side] ? panel.rows[side] + place * panel.columns * padded : nullptr;
        uint16_t* paired = packing.paired[side] ? panel.paired[side] + place * panel.columns * padded : nullptr;
        for (int64_t i = 0; i < least(AHEAD, columns); ++i) ask(operand, offset + coordinates[i] * step);
        for (int64_t begin = 0; begin < columns; begin += TILE) {
            const uint16_t* row[TILE];
            const int count = static_cast<int>(least(TILE, columns - begin));
            for (int i = 0; i < count; ++i) {
                const int64_t at = offset + coordinates[begin + i] * step;
                if (begin + i + AHEAD < columns) ask(operand, offset + coordinates[begin + i + AHEAD] * step);
                row[i] = from.at(at, i);
            }
            if (count & 1) row[count] = zeros;
            if (rows)
                for (int i = 0; i < count; ++i)
                    for (int64_t d = 0; d < padded; d += MATRIX_DEPTH)
                        _mm512_storeu_si512(rows + (begin + i) * padded + d, _mm512_loadu_si512(row[i] + d));
            if (paired)
                for (int i = 0; i < count; i += 2)
                    pair_rows(row[i], row[i + 1], padded, paired + (begin + i) * padded, panel.is_finite[side]);
        }
        if (paired) std::memset(paired + round_up(columns, 2) * padded, 0, static_cast<size_t>(2 * TILE * padded));
    }

    // Numbers of a row of sources times a factor, 0 for -inf.
    VICINAL_INLINE void pack_lanes(const float* numbers, int64_t offset, int64_t step, float factor, float* to) const {
        for (int64_t i = 0; i < columns; ++i) {
            const float number = numbers[offset + coordinates[i] * step];
            to[i] = number == -INFINITY ? 0.0f : with_plain_nan(number * factor);
        }
    }

    VICINAL_APART void pack(const AmxRow& seen) {
        const int64_t plane = source_coordinate(*sources.frame.axis[0], seen.plane);
        const int64_t row = source_coordinate(*sources.frame.axis[1], seen.row);
        is_packed[seen.group] = true;
        for (int i = 0; i < 2; ++i)
            if (packing.rows[i] || packing.paired[i])
                pack_side(i, packing.base[i] + plane * packing.operand[i].axis[0] + row * packing.operand[i].axis[1],
                          seen.place);
        if (!packing.lanes) return;
        const int64_t to = seen.place * panel.columns;
        pack_lanes(job.lse, packing.lse_base + plane * job.lse_axis[0] + row * job.lse_axis[1], job.lse_axis[2], LOG2_E,
                   panel.lanes[0] + to);
        pack_lanes(job.row_sums, packing.sums_base + plane * job.sums_axis[0] + row * job.sums_axis[1], job.sums_axis[2],
                   1.0f, panel.lanes[1] + to);
    }

    // Notes where some columns of a row of sources stand, as many as there is room for.
    VICINAL_INLINE void note(int64_t plane, int64_t row, int64_t begin, int64_t end, Errands& errands) const {
        const int64_t plane_at = source_coordinate(*sources.frame.axis[0], plane);
        const int64_t row_at = source_coordinate(*sources.frame.axis[1], row);
        for (int i = 0; i < 2; ++i) {
            if (!packing.rows[i] && !packing.paired[i]) continue;
            const Operand& operand = packing.operand[i];
            const int64_t at = packing.base[i] + plane_at * operand.axis[0] + row_at * operand.axis[1];
            for (int64_t column = begin; column < end && errands.count < Errands::MOST; ++column)
                errands.note(operand, at + coordinates[column] * operand.axis[2], 2);
        }
    }

    VICINAL_INLINE void open_row(const AmxRow* rows, int64_t count) {
        for (int64_t i = 0; i < count; ++i)
            if (!is_packed[rows[i].group]) pack(rows[i]);
    }
};

}  // namespace
}  // namespace vicinal

#endif
