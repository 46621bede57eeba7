// The whole backward of a unit whose sources nobody else sees meanwhile.
//
// Scores and weights are computed once for all three gradients, and those of keys and values are summed up beside the
// panel. Units that share sources have different colours, and colours are run one after another: a unit adds to what an
// earlier colour has written. Where two colours on an axis do not suffice, keys are visited apart (tiles_backward.h).

#ifndef VICINAL_TILES_CLOSED_H
#define VICINAL_TILES_CLOSED_H

#include "tiles_backward.h"

namespace vicinal {
namespace {

template <class S, int T>
VICINAL_APART void closed_pass(const Job& job, const Panel& panel, const float* queries, const float* grads, QueryTile& tile,
                        float* scores, const Pass& pass, bool has_bias, float* grad_bias, const float* bias,
                        float* grad_keys, float* grad_values, Errands& errands) {
    constexpr int W = S::LANES;
    const int64_t key_padded = round_up(job.query.dim, W), value_padded = round_up(job.value.dim, W);
    weigh_again<S, T>(job, panel, queries, tile, scores, pass, has_bias);
    errands.run(4);
    spread<S, T>(pass, scores, grads, panel.width, value_padded, grad_values);
    errands.run(4);
    differentiate_scores<S, T>(job, panel, grads, tile, scores, pass);
    errands.run(4);
    if (grad_bias && has_bias) add_bias_gradient<S, T>(pass, scores, bias, grad_bias);
    spread<S, T>(pass, scores, queries, panel.width, key_padded, grad_keys);
    errands.run(4);
    alignas(64) float ones[MOST_TARGETS];
    for (int t = 0; t < MOST_TARGETS; ++t) ones[t] = 1.0f;
    mix<S, T>(pass, scores, panel.rows[0], panel.width, key_padded, tile.is_fresh ? nullptr : ones, tile.sums);
    tile.is_fresh = false;
}

// Adds factor * sums to a row of float32.
template <class S>
VICINAL_INLINE void add_to_row(const Operand& operand, int64_t offset, const float* sums, float factor) {
    constexpr int W = S::LANES;
    float* to = reinterpret_cast<float*>(const_cast<char*>(operand.data)) + offset;
    const int64_t dim = operand.dim, stride = operand.channel;
    int64_t d = 0;
    if (stride == 1)
        for (; d + W <= dim; d += W) S::store(to + d, S::fma(S::load(sums + d), S::all(factor), S::load(to + d)));
    for (; d < dim; ++d) to[d * stride] += sums[d] * factor;
}

// Sums of the sources of a panel start at 0; those of the rim are never looked at.
template <class S>
inline void clear_sources(const Packer<S>& packer, int64_t padded, float* sums) {
    const int64_t size = (packer.chunk.column_end - packer.chunk.column_begin) * packer.frame.R * padded;
    for (int64_t group = 0; group < packer.frame.row_groups(); ++group) {
        float* row = sums + group * packer.width * padded;
        for (int64_t i = 0; i < size; i += S::LANES) S::store(row + i, S::zero());
    }
}

// Writes what was summed up for the sources of a panel, or adds it where a unit of an earlier colour has written.
template <class S>
inline void write_sources(const Job& job, const Unit& unit, const Packer<S>& packer, const Operand& operand,
                          int64_t base, const float* sums, float factor) {
    if (!operand.data) return;
    const Frame& f = packer.frame;
    const int64_t padded = round_up(operand.dim, S::LANES);
    const auto is_shared = [&](int axis, int64_t place) VICINAL_LAMBDA {
        return place < unit.shared_low[axis] || place >= unit.shared_high[axis];
    };
    for (int64_t group = 0; group < f.row_groups(); ++group) {
        const bool adds_all = is_shared(0, f.plane_begin + group / f.groups);
        const int64_t row = f.row_origin + group % f.groups * f.R;
        packer.each_source(operand, base, group, [&](int64_t lane, int64_t place) VICINAL_LAMBDA {
            const float* from = sums + (group * packer.width + lane) * padded;
            if (adds_all || is_shared(1, row + lane % f.R) || is_shared(2, packer.chunk.column_begin + lane / f.R))
                add_to_row<S>(operand, place, from, factor);
            else if (job.streams)
                stream_row<S>(job.dtype, operand, place, from, factor);
            else
                store_row<S>(job.dtype, operand, place, from, factor);
        });
    }
}

// A unit on its way through the queries of one head.
template <class S>
struct ClosedRun {
    const Job& job;
    const Block& block;
    int64_t query_base, grad_out_base, out_base, lse_base, grad_lse_base, to_base;
    float *grad_keys, *grad_values, *sums, *out, *queries, *grads;
    float* grad_bias;
    TileRoom<S>& room;
};

// Row sums of the tile's queries: of grad_out times out, less the gradient of the log-sum-exp.
template <class S>
VICINAL_INLINE void row_sums_of(const ClosedRun<S>& run, const Tile& tile, QueryTile& state) {
    const Job& job = run.job;
    int64_t grad_out_at[MOST_TARGETS];
    run.block.places(tile, job.grad_out.axis, run.grad_out_base).each([&](int t, int64_t place) VICINAL_LAMBDA {
        grad_out_at[t] = place;
    });
    const Places out_at = run.block.places(tile, job.out.axis, run.out_base);
    if (!job.is_far) ask_for_next(run.block, tile, job.out, out_at);
    out_at.each([&](int t, int64_t place) VICINAL_LAMBDA {
        state.row_sum[t] = row_sum_of<S>(job, place, grad_out_at[t], run.out);
    });
    if (!job.grad_lse) return;
    run.block.places(tile, job.grad_lse_axis, run.grad_lse_base).each([&](int t, int64_t place) VICINAL_LAMBDA {
        state.row_sum[t] -= job.grad_lse[place];
    });
}

template <class S>
VICINAL_APART void closed_tile(ClosedRun<S>& run, const Tile& tile, Walk<S>& walk, Filler<S>& filler) {
    const Job& job = run.job;
    const int64_t padded = round_up(job.query.dim, S::LANES);
    Errands errands;
    if (job.is_far) {
        if (job.grad_query.data && !job.streams) note_targets(run.block, tile, job.grad_query, run.to_base, false, errands);
        note_targets(run.block, tile, job.query, run.query_base, true, errands);
        note_targets(run.block, tile, job.grad_out, run.grad_out_base, true, errands);
        note_targets(run.block, tile, job.out, run.out_base, true, errands);
    }
    load_targets<S>(run.block, tile, job.query, run.query_base, run.queries, !job.is_far);
    load_targets<S>(run.block, tile, job.grad_out, run.grad_out_base, run.grads, !job.is_far);
    QueryTile state;
    state.is_fresh = true;
    row_sums_of<S>(run, tile, state);
    run.block.places(tile, job.lse_axis, run.lse_base).each([&](int t, int64_t place) VICINAL_LAMBDA {
        const float lse = job.lse[place];
        state.lse[t] = lse == -INFINITY ? 0.0f : lse * LOG2_E;
        state.sums[t] = run.sums + t * padded;
    });
    walk(tile, run.room.pass, [&](const Pass& pass) {
#define VICINAL_CALL(T) \
    closed_pass<S, T>(job, filler.panel, run.queries, run.grads, state, run.room.scores, pass, walk.bias.data != nullptr, \
                      run.grad_bias, walk.bias.data, run.grad_keys, run.grad_values, errands)
        VICINAL_FOR_COUNT(tile.count, VICINAL_CALL)
#undef VICINAL_CALL
    });
    if (!job.grad_query.data) return;
    if (state.is_fresh)
        for (int64_t i = 0; i < tile.count * padded; ++i) run.sums[i] = 0.0f;
    run.block.places(tile, job.grad_query.axis, run.to_base).each([&](int t, int64_t place) VICINAL_LAMBDA {
        if (job.streams)
            stream_row<S>(job.dtype, job.grad_query, place, state.sums[t], job.scale);
        else
            store_row<S>(job.dtype, job.grad_query, place, state.sums[t], job.scale);
    });
}

// Fetches the lines that `write_sources` will write to while they are computed.
template <class S>
inline void ask_for_sources(const Job& job, const Packer<S>& packer, const Operand& operand, int64_t base) {
    if (!operand.data) return;
    const int64_t bytes = bytes_of(job.dtype), size = operand.dim * bytes;
    for (int64_t group = 0; group < packer.frame.row_groups(); ++group)
        packer.each_source(operand, base, group, [&](int64_t, int64_t place) VICINAL_LAMBDA {
            for (int64_t byte = 0; byte < size; byte += 64) VICINAL_PREFETCH_TO_WRITE(operand.data + place * bytes + byte);
        });
}

// `head` is a key head, which has one query head here or more; grad_bias only where it has one.
template <class S>
void closed_unit(const Job& job, const Unit& unit, int64_t sample, int64_t head, float* grad_bias,
                 const Workspace& workspace) {
    constexpr int W = S::LANES;
    const Block block(job, unit);
    const int64_t key_dim = job.query.dim, value_dim = job.value.dim;
    const int64_t key_padded = round_up(key_dim, W), value_padded = round_up(value_dim, W);
    Packing packing;
    packing.operand[0] = job.key;
    packing.operand[1] = job.value;
    packing.base[0] = sample * job.key.batch + head * job.key.head;
    packing.base[1] = sample * job.value.batch + head * job.value.head;
    packing.transposed[0] = packing.transposed[1] = packing.rows[0] = true;
    packing.rows[1] = packing.lanes = false;
    Sources sources;
    open_sources<S>(block, 0, sources);
    const Frame& f = sources.frame;
    const Chunk chunk{0, f.row_groups(), f.column_begin, f.column_end, 0};
    Filler<S> filler(job, sources, chunk, packing, workspace);
    const Panel& panel = filler.panel;
    const int64_t places = f.row_groups() * panel.width;
    Arena arena{static_cast<char*>(workspace.get(
        STATE, (places * (key_padded + value_padded) + MOST_TARGETS * key_padded + 2 * value_padded +
                targets_floats(key_dim) + targets_floats(value_dim)) * 4 + 64 * 8))};
    float* grad_keys = arena.take<float>(places * key_padded);
    float* grad_values = arena.take<float>(places * value_padded);
    float* sums = arena.take<float>(MOST_TARGETS * key_padded);
    float* out = arena.take<float>(2 * value_padded);
    float* queries = arena.take<float>(targets_floats(key_dim));
    float* grads = arena.take<float>(targets_floats(value_dim));
    clear_sources<S>(filler.packer, key_padded, grad_keys);
    clear_sources<S>(filler.packer, value_padded, grad_values);
    // channels that fill a vector up are multiplied too
    for (int64_t i = 0; i < targets_floats(key_dim); ++i) queries[i] = 0.0f;
    for (int64_t i = 0; i < targets_floats(value_dim); ++i) grads[i] = 0.0f;
    for (int64_t i = 0; i < 2 * value_padded; ++i) out[i] = 0.0f;
    const int64_t to_keys = sample * job.grad_key.batch + head * job.grad_key.head;
    const int64_t to_values = sample * job.grad_value.batch + head * job.grad_value.head;
    if (!job.streams) {
        ask_for_sources<S>(job, filler.packer, job.grad_key, to_keys);
        ask_for_sources<S>(job, filler.packer, job.grad_value, to_values);
    }
    TileRoom<S> room;
    const int64_t head_begin = most(head * job.shared, job.first_head);
    const int64_t head_end = least((head + 1) * job.shared, job.first_head + job.heads);
    for (int64_t q_head = head_begin; q_head < head_end; ++q_head) {
        const BiasTable bias = bias_of<S>(job, q_head - job.first_head, workspace);
        ClosedRun<S> run{job, block, sample * job.query.batch + q_head * job.query.head,
                         sample * job.grad_out.batch + q_head * job.grad_out.head,
                         sample * job.out.batch + q_head * job.out.head, sample * job.lse_batch + q_head * job.lse_head,
                         sample * job.grad_lse_batch + q_head * job.grad_lse_head,
                         sample * job.grad_query.batch + q_head * job.grad_query.head, grad_keys, grad_values, sums, out,
                         queries, grads, grad_bias, room};
        Walk<S> walk(block, sources, chunk, bias, true, nullptr, workspace);
        const auto open_row = [&](const Tile& tile) VICINAL_LAMBDA {
            walk.open_row(tile);
            filler.open_row(walk);
        };
        block.each_tile(open_row, [&](const Tile& tile) VICINAL_LAMBDA {
                closed_tile<S>(run, tile, walk, filler);
        });
    }
    write_sources<S>(job, unit, filler.packer, job.grad_key, to_keys, grad_keys, job.scale);
    write_sources<S>(job, unit, filler.packer, job.grad_value, to_values, grad_values, 1.0f);
    if (job.streams) S::fence();
}

}  // namespace
}  // namespace vicinal

#endif
