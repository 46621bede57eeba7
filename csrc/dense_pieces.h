// A piece of the dense strategy's work: where its tokens stand, copies of them that lie together, and the bias of its
// pairs.

#ifndef VICINAL_DENSE_PIECES_H
#define VICINAL_DENSE_PIECES_H

#include "dense.h"
#include "dense_products.h"

namespace vicinal {
namespace {

enum DenseSlot { DENSE_ROOM = 8, DENSE_BIAS, DENSE_SUMS };

// ---- pieces and their places

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

VICINAL_INLINE void go_to(DensePlaces& places, const Piece& piece, bool has_new_shape, const Piece* next, int64_t shared) {
    if (!places.operand.data) return;
    if (has_new_shape) places.take_shape(piece);
    places.base = places.base_of(piece, piece.head / shared);
    places.next = next ? places.base_of(*next, next->head / shared) : -1;
}

// ---- rows of tokens

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

template <class S>
VICINAL_INLINE void scatter_rows(int64_t dtype, const DensePlaces& places, int64_t tokens, int64_t padded, const float* from, float factor) {
    if (!places.operand.data) return;
    for (int64_t i = 0; i < tokens; ++i) store_row<S>(dtype, places.operand, places[i], from + i * padded, factor);
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
    // rows are written beyond their ends, and some kernels look at up to four queries at once
    return (job.most_queries + 3) * round_up(job.most_keys, lanes) + lanes;
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
            tables[head * bias.table_floats + i] = i < size ? with_plain_nan(job.bias[head * size + i] * LOG2_E) : 0.0f;
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

VICINAL_INLINE GradientSums take_sums(const DenseJob& job, int lanes, float* tables, const Workspace& workspace) {
    GradientSums sums;
    const int64_t pieces_bytes = job.pair_slots * static_cast<int64_t>(sizeof(Piece)) + 64;
    Arena arena{static_cast<char*>(workspace.get(DENSE_SUMS, 64 + slots_bytes(job, lanes) + pieces_bytes)) + 64};
    sums.slots = take_slots(job, lanes, arena);
    sums.pieces = arena.take<Piece>(job.pair_slots);
    sums.tables = tables;
    sums.table_floats = bias_size(job) + lanes;
    clear_notes(sums.slots);
    return sums;
}

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

}  // namespace
}  // namespace vicinal

#endif
