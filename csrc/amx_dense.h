// The dense strategy in the matrix registers: queries stand in rows, 16 to a tile, and keys in lanes. All queries of a
// group see all its keys, so nothing is masked but lanes behind the last key.

#ifndef VICINAL_AMX_DENSE_H
#define VICINAL_AMX_DENSE_H

#include <initializer_list>

#include "amx_kernel.h"
#include "dense_pieces.h"

namespace vicinal {
namespace {

enum AmxDenseSlot { AMX_DENSE_ROOM = 22 };

// Of a group's keys, or of its queries in the backward.
VICINAL_INLINE int64_t padded_tokens(int64_t tokens) { return round_up(tokens, MATRIX_DEPTH); }

VICINAL_INLINE uint32_t lanes_of(int64_t keys, int64_t begin) {
    return keys - begin >= TILE ? 0xffffu : (1u << most(keys - begin, 0)) - 1u;
}

// ---- copies of tokens

// Rows of up to 16 tokens from `begin` on, and zeros behind the last of them.
VICINAL_INLINE void find_rows(const Rows& from, const DensePlaces& places, int64_t begin, int64_t tokens, const uint16_t** row) {
    for (int i = 0; i < TILE; ++i) row[i] = begin + i < tokens ? from.at(places[begin + i], i) : from.zeros;
}

// What a product needs of all tokens of a group.
struct TokenCopies {
    uint16_t* rows = nullptr;    // [token][channel]: its left side
    uint16_t* turned = nullptr;  // [16 tokens][pair of channels][token][2]: the right side of scores
    uint16_t* paired = nullptr;  // [pair of tokens][channel][2]: the right side of sums
};

// For `room` tokens in all, of which those behind the last are zeros.
VICINAL_INLINE void copy_tokens(const Rows& from, const DensePlaces& places, int64_t tokens, int64_t room, const TokenCopies& to) {
    const int64_t padded = from.padded;
    bool is_finite = true;
    for (int64_t begin = 0; begin < room; begin += TILE) {
        const uint16_t* row[TILE];
        find_rows(from, places, begin, tokens, row);
        if (to.rows)
            for (int i = 0; i < TILE; ++i)
                for (int64_t d = 0; d < padded; d += MATRIX_DEPTH)
                    _mm512_storeu_si512(to.rows + (begin + i) * padded + d, _mm512_loadu_si512(row[i] + d));
        if (to.turned) lay_pairs(row, padded, to.turned + begin * padded);
        if (to.paired)
            for (int i = 0; i < TILE; i += 2) pair_rows(row[i], row[i + 1], padded, to.paired + (begin + i) * padded, is_finite);
    }
}

// ---- products

// to[row][16 lanes of N blocks] = 16 rows of `left` times N blocks of what was turned.
template <int N>
VICINAL_INLINE void multiply_turned(const uint16_t* left, const uint16_t* turned, int64_t padded, float* to, int64_t width) {
    const int64_t block = TILE * padded;
    Sums<N>::open(nullptr, 0);
    for (int64_t d = 0; d < padded; d += MATRIX_DEPTH) {
        const uint16_t* right = turned + d * TILE;
        Matrix::load<LEFT>(left + d, 2 * padded);
        Matrix::load<RIGHT>(right, 64);
        Matrix::multiply<SUM, LEFT, RIGHT>();
        if constexpr (N > 1) {
            Matrix::load<RIGHT>(right + block, 64);
            Matrix::multiply<SUM + 1, LEFT, RIGHT>();
        }
        if constexpr (N > 2) {
            Matrix::load<RIGHT>(right + 2 * block, 64);
            Matrix::multiply<SUM + 2, LEFT, RIGHT>();
        }
        if constexpr (N > 3) {
            Matrix::load<RIGHT>(right + 3 * block, 64);
            Matrix::multiply<SUM + 3, LEFT, RIGHT>();
        }
    }
    Sums<N>::close(to, width);
}

// Scores of 16 queries and all keys: to[query][key], `width` floats from query to query.
VICINAL_INLINE void multiply_by_keys(const uint16_t* left, const uint16_t* turned, int64_t padded, float* to, int64_t width) {
    for (int64_t key = 0; key < width; key += SUMS * TILE) {
        const uint16_t* right = turned + key * padded;
        switch (least((width - key) / TILE, SUMS)) {
            case 1: multiply_turned<1>(left, right, padded, to + key, width); break;
            case 2: multiply_turned<2>(left, right, padded, to + key, width); break;
            case 3: multiply_turned<3>(left, right, padded, to + key, width); break;
            default: multiply_turned<4>(left, right, padded, to + key, width); break;
        }
    }
}

// to[row][16 channels of N blocks] (+)= weights[row][token] times paired tokens; tokens in steps of 32, `step` numbers
// of `left` from one to the next.
template <int N>
VICINAL_INLINE void multiply_paired(const uint16_t* left, int64_t left_row, int64_t step, const uint16_t* paired,
                                    int64_t padded, int64_t tokens, bool is_fresh, float* to, int64_t row) {
    Sums<N>::open(is_fresh ? nullptr : to, row);
    for (int64_t token = 0; token < tokens; token += MATRIX_DEPTH, left += step)
        Sums<N>::template add_rows<LEFT, RIGHT>(left, 2 * left_row, paired + token * padded, padded);
    Sums<N>::close(to, row);
}

VICINAL_INLINE void multiply_by_tokens(const uint16_t* left, int64_t left_row, int64_t step, const uint16_t* paired,
                                       int64_t padded, int64_t tokens, bool is_fresh, float* to, int64_t row) {
    for (int64_t d = 0; d < row; d += SUMS * TILE) switch (least((row - d) / TILE, SUMS)) {
            case 1: multiply_paired<1>(left, left_row, step, paired + 2 * d, padded, tokens, is_fresh, to + d, row); break;
            case 2: multiply_paired<2>(left, left_row, step, paired + 2 * d, padded, tokens, is_fresh, to + d, row); break;
            case 3: multiply_paired<3>(left, left_row, step, paired + 2 * d, padded, tokens, is_fresh, to + d, row); break;
            default: multiply_paired<4>(left, left_row, step, paired + 2 * d, padded, tokens, is_fresh, to + d, row); break;
        }
}

// ---- forward

// Weights of 16 keys for four queries, and their sums.
VICINAL_INLINE void weigh_sixteen(const float* scores, int64_t width, uint32_t seen, F factor, const F* top, F* weight, F* sum) {
    VICINAL_UNROLL
    for (int t = 0; t < 4; ++t) {
        weight[t] = weight_of(S::sub(rounded_product(S::load(scores + t * width), factor), top[t]), seen);
        sum[t] = S::add(sum[t], weight[t]);
    }
}

// Softmax of four rows of scores, `width` apart: their largest, sums of their weights, and the weights themselves.
template <bool BIAS>
VICINAL_INLINE void weigh_four(float* scores, int64_t width, const float* bias, int64_t keys, F factor, uint16_t* weights,
                               int64_t weights_row, float* top, float* total) {
    F largest[4], sum[4], low[4], high[4];
    VICINAL_UNROLL
    for (int t = 0; t < 4; ++t) largest[t] = S::all(FAR_BELOW);
    const auto look = [&](int64_t v, uint32_t seen) VICINAL_LAMBDA {
        VICINAL_UNROLL
        for (int t = 0; t < 4; ++t) {
            float* at = scores + t * width + v;
            F score = S::mul(S::load(at), factor);
            if constexpr (BIAS) {
                score = S::fma(S::load(at), factor, S::load(bias + t * width + v));
                S::store(at, score);
            }
            largest[t] = _mm512_mask_max_ps(largest[t], static_cast<__mmask16>(seen), largest[t], score);
        }
    };
    int64_t v = 0;
    for (; v + TILE <= keys; v += TILE) look(v, 0xffffu);
    if (v < keys) look(v, lanes_of(keys, v));
    S::four_largest(largest, top);
    const F by = BIAS ? S::all(1.0f) : factor;
    VICINAL_UNROLL
    for (int t = 0; t < 4; ++t) {
        largest[t] = S::all(top[t]);
        sum[t] = high[t] = S::zero();
    }
    const auto keep = [&]() VICINAL_LAMBDA {
        VICINAL_UNROLL
        for (int t = 0; t < 4; ++t)
            _mm512_store_si512(weights + t * weights_row + v, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high[t], low[t])));
    };
    for (v = 0; v + 2 * TILE <= keys; v += 2 * TILE) {
        weigh_sixteen(scores + v, width, 0xffffu, by, largest, low, sum);
        weigh_sixteen(scores + v + TILE, width, 0xffffu, by, largest, high, sum);
        keep();
    }
    if (v < keys) {
        const bool has_more = v + TILE < keys;
        weigh_sixteen(scores + v, width, lanes_of(keys, v), by, largest, low, sum);
        if (has_more)
            weigh_sixteen(scores + v + TILE, width, lanes_of(keys, v + TILE), by, largest, high, sum);
        else
            VICINAL_UNROLL
            for (int t = 0; t < 4; ++t) high[t] = S::zero();
        keep();
    }
    S::four_sums(sum, total);
}

