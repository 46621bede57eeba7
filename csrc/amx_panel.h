// Panels for the matrix registers: the sources that a block of targets needs, in bfloat16 and in their own order.
//
//   rows    [place][column][channel]   left of scores: a row of numbers per source
//   across  [place][channel][column]   left of weighted sums: a row of numbers per channel
//
// A place is a row of sources of one plane. Channels are filled up to 32 with zeros. Behind the columns of `across` stand
// zeros, which weights of 0 are multiplied with; what stands behind those of `rows` is never looked at.

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

// One number each of 16 sources, from 16 rows of channels. `is_finite` is cleared where one is not.
VICINAL_INLINE void lay_across(const uint16_t* const* rows, int64_t channels, uint16_t* to, int64_t width, bool& is_finite) {
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    for (int64_t d = 0; d < channels; d += MATRIX_DEPTH) {
        __m512 pairs[16], turned[16];
        __mmask32 infinite = 0;
        VICINAL_UNROLL
        for (int i = 0; i < 8; ++i) {
            const __m512i even = _mm512_loadu_si512(rows[2 * i] + d), odd = _mm512_loadu_si512(rows[2 * i + 1] + d);
            infinite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(even, exponent), exponent);
            infinite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(odd, exponent), exponent);
            pairs[i] = _mm512_castsi512_ps(_mm512_unpacklo_epi16(even, odd));
            pairs[i + 8] = _mm512_castsi512_ps(_mm512_unpackhi_epi16(even, odd));
        }
        S::transpose(pairs, turned);
        if (infinite) is_finite = false;
        // number i of a register stands in quarter i / 4: channels 8 (i / 4) + i % 4, and 4 more in the upper half
        VICINAL_UNROLL
        for (int i = 0; i < 16; ++i) {
            uint16_t* at = to + (d + i / 4 * 8 + i % 4) * width;
            const __m512i both = _mm512_castps_si512(turned[i]);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), _mm512_castsi512_si256(both));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + 4 * width), _mm512_extracti64x4_epi64(both, 1));
        }
    }
}

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
    VICINAL_APART const uint16_t* copied(const uint16_t* from, uint16_t* to) const {
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
    bool rows[2], across[2];
    bool lanes;  // lse and row sums too
    int64_t lse_base, sums_base;

    int64_t floats() const {  // per source
        int64_t total = lanes ? 2 : 0;
        for (int i = 0; i < 2; ++i) total += (rows[i] + across[i]) * padded_channels(operand[i].dim) / 2;
        return total;
    }
};

struct AmxPanel {
    int64_t columns;  // of a place in `rows` and `lanes`
    int64_t width;    // of a channel in `across`
    int64_t padded[2];
    uint16_t* rows[2];
    uint16_t* across[2];
    float* lanes[2];       // one number per source: log-sum-exp times log2(e), row sums
    bool is_finite[2];     // what stands in `across`
};

// A row of sources that a row of tiles sees.
struct AmxRow {
    int64_t plane, row;  // in steps
    int64_t group;       // within the chunk
    int64_t place;       // within the panel
    uint32_t lanes;      // whose targets see it
};

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
        panel.columns = columns + TILE;
        panel.width = (round_up(columns, TILE) / TILE | 1) * TILE + 2 * TILE;  // an odd number of half lines
        const int64_t numbers = places * panel.columns + TILE;
        Arena arena{static_cast<char*>(workspace.get(
            AMX_PANEL, (numbers * p.floats() + places * (panel.width - columns) * 2 * most_padded) * 4 + 64 * 8))};
        for (int i = 0; i < 2; ++i) {
            const int64_t padded = panel.padded[i] = padded_channels(p.operand[i].dim);
            panel.rows[i] = p.rows[i] ? arena.take<uint16_t>(numbers * padded) : nullptr;
            panel.across[i] = p.across[i] ? arena.take<uint16_t>(places * padded * panel.width) : nullptr;
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

    VICINAL_INLINE void pack_side(int side, int64_t offset, int64_t place) {
        const Operand& operand = packing.operand[side];
        const int64_t padded = panel.padded[side], step = operand.axis[2];
        const Rows from(operand, scratch, zeros);
        uint16_t* rows = packing.rows[side] ? panel.rows[side] + place * panel.columns * padded : nullptr;
        uint16_t* across = packing.across[side] ? panel.across[side] + place * padded * panel.width : nullptr;
        for (int64_t begin = 0; begin < columns; begin += TILE) {
            const uint16_t* row[TILE];
            const int count = static_cast<int>(least(TILE, columns - begin));
            for (int i = 0; i < count; ++i) {
                const int64_t at = offset + coordinates[begin + i] * step;
                const char* ahead = operand.data + 2 * (at + AHEAD * step);
                for (int64_t byte = 0; byte < 2 * operand.dim; byte += 64) VICINAL_PREFETCH(ahead + byte);
                row[i] = from.at(at, i);
            }
            for (int i = count; i < TILE; ++i) row[i] = zeros;
            if (rows)
                for (int i = 0; i < count; ++i)
                    for (int64_t d = 0; d < padded; d += MATRIX_DEPTH)
                        _mm512_storeu_si512(rows + (begin + i) * padded + d, _mm512_loadu_si512(row[i] + d));
            if (across) lay_across(row, padded, across + begin, panel.width, panel.is_finite[side]);
        }
        if (!across) return;
        for (int64_t d = 0; d < padded; ++d)
            for (int64_t i = round_up(columns, TILE); i < panel.width; i += TILE)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(across + d * panel.width + i), _mm256_setzero_si256());
    }

    // Numbers of a row of sources times a factor, 0 for -inf.
    VICINAL_INLINE void pack_lanes(const float* numbers, int64_t offset, int64_t step, float factor, float* to) const {
        for (int64_t i = 0; i < columns; ++i) {
            const float number = numbers[offset + coordinates[i] * step];
            to[i] = number == -INFINITY ? 0.0f : number * factor;
        }
    }

    VICINAL_APART void pack(const AmxRow& seen) {
        const int64_t plane = source_coordinate(*sources.frame.axis[0], seen.plane);
        const int64_t row = source_coordinate(*sources.frame.axis[1], seen.row);
        is_packed[seen.group] = true;
        for (int i = 0; i < 2; ++i)
            if (packing.rows[i] || packing.across[i])
                pack_side(i, packing.base[i] + plane * packing.operand[i].axis[0] + row * packing.operand[i].axis[1],
                          seen.place);
        if (!packing.lanes) return;
        const int64_t to = seen.place * panel.columns;
        pack_lanes(job.lse, packing.lse_base + plane * job.lse_axis[0] + row * job.lse_axis[1], job.lse_axis[2], LOG2_E,
                   panel.lanes[0] + to);
        pack_lanes(job.row_sums, packing.sums_base + plane * job.sums_axis[0] + row * job.sums_axis[1], job.sums_axis[2],
                   1.0f, panel.lanes[1] + to);
    }

    VICINAL_INLINE void open_row(const AmxRow* rows, int64_t count) {
        for (int64_t i = 0; i < count; ++i)
            if (!is_packed[rows[i].group]) pack(rows[i]);
    }
};

}  // namespace
}  // namespace vicinal

#endif
