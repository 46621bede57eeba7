// The forward of a unit: output and log-sum-exp, with what the other directions share.

#ifndef VICINAL_TILES_FORWARD_H
#define VICINAL_TILES_FORWARD_H

#include "tiles_kernel.h"

namespace vicinal {
namespace {

// Room for one tile, on the stack: what it is computed from and what it sums up.
template <class S>
struct TileRoom {
    alignas(64) float scores[MOST_VECTORS * MOST_TARGETS * S::LANES];
    Pass pass;
};

VICINAL_INLINE int64_t targets_floats(int64_t dim) { return round_up(dim, DIM_BLOCK) * MOST_TARGETS; }

struct RememberedBias {
    int64_t serial, head;
    bool reversed;
};

// The bias table of a head in the thread's workspace; kept while the head stays the same.
template <class S>
inline BiasTable bias_of(const Job& job, int64_t head, const Workspace& workspace) {
    if (!job.bias) return BiasTable{};  // then lengths may be anything
    BiasTable table = bias_layout(job.bias_length, job.rows_per_vector, S::LANES / job.rows_per_vector);
    const int64_t floats = bias_table_size(job.bias_length, table.R, table.C) + S::LANES;
    char* memory = static_cast<char*>(workspace.get(BIAS, floats * 4 + 64));
    RememberedBias* remembered = reinterpret_cast<RememberedBias*>(memory);
    float* data = reinterpret_cast<float*>(memory + 64);
    if (remembered->serial != job.serial || remembered->head != head) {
        fill_bias_table(job, head, table, data);
        remembered->serial = job.serial;
        remembered->head = head;
    }
    table.data = data;
    table.source = job.bias + head * job.bias_head;
    return table;
}

// What a list of sources is packed from, and how.
struct Packing {
    Operand operand[2];
    int64_t base[2];
    bool transposed[2], rows[2];
    bool lanes;  // lse and row sums too
    int64_t lse_base, sums_base;

    template <class S>
    VICINAL_INLINE int64_t floats() const {  // per source
        int64_t total = lanes ? 2 : 0;
        for (int i = 0; i < 2; ++i) {
            total += transposed[i] ? units_of<S>(operand[i].dim) : 0;
            total += rows[i] ? round_up(operand[i].dim, S::LANES) / S::PAIR : 0;
        }
        return total;
    }
};

// A packer with its room: coordinates of columns, zeros, and rows that cannot be read where they lie.
template <class S>
inline Packer<S> packer_of(const Job& job, const Sources& sources, const Chunk& chunk, const Packing& packing, int64_t width,
                           const Workspace& workspace) {
    constexpr int W = S::LANES;
    const Frame& f = sources.frame;
    const int64_t columns = chunk.column_end - chunk.column_begin, known = columns + f.C;
    const int64_t padded = round_up(most(packing.operand[0].dim, packing.operand[1].dim), W);
    Arena scratch{static_cast<char*>(workspace.get(SCRATCH, (known + padded * (W + 1)) * 4 + 64 * 4))};
    int32_t* coordinates = scratch.take<int32_t>(known);
    float* zeros = scratch.take<float>(padded);
    float* rows = scratch.take<float>(padded * W);
    for (int64_t c = 0; c < known; ++c)
        coordinates[c] =
            c < columns ? static_cast<int32_t>(source_coordinate(*f.axis[2], chunk.column_begin + c)) : -1;
    for (int64_t d = 0; d < padded; ++d) zeros[d] = 0.0f;
    return Packer<S>{job.dtype, f, chunk, width, coordinates, rows, zeros};
}

// Packs the row groups of a panel when a row of tiles first sees them, so that they are still near when it reads them.
template <class S>
struct Filler {
    const Job& job;
    const Packing& packing;
    const Chunk chunk;
    Panel panel;
    Packer<S> packer;
    bool* is_packed;  // by row group

