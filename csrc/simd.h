// Vectors of float32 for each instruction set: the few operations the kernels are written in.
//
// Every set is a struct with the same members: LANES, the vector type F, and functions on it. Masks are plain bits, the
// lowest for lane 0. Dot products run over units of 32 bits: PAIR numbers each, one float32 or two bfloat16, which
// `multiply` multiplies and sums up. A unit travels as a float whatever its bits mean. These headers are compiled once
// per instruction set with its own flags, so everything here is in an unnamed namespace or a template over the set:
// nothing may be shared with code built for another machine.

#ifndef VICINAL_SIMD_H
#define VICINAL_SIMD_H

#include <cmath>
#include <cstdint>
#include <cstring>

#include "numbers.h"

#if defined(__GNUC__) && !defined(__clang__)
// for what gcc 12's own intrinsics leave undefined on purpose (its bug 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

// Asks for a cache line that will be read, or written, or read much later; any address will do.
#if defined(__GNUC__)
#define VICINAL_PREFETCH(address) __builtin_prefetch(address)
#define VICINAL_PREFETCH_TO_WRITE(address) __builtin_prefetch(address, 1)
#define VICINAL_PREFETCH_FAR(address) __builtin_prefetch(address, 0, 2)
#elif defined(__AVX2__)
#define VICINAL_PREFETCH(address) _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T0)
#define VICINAL_PREFETCH_TO_WRITE(address) VICINAL_PREFETCH(address)
#define VICINAL_PREFETCH_FAR(address) _mm_prefetch(reinterpret_cast<const char*>(address), _MM_HINT_T1)
#else
#define VICINAL_PREFETCH(address) (void)(address)
#define VICINAL_PREFETCH_TO_WRITE(address) (void)(address)
#define VICINAL_PREFETCH_FAR(address) (void)(address)
#endif

#if defined(_MSC_VER)
#define VICINAL_APART __declspec(noinline)
#define VICINAL_LAMBDA
#define VICINAL_UNROLL
#else
#define VICINAL_APART __attribute__((noinline))
#define VICINAL_LAMBDA __attribute__((always_inline))
#define VICINAL_UNROLL _Pragma("GCC unroll 16")
#endif

