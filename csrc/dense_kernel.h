// The kernels of the dense strategy: a group's tokens are copied to where they lie together, and all that follows are
// products of small matrices in the first-level cache.

#ifndef VICINAL_DENSE_KERNEL_H
#define VICINAL_DENSE_KERNEL_H

#include <initializer_list>

#include "dense.h"
#include "panel.h"

namespace vicinal {
namespace {

enum DenseSlot { DENSE_ROOM = 8, DENSE_BIAS, DENSE_SUMS };

// ---- products

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

// ---- groups

struct Piece {
    int64_t sample, head;
    const DenseRun* run[3];
    int64_t queries, keys;

    VICINAL_INLINE bool has_shape_of(const Piece& other) const {
        return run[0]->shape == other.run[0]->shape && run[1]->shape == other.run[1]->shape &&
               run[2]->shape == other.run[2]->shape;
    }
};

VICINAL_INLINE Piece piece_of(const DenseJob& job, int64_t number) {
    Piece piece;
    int64_t group;
    if (job.heads_first) {
        piece.sample = number % job.samples;
        group = number / job.samples % job.groups;
        piece.head = job.first_head + number / job.samples / job.groups;
    } else {
        piece.head = job.first_head + number % job.heads;
        group = number / job.heads % job.groups;
        piece.sample = number / job.heads / job.groups;
    }
    piece.queries = piece.keys = 1;
    for (int a = 2; a >= 0; --a) {
        piece.run[a] = job.runs[a] + group % job.num_runs[a];
        group /= job.num_runs[a];
        piece.queries *= piece.run[a]->queries;
        piece.keys *= piece.run[a]->keys;
    }
    return piece;
}

// Where the queries, or the keys, of a group stand in a tensor.
struct DensePlaces {
    const Operand& operand;
    bool are_keys;
    int64_t* at;        // from the first of them on
    int64_t base = 0;   // of the piece at hand
    int64_t next = -1;  // of the next one; -1 where that has another shape, or there is none

    // `head` is one of the tensor's
    VICINAL_INLINE int64_t base_of(const Piece& piece, int64_t head) const {
        int64_t base = piece.sample * operand.batch + head * operand.head;
        for (int a = 0; a < 3; ++a) base += (are_keys ? piece.run[a]->key : piece.run[a]->query) * operand.axis[a];
        return base;
    }

    VICINAL_INLINE void take_shape(const Piece& piece) const {
        int64_t size[3], stride[3], *to = at;
        for (int a = 0; a < 3; ++a) {
            size[a] = are_keys ? piece.run[a]->keys : piece.run[a]->queries;
            stride[a] = operand.axis[a] * piece.run[a]->step;
        }
        for (int64_t i = 0; i < size[0]; ++i)
            for (int64_t j = 0; j < size[1]; ++j)
                for (int64_t k = 0; k < size[2]; ++k) *to++ = i * stride[0] + j * stride[1] + k * stride[2];
    }

