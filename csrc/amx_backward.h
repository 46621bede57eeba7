// The backward of a unit in the matrix registers: the gradient of queries (and bias), the gradients of keys and values.
// Products cost so little here that scores are made twice, by queries and by keys, and every gradient is written once.

#ifndef VICINAL_AMX_BACKWARD_H
#define VICINAL_AMX_BACKWARD_H

#include "amx_forward.h"
#include "tiles_backward.h"

namespace vicinal {
namespace {

// Room for one tile of the backward.
struct AmxRoom {
    uint16_t *rows, *first, *second;  // targets: queries and gradients of outputs, or keys and values
    float *scores, *grads;
    AmxPass* pass;

    AmxRoom(int64_t key_padded, int64_t value_padded, const Workspace& workspace) {
        const int64_t padded = most(key_padded, value_padded);
        Arena arena{static_cast<char*>(workspace.get(
            AMX_PASS, static_cast<size_t>(2 * (MOST_GROUPS + 1) * GROUP * 4 + sizeof(AmxPass) +
                                          ((TILE + 1) * padded + TILE * (key_padded + value_padded)) * 2 + 64 * 8)))};
        pass = arena.take<AmxPass>(1);
        scores = arena.take<float>((MOST_GROUPS + 1) * GROUP);
        grads = arena.take<float>((MOST_GROUPS + 1) * GROUP);
        first = arena.take<uint16_t>(TILE * key_padded);
        second = arena.take<uint16_t>(TILE * value_padded);
        rows = arena.take<uint16_t>((TILE + 1) * padded);
        for (int64_t i = 0; i < (TILE + 1) * padded; ++i) rows[i] = 0;
    }
};

// ---- gradient of queries

struct AmxQueryRun {
    const Job& job;
    const Block& block;
    bool keeps_state;  // sums wait between panels
    int64_t query_base, grad_out_base, lse_base, sums_base, to_base;
    float* sums;  // [tile][lane][channel]
    float* grad_bias;
    AmxRoom room;
};

struct AmxQueryTile {
    F lse, row_sum;
    float* sums;
    bool is_fresh;
};

// Gradients of a group's scores: as they are in place of the scores where `keeps`, and as pairs.
template <bool BIAS>
VICINAL_INLINE void differentiate_group(const AmxPass& pass, int n, float* scores, const float* grads, float* pairs, F factor,
                                        const AmxQueryTile& tile, bool keeps) {
    const uint16_t* seen = pass.seen[n];
    const auto one = [&](int i) VICINAL_LAMBDA {
        F score = S::mul(S::load(scores + i * TILE), factor);
        if constexpr (BIAS) score = S::add(score, S::load(pass.bias[n] + i * TILE));
        const F weight = weight_of(S::sub(score, tile.lse), seen[i]);
        // where a weight is 0 so is the gradient, whatever stands in values nobody sees
        return _mm512_maskz_mul_ps(seen[i], weight, S::sub(S::load(grads + i * TILE), tile.row_sum));
    };
    for (int i = 0; i < pass.sources[n]; i += 2) {
        const F even = one(i), odd = one(i + 1);
        if (keeps) {
            S::store(scores + i * TILE, even);
            S::store(scores + (i + 1) * TILE, odd);
        }
        store_pair_rows(pairs + i / 2 * TILE, even, odd);
    }
    clear_pairs(pairs, pass.sources[n]);
}

// A tile of queries against the keys of a pass.
template <bool BIAS>
struct AmxQueryPass {
    const AmxPanel& panel;
    const AmxPass& pass;
    const AmxQueryTile& tile;
    const uint16_t *queries, *grad_out;
    Room scores, grads;
    F factor;
    bool keeps;

    VICINAL_INLINE bool mixes() const { return panel.is_finite[0]; }

    template <int N>
    VICINAL_INLINE void mix(const Batch& batch) const {
        if (mixes()) Sums<N>::add(panel, 0, pass, batch, 0, grads);
    }

    // Gradients of a batch's scores take the place of `grads`. Registers work meanwhile.
    template <int N>
    VICINAL_INLINE void differentiate(const Batch& now, const Batch& next, const Batch& before) const {
        const bool is_wide = pass.is_wide[now.first];
        float *own = grads.of(now), *other = grads.of(now, 1);
        begin_scores(pass, next, panel, 0, queries);
        differentiate_group<BIAS>(pass, now.first, scores.of(now), own, own, factor, tile, keeps);
        if (!is_wide) turn_pairs(own, 1);
        end_scores(next, scores);
        begin_scores(pass, next, panel, 1, grad_out);
        mix<N>(before);
        if (now.groups == 2) {
            float* pairs = is_wide ? own + GROUP / 2 : other;
            differentiate_group<BIAS>(pass, now.first + 1, scores.of(now, 1), other, pairs, factor, tile, keeps);
            turn_pairs(is_wide ? own : other, is_wide ? 2 : 1);
        }
        end_scores(next, grads);
    }

