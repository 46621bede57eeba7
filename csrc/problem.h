// A call as the kernels see it: read and checked once, axes padded to three, tables unpacked into views.

#ifndef VICINAL_PROBLEM_H
#define VICINAL_PROBLEM_H

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "vicinal.h"

namespace vicinal {

constexpr int AXES = 3;  // missing axes stand first and have length 1

// Thrown for what a caller did wrong; the C functions turn it into VICINAL_BAD_ARGUMENT.
struct BadArgument : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A tensor with its axes in the order batch, three axes of the grid, heads, channels. Extra tokens lie along the last
// axis of the grid.
struct View {
    char* data = nullptr;
    int64_t batch = 0;
    int64_t axis[AXES] = {0, 0, 0};
    int64_t head = 0;
    int64_t channel = 0;
    explicit operator bool() const { return data != nullptr; }
};

// One axis of one union member: query i sees start[i], start[i] + step, ..., count[i] of them (modulo length if wraps).
struct AxisTable {
    int64_t queries;  // the sample's own; entries beyond are not to be read
    int64_t length;   // keys, the sample's own
    int64_t step;
    bool wraps;
    const int32_t* start;
    const int32_t* count;
    const int32_t* center;
};

struct Member {
    AxisTable axis[AXES];
};

struct Group {
    int64_t first_head;
    int64_t heads;
    bool takes_bias;
    int64_t bias_length[AXES];  // 1 on missing axes
    int64_t bias_begin;         // where the group's tables begin in the bias vector
};

struct DenseGroups;  // of one head group (dense.cpp)

struct Problem {
    vicinal_call call;
    bool is_double;
    int element_bytes;
    int64_t grid[AXES], key_grid[AXES];
    std::vector<Group> groups;
    // members[row][group]: row is the sample, or 0 where all samples share one row
    std::vector<std::vector<std::vector<Member>>> members;
    View query, key, value, extra_key, extra_value, out, lse, grad_out, grad_lse, row_sums;
    View grad_query, grad_key, grad_value, grad_extra_key, grad_extra_value;
    const void* bias = nullptr;
    void* grad_bias = nullptr;
    const int64_t* extra_lengths = nullptr;
    std::shared_ptr<const std::vector<DenseGroups>> dense;  // of all head groups; null where dense_find found none

    const std::vector<Member>& members_of(int64_t sample, int64_t group) const {
        return members[members.size() == 1 ? 0 : sample][group];
    }
    int64_t extra_length(int64_t sample) const {
        return extra_lengths ? extra_lengths[sample] : call.extra_tokens;
    }
};

// What a call is read for. A description needs no tensors: their pointers are not looked at.
enum class Purpose { FORWARD, BACKWARD, DESCRIBE };

// Reads and checks a call; throws BadArgument. Every index that the kernels take from it is in range afterwards.
Problem read_problem(const vicinal_call& call, Purpose purpose);

// The simple strategy: loops over queries and keys, any dtype, one number at a time. Slow and always right.
void simple_forward(const Problem& problem);
void simple_backward(const Problem& problem);
void simple_describe(const Problem& problem, vicinal_description* groups);

// The tiled strategy: packed panels and register tiles, all dtypes but float64.
void tiles_forward(const Problem& problem);
void tiles_backward(const Problem& problem);
void tiles_describe(const Problem& problem, vicinal_description* groups);
void tiles_shrink_units(int64_t bytes);

// The dense strategy: products of whole groups, for patterns that fall into closed groups (dense.h). These are found
// first, for all the rest; it must only be asked where there are some, and suits what it is quicker at than tiles.
void dense_find(Problem& problem, bool is_backward);
bool dense_suits(const Problem& problem, bool is_backward);
void dense_forward(const Problem& problem);
void dense_backward(const Problem& problem);
void dense_describe(const Problem& problem, vicinal_description* groups);

// The strategy for a problem where the caller leaves it open.
vicinal_strategy choose_strategy(const Problem& problem, bool is_backward);

}  // namespace vicinal

#endif
