// The tiled strategy from outside: plans, remembered by what they were made from, and units of work on all threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "threads.h"
#include "tiles_plan.h"

namespace vicinal {

namespace {

constexpr int64_t STREAM_BYTES = 8 << 20;  // of a tensor that is written past the caches

// CLOSED is the whole backward at once, for queries.
enum Direction { FORWARD, BACKWARD, EXTRA, CLOSED };

const TileKernels* kernels_for(const Problem& problem) {
    const bool is_bfloat16 = problem.call.dtype == VICINAL_BFLOAT16;
    switch (problem.call.isa) {
        case VICINAL_AMX: return is_bfloat16 ? amx_kernels() : avx512_kernels();
        case VICINAL_AVX512_BF16: return is_bfloat16 ? avx512_bf16_kernels() : avx512_kernels();
        case VICINAL_AVX512: return avx512_kernels();
        case VICINAL_AVX2: return avx2_kernels();
        default: return base_kernels();
    }
}

// Everything a plan depends on, as numbers.
std::vector<int64_t> fingerprint(const std::vector<Member>& members, const Group& group, Direction direction,
                                 const PlanRequest& request) {
    std::vector<int64_t> numbers = {direction,        request.lanes,  request.pair, request.key_dim, request.value_dim,
                                    request.floats,   request.copies, group.takes_bias, request.targets_in_lanes,
                                    request.colours,  request.unit_bytes, request.token_bytes};
    for (int a = 0; a < AXES; ++a) {
        numbers.push_back(request.sources[a]);
        numbers.push_back(request.targets[a]);
        numbers.push_back(group.bias_length[a]);
    }
    for (const Member& member : members)
        for (const AxisTable& table : member.axis) {
            numbers.insert(numbers.end(), {table.queries, table.length, table.step, table.wraps});
            for (int64_t i = 0; i < table.queries; ++i)
                numbers.push_back(static_cast<int64_t>(table.start[i]) * (int64_t(1) << 32) + table.count[i]);
            if (group.takes_bias) numbers.insert(numbers.end(), table.center, table.center + table.queries);
        }
    return numbers;
}

uint64_t hash_of(const std::vector<int64_t>& numbers) {
    uint64_t hash = 1469598103934665603ull;
    for (int64_t number : numbers) hash = (hash ^ static_cast<uint64_t>(number)) * 1099511628211ull + (hash >> 29);
    return hash;
}

struct Remembered {
    uint64_t hash = 0;
    std::vector<int64_t> numbers;
    std::shared_ptr<const Plan> plan;
    uint64_t used = 0;
};

std::shared_ptr<const Plan> plan_for(const std::vector<Member>& members, const Group& group, Direction direction,
                                     int64_t tokens, PlanRequest request) {
    static std::mutex mutex;
    static std::vector<Remembered> plans(128);
    static uint64_t clock = 0;
    const std::vector<int64_t> numbers = fingerprint(members, group, direction, request);
    const uint64_t hash = hash_of(numbers);
    {
        std::lock_guard<std::mutex> lock(mutex);
        for (Remembered& known : plans)
            if (known.plan && known.hash == hash && known.numbers == numbers) {
                known.used = ++clock;
                return known.plan;
            }
    }
    request.lists = direction == BACKWARD ? backward_lists(members, group)
                    : direction == EXTRA  ? extra_lists(members[0], tokens)
                                          : forward_lists(members, group);
    std::shared_ptr<const Plan> plan = make_plan(request);
    std::lock_guard<std::mutex> lock(mutex);
    Remembered* oldest = &plans[0];
    for (Remembered& known : plans)
        if (known.used < oldest->used) oldest = &known;
    *oldest = {hash, numbers, plan, ++clock};
    return plan;
}

// A job with what its pointers point to.
struct Work {
    Job job;
    std::shared_ptr<const Plan> plan;
    std::vector<Earlier> earlier;
    std::vector<int32_t> num_earlier;
    int64_t sample_begin, samples;
    int64_t group;
    int64_t heads;  // that units are run for: of queries, or of keys

