// The backward of a unit: row sums, the gradient of queries (and bias), the gradients of keys and values.
//
// Weights are computed again from the log-sum-exp. A unit owns its targets, so every gradient is written once, by one
// thread, in one order.

#ifndef VICINAL_TILES_BACKWARD_H
#define VICINAL_TILES_BACKWARD_H

#include "tiles_forward.h"

namespace vicinal {
namespace {

// The sum of grad_out times out of one query; `room` holds two rows, whose ends are 0.
template <class S>
VICINAL_INLINE float row_sum_of(const Job& job, int64_t out_at, int64_t grad_out_at, float* room) {
    const int64_t padded = round_up(job.value.dim, S::LANES);
    load_row<S>(job.dtype, job.out, out_at, room);
    load_row<S>(job.dtype, job.grad_out, grad_out_at, room + padded);
    typename S::F products = S::zero();
    for (int64_t d = 0; d < padded; d += S::LANES)
        products = S::fma(S::load(room + d), S::load(room + padded + d), products);
    return S::sum(products);
}

template <class S>
void row_sums_unit(const Job& job, const Unit& unit, int64_t sample, int64_t head, const Workspace& workspace) {
    const Block block(job, unit);
    const int64_t q_head = job.first_head + head, padded = round_up(job.value.dim, S::LANES);
    Arena arena{static_cast<char*>(workspace.get(STATE, padded * 8 + 256))};
    float* room = arena.take<float>(2 * padded);
    for (int64_t d = 0; d < 2 * padded; ++d) room[d] = 0.0f;
    const int64_t out_base = sample * job.out.batch + q_head * job.out.head;
    const int64_t grad_base = sample * job.grad_out.batch + q_head * job.grad_out.head;
    const int64_t grad_lse_base = sample * job.grad_lse_batch + q_head * job.grad_lse_head;
    const int64_t sums_base = sample * job.sums_batch + q_head * job.sums_head;
    block.each_tile([&](const Tile& tile) {
        const Places from = block.places(tile, job.out.axis, out_base);
        const Places grad_from = block.places(tile, job.grad_out.axis, grad_base);
        const Places grad_lse = block.places(tile, job.grad_lse_axis, grad_lse_base);
        const Places to = block.places(tile, job.sums_axis, sums_base);
        block.each_target(tile, [&](int, int r, int c) {
            float sum = row_sum_of<S>(job, from.at(r, c), grad_from.at(r, c), room);
            if (job.grad_lse) sum -= job.grad_lse[grad_lse.at(r, c)];
            job.row_sums[to.at(r, c)] = sum;
        });
    });
}

// ---- gradient of queries

// The gradient of a head's bias is summed up where vectors read the bias.
inline int64_t grad_bias_floats(const Job& job, int lanes) {
    const BiasTable table = bias_layout(job.bias_length, job.rows_per_vector, lanes / job.rows_per_vector);
    return table.plane * table.length[0] + lanes;
}

inline void fold_grad_bias(const Job& job, int lanes, const float* from, float* to) {
    const BiasTable table = bias_layout(job.bias_length, job.rows_per_vector, lanes / job.rows_per_vector);
    const int R = table.R, C = table.C;
    for (int64_t a = 0; a < table.length[0]; ++a)
        for (int64_t b = 0; b < table.length[1]; ++b)
            for (int64_t c = 0; c < table.length[2]; ++c) {
                float sum = 0.0f;
                for (int r = 0; r < R; ++r) sum += from[a * table.plane + (b - r + R - 1) * table.row + (c + C) * R + r];
                to[a * job.bias_stride[0] + b * job.bias_stride[1] + c * job.bias_stride[2]] += sum;
            }
}

struct QueryTile {
    float lse[MOST_TARGETS], row_sum[MOST_TARGETS];
    float* sums[MOST_TARGETS];
    bool is_fresh;
};

// The weights of a tile of queries, from their log-sum-exp.
template <class S, int T>
VICINAL_INLINE void weigh_again(const Job& job, const Panel& panel, const float* queries, const QueryTile& tile,
                                float* scores, const Pass& pass, bool has_bias) {
    constexpr int W = S::LANES;
    using F = typename S::F;
    const F factor = S::all(job.scale * LOG2_E), nothing = S::all(-INFINITY);
    auto weigh = [&](int v, int t, F sum) VICINAL_LAMBDA {
        F score = S::mul(sum, factor);
        if (has_bias) score = S::add(score, S::load(pass.bias[v][t]));
        score = S::select(pass.seen[v][t], S::sub(score, S::all(tile.lse[t])), nothing);
        S::store(scores + (v * T + t) * W, exp2_of<S>(score));
    };
    dot<S, T>(pass, queries, units_of<S>(job.query.dim), panel.transposed[0], panel.width, scores, weigh);
}

// Turns the weights of a tile of queries into the gradients of its scores.
template <class S, int T>
VICINAL_INLINE void differentiate_scores(const Job& job, const Panel& panel, const float* grads, const QueryTile& tile,
                                         float* scores, const Pass& pass) {
    constexpr int W = S::LANES;
    using F = typename S::F;
    alignas(64) float partial[MOST_VECTORS * T * W];
    auto differentiate = [&](int v, int t, F sum) VICINAL_LAMBDA {
        float* at = scores + (v * T + t) * W;
        // where a weight is 0 so is the gradient, whatever stands in values nobody sees
        const F grad = S::mul(S::load(at), S::sub(sum, S::all(tile.row_sum[t])));
        S::store(at, S::select(pass.seen[v][t], grad, S::zero()));
    };
    dot<S, T>(pass, grads, units_of<S>(job.value.dim), panel.transposed[1], panel.width, partial, differentiate);
}

template <class S, int T>
VICINAL_INLINE void add_bias_gradient(const Pass& pass, const float* scores, const float* bias, float* grad_bias) {
    for (int v = 0; v < pass.count; ++v)
        for (int t = 0; t < T; ++t) {
            float* to = grad_bias + (pass.bias[v][t] - bias);
            S::store(to, S::add(S::load(to), S::load(scores + (v * T + t) * S::LANES)));
        }
}

template <class S, int T>
VICINAL_APART void grad_query_pass(const Job& job, const Panel& panel, const float* queries, const float* grads, QueryTile& tile,
                            float* scores, const Pass& pass, bool has_bias, float* grad_bias, const float* bias) {
    constexpr int W = S::LANES;
    weigh_again<S, T>(job, panel, queries, tile, scores, pass, has_bias);
    differentiate_scores<S, T>(job, panel, grads, tile, scores, pass);
    if (grad_bias && has_bias) add_bias_gradient<S, T>(pass, scores, bias, grad_bias);
    alignas(64) float ones[MOST_TARGETS];
    for (int t = 0; t < MOST_TARGETS; ++t) ones[t] = 1.0f;
    narrow_weights<S, T>(pass, scores);
    mix<S, T>(pass, scores, panel.rows[0], panel.width, round_up(job.query.dim, W), tile.is_fresh ? nullptr : ones,
              tile.sums);
    tile.is_fresh = false;
}

// A block of queries of one head on its way through its keys once more.
template <class S>
struct QueryRun {
    const Job& job;
    const Block& block;
    bool keeps_state;  // sums wait in the block's state between panels
    int64_t query_base, grad_out_base, lse_base, sums_base, to_base;
    float *sums, *queries, *grads;
    float* grad_bias;
    TileRoom<S>& room;
};

template <class S>
VICINAL_INLINE void store_grad_query(const QueryRun<S>& run, const Tile& tile, float* const* sums) {
    const Job& job = run.job;
    if (!job.grad_query.data) return;
    run.block.places(tile, job.grad_query.axis, run.to_base).each([&](int t, int64_t place) VICINAL_LAMBDA {
        store_row<S>(job.dtype, job.grad_query, place, sums[t], job.scale);
    });
}

template <class S>
VICINAL_APART void grad_query_tile(QueryRun<S>& run, const Tile& tile, Walk<S>& walk, Filler<S>& filler, bool has_bias) {
    const Job& job = run.job;
    const Block& block = run.block;
    const int64_t padded = round_up(job.query.dim, S::LANES);
    load_targets<S>(block, tile, job.query, run.query_base, run.queries);
    load_targets<S>(block, tile, job.grad_out, run.grad_out_base, run.grads);
    QueryTile state;
    state.is_fresh = !run.keeps_state;
    block.places(tile, job.lse_axis, run.lse_base).each([&](int t, int64_t place) VICINAL_LAMBDA {
        const float lse = job.lse[place];
        state.lse[t] = lse == -INFINITY ? 0.0f : lse * LOG2_E;
    });
    block.places(tile, job.sums_axis, run.sums_base).each([&](int t, int64_t place) VICINAL_LAMBDA {
        state.row_sum[t] = job.row_sums[place];
    });
    block.state_places(tile).each([&](int t, int64_t place) VICINAL_LAMBDA {
        state.sums[t] = run.sums + (run.keeps_state ? place : t) * padded;
    });
    walk(tile, run.room.pass, [&](const Pass& pass) {
#define VICINAL_CALL(T) \
    grad_query_pass<S, T>(job, filler.panel, run.queries, run.grads, state, run.room.scores, pass, has_bias, run.grad_bias, \
                          walk.bias.data)
        VICINAL_FOR_COUNT(tile.count, VICINAL_CALL)
#undef VICINAL_CALL
    });
    if (run.keeps_state) return;
    if (state.is_fresh)
        for (int64_t i = 0; i < tile.count * padded; ++i) run.sums[i] = 0.0f;
    store_grad_query<S>(run, tile, state.sums);
}

// Writes the gradients of a tile that have waited.
template <class S>
void store_waiting(QueryRun<S>& run, const Tile& tile) {
    float* sums[MOST_TARGETS];
    run.block.state_places(tile).each([&](int t, int64_t place) {
        sums[t] = run.sums + place * round_up(run.job.query.dim, S::LANES);
    });
    store_grad_query<S>(run, tile, sums);
}

template <class S>
void grad_query_unit(const Job& job, const Unit& unit, int64_t sample, int64_t head, float* grad_bias,
                     const Workspace& workspace) {
    constexpr int W = S::LANES;
    const Block block(job, unit);
    const int64_t q_head = job.first_head + head, kv_head = q_head / job.shared;
    const int64_t key_dim = job.query.dim, value_dim = job.value.dim, padded = round_up(key_dim, W);
    Packing packing;
    packing.transposed[0] = packing.transposed[1] = packing.rows[0] = true;
    packing.rows[1] = packing.lanes = false;
    KeyLists<S> lists(block, packing, sample, kv_head);
    const bool keeps_state = lists.chunks() != 1;
    const int64_t kept = keeps_state ? block.targets() : MOST_TARGETS;
    Arena arena{static_cast<char*>(workspace.get(
        STATE, (kept * padded + targets_floats(key_dim) + targets_floats(value_dim)) * 4 + 256))};
    TileRoom<S> room;
    QueryRun<S> run{job, block, keeps_state, sample * job.query.batch + q_head * job.query.head,
                    sample * job.grad_out.batch + q_head * job.grad_out.head, sample * job.lse_batch + q_head * job.lse_head,
                    sample * job.sums_batch + q_head * job.sums_head,
                    sample * job.grad_query.batch + q_head * job.grad_query.head, arena.take<float>(kept * padded),
                    arena.take<float>(targets_floats(key_dim)), arena.take<float>(targets_floats(value_dim)), grad_bias, room};
    if (keeps_state)
        for (int64_t i = 0; i < kept * padded; ++i) run.sums[i] = 0.0f;
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
                grad_query_tile<S>(run, tile, walk, filler, has_bias);
            });
        });
    }
    if (!keeps_state) return;
    block.each_tile([&](const Tile& tile) {
        store_waiting<S>(run, tile);
    });
}

