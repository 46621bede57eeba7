// The simple strategy. One query at a time, all sums in double whatever the tensors hold: written to be right.
//
// The forward splits the queries over threads. The backward splits samples and key heads, and within one of them
// goes through the queries in order, so that every gradient is summed in one order whatever the number of threads.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "numbers.h"
#include "problem.h"
#include "threads.h"

namespace vicinal {
namespace {

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr int64_t BIAS_PARTS = 16;  // sums of the bias gradient over the batch that are held at the same time

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

double load(double number) { return number; }
double load(float number) { return number; }
double load(BFloat16 number) { return float_of_bfloat16(number.bits); }
double load(Float16 number) { return float_of_float16(number.bits); }
void store(double& place, double number) { place = number; }
void store(float& place, double number) { place = float(number); }
void store(BFloat16& place, double number) { place.bits = bfloat16_of_float(float(number)); }
void store(Float16& place, double number) { place.bits = float16_of_float(float(number)); }

template <typename Work>
void with_type(int64_t dtype, const Work& work) {
    if (dtype == VICINAL_FLOAT32) work(float());
    if (dtype == VICINAL_BFLOAT16) work(BFloat16());
    if (dtype == VICINAL_FLOAT16) work(Float16());
    if (dtype == VICINAL_FLOAT64) work(double());
}

struct Position {
    int64_t at[AXES];
};

template <typename T>
T* row(const View& view, int64_t sample, const Position& position, int64_t head) {
    int64_t offset = sample * view.batch + head * view.head;
    for (int axis = 0; axis < AXES; ++axis) offset += position.at[axis] * view.axis[axis];
    return reinterpret_cast<T*>(view.data) + offset;
}

template <typename T>
void read(double* to, const View& view, int64_t sample, const Position& position, int64_t head, int64_t count) {
    const T* from = row<T>(view, sample, position, head);
    for (int64_t channel = 0; channel < count; ++channel) to[channel] = load(from[channel * view.channel]);
}

template <typename T>
void write(const View& view, int64_t sample, const Position& position, int64_t head, const double* from,
           int64_t count) {
    if (!view) return;
    T* to = row<T>(view, sample, position, head);
    for (int64_t channel = 0; channel < count; ++channel) store(to[channel * view.channel], from[channel]);
}

// Log-sum-exps and the like: double where the tensors are, else float.
double read_wide(const Problem& problem, const View& view, int64_t sample, const Position& position, int64_t head) {
    return problem.is_double ? *row<double>(view, sample, position, head) : *row<float>(view, sample, position, head);
}

double bias_at(const Problem& problem, int64_t index) {
    return problem.is_double ? static_cast<const double*>(problem.bias)[index]
                             : static_cast<const float*>(problem.bias)[index];
}

template <typename T>
double dot(const double* left, const View& view, int64_t sample, const Position& position, int64_t head,
           int64_t count) {
    const T* right = row<T>(view, sample, position, head);
    double sum = 0;
    for (int64_t channel = 0; channel < count; ++channel) sum += left[channel] * load(right[channel * view.channel]);
    return sum;
}

bool sees(const AxisTable& table, int64_t query, int64_t key) {
    int64_t distance = key - table.start[query];
    if (table.wraps) distance = (distance % table.length + table.length) % table.length;
    return distance >= 0 && distance % table.step == 0 && distance / table.step < table.count[query];
}

bool sees(const Member& member, const Position& query, const Position& key) {
    for (int axis = 0; axis < AXES; ++axis)
        if (!sees(member.axis[axis], query.at[axis], key.at[axis])) return false;
    return true;
}

// Calls visit(key, index of the pair in one head's bias table) for every key that a query sees, each once: a later
// member leaves out what an earlier one has.
template <typename Visit>
void for_each_key(const std::vector<Member>& members, const Group& group, const Position& query, const Visit& visit) {
    for (size_t number = 0; number < members.size(); ++number) {
        const AxisTable* axis = members[number].axis;
        int64_t start[AXES], count[AXES], bias[AXES];
        for (int a = 0; a < AXES; ++a) {
            start[a] = axis[a].start[query.at[a]];
            count[a] = axis[a].count[query.at[a]];
            bias[a] = 0;
            if (group.takes_bias)
                bias[a] = (start[a] - axis[a].center[query.at[a]]) / axis[a].step + group.bias_length[a] / 2;
        }
        const auto place = [&](int a, int64_t index) {
            const int64_t key = start[a] + axis[a].step * index, length = axis[a].length;
            return axis[a].wraps ? (key % length + length) % length : key;
        };
        Position key;
        for (int64_t i = 0; i < count[0]; ++i) {
            key.at[0] = place(0, i);
            for (int64_t j = 0; j < count[1]; ++j) {
                key.at[1] = place(1, j);
                const int64_t line = ((bias[0] + i) * group.bias_length[1] + bias[1] + j) * group.bias_length[2];
                for (int64_t k = 0; k < count[2]; ++k) {
                    key.at[2] = place(2, k);
                    bool is_new = true;
                    for (size_t earlier = 0; earlier < number && is_new; ++earlier)
                        is_new = !sees(members[earlier], query, key);
                    if (is_new) visit(key, line + bias[2] + k);
                }
            }
        }
    }
}

// One head of one sample.
struct Place {
    int64_t sample, head, kv_head;
    const Group* group;
    const std::vector<Member>* members;
    int64_t bias_begin;  // of the head's own bias table
    int64_t extra_length;
    const AxisTable* own;  // three tables that tell the sample's own sizes