    int64_t colours() const { return static_cast<int64_t>(plan->colours.size()) - 1; }
    int64_t units(int64_t colour) const {
        return colour < colours() ? plan->colours[colour + 1] - plan->colours[colour] : 0;
    }
    const Unit& unit(int64_t colour, int64_t number) const { return plan->units[plan->colours[colour] + number]; }
    int64_t count(int64_t colour) const { return units(colour) * samples * heads; }
};

Operand operand_of(const View& view, const int* order, int64_t dim) {
    Operand operand{view.data, view.batch, view.head, {}, view.channel, static_cast<int32_t>(dim)};
    for (int a = 0; a < AXES; ++a) operand.axis[a] = view.axis[order[a]];
    return operand;
}

std::atomic<int64_t> serials{1};
std::atomic<int64_t> unit_bytes{0};

void fill_job(const Problem& problem, const std::vector<Member>& members, const Group& group, Direction direction, Work& work) {
    const vicinal_call& call = problem.call;
    Job& job = work.job;
    const int* order = work.plan->order;
    job = Job{};
    job.dtype = call.dtype;
    job.rows_per_vector = work.plan->rows_per_vector;
    job.tile_rows = work.plan->tile_rows;
    job.tile_columns = work.plan->tile_columns;
    job.panel_bytes = work.plan->panel_bytes;
    job.is_far = work.plan->is_far;
    const int64_t tokens = call.batch * problem.grid[0] * problem.grid[1] * problem.grid[2];
    job.streams = call.dtype == VICINAL_FLOAT32 && tokens * call.heads * call.head_dim * 4 >= STREAM_BYTES;
    job.serial = serials++;
    job.batch = call.batch;
    job.first_head = group.first_head;
    job.heads = group.heads;
    job.shared = call.heads / call.kv_heads;
    job.scale = static_cast<float>(call.scale);
    job.num_sources = static_cast<int32_t>(work.plan->classes[0][0].sources.size());
    for (int a = 0; a < AXES; ++a) job.order[a] = order[a];
    for (const Member& member : members) {
        Earlier earlier;
        for (int a = 0; a < AXES; ++a) {
            const AxisTable& table = member.axis[order[a]];
            earlier.start[a] = table.start;
            earlier.count[a] = table.count;
            earlier.step[a] = static_cast<int32_t>(table.step);
            earlier.length[a] = static_cast<int32_t>(table.length);
            earlier.wraps[a] = table.wraps;
        }
        work.earlier.push_back(earlier);
    }
    job.query = operand_of(problem.query, order, call.head_dim);
    job.key = operand_of(problem.key, order, call.head_dim);
    job.value = operand_of(problem.value, order, call.value_dim);
    job.out = operand_of(problem.out, order, call.value_dim);
    job.grad_out = operand_of(problem.grad_out, order, call.value_dim);
    job.grad_query = operand_of(problem.grad_query, order, call.head_dim);
    job.grad_key = operand_of(problem.grad_key, order, call.head_dim);
    job.grad_value = operand_of(problem.grad_value, order, call.value_dim);
    // extra tokens are packed along the last axis
    const auto extra = [](const View& view, int64_t dim) {
        return Operand{view.data, view.batch, view.head, {0, 0, view.axis[AXES - 1]}, view.channel, static_cast<int32_t>(dim)};
    };
    job.extra_key = extra(problem.extra_key, call.head_dim);
    job.extra_value = extra(problem.extra_value, call.value_dim);
    job.extra_tokens = problem.extra_key ? static_cast<int32_t>(call.extra_tokens) : 0;
    job.extra_lengths = problem.extra_lengths;
    job.lse = reinterpret_cast<float*>(problem.lse.data);
    job.grad_lse = reinterpret_cast<const float*>(problem.grad_lse.data);
    job.row_sums = reinterpret_cast<float*>(problem.row_sums.data);
    job.lse_batch = problem.lse.batch;
    job.lse_head = problem.lse.head;
    job.grad_lse_batch = problem.grad_lse.batch;
    job.grad_lse_head = problem.grad_lse.head;
    job.sums_batch = problem.row_sums.batch;
    job.sums_head = problem.row_sums.head;
    for (int a = 0; a < AXES; ++a) {
        job.lse_axis[a] = problem.lse.axis[order[a]];
        job.grad_lse_axis[a] = problem.grad_lse.axis[order[a]];
        job.sums_axis[a] = problem.row_sums.axis[order[a]];
        job.bias_length[a] = static_cast<int32_t>(group.bias_length[order[a]]);
    }
    if (problem.bias && group.takes_bias && direction != EXTRA) {
        job.bias = static_cast<const float*>(problem.bias) + group.bias_begin;
        job.bias_is_reversed = direction == BACKWARD;
        int64_t stride = 1;
        int64_t strides[AXES];
        for (int a = AXES - 1; a >= 0; --a) {
            strides[a] = stride;
            stride *= group.bias_length[a];
        }
        for (int a = 0; a < AXES; ++a) job.bias_stride[a] = strides[order[a]];
        job.bias_head = stride;
        if (direction == BACKWARD && !has_plain_centers(members))
            for (int a = 0; a < AXES; ++a) job.center[a] = members[0].axis[order[a]].center;
    }
    if (direction == EXTRA) {
        job.key = job.extra_key;
        job.value = job.extra_value;
        // the tokens stand on the problem's last axis, wherever that is here
        for (int a = 0; a < AXES; ++a) {
            const bool is_last = order[a] == AXES - 1;
            job.key.axis[a] = is_last ? problem.extra_key.axis[AXES - 1] : 0;
            job.value.axis[a] = is_last ? problem.extra_value.axis[AXES - 1] : 0;
            job.grad_key.axis[a] = is_last ? problem.grad_extra_key.axis[AXES - 1] : 0;
            job.grad_value.axis[a] = is_last ? problem.grad_extra_value.axis[AXES - 1] : 0;
        }
        job.grad_key.data = problem.grad_extra_key.data;
        job.grad_key.batch = problem.grad_extra_key.batch;
        job.grad_key.head = problem.grad_extra_key.head;
        job.grad_key.channel = problem.grad_extra_key.channel;
        job.grad_value.data = problem.grad_extra_value.data;
        job.grad_value.batch = problem.grad_extra_value.batch;
        job.grad_value.head = problem.grad_extra_value.head;
        job.grad_value.channel = problem.grad_extra_value.channel;
    }
}

// All work of one direction: one piece per head group and per row of tables.
std::vector<std::unique_ptr<Work>> all_work(const Problem& problem, Direction direction, const TileKernels* kernels) {
    const vicinal_call& call = problem.call;
    const int64_t shared = call.heads / call.kv_heads;
    const bool each_sample = problem.members.size() > 1 || direction == EXTRA;
    std::vector<std::unique_ptr<Work>> all;
    for (int64_t sample = 0; sample < (each_sample ? call.batch : 1); ++sample) {
        const int64_t tokens = problem.extra_key ? problem.extra_length(sample) : 0;
        if (direction == EXTRA && !tokens) continue;
        for (size_t g = 0; g < problem.groups.size(); ++g) {
            Group group = problem.groups[g];
            if (direction == EXTRA) {  // all heads at once: the groups see the same
                if (g) break;
                group = Group{0, call.heads, false, {1, 1, 1}, 0};
            }
            const std::vector<Member>& members = problem.members_of(sample, static_cast<int64_t>(g));
            auto work = std::make_unique<Work>();
            work->sample_begin = sample;
            work->samples = each_sample ? 1 : call.batch;
            work->group = static_cast<int64_t>(g);
            work->heads = direction == FORWARD
                              ? group.heads
                              : (group.first_head + group.heads - 1) / shared - group.first_head / shared + 1;
            PlanRequest request;
            request.lanes = kernels->lanes;
            request.pair = kernels->pair;
            request.targets_in_lanes = kernels->targets_in_lanes;
            request.key_dim = call.head_dim;
            request.value_dim = call.value_dim;
            request.floats = (call.head_dim + call.value_dim) * (direction == FORWARD ? 1 : 2) / kernels->pair;
            request.token_bytes = call.heads * call.head_dim * problem.element_bytes;
            request.copies = work->samples * work->heads;
            // units that share sources add to gradients in the tensor, which costs the short types too much precision
            request.colours = direction != CLOSED ? 0 : call.dtype == VICINAL_FLOAT32 ? 2 : 1;
            request.unit_bytes = unit_bytes;
            for (int a = 0; a < AXES; ++a) {
                request.targets[a] = direction == BACKWARD ? members[0].axis[a].length
                                     : direction != EXTRA  ? members[0].axis[a].queries
                                     : a == AXES - 1       ? tokens
                                                           : 1;
                request.sources[a] = members[0].axis[a].length;
            }
            work->plan = plan_for(members, group, direction, tokens, request);
            fill_job(problem, members, group, direction, *work);
            // lists come member by member, several each where axes wrap
            if (direction == EXTRA) {
                work->num_earlier.push_back(0);
            } else {
                const int64_t lists = work->job.num_sources;
                for (int64_t list = 0; list < lists; ++list) work->num_earlier.push_back(work->plan->member_of_list[list]);
            }
            work->job.earlier = work->earlier.data();
            work->job.num_earlier = work->num_earlier.data();
            all.push_back(std::move(work));
        }
    }
    return all;
}

// Memory that kernels ask for; they must not throw, so a failure is remembered and thrown here.
void* get_memory(int slot, size_t bytes) { return workspace(slot, bytes); }

using Visit = void (*)(const TileKernels&, const Job&, const Unit&, int64_t, int64_t, const Workspace&);

void run_colour(const Problem& problem, const std::vector<std::unique_ptr<Work>>& all, const TileKernels* kernels,
                Visit visit, Direction direction, int64_t colour) {
    std::vector<int64_t> begins{0};
    for (const auto& work : all) begins.push_back(begins.back() + work->count(colour));
    const Workspace memory{get_memory};
    const int64_t shared = problem.call.heads / problem.call.kv_heads;
    parallel_for(begins.back(), problem.call.threads, [&](int64_t index) {
        const size_t which = std::upper_bound(begins.begin(), begins.end(), index) - begins.begin() - 1;
        const Work& work = *all[which];
        int64_t rest = index - begins[which], head, unit;
        const int64_t units = work.units(colour);
        if (work.job.bias) {  // a head's table is prepared once for all its units
            unit = rest % units;
            rest /= units;
            head = rest % work.heads;
            rest /= work.heads;
        } else {  // heads of one place stand side by side in memory
            head = rest % work.heads;
            rest /= work.heads;
            unit = rest % units;
            rest /= units;
        }
        if (direction != FORWARD) head += work.job.first_head / shared;
        visit(*kernels, work.job, work.unit(colour, unit), work.sample_begin + rest, head, memory);
    });
}

// Units of one colour at once, colours one after another.
void run_all(const Problem& problem, const std::vector<std::unique_ptr<Work>>& all, const TileKernels* kernels,
             Visit visit, Direction direction) {
    int64_t colours = 0;
    for (const auto& work : all) colours = std::max(colours, work->colours());
    for (int64_t colour = 0; colour < colours; ++colour) run_colour(problem, all, kernels, visit, direction, colour);
}

// Writes one number into all rows of a view that lie outside a sample's own grid, for all heads.
template <class Item>
void fill_outside(const View& view, int64_t sample, const int64_t* grid, const int64_t* own, int64_t heads, int64_t dim, Item item) {
    if (!view || (own[0] >= grid[0] && own[1] >= grid[1] && own[2] >= grid[2])) return;
    for (int64_t a = 0; a < grid[0]; ++a)
        for (int64_t b = 0; b < grid[1]; ++b)
            for (int64_t c = a < own[0] && b < own[1] ? own[2] : 0; c < grid[2]; ++c)
                for (int64_t head = 0; head < heads; ++head) {
                    Item* to = reinterpret_cast<Item*>(view.data) + sample * view.batch + a * view.axis[0] +
                               b * view.axis[1] + c * view.axis[2] + head * view.head;
                    for (int64_t d = 0; d < dim; ++d) to[d * view.channel] = item;
                }
}

// Zeros outside the samples' own grids; all of the dtype's zeros are bits 0.
void zero_outside(const Problem& problem, const View& view, int64_t sample, const int64_t* grid, const int64_t* own,
                  int64_t heads, int64_t dim) {
    if (problem.call.dtype == VICINAL_FLOAT32)
        fill_outside<uint32_t>(view, sample, grid, own, heads, dim, 0);
    else
        fill_outside<uint16_t>(view, sample, grid, own, heads, dim, 0);
}

struct OwnGrid {
    int64_t queries[AXES], keys[AXES];
};

OwnGrid own_grid(const Problem& problem, int64_t sample) {
    OwnGrid own;
    for (int a = 0; a < AXES; ++a) {
        own.queries[a] = problem.members_of(sample, 0)[0].axis[a].queries;
        own.keys[a] = problem.members_of(sample, 0)[0].axis[a].length;
    }
    return own;
}

// Whether the query heads of a key head belong to different groups.
bool splits_key_heads(const Problem& problem) {
    const int64_t shared = problem.call.heads / problem.call.kv_heads;
    for (const Group& group : problem.groups)
        if (group.first_head % shared) return true;
    return false;
}

// New memory comes in pages of 4 KB, each with an interruption when it is first written: a third of the time of a large
// map. Where the system can, it is asked for large pages.
void ask_for_large_pages(const Problem& problem, const View& view, const int64_t* grid, int64_t heads, int64_t dim) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (!view || view.channel != 1) return;
    const int64_t bytes = problem.call.batch * grid[0] * grid[1] * grid[2] * heads * dim * problem.element_bytes;
    constexpr uintptr_t PAGE = 2 << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(view.data) + PAGE - 1) / PAGE * PAGE;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(view.data) + static_cast<uintptr_t>(bytes)) / PAGE * PAGE;
    if (view.batch * problem.call.batch * problem.element_bytes == bytes && end >= begin + 4 * PAGE)
        madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)problem, (void)view, (void)grid, (void)heads, (void)dim;
