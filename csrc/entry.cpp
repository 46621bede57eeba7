// The functions of the C interface: whatever goes wrong inside comes out as a code and a message.

#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "isa.h"
#include "problem.h"
#include "threads.h"

namespace vicinal {
namespace {

const char* const ISA_NAMES[] = {"best", "base", "avx2", "avx512", "avx512_bf16", "amx"};

void say(const char* text, char* message, int64_t message_bytes) {
    if (message && message_bytes > 0) std::snprintf(message, size_t(message_bytes), "%s", text);
}

template <typename Work>
int64_t guarded(char* message, int64_t message_bytes, const Work& work) {
    try {
        work();
        say("", message, message_bytes);
        return VICINAL_OK;
    } catch (const BadArgument& error) {
        say(error.what(), message, message_bytes);
        return VICINAL_BAD_ARGUMENT;
    } catch (const std::bad_alloc&) {
        say("out of memory", message, message_bytes);
        return VICINAL_NO_MEMORY;
    } catch (const std::exception& error) {
        say(error.what(), message, message_bytes);
        return VICINAL_FAILED;
    } catch (...) {
        say("unknown failure", message, message_bytes);
        return VICINAL_FAILED;
    }
}

const vicinal_call& present(const vicinal_call* call) {
    if (!call) throw BadArgument("call is missing");
    return *call;
}

vicinal_call placed(const vicinal_call* call, const vicinal_places* places) {
    if (!places) throw BadArgument("places are missing");
    vicinal_call there = present(call);
    there.threads = places->threads;
    there.query.data = places->query;
    there.key.data = places->key;
    there.value.data = places->value;
    there.bias.data = places->bias;
    there.out.data = places->out;
    there.lse.data = places->lse;
    there.grad_out.data = places->grad_out;
    there.grad_lse.data = places->grad_lse;
    there.grad_query.data = places->grad_query;
    there.grad_key.data = places->grad_key;
    there.grad_value.data = places->grad_value;
    there.grad_bias.data = places->grad_bias;
    return there;
}

// The problem with its strategy and instruction set settled.
Problem settled(const vicinal_call& call, Purpose purpose) {
    Problem problem = read_problem(call, purpose);
    const vicinal_isa best = best_isa();
    if (problem.call.isa == VICINAL_BEST) problem.call.isa = usual_isa(problem.call.dtype);
    if (problem.call.isa > best)
        throw BadArgument(std::string("isa must not be ") + ISA_NAMES[problem.call.isa] +
                          ": this machine and this build of the library have " + ISA_NAMES[best]);
    const bool is_backward = purpose == Purpose::BACKWARD;
    int64_t& strategy = problem.call.strategy;
    if (strategy == VICINAL_AUTO || strategy == VICINAL_DENSE) dense_find(problem, is_backward);
    if (strategy == VICINAL_AUTO) strategy = choose_strategy(problem, is_backward);
    if (strategy == VICINAL_TILES && problem.is_double)
        throw BadArgument("strategy must not be tiles where dtype is float64");
    if (strategy == VICINAL_DENSE && !problem.dense)
        throw BadArgument("strategy must not be dense where queries are not in closed groups of few keys");
    return problem;
}

struct Strategy {
    void (*forward)(const Problem& problem);
    void (*backward)(const Problem& problem);
    void (*describe)(const Problem& problem, vicinal_description* groups);
    bool needs_grad_out, needs_row_sums;  // the backward does
};

Strategy strategy_of(const Problem& problem) {
    switch (problem.call.strategy) {
        case VICINAL_TILES: return {tiles_forward, tiles_backward, tiles_describe, true, true};
        case VICINAL_DENSE: return {dense_forward, dense_backward, dense_describe, true, false};
        default: return {simple_forward, simple_backward, simple_describe, false, false};
    }
}

void forward(const vicinal_call& call) {
    const Problem problem = settled(call, Purpose::FORWARD);
    strategy_of(problem).forward(problem);
}

// Room for one number per query and head, contiguous, where the backward may keep sums. Most calls never touch it.
std::unique_ptr<float[]> give_row_sums(Problem& problem) {
    const int64_t* grid = problem.grid;
    View& view = problem.row_sums;
    view.head = 1;
    view.axis[2] = problem.call.heads;
    view.axis[1] = view.axis[2] * grid[2];
    view.axis[0] = view.axis[1] * grid[1];
    view.batch = view.axis[0] * grid[0];
    std::unique_ptr<float[]> room(new float[size_t(problem.call.batch * view.batch)]);
    view.data = reinterpret_cast<char*>(room.get());
    return room;
}

// Where only the log-sum-exp has a gradient, one row of zeros stands for all of grad_out; those of float32 serve types of
// 16 bits too. Float64 is the simple strategy's, which leaves out what grad_out would add.
std::vector<float> give_grad_out(Problem& problem) {
    std::vector<float> zeros(size_t(problem.call.value_dim + 1), 0.0f);
    problem.grad_out = View{reinterpret_cast<char*>(zeros.data()), 0, {0, 0, 0}, 0, 1};
    return zeros;
}

void backward(const vicinal_call& call) {
    Problem problem = settled(call, Purpose::BACKWARD);
    const Strategy strategy = strategy_of(problem);
    std::unique_ptr<float[]> room;
    std::vector<float> zeros;
    if (strategy.needs_row_sums) room = give_row_sums(problem);
    if (strategy.needs_grad_out && !problem.grad_out) zeros = give_grad_out(problem);
    strategy.backward(problem);
}

}  // namespace
}  // namespace vicinal

