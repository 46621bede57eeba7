// The kernels of the dense strategy, forward and backward: a group's tokens are copied to where they lie together, and
// all that follows are products of small matrices in the first-level cache.

#ifndef VICINAL_DENSE_KERNEL_H
#define VICINAL_DENSE_KERNEL_H

#include <initializer_list>

#include "dense_pieces.h"

namespace vicinal {
namespace {

// How the keys of a group fill vectors. A last vector with one or two keys in it (7x7 is 49) costs as much as a full one:
// such a tail is taken key by key, for all rows at once.
template <class S>
struct Columns {
    static constexpr int64_t MOST_TAIL = 2;
    int64_t width;    // of a row of scores
    int64_t vectors;  // that are multiplied
    int64_t full;     // keys in them
    int64_t tail;     // keys after them
    uint32_t seen;    // lanes of the last vector that are keys

    VICINAL_INLINE explicit Columns(int64_t keys) {
        constexpr int W = S::LANES;
        const int64_t over = keys % W;
        width = round_up(keys, W);
        tail = keys > W && over <= MOST_TAIL ? over : 0;
        full = keys - tail;
        vectors = (full + W - 1) / W;
        seen = static_cast<uint32_t>((uint64_t(1) << (full - (vectors - 1) * W)) - 1);
    }
};

// ---- forward

// Rows of queries, and what their scores with the keys of the tail are made of.
struct TailRows {
    const float* rows;   // of the queries, `padded` apart
    const float* keys;   // of the tail
    int64_t padded;
    const float* begin;  // bias of the tail, `width` from row to row; or null
};

// Turns scores of T rows into weights, not yet divided by their sum. `top` and `total` have room for a vector.
template <class S, int T>
VICINAL_APART void weigh(const Columns<S>& columns, const TailRows& of_tail, float* scores, float* top, float* total) {
    constexpr int W = S::LANES;
    using F = typename S::F;
    const int64_t last = (columns.vectors - 1) * W, width = columns.width;
    F highest[T], sum[T];
    VICINAL_UNROLL
    for (int t = 0; t < T; ++t) {
        highest[t] = S::select(columns.seen, S::load(scores + t * width + last), S::all(-INFINITY));
        S::store(scores + t * width + last, highest[t]);
        highest[t] = S::max(S::all(FAR_BELOW), highest[t]);
        sum[t] = S::zero();
    }
    for (int64_t v = 0; v < last; v += W) {
        VICINAL_UNROLL
        for (int t = 0; t < T; ++t) highest[t] = S::max(highest[t], S::load(scores + t * width + v));
    }
    // lanes beyond T are computed too, and must hold no denormal numbers
    alignas(64) float tail[Columns<S>::MOST_TAIL][W + T] = {}, tops[W + T] = {}, totals[W + T];
    largest_of<S, T>(highest, tops);
    for (int64_t r = 0; r < columns.tail; ++r) {
        multiply_by_row<S, T>(of_tail.rows, of_tail.keys + r * of_tail.padded, of_tail.padded, tail[r]);
        VICINAL_UNROLL
        for (int t = 0; t < T; ++t) {
            if (of_tail.begin) tail[r][t] += of_tail.begin[t * width + r];
            tops[t] = tail[r][t] > tops[t] ? tail[r][t] : tops[t];
        }
    }
    VICINAL_UNROLL
    for (int t = 0; t < T; ++t) highest[t] = S::all(tops[t]);
    for (int64_t v = 0; v <= last; v += W) {
        VICINAL_UNROLL
        for (int t = 0; t < T; ++t) {
            float* at = scores + t * width + v;
            const F weight = exp2_of<S>(S::sub(S::load(at), highest[t]));
            sum[t] = S::add(sum[t], weight);
            S::store(at, weight);
        }
    }
    sums_of<S, T>(sum, totals);
    for (int64_t r = 0; r < columns.tail; ++r) {
        for (int t = 0; t < T; t += W) S::store(tail[r] + t, exp2_of<S>(S::sub(S::load(tail[r] + t), S::load(tops + t))));
        VICINAL_UNROLL
        for (int t = 0; t < T; ++t) {
            totals[t] += tail[r][t];
            scores[t * width + columns.full + r] = tail[r][t];
        }
    }
    for (int t = 0; t < T; ++t) {
        top[t] = tops[t];
        total[t] = totals[t];
    }
}

template <class S>
VICINAL_INLINE void weigh_some(int64_t rows, const Columns<S>& columns, const TailRows& of_tail, float* scores, float* top,
                               float* total) {
#define VICINAL_CALL(T) weigh<S, T>(columns, of_tail, scores, top, total)
    VICINAL_FOR_ROWS(rows, VICINAL_CALL)
#undef VICINAL_CALL
}

VICINAL_INLINE void write_lse(const DensePlaces& places, int64_t queries, const float* top, float* total) {
    float* to = reinterpret_cast<float*>(const_cast<char*>(places.operand.data));
    for (int64_t i = 0; i < queries; ++i) {
        const float lse = top[i] * LN_2 + log_of(total[i]);
        total[i] = total[i] > 0.0f ? lse : total[i] - INFINITY;  // nothing is seen, or NaN
    }
    for (int64_t i = 0; i < queries; ++i) to[places[i]] = total[i];
}

template <class S>
void dense_forward(const DenseJob& job, int64_t begin, int64_t end, const Workspace& workspace) {
    constexpr int W = S::LANES, ROWS = Registers<S>::ROWS;
    const int64_t key_padded = round_up(job.query.dim, W), value_padded = round_up(job.value.dim, W);
    const int64_t widest = round_up(job.most_keys, W), longest = most(key_padded, value_padded);
    const int64_t floats = job.query.dim * widest + widest * value_padded + ROWS * (key_padded + widest + value_padded) +
                           (W + 3) * longest + 2 * (job.most_queries + W);
    const int64_t places = 3 * job.most_queries + 2 * job.most_keys;
    Arena arena{static_cast<char*>(workspace.get(DENSE_ROOM, 64 + floats * 4 + places * 8 + 64 * 16)) + 64};
    float* keys = arena.take<float>(job.query.dim * widest);
    float* values = arena.take<float>(widest * value_padded);
    float* queries = arena.take<float>(ROWS * key_padded);
    float* scores = arena.take<float>(ROWS * widest);
    float* sums = arena.take<float>(ROWS * value_padded);
    float* rows = arena.take<float>(W * longest);
    float* zeros = arena.take<float>(longest);
    float* tail_keys = arena.take<float>(Columns<S>::MOST_TAIL * key_padded);
    float* top = arena.take<float>(job.most_queries + W);
    float* total = arena.take<float>(job.most_queries + W);
    for (int64_t i = 0; i < longest; ++i) zeros[i] = 0.0f;
    DensePlaces query_at{job.query, false, arena.take<int64_t>(job.most_queries)};
    DensePlaces out_at{job.out, false, arena.take<int64_t>(job.most_queries)};
    DensePlaces lse_at{job.lse, false, arena.take<int64_t>(job.most_queries)};
    DensePlaces key_at{job.key, true, arena.take<int64_t>(job.most_keys)};
    DensePlaces value_at{job.value, true, arena.take<int64_t>(job.most_keys)};
    const ThreadBias bias = take_bias<S>(job, workspace);
    const int64_t bytes = bytes_of(job.dtype);
    const float factor = job.scale * LOG2_E;
    each_piece(job, begin, end, [&](const Piece& piece, bool has_new_shape, const Piece* next) {
        for (DensePlaces* at : {&query_at, &out_at, &lse_at}) go_to(*at, piece, has_new_shape, next, 1);
        for (DensePlaces* at : {&key_at, &value_at}) go_to(*at, piece, has_new_shape, next, job.shared);
        const Columns<S> columns(piece.keys);
        const int64_t width = columns.width;
        gather_columns<S>(job.dtype, key_at, columns.full, width, rows, zeros, keys);
        gather_rows<S>(job.dtype, key_at, {columns.full, columns.tail}, key_padded, 1.0f, tail_keys);
        gather_rows<S>(job.dtype, value_at, {0, piece.keys}, value_padded, 1.0f, values);
        const float* pairs = bias_of_pairs<S>(job, piece, width, bias);
        const Shares shares(piece.queries, ROWS), of_keys(piece.keys, shares.count, 0);
        Share share = shares.first(), some_keys = of_keys.first();
        for (int64_t i = 0; i < shares.count; ++i, share = shares.after(share, i - 1), some_keys = of_keys.after(some_keys, i - 1)) {
            const float* begin_at = pairs ? pairs + share.begin * width : nullptr;
            gather_rows<S>(job.dtype, query_at, share, key_padded, factor, queries);
            ask_for_share(key_at, bytes, some_keys);
            multiply<S>({queries, key_padded, 1, keys, width, job.query.dim, begin_at, width, scores, width}, share.size,
                        columns.vectors);
            ask_for_share(value_at, bytes, some_keys);
            const TailRows of_tail{queries, tail_keys, key_padded, begin_at ? begin_at + columns.full : nullptr};
            weigh_some<S>(share.size, columns, of_tail, scores, top + share.begin, total + share.begin);
            ask_for_share(query_at, bytes, share);
            multiply<S>({scores, width, 1, values, value_padded, piece.keys, nullptr, 0, sums, value_padded}, share.size,
                        value_padded / W);
            ask_for_share<true>(out_at, bytes, share);
            for (int64_t t = 0; t < share.size; ++t) {
                const float weight = total[share.begin + t];
                store_row<S>(job.dtype, job.out, out_at[share.begin + t], sums + t * value_padded,
                             weight > 0.0f ? 1.0f / weight : 0.0f);
            }
        }
        if (job.lse.data) write_lse(lse_at, piece.queries, top, total);
    });
}

// ---- backward

// The gradients of weights' scores, for T rows: what comes in are scores and gradients of weights.
template <class S, int T>
VICINAL_APART void differentiate(const Columns<S>& columns, const TailRows& of_scores, const TailRows& of_grads,
                                 const float* lse, const float* row_sums, float* weights, float* grads) {
    constexpr int W = S::LANES;
    using F = typename S::F;
    const int64_t width = columns.width, end = columns.vectors * W;
    F low[T], sum[T];
    VICINAL_UNROLL
    for (int t = 0; t < T; ++t) {
        low[t] = S::all(lse[t]);
        sum[t] = S::all(row_sums[t]);
    }
    for (int64_t v = 0; v < end; v += W) {
        VICINAL_UNROLL
        for (int t = 0; t < T; ++t) {
            float *weight_at = weights + t * width + v, *grad_at = grads + t * width + v;
            const F weight = exp2_of<S>(S::sub(S::load(weight_at), low[t]));
            S::store(weight_at, weight);
            S::store(grad_at, S::mul(weight, S::sub(S::load(grad_at), sum[t])));
        }
    }
    alignas(64) float scores[W + T] = {}, changes[W + T] = {};
    for (int64_t r = 0; r < columns.tail; ++r) {
        multiply_by_row<S, T>(of_scores.rows, of_scores.keys + r * of_scores.padded, of_scores.padded, scores);
        multiply_by_row<S, T>(of_grads.rows, of_grads.keys + r * of_grads.padded, of_grads.padded, changes);
        if (of_scores.begin) {
            VICINAL_UNROLL
            for (int t = 0; t < T; ++t) scores[t] += of_scores.begin[t * width + r];
        }
        for (int t = 0; t < T; t += W) {
            const F weight = exp2_of<S>(S::sub(S::load(scores + t), S::load(lse + t)));
            S::store(scores + t, weight);
            S::store(changes + t, S::mul(weight, S::sub(S::load(changes + t), S::load(row_sums + t))));
        }
        VICINAL_UNROLL
        for (int t = 0; t < T; ++t) {
            weights[t * width + columns.full + r] = scores[t];
            grads[t * width + columns.full + r] = changes[t];
        }
    }
}

template <class S>
VICINAL_INLINE void differentiate_some(int64_t rows, const Columns<S>& columns, const TailRows& of_scores,
                                       const TailRows& of_grads, const float* lse, const float* row_sums, float* weights,
                                       float* grads) {
#define VICINAL_CALL(T) differentiate<S, T>(columns, of_scores, of_grads, lse, row_sums, weights, grads)
    VICINAL_FOR_ROWS(rows, VICINAL_CALL)
#undef VICINAL_CALL
}

template <class S>
void dense_backward(const DenseJob& job, int64_t begin, int64_t end, float* grad_bias, const Workspace& workspace) {
    constexpr int W = S::LANES, ROWS = Registers<S>::ROWS;
    const int64_t key_padded = round_up(job.query.dim, W), value_padded = round_up(job.value.dim, W);
    const int64_t widest = round_up(job.most_keys, W), longest = most(key_padded, value_padded);
    const int64_t most_queries = job.most_queries, most_keys = job.most_keys;
    const int64_t floats = (job.query.dim + job.value.dim) * widest + (2 * most_keys + most_queries) * key_padded +
                           (most_keys + most_queries) * value_padded + 2 * most_queries * widest + ROWS * key_padded +
                           2 * value_padded + (W + 5) * longest;
    Arena arena{static_cast<char*>(workspace.get(DENSE_ROOM, 64 + floats * 4 + (6 * most_queries + 4 * most_keys) * 8 + 64 * 24)) + 64};
    float* keys = arena.take<float>(job.query.dim * widest);     // [channel][key]
    float* values = arena.take<float>(job.value.dim * widest);
    float* key_rows = arena.take<float>(most_keys * key_padded);
    float* queries = arena.take<float>(most_queries * key_padded);
    float* grads = arena.take<float>(most_queries * value_padded);
    float* weights = arena.take<float>(most_queries * widest);
    float* changes = arena.take<float>(most_queries * widest);   // gradients of scores
    float* grad_keys = arena.take<float>(most_keys * key_padded);
    float* grad_values = arena.take<float>(most_keys * value_padded);
    float* sums = arena.take<float>(ROWS * key_padded);
    float* out = arena.take<float>(value_padded);
    float* rows = arena.take<float>(W * longest);
    float* zeros = arena.take<float>(longest);
    float* tail_keys = arena.take<float>(Columns<S>::MOST_TAIL * key_padded);
    float* tail_values = arena.take<float>(Columns<S>::MOST_TAIL * value_padded);
    alignas(64) float lows[ROWS + W] = {}, row_sums[ROWS + W] = {};
    for (int64_t i = 0; i < longest; ++i) zeros[i] = 0.0f;
    DensePlaces query_at{job.query, false, arena.take<int64_t>(most_queries)};
    DensePlaces out_at{job.out, false, arena.take<int64_t>(most_queries)};
    DensePlaces grad_out_at{job.grad_out, false, arena.take<int64_t>(most_queries)};
    DensePlaces grad_query_at{job.grad_query, false, arena.take<int64_t>(most_queries)};
    DensePlaces lse_at{job.lse, false, arena.take<int64_t>(most_queries)};
    DensePlaces grad_lse_at{job.grad_lse, false, arena.take<int64_t>(most_queries)};
    DensePlaces key_at{job.key, true, arena.take<int64_t>(most_keys)};
    DensePlaces value_at{job.value, true, arena.take<int64_t>(most_keys)};
    DensePlaces grad_key_at{job.grad_key, true, arena.take<int64_t>(most_keys)};
    DensePlaces grad_value_at{job.grad_value, true, arena.take<int64_t>(most_keys)};
    const ThreadBias bias = take_bias<S>(job, workspace);
    GradientSums grad_sums;
    if (grad_bias) grad_sums = take_sums(job, W, grad_bias, workspace);
    const int64_t bytes = bytes_of(job.dtype);
    const float factor = job.scale * LOG2_E;
    const float* lse = reinterpret_cast<const float*>(job.lse.data);
    const float* grad_lse = reinterpret_cast<const float*>(job.grad_lse.data);
    each_piece(job, begin, end, [&](const Piece& own, bool has_new_shape, const Piece* next) {
        const Columns<S> columns(own.keys);
        const int64_t width = columns.width, queries_here = own.queries, keys_here = own.keys;
        for (DensePlaces* at : {&key_at, &value_at, &grad_key_at, &grad_value_at}) go_to(*at, own, has_new_shape, next, 1);
        gather_columns<S>(job.dtype, key_at, columns.full, width, rows, zeros, keys);
        gather_columns<S>(job.dtype, value_at, columns.full, width, rows, zeros, values);
        gather_rows<S>(job.dtype, key_at, {columns.full, columns.tail}, key_padded, 1.0f, tail_keys);
        gather_rows<S>(job.dtype, value_at, {columns.full, columns.tail}, value_padded, 1.0f, tail_values);
        if (job.grad_query.data) gather_rows<S>(job.dtype, key_at, {0, keys_here}, key_padded, 1.0f, key_rows);
        for (int64_t s = 0; s < job.shared; ++s) {
            Piece piece = own, following;
            const bool is_last = s + 1 == job.shared;
            piece.head = own.head * job.shared + s;
            if (!is_last) following = own;
            if (is_last && next) following = *next;
            following.head = is_last ? following.head * job.shared : piece.head + 1;
            const Piece* then = is_last && !next ? nullptr : &following;
            for (DensePlaces* at : {&query_at, &out_at, &grad_out_at, &grad_query_at, &lse_at, &grad_lse_at})
                go_to(*at, piece, has_new_shape && s == 0, then, 1);
            gather_rows<S>(job.dtype, query_at, {0, queries_here}, key_padded, factor, queries);
            gather_rows<S>(job.dtype, grad_out_at, {0, queries_here}, value_padded, 1.0f, grads);
            const float* pairs = bias_of_pairs<S>(job, piece, width, bias);
            const Shares shares(queries_here, ROWS), of_keys(keys_here, shares.count, 0);
            Share share = shares.first(), some_keys = of_keys.first();
            for (int64_t i = 0; i < shares.count; ++i, share = shares.after(share, i - 1), some_keys = of_keys.after(some_keys, i - 1)) {
                const float *own_queries = queries + share.begin * key_padded, *own_grads = grads + share.begin * value_padded;
                const float* begin_at = pairs ? pairs + share.begin * width : nullptr;
                float *own_weights = weights + share.begin * width, *own_changes = changes + share.begin * width;
                ask_for_share(query_at, bytes, share);
                multiply<S>({own_queries, key_padded, 1, keys, width, job.query.dim, begin_at, width, own_weights, width},
                            share.size, columns.vectors);
                ask_for_share(grad_out_at, bytes, share);
                multiply<S>({own_grads, value_padded, 1, values, width, job.value.dim, nullptr, 0, own_changes, width},
                            share.size, columns.vectors);
                ask_for_share(out_at, bytes, share);
                for (int64_t t = 0; t < share.size; ++t) {
                    const int64_t query = share.begin + t;
                    gather_rows<S>(job.dtype, out_at, {query, 1}, value_padded, 1.0f, out);
                    typename S::F products = S::zero();
                    for (int64_t d = 0; d < value_padded; d += W)
                        products = S::fma(S::load(out + d), S::load(own_grads + t * value_padded + d), products);
                    row_sums[t] = S::sum(products) - (grad_lse ? grad_lse[grad_lse_at[query]] : 0.0f);
                    const float of_query = lse[lse_at[query]];
                    lows[t] = of_query == -INFINITY ? 0.0f : of_query * LOG2_E;
                }
                const TailRows of_scores{own_queries, tail_keys, key_padded, begin_at ? begin_at + columns.full : nullptr};
                const TailRows of_grads{own_grads, tail_values, value_padded, nullptr};
                differentiate_some<S>(share.size, columns, of_scores, of_grads, lows, row_sums, own_weights, own_changes);
                ask_for_share(key_at, bytes, some_keys);
                if (!job.grad_query.data) continue;
                ask_for_share<true>(grad_query_at, bytes, share);
                multiply<S>({own_changes, width, 1, key_rows, key_padded, keys_here, nullptr, 0, sums, key_padded},
                            share.size, key_padded / W);
                for (int64_t t = 0; t < share.size; ++t)
                    store_row<S>(job.dtype, job.grad_query, grad_query_at[share.begin + t], sums + t * key_padded, job.scale);
            }
            if (grad_bias) add_pairs<S>(job, piece, width, changes, grad_sums);
            if (job.grad_value.data)
                multiply_transposed<S>(weights, width, grads, value_padded, queries_here, keys_here, s > 0, grad_values,
                                       [&](Share share) VICINAL_LAMBDA {
                                           ask_for_share(value_at, bytes, share);
                                           ask_for_share<true>(grad_value_at, bytes, share);
                                       });
            if (job.grad_key.data)
                multiply_transposed<S>(changes, width, queries, key_padded, queries_here, keys_here, s > 0, grad_keys,
                                       [&](Share share) VICINAL_LAMBDA { ask_for_share<true>(grad_key_at, bytes, share); });
        }
        scatter_rows<S>(job.dtype, grad_value_at, keys_here, value_padded, grad_values, 1.0f);
        scatter_rows<S>(job.dtype, grad_key_at, keys_here, key_padded, grad_keys, LN_2);  // queries were times log2(e)
    });
    if (grad_bias)
        for (int64_t slot = 0; slot < job.pair_slots; ++slot) empty_slot<S>(job, grad_sums, slot);
}

template <class S>
const DenseKernels* dense_kernels_of() {
    static const DenseKernels kernels = {S::LANES, dense_forward<S>, dense_backward<S>};
    return &kernels;
}

}  // namespace
}  // namespace vicinal

#endif