    Place(const Problem& problem, int64_t sample, int64_t head) : sample(sample), head(head) {
        size_t index = 0;
        while (head >= problem.groups[index].first_head + problem.groups[index].heads) ++index;
        group = &problem.groups[index];
        members = &problem.members_of(sample, int64_t(index));
        own = members->front().axis;
        kv_head = head / (problem.call.heads / problem.call.kv_heads);
        const int64_t* length = group->bias_length;
        bias_begin = group->bias_begin + (head - group->first_head) * length[0] * length[1] * length[2];
        extra_length = problem.extra_length(sample);
    }

    bool has_query(const Position& position) const {
        for (int axis = 0; axis < AXES; ++axis)
            if (position.at[axis] >= own[axis].queries) return false;
        return true;
    }
};

template <typename Visit>
void for_each_position(const int64_t* grid, const Visit& visit) {
    Position position;
    for (position.at[0] = 0; position.at[0] < grid[0]; ++position.at[0])
        for (position.at[1] = 0; position.at[1] < grid[1]; ++position.at[1])
            for (position.at[2] = 0; position.at[2] < grid[2]; ++position.at[2]) visit(position);
}

// A softmax-weighted mean that grows by one term at a time.
struct Mean {
    double top = -INF, total = 0;
    double* sum;
    int64_t count;