#endif
}

// Gradient of the bias: heads and a fixed number of shares of their units, each with a table of its own.
using VisitWithBias = void (*)(const Job&, const Unit&, int64_t, int64_t, float*, const Workspace&);

void grad_query_with_bias(const Problem& problem, const std::vector<std::unique_ptr<Work>>& all, const TileKernels* kernels,
                          VisitWithBias visit) {
    constexpr int64_t SHARES = 8;
    const Workspace memory{get_memory};
    float* to = static_cast<float*>(problem.grad_bias);
    std::fill(to, to + problem.call.bias_words, 0.0f);
    for (const auto& piece : all) {
        const Work& work = *piece;
        const Job& job = work.job;
        const int64_t size = kernels->grad_bias_floats(job);
        int64_t shares = 1;
        for (int64_t colour = 0; colour < work.colours(); ++colour)
            shares = std::max(shares, std::min(SHARES, work.units(colour) * work.samples));
        std::vector<float> tables(size * shares * work.heads, 0.0f);
        for (int64_t colour = 0; colour < work.colours(); ++colour) {
            const int64_t units = work.units(colour), total = units * work.samples;
            parallel_for(shares * work.heads, problem.call.threads, [&](int64_t index) {
                const int64_t head = index / shares, share = index % shares;
                float* table = tables.data() + index * size;
                for (int64_t i = total * share / shares; i < total * (share + 1) / shares; ++i)
                    visit(job, work.unit(colour, i % units), work.sample_begin + i / units,
                          visit == kernels->closed ? head + job.first_head : head, table, memory);
            });
        }
        const int64_t begin = problem.groups[work.group].bias_begin;
        for (int64_t head = 0; head < work.heads; ++head)
            for (int64_t share = 0; share < shares; ++share)
                kernels->fold_grad_bias(job, tables.data() + (head * shares + share) * size,
                                        to + begin + head * job.bias_head);
    }
}

