// matrix.cpp's multiplication, compiled for each instruction set in a namespace of its own: no include guard.

using Halves = uint16_t __attribute__((vector_size(16)));
using Words = uint32_t __attribute__((vector_size(32)));
using Ints = int32_t __attribute__((vector_size(32)));
using Floats = float __attribute__((vector_size(32)));

struct FromBF16 {
  static inline __attribute__((always_inline)) void convert(const Halves& in, Floats& out) {
    out = reinterpret_cast<Floats>(__builtin_convertvector(in, Words) << 16);
  }
};

struct FromF16 {
  static inline __attribute__((always_inline)) void convert(const Halves& in, Floats& out) {
    const Ints h = __builtin_convertvector(in, Ints);
    const Ints sign = (h & 0x8000) << 16, magnitude = h & 0x7fff;
    const Floats small = __builtin_convertvector(magnitude, Floats) * 0x1p-24f;
    Ints u = (magnitude << 13) + (112 << 23);
    u = magnitude >= 0x7c00 ? u + (112 << 23) : u;
    u = magnitude < 0x400 ? reinterpret_cast<Ints>(small) : u;
    out = reinterpret_cast<Floats>(u | sign);
  }
};

template <class From>
inline __attribute__((always_inline)) void load(const uint32_t* words, Floats& out) {
  Halves halves;
  std::memcpy(&halves, words, sizeof halves);
  From::convert(halves, out);
}

// A word's place in its row of 32 is lane = 4 * row + word of the row, so that every 32 words are an 8 x 8 matrix: of a
// the quarters (upper, left), (lower, left), (upper, right), (lower, right), of b's transpose the left and right
// halves, of c the upper and lower half.
template <class From>
inline __attribute__((always_inline)) void multiply(const Multiplication& in, float (&c)[2][32][2]) {
  Floats a[4][8], b[16];
  for (int quarter = 0; quarter < 4; ++quarter)
    for (int row = 0; row < 8; ++row) load<From>(&in.a[quarter][4 * row], a[quarter][row]);
  for (int half = 0; half < 2; ++half)
    for (int column = 0; column < 8; ++column) {
      Floats of_column;
      load<From>(&in.b[half][4 * column], of_column);
      for (int k = 0; k < 8; ++k) b[8 * half + k][column] = of_column[k];
    }
  for (int half = 0; half < 2; ++half) {
    Floats sum[8] = {};
    for (int k = 0; k < 16; ++k)
#pragma GCC unroll 8
      for (int row = 0; row < 8; ++row) sum[row] += a[half + 2 * (k / 8)][row][k % 8] * b[k];
    for (int row = 0; row < 8; ++row) {
      Floats of_c;
      std::memcpy(&of_c, in.c[half][4 * row], sizeof of_c);
      of_c += sum[row];
      std::memcpy(c[half][4 * row], &of_c, sizeof of_c);
    }
  }
}

void multiply_bf16(const Multiplication& in, float (&c)[2][32][2]) { multiply<FromBF16>(in, c); }
void multiply_f16(const Multiplication& in, float (&c)[2][32][2]) { multiply<FromF16>(in, c); }