    Filler(const Job& j, const Sources& sources, const Chunk& c, const Packing& p, const Workspace& workspace)
        : job(j), packing(p), chunk(c), packer(packer_of<S>(j, sources, chunk, p, panel_width_of(sources, c), workspace)) {
        constexpr int W = S::LANES;
        const int64_t groups = chunk.group_end - chunk.group_begin;
        panel.width = packer.width;
        const int64_t size = chunk.places(sources.frame.plane_end - sources.frame.plane_begin) * panel.width;
        Arena arena{static_cast<char*>(
            workspace.get(PANEL, (size * packing.template floats<S>() + 8 * W) * 4 + 64 * 8))};
        for (int i = 0; i < 2; ++i) {
            const int64_t dim = packing.operand[i].dim;
            panel.transposed[i] = packing.transposed[i] ? arena.take<float>(size * units_of<S>(dim) + W) : nullptr;
            panel.rows[i] = packing.rows[i] ? arena.take<float>(size / S::PAIR * round_up(dim, W)) : nullptr;
            panel.lanes[i] = packing.lanes ? arena.take<float>(size + W) : nullptr;
        }
        is_packed = static_cast<bool*>(workspace.get(PACKED, groups));
        for (int64_t group = 0; group < groups; ++group) is_packed[group] = false;
    }

    static VICINAL_INLINE int64_t panel_width_of(const Sources& sources, const Chunk& c) {
        return panel_width(c.column_end - c.column_begin, sources.frame.R, sources.frame.C);
    }

    VICINAL_APART void pack(const SeenRow& seen) {
        const int64_t group = seen.group, place = seen.place * panel.width;
        is_packed[group] = true;
        for (int i = 0; i < 2; ++i) {
            const int64_t dim = packing.operand[i].dim;
            if (!packing.transposed[i] && !packing.rows[i]) continue;
            packer.pack(packing.operand[i], packing.base[i], chunk.group_begin + group,
                        packing.transposed[i] ? panel.transposed[i] + place * units_of<S>(dim) : nullptr,
                        packing.rows[i] ? panel.rows[i] + place / S::PAIR * round_up(dim, S::LANES) : nullptr);
        }
        if (!packing.lanes) return;
        packer.pack_lanes(job.lse, job.lse_axis, packing.lse_base, chunk.group_begin + group, LOG2_E, panel.lanes[0] + place);
        packer.pack_lanes(job.row_sums, job.sums_axis, packing.sums_base, chunk.group_begin + group, 1.0f,
                          panel.lanes[1] + place);
    }

    // What a row of tiles sees is there afterwards.
    VICINAL_INLINE void open_row(const Walk<S>& walk) {
        int64_t asked = 0;
        for (int64_t i = 0; i < walk.num_rows; ++i) {
            if (is_packed[walk.rows[i].group]) continue;
            for (asked = most(asked, i); asked < least(i + 2, walk.num_rows); ++asked) ask_for(walk.rows[asked].group);
            pack(walk.rows[i]);
        }
    }

    // Fetches a tile's share of what the next row of tiles is the first to see.
    VICINAL_INLINE void ask_early(const Tile& tile, const Walk<S>& walk) const {
        if (walk.coming_begin >= walk.coming_end) return;
        const int64_t columns = chunk.column_end - chunk.column_begin;
        const int64_t tiles = walk.block.column_tiles.end - walk.block.column_tiles.begin;
        const int64_t begin = columns * tile.column_tile / tiles, end = columns * (tile.column_tile + 1) / tiles;
        for (int64_t plane = walk.sources.low(0, tile.plane); plane < walk.sources.high(0, tile.plane); ++plane)
            for (int64_t group = walk.coming_begin; group < walk.coming_end; ++group) {
                const int64_t at = (plane - packer.frame.plane_begin) * packer.frame.groups + group;
                if (at < chunk.group_begin || at >= chunk.group_end || is_packed[at - chunk.group_begin]) continue;
                for (int i = 0; i < 2; ++i)
                    if (packing.transposed[i] || packing.rows[i])
                        packer.ask_early(packing.operand[i], packing.base[i], at, begin, end);
            }
    }

    VICINAL_INLINE void ask_for(int64_t group) const {
        if (is_packed[group]) return;
        for (int i = 0; i < 2; ++i)
            if (packing.transposed[i] || packing.rows[i])
                packer.ask_for(packing.operand[i], packing.base[i], chunk.group_begin + group);
    }
};

template <class S, class Visit>
inline void each_chunk(const Block& block, const Sources& sources, int64_t floats, const Visit& visit) {
    const Frame& f = sources.frame;
    const Cut cut = cut_sources(block, sources, block.job.panel_bytes, floats);
    for (int64_t g = 0; g < cut.group_chunks; ++g)
        for (int64_t c = 0; c < cut.column_chunks; ++c) {
            Chunk chunk;
            chunk.group_begin = g * cut.groups;
            chunk.group_end = least(chunk.group_begin + cut.groups, f.row_groups());
            chunk.column_begin = f.column_begin + c * cut.columns;
            chunk.column_end = least(chunk.column_begin + cut.columns, f.column_end);
            chunk.ring = cut.ring;
            visit(chunk);
        }
}

// The keys that a block of queries sees, list by list: those of the grid, then the extra tokens. Opening a list turns
// `packing` to its keys and values.
template <class S, class P = Packing>
struct KeyLists {
    const Block& block;
    P& packing;
    int64_t sample, head, tokens;