namespace vicinal {
namespace {

// Any machine: four lanes that compilers turn into SSE or NEON.
struct Base {
    static constexpr int LANES = 4;
    static constexpr int PAIR = 1;
#if defined(__GNUC__)
    typedef float F __attribute__((vector_size(16)));
    static VICINAL_INLINE F add(F a, F b) { return a + b; }
    static VICINAL_INLINE F sub(F a, F b) { return a - b; }
    static VICINAL_INLINE F mul(F a, F b) { return a * b; }
    static VICINAL_INLINE F fma(F a, F b, F c) { return a * b + c; }
    static VICINAL_INLINE F multiply(F a, F b, F c) { return a * b + c; }
    static VICINAL_INLINE F max(F a, F b) { return a > b ? a : b; }
#else
    struct F {
        float lane[LANES];
        float& operator[](int i) { return lane[i]; }
        float operator[](int i) const { return lane[i]; }
    };
    static VICINAL_INLINE F add(F a, F b) { return {a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]}; }
    static VICINAL_INLINE F sub(F a, F b) { return {a[0] - b[0], a[1] - b[1], a[2] - b[2], a[3] - b[3]}; }
    static VICINAL_INLINE F mul(F a, F b) { return {a[0] * b[0], a[1] * b[1], a[2] * b[2], a[3] * b[3]}; }
    static VICINAL_INLINE F fma(F a, F b, F c) { return add(mul(a, b), c); }
    static VICINAL_INLINE F multiply(F a, F b, F c) { return add(mul(a, b), c); }
    static VICINAL_INLINE F max(F a, F b) {
        return {a[0] > b[0] ? a[0] : b[0], a[1] > b[1] ? a[1] : b[1], a[2] > b[2] ? a[2] : b[2], a[3] > b[3] ? a[3] : b[3]};
    }
#endif
    static VICINAL_INLINE F zero() { return F{0.0f, 0.0f, 0.0f, 0.0f}; }
    static VICINAL_INLINE F all(float value) { return F{value, value, value, value}; }
    static VICINAL_INLINE F load(const float* from) {
        F value;
        std::memcpy(&value, from, sizeof value);
        return value;
    }
    static VICINAL_INLINE void store(float* to, F value) { std::memcpy(to, &value, sizeof value); }
    // past the caches, at a multiple of the vector's size; others see it after `fence`
#if defined(__SSE2__) && defined(__GNUC__)
    static VICINAL_INLINE void stream(float* to, F value) { _mm_stream_ps(to, value); }
    static VICINAL_INLINE void fence() { _mm_sfence(); }
#else
    static VICINAL_INLINE void stream(float* to, F value) { store(to, value); }
    static VICINAL_INLINE void fence() {}
#endif
    static VICINAL_INLINE F select(uint32_t bits, F a, F b) {
        if (bits == 15u) return a;
        return F{bits & 1u ? a[0] : b[0], bits & 2u ? a[1] : b[1], bits & 4u ? a[2] : b[2], bits & 8u ? a[3] : b[3]};
    }
    static VICINAL_INLINE float sum(F a) { return (a[0] + a[1]) + (a[2] + a[3]); }
    static VICINAL_INLINE float largest(F a) {
        const float first = a[0] > a[1] ? a[0] : a[1], second = a[2] > a[3] ? a[2] : a[3];
        return first > second ? first : second;
    }
    // to the nearest whole number, for up to 2^22: adding this much leaves no room for a fraction
    static VICINAL_INLINE F round(F a) { return sub(add(a, all(12582912.0f)), all(12582912.0f)); }
    // 2^rounded * value for rounded in [-127, 127]: -127 gives 0
    static VICINAL_INLINE F scale(F value, F rounded) {
        // in whole numbers of a float the exponent is what was added to 2^23 + 2^22
        const F biased = add(rounded, all(12582912.0f + 127.0f));
        F power;
#if defined(__GNUC__)
        typedef uint32_t Bits __attribute__((vector_size(16)));
        power = reinterpret_cast<F>(reinterpret_cast<Bits>(biased) << 23);
#else
        for (int i = 0; i < LANES; ++i) power[i] = float_of_bits(bits_of_float(biased[i]) << 23);
#endif
        return mul(value, power);
    }
    static VICINAL_INLINE F widen_bfloat16(const uint16_t* from) {
        return F{float_of_bfloat16(from[0]), float_of_bfloat16(from[1]), float_of_bfloat16(from[2]), float_of_bfloat16(from[3])};
    }
    static VICINAL_INLINE F widen_float16(const uint16_t* from) {
        return F{float_of_float16(from[0]), float_of_float16(from[1]), float_of_float16(from[2]), float_of_float16(from[3])};
    }
    // to[d * stride + lane] = rows[lane][begin + d] for d < LANES
    static VICINAL_INLINE void transpose(const float* const* rows, int64_t begin, float* to, int64_t stride) {
        for (int d = 0; d < LANES; ++d)
            for (int lane = 0; lane < LANES; ++lane) to[d * stride + lane] = rows[lane][begin + d];
    }
};

#if defined(__AVX2__) && !defined(__AVX512F__)
struct Avx2 {
    static constexpr int LANES = 8;
    static constexpr int PAIR = 1;
    using F = __m256;
    static VICINAL_INLINE F zero() { return _mm256_setzero_ps(); }
    static VICINAL_INLINE F all(float value) { return _mm256_set1_ps(value); }
    static VICINAL_INLINE F load(const float* from) { return _mm256_loadu_ps(from); }
    static VICINAL_INLINE void store(float* to, F value) { _mm256_storeu_ps(to, value); }
    static VICINAL_INLINE void stream(float* to, F value) { _mm256_stream_ps(to, value); }
    static VICINAL_INLINE void fence() { _mm_sfence(); }
    static VICINAL_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
    static VICINAL_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static VICINAL_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static VICINAL_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static VICINAL_INLINE F multiply(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static VICINAL_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
    static VICINAL_INLINE F select(uint32_t bits, F a, F b) {
        const __m256i place = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
        const __m256i hit = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), place);
        return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(hit, place)));
    }
    static VICINAL_INLINE float sum(F a) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
    }
    static VICINAL_INLINE float largest(F a) {
        __m128 half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        half = _mm_max_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_max_ss(half, _mm_shuffle_ps(half, half, 1)));
    }
    static VICINAL_INLINE F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    static VICINAL_INLINE F scale(F value, F rounded) {
        __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(rounded), _mm256_set1_epi32(127)), 23);
        return _mm256_mul_ps(value, _mm256_castsi256_ps(power));
    }
    static VICINAL_INLINE F widen_bfloat16(const uint16_t* from) {
        __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static VICINAL_INLINE F widen_float16(const uint16_t* from) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
    static VICINAL_INLINE void transpose(const float* const* rows, int64_t begin, float* to, int64_t stride) {
        __m256 r[8], t[8];
        VICINAL_UNROLL
        for (int i = 0; i < 8; ++i) r[i] = _mm256_loadu_ps(rows[i] + begin);
        VICINAL_UNROLL
        for (int i = 0; i < 4; ++i) {
            t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        VICINAL_UNROLL
        for (int i = 0; i < 2; ++i) {
            r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
            r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
            r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
            r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
        }
        VICINAL_UNROLL
        for (int i = 0; i < 4; ++i) {
            _mm256_storeu_ps(to + i * stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
            _mm256_storeu_ps(to + (i + 4) * stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
        }
    }
};
#endif

#if defined(__AVX512F__)
struct Avx512 {
    static constexpr int LANES = 16;
    static constexpr int PAIR = 1;
    using F = __m512;
    static VICINAL_INLINE F zero() { return _mm512_setzero_ps(); }
    static VICINAL_INLINE F all(float value) { return _mm512_set1_ps(value); }
    static VICINAL_INLINE F load(const float* from) { return _mm512_loadu_ps(from); }
    static VICINAL_INLINE void store(float* to, F value) { _mm512_storeu_ps(to, value); }
    static VICINAL_INLINE void stream(float* to, F value) { _mm512_stream_ps(to, value); }
    static VICINAL_INLINE void fence() { _mm_sfence(); }
    static VICINAL_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
    static VICINAL_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static VICINAL_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static VICINAL_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static VICINAL_INLINE F multiply(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static VICINAL_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
    static VICINAL_INLINE F select(uint32_t bits, F a, F b) {
        return _mm512_mask_mov_ps(b, static_cast<__mmask16>(bits), a);
    }
    static VICINAL_INLINE float sum(F a) { return _mm512_reduce_add_ps(a); }
    static VICINAL_INLINE float largest(F a) { return _mm512_reduce_max_ps(a); }
    // to[i] = sum or maximum of one of four vectors: halves of two vectors are joined, then quarters of all four
    template <class Join>
    static VICINAL_INLINE void reduce_four(const F* from, float* to, const Join& join) {
        const F first = join(_mm512_shuffle_f32x4(from[0], from[1], 0x44), _mm512_shuffle_f32x4(from[0], from[1], 0xee));
        const F second = join(_mm512_shuffle_f32x4(from[2], from[3], 0x44), _mm512_shuffle_f32x4(from[2], from[3], 0xee));
        F all = join(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd));
        all = join(all, _mm512_shuffle_ps(all, all, 0x4e));
        all = join(all, _mm512_shuffle_ps(all, all, 0xb1));
        _mm_storeu_ps(to, _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, all)));
    }
    static VICINAL_INLINE void four_sums(const F* from, float* to) {
        reduce_four(from, to, [](F a, F b) VICINAL_LAMBDA { return add(a, b); });
    }
    static VICINAL_INLINE void four_largest(const F* from, float* to) {
        reduce_four(from, to, [](F a, F b) VICINAL_LAMBDA { return max(a, b); });
    }
    static VICINAL_INLINE F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
    // 2^rounded * value, 0 where that is not a normal number; NaN stays. The lanes that give 0 must be masked: Intel's
    // processors take some hundred cycles for each vector in which the operation itself finds a result too small.
    static VICINAL_INLINE F scale(F value, F rounded) {
        const __mmask16 is_normal = _mm512_cmp_ps_mask(rounded, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ);
        return _mm512_maskz_scalef_ps(is_normal, value, rounded);
    }
    static VICINAL_INLINE F widen_bfloat16(const uint16_t* from) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static VICINAL_INLINE F widen_float16(const uint16_t* from) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
    static VICINAL_INLINE void transpose(const float* const* rows, int64_t begin, float* to, int64_t stride) {
        __m512 r[16], t[16];
        VICINAL_UNROLL
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_ps(rows[i] + begin);
        transpose(r, t);
        VICINAL_UNROLL
        for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + i * stride, t[i]);
    }
    // 16 x 16 numbers: pairs, then fours, then quarters of registers
    static VICINAL_INLINE void transpose(__m512* r, __m512* t) {
        VICINAL_UNROLL
        for (int i = 0; i < 8; ++i) {
            t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        VICINAL_UNROLL
        for (int i = 0; i < 4; ++i) {
            r[4 * i] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
            r[4 * i + 1] = _mm512_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
            r[4 * i + 2] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
            r[4 * i + 3] = _mm512_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
        }
        // r[4 b + i] holds, in its quarter c, column 4 c + i of rows 4 b .. 4 b + 3
        VICINAL_UNROLL
        for (int i = 0; i < 4; ++i) {
            __m512 low01 = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x44), high01 = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xee);
            __m512 low23 = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x44);
            __m512 high23 = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xee);
            t[i] = _mm512_shuffle_f32x4(low01, low23, 0x88);
            t[i + 4] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
            t[i + 8] = _mm512_shuffle_f32x4(high01, high23, 0x88);
            t[i + 12] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
        }
    }
};

