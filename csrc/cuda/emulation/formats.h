// The 16-bit floating point formats, rounding to nearest, ties to even, as a GPU converts them.
#pragma once

#include <bit>
#include <cstdint>

namespace rmt::emulation {

constexpr uint16_t kNaN16 = 0x7fff;  // what a GPU makes of every NaN, in both formats

inline float from_bf16(uint16_t h) { return std::bit_cast<float>(static_cast<uint32_t>(h) << 16); }

inline uint16_t to_bf16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return kNaN16;
  return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}

inline float from_f16(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, exponent = h & 0x7c00u, magnitude = h & 0x7fffu;
  if (exponent == 0)  // a multiple of 2^-24
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-24f));
  const uint32_t rebias = exponent == 0x7c00u ? 224u << 23 : 112u << 23;
  return std::bit_cast<float>(sign | ((magnitude << 13) + rebias));
}

inline uint16_t to_f16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x), magnitude = u & 0x7fffffffu;
  const uint32_t sign = u >> 16 & 0x8000u;
  if (magnitude > 0x7f800000u) return kNaN16;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // from 65520 on
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5, whose last bit is 2^-24, rounds
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(sum) - std::bit_cast<uint32_t>(0.5f)));
  }
  return static_cast<uint16_t>(sign | ((magnitude + 0xfffu + (magnitude >> 13 & 1) - (112u << 23)) >> 13));
}

}  // namespace rmt::emulation