// Everything of a call's pieces that is the same for all of them.
struct AmxDenseForward {
    const DenseJob& job;
    int64_t key_padded, value_padded, value_row;
    uint16_t *keys, *values, *queries, *weights;  // two tiles of queries and weights
    float *scores, *sums;                         // two tiles
    float *top, *total;
};

VICINAL_INLINE void score_tile(const AmxDenseForward& run, const Rows& from, const DensePlaces& places, const Piece& piece,
                               int64_t tile, int64_t width) {
    const int64_t which = tile & 1;
    uint16_t* rows = run.queries + which * TILE * run.key_padded;
    const uint16_t* row[TILE];
    find_rows(from, places, tile * TILE, piece.queries, row);
    for (int i = 0; i < TILE; ++i)
        for (int64_t d = 0; d < run.key_padded; d += MATRIX_DEPTH)
            _mm512_store_si512(rows + i * run.key_padded + d, _mm512_loadu_si512(row[i] + d));
    multiply_by_keys(rows, run.keys, run.key_padded, run.scores + which * TILE * padded_tokens(run.job.most_keys), width);
}

VICINAL_INLINE void finish_dense_tile(const AmxDenseForward& run, const DensePlaces& out_at, const Piece& piece, int64_t tile,
                                      int64_t width, const float* pairs, F factor) {
    const int64_t which = tile & 1, begin = tile * TILE, queries = least(TILE, piece.queries - begin);
    const int64_t room = padded_tokens(run.job.most_keys), tokens = padded_tokens(piece.keys);
    float* scores = run.scores + which * TILE * room;
    uint16_t* weights = run.weights + which * TILE * room;
    for (int64_t t = 0; t < queries; t += 4) {
        float *top = run.top + begin + t, *total = run.total + begin + t;
        if (pairs)
            weigh_four<true>(scores + t * width, width, pairs + (begin + t) * width, piece.keys, factor, weights + t * tokens,
                             tokens, top, total);
        else
            weigh_four<false>(scores + t * width, width, nullptr, piece.keys, factor, weights + t * tokens, tokens, top, total);
    }
    multiply_by_tokens(weights, tokens, MATRIX_DEPTH, run.values, run.value_padded, tokens, true, run.sums, run.value_row);
    for (int64_t t = 0; t < queries; ++t) {
        const float total = run.total[begin + t];
        store_narrow_row(run.job.out, out_at[begin + t], run.sums + t * run.value_row, total > 0.0f ? 1.0f / total : 0.0f);
    }
}