    template <int N>
    VICINAL_INLINE void take(int64_t row) const {
        if (mixes()) Sums<N>::open(tile.is_fresh ? nullptr : tile.sums, row);
        Batch now = Batch::begin(pass), before = Batch::none();
        begin_scores(pass, now, panel, 0, queries);
        end_scores(now, scores);
        begin_scores(pass, now, panel, 1, grad_out);
        end_scores(now, grads);
        while (now.groups) {
            const Batch next = now.next(pass);
            differentiate<N>(now, next, before);
            before = now;
            now = next;
        }
        mix<N>(before);
        if (mixes()) Sums<N>::close(tile.sums, row);
    }
};

template <bool BIAS>
VICINAL_INLINE void amx_query_pass(const AmxQueryRun& run, const AmxPanel& panel, AmxQueryTile& tile, const AmxPass& pass) {
    const int64_t channels = run.job.query.dim, row = round_up(channels, TILE);
    const bool keeps = BIAS && run.grad_bias, needs_all = keeps || channels > SUMS * TILE || !panel.is_finite[0];
    const int ring = needs_all ? MOST_GROUPS : RING;
    const AmxQueryPass<BIAS> own{panel, pass, tile, run.room.first, run.room.second, {run.room.scores, ring},
                                 {run.room.grads, ring}, S::all(run.job.scale * LOG2_E), keeps};
    switch (least(row / TILE, SUMS)) {
        case 1: own.template take<1>(row); break;
        case 2: own.template take<2>(row); break;
        case 3: own.template take<3>(row); break;
        default: own.template take<4>(row); break;
    }
    if (!own.mixes())
        mix_with_care(panel, 0, pass, own.grads, Span::all(pass), channels, tile.sums, tile.is_fresh);
    else if (channels > SUMS * TILE)
        mix_from(panel, 0, pass, own.grads, Span::all(pass), SUMS * TILE, channels, tile.sums, tile.is_fresh);
    tile.is_fresh = false;
}

VICINAL_APART void amx_query_pass_with_bias(const AmxQueryRun& run, const AmxPanel& panel, AmxQueryTile& tile,
                                            const AmxPass& pass) {
    amx_query_pass<true>(run, panel, tile, pass);
}

VICINAL_APART void amx_query_pass_plain(const AmxQueryRun& run, const AmxPanel& panel, AmxQueryTile& tile, const AmxPass& pass) {
    amx_query_pass<false>(run, panel, tile, pass);
}

VICINAL_APART void amx_query_tile(AmxQueryRun& run, const Tile& tile, const AmxWalk& walk, AmxFiller& filler, bool has_bias) {
    const Job& job = run.job;
    const Block& block = run.block;
    const int64_t channels = round_up(job.query.dim, TILE);
    load_tile(block, tile, job.query, run.query_base, run.room.rows, run.room.first);
    load_tile(block, tile, job.grad_out, run.grad_out_base, run.room.rows, run.room.second);
    alignas(64) float lanes[TILE];
    AmxQueryTile state;
    state.is_fresh = !run.keeps_state;
    state.sums = run.sums + (run.keeps_state ? tile_number(block, tile) * channels * TILE : 0);
    load_lanes(block, tile, job.lse, job.lse_axis, run.lse_base, 0.0f, lanes);
    const F lse = S::load(lanes);
    state.lse = S::mul(S::select(_mm512_cmp_ps_mask(lse, S::all(-INFINITY), _CMP_EQ_OQ), S::zero(), lse), S::all(LOG2_E));
    load_lanes(block, tile, job.row_sums, job.sums_axis, run.sums_base, 0.0f, lanes);
    state.row_sum = S::load(lanes);
    walk(tile, *run.room.pass, [&](const AmxPass& pass) VICINAL_LAMBDA {
        if (has_bias) {
            amx_query_pass_with_bias(run, filler.panel, state, pass);
            if (run.grad_bias) walk.add_bias_gradient(tile, pass, run.room.scores, run.grad_bias);
        } else {
            amx_query_pass_plain(run, filler.panel, state, pass);
        }
    });
    if (run.keeps_state || !job.grad_query.data) return;
    if (state.is_fresh)
        for (int64_t i = 0; i < channels * TILE; ++i) state.sums[i] = 0.0f;
    store_tile(block, tile, job.grad_query, run.to_base, state.sums, S::all(job.scale), false);
}

inline void amx_grad_query_unit(const Job& job, const Unit& unit, int64_t sample, int64_t head, float* grad_bias,
                                const Workspace& workspace) {
    const Block block(job, unit);
    const int64_t q_head = job.first_head + head, kv_head = q_head / job.shared;
    const int64_t channels = round_up(job.query.dim, TILE);
    AmxPacking packing;
    packing.rows[0] = packing.rows[1] = packing.paired[0] = true;
    packing.paired[1] = packing.lanes = false;
    AmxKeys lists(block, packing, sample, kv_head);
    const bool keeps_state = lists.chunks() != 1;
    const int64_t kept = (keeps_state ? tiles_of(block) : 1) * channels * TILE;
    AmxQueryRun run{job, block, keeps_state, sample * job.query.batch + q_head * job.query.head,
                    sample * job.grad_out.batch + q_head * job.grad_out.head, sample * job.lse_batch + q_head * job.lse_head,
                    sample * job.sums_batch + q_head * job.sums_head,
                    sample * job.grad_query.batch + q_head * job.grad_query.head,
                    static_cast<float*>(workspace.get(AMX_STATE, static_cast<size_t>(kept) * 4)), grad_bias,
                    AmxRoom(padded_channels(job.query.dim), padded_channels(job.value.dim), workspace)};
    if (keeps_state)
        for (int64_t i = 0; i < kept; ++i) run.sums[i] = 0.0f;
    const AmxBias bias = amx_bias_of(job, block, head, workspace);
    Matrix::open_whole();
    for (int list = 0; list < lists.count(); ++list) {
        Sources sources;
        lists.open(list, sources);
        const bool has_bias = bias.table && !sources.is_extra;
        each_amx_chunk(block, sources, packing, [&](const Chunk& chunk) VICINAL_LAMBDA {
            AmxFiller filler(job, sources, chunk, packing, workspace);
            AmxWalk walk(block, sources, chunk, bias, true, workspace);
            const auto open_row = [&](const Tile& tile) VICINAL_LAMBDA {
                walk.open_row(tile);
                filler.open_row(walk.rows, walk.num_rows);
            };
            block.each_tile(open_row, [&](const Tile& tile) VICINAL_LAMBDA {
                amx_query_tile(run, tile, walk, filler, has_bias);
            });
        });
    }
    Matrix::close();
    if (!keeps_state || !job.grad_query.data) return;
    block.each_tile([&](const Tile& tile) VICINAL_LAMBDA {
        store_tile(block, tile, job.grad_query, run.to_base, run.sums + tile_number(block, tile) * channels * TILE,
                   S::all(job.scale), false);
    });
}

// ---- gradients of keys and values: targets are keys, sources queries

struct AmxKeyRun {
    const Job& job;
    const Block& block;
    int64_t key_base, value_base;
    float *key_sums, *value_sums;  // [tile][lane][channel]
    AmxRoom room;
};

// Weights of a group in place of its scores and gradients in place of `grads`, as pairs.
template <bool BIAS>
VICINAL_INLINE void weigh_and_differentiate(const AmxPanel& panel, const AmxPass& pass, int n, const float* scores,
                                            const float* grads, float* weight_pairs, float* grad_pairs, F factor,
                                            bool needs_keys) {
    const uint16_t* seen = pass.seen[n];
    const int64_t first = pass.place[n] * panel.columns + pass.at[n];
    const float *lse = panel.lanes[0] + first, *row_sum = panel.lanes[1] + first;
    const auto weigh = [&](int i) VICINAL_LAMBDA {
        F score = S::mul(S::load(scores + i * TILE), factor);
        if constexpr (BIAS) score = S::add(score, S::load(pass.bias[n] + i * TILE));
        return weight_of(S::sub(score, S::all(lse[i])), seen[i]);
    };
    const auto differentiate = [&](int i, F weight) VICINAL_LAMBDA {
        return _mm512_maskz_mul_ps(seen[i], weight, S::sub(S::load(grads + i * TILE), S::all(row_sum[i])));
    };
    for (int i = 0; i < pass.sources[n]; i += 2) {
        const F even = weigh(i), odd = weigh(i + 1);
        store_pair_rows(weight_pairs + i / 2 * TILE, even, odd);
        if (needs_keys) store_pair_rows(grad_pairs + i / 2 * TILE, differentiate(i, even), differentiate(i + 1, odd));
    }
    clear_pairs(weight_pairs, pass.sources[n]);
    if (needs_keys) clear_pairs(grad_pairs, pass.sources[n]);
}

// A tile of keys against the queries of a pass.
template <bool BIAS>
struct AmxKeyPass {
    const AmxPanel& panel;
    const AmxPass& pass;
    const uint16_t *keys, *values;
    Room scores, grads;
    F factor;
    bool needs_keys, needs_values;

