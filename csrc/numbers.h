// The numbers that tensors hold, read and written one at a time as double.

#ifndef VICINAL_NUMBERS_H
#define VICINAL_NUMBERS_H

#include <cmath>
#include <cstdint>
#include <cstring>

namespace vicinal {

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

inline float float_of(uint32_t bits) {
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

inline uint32_t bits_of(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    return bits;
}

inline double load(const double& number) { return number; }
inline double load(const float& number) { return number; }
inline double load(const BFloat16& number) { return float_of(uint32_t(number.bits) << 16); }

inline double load(const Float16& number) {
    const uint32_t sign = uint32_t(number.bits & 0x8000) << 16, exponent = number.bits >> 10 & 31;
    const uint32_t mantissa = number.bits & 1023;
    if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13);
    if (exponent) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
    const double tiny = std::ldexp(double(mantissa), -24);
    return sign ? -tiny : tiny;
}

inline void store(double& place, double number) { place = number; }
inline void store(float& place, double number) { place = float(number); }

inline void store(BFloat16& place, double number) {
    const uint32_t bits = bits_of(float(number));
    // to nearest, ties to even; adding to a NaN could make an infinity of it
    place.bits = number != number ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void store(Float16& place, double number) {
    const uint32_t bits = bits_of(float(number)), magnitude = bits & 0x7fffffff;
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    if (magnitude > 0x7f800000) {
        place.bits = 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // what rounds to 65536 or more
        place.bits = uint16_t(sign | 0x7c00);
    } else if (magnitude >= 0x38800000) {
        place.bits = uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
    } else {  // a multiple of 2^-24; nearbyint rounds ties to even
        place.bits = uint16_t(sign | uint16_t(std::nearbyint(std::ldexp(std::fabs(number), 24))));
    }
}

}  // namespace vicinal

#endif
