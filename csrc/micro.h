// The two inner loops everything is made of, for a fixed number of targets: scores and weighted sums.

#ifndef VICINAL_MICRO_H
#define VICINAL_MICRO_H

#include "panel.h"

namespace vicinal {
namespace {

// Up to MOST_VECTORS vectors of sources that a tile looks at together. Scores are kept as [vector][target][lane].
struct Pass {
    int count;
    int64_t group[MOST_VECTORS];                     // row group within the panel
    int64_t at[MOST_VECTORS];                        // first lane within the row group
    uint32_t seen[MOST_VECTORS][MOST_TARGETS];       // which lanes each target sees
    uint32_t any[MOST_VECTORS];                      // which lanes any target sees
    const float* bias[MOST_VECTORS][MOST_TARGETS];   // where there is a bias: of these lanes
};

// Products of `targets` (rows of DIM_BLOCK floats) with the vectors of a pass, handed vector by vector to `finish`.
template <class S, int T, int V, class Finish>
VICINAL_INLINE void products(const Pass& pass, int first, const float* targets, int64_t dim, const float* transposed,
                             int64_t width, int64_t group_size, const float* partial, Finish& finish) {
    constexpr int W = S::LANES;
    using F = typename S::F;
    const float* from[V];
    F sum[T][V];
    VICINAL_UNROLL
    for (int v = 0; v < V; ++v) {
        from[v] = transposed + pass.group[first + v] * group_size + pass.at[first + v];
        VICINAL_UNROLL
        for (int t = 0; t < T; ++t)
            sum[t][v] = partial ? S::load(partial + ((first + v) * T + t) * W) : S::zero();
    }
    int64_t offset = 0;
    for (int64_t d = 0; d < dim; ++d, offset += width) {
        F source[V];
        VICINAL_UNROLL
        for (int v = 0; v < V; ++v) source[v] = S::load(from[v] + offset);
        VICINAL_UNROLL
        for (int t = 0; t < T; ++t) {
            const F target = S::all(targets[t * DIM_BLOCK + d]);
            VICINAL_UNROLL
            for (int v = 0; v < V; ++v) sum[t][v] = S::multiply(target, source[v], sum[t][v]);
        }
    }
    VICINAL_UNROLL
    for (int v = 0; v < V; ++v) {
        VICINAL_UNROLL
        for (int t = 0; t < T; ++t) finish(first + v, t, sum[t][v]);
    }
}

template <class S, int T, class Finish>
VICINAL_INLINE void products_of_pass(const Pass& pass, const float* targets, int64_t dim, const float* transposed,
                                     int64_t width, int64_t group_size, const float* partial, Finish& finish) {
    constexpr int V = S::LANES == 16 ? (T <= 2 ? 6 : T <= 6 ? 4 : 3) : (T <= 2 ? 4 : 2) / (T > 4 ? 2 : 1);
    // as many at once as others, or one less: a single vector has too few sums to keep the machine busy
    int v = 0;
    for (int left = (pass.count + V - 1) / V; left > 0; --left) {
        const int n = (pass.count - v + left - 1) / left;
        if (n == V)
            products<S, T, V>(pass, v, targets, dim, transposed, width, group_size, partial, finish);
        else if (V > 3 && n == V - 1)
            products<S, T, (V > 3 ? V - 1 : 1)>(pass, v, targets, dim, transposed, width, group_size, partial, finish);
        else
            for (int end = v + n, i = v; i < end;) {
                if (V > 2 && i + 2 <= end) {
                    products<S, T, (V > 2 ? 2 : 1)>(pass, i, targets, dim, transposed, width, group_size, partial, finish);
                    i += 2;
                } else {
                    products<S, T, 1>(pass, i++, targets, dim, transposed, width, group_size, partial, finish);
                }
            }
        v += n;
    }
}

// Products of a pass, added to those before if there are any, and kept in `scores`. A function of its own: what calls it
// would be as long again for each place it is called from.
template <class S, int T>
VICINAL_APART void keep_products(const Pass& pass, const float* targets, int64_t dim, const float* transposed, int64_t width,
                                 int64_t group_size, const float* partial, float* scores) {
    auto keep = [&](int v, int t, typename S::F sum) VICINAL_LAMBDA { S::store(scores + (v * T + t) * S::LANES, sum); };
    products_of_pass<S, T>(pass, targets, dim, transposed, width, group_size, partial, keep);
}

// Dot products of all targets and vectors, over `dim` units. `targets` holds [block of DIM_BLOCK units][MOST_TARGETS]
// [DIM_BLOCK]; with several blocks the sums so far wait in `scores`. Wide vectors are finished in registers; for narrow
// ones, where a pass is many more instructions, that would take minutes to compile.
template <class S, int T, class Finish>
VICINAL_INLINE void dot(const Pass& pass, const float* targets, int64_t dim, const float* transposed, int64_t width,
                        float* scores, Finish& finish) {
    constexpr int W = S::LANES;
    const int64_t group_size = dim * width;
    const float* partial = nullptr;
    while (dim > DIM_BLOCK) {
        keep_products<S, T>(pass, targets, DIM_BLOCK, transposed, width, group_size, partial, scores);
        partial = scores;
        targets += MOST_TARGETS * DIM_BLOCK;
        transposed += DIM_BLOCK * width;
        dim -= DIM_BLOCK;
    }
    if constexpr (W == 16) {
        products_of_pass<S, T>(pass, targets, dim, transposed, width, group_size, partial, finish);
    } else {
        keep_products<S, T>(pass, targets, dim, transposed, width, group_size, partial, scores);
        for (int v = 0; v < pass.count; ++v) {
            VICINAL_UNROLL
            for (int t = 0; t < T; ++t) finish(v, t, S::load(scores + (v * T + t) * W));
        }
    }
}

// sum[t] += weight[t] times a row of D vectors of channels
template <class S, int T, int D>
VICINAL_INLINE void add_row(const float* row, const float* weight, typename S::F (&sum)[T][D]) {
    constexpr int W = S::LANES;
    typename S::F source[D];
    VICINAL_UNROLL
    for (int d = 0; d < D; ++d) source[d] = S::load(row + d * W);
    VICINAL_UNROLL
    for (int t = 0; t < T; ++t) {
        const typename S::F by = S::all(weight[t * (W / S::PAIR)]);
        VICINAL_UNROLL
        for (int d = 0; d < D; ++d) sum[t][d] = S::multiply(by, source[d], sum[t][d]);
    }
}

// sums[t] = factor[t] * sums[t] + weights of a pass times rows of the panel, D vectors of channels at a time;
// factor null means that sums start at 0. Weights and rows are in units, of neighboring sources. A pass is summed up by
// itself first: one sum over thousands of sources would lose digits.
template <class S, int T, int D>
VICINAL_INLINE void mix_channels(const Pass& pass, const float* weights, const float* rows, int64_t width,
                                 int64_t padded, const float* factor, float* const* sums, int64_t channel) {
    constexpr int W = S::LANES;
    constexpr int UNITS = W / S::PAIR;  // of a vector of sources
    constexpr uint32_t ALL = (1u << W) - 1u, UNIT = (1u << S::PAIR) - 1u;
    using F = typename S::F;
    // a few sums would wait for one another: every other source has its own
    constexpr bool IS_FEW = W == 16 && T * D <= 8;
    F sum[T][D], other[T][D];
    VICINAL_UNROLL
    for (int t = 0; t < T; ++t) {
        VICINAL_UNROLL
        for (int d = 0; d < D; ++d) {
            sum[t][d] = S::zero();
            other[t][d] = S::zero();
        }
    }
    for (int v = 0; v < pass.count; ++v) {
        const float* row = rows + (pass.group[v] * width + pass.at[v]) / S::PAIR * padded + channel;
        const float* weight = weights + v * T * UNITS;
        uint32_t lanes = pass.any[v];
        if (lanes == ALL) {
#pragma GCC unroll 2
            for (int lane = 0; lane < UNITS; lane += 2) {
                add_row<S, T, D>(row + lane * padded, weight + lane, sum);
                if constexpr (IS_FEW)
                    add_row<S, T, D>(row + (lane + 1) * padded, weight + lane + 1, other);
                else
                    add_row<S, T, D>(row + (lane + 1) * padded, weight + lane + 1, sum);
            }
            continue;
        }
        for (int lane = 0; lanes; ++lane, lanes >>= S::PAIR) {
            if (!(lanes & UNIT)) continue;
            if constexpr (S::PAIR == 2) {
                if ((lanes & UNIT) != UNIT) {  // the other of the pair may be anything, NaN too
                    float one[D * W];
                    VICINAL_UNROLL
                    for (int d = 0; d < D; ++d)
                        S::store(one + d * W, S::one_of_pair(S::load(row + lane * padded + d * W), lanes & 1u));
                    add_row<S, T, D>(one, weight + lane, sum);
                    continue;
                }
            }
            add_row<S, T, D>(row + lane * padded, weight + lane, sum);
        }
    }
    VICINAL_UNROLL
    for (int t = 0; t < T; ++t) {
        VICINAL_UNROLL
        for (int d = 0; d < D; ++d) {
            float* to = sums[t] + channel + d * W;
            const F found = IS_FEW ? S::add(sum[t][d], other[t][d]) : sum[t][d];
            S::store(to, factor ? S::fma(S::all(factor[t]), S::load(to), found) : found);
        }
    }
}

template <class S, int T>
VICINAL_APART void mix(const Pass& pass, const float* weights, const float* rows, int64_t width, int64_t padded,
                       const float* factor, float* const* sums) {
    constexpr int W = S::LANES;
    constexpr int MOST = S::LANES == 16 ? (T <= 4 ? 4 : T <= 6 ? 4 : 3) : (T <= 2 ? 4 : T <= 5 ? 2 : 1);
    int64_t channel = 0;
    // two and two are better than three and one
    for (; channel + MOST * W <= padded && (MOST != 3 || channel + 4 * W != padded); channel += MOST * W)
        mix_channels<S, T, MOST>(pass, weights, rows, width, padded, factor, sums, channel);
    if constexpr (MOST > 2) {
        for (; channel + 2 * W <= padded; channel += 2 * W)
            mix_channels<S, T, 2>(pass, weights, rows, width, padded, factor, sums, channel);
    }
    for (; channel < padded; channel += W)
        mix_channels<S, T, 1>(pass, weights, rows, width, padded, factor, sums, channel);
}

// The other way round: to[source] += weights of a pass times rows of the targets, for D vectors of channels.
template <class S, int T, int D>
VICINAL_INLINE void spread_channels(const Pass& pass, const float* weights, const float* targets, int64_t width,
                                    int64_t padded, int64_t channel, float* to) {
    constexpr int W = S::LANES;
    using F = typename S::F;
    F target[T][D];
    const float* from = targets + channel / DIM_BLOCK * MOST_TARGETS * DIM_BLOCK + channel % DIM_BLOCK;
    VICINAL_UNROLL
    for (int t = 0; t < T; ++t) {
        VICINAL_UNROLL
        for (int d = 0; d < D; ++d) target[t][d] = S::load(from + t * DIM_BLOCK + d * W);
    }
    for (int v = 0; v < pass.count; ++v) {
        float* row = to + (pass.group[v] * width + pass.at[v]) * padded + channel;
        const float* weight = weights + v * T * W;
        uint32_t lanes = pass.any[v];
        for (int lane = 0; lanes; ++lane, lanes >>= 1) {
            if (!(lanes & 1u)) continue;
            F sum[D];
            VICINAL_UNROLL
            for (int d = 0; d < D; ++d) sum[d] = S::load(row + lane * padded + d * W);
            VICINAL_UNROLL
            for (int t = 0; t < T; ++t) {
                const F by = S::all(weight[t * W + lane]);
                VICINAL_UNROLL
                for (int d = 0; d < D; ++d) sum[d] = S::fma(by, target[t][d], sum[d]);
            }
            VICINAL_UNROLL
            for (int d = 0; d < D; ++d) S::store(row + lane * padded + d * W, sum[d]);
        }
    }
}

template <class S, int T>
VICINAL_INLINE void spread(const Pass& pass, const float* weights, const float* targets, int64_t width, int64_t padded,
                           float* to) {
    constexpr int W = S::LANES;
    constexpr int MOST = W == 16 ? 2 : 1;
    int64_t channel = 0;
    for (; channel + MOST * W <= padded; channel += MOST * W)
        spread_channels<S, T, MOST>(pass, weights, targets, width, padded, channel, to);
    for (; channel < padded; channel += W) spread_channels<S, T, 1>(pass, weights, targets, width, padded, channel, to);
}

// Units that so many channels make.
template <class S>
VICINAL_INLINE int64_t units_of(int64_t channels) {
    return (channels + S::PAIR - 1) / S::PAIR;
}

// The weights of a pass as `mix` reads them: as they are, or narrowed in place.
template <class S, int T>
VICINAL_INLINE void narrow_weights(const Pass& pass, float* weights) {
    if constexpr (S::PAIR == 2) {
        for (int i = 0; i < pass.count * T; ++i)
            S::store_pairs(weights + i * (S::LANES / 2), S::load(weights + i * S::LANES));
    }
}

}  // namespace
}  // namespace vicinal

#endif