// ---- gradients of keys and values: targets are keys, sources queries

struct KeyTile {
    float* key_sums[MOST_TARGETS];
    float* value_sums[MOST_TARGETS];
    bool is_fresh;
};

template <class S, int T>
VICINAL_APART void grad_key_pass(const Job& job, const Panel& panel, const float* keys, const float* values, KeyTile& tile,
                          float* scores, const Pass& pass, bool has_bias) {
    constexpr int W = S::LANES;
    using F = typename S::F;
    const F factor = S::all(job.scale * LOG2_E), nothing = S::all(-INFINITY);
    alignas(64) float grads[MOST_VECTORS * T * W];
    auto weigh = [&](int v, int t, F sum) VICINAL_LAMBDA {
        const F lse = S::load(panel.lanes[0] + pass.group[v] * panel.width + pass.at[v]);
        F score = S::mul(sum, factor);
        if (has_bias) score = S::add(score, S::load(pass.bias[v][t]));
        score = S::select(pass.seen[v][t], S::sub(score, lse), nothing);
        S::store(scores + (v * T + t) * W, exp2_of<S>(score));
    };
    dot<S, T>(pass, keys, units_of<S>(job.query.dim), panel.transposed[0], panel.width, scores, weigh);
    const bool needs_keys = job.grad_key.data != nullptr;
    if (needs_keys) {
        auto differentiate = [&](int v, int t, F sum) VICINAL_LAMBDA {
            const F row_sum = S::load(panel.lanes[1] + pass.group[v] * panel.width + pass.at[v]);
            const F grad = S::mul(S::load(scores + (v * T + t) * W), S::sub(sum, row_sum));
            S::store(grads + (v * T + t) * W, S::select(pass.seen[v][t], grad, S::zero()));
        };
        dot<S, T>(pass, values, units_of<S>(job.value.dim), panel.transposed[1], panel.width, grads, differentiate);
    }
    alignas(64) float ones[MOST_TARGETS];
    for (int t = 0; t < MOST_TARGETS; ++t) ones[t] = 1.0f;
    const float* before = tile.is_fresh ? nullptr : ones;
    narrow_weights<S, T>(pass, scores);
    if (needs_keys) narrow_weights<S, T>(pass, grads);
    if (job.grad_value.data)
        mix<S, T>(pass, scores, panel.rows[1], panel.width, round_up(job.value.dim, W), before, tile.value_sums);
    if (needs_keys)
        mix<S, T>(pass, grads, panel.rows[0], panel.width, round_up(job.query.dim, W), before, tile.key_sums);
    tile.is_fresh = false;
}

