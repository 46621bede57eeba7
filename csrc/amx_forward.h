// The forward of a unit in the matrix registers.

#ifndef VICINAL_AMX_FORWARD_H
#define VICINAL_AMX_FORWARD_H

#include "amx_kernel.h"

namespace vicinal {
namespace {

// A block of queries of one head on its way through its keys.
struct AmxForward {
    const Job& job;
    const Block& block;
    bool keeps_state;  // sums wait between panels
    int64_t query_base, out_base;
    float *sums, *top, *total;  // [tile][lane][channel] and [tile][lane]; only one tile's sums where they do not wait
    uint16_t *rows, *targets;
    float* scores;
    AmxPass& pass;
};

// What a tile has summed up.
struct AmxState {
    F top, total;
    float* sums;
    bool is_fresh;
    Errands errands;
};

// Largest scores of some groups, whose scores stay as they are or, with a bias, become complete.
VICINAL_INLINE F largest_scores(const AmxPass& pass, int first, int count, float* scores, F factor, bool has_bias, F top) {
    F other = top;
    for (int n = first; n < first + count; ++n) {
        float* at = scores + n * TILE * TILE;
        const uint16_t* seen = pass.seen[n];
        if (has_bias) {
            for (int i = 0; i < pass.sources[n]; ++i) {
                const F score = S::fma(S::load(at + i * TILE), factor, S::load(pass.bias[n] + i * TILE));
                S::store(at + i * TILE, score);
                top = _mm512_mask_max_ps(top, seen[i], top, score);
            }
        } else {
            for (int i = 0; i + 1 < pass.sources[n]; i += 2) {
                top = _mm512_mask_max_ps(top, seen[i], top, S::mul(S::load(at + i * TILE), factor));
                other = _mm512_mask_max_ps(other, seen[i + 1], other, S::mul(S::load(at + (i + 1) * TILE), factor));
            }
            if (pass.sources[n] & 1) {
                const int i = pass.sources[n] - 1;
                top = _mm512_mask_max_ps(top, seen[i], top, S::mul(S::load(at + i * TILE), factor));
            }
        }
    }
    return S::max(other, top);
}

// Weights of a group in place of its scores, as pairs, and their sum.
VICINAL_INLINE void weigh_group(const AmxPass& pass, int n, const float* scores, float* pairs, F factor, F top, F* total) {
    const uint16_t* seen = pass.seen[n];
    for (int i = 0; i < pass.sources[n]; i += 2) {
        const F even = weight_of(S::sub(rounded_product(S::load(scores + i * TILE), factor), top), seen[i]);
        const F odd = weight_of(S::sub(rounded_product(S::load(scores + (i + 1) * TILE), factor), top), seen[i + 1]);
        total[0] = S::add(total[0], even);
        total[1] = S::add(total[1], odd);
        store_pair_rows(pairs + i / 2 * TILE, even, odd);
    }
    clear_pairs(pairs, pass.sources[n]);
}

// Weights of a group, and of one that is turned together with it.
VICINAL_INLINE void weigh_groups(const AmxPass& pass, int n, float* scores, F factor, F top, F* total) {
    float* at = scores + n * TILE * TILE;
    const int groups = groups_together(pass, n);
    weigh_group(pass, n, at, at, factor, top, total);
    if (groups == 2) weigh_group(pass, n + 1, at + TILE * TILE, at + TILE * TILE / 2, factor, top, total);
    turn_pairs(at, groups);
}

// Weights of a pass, and sums of the first channels meanwhile.
template <int N>
VICINAL_INLINE void weigh_and_mix(const AmxPanel& panel, const AmxPass& pass, float* scores, F factor, F top, F* total,
                                  float* sums, int64_t row, bool is_fresh, Errands& errands) {
    Sums<N>::open(is_fresh ? nullptr : sums, row);
    int before = -1;
    for (int n = 0; n < pass.count; n += groups_together(pass, n)) {
        run_errands(errands, pass);
        weigh_groups(pass, n, scores, factor, top, total);
        if (before >= 0) Sums<N>::add(panel, 1, pass, before, 0, scores);
        before = n;
    }
    Sums<N>::add(panel, 1, pass, before, 0, scores);
    Sums<N>::close(sums, row);
}

VICINAL_APART void amx_forward_pass(const Job& job, const AmxPanel& panel, const uint16_t* targets, AmxState& state,
                                    float* scores, const AmxPass& pass, bool has_bias) {
    const F scale = S::all(job.scale * LOG2_E);
    F top = state.top;
    int before = -1;
    each_four(pass, [&](int first, int count) VICINAL_LAMBDA {
        score_some(pass, first, count, panel, 0, targets, scores);
        if (before >= 0) top = largest_scores(pass, before, SUMS, scores, scale, has_bias, top);
        before = first;
    });
    top = largest_scores(pass, before, pass.count - before, scores, scale, has_bias, top);
    const F factor = has_bias ? S::all(1.0f) : scale;  // scores with a bias are scaled already
    F total[2] = {S::zero(), S::zero()};
    const int64_t channels = job.value.dim, row = round_up(channels, TILE);
    if (!state.is_fresh) {
        const F change = exp2_of<S>(S::sub(state.top, top));
        state.total = S::mul(state.total, change);
        alignas(64) float changes[TILE];
        S::store(changes, change);
        for (int lane = 0; lane < TILE; ++lane)
            for (int64_t d = 0; d < row; d += TILE) {
                float* at = state.sums + lane * row + d;
                S::store(at, S::mul(S::load(at), S::all(changes[lane])));
            }
    }
    if (panel.is_finite[1]) {
        switch (least(row / TILE, SUMS)) {
            case 1: weigh_and_mix<1>(panel, pass, scores, factor, top, total, state.sums, row, state.is_fresh, state.errands); break;
            case 2: weigh_and_mix<2>(panel, pass, scores, factor, top, total, state.sums, row, state.is_fresh, state.errands); break;
            case 3: weigh_and_mix<3>(panel, pass, scores, factor, top, total, state.sums, row, state.is_fresh, state.errands); break;
            default: weigh_and_mix<4>(panel, pass, scores, factor, top, total, state.sums, row, state.is_fresh, state.errands); break;
        }
        mix_from(panel, 1, pass, scores, SUMS * TILE, channels, state.sums, state.is_fresh);
    } else {
        for (int n = 0; n < pass.count; n += groups_together(pass, n)) weigh_groups(pass, n, scores, factor, top, total);
        mix_with_care(panel, 1, pass, scores, channels, state.sums, state.is_fresh);
    }
    state.top = top;
    state.total = S::add(state.total, S::add(total[0], total[1]));
    state.is_fresh = false;
}

// Writes the output of a tile.
VICINAL_INLINE void finish_amx_tile(const AmxForward& run, const Tile& tile, F total, const float* sums) {
    const __mmask16 is_seen = _mm512_cmp_ps_mask(total, S::zero(), _CMP_NEQ_UQ);  // NaN counts
    const F inverse = _mm512_maskz_div_ps(is_seen, S::all(1.0f), total);
    store_tile(run.block, tile, run.job.out, run.out_base, sums, inverse, false);
}

VICINAL_APART void amx_forward_tile(AmxForward& run, const Tile& tile, const AmxWalk& walk, AmxFiller& filler, bool has_bias) {
    const Job& job = run.job;
    const int64_t number = tile_number(run.block, tile), channels = round_up(job.value.dim, TILE);
    load_tile(run.block, tile, job.query, run.query_base, run.rows, run.targets);
    AmxState state;
    if (is_worth_errands(job)) {
        note_targets(run.block, tile, job.query, run.query_base, true, state.errands);
        if (!run.keeps_state) note_targets(run.block, tile, job.out, run.out_base, false, state.errands);
        note_next_sources(walk, filler, tile, state.errands);
    }
    state.is_fresh = !run.keeps_state;
    state.sums = run.sums + (run.keeps_state ? number * channels * TILE : 0);
    state.top = run.keeps_state ? S::load(run.top + number * TILE) : S::all(FAR_BELOW);
    state.total = run.keeps_state ? S::load(run.total + number * TILE) : S::zero();
    walk(tile, run.pass, [&](const AmxPass& pass) VICINAL_LAMBDA {
        amx_forward_pass(job, filler.panel, run.targets, state, run.scores, pass, has_bias);
    });
    S::store(run.top + number * TILE, state.top);
    S::store(run.total + number * TILE, state.total);
    if (run.keeps_state) return;
    if (state.is_fresh)  // nobody sees anything
        for (int64_t i = 0; i < channels * TILE; ++i) state.sums[i] = 0.0f;
    finish_amx_tile(run, tile, state.total, state.sums);
}

// Writes the log-sum-exp of a block's targets from their maxima and totals; these are overwritten.
VICINAL_APART void finish_amx_lse(const Block& block, int64_t lse_base, const float* top, float* total) {
    const Job& job = block.job;
    if (!job.lse) return;
    const int64_t targets = tiles_of(block) * TILE;
    for (int64_t i = 0; i < targets; ++i) {
        const float lse = top[i] * LN_2 + log_of(total[i]);
        total[i] = total[i] > 0.0f ? lse : total[i] - INFINITY;  // nothing is seen, or NaN
    }
    block.each_tile([&](const Tile& tile) VICINAL_LAMBDA {
        const float* from = total + tile_number(block, tile) * TILE;
        each_target_of(block, tile, job.lse_axis, lse_base,
                       [&](int lane, int64_t place) VICINAL_LAMBDA { job.lse[place] = from[lane]; });
    });
}

inline void amx_forward_unit(const Job& job, const Unit& unit, int64_t sample, int64_t head, const Workspace& workspace) {
    const Block block(job, unit);
    const int64_t q_head = job.first_head + head, kv_head = q_head / job.shared;
    const int64_t channels = round_up(job.value.dim, TILE), padded = padded_channels(job.query.dim);
    AmxPacking packing;
    packing.rows[0] = packing.paired[1] = true;
    packing.rows[1] = packing.paired[0] = packing.lanes = false;
    KeyLists<S, AmxPacking> lists(block, packing, sample, kv_head);
    const bool keeps_state = lists.chunks() != 1;
    const int64_t tiles = tiles_of(block), kept = (keeps_state ? tiles : 1) * channels;
    Arena arena{static_cast<char*>(
        workspace.get(AMX_STATE, static_cast<size_t>((kept + 2 * tiles) * TILE * 4 + (2 * TILE + 1) * padded * 2 + 64 * 8)))};
    Arena room{static_cast<char*>(workspace.get(AMX_PASS, MOST_GROUPS * TILE * TILE * 4 + sizeof(AmxPass) + 64))};
    AmxPass& pass = *room.take<AmxPass>(1);
    AmxForward run{job, block, keeps_state, sample * job.query.batch + q_head * job.query.head,
                   sample * job.out.batch + q_head * job.out.head, arena.take<float>(kept * TILE),
                   arena.take<float>(tiles * TILE), arena.take<float>(tiles * TILE),
                   arena.take<uint16_t>((TILE + 1) * padded), arena.take<uint16_t>(TILE * padded),
                   room.take<float>(MOST_GROUPS * TILE * TILE), pass};
    for (int64_t i = 0; i < padded; ++i) run.rows[TILE * padded + i] = 0;
    if (keeps_state) {
        for (int64_t i = 0; i < kept * TILE; ++i) run.sums[i] = 0.0f;
        for (int64_t i = 0; i < tiles * TILE; ++i) run.top[i] = FAR_BELOW;
        for (int64_t i = 0; i < tiles * TILE; ++i) run.total[i] = 0.0f;
    }
    const AmxBias bias = amx_bias_of(job, block, head, workspace);
    Matrix::open();
    for (int list = 0; list < lists.count(); ++list) {
        Sources sources;
        lists.open(list, sources);
        const bool has_bias = bias.table && !sources.is_extra;
        each_tile_of(block, sources, packing, bias, true, workspace,
                     [&](const Tile& tile, const AmxWalk& walk, AmxFiller& filler) VICINAL_LAMBDA {
                         amx_forward_tile(run, tile, walk, filler, has_bias);
                     });
    }
    Matrix::close();
    if (keeps_state)
        block.each_tile([&](const Tile& tile) VICINAL_LAMBDA {
            const int64_t number = tile_number(block, tile);
            finish_amx_tile(run, tile, S::load(run.total + number * TILE), run.sums + number * channels * TILE);
        });
    finish_amx_lse(block, sample * job.lse_batch + q_head * job.lse_head, run.top, run.total);
}

}  // namespace
}  // namespace vicinal

#endif