    KeyLists(const Block& b, P& p, int64_t s, int64_t h) : block(b), packing(p), sample(s), head(h) {
        tokens = b.job.extra_lengths ? b.job.extra_lengths[s] : b.job.extra_tokens;
    }
    VICINAL_INLINE int count() const { return block.job.num_sources + (tokens ? 1 : 0); }

    VICINAL_INLINE void open(int list, Sources& sources) const {
        const bool is_extra = list == block.job.num_sources;
        if (is_extra)
            open_extra<S>(tokens, sources);
        else
            open_sources<S>(block, list, sources);
        packing.operand[0] = is_extra ? block.job.extra_key : block.job.key;
        packing.operand[1] = is_extra ? block.job.extra_value : block.job.value;
        for (int i = 0; i < 2; ++i)
            packing.base[i] = sample * packing.operand[i].batch + head * packing.operand[i].head;
    }

    // Panels that all lists take; with one, nothing has to be kept between panels.
    inline int64_t chunks() const {
        int64_t total = 0;
        Sources sources;
        for (int list = 0; list < count(); ++list) {
            open(list, sources);
            const Cut cut = cut_sources(block, sources, block.job.panel_bytes, packing.template floats<S>());
            total += cut.group_chunks * cut.column_chunks;
        }
        return total;
    }
};

// Several floats at once: out[i] = function(in[i]).
template <class S, class Function>
VICINAL_INLINE void each_lane(int count, const float* in, float* out, const Function& function) {
    alignas(64) float padded[MOST_TARGETS + S::LANES] = {};
    for (int i = 0; i < count; ++i) padded[i] = in[i];
    for (int i = 0; i < count; i += S::LANES) S::store(padded + i, function(S::load(padded + i)));
    for (int i = 0; i < count; ++i) out[i] = padded[i];
}

// ---- forward

template <class S>
struct ForwardTile {
    float top[MOST_TARGETS], total[MOST_TARGETS] = {};
    float* sums[MOST_TARGETS];
    bool is_fresh;  // nothing is summed up yet
};

template <class S, int T>
VICINAL_APART void forward_pass(const Job& job, const Panel& panel, const float* targets, ForwardTile<S>& tile, float* scores,
                         const Pass& pass, bool has_bias) {
    constexpr int W = S::LANES;
    using F = typename S::F;
    const F factor = S::all(job.scale * LOG2_E), nothing = S::all(-INFINITY);
    F top[T];
    VICINAL_UNROLL
    for (int t = 0; t < T; ++t) top[t] = S::all(FAR_BELOW);
    auto plain = [&](int v, int t, F sum) VICINAL_LAMBDA {
        const F score = S::select(pass.seen[v][t], S::mul(sum, factor), nothing);
        top[t] = S::max(top[t], score);
        S::store(scores + (v * T + t) * W, score);
    };
    auto biased = [&](int v, int t, F sum) VICINAL_LAMBDA {
        const F score = S::select(pass.seen[v][t], S::fma(sum, factor, S::load(pass.bias[v][t])), nothing);
        top[t] = S::max(top[t], score);
        S::store(scores + (v * T + t) * W, score);
    };
    if (has_bias)
        dot<S, T>(pass, targets, units_of<S>(job.query.dim), panel.transposed[0], panel.width, scores, biased);
    else
        dot<S, T>(pass, targets, units_of<S>(job.query.dim), panel.transposed[0], panel.width, scores, plain);
    alignas(64) float change[MOST_TARGETS + W] = {};
    float highest[T], sums[T];
    largest_of<S, T>(top, highest);
    VICINAL_UNROLL
    for (int t = 0; t < T; ++t) {
        const float before = tile.top[t];
        tile.top[t] = highest[t] > before ? highest[t] : before;
        change[t] = before - tile.top[t];
        top[t] = S::all(tile.top[t]);
    }
    F total[T];
    VICINAL_UNROLL
    for (int t = 0; t < T; ++t) total[t] = S::zero();
    for (int v = 0; v < pass.count; ++v) {
        VICINAL_UNROLL
        for (int t = 0; t < T; ++t) {
            float* at = scores + (v * T + t) * W;
            const F weight = exp2_of<S>(S::sub(S::load(at), top[t]));
            total[t] = S::add(total[t], weight);
            S::store(at, weight);
        }
    }
    narrow_weights<S, T>(pass, scores);
    sums_of<S, T>(total, sums);
    const int64_t padded = round_up(job.value.dim, W);
    if (tile.is_fresh) {
        for (int t = 0; t < T; ++t) tile.total[t] = sums[t];
        mix<S, T>(pass, scores, panel.rows[1], panel.width, padded, nullptr, tile.sums);
    } else {
        for (int t = 0; t < T; t += W) S::store(change + t, exp2_of<S>(S::load(change + t)));
        for (int t = 0; t < T; ++t) tile.total[t] = tile.total[t] * change[t] + sums[t];
        mix<S, T>(pass, scores, panel.rows[1], panel.width, padded, change, tile.sums);
    }
    tile.is_fresh = false;
}

#define VICINAL_FOR_COUNT(count, call)                                                                             \
    switch (count) {                                                                                               \
        case 1: call(1); break;                                                                                    \
        case 2: call(2); break;                                                                                    \
        case 3: call(3); break;                                                                                    \
        case 4: call(4); break;                                                                                    \
        case 5: call(5); break;                                                                                    \
        case 6: call(6); break;                                                                                    \
        case 7: call(7); break;                                                                                    \
        default: call(8); break;                                                                                   \
    }

// Writes the log-sum-exp of a block's targets from their maxima and totals; these are overwritten.
[[maybe_unused]] VICINAL_APART void finish_lse(const Block& block, int64_t lse_base, const float* top, float* total) {
    const Job& job = block.job;
    if (!job.lse) return;
    const int64_t targets = block.targets();
    for (int64_t i = 0; i < targets; ++i) {
        const float lse = top[i] * LN_2 + log_of(total[i]);
        total[i] = total[i] > 0.0f ? lse : total[i] - INFINITY;  // nothing is seen, or NaN
    }
    block.each_tile([&](const Tile& tile) {
        const Places to = block.places(tile, job.lse_axis, lse_base);
        block.each_target(tile, [&](int, int r, int c) { job.lse[to.at(r, c)] = total[tile.state_at(r, c)]; });
    });
}

// A block of queries of one head on its way through its keys.
template <class S>
struct ForwardRun {
    const Job& job;
    const Block& block;
    bool keeps_state;  // sums wait in the block's state between panels
    int64_t query_base, out_base;
    float *sums, *top, *total;  // of all targets; sums only of a tile's where they do not wait
    float* targets;
    TileRoom<S>& room;
};

// Fetches the lines that a tile will be written to while it is computed.
VICINAL_INLINE void ask_for_room(const Block& block, const Tile& tile, const Operand& operand, int64_t base) {
    const int64_t bytes = bytes_of(block.job.dtype), size = operand.dim * bytes;
    block.places(tile, operand.axis, base).each([&](int, int64_t place) VICINAL_LAMBDA {
        for (int64_t byte = 0; byte < size; byte += 64) VICINAL_PREFETCH_TO_WRITE(operand.data + place * bytes + byte);
    });
}

// Writes the output of a tile; what the log-sum-exp is made from waits at the targets' places in the block.
template <class S>
VICINAL_INLINE void finish_tile(const ForwardRun<S>& run, const Tile& tile, const ForwardTile<S>& done) {
    float inverse[MOST_TARGETS];
    for (int t = 0; t < MOST_TARGETS; ++t)  // all of them, so that it is done at once
        inverse[t] = done.total[t] > 0.0f ? 1.0f / done.total[t] : 0.0f;
    const Job& job = run.job;
    run.block.places(tile, job.out.axis, run.out_base).each([&](int t, int64_t place) VICINAL_LAMBDA {
        if (job.streams)
            stream_row<S>(job.dtype, job.out, place, done.sums[t], inverse[t]);
        else
            store_row<S>(job.dtype, job.out, place, done.sums[t], inverse[t]);
    });
}

template <class S>
VICINAL_APART void forward_tile(ForwardRun<S>& run, const Tile& tile, Walk<S>& walk, Filler<S>& filler, bool has_bias) {
    const Job& job = run.job;
    const int64_t padded = round_up(job.value.dim, S::LANES);
    const Places state_at = run.block.state_places(tile);
    load_targets<S>(run.block, tile, job.query, run.query_base, run.targets);
    if (job.is_far) filler.ask_early(tile, walk);
    ForwardTile<S> state;
    state.is_fresh = !run.keeps_state;
    if (run.keeps_state) {
        state_at.each([&](int t, int64_t place) VICINAL_LAMBDA {
            state.top[t] = run.top[place];
            state.total[t] = run.total[place];
            state.sums[t] = run.sums + place * padded;
        });
    } else {
        if (!job.streams) ask_for_room(run.block, tile, job.out, run.out_base);
        for (int t = 0; t < tile.count; ++t) {
            state.top[t] = FAR_BELOW;
            state.sums[t] = run.sums + t * padded;
        }
    }
    walk(tile, run.room.pass, [&](const Pass& pass) {
#define VICINAL_CALL(T) \
    forward_pass<S, T>(job, filler.panel, run.targets, state, run.room.scores, pass, has_bias)
        VICINAL_FOR_COUNT(tile.count, VICINAL_CALL)
#undef VICINAL_CALL
    });
    state_at.each([&](int t, int64_t place) VICINAL_LAMBDA {
        run.top[place] = state.top[t];
        run.total[place] = state.total[t];
    });
    if (run.keeps_state) return;
    if (state.is_fresh)  // nobody sees anything
        for (int64_t i = 0; i < tile.count * padded; ++i) run.sums[i] = 0.0f;
    finish_tile<S>(run, tile, state);
}

// Writes the output of a tile that has waited.
template <class S>
void finish_waiting(ForwardRun<S>& run, const Tile& tile) {
    ForwardTile<S> state;
    const int64_t padded = round_up(run.job.value.dim, S::LANES);
    run.block.state_places(tile).each([&](int t, int64_t place) {
        state.total[t] = run.total[place];
        state.sums[t] = run.sums + place * padded;
    });
    finish_tile<S>(run, tile, state);
}

template <class S>
void forward_unit(const Job& job, const Unit& unit, int64_t sample, int64_t head, const Workspace& workspace) {
    constexpr int W = S::LANES;
    const Block block(job, unit);
    const int64_t q_head = job.first_head + head, kv_head = q_head / job.shared;
    const int64_t padded = round_up(job.value.dim, W), key_dim = job.query.dim;
    Packing packing;
    packing.transposed[0] = packing.rows[1] = true;
    packing.transposed[1] = packing.rows[0] = packing.lanes = false;
    KeyLists<S> lists(block, packing, sample, kv_head);
    const bool keeps_state = lists.chunks() != 1;
    const int64_t all = block.targets(), kept = keeps_state ? all : MOST_TARGETS;
    Arena arena{static_cast<char*>(workspace.get(STATE, (kept * padded + 2 * all + targets_floats(key_dim)) * 4 + 256))};
    TileRoom<S> room;
    ForwardRun<S> run{job, block, keeps_state, sample * job.query.batch + q_head * job.query.head,
                      sample * job.out.batch + q_head * job.out.head, arena.take<float>(kept * padded),
                      arena.take<float>(all), arena.take<float>(all), arena.take<float>(targets_floats(key_dim)), room};
    if (keeps_state) {
        for (int64_t i = 0; i < kept * padded; ++i) run.sums[i] = 0.0f;
        for (int64_t i = 0; i < all; ++i) run.top[i] = FAR_BELOW;
        for (int64_t i = 0; i < all; ++i) run.total[i] = 0.0f;
    }
    const BiasTable bias = bias_of<S>(job, head, workspace);
    for (int list = 0; list < lists.count(); ++list) {
        Sources sources;
        lists.open(list, sources);
        const bool has_bias = bias.data && !sources.is_extra;
        each_chunk<S>(block, sources, packing.floats<S>(), [&](const Chunk& chunk) {
            Filler<S> filler(job, sources, chunk, packing, workspace);
            Walk<S> walk(block, sources, chunk, bias, true, nullptr, workspace);
            const auto open_row = [&](const Tile& tile) VICINAL_LAMBDA {
                walk.open_row(tile);
                filler.open_row(walk);
            };
            block.each_tile(open_row, [&](const Tile& tile) VICINAL_LAMBDA {
                forward_tile<S>(run, tile, walk, filler, has_bias);
            });
        });
    }
    if (keeps_state)
        block.each_tile([&](const Tile& tile) {
            finish_waiting<S>(run, tile);
        });
    finish_lse(block, sample * job.lse_batch + q_head * job.lse_head, run.top, run.total);
    if (job.streams) S::fence();
}

}  // namespace
}  // namespace vicinal

#endif
