#include "isa.h"

#if defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace vicinal {
namespace {

struct Machine {
    bool avx2, avx512, avx512_bf16;
};

#if defined(_MSC_VER) && defined(_M_X64)
Machine look() {
    int basic[4], extended[4] = {}, more[4] = {};
    __cpuid(basic, 0);
    const int leaves = basic[0];
    __cpuid(basic, 1);
    if (leaves >= 7) {
        __cpuidex(extended, 7, 0);
        __cpuidex(more, 7, 1);
    }
    const auto has = [](int word, int bit) { return (word >> bit & 1) != 0; };
    // the operating system must save the wide registers when it switches threads
    const unsigned long long saved = has(basic[2], 27) ? _xgetbv(0) : 0;
    Machine machine;
    machine.avx2 = (saved & 0x06) == 0x06 && has(extended[1], 5) && has(basic[2], 12) && has(basic[2], 29);
    machine.avx512 = machine.avx2 && (saved & 0xe6) == 0xe6 && has(extended[1], 16) && has(extended[1], 17) &&
                     has(extended[1], 30) && has(extended[1], 31);
    machine.avx512_bf16 = machine.avx512 && has(more[0], 5);
    return machine;
}
#elif defined(__x86_64__)
Machine look() {
    __builtin_cpu_init();  // these also ask whether the operating system saves the registers
    Machine machine;
    // every processor with AVX2 has the conversions of half precision, which older compilers cannot ask for
    machine.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    machine.avx512 = machine.avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if defined(VICINAL_WITH_AVX512_BF16)
    machine.avx512_bf16 = machine.avx512 && __builtin_cpu_supports("avx512bf16");
#else
    machine.avx512_bf16 = false;
#endif
    return machine;
}
#else
Machine look() { return {false, false, false}; }
#endif

}  // namespace

vicinal_isa best_isa() {
    [[maybe_unused]] static const Machine machine = look();
    vicinal_isa best = VICINAL_BASE;
#if defined(VICINAL_WITH_AVX2)
    if (machine.avx2) best = VICINAL_AVX2;
#endif
#if defined(VICINAL_WITH_AVX512)
    if (machine.avx512) best = VICINAL_AVX512;
#endif
#if defined(VICINAL_WITH_AVX512_BF16)
    if (machine.avx512_bf16) best = VICINAL_AVX512_BF16;
#endif
    return best;
}

}  // namespace vicinal