// Zeros outside the samples' own grids, in the gradients of queries, keys and values.
void zero_gradients_outside(const Problem& problem) {
    const vicinal_call& call = problem.call;
    for (int64_t sample = 0; sample < call.batch; ++sample) {
        const OwnGrid own = own_grid(problem, sample);
        zero_outside(problem, problem.grad_query, sample, problem.grid, own.queries, call.heads, call.head_dim);
        zero_outside(problem, problem.grad_key, sample, problem.key_grid, own.keys, call.kv_heads, call.head_dim);
        zero_outside(problem, problem.grad_value, sample, problem.key_grid, own.keys, call.kv_heads, call.value_dim);
    }
}

// The backward in one go, where units of one colour share no keys; false where it must be done in parts.
bool backward_at_once(const Problem& problem, const TileKernels* kernels) {
    const bool shares_heads = problem.call.heads != problem.call.kv_heads;
    if (!kernels->closed || problem.extra_key || splits_key_heads(problem) || (shares_heads && problem.grad_bias)) return false;
    if (!problem.grad_key && !problem.grad_value) return false;
    const auto all = all_work(problem, CLOSED, kernels);
    for (const auto& work : all)
        if (!work->plan->is_closed) return false;
    if (problem.grad_bias)
        grad_query_with_bias(problem, all, kernels, kernels->closed);
    else
        run_all(problem, all, kernels,
                [](const TileKernels& k, const Job& job, const Unit& unit, int64_t sample, int64_t head, const Workspace& memory) {
                    k.closed(job, unit, sample, head, nullptr, memory);
                },
                CLOSED);
    zero_gradients_outside(problem);
    return true;
}

}  // namespace