    VICINAL_INLINE bool mixes() const { return needs_values && panel.is_finite[1]; }

    template <int N>
    VICINAL_INLINE void mix(const Batch& batch) const {
        if (mixes()) Sums<N>::add(panel, 1, pass, batch, 0, scores);
    }
    VICINAL_INLINE void turn(const Batch& batch, int group, int groups) const {
        turn_pairs(scores.of(batch, group), groups);
        if (needs_keys) turn_pairs(grads.of(batch, group), groups);
    }

    // Weights of a batch take the place of scores, gradients that of `grads`. Registers work meanwhile.
    template <int N>
    VICINAL_INLINE void weigh(const Batch& now, const Batch& next, const Batch& before) const {
        const bool is_wide = pass.is_wide[now.first];
        float *own = scores.of(now), *to = grads.of(now);
        begin_scores(pass, next, panel, 0, keys);
        weigh_and_differentiate<BIAS>(panel, pass, now.first, own, to, own, to, factor, needs_keys);
        if (!is_wide) turn(now, 0, 1);
        end_scores(next, scores);
        if (needs_keys) begin_scores(pass, next, panel, 1, values);
        mix<N>(before);
        if (now.groups == 2) {
            const int64_t pairs = is_wide ? GROUP / 2 : GROUP;
            weigh_and_differentiate<BIAS>(panel, pass, now.first + 1, own + GROUP, to + GROUP, own + pairs, to + pairs, factor,
                                          needs_keys);
            turn(now, is_wide ? 0 : 1, is_wide ? 2 : 1);
        }
        if (needs_keys) end_scores(next, grads);
    }