// Writes factor * sums, or adds it to what is there.
template <class S>
inline void write_row(int64_t dtype, const Operand& operand, int64_t offset, float* sums, float factor, bool adds) {
    if (adds) {
        Operand one = operand;
        one.dim = 1;
        for (int64_t d = 0; d < operand.dim; ++d) {
            float before;
            load_row<S>(dtype, one, offset + d * operand.channel, &before);
            sums[d] = sums[d] * factor + before;
        }
        factor = 1.0f;
    }
    store_row<S>(dtype, operand, offset, sums, factor);
}

// A block of keys of one head on its way through the queries that see them.
template <class S>
struct KeyRun {
    const Job& job;
    const Block& block;
    int64_t key_base, value_base;
    float *key_sums, *value_sums, *keys, *values;
    TileRoom<S>& room;
};

template <class S>
VICINAL_APART void grad_key_tile(KeyRun<S>& run, const Tile& tile, Walk<S>& walk, Filler<S>& filler, bool has_bias) {
    const Job& job = run.job;
    const int64_t key_padded = round_up(job.query.dim, S::LANES), value_padded = round_up(job.value.dim, S::LANES);
    load_targets<S>(run.block, tile, job.key, run.key_base, run.keys);
    load_targets<S>(run.block, tile, job.value, run.value_base, run.values);
    KeyTile state;
    state.is_fresh = false;
    run.block.state_places(tile).each([&](int t, int64_t place) VICINAL_LAMBDA {
        state.key_sums[t] = run.key_sums + place * key_padded;
        state.value_sums[t] = run.value_sums + place * value_padded;
    });
    walk(tile, run.room.pass, [&](const Pass& pass) {
#define VICINAL_CALL(T) \
    grad_key_pass<S, T>(job, filler.panel, run.keys, run.values, state, run.room.scores, pass, has_bias)
        VICINAL_FOR_COUNT(tile.count, VICINAL_CALL)
#undef VICINAL_CALL
    });
}

