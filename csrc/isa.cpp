#include "isa.h"

#if defined(_MSC_VER) && defined(_M_X64)
#include <immintrin.h>
#include <intrin.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace vicinal {
namespace {

struct Machine {
    bool avx2, avx512, avx512_bf16, amx;
    bool is_quick_in_pairs;  // products of bfloat16 in pairs take no longer than those of float32
};

#if defined(_MSC_VER) && defined(_M_X64)
Machine look() {
    int basic[4], extended[4] = {}, more[4] = {};
    __cpuid(basic, 0);
    const int leaves = basic[0];
    const bool is_amd = basic[1] == 0x68747541;  // "Auth" of AuthenticAMD
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
    machine.amx = false;
    machine.is_quick_in_pairs = is_amd;
    return machine;
}
#elif defined(__x86_64__)
// Whether there are matrix registers for bfloat16 and the system lets this process use them, for which it must be asked.
bool may_use_matrices() {
#if !defined(VICINAL_WITH_AMX)
    return false;
#elif defined(VICINAL_EMULATE_AMX)
    return true;
#elif defined(__linux__)
    constexpr unsigned BFLOAT16 = 1u << 22, TILES = 1u << 24, SYSTEM_SAVES = 1u << 27;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM of <asm/prctl.h>, a bit of XCR0
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & BFLOAT16) || !(d & TILES)) return false;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & SYSTEM_SAVES)) return false;
    unsigned low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low >> 17 & 3u) != 3u) return false;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}

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
    machine.amx = machine.avx512_bf16 && may_use_matrices();
    machine.is_quick_in_pairs = __builtin_cpu_is("amd");
    return machine;
}
#else
Machine look() { return {false, false, false, false, false}; }
#endif

}  // namespace

namespace {

const Machine& this_machine() {
    static const Machine machine = look();
    return machine;
}

}  // namespace

vicinal_isa best_isa() {
    [[maybe_unused]] const Machine& machine = this_machine();
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
#if defined(VICINAL_WITH_AMX)
    if (machine.amx) best = VICINAL_AMX;
#endif
    return best;
}

vicinal_isa usual_isa(int64_t dtype) {
    const vicinal_isa best = best_isa();
    if (best < VICINAL_AVX512_BF16 || (best == VICINAL_AMX && dtype == VICINAL_BFLOAT16)) return best;
    // on Intel's a vector of products in pairs takes four times as long as one of float32 (docs/decisions.md)
    return dtype == VICINAL_BFLOAT16 && this_machine().is_quick_in_pairs ? best : VICINAL_AVX512;
}

}  // namespace vicinal