#if defined(__AVX512BF16__)
// bfloat16 in pairs, with sums in float32.
struct Avx512Bf16 : Avx512 {
    static constexpr int PAIR = 2;
    static VICINAL_INLINE F multiply(F a, F b, F c) {
        return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
    // sixteen numbers as eight units, of neighboring lanes
    static VICINAL_INLINE void store_pairs(float* to, F value) {
        const __m256bh narrow = _mm512_cvtneps_pbh(value);
        std::memcpy(to, &narrow, sizeof narrow);
    }
    // units of which one number stays and the other becomes 0
    static VICINAL_INLINE F one_of_pair(F a, bool low) {
        const __m512i kept = _mm512_set1_epi32(low ? 0xffff : static_cast<int>(0xffff0000u));
        return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(a), kept));
    }
    // units of one number from each of two rows
    static VICINAL_INLINE F interleave(const uint16_t* low, const uint16_t* high) {
        const __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
        const __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)));
        return _mm512_castsi512_ps(_mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
    }
};
#endif
#endif

// to[t] = the sum, or the largest number, of each of T vectors.
template <class S, int T>
VICINAL_INLINE void sums_of(const typename S::F* from, float* to) {
    int t = 0;
    if constexpr (S::LANES == 16)
        for (; t + 4 <= T; t += 4) S::four_sums(from + t, to + t);
    for (; t < T; ++t) to[t] = S::sum(from[t]);
}