template <class S>
void grad_key_value_unit(const Job& job, const Unit& unit, int64_t sample, int64_t head, const Workspace& workspace) {
    constexpr int W = S::LANES;
    const Block block(job, unit);
    const int64_t key_dim = job.query.dim, value_dim = job.value.dim;
    const int64_t key_padded = round_up(key_dim, W), value_padded = round_up(value_dim, W);
    Packing packing;
    packing.operand[0] = job.query;
    packing.operand[1] = job.grad_out;
    packing.transposed[0] = packing.transposed[1] = packing.rows[0] = packing.rows[1] = packing.lanes = true;
    const int64_t floats = packing.floats<S>(), kept = block.targets();
    Arena arena{static_cast<char*>(
        workspace.get(STATE, (kept * (key_padded + value_padded) + targets_floats(key_dim) + targets_floats(value_dim)) * 4 + 256))};
    TileRoom<S> room;
    KeyRun<S> run{job, block, sample * job.key.batch + head * job.key.head, sample * job.value.batch + head * job.value.head,
                  arena.take<float>(kept * key_padded), arena.take<float>(kept * value_padded),
                  arena.take<float>(targets_floats(key_dim)), arena.take<float>(targets_floats(value_dim)), room};
    for (int64_t i = 0; i < kept * key_padded; ++i) run.key_sums[i] = 0.0f;
    for (int64_t i = 0; i < kept * value_padded; ++i) run.value_sums[i] = 0.0f;
    alignas(64) float bias_room[MOST_VECTORS * MOST_TARGETS * W];
    Sources sources;
    // the group's query heads that share this key head
    const int64_t head_begin = most(head * job.shared, job.first_head);
    const int64_t head_end = least((head + 1) * job.shared, job.first_head + job.heads);
    for (int64_t q_head = head_begin; q_head < head_end; ++q_head) {
        packing.base[0] = sample * job.query.batch + q_head * job.query.head;
        packing.base[1] = sample * job.grad_out.batch + q_head * job.grad_out.head;
        packing.lse_base = sample * job.lse_batch + q_head * job.lse_head;
        packing.sums_base = sample * job.sums_batch + q_head * job.sums_head;
        const BiasTable bias = bias_of<S>(job, q_head - job.first_head, workspace);
        for (int list = 0; list < job.num_sources; ++list) {
            open_sources<S>(block, list, sources);
            each_chunk<S>(block, sources, floats, [&](const Chunk& chunk) {
                Filler<S> filler(job, sources, chunk, packing, workspace);
                Walk<S> walk(block, sources, chunk, bias, false, bias_room, workspace);
                const auto open_row = [&](const Tile& tile) VICINAL_LAMBDA {
                    walk.open_row(tile);
                    filler.open_row(walk);
                };
                block.each_tile(open_row, [&](const Tile& tile) VICINAL_LAMBDA {
                grad_key_tile<S>(run, tile, walk, filler, bias.data != nullptr);
                });
            });
        }
    }
    // where heads of an earlier group share this key head, they have written their part
    const bool adds = head * job.shared < job.first_head;
    const int64_t to_key = sample * job.grad_key.batch + head * job.grad_key.head;
    const int64_t to_value = sample * job.grad_value.batch + head * job.grad_value.head;
    block.each_tile([&](const Tile& tile) {
        const Places keys_at = block.places(tile, job.grad_key.axis, to_key);
        const Places values_at = block.places(tile, job.grad_value.axis, to_value);
        block.each_target(tile, [&](int, int r, int c) {
            const int64_t place = tile.state_at(r, c);
            if (job.grad_key.data)
                write_row<S>(job.dtype, job.grad_key, keys_at.at(r, c), run.key_sums + place * key_padded, job.scale, adds);
            if (job.grad_value.data)
                write_row<S>(job.dtype, job.grad_value, values_at.at(r, c), run.value_sums + place * value_padded, 1.0f, adds);
        });
    });
}

}  // namespace
}  // namespace vicinal

#endif