    VICINAL_INLINE int64_t operator[](int64_t token) const { return base + at[token]; }
};

// Asks for a share of what the next piece reads, or writes: strided tokens come line by line from many pages, where no
// machine sees by itself what comes next.
template <bool IS_WRITTEN = false>
VICINAL_INLINE void ask_for_share(const DensePlaces& places, int64_t bytes, Share share) {
    if (places.next < 0 || !places.operand.data) return;
    const char* data = places.operand.data + places.next * bytes;
    const int64_t size = places.operand.dim * bytes;
    for (int64_t i = share.begin; i < share.begin + share.size; ++i)
        for (int64_t byte = 0; byte < size; byte += 64) {
            if constexpr (IS_WRITTEN)
                VICINAL_PREFETCH_TO_WRITE(data + places.at[i] * bytes + byte);
            else
                VICINAL_PREFETCH_FAR(data + places.at[i] * bytes + byte);
        }
}

// Rows of a group in the order of its tokens, `padded` floats apart, times `factor`.
template <class S>
VICINAL_INLINE void gather_rows(int64_t dtype, const DensePlaces& places, Share share, int64_t padded, float factor, float* to) {
    constexpr int W = S::LANES;
    const Operand& operand = places.operand;
    const typename S::F by = S::all(factor);
    const bool is_plain = dtype == VICINAL_FLOAT32 && operand.channel == 1 && operand.dim == padded;
    for (int64_t i = share.begin; i < share.begin + share.size; ++i, to += padded) {
        if (is_plain) {
            const float* from = reinterpret_cast<const float*>(operand.data) + places[i];
            for (int64_t d = 0; d < padded; d += W) S::store(to + d, S::mul(S::load(from + d), by));
            continue;
        }
        load_row<S>(dtype, operand, places[i], to);
        for (int64_t d = operand.dim; d < padded; ++d) to[d] = 0.0f;
        if (factor != 1.0f)
            for (int64_t d = 0; d < padded; d += W) S::store(to + d, S::mul(S::load(to + d), by));
    }
}

// to[d * width + token], zero from the last token on; rows that cannot be read in place go by way of `rows`, which has
// room for a vector of them.
template <class S>
VICINAL_INLINE void gather_columns(int64_t dtype, const DensePlaces& places, int64_t tokens, int64_t width, float* rows,
                                   const float* zeros, float* to) {
    constexpr int W = S::LANES;
    const Operand& operand = places.operand;
    const int64_t dim = operand.dim, padded = round_up(dim, W);
    const bool in_place = dtype == VICINAL_FLOAT32 && operand.channel == 1;
    for (int64_t begin = 0; begin < width; begin += W) {
        const float* from[W];
        for (int lane = 0; lane < W; ++lane) {
            from[lane] = zeros;
            if (begin + lane >= tokens) continue;
            const int64_t place = places[begin + lane];
            from[lane] = in_place ? reinterpret_cast<const float*>(operand.data) + place : rows + lane * padded;
            if (!in_place) load_row<S>(dtype, operand, place, rows + lane * padded);
        }
        int64_t d = 0;
        for (; d + W <= dim; d += W) S::transpose(from, d, to + d * width + begin, width);
        for (; d < dim; ++d)
            for (int lane = 0; lane < W; ++lane) to[d * width + begin + lane] = from[lane][d];
    }
}

// ---- bias

// Numbers of all pairs of a group: the bias, or sums of its gradient. A slot for each shape of groups and head where that
// is little memory, so that heads may take turns; else one, which is written anew when shape or head change.
struct PairSlots {
    struct Note {
        int64_t head, shape;
    };
    int64_t floats;  // of a slot
    int64_t slots;
    Note* notes;     // whose numbers a slot holds; head -1: nobody's
    float* pairs;
};

VICINAL_INLINE int64_t slot_floats(const DenseJob& job, int lanes) {
    return job.most_queries * round_up(job.most_keys, lanes) + lanes;  // rows are written beyond their ends
}

VICINAL_INLINE int64_t slots_bytes(const DenseJob& job, int lanes) {
    return job.pair_slots * (static_cast<int64_t>(sizeof(PairSlots::Note)) + slot_floats(job, lanes) * 4) + 128;
}

VICINAL_INLINE PairSlots take_slots(const DenseJob& job, int lanes, Arena& arena) {
    PairSlots to;
    to.floats = slot_floats(job, lanes);
    to.slots = job.pair_slots;
    to.notes = arena.take<PairSlots::Note>(to.slots);
    to.pairs = arena.take<float>(to.slots * to.floats);
    return to;
}

VICINAL_INLINE void clear_notes(PairSlots& slots) {
    for (int64_t i = 0; i < slots.slots; ++i) slots.notes[i].head = -1;
}

VICINAL_INLINE int64_t shape_of(const DenseJob& job, const Piece& piece) {
    return (piece.run[0]->shape * job.num_shapes[1] + piece.run[1]->shape) * static_cast<int64_t>(job.num_shapes[2]) +
           piece.run[2]->shape;
}

VICINAL_INLINE int64_t slot_of(const DenseJob& job, const Piece& piece) {
    return job.pair_slots == 1 ? 0 : shape_of(job, piece) * job.heads + piece.head - job.first_head;
}

VICINAL_INLINE int64_t bias_size(const DenseJob& job) {
    return static_cast<int64_t>(job.bias_length[0]) * job.bias_length[1] * job.bias_length[2];
}

// Where the first key of a row of keys reads the bias of a query.
VICINAL_INLINE int64_t bias_place(const DenseJob& job, const Piece& piece, const int64_t* query, int64_t plane, int64_t row) {
    const int64_t at = (piece.run[0]->bias[query[0]] + plane) * job.bias_length[1] + piece.run[1]->bias[query[1]] + row;
    return at * job.bias_length[2] + piece.run[2]->bias[query[2]];
}

// The tables of all heads times log2(e), with room to read over their ends, and what was written out of them. Kept by the
// thread for all its work of one call.
struct ThreadBias {
    const float* tables = nullptr;
    int64_t table_floats;
    PairSlots slots;
};

template <class S>
VICINAL_INLINE ThreadBias take_bias(const DenseJob& job, const Workspace& workspace) {
    ThreadBias bias;
    if (!job.bias) return bias;
    const int64_t size = bias_size(job);
    bias.table_floats = size + S::LANES;
    char* memory = static_cast<char*>(
        workspace.get(DENSE_BIAS, 64 + 64 + bias.table_floats * job.heads * 4 + slots_bytes(job, S::LANES)));
    int64_t* serial = reinterpret_cast<int64_t*>(memory);
    Arena arena{memory + 64};
    float* tables = arena.take<float>(bias.table_floats * job.heads);
    bias.tables = tables;
    bias.slots = take_slots(job, S::LANES, arena);
    if (*serial == job.serial) return bias;
    *serial = job.serial;
    clear_notes(bias.slots);
    for (int64_t head = 0; head < job.heads; ++head)
        for (int64_t i = 0; i < bias.table_floats; ++i)
            tables[head * bias.table_floats + i] = i < size ? job.bias[head * size + i] * LOG2_E : 0.0f;
    return bias;
}

// The bias of a group's pairs, [query][width]; null where there is none.
template <class S>
VICINAL_APART const float* bias_of_pairs(const DenseJob& job, const Piece& piece, int64_t width, const ThreadBias& bias) {
    if (!bias.tables) return nullptr;
    const int64_t slot = slot_of(job, piece), shape = shape_of(job, piece);
    float* pairs = bias.slots.pairs + slot * bias.slots.floats;
    PairSlots::Note& note = bias.slots.notes[slot];
    if (note.head == piece.head && note.shape == shape) return pairs;
    note = {piece.head, shape};
    const float* table = bias.tables + (piece.head - job.first_head) * bias.table_floats;
    const DenseRun *a = piece.run[0], *b = piece.run[1], *c = piece.run[2];
    int64_t query[3];
    float* to = pairs;
    for (query[0] = 0; query[0] < a->queries; ++query[0])
        for (query[1] = 0; query[1] < b->queries; ++query[1])
            for (query[2] = 0; query[2] < c->queries; ++query[2], to += width) {
                float* row = to;
                for (int64_t plane = 0; plane < a->keys; ++plane)
                    for (int64_t key_row = 0; key_row < b->keys; ++key_row, row += c->keys) {
                        // beyond the row's end stands what is written next
                        const float* from = table + bias_place(job, piece, query, plane, key_row);
                        for (int64_t i = 0; i < c->keys; i += S::LANES) S::store(row + i, S::load(from + i));
                    }
            }
    return pairs;
}

// Adds a group's pairs to a head's table, which has room beyond its end.
template <class S>
VICINAL_APART void add_to_table(const DenseJob& job, const Piece& piece, int64_t width, const float* pairs, float* table) {
    constexpr int W = S::LANES;
    const DenseRun *a = piece.run[0], *b = piece.run[1], *c = piece.run[2];
    const int64_t keys = c->keys;
    int64_t query[3];
    for (int64_t plane = 0; plane < a->keys; ++plane)
        for (int64_t key_row = 0; key_row < b->keys; ++key_row) {
            const float* from = pairs + (plane * b->keys + key_row) * keys;
            for (query[0] = 0; query[0] < a->queries; ++query[0])
                for (query[2] = 0; query[2] < c->queries; ++query[2])
                    for (query[1] = 0; query[1] < b->queries; ++query[1]) {  // neighbors in turn read other rows of the table
                        const int64_t row = (query[0] * b->queries + query[1]) * c->queries + query[2];
                        float* to = table + bias_place(job, piece, query, plane, key_row);
                        for (int64_t i = 0; i < keys; i += W) {
                            const uint32_t bits = keys - i < W ? (1u << (keys - i)) - 1 : (W < 32 ? (1u << W) - 1 : ~0u);
                            const typename S::F sum = S::select(bits, S::load(from + row * width + i), S::zero());
                            S::store(to + i, S::add(S::load(to + i), sum));
                        }
                    }
        }
}

// Sums of gradients of scores on their way to the tables of all heads.
struct GradientSums {
    PairSlots slots;
    Piece* pieces;  // for each slot one of its shape
    float* tables;
    int64_t table_floats;
};

template <class S>
VICINAL_INLINE void empty_slot(const DenseJob& job, GradientSums& sums, int64_t slot) {
    PairSlots::Note& note = sums.slots.notes[slot];
    if (note.head < 0) return;
    const Piece& piece = sums.pieces[slot];
    add_to_table<S>(job, piece, round_up(piece.keys, S::LANES), sums.slots.pairs + slot * sums.slots.floats,
                    sums.tables + (note.head - job.first_head) * sums.table_floats);
    note.head = -1;
}

template <class S>
VICINAL_INLINE void add_pairs(const DenseJob& job, const Piece& piece, int64_t width, const float* grads, GradientSums& sums) {
    const int64_t slot = slot_of(job, piece), shape = shape_of(job, piece);
    PairSlots::Note& note = sums.slots.notes[slot];
    if (note.head != piece.head || note.shape != shape) empty_slot<S>(job, sums, slot);
    const bool is_fresh = note.head < 0;
    float* to = sums.slots.pairs + slot * sums.slots.floats;
    for (int64_t i = 0; i < piece.queries * width; i += S::LANES) {
        const typename S::F grad = S::load(grads + i);
        S::store(to + i, is_fresh ? grad : S::add(S::load(to + i), grad));
    }
    note = {piece.head, shape};
    sums.pieces[slot] = piece;
}

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

// The pieces of one call of a kernel, with what the next one asks for.
template <class Use>
VICINAL_INLINE void each_piece(const DenseJob& job, int64_t begin, int64_t end, const Use& use) {
    Piece piece = piece_of(job, begin), last{};
    for (int64_t number = begin; number < end; ++number) {
        const bool is_last = number + 1 == end;
        const Piece next = is_last ? piece : piece_of(job, number + 1);
        use(piece, number == begin || !piece.has_shape_of(last), !is_last && next.has_shape_of(piece) ? &next : nullptr);
        last = piece;
        piece = next;
    }
}

VICINAL_INLINE void go_to(DensePlaces& places, const Piece& piece, bool has_new_shape, const Piece* next, int64_t shared) {
    if (!places.operand.data) return;
    if (has_new_shape) places.take_shape(piece);
    places.base = places.base_of(piece, piece.head / shared);
    places.next = next ? places.base_of(*next, next->head / shared) : -1;
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

template <class S>
VICINAL_INLINE void scatter_rows(int64_t dtype, const DensePlaces& places, int64_t tokens, int64_t padded, const float* from, float factor) {
    if (!places.operand.data) return;
    for (int64_t i = 0; i < tokens; ++i) store_row<S>(dtype, places.operand, places[i], from + i * padded, factor);
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
    if (grad_bias) {
        const int64_t pieces_bytes = job.pair_slots * static_cast<int64_t>(sizeof(Piece)) + 64;
        Arena more{static_cast<char*>(workspace.get(DENSE_SUMS, 64 + slots_bytes(job, W) + pieces_bytes)) + 64};
        grad_sums.slots = take_slots(job, W, more);
        grad_sums.pieces = more.take<Piece>(job.pair_slots);
        grad_sums.tables = grad_bias;
        grad_sums.table_floats = bias_size(job) + W;
        clear_notes(grad_sums.slots);
    }
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