VICINAL_INLINE void write_dense_lse(const DensePlaces& lse_at, int64_t queries, const float* top, const float* total) {
    float* lse = reinterpret_cast<float*>(const_cast<char*>(lse_at.operand.data));
    for (int64_t i = 0; i < queries; ++i) {
        const float number = top[i] * LN_2 + log_of(total[i]);
        lse[lse_at[i]] = total[i] > 0.0f ? number : total[i] - INFINITY;  // nothing is seen, or NaN
    }
}

inline void amx_dense_forward(const DenseJob& job, int64_t begin, int64_t end, const Workspace& workspace) {
    const int64_t key_padded = padded_channels(job.query.dim), value_padded = padded_channels(job.value.dim);
    const int64_t longest = most(key_padded, value_padded), value_row = round_up(job.value.dim, TILE);
    const int64_t room = padded_tokens(job.most_keys), most_queries = job.most_queries, most_keys = job.most_keys;
    const int64_t numbers = room * (key_padded + value_padded) + 2 * TILE * key_padded + 2 * TILE * room + (TILE + 1) * longest;
    const int64_t floats = 2 * TILE * room + TILE * value_row + 2 * (most_queries + TILE);
    Arena arena{static_cast<char*>(workspace.get(AMX_DENSE_ROOM, static_cast<size_t>(
        64 + numbers * 2 + floats * 4 + (3 * most_queries + 2 * most_keys) * 8 + 64 * 20))) + 64};
    AmxDenseForward run{job, key_padded, value_padded, value_row,
                        arena.take<uint16_t>(room * key_padded), arena.take<uint16_t>(room * value_padded),
                        arena.take<uint16_t>(2 * TILE * key_padded), arena.take<uint16_t>(2 * TILE * room),
                        arena.take<float>(2 * TILE * room), arena.take<float>(TILE * value_row),
                        arena.take<float>(most_queries + TILE), arena.take<float>(most_queries + TILE)};
    uint16_t* scratch = arena.take<uint16_t>(TILE * longest);
    uint16_t* zeros = arena.take<uint16_t>(longest);
    std::memset(zeros, 0, static_cast<size_t>(longest) * 2);
    std::memset(run.weights, 0, static_cast<size_t>(2 * TILE * room) * 2);  // rows nobody has are multiplied too
    const Rows query_rows(job.query, scratch, zeros), key_rows(job.key, scratch, zeros), value_rows(job.value, scratch, zeros);
    DensePlaces query_at{job.query, false, arena.take<int64_t>(most_queries)};
    DensePlaces out_at{job.out, false, arena.take<int64_t>(most_queries)};
    DensePlaces lse_at{job.lse, false, arena.take<int64_t>(most_queries)};
    DensePlaces key_at{job.key, true, arena.take<int64_t>(most_keys)};
    DensePlaces value_at{job.value, true, arena.take<int64_t>(most_keys)};
    const ThreadBias bias = take_bias<S>(job, workspace);
    const F factor = S::all(job.scale * LOG2_E);
    Matrix::open();
    each_piece(job, begin, end, [&](const Piece& piece, bool has_new_shape, const Piece* next) {
        for (DensePlaces* at : {&query_at, &out_at, &lse_at}) go_to(*at, piece, has_new_shape, next, 1);
        for (DensePlaces* at : {&key_at, &value_at}) go_to(*at, piece, has_new_shape, next, job.shared);
        const int64_t width = round_up(piece.keys, TILE), tiles = (piece.queries + TILE - 1) / TILE;
        TokenCopies of_keys, of_values;
        of_keys.turned = run.keys;
        of_values.paired = run.values;
        copy_tokens(key_rows, key_at, piece.keys, width, of_keys);
        copy_tokens(value_rows, value_at, piece.keys, padded_tokens(piece.keys), of_values);
        const float* pairs = bias_of_pairs<S>(job, piece, width, bias);
        const Shares some_keys(piece.keys, tiles, 0), some_queries(piece.queries, tiles, 0);
        Share keys_asked = some_keys.first(), queries_asked = some_queries.first();
        for (int64_t tile = 0; tile <= tiles; ++tile) {
            if (tile < tiles) {
                score_tile(run, query_rows, query_at, piece, tile, width);
                ask_for_share(key_at, 2, keys_asked);
                ask_for_share(value_at, 2, keys_asked);
                ask_for_share(query_at, 2, queries_asked);
                ask_for_share<true>(out_at, 2, queries_asked);
                keys_asked = some_keys.after(keys_asked, tile);
                queries_asked = some_queries.after(queries_asked, tile);
            }
            if (tile) finish_dense_tile(run, out_at, piece, tile - 1, width, pairs, factor);
        }
        if (job.lse.data) write_dense_lse(lse_at, piece.queries, run.top, run.total);
    });
    Matrix::close();
}

