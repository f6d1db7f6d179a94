#include "matrix.h"

#include <cstring>

namespace rmt::emulation {

namespace portable {
namespace {
#include "multiply.h"
}
}  // namespace portable

#if defined(__x86_64__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
namespace {
#include "multiply.h"
}
}  // namespace avx2
#pragma GCC pop_options
namespace {
const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#else
namespace avx2 = portable;
constexpr bool has_avx2 = false;
#endif

void multiply_bf16(const Multiplication& in, float (&c)[2][32][2]) {
  has_avx2 ? avx2::multiply_bf16(in, c) : portable::multiply_bf16(in, c);
}
void multiply_f16(const Multiplication& in, float (&c)[2][32][2]) {
  has_avx2 ? avx2::multiply_f16(in, c) : portable::multiply_f16(in, c);
}

void transpose(const uint32_t (&matrix)[32], uint32_t (&transposed)[32]) {
  uint16_t in[8][8], out[8][8];
  std::memcpy(in, matrix, sizeof in);
  for (int row = 0; row < 8; ++row)
    for (int column = 0; column < 8; ++column) out[column][row] = in[row][column];
  std::memcpy(transposed, out, sizeof out);
}

}  // namespace rmt::emulation
