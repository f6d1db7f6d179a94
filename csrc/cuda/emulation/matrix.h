// What a warp's matrix instructions compute, from the operands of its 32 lanes at once.
#pragma once

#include <cstdint>

namespace rmt::emulation {

// Operands and result of multiply, one row per word that a lane holds.
struct Multiplication {
  alignas(64) uint32_t a[4][32];
  alignas(64) uint32_t b[2][32];
  alignas(64) float c[2][32][2];  // [row half][lane][column]
};

// c += a @ b. Each element's 16 products, exact in float32, are summed in float32 in order of the inner index, and that
// sum is added to c.
void multiply_bf16(const Multiplication& in, float (&c)[2][32][2]);
void multiply_f16(const Multiplication& in, float (&c)[2][32][2]);

// What the lanes get of one 8 x 8 matrix of 16-bit elements with its columns as rows.
void transpose(const uint32_t (&matrix)[32], uint32_t (&transposed)[32]);

}  // namespace rmt::emulation