    template <typename T>
    void add(double score, const View& value, int64_t sample, const Position& key, int64_t head) {
        if (score == -INF) return;  // weighs nothing, also beside nothing else
        if (score > top) {
            const double shrink = total == 0 ? 0 : std::exp(top - score);
            total *= shrink;
            for (int64_t channel = 0; channel < count; ++channel) sum[channel] *= shrink;
            top = score;
        }
        const double weight = std::exp(score - top);
        const T* from = row<T>(value, sample, key, head);
        total += weight;
        for (int64_t channel = 0; channel < count; ++channel)
            sum[channel] += weight * load(from[channel * value.channel]);
    }
};

template <typename T>
void attend_query(const Problem& problem, const Place& place, const Position& query) {
    const int64_t dim = problem.call.head_dim, value_dim = problem.call.value_dim;
    double* row_of_query = static_cast<double*>(workspace(0, size_t(dim + value_dim) * sizeof(double)));
    Mean mean;
    mean.sum = row_of_query + dim;
    mean.count = value_dim;
    std::fill(mean.sum, mean.sum + value_dim, 0.0);
    if (place.has_query(query)) {
        if (dim) read<T>(row_of_query, problem.query, place.sample, query, place.head, dim);
        const auto add = [&](const View& keys, const View& values, const Position& key, double bias) {
            double score = bias;
            if (dim) score += problem.call.scale * dot<T>(row_of_query, keys, place.sample, key, place.kv_head, dim);
            mean.add<T>(score, values, place.sample, key, place.kv_head);
        };
        for_each_key(*place.members, *place.group, query, [&](const Position& key, int64_t pair) {
            add(problem.key, problem.value, key, problem.bias ? bias_at(problem, place.bias_begin + pair) : 0.0);
        });
        for (int64_t token = 0; token < place.extra_length; ++token)
            add(problem.extra_key, problem.extra_value, {{0, 0, token}}, 0.0);
    }
    const bool is_blind = mean.total == 0;
    for (int64_t channel = 0; channel < value_dim; ++channel)
        mean.sum[channel] = is_blind ? 0.0 : mean.sum[channel] / mean.total;
    write<T>(problem.out, place.sample, query, place.head, mean.sum, value_dim);
    if (!problem.lse) return;
    const double lse = is_blind ? -INF : mean.top + std::log(mean.total);
    if (problem.is_double)
        *row<double>(problem.lse, place.sample, query, place.head) = lse;
    else
        *row<float>(problem.lse, place.sample, query, place.head) = float(lse);
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Sums of the gradients of one key head's keys and values, token after token.
struct KeySums {
    const int64_t* grid;
    int64_t dim, value_dim;
    std::vector<double> key, value, extra_key, extra_value;

    KeySums(const Problem& problem)
        : grid(problem.key_grid), dim(problem.call.head_dim), value_dim(problem.call.value_dim) {
        const int64_t tokens = grid[0] * grid[1] * grid[2], extra = problem.call.extra_tokens;
        if (problem.grad_key) key.resize(size_t(tokens * dim));
        if (problem.grad_value) value.resize(size_t(tokens * value_dim));
        if (problem.grad_extra_key) extra_key.resize(size_t(extra * dim));
        if (problem.grad_extra_value) extra_value.resize(size_t(extra * value_dim));
    }

    void clear() {
        for (std::vector<double>* sums : {&key, &value, &extra_key, &extra_value})
            std::fill(sums->begin(), sums->end(), 0.0);
    }

    int64_t token(const Position& at) const { return (at.at[0] * grid[1] + at.at[1]) * grid[2] + at.at[2]; }

    template <typename T>
    void write_out(const Problem& problem, int64_t sample, int64_t head) const {
        for_each_position(grid, [&](const Position& at) {
            if (!key.empty()) write<T>(problem.grad_key, sample, at, head, &key[size_t(token(at) * dim)], dim);
            if (!value.empty())
                write<T>(problem.grad_value, sample, at, head, &value[size_t(token(at) * value_dim)], value_dim);
        });
        for (int64_t extra = 0; extra < problem.call.extra_tokens; ++extra) {
            const Position at = {{0, 0, extra}};
            if (!extra_key.empty())
                write<T>(problem.grad_extra_key, sample, at, head, &extra_key[size_t(extra * dim)], dim);
            if (!extra_value.empty())
                write<T>(problem.grad_extra_value, sample, at, head, &extra_value[size_t(extra * value_dim)],
                         value_dim);
        }
    }
};

void add_scaled(std::vector<double>& sums, int64_t token, double factor, const double* what, int64_t count) {
    if (sums.empty()) return;
    double* sum = &sums[size_t(token * count)];
    for (int64_t channel = 0; channel < count; ++channel) sum[channel] += factor * what[channel];
}

// Rows of one query, and what is summed up for it.
struct Rows {
    std::vector<double> query, grad_out, grad_query;
    Rows(const Problem& problem)
        : query(size_t(problem.call.head_dim)),
          grad_out(size_t(problem.call.value_dim)),
          grad_query(size_t(problem.call.head_dim)) {}
};

template <typename T>
void backward_query(const Problem& problem, const Place& place, const Position& query, Rows& rows, KeySums& sums,
                    double* bias_sums) {
    const int64_t dim = problem.call.head_dim, value_dim = problem.call.value_dim, sample = place.sample;
    std::fill(rows.grad_query.begin(), rows.grad_query.end(), 0.0);
    const double lse = place.has_query(query) ? read_wide(problem, problem.lse, sample, query, place.head) : -INF;
    if (lse == -INF) {
        write<T>(problem.grad_query, sample, query, place.head, rows.grad_query.data(), dim);
        return;
    }
    if (dim) read<T>(rows.query.data(), problem.query, sample, query, place.head, dim);
    double row_sum = problem.grad_lse ? -read_wide(problem, problem.grad_lse, sample, query, place.head) : 0.0;
    if (problem.grad_out) {
        read<T>(rows.grad_out.data(), problem.grad_out, sample, query, place.head, value_dim);
        row_sum += dot<T>(rows.grad_out.data(), problem.out, sample, query, place.head, value_dim);
    }
    // the gradient of one pair's score; adds the pair's part to the gradients of the query, the key and the value
    const auto add = [&](const View& keys, const View& values, const Position& key, double bias, int64_t token,
                         std::vector<double>& key_sums, std::vector<double>& value_sums) {
        double score = bias, slope = 0;
        if (dim) score += problem.call.scale * dot<T>(rows.query.data(), keys, sample, key, place.kv_head, dim);
        const double weight = std::exp(score - lse);
        if (problem.grad_out) slope = dot<T>(rows.grad_out.data(), values, sample, key, place.kv_head, value_dim);
        const double grad = weight * (slope - row_sum), scaled = grad * problem.call.scale;
        if (problem.grad_query) {
            const T* from = row<T>(keys, sample, key, place.kv_head);
            for (int64_t channel = 0; channel < dim; ++channel)
                rows.grad_query[size_t(channel)] += scaled * load(from[channel * keys.channel]);
        }
        add_scaled(key_sums, token, scaled, rows.query.data(), dim);
        if (problem.grad_out) add_scaled(value_sums, token, weight, rows.grad_out.data(), value_dim);
        return grad;
    };
    for_each_key(*place.members, *place.group, query, [&](const Position& key, int64_t pair) {
        const double bias = problem.bias ? bias_at(problem, place.bias_begin + pair) : 0.0;
        const double grad =
            add(problem.key, problem.value, key, bias, sums.token(key), sums.key, sums.value);
        if (bias_sums) bias_sums[place.bias_begin + pair] += grad;
    });
    for (int64_t token = 0; token < place.extra_length; ++token)
        add(problem.extra_key, problem.extra_value, {{0, 0, token}}, 0.0, token, sums.extra_key, sums.extra_value);
    write<T>(problem.grad_query, sample, query, place.head, rows.grad_query.data(), dim);
}

template <typename T>
void backward_as(const Problem& problem) {
    const vicinal_call& call = problem.call;
    const int64_t shared = call.heads / call.kv_heads;
    const int64_t parts = problem.grad_bias ? std::min(call.batch, BIAS_PARTS) : call.batch;
    std::vector<double> bias_sums(problem.grad_bias ? size_t(parts * call.bias_words) : 0);
    parallel_for(parts * call.kv_heads, call.threads, [&](int64_t unit) {
        const int64_t part = unit / call.kv_heads, kv_head = unit % call.kv_heads;
        double* bias = problem.grad_bias ? &bias_sums[size_t(part * call.bias_words)] : nullptr;
        KeySums sums(problem);
        Rows rows(problem);
        for (int64_t sample = part * call.batch / parts; sample < (part + 1) * call.batch / parts; ++sample) {
            sums.clear();
            for (int64_t head = kv_head * shared; head < (kv_head + 1) * shared; ++head) {
                const Place place(problem, sample, head);
                for_each_position(problem.grid, [&](const Position& query) {
                    backward_query<T>(problem, place, query, rows, sums, bias);
                });
            }
            sums.write_out<T>(problem, sample, kv_head);
        }
    });
    for (int64_t word = 0; problem.grad_bias && word < call.bias_words; ++word) {
        double sum = 0;
        for (int64_t part = 0; part < parts; ++part) sum += bias_sums[size_t(part * call.bias_words + word)];
        if (problem.is_double)
            static_cast<double*>(problem.grad_bias)[word] = sum;
        else
            static_cast<float*>(problem.grad_bias)[word] = float(sum);
    }
}

}  // namespace

void simple_forward(const Problem& problem) {
    const vicinal_call& call = problem.call;
    const int64_t* grid = problem.grid;
    const int64_t lines = grid[0] * grid[1];
    // a unit is a line of the grid, or on one axis a piece of it
    const int64_t piece = lines > 1 ? grid[2] : 64, pieces = (grid[2] + piece - 1) / piece;
    with_type(call.dtype, [&](auto number) {
        parallel_for(call.batch * call.heads * lines * pieces, call.threads, [&](int64_t unit) {
            const int64_t begin = unit % pieces * piece, end = std::min(begin + piece, grid[2]);
            const int64_t line = unit / pieces % lines, head = unit / pieces / lines;
            const Place place(problem, head / call.heads, head % call.heads);
            for (int64_t at = begin; at < end; ++at)
                attend_query<decltype(number)>(problem, place, {{line / grid[1], line % grid[1], at}});
        });
    });
}

void simple_backward(const Problem& problem) {
    with_type(problem.call.dtype, [&](auto number) { backward_as<decltype(number)>(problem); });
}

void simple_describe(const Problem& problem, vicinal_description* groups) {
    for (size_t index = 0; index < problem.groups.size(); ++index) {
        const std::vector<Member>& members = problem.members[0][index];
        int64_t pairs = 0, own[AXES];
        for (int axis = 0; axis < AXES; ++axis) own[axis] = members[0].axis[axis].queries;
        if (members.size() == 1) {
            pairs = 1;
            for (const AxisTable& axis : members[0].axis) {
                int64_t seen = 0;
                for (int64_t query = 0; query < axis.queries; ++query) seen += axis.count[query];
                pairs *= seen;
            }
        } else {
            for_each_position(own, [&](const Position& query) {
                for_each_key(members, problem.groups[index], query, [&](const Position&, int64_t) { ++pairs; });
            });
        }
        groups[index] = {VICINAL_SIMPLE, problem.call.isa, 1, 1, own[0] * own[1] * own[2], pairs, pairs, 1};
    }
}

}  // namespace vicinal
