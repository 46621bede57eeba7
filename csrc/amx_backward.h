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
            AMX_PASS, static_cast<size_t>(2 * MOST_GROUPS * TILE * TILE * 4 + sizeof(AmxPass) +
                                          ((TILE + 1) * padded + TILE * (key_padded + value_padded)) * 2 + 64 * 8)))};
        pass = arena.take<AmxPass>(1);
        scores = arena.take<float>(MOST_GROUPS * TILE * TILE);
        grads = arena.take<float>(MOST_GROUPS * TILE * TILE);
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
    Errands errands;
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

// Of a group, and of one that is turned together with it. What comes of it takes the place of `grads`.
template <bool BIAS>
VICINAL_INLINE void differentiate_groups(const AmxPass& pass, int n, float* scores, float* grads, F factor,
                                         const AmxQueryTile& tile, bool keeps) {
    constexpr int64_t GROUP = TILE * TILE;
    float *own = scores + n * GROUP, *to = grads + n * GROUP;
    const int groups = groups_together(pass, n);
    differentiate_group<BIAS>(pass, n, own, to, to, factor, tile, keeps);
    if (groups == 2) differentiate_group<BIAS>(pass, n + 1, own + GROUP, to + GROUP, to + GROUP / 2, factor, tile, keeps);
    turn_pairs(to, groups);
}

// Gradients of a pass's scores, and sums of the first channels meanwhile.
template <int N, bool BIAS>
VICINAL_INLINE void differentiate_and_mix(const AmxPanel& panel, const AmxPass& pass, float* scores, float* grads, F factor,
                                          AmxQueryTile& tile, int64_t row, bool keeps) {
    Sums<N>::open(tile.is_fresh ? nullptr : tile.sums, row);
    int before = -1;
    for (int n = 0; n < pass.count; n += groups_together(pass, n)) {
        run_errands(tile.errands, pass);
        differentiate_groups<BIAS>(pass, n, scores, grads, factor, tile, keeps);
        if (before >= 0) Sums<N>::add(panel, 0, pass, before, 0, grads);
        before = n;
    }
    Sums<N>::add(panel, 0, pass, before, 0, grads);
    Sums<N>::close(tile.sums, row);
}