void tiles_forward(const Problem& problem) {
    const vicinal_call& call = problem.call;
    if (!call.batch) return;
    ask_for_large_pages(problem, problem.out, problem.grid, call.heads, call.value_dim);
    const TileKernels* kernels = kernels_for(problem);
    run_all(problem, all_work(problem, FORWARD, kernels), kernels,
            [](const TileKernels& k, const Job& job, const Unit& unit, int64_t sample, int64_t head, const Workspace& memory) {
                k.forward(job, unit, sample, head, memory);
            },
            FORWARD);
    for (int64_t sample = 0; sample < call.batch; ++sample) {
        const OwnGrid own = own_grid(problem, sample);
        zero_outside(problem, problem.out, sample, problem.grid, own.queries, call.heads, call.value_dim);
        fill_outside<float>(problem.lse, sample, problem.grid, own.queries, call.heads, 1, -INFINITY);
    }
}

void tiles_backward(const Problem& problem) {
    const vicinal_call& call = problem.call;
    if (problem.grad_bias && !call.batch) {
        float* to = static_cast<float*>(problem.grad_bias);
        std::fill(to, to + call.bias_words, 0.0f);
    }
    if (!call.batch) return;
    ask_for_large_pages(problem, problem.grad_query, problem.grid, call.heads, call.head_dim);
    ask_for_large_pages(problem, problem.grad_key, problem.key_grid, call.kv_heads, call.head_dim);
    ask_for_large_pages(problem, problem.grad_value, problem.key_grid, call.kv_heads, call.value_dim);
    const TileKernels* kernels = kernels_for(problem);
    if (backward_at_once(problem, kernels)) return;
    const auto forward = all_work(problem, FORWARD, kernels);
    run_all(problem, forward, kernels,
            [](const TileKernels& k, const Job& job, const Unit& unit, int64_t sample, int64_t head, const Workspace& memory) {
                k.row_sums(job, unit, sample, head, memory);
            },
            FORWARD);
    if (problem.grad_bias)
        grad_query_with_bias(problem, forward, kernels, kernels->grad_query);
    else if (problem.grad_query)
        run_all(problem, forward, kernels,
                [](const TileKernels& k, const Job& job, const Unit& unit, int64_t sample, int64_t head, const Workspace& memory) {
                    k.grad_query(job, unit, sample, head, nullptr, memory);
                },
                FORWARD);
    const Visit key_value = [](const TileKernels& k, const Job& job, const Unit& unit, int64_t sample, int64_t head,
                               const Workspace& memory) { k.grad_key_value(job, unit, sample, head, memory); };
    if (problem.grad_key || problem.grad_value) {
        auto all = all_work(problem, BACKWARD, kernels);
        if (splits_key_heads(problem)) {  // groups that share a key head come one after the other
            for (auto& work : all) {
                std::vector<std::unique_ptr<Work>> one;
                one.push_back(std::move(work));
                run_all(problem, one, kernels, key_value, BACKWARD);
            }
        } else {
            run_all(problem, all, kernels, key_value, BACKWARD);
        }
    }
    if (problem.grad_extra_key || problem.grad_extra_value)
        run_all(problem, all_work(problem, EXTRA, kernels), kernels, key_value, EXTRA);
    zero_gradients_outside(problem);
    for (int64_t sample = 0; sample < call.batch; ++sample) {
        const int64_t tokens[AXES] = {1, 1, call.extra_tokens};
        const int64_t own_tokens[AXES] = {1, 1, problem.extra_key ? problem.extra_length(sample) : 0};
        zero_outside(problem, problem.grad_extra_key, sample, tokens, own_tokens, call.kv_heads, call.head_dim);
        zero_outside(problem, problem.grad_extra_value, sample, tokens, own_tokens, call.kv_heads, call.value_dim);
    }
}

