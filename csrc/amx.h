// Products of bfloat16 in Intel's matrix registers: [16 rows][16 lanes] of float32 sums from [16 rows][32 numbers] times
// [16 pairs][16 lanes].
//
// With VICINAL_EMULATE_AMX plain loops stand for them, in which sanitizers see every number that is read.

#ifndef VICINAL_AMX_H
#define VICINAL_AMX_H

#include <cstdint>
#include <cstring>

#include "numbers.h"

namespace vicinal {
namespace {

// What the eight registers hold. SHORT ones hold half as many numbers of a dot product: 16, in 8 pairs.
enum MatrixRegister { SUM, LEFT = 4, RIGHT, SHORT_LEFT, SHORT_RIGHT };

constexpr int SUMS = 4;          // registers from SUM on
constexpr int MATRIX_ROWS = 16;  // of sums, and their lanes
constexpr int MATRIX_DEPTH = 32; // numbers of a dot product

struct MatrixShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 32, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 8};
};

#if defined(VICINAL_EMULATE_AMX)

struct Matrix {
    struct Registers {
        unsigned char bytes[8][16][64];
    };
    static Registers& registers() {
        static thread_local Registers all;
        return all;
    }
    static void open() {}
    static void close() {}
    template <int I>
    static void clear() {
        std::memset(registers().bytes[I], 0, sizeof registers().bytes[I]);
    }
    template <int I>
    static void load(const void* from, int64_t stride) {
        const MatrixShapes shapes;
        clear<I>();
        for (int row = 0; row < shapes.rows[I]; ++row)
            std::memcpy(registers().bytes[I][row], static_cast<const char*>(from) + row * stride, shapes.row_bytes[I]);
    }
    template <int I>
    static void store(void* to, int64_t stride) {
        for (int row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(to) + row * stride, registers().bytes[I][row], 64);
    }
    template <int I, int L, int R>
    static void multiply() {
        const auto at = [](int i, int row, int number) {
            uint16_t bits;
            std::memcpy(&bits, registers().bytes[i][row] + 2 * number, 2);
            return float_of_bfloat16(bits);
        };
        const MatrixShapes shapes;
        for (int row = 0; row < 16; ++row)
            for (int lane = 0; lane < 16; ++lane) {
                float sum;
                std::memcpy(&sum, registers().bytes[I][row] + 4 * lane, 4);
                for (int k = 0; k < shapes.row_bytes[L] / 2; ++k) sum += at(L, row, k) * at(R, k / 2, 2 * lane + k % 2);
                std::memcpy(registers().bytes[I][row] + 4 * lane, &sum, 4);
            }
    }
};

#else

struct Matrix {
    // Registers belong to a thread, and are no work for its switches once they are closed.
    static VICINAL_INLINE void open() {
        alignas(64) static const MatrixShapes shapes;
        __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
    }
    static VICINAL_INLINE void close() { __asm__ volatile("tilerelease" ::); }
    template <int I>
    static VICINAL_INLINE void clear() {
        __asm__ volatile("tilezero %%tmm%c0" ::"i"(I));
    }
    template <int I>
    static VICINAL_INLINE void load(const void* from, int64_t stride) {
        __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(I), "r"(from), "r"(stride) : "memory");
    }
    template <int I>
    static VICINAL_INLINE void store(void* to, int64_t stride) {
        __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(I), "r"(to), "r"(stride) : "memory");
    }
    // sums += left times right
    template <int I, int L, int R>
    static VICINAL_INLINE void multiply() {
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(I), "i"(L), "i"(R));
    }
};

#endif

}  // namespace
}  // namespace vicinal

#endif
