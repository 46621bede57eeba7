// Runs recorded calls (tests/ops/record_calls.py) with every buffer exactly as large as its tensor and outputs left
// unwritten, so that valgrind sees what is read outside, or before it was written.
//
//     replay FILE [ISA [STRATEGY]]
//
// The numbers are those of vicinal.h and replace what was recorded; nothing is run where the machine lacks the set. Sets
// that are for bfloat16 get only its calls: the others would be those of AVX-512 again.
//
// The file holds calls, each of them: 0 or 1 (backward), plus 2 where addresses stood beside the record, the record with
// its addresses, the number of buffers, and for each buffer the word of the record that points to it, its bytes, whether
// it is an output, and its contents.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "vicinal.h"

namespace {

int64_t read_number(FILE* file) {
    int64_t number = 0;
    if (std::fread(&number, sizeof number, 1, file) != 1) return -1;
    return number;
}

// Depends on every byte; a branch on it makes valgrind complain where one was never written.
unsigned sum(const unsigned char* bytes, int64_t count) {
    unsigned total = 0;
    for (int64_t i = 0; i < count; ++i) total = total * 31 + bytes[i];
    return total;
}

// The addresses that stand beside a record, taken out of it.
vicinal_places taken_out(vicinal_call& call) {
    const auto take = [](int64_t& number) {
        const int64_t taken = number;
        number = 0;
        return taken;
    };
    return {take(call.threads),         take(call.query.data),    take(call.key.data),        take(call.value.data),
            take(call.bias.data),       take(call.out.data),      take(call.lse.data),        take(call.grad_out.data),
            take(call.grad_lse.data),   take(call.grad_query.data), take(call.grad_key.data), take(call.grad_value.data),
            take(call.grad_bias.data)};
}

int64_t run(vicinal_call& call, bool is_backward, bool is_placed, char* message, int64_t message_bytes) {
    if (!is_placed)
        return (is_backward ? vicinal_attend_backward : vicinal_attend)(&call, message, message_bytes);
    const vicinal_places places = taken_out(call);
    return (is_backward ? vicinal_attend_backward_at : vicinal_attend_at)(&call, &places, message, message_bytes);
}

}  // namespace

int main(int argc, char** argv) {
    FILE* file = argc >= 2 && argc <= 4 ? std::fopen(argv[1], "rb") : nullptr;
    if (!file) return std::fprintf(stderr, "usage: replay FILE [ISA [STRATEGY]]\n"), 2;
    if (argc > 2 && std::atoi(argv[2]) > vicinal_best_isa())
        return std::printf("not run: this machine lacks instruction set %s\n", argv[2]), 0;
    const bool only_bfloat16 = argc > 2 && std::atoi(argv[2]) >= VICINAL_AVX512_BF16;
    int calls = 0;
    for (int64_t kind; (kind = read_number(file)) >= 0;) {
        vicinal_call call;
        if (std::fread(&call, sizeof call, 1, file) != 1) return 2;
        struct Buffer {
            unsigned char* bytes;
            int64_t count;
            bool is_output;
        };
        std::vector<Buffer> buffers;
        for (int64_t left = read_number(file); left > 0; --left) {
            const int64_t word = read_number(file), count = read_number(file), is_output = read_number(file);
            Buffer buffer = {static_cast<unsigned char*>(std::malloc(size_t(count))), count, is_output != 0};
            std::vector<unsigned char> contents(static_cast<size_t>(count));
            if (std::fread(contents.data(), 1, contents.size(), file) != contents.size()) return 2;
            if (!buffer.is_output) std::memcpy(buffer.bytes, contents.data(), contents.size());
            const int64_t address = static_cast<int64_t>(reinterpret_cast<intptr_t>(buffer.bytes));
            std::memcpy(reinterpret_cast<char*>(&call) + 8 * word, &address, sizeof address);
            buffers.push_back(buffer);
        }
        if (argc > 2) call.isa = std::atoi(argv[2]);
        if (argc > 3 && call.dtype != VICINAL_FLOAT64) call.strategy = std::atoi(argv[3]);
        char message[512];
        const bool is_left_out = only_bfloat16 && call.dtype != VICINAL_BFLOAT16;
        const int64_t status = is_left_out ? 0 : run(call, kind & 1, kind & 2, message, sizeof message);
        if (status) return std::fprintf(stderr, "call %d: %s\n", calls, message), 1;
        for (const Buffer& buffer : buffers) {
            if (!is_left_out && buffer.is_output && sum(buffer.bytes, buffer.count) == 1) std::printf("one\n");
            std::free(buffer.bytes);
        }
        calls += !is_left_out;
    }
    std::printf("%d calls\n", calls);
    return calls ? 0 : 2;
}