extern "C" {

int64_t vicinal_abi(void) { return VICINAL_ABI; }

int64_t vicinal_best_isa(void) { return vicinal::best_isa(); }

int64_t vicinal_workspace_bytes(void) { return int64_t(vicinal::workspace_bytes()); }

void vicinal_poison_workspace(void) { vicinal::poison_workspace(); }

void vicinal_shrink_units(int64_t bytes) { vicinal::tiles_shrink_units(bytes); }

int64_t vicinal_attend(const vicinal_call* call, char* message, int64_t message_bytes) {
    return vicinal::guarded(message, message_bytes, [&] { vicinal::forward(vicinal::present(call)); });
}

int64_t vicinal_attend_backward(const vicinal_call* call, char* message, int64_t message_bytes) {
    return vicinal::guarded(message, message_bytes, [&] { vicinal::backward(vicinal::present(call)); });
}

int64_t vicinal_attend_at(const vicinal_call* call, const vicinal_places* places, char* message,
                          int64_t message_bytes) {
    return vicinal::guarded(message, message_bytes, [&] { vicinal::forward(vicinal::placed(call, places)); });
}

int64_t vicinal_attend_backward_at(const vicinal_call* call, const vicinal_places* places, char* message,
                                   int64_t message_bytes) {
    return vicinal::guarded(message, message_bytes, [&] { vicinal::backward(vicinal::placed(call, places)); });
}

int64_t vicinal_describe(const vicinal_call* call, vicinal_description* groups, int64_t num_groups, char* message,
                         int64_t message_bytes) {
    return vicinal::guarded(message, message_bytes, [&] {
        const vicinal::Problem problem = vicinal::settled(vicinal::present(call), vicinal::Purpose::DESCRIBE);
        if (!groups || num_groups != int64_t(problem.groups.size()))
            throw vicinal::BadArgument("groups must have room for one description per head group");
        if (problem.members.empty()) throw vicinal::BadArgument("table_rows must be 1 or more to describe a problem");
        std::memset(groups, 0, sizeof(vicinal_description) * size_t(num_groups));
        vicinal::strategy_of(problem).describe(problem, groups);
    });
}

}  // extern "C"
