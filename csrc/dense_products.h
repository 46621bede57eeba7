// Products of small matrices that lie in the first-level cache, a few rows by a few vectors at a time in registers.

#ifndef VICINAL_DENSE_PRODUCTS_H
#define VICINAL_DENSE_PRODUCTS_H

#include "panel.h"

namespace vicinal {
namespace {

// How many rows and vectors of a product are summed up in registers at once.
template <class S>
struct Registers {
    static constexpr int ROWS = S::LANES == 16 ? 6 : 4;
    static constexpr int VECTORS = S::LANES == 16 ? 4 : 3;
};

// to[r][...] = begin[r][...] + sum over i < count of left[r * left_row + i * left_step] * right[i * right_row + ...]
struct Product {
    const float* left;
    int64_t left_row, left_step;
    const float* right;
    int64_t right_row, count;
    const float* begin;  // null: zero
    int64_t begin_row;
    float* to;
    int64_t to_row;
};

template <class S, int T, int V>
VICINAL_APART void multiply_block(const Product& p) {
    constexpr int W = S::LANES;
    using F = typename S::F;
    F sum[T][V];
    VICINAL_UNROLL
    for (int t = 0; t < T; ++t) {
        VICINAL_UNROLL
        for (int v = 0; v < V; ++v) sum[t][v] = p.begin ? S::load(p.begin + t * p.begin_row + v * W) : S::zero();
    }
    const float* left[T];
    VICINAL_UNROLL
    for (int t = 0; t < T; ++t) left[t] = p.left + t * p.left_row;
    const float* right = p.right;
    const int64_t step = p.left_step, right_row = p.right_row;
    int64_t at = 0;
    for (int64_t i = 0; i < p.count; ++i, at += step, right += right_row) {
        F vector[V];
        VICINAL_UNROLL
        for (int v = 0; v < V; ++v) vector[v] = S::load(right + v * W);
        VICINAL_UNROLL
        for (int t = 0; t < T; ++t) {
            const F factor = S::all(left[t][at]);
            VICINAL_UNROLL
            for (int v = 0; v < V; ++v) sum[t][v] = S::fma(factor, vector[v], sum[t][v]);
        }
    }
    VICINAL_UNROLL
    for (int t = 0; t < T; ++t) {
        VICINAL_UNROLL
        for (int v = 0; v < V; ++v) S::store(p.to + t * p.to_row + v * W, sum[t][v]);
    }
}

template <class S, int T>
VICINAL_INLINE void multiply_rows(const Product& p, int vectors) {
    switch (vectors) {
        case 1: return multiply_block<S, T, 1>(p);
        case 2: return multiply_block<S, T, 2>(p);
        case 3: return multiply_block<S, T, 3>(p);
        default:
            if constexpr (Registers<S>::VECTORS >= 4) return multiply_block<S, T, 4>(p);
    }
}

template <class S>
VICINAL_INLINE void multiply_some(const Product& p, int rows, int vectors) {
    switch (rows) {
        case 1: return multiply_rows<S, 1>(p, vectors);
        case 2: return multiply_rows<S, 2>(p, vectors);
        case 3: return multiply_rows<S, 3>(p, vectors);
        case 4: return multiply_rows<S, 4>(p, vectors);
        case 5:
            if constexpr (Registers<S>::ROWS >= 5) return multiply_rows<S, 5>(p, vectors);
            break;
        default:
            if constexpr (Registers<S>::ROWS >= 6) return multiply_rows<S, 6>(p, vectors);
    }
}

// Even shares of a count, as few as hold at most `most` each, one after the other.
struct Share {
    int64_t begin, size;
};

struct Shares {
    int64_t count, size, larger;  // the first `larger` have one more

    VICINAL_INLINE Shares(int64_t all, int64_t most) : Shares(all, (all + most - 1) / most, 0) {}
    VICINAL_INLINE Shares(int64_t all, int64_t number, int) : count(number), size(all / number), larger(all % number) {}
    VICINAL_INLINE Share first() const { return {0, size + (larger > 0)}; }
    VICINAL_INLINE Share after(Share share, int64_t index) const { return {share.begin + share.size, size + (index + 1 < larger)}; }

    template <class Function>
    VICINAL_INLINE void each(const Function& function) const {
        Share share = first();
        for (int64_t i = 0; i < count; ++i, share = after(share, i - 1)) function(share);
    }
};

// A product of at most Registers::ROWS rows and any number of vectors.
template <class S>
VICINAL_INLINE void multiply(const Product& p, int64_t rows, int64_t vectors) {
    if (vectors <= Registers<S>::VECTORS) {
        if (vectors) multiply_some<S>(p, static_cast<int>(rows), static_cast<int>(vectors));
        return;
    }
    Shares(vectors, Registers<S>::VECTORS).each([&](Share share) VICINAL_LAMBDA {
        Product part = p;
        part.right += share.begin * S::LANES;
        part.to += share.begin * S::LANES;
        if (part.begin) part.begin += share.begin * S::LANES;
        multiply_some<S>(part, static_cast<int>(rows), static_cast<int>(share.size));
    });
}

// to[row] (+)= sum over i < count of left[i * width + row] * right[i * padded ...], for all rows; before(share) is called
// before each share of them.
template <class S, class Before>
VICINAL_INLINE void multiply_transposed(const float* left, int64_t width, const float* right, int64_t padded, int64_t count,
                                        int64_t rows, bool adds, float* to, const Before& before) {
    Shares(rows, Registers<S>::ROWS).each([&](Share share) VICINAL_LAMBDA {
        before(share);
        float* out = to + share.begin * padded;
        multiply<S>({left + share.begin, 1, width, right, padded, count, adds ? out : nullptr, padded, out, padded},
                    share.size, padded / S::LANES);
    });
}

// to[t] = product of row t with one other row, for T rows.
template <class S, int T>
VICINAL_INLINE void multiply_by_row(const float* rows, const float* row, int64_t padded, float* to) {
    typename S::F sum[T];
    VICINAL_UNROLL
    for (int t = 0; t < T; ++t) sum[t] = S::zero();
    for (int64_t d = 0; d < padded; d += S::LANES) {
        const typename S::F vector = S::load(row + d);
        VICINAL_UNROLL
        for (int t = 0; t < T; ++t) sum[t] = S::fma(S::load(rows + t * padded + d), vector, sum[t]);
    }
    sums_of<S, T>(sum, to);
}

// Calls a template over the number of rows.
#define VICINAL_FOR_ROWS(rows, call)  \
    switch (rows) {                   \
        case 1: return call(1);       \
        case 2: return call(2);       \
        case 3: return call(3);       \
        case 4: return call(4);       \
        case 5: return call(5);       \
        default: return call(6);      \
    }

}  // namespace
}  // namespace vicinal

#endif