    template <int N>
    VICINAL_INLINE void take(float* sums, int64_t row) const {
        if (mixes()) Sums<N>::open(sums, row);
        Batch now = Batch::begin(pass), before = Batch::none();
        begin_scores(pass, now, panel, 0, keys);
        end_scores(now, scores);
        if (needs_keys) {
            begin_scores(pass, now, panel, 1, values);
            end_scores(now, grads);
        }
        while (now.groups) {
            const Batch next = now.next(pass);
            weigh<N>(now, next, before);
            before = now;
            now = next;
        }
        mix<N>(before);
        if (mixes()) Sums<N>::close(sums, row);
    }
};

template <bool BIAS>
VICINAL_INLINE void amx_key_pass(const AmxKeyRun& run, const AmxPanel& panel, int64_t number, const AmxPass& pass) {
    const Job& job = run.job;
    const int64_t channels = job.value.dim, row = round_up(channels, TILE);
    float* values = run.value_sums + number * row * TILE;
    float* keys = run.key_sums + number * round_up(job.query.dim, TILE) * TILE;
    const AmxKeyPass<BIAS> own{panel, pass, run.room.first, run.room.second, {run.room.scores, MOST_GROUPS},
                               {run.room.grads, MOST_GROUPS}, S::all(job.scale * LOG2_E), job.grad_key.data != nullptr,
                               job.grad_value.data != nullptr};
    switch (least(row / TILE, SUMS)) {
        case 1: own.template take<1>(values, row); break;
        case 2: own.template take<2>(values, row); break;
        case 3: own.template take<3>(values, row); break;
        default: own.template take<4>(values, row); break;
    }
    if (own.needs_values && !own.mixes())
        mix_with_care(panel, 1, pass, own.scores, Span::all(pass), channels, values, false);
    else if (own.needs_values && channels > SUMS * TILE)
        mix_from(panel, 1, pass, own.scores, Span::all(pass), SUMS * TILE, channels, values, false);
    if (own.needs_keys) mix_all(panel, 0, pass, own.grads, job.query.dim, keys, false);
}

VICINAL_APART void amx_key_pass_with_bias(const AmxKeyRun& run, const AmxPanel& panel, int64_t number, const AmxPass& pass) {
    amx_key_pass<true>(run, panel, number, pass);
}

VICINAL_APART void amx_key_pass_plain(const AmxKeyRun& run, const AmxPanel& panel, int64_t number, const AmxPass& pass) {
    amx_key_pass<false>(run, panel, number, pass);
}

VICINAL_APART void amx_key_tile(AmxKeyRun& run, const Tile& tile, const AmxWalk& walk, AmxFiller& filler, bool has_bias) {
    const Job& job = run.job;
    load_tile(run.block, tile, job.key, run.key_base, run.room.rows, run.room.first);
    load_tile(run.block, tile, job.value, run.value_base, run.room.rows, run.room.second);
    const int64_t number = tile_number(run.block, tile);
    walk(tile, *run.room.pass, [&](const AmxPass& pass) VICINAL_LAMBDA {
        if (has_bias)
            amx_key_pass_with_bias(run, filler.panel, number, pass);
        else
            amx_key_pass_plain(run, filler.panel, number, pass);
    });
}

inline void amx_grad_key_value_unit(const Job& job, const Unit& unit, int64_t sample, int64_t head, const Workspace& workspace) {
    const Block block(job, unit);
    const int64_t key_channels = round_up(job.query.dim, TILE), value_channels = round_up(job.value.dim, TILE);
    AmxPacking packing;
    packing.operand[0] = job.query;
    packing.operand[1] = job.grad_out;
    packing.rows[0] = packing.rows[1] = packing.paired[0] = packing.paired[1] = packing.lanes = true;
    const int64_t kept = tiles_of(block) * TILE;
    Arena arena{static_cast<char*>(
        workspace.get(AMX_STATE, static_cast<size_t>(kept * (key_channels + value_channels) * 4 + 64 * 2)))};
    AmxKeyRun run{job, block, sample * job.key.batch + head * job.key.head, sample * job.value.batch + head * job.value.head,
                  arena.take<float>(kept * key_channels), arena.take<float>(kept * value_channels),
                  AmxRoom(padded_channels(job.query.dim), padded_channels(job.value.dim), workspace)};
    for (int64_t i = 0; i < kept * key_channels; ++i) run.key_sums[i] = 0.0f;
    for (int64_t i = 0; i < kept * value_channels; ++i) run.value_sums[i] = 0.0f;
    Sources sources;
    Matrix::open_whole();
    // the group's query heads that share this key head
    const int64_t head_begin = most(head * job.shared, job.first_head);
    const int64_t head_end = least((head + 1) * job.shared, job.first_head + job.heads);
    for (int64_t q_head = head_begin; q_head < head_end; ++q_head) {
        packing.base[0] = sample * job.query.batch + q_head * job.query.head;
        packing.base[1] = sample * job.grad_out.batch + q_head * job.grad_out.head;
        packing.lse_base = sample * job.lse_batch + q_head * job.lse_head;
        packing.sums_base = sample * job.sums_batch + q_head * job.sums_head;
        const AmxBias bias = amx_bias_of(job, block, q_head - job.first_head, workspace);
        for (int list = 0; list < job.num_sources; ++list) {
            open_sources<S>(block, list, sources);
            each_amx_chunk(block, sources, packing, [&](const Chunk& chunk) VICINAL_LAMBDA {
                AmxFiller filler(job, sources, chunk, packing, workspace);
                AmxWalk walk(block, sources, chunk, bias, false, workspace);
                const auto open_row = [&](const Tile& tile) VICINAL_LAMBDA {
                    walk.open_row(tile);
                    filler.open_row(walk.rows, walk.num_rows);
                };
                block.each_tile(open_row, [&](const Tile& tile) VICINAL_LAMBDA {
                    amx_key_tile(run, tile, walk, filler, bias.table != nullptr);
                });
            });
        }
    }
    Matrix::close();
    // where heads of an earlier group share this key head, they have written their part
    const bool adds = head * job.shared < job.first_head;
    const int64_t to_key = sample * job.grad_key.batch + head * job.grad_key.head;
    const int64_t to_value = sample * job.grad_value.batch + head * job.grad_value.head;
    block.each_tile([&](const Tile& tile) VICINAL_LAMBDA {
        const int64_t number = tile_number(block, tile) * TILE;
        if (job.grad_key.data)
            store_tile(block, tile, job.grad_key, to_key, run.key_sums + number * key_channels, S::all(job.scale), adds);
        if (job.grad_value.data)
            store_tile(block, tile, job.grad_value, to_value, run.value_sums + number * value_channels, S::all(1.0f), adds);
    });
}

}  // namespace
}  // namespace vicinal

#endif