template <class S, int T>
VICINAL_INLINE void largest_of(const typename S::F* from, float* to) {
    int t = 0;
    if constexpr (S::LANES == 16)
        for (; t + 4 <= T; t += 4) S::four_largest(from + t, to + t);
    for (; t < T; ++t) to[t] = S::largest(from[t]);
}

// 2^a, to about one unit in the last place, 0 where that is too small. The coefficients spread the relative error
// evenly over [-0.5, 0.5], at most 2e-9 before rounding.
template <class S>
VICINAL_INLINE typename S::F exp2_of(typename S::F a) {
    using F = typename S::F;
    if constexpr (S::LANES != 16) a = S::max(S::all(-127.0f), a);  // of two, the second is taken where one is NaN
    F whole = S::round(a), part = S::sub(a, whole);
    F value = S::all(1.535335831e-4f);
    value = S::fma(value, part, S::all(1.339887854e-3f));
    value = S::fma(value, part, S::all(9.618437406e-3f));
    value = S::fma(value, part, S::all(5.550332458e-2f));
    value = S::fma(value, part, S::all(2.402264791e-1f));
    value = S::fma(value, part, S::all(6.931472029e-1f));
    value = S::fma(value, part, S::all(1.0f));
    return S::scale(value, whole);
}

}  // namespace
}  // namespace vicinal

#endif
