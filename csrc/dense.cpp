// The dense strategy from outside: which problems fall into closed groups, and pieces of work on all threads.

#include "dense.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "problem.h"
#include "threads.h"

namespace vicinal {
namespace {

const DenseKernels* kernels_for(const Problem& problem) {
    switch (problem.call.isa) {
        case VICINAL_AMX: return problem.call.dtype == VICINAL_BFLOAT16 ? dense_amx_kernels() : dense_avx512_kernels();
        case VICINAL_AVX512_BF16:
        case VICINAL_AVX512: return dense_avx512_kernels();
        case VICINAL_AVX2: return dense_avx2_kernels();
        default: return dense_base_kernels();
    }
}

// The runs of one axis: maximal runs of neighbors of one residue class that see the same keys.
struct Runs {
    std::vector<DenseRun> runs;
    std::vector<int32_t> bias;  // of all runs
    std::vector<int64_t> bias_begin;
    int64_t most_queries = 0, most_keys = 0, all_keys = 0;
    int32_t shapes = 0;
};

bool has_shape_of(const Runs& all, size_t i, size_t j) {
    const DenseRun &a = all.runs[i], &b = all.runs[j];
    if (a.queries != b.queries || a.keys != b.keys || a.step != b.step) return false;
    if (all.bias.empty()) return true;
    const int32_t* from = all.bias.data();
    return std::equal(from + all.bias_begin[i], from + all.bias_begin[i] + a.queries, from + all.bias_begin[j]);
}

// Keys are copied for each group that sees them: so many for a query.
constexpr int64_t MOST_KEYS_PER_QUERY = 4;

// False where the axis has queries that see nothing, or wraps, or where groups are too large or share too many keys.
bool find_runs(const AxisTable& table, int64_t bias_length, bool takes_bias, Runs& to) {
    if (table.wraps) return false;
    const int64_t step = table.step;
    int64_t visited = 0;
    for (int64_t residue = 0; residue < std::min(step, table.queries); ++residue)
        for (int64_t query = residue; query < table.queries;) {
            const int32_t start = table.start[query], count = table.count[query];
            if (!count) return false;
            DenseRun run{static_cast<int32_t>(query), 0, start, count, static_cast<int32_t>(step), 0, nullptr};
            to.bias_begin.push_back(static_cast<int64_t>(to.bias.size()));
            for (; query < table.queries && table.start[query] == start && table.count[query] == count; query += step) {
                ++run.queries;
                if (takes_bias)
                    to.bias.push_back(static_cast<int32_t>((start - table.center[query]) / step + bias_length / 2));
            }
            to.most_queries = std::max<int64_t>(to.most_queries, run.queries);
            to.most_keys = std::max<int64_t>(to.most_keys, run.keys);
            to.all_keys += run.keys;
            to.runs.push_back(run);
            visited += run.queries;
            if (to.most_queries > DENSE_MOST_TOKENS || to.most_keys > DENSE_MOST_TOKENS) return false;
            if (to.all_keys > MOST_KEYS_PER_QUERY * visited + DENSE_MOST_TOKENS) return false;
        }
    for (size_t i = 0; i < to.runs.size(); ++i) {
        size_t first = 0;
        while (!has_shape_of(to, first, i)) ++first;
        to.runs[i].shape = first == i ? to.shapes++ : to.runs[first].shape;
        if (takes_bias) to.runs[i].bias = to.bias.data() + to.bias_begin[first];
    }
    if (takes_bias)  // pieces of one shape follow each other, so that its bias is written out once
        std::stable_sort(to.runs.begin(), to.runs.end(), [](const DenseRun& a, const DenseRun& b) { return a.shape < b.shape; });
    return true;
}

// Whether every key of the axis is seen from one run.
bool is_closed(const AxisTable& table, const Runs& runs) {
    if (runs.all_keys != table.length) return false;
    std::vector<bool> is_seen(table.length, false);
    for (const DenseRun& run : runs.runs)
        for (int64_t key = 0; key < run.keys; ++key) {
            const int64_t at = run.key + table.step * key;
            if (is_seen[at]) return false;
            is_seen[at] = true;
        }
    return true;
}

}  // namespace

// The groups of one head group.
struct DenseGroups {
    Runs runs[AXES];
    int64_t count = 1, most_queries = 1, most_keys = 1;
};

namespace {

// Pairs that the kernels compute for all groups of one head.
int64_t computed_pairs(const DenseGroups& groups, int64_t lanes) {
    int64_t computed = 0;
    for (const DenseRun& a : groups.runs[0].runs)
        for (const DenseRun& b : groups.runs[1].runs)
            for (const DenseRun& c : groups.runs[2].runs) {
                const int64_t keys = int64_t(a.keys) * b.keys * c.keys;
                computed += int64_t(a.queries) * b.queries * c.queries * ((keys + lanes - 1) / lanes * lanes);
            }
    return computed;
}

Operand operand_of(const View& view, int64_t dim) {
    Operand operand{view.data, view.batch, view.head, {}, view.channel, static_cast<int32_t>(dim)};
    std::copy(view.axis, view.axis + AXES, operand.axis);
    return operand;
}

// Finds the groups of a head group; false where there are none, or too large ones.
bool find_groups(const Problem& problem, size_t number, bool is_backward, DenseGroups& to) {
    const Group& group = problem.groups[number];
    const std::vector<Member>& members = problem.members[0][number];
    if (members.size() != 1) return false;
    const bool takes_bias = problem.bias && group.takes_bias;
    for (int a = 0; a < AXES; ++a) {
        const AxisTable& table = members[0].axis[a];
        if (table.queries != problem.grid[a] || table.length != problem.key_grid[a]) return false;
        Runs& runs = to.runs[a];
        if (!find_runs(table, group.bias_length[a], takes_bias, runs) || (is_backward && !is_closed(table, runs))) return false;
        to.count *= static_cast<int64_t>(runs.runs.size());
        to.most_queries *= runs.most_queries;
        to.most_keys *= runs.most_keys;
        if (to.most_queries > DENSE_MOST_TOKENS || to.most_keys > DENSE_MOST_TOKENS) return false;
    }
    return true;
}

std::atomic<int64_t> serials{1};

// The bias of all pairs of groups of every shape and head stays in the second-level cache up to this size.
constexpr int64_t MOST_SLOT_BYTES = 1 << 20;

// The job of a head group, which points to what the problem holds.
DenseJob job_of(const Problem& problem, size_t number, bool is_backward) {
    const vicinal_call& call = problem.call;
    const Group& group = problem.groups[number];
    const DenseGroups& groups = (*problem.dense)[number];
    DenseJob job = {};
    for (int a = 0; a < AXES; ++a) {
        const Runs& runs = groups.runs[a];
        job.runs[a] = runs.runs.data();
        job.num_runs[a] = static_cast<int32_t>(runs.runs.size());
        job.num_shapes[a] = runs.shapes;
        job.bias_length[a] = static_cast<int32_t>(group.bias_length[a]);
    }
    job.dtype = call.dtype;
    job.groups = groups.count;
    job.most_queries = groups.most_queries;
    job.most_keys = groups.most_keys;
    job.samples = call.batch;
    job.shared = call.heads / call.kv_heads;
    job.heads = is_backward ? group.heads / job.shared : group.heads;
    job.first_head = is_backward ? group.first_head / job.shared : group.first_head;
    job.scale = static_cast<float>(call.scale);
    job.serial = serials++;
    const int64_t slots = int64_t(job.num_shapes[0]) * job.num_shapes[1] * job.num_shapes[2] * job.heads;
    job.heads_first = problem.bias && slots * job.most_queries * (job.most_keys + 16) * 4 > MOST_SLOT_BYTES;
    job.pair_slots = job.heads_first ? 1 : slots;
    if (problem.bias && group.takes_bias) job.bias = static_cast<const float*>(problem.bias) + group.bias_begin;
    job.query = operand_of(problem.query, call.head_dim);
    job.key = operand_of(problem.key, call.head_dim);
    job.value = operand_of(problem.value, call.value_dim);
    job.out = operand_of(problem.out, call.value_dim);
    job.lse = operand_of(problem.lse, 1);
    job.grad_out = operand_of(problem.grad_out, call.value_dim);
    job.grad_lse = operand_of(problem.grad_lse, 1);
    job.grad_query = operand_of(problem.grad_query, call.head_dim);
    job.grad_key = operand_of(problem.grad_key, call.head_dim);
    job.grad_value = operand_of(problem.grad_value, call.value_dim);
    return job;
}

int64_t pieces_of(const DenseJob& job) { return job.groups * job.samples * job.heads; }

// Enough shares that threads end together, of pieces that follow each other.
constexpr int64_t SHARES_PER_THREAD = 8;

template <class Run>
void run_shares(const Problem& problem, const DenseJob& job, const Run& run) {
    const int64_t pieces = pieces_of(job);
    if (!pieces) return;
    const int64_t shares = problem.call.threads == 1 ? 1 : std::min(pieces, problem.call.threads * SHARES_PER_THREAD);
    parallel_for(shares, problem.call.threads, [&](int64_t share) {
        run(pieces * share / shares, pieces * (share + 1) / shares);
    });
}

void* get_memory(int slot, size_t bytes) { return workspace(slot, bytes); }

// Pieces are cut into a number of shares that no number of threads changes, each with tables of its own.
void backward_with_bias(const Problem& problem, const DenseJob& job, const DenseKernels* kernels, const Workspace& memory,
                        float* to) {
    constexpr int64_t SHARES = 8;
    const int64_t size = int64_t(job.bias_length[0]) * job.bias_length[1] * job.bias_length[2], room = size + kernels->lanes;
    const int64_t lots = job.heads_first ? job.heads : 1;  // each lot has pieces of its own heads
    const int64_t pieces = pieces_of(job) / lots, shares = std::min(SHARES, pieces);
    std::vector<float> tables(shares * job.heads * room, 0.0f);
    parallel_for(shares * lots, problem.call.threads, [&](int64_t index) {
        const int64_t share = index % shares, first = index / shares * pieces;
        kernels->backward(job, first + pieces * share / shares, first + pieces * (share + 1) / shares,
                          tables.data() + share * job.heads * room, memory);
    });
    for (int64_t head = 0; head < job.heads; ++head)
        for (int64_t i = 0; i < size; ++i) {
            float sum = 0.0f;
            for (int64_t share = 0; share < shares; ++share) sum += tables[(share * job.heads + head) * room + i];
            to[head * size + i] = sum;
        }
}

// Of one sample: fewer keep few threads busy, and tiles are smaller than groups.
constexpr int64_t LEAST_PIECES = 4;

// Where neighbors share keys, groups of fewer queries copy keys more often than they use them.
constexpr int64_t LEAST_QUERIES_THAT_SHARE = 8;

}  // namespace

void dense_find(Problem& problem, bool is_backward) {
    const vicinal_call& call = problem.call;
    if (problem.is_double || call.extra_tokens || problem.members.size() != 1 || !call.value_dim) return;
    // where key heads are shared, their gradients are summed up over one head group; and a bias has one of its own
    if (is_backward && call.heads != call.kv_heads && (problem.groups.size() != 1 || problem.bias)) return;
    std::vector<DenseGroups> all(problem.groups.size());
    for (size_t number = 0; number < all.size(); ++number)
        if (!find_groups(problem, number, is_backward, all[number])) return;
    problem.dense = std::make_shared<const std::vector<DenseGroups>>(std::move(all));
}

bool dense_suits(const Problem& problem, bool is_backward) {
    if (!problem.dense) return false;
    const int64_t shared = is_backward ? problem.call.heads / problem.call.kv_heads : 1;
    int64_t pieces = 0;
    for (size_t number = 0; number < problem.groups.size(); ++number) {
        const DenseGroups& groups = (*problem.dense)[number];
        pieces += groups.count * (problem.groups[number].heads / shared);
        int64_t queries = 1, keys = 1;
        for (int a = 0; a < AXES; ++a) {
            queries *= problem.grid[a];
            keys *= groups.runs[a].all_keys;
        }
        if (keys > MOST_KEYS_PER_QUERY * queries) return false;
        if (keys > queries && queries < LEAST_QUERIES_THAT_SHARE * groups.count) return false;
    }
    return pieces >= LEAST_PIECES;
}

void dense_forward(const Problem& problem) {
    const DenseKernels* kernels = kernels_for(problem);
    const Workspace memory{get_memory};
    for (size_t number = 0; number < problem.groups.size(); ++number) {
        const DenseJob job = job_of(problem, number, false);
        run_shares(problem, job, [&](int64_t begin, int64_t end) { kernels->forward(job, begin, end, memory); });
    }
}

void dense_backward(const Problem& problem) {
    const DenseKernels* kernels = kernels_for(problem);
    const Workspace memory{get_memory};
    for (size_t number = 0; number < problem.groups.size(); ++number) {
        const DenseJob job = job_of(problem, number, true);
        if (problem.grad_bias)
            backward_with_bias(problem, job, kernels, memory,
                               static_cast<float*>(problem.grad_bias) + problem.groups[number].bias_begin);
        else
            run_shares(problem, job, [&](int64_t begin, int64_t end) {
                kernels->backward(job, begin, end, nullptr, memory);
            });
    }
}

void dense_describe(const Problem& problem, vicinal_description* groups) {
    simple_describe(problem, groups);
    const int64_t lanes = kernels_for(problem)->lanes;
    for (size_t number = 0; number < problem.groups.size(); ++number) {
        const DenseGroups& found = (*problem.dense)[number];
        groups[number] = {VICINAL_DENSE, problem.call.isa, lanes, 1, found.count, groups[number].pairs,
                          computed_pairs(found, lanes), found.count};
    }
}

}  // namespace vicinal
