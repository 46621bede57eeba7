// The C interface of Vicinal's CPU kernels: plain integers and pointers, no torch, nothing of C++.
//
// A caller fills one `vicinal_call`, whose fields are all eight bytes wide so that any language can pack it, and
// calls `vicinal_attend` or `vicinal_attend_backward`. Both return VICINAL_OK, or another code and a message. Whoever
// makes many calls that differ in addresses only keeps one `vicinal_call` and passes `vicinal_places` beside it.

#ifndef VICINAL_H
#define VICINAL_H

#include <stdint.h>

#if defined(_WIN32)
#define VICINAL_EXPORT __declspec(dllexport)
#else
#define VICINAL_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define VICINAL_ABI 2

enum vicinal_status { VICINAL_OK = 0, VICINAL_BAD_ARGUMENT = 1, VICINAL_NO_MEMORY = 2, VICINAL_FAILED = 3 };
enum vicinal_dtype { VICINAL_FLOAT32 = 0, VICINAL_BFLOAT16 = 1, VICINAL_FLOAT16 = 2, VICINAL_FLOAT64 = 3 };
enum vicinal_strategy { VICINAL_AUTO = 0, VICINAL_SIMPLE = 1, VICINAL_TILES = 2, VICINAL_DENSE = 3 };
enum vicinal_isa { VICINAL_BEST = 0, VICINAL_BASE = 1, VICINAL_AVX2 = 2, VICINAL_AVX512 = 3, VICINAL_AVX512_BF16 = 4, VICINAL_AMX = 5 };

// A tensor in its natural order of axes, with strides counted in elements; `data` 0 means there is none.
typedef struct {
    int64_t data;
    int64_t strides[6];
} vicinal_tensor;

// [axis] means the first `rank` entries count. Tensors and what they hold:
//   query, out, grad_out, grad_query  [batch, *grid, heads, head_dim or value_dim]
//   key, value, their gradients       [batch, *key_grid, kv_heads, head_dim or value_dim]
//   extra_key, extra_value, ...       [batch, extra_tokens, kv_heads, head_dim or value_dim]
//   lse, grad_lse                     [batch, *grid, heads]; float64 where dtype is float64, else float32;
//                                     a forward without lse does not write it
//   bias, grad_bias                   all groups' tables in one contiguous vector, dtype as lse; bias_words entries
//   extra_lengths                     int64 [batch], contiguous
//   tables                            int32 [table_rows, table_words], contiguous; table_rows is 1 or batch
//   layout                            int64 [layout_words], see src/vicinal/ops/packing.py
typedef struct {
    int64_t version;
    int64_t dtype;
    int64_t rank;
    int64_t batch;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t value_dim;
    int64_t extra_tokens;
    int64_t grid[3];
    int64_t key_grid[3];
    int64_t tables;
    int64_t table_rows;
    int64_t table_words;
    int64_t layout;
    int64_t layout_words;
    int64_t bias_words;
    int64_t threads;
    int64_t strategy;
    int64_t isa;
    double scale;
    vicinal_tensor query;
    vicinal_tensor key;
    vicinal_tensor value;
    vicinal_tensor bias;
    vicinal_tensor extra_key;
    vicinal_tensor extra_value;
    vicinal_tensor extra_lengths;
    vicinal_tensor out;
    vicinal_tensor lse;
    // the rest is for the backward; a gradient without data is not computed
    vicinal_tensor grad_out;
    vicinal_tensor grad_lse;
    vicinal_tensor grad_query;
    vicinal_tensor grad_key;
    vicinal_tensor grad_value;
    vicinal_tensor grad_bias;
    vicinal_tensor grad_extra_key;
    vicinal_tensor grad_extra_value;
} vicinal_call;

// Where the tensors of a call lie, and on how many threads it runs: replaces what its `vicinal_call` says of that. Extra
// tokens stay where that says. The second half is for the backward.
typedef struct {
    int64_t threads;
    int64_t query;
    int64_t key;
    int64_t value;
    int64_t bias;
    int64_t out;
    int64_t lse;
    int64_t grad_out;
    int64_t grad_lse;
    int64_t grad_query;
    int64_t grad_key;
    int64_t grad_value;
    int64_t grad_bias;
} vicinal_places;

// What `vicinal_describe` tells of a problem: one entry per head group.
typedef struct {
    int64_t strategy;
    int64_t isa;
    int64_t lanes;            // numbers in a vector register
    int64_t rows_per_vector;  // a vector of keys is rows_per_vector x (lanes / rows_per_vector) keys of the last two axes
    int64_t tiles;            // query tiles of one head
    int64_t pairs;            // (query, key) pairs that count, of one head
    int64_t computed;         // pairs that are computed, of one head
    int64_t blocks;           // blocks of tiles of one head that share packed keys
} vicinal_description;

VICINAL_EXPORT int64_t vicinal_abi(void);
VICINAL_EXPORT int64_t vicinal_best_isa(void);
VICINAL_EXPORT int64_t vicinal_workspace_bytes(void);  // held by the calling thread
VICINAL_EXPORT void vicinal_poison_workspace(void);     // for tests: fills it with NaN, now and whenever it grows
VICINAL_EXPORT void vicinal_shrink_units(int64_t bytes);  // for tests: and panels, to so many bytes; 0: as is best
VICINAL_EXPORT int64_t vicinal_attend(const vicinal_call* call, char* message, int64_t message_bytes);
VICINAL_EXPORT int64_t vicinal_attend_backward(const vicinal_call* call, char* message, int64_t message_bytes);
VICINAL_EXPORT int64_t vicinal_attend_at(const vicinal_call* call, const vicinal_places* places, char* message,
                                         int64_t message_bytes);
VICINAL_EXPORT int64_t vicinal_attend_backward_at(const vicinal_call* call, const vicinal_places* places, char* message,
                                                  int64_t message_bytes);
VICINAL_EXPORT int64_t vicinal_describe(const vicinal_call* call, vicinal_description* groups, int64_t num_groups,
                                        char* message, int64_t message_bytes);

#ifdef __cplusplus
}
#endif

#endif