template <bool BIAS>
VICINAL_INLINE void amx_query_pass(const AmxQueryRun& run, const AmxPanel& panel, AmxQueryTile& tile, const AmxPass& pass) {
    float *scores = run.room.scores, *grads = run.room.grads;
    each_four(pass, [&](int first, int count) VICINAL_LAMBDA {
        score_some(pass, first, count, panel, 0, run.room.first, scores);
        score_some(pass, first, count, panel, 1, run.room.second, grads);
    });
    const F factor = S::all(run.job.scale * LOG2_E);
    const int64_t channels = run.job.query.dim, row = round_up(channels, TILE);
    const bool keeps = BIAS && run.grad_bias;
    if (panel.is_finite[0]) {
        switch (least(row / TILE, SUMS)) {
            case 1: differentiate_and_mix<1, BIAS>(panel, pass, scores, grads, factor, tile, row, keeps); break;
            case 2: differentiate_and_mix<2, BIAS>(panel, pass, scores, grads, factor, tile, row, keeps); break;
            case 3: differentiate_and_mix<3, BIAS>(panel, pass, scores, grads, factor, tile, row, keeps); break;
            default: differentiate_and_mix<4, BIAS>(panel, pass, scores, grads, factor, tile, row, keeps); break;
        }
        mix_from(panel, 0, pass, grads, SUMS * TILE, channels, tile.sums, tile.is_fresh);
    } else {
        for (int n = 0; n < pass.count; n += groups_together(pass, n))
            differentiate_groups<BIAS>(pass, n, scores, grads, factor, tile, keeps);
        mix_with_care(panel, 0, pass, grads, channels, tile.sums, tile.is_fresh);
    }
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
    if (is_worth_errands(job)) {
        note_targets(block, tile, job.query, run.query_base, true, state.errands);
        note_targets(block, tile, job.grad_out, run.grad_out_base, true, state.errands);
        if (!run.keeps_state && job.grad_query.data)
            note_targets(block, tile, job.grad_query, run.to_base, false, state.errands);
        note_next_sources(walk, filler, tile, state.errands);
    }
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
    KeyLists<S, AmxPacking> lists(block, packing, sample, kv_head);
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
    Matrix::open();
    for (int list = 0; list < lists.count(); ++list) {
        Sources sources;
        lists.open(list, sources);
        const bool has_bias = bias.table && !sources.is_extra;
        each_tile_of(block, sources, packing, bias, true, workspace,
                     [&](const Tile& tile, const AmxWalk& walk, AmxFiller& filler) VICINAL_LAMBDA {
                         amx_query_tile(run, tile, walk, filler, has_bias);
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
    const int64_t first = pass.place[n];
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

template <bool BIAS>
VICINAL_INLINE void weigh_and_differentiate_groups(const AmxPanel& panel, const AmxPass& pass, int n, float* scores,
                                                   float* grads, F factor, bool needs_keys) {
    constexpr int64_t GROUP = TILE * TILE;
    float *own = scores + n * GROUP, *to = grads + n * GROUP;
    const int groups = groups_together(pass, n);
    weigh_and_differentiate<BIAS>(panel, pass, n, own, to, own, to, factor, needs_keys);
    if (groups == 2)
        weigh_and_differentiate<BIAS>(panel, pass, n + 1, own + GROUP, to + GROUP, own + GROUP / 2, to + GROUP / 2, factor,
                                      needs_keys);
    turn_pairs(own, groups);
    if (needs_keys) turn_pairs(to, groups);
}

// Weights and gradients of a pass, and sums of the first channels of values meanwhile.
template <int N, bool BIAS>
VICINAL_INLINE void weigh_and_mix_values(const AmxPanel& panel, const AmxPass& pass, float* scores, float* grads, F factor,
                                         bool needs_keys, float* sums, int64_t row, Errands& errands) {
    Sums<N>::open(sums, row);
    int before = -1;
    for (int n = 0; n < pass.count; n += groups_together(pass, n)) {
        run_errands(errands, pass);
        weigh_and_differentiate_groups<BIAS>(panel, pass, n, scores, grads, factor, needs_keys);
        if (before >= 0) Sums<N>::add(panel, 1, pass, before, 0, scores);
        before = n;
    }
    Sums<N>::add(panel, 1, pass, before, 0, scores);
    Sums<N>::close(sums, row);
}

template <bool BIAS>
VICINAL_INLINE void amx_key_pass(const AmxKeyRun& run, const AmxPanel& panel, int64_t number, const AmxPass& pass, Errands& errands) {
    const Job& job = run.job;
    float *scores = run.room.scores, *grads = run.room.grads;
    const bool needs_keys = job.grad_key.data != nullptr, needs_values = job.grad_value.data != nullptr;
    each_four(pass, [&](int first, int count) VICINAL_LAMBDA {
        score_some(pass, first, count, panel, 0, run.room.first, scores);
        if (needs_keys) score_some(pass, first, count, panel, 1, run.room.second, grads);
    });
    const F factor = S::all(job.scale * LOG2_E);
    const int64_t channels = job.value.dim, row = round_up(channels, TILE);
    float* values = run.value_sums + number * row * TILE;
    float* keys = run.key_sums + number * round_up(job.query.dim, TILE) * TILE;
    if (needs_values && panel.is_finite[1]) {
        switch (least(row / TILE, SUMS)) {
            case 1: weigh_and_mix_values<1, BIAS>(panel, pass, scores, grads, factor, needs_keys, values, row, errands); break;
            case 2: weigh_and_mix_values<2, BIAS>(panel, pass, scores, grads, factor, needs_keys, values, row, errands); break;
            case 3: weigh_and_mix_values<3, BIAS>(panel, pass, scores, grads, factor, needs_keys, values, row, errands); break;
            default: weigh_and_mix_values<4, BIAS>(panel, pass, scores, grads, factor, needs_keys, values, row, errands); break;
        }
        mix_from(panel, 1, pass, scores, SUMS * TILE, channels, values, false);
    } else {
        for (int n = 0; n < pass.count; n += groups_together(pass, n))
            weigh_and_differentiate_groups<BIAS>(panel, pass, n, scores, grads, factor, needs_keys);
        if (needs_values) mix_with_care(panel, 1, pass, scores, channels, values, false);
    }
    if (needs_keys) mix_all(panel, 0, pass, grads, job.query.dim, keys, false);
}

VICINAL_APART void amx_key_pass_with_bias(const AmxKeyRun& run, const AmxPanel& panel, int64_t number, const AmxPass& pass,
                                          Errands& errands) {
    amx_key_pass<true>(run, panel, number, pass, errands);
}

VICINAL_APART void amx_key_pass_plain(const AmxKeyRun& run, const AmxPanel& panel, int64_t number, const AmxPass& pass,
                                      Errands& errands) {
    amx_key_pass<false>(run, panel, number, pass, errands);
}

VICINAL_APART void amx_key_tile(AmxKeyRun& run, const Tile& tile, const AmxWalk& walk, AmxFiller& filler, bool has_bias) {
    const Job& job = run.job;
    load_tile(run.block, tile, job.key, run.key_base, run.room.rows, run.room.first);
    load_tile(run.block, tile, job.value, run.value_base, run.room.rows, run.room.second);
    const int64_t number = tile_number(run.block, tile);
    Errands errands;
    if (is_worth_errands(job)) {
        note_targets(run.block, tile, job.key, run.key_base, true, errands);
        note_targets(run.block, tile, job.value, run.value_base, true, errands);
        note_next_sources(walk, filler, tile, errands);
    }
    walk(tile, *run.room.pass, [&](const AmxPass& pass) VICINAL_LAMBDA {
        if (has_bias)
            amx_key_pass_with_bias(run, filler.panel, number, pass, errands);
        else
            amx_key_pass_plain(run, filler.panel, number, pass, errands);
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
    Matrix::open();
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
            each_tile_of(block, sources, packing, bias, false, workspace,
                         [&](const Tile& tile, const AmxWalk& walk, AmxFiller& filler) VICINAL_LAMBDA {
                             amx_key_tile(run, tile, walk, filler, bias.table != nullptr);
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
