// The bits of the short floating types, one number at a time.
//
// Kernels are compiled once per instruction set and may share no code with the rest, so all of it is in an unnamed
// namespace.

#ifndef VICINAL_NUMBERS_H
#define VICINAL_NUMBERS_H

#include <cstdint>
#include <cstring>

#if defined(_MSC_VER)
#define VICINAL_INLINE __forceinline
#else
#define VICINAL_INLINE inline __attribute__((always_inline))
#endif

namespace vicinal {
namespace {

VICINAL_INLINE float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

VICINAL_INLINE uint32_t bits_of_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

VICINAL_INLINE float float_of_bfloat16(uint16_t value) { return float_of_bits(static_cast<uint32_t>(value) << 16); }

// A NaN with no bits but those of infinity and the highest one after them, as whoever adds up bits of numbers needs it.
VICINAL_INLINE float with_plain_nan(float number) { return number == number ? number : float_of_bits(0x7fc00000u); }

// To the nearest, ties to even; a NaN stays one.
VICINAL_INLINE uint16_t bfloat16_of_float(float value) {
    uint32_t bits = bits_of_float(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>(value != value ? (bits >> 16) | 0x40u : rounded);
}

VICINAL_INLINE float float_of_float16(uint16_t value) {
    uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16, rest = value & 0x7fffu;
    if (rest >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
    if (rest >= 0x400u) return float_of_bits(sign | ((rest << 13) + 0x38000000u));
    float small = static_cast<float>(rest) * 5.9604644775390625e-08f;  // 2^-24
    return sign ? -small : small;
}

VICINAL_INLINE uint16_t float16_of_float(float value) {
    uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (rest >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65536 and more
    if (rest < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
        float shifted = float_of_bits(rest) + 0.5f;
        return static_cast<uint16_t>(sign | (bits_of_float(shifted) - 0x3f000000u));
    }
    return static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + ((rest >> 13) & 1u)) >> 13));
}

}  // namespace
}  // namespace vicinal

#endif