// ---- backward

// Weights and gradients of scores of two rows, [query][key] and `width` apart: gradients as rows of bfloat16, and both as
// pairs of queries, [16 keys][pair of queries][key][2]. `keeps` leaves the gradients in the place of the scores.
struct DenseRows {
    float *scores, *grads;
    const float* bias;
    int64_t width, keys;
    uint16_t* grad_rows;
    int64_t grad_row;
    float *weight_pairs, *grad_pairs;  // of these two queries, of the first 16 keys
    int64_t pairs_block;               // floats from 16 keys to the next
};

VICINAL_INLINE void differentiate_two(const DenseRows& rows, F factor, const float* lse, const float* row_sums, bool has_second,
                                      bool keeps) {
    const F low[2] = {S::all(lse[0]), S::all(lse[1])}, sum[2] = {S::all(row_sums[0]), S::all(row_sums[1])};
    float *weight_pairs = rows.weight_pairs, *grad_pairs = rows.grad_pairs;
    for (int64_t v = 0; v < rows.width; v += TILE, weight_pairs += rows.pairs_block, grad_pairs += rows.pairs_block) {
        const uint32_t seen = lanes_of(rows.keys, v);
        F weight[2], grad[2];
        VICINAL_UNROLL
        for (int t = 0; t < 2; ++t) {
            float* at = rows.scores + t * rows.width + v;
            F score = S::mul(S::load(at), factor);
            if (rows.bias) score = S::add(score, S::load(rows.bias + t * rows.width + v));
            weight[t] = weight_of(S::sub(score, low[t]), t && !has_second ? 0 : seen);
            grad[t] = _mm512_maskz_mul_ps(t && !has_second ? 0 : static_cast<__mmask16>(seen), weight[t],
                                          S::sub(S::load(rows.grads + t * rows.width + v), sum[t]));
            if (keeps) S::store(at, grad[t]);
            _mm256_store_si256(reinterpret_cast<__m256i*>(rows.grad_rows + t * rows.grad_row + v),
                               reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(grad[t])));
        }
        store_pair_rows(weight_pairs, weight[0], weight[1]);
        store_pair_rows(grad_pairs, grad[0], grad[1]);
    }
}