// Tiles take everything but float64. Where groups share a key head, its gradient is added up in the tensor, which costs
// the short types too much precision.
vicinal_strategy choose_strategy(const Problem& problem, bool is_backward) {
    const bool writes_keys = problem.grad_key || problem.grad_value;
    if (problem.is_double) return VICINAL_SIMPLE;
    if (dense_suits(problem, is_backward)) return VICINAL_DENSE;
    return writes_keys && problem.call.dtype != VICINAL_FLOAT32 && splits_key_heads(problem) ? VICINAL_SIMPLE : VICINAL_TILES;
}

void tiles_shrink_units(int64_t bytes) { unit_bytes = bytes; }

void tiles_describe(const Problem& problem, vicinal_description* groups) {
    const TileKernels* kernels = kernels_for(problem);
    simple_describe(problem, groups);  // counts the pairs, which members of a union may share
    for (const auto& work : all_work(problem, FORWARD, kernels)) {
        if (work->sample_begin) break;
        groups[work->group] = {VICINAL_TILES,     problem.call.isa,  kernels->lanes,       work->plan->rows_per_vector,
                               work->plan->tiles, groups[work->group].pairs, work->plan->computed,
                               static_cast<int64_t>(work->plan->units.size())};
    }
}

}  // namespace vicinal
