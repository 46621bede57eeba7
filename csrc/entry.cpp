// The functions of the C interface: whatever goes wrong inside comes out as a code and a message.

#include <cstdio>
#include <cstring>
#include <new>

#include "isa.h"
#include "problem.h"
#include "threads.h"

namespace vicinal {
namespace {

const char* const ISA_NAMES[] = {"best", "base", "avx2", "avx512", "avx512_bf16"};

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

// The problem with its strategy and instruction set settled.
Problem settled(const vicinal_call* call, Purpose purpose) {
    if (!call) throw BadArgument("call is missing");
    Problem problem = read_problem(*call, purpose);
    const vicinal_isa best = best_isa();
    if (problem.call.isa == VICINAL_BEST) problem.call.isa = usual_isa(problem.call.dtype);
    if (problem.call.isa > best)
        throw BadArgument(std::string("isa must not be ") + ISA_NAMES[problem.call.isa] +
                          ": this machine and this build of the library have " + ISA_NAMES[best]);
    if (problem.call.strategy == VICINAL_AUTO)
        problem.call.strategy = choose_strategy(problem, purpose == Purpose::BACKWARD);
    if (problem.call.strategy == VICINAL_TILES && problem.is_double)
        throw BadArgument("strategy must not be tiles where dtype is float64");
    if (problem.call.strategy == VICINAL_DENSE && !dense_takes(problem, purpose == Purpose::BACKWARD))
        throw BadArgument("strategy must not be dense where queries are not in closed groups of few keys");
    return problem;
}

struct Strategy {
    void (*forward)(const Problem& problem);
    void (*backward)(const Problem& problem);
    void (*describe)(const Problem& problem, vicinal_description* groups);
};

Strategy strategy_of(const Problem& problem) {
    switch (problem.call.strategy) {
        case VICINAL_TILES: return {tiles_forward, tiles_backward, tiles_describe};
        case VICINAL_DENSE: return {dense_forward, dense_backward, dense_describe};
        default: return {simple_forward, simple_backward, simple_describe};
    }
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
    return vicinal::guarded(message, message_bytes, [&] {
        const vicinal::Problem problem = vicinal::settled(call, vicinal::Purpose::FORWARD);
        vicinal::strategy_of(problem).forward(problem);
    });
}

int64_t vicinal_attend_backward(const vicinal_call* call, char* message, int64_t message_bytes) {
    return vicinal::guarded(message, message_bytes, [&] {
        const vicinal::Problem problem = vicinal::settled(call, vicinal::Purpose::BACKWARD);
        vicinal::strategy_of(problem).backward(problem);
    });
}

int64_t vicinal_describe(const vicinal_call* call, vicinal_description* groups, int64_t num_groups, char* message,
                         int64_t message_bytes) {
    return vicinal::guarded(message, message_bytes, [&] {
        const vicinal::Problem problem = vicinal::settled(call, vicinal::Purpose::DESCRIBE);
        if (!groups || num_groups != int64_t(problem.groups.size()))
            throw vicinal::BadArgument("groups must have room for one description per head group");
        if (problem.members.empty()) throw vicinal::BadArgument("table_rows must be 1 or more to describe a problem");
        std::memset(groups, 0, sizeof(vicinal_description) * size_t(num_groups));
        vicinal::strategy_of(problem).describe(problem, groups);
    });
}

}  // extern "C"