// The sum of products of two rows of numbers.
VICINAL_INLINE float product_of_rows(const uint16_t* a, const uint16_t* b, int64_t padded) {
    F sum = S::zero();
    for (int64_t d = 0; d < padded; d += MATRIX_DEPTH)
        sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(_mm512_loadu_si512(a + d)),
                               reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + d)));
    return S::sum(sum);
}

// What is summed up for all keys of a group: to[key][channel] (+)= pairs of queries, turned, times their rows.
VICINAL_INLINE void multiply_by_queries(float* pairs, int64_t pairs_block, int64_t keys, const uint16_t* paired, int64_t padded,
                                        int64_t queries, bool is_fresh, float* to, int64_t row) {
    const auto turn = [&](int64_t key) VICINAL_LAMBDA {
        for (int64_t query = 0; query < queries; query += MATRIX_DEPTH)
            turn_pairs(pairs + key / TILE * pairs_block + query / 2 * TILE, 2);
    };
    turn(0);
    for (int64_t key = 0; key < keys; key += TILE) {
        if (key + TILE < keys) turn(key + TILE);
        multiply_by_tokens(reinterpret_cast<const uint16_t*>(pairs + key / TILE * pairs_block), MATRIX_DEPTH,
                           TILE * MATRIX_DEPTH, paired, padded, queries, is_fresh, to + key * row, row);
    }
}

struct AmxDenseBackward {
    const DenseJob& job;
    TokenCopies keys, values, queries, grads;
    float *scores, *changes;            // two tiles, [query][key]: scores, or gradients of scores where all are kept
    uint16_t* change_rows;              // of a tile
    float *weight_pairs, *change_pairs;
    float *sums, *grad_keys, *grad_values;
    float *lows, *row_sums;             // of all queries
};

