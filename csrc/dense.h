// The dense strategy: queries that all see the same keys, and all of them, are a group, and a group is five matrix
// products. Windows, shifted or not, are such groups; so are rows and columns that see themselves, grids of strided
// tokens, and dilated neighborhoods that reach over their whole residue class.
//
// Plain data, because the kernels are compiled once per instruction set and must share no code with the rest.

#ifndef VICINAL_DENSE_H
#define VICINAL_DENSE_H

#include <cstddef>
#include <cstdint>

#include "tiles.h"

namespace vicinal {

constexpr int64_t DENSE_MOST_TOKENS = 256;  // queries or keys of a group

// A group's queries and keys on one axis: `queries` of them from coordinate `query` on, `step` apart, and so the keys.
struct DenseRun {
    int32_t query, queries, key, keys, step;
    int32_t shape;        // of few: the same where sizes, step and bias places are
    const int32_t* bias;  // [queries]: where the first key reads the bias; null where there is none
};

// One head group. A piece of work is a number: of a group of a head of a sample.
struct DenseJob {
    int64_t dtype;
    const DenseRun* runs[3];
    int32_t num_runs[3], num_shapes[3];
    int64_t groups, samples, heads, first_head;          // heads of queries; in the backward of keys
    int64_t shared;                                      // query heads of a key head
    int64_t most_queries, most_keys;                     // of a group
    bool heads_first;                                    // pieces of one head follow each other, and of one shape
    int64_t pair_slots;                                  // for numbers of all pairs: 1, or shapes times heads
    int64_t serial;                                      // tells calls apart, for what threads remember
    float scale;
    const float* bias;  // [heads, *bias_length], null where there is none
    int32_t bias_length[3];
    Operand query, key, value, out, lse, grad_out, grad_lse, grad_query, grad_key, grad_value;  // lse: of one channel
};

struct DenseKernels {
    int lanes;
    void (*forward)(const DenseJob& job, int64_t begin, int64_t end, const Workspace& workspace);
    // grad_bias: tables [heads][*bias_length and LANES numbers of room] to add to; or null
    void (*backward)(const DenseJob& job, int64_t begin, int64_t end, float* grad_bias, const Workspace& workspace);
};

const DenseKernels* dense_base_kernels();
const DenseKernels* dense_avx2_kernels();  // null where the compiler could not build them
const DenseKernels* dense_avx512_kernels();
const DenseKernels* dense_amx_kernels();  // for bfloat16 only

}  // namespace vicinal

#endif