inline void amx_dense_backward(const DenseJob& job, int64_t begin, int64_t end, float* grad_bias, const Workspace& workspace) {
    const int64_t key_padded = padded_channels(job.query.dim), value_padded = padded_channels(job.value.dim);
    const int64_t key_row = round_up(job.query.dim, TILE), value_row = round_up(job.value.dim, TILE);
    const int64_t longest = most(key_padded, value_padded), most_queries = job.most_queries, most_keys = job.most_keys;
    const int64_t key_room = padded_tokens(most_keys), query_room = padded_tokens(most_queries);
    const int64_t kept = grad_bias ? query_room : TILE;  // rows of scores
    const int64_t numbers = key_room * (2 * key_padded + value_padded) + query_room * 2 * (key_padded + value_padded) +
                            TILE * key_room + (2 * TILE + 1) * longest;
    const int64_t floats = (kept + TILE) * key_room + query_room / 2 * 2 * key_room + TILE * key_row +
                           key_room * (key_row + value_row) + 2 * (query_room + TILE);
    Arena arena{static_cast<char*>(workspace.get(AMX_DENSE_ROOM, static_cast<size_t>(
        64 + numbers * 2 + floats * 4 + (6 * most_queries + 4 * most_keys) * 8 + 64 * 40))) + 64};
    TokenCopies keys, values, queries, grads;
    keys.turned = arena.take<uint16_t>(key_room * key_padded);
    keys.paired = arena.take<uint16_t>(key_room * key_padded);
    values.turned = arena.take<uint16_t>(key_room * value_padded);
    queries.rows = arena.take<uint16_t>(query_room * key_padded);
    queries.paired = arena.take<uint16_t>(query_room * key_padded);
    grads.rows = arena.take<uint16_t>(query_room * value_padded);
    grads.paired = arena.take<uint16_t>(query_room * value_padded);
    uint16_t* change_rows = arena.take<uint16_t>(TILE * key_room);
    uint16_t* scratch = arena.take<uint16_t>(TILE * longest);
    uint16_t* zeros = arena.take<uint16_t>(longest);
    float* scores = arena.take<float>(kept * key_room);
    float* changes = arena.take<float>(TILE * key_room);
    float* weight_pairs = arena.take<float>(query_room / 2 * key_room);
    float* change_pairs = arena.take<float>(query_room / 2 * key_room);
    float* sums = arena.take<float>(TILE * key_row);
    float* grad_keys = arena.take<float>(key_room * key_row);
    float* grad_values = arena.take<float>(key_room * value_row);
    float* lows = arena.take<float>(query_room + TILE);
    float* row_sums = arena.take<float>(query_room + TILE);
    std::memset(zeros, 0, static_cast<size_t>(longest) * 2);
    std::memset(change_rows, 0, static_cast<size_t>(TILE * key_room) * 2);
    const Rows query_rows(job.query, scratch, zeros), key_rows(job.key, scratch, zeros), value_rows(job.value, scratch, zeros);
    const Rows grad_rows(job.grad_out, scratch, zeros), out_rows(job.out, scratch, zeros);
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
    if (grad_bias) grad_sums = take_sums(job, TILE, grad_bias, workspace);
    const F factor = S::all(job.scale * LOG2_E);
    const float* lse = reinterpret_cast<const float*>(job.lse.data);
    const float* grad_lse = reinterpret_cast<const float*>(job.grad_lse.data);
    Matrix::open();
    each_piece(job, begin, end, [&](const Piece& own, bool has_new_shape, const Piece* next) {
        const int64_t width = round_up(own.keys, TILE), tokens = padded_tokens(own.keys);
        const int64_t tiles = (own.queries + TILE - 1) / TILE, padded_queries = padded_tokens(own.queries);
        const int64_t pairs_block = padded_queries / 2 * TILE;
        for (DensePlaces* at : {&key_at, &value_at, &grad_key_at, &grad_value_at}) go_to(*at, own, has_new_shape, next, 1);
        copy_tokens(key_rows, key_at, own.keys, tokens, keys);
        copy_tokens(value_rows, value_at, own.keys, width, values);
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
            copy_tokens(query_rows, query_at, piece.queries, padded_queries, queries);
            copy_tokens(grad_rows, grad_out_at, piece.queries, padded_queries, grads);
            for (int64_t i = 0; i < piece.queries; ++i) {
                row_sums[i] = with_plain_nan(
                    product_of_rows(out_rows.at(out_at[i], 0), grads.rows + i * value_padded, value_padded) -
                    (grad_lse ? grad_lse[grad_lse_at[i]] : 0.0f));
                const float of_query = lse[lse_at[i]];
                lows[i] = of_query == -INFINITY ? 0.0f : with_plain_nan(of_query * LOG2_E);
            }
            const float* pairs = bias_of_pairs<S>(job, piece, width, bias);
            const Shares some_keys(piece.keys, tiles, 0), some_queries(piece.queries, tiles, 0);
            Share keys_asked = some_keys.first(), queries_asked = some_queries.first();
            for (int64_t tile = 0; tile < tiles; ++tile) {
                const int64_t first = tile * TILE, here = least(TILE, piece.queries - first);
                float* own_scores = scores + (grad_bias ? first * width : 0);
                multiply_by_keys(queries.rows + first * key_padded, keys.turned, key_padded, own_scores, width);
                multiply_by_keys(grads.rows + first * value_padded, values.turned, value_padded, changes, width);
                for (DensePlaces* at : {&key_at, &value_at}) ask_for_share(*at, 2, keys_asked);
                for (DensePlaces* at : {&grad_key_at, &grad_value_at}) ask_for_share<true>(*at, 2, keys_asked);
                for (DensePlaces* at : {&query_at, &out_at, &grad_out_at}) ask_for_share(*at, 2, queries_asked);
                ask_for_share<true>(grad_query_at, 2, queries_asked);
                keys_asked = some_keys.after(keys_asked, tile);
                queries_asked = some_queries.after(queries_asked, tile);
                for (int64_t t = 0; t < here; t += 2) {
                    const int64_t query = first + t;
                    differentiate_two({own_scores + t * width, changes + t * width, pairs ? pairs + query * width : nullptr, width,
                                       piece.keys, change_rows + t * tokens, tokens, weight_pairs + query / 2 * TILE,
                                       change_pairs + query / 2 * TILE, pairs_block},
                                      factor, lows + query, row_sums + query, query + 1 < piece.queries, grad_bias != nullptr);
                }
                if (!job.grad_query.data) continue;
                multiply_by_tokens(change_rows, tokens, MATRIX_DEPTH, keys.paired, key_padded, tokens, true, sums, key_row);
                for (int64_t t = 0; t < here; ++t)
                    store_narrow_row(job.grad_query, grad_query_at[first + t], sums + t * key_row, job.scale);
            }
            if (grad_bias) add_pairs<S>(job, piece, width, scores, grad_sums);
            for (int64_t key = 0; key < width; key += TILE)  // pairs nobody has
                for (int64_t pair = (piece.queries + 1) / 2; pair < padded_queries / 2; ++pair) {
                    S::store(weight_pairs + key / TILE * pairs_block + pair * TILE, S::zero());
                    S::store(change_pairs + key / TILE * pairs_block + pair * TILE, S::zero());
                }
            if (job.grad_value.data)
                multiply_by_queries(weight_pairs, pairs_block, own.keys, grads.paired, value_padded, padded_queries, s == 0,
                                    grad_values, value_row);
            if (job.grad_key.data)
                multiply_by_queries(change_pairs, pairs_block, own.keys, queries.paired, key_padded, padded_queries, s == 0,
                                    grad_keys, key_row);
        }
        for (int64_t i = 0; i < own.keys; ++i) {
            if (job.grad_value.data) store_narrow_row(job.grad_value, grad_value_at[i], grad_values + i * value_row, 1.0f);
            if (job.grad_key.data) store_narrow_row(job.grad_key, grad_key_at[i], grad_keys + i * key_row, job.scale);
        }
    });
    Matrix::close();
    if (grad_bias)
        for (int64_t slot = 0; slot < job.pair_slots; ++slot) empty_slot<S>(job, grad_sums, slot);
}

}  // namespace
}  // namespace vicinal

#endif
