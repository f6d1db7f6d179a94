// Small matrix products on packed operands: C (m x n) (+)= A (m x k) @ B (k x n), n a multiple of 16, at most 64.
//
// A is row-major; B is a panel [k / pair][ldb][pair], where `pair` consecutive k of one column lie side by side
// (1 for float, 2 for bfloat16). A column of k steps is then a column of 32-bit words for both types.
#pragma once

#include <utility>

#include "problem.h"
#include "vec.h"

namespace rmt::RMT_ISA {

constexpr int kPanel = 64;  // columns of a full panel of B

struct F32 {
  using elem = float;
  static constexpr int pair = 1, exp_degree = 6;
  static RMT_INLINE vf multiply_add(vf c, uint32_t a, vu b) {
    float x;
    memcpy(&x, &a, 4);
    return c + x * (vf)b;
  }
};

#if defined(__AVX512BF16__)
struct Bf16 {
  using elem = bf16;
  static constexpr int pair = 2, exp_degree = 4;
  static RMT_INLINE vf multiply_add(vf c, uint32_t a, vu b) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
  }
};
#endif

// MR x NV accumulators stay in registers; a step of k reads NV vectors of B and broadcasts MR words of A. They start
// at zero and are added to C at the end: a long sum made of short ones is the more accurate.
template <class Math, int MR, int NV>
void micro(int k, const uint32_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, bool add) {
  vf acc[MR][NV];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) acc[i][j] = vf{};
  for (int step = 0; step < k; ++step, ++a, b += ldb) {
    vu column[NV];
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) column[j] = load<vu>(b + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) acc[i][j] = Math::multiply_add(acc[i][j], a[i * lda], column[j]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j)
      store(c + i * ldc + j * W, add ? load<vf>(c + i * ldc + j * W) + acc[i][j] : acc[i][j]);
}

using Micro = void (*)(int, const uint32_t*, int, const uint32_t*, int, float*, int, bool);

// Widest strip of columns, in vectors, and rows per strip: as many accumulators as leave room for B and one of A.
constexpr int kWidest = W == 16 ? 4 : 2;
constexpr int rows_for(int nv) { return W != 16 ? 6 : nv == 4 ? 6 : nv == 3 ? 8 : 12; }

template <class Math, int NV, int... MR>
constexpr auto micros(std::integer_sequence<int, MR...>) {
  struct {
    Micro of[sizeof...(MR)];
  } table{{micro<Math, MR + 1, NV>...}};
  return table;
}

template <class Math, int NV>
void strip(int m, int k, const uint32_t* a, int lda, const uint32_t* b, int ldb, float* c, int ldc, bool add) {
  constexpr int most = rows_for(NV);
  static constexpr auto table = micros<Math, NV>(std::make_integer_sequence<int, most>{});
  for (int i = 0; i < m; i += most) {
    const int rows = min_int(most, m - i);
    table.of[rows - 1](k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
  }
}

// The engine that this instruction set's own vector units make.
template <class Math_>
struct VectorEngine {
  using Math = Math_;
  using elem = typename Math::elem;
  static constexpr int pair = Math::pair, exp_degree = Math::exp_degree;
  // Query rows of a forward tile: four strips of six. On AVX-512, 24 / 48 / 96 rows ran at 159 / 154 / 145 GFLOP/s a
  // core (bfloat16, T 1024): the taller the tile, the more hidden entries along the diagonal.
  static constexpr int tile_rows = 24;

  static void gemm(const Runtime&, int m, int n, int k, const elem* a, int lda, const elem* b, int ldb, float* c,
                   int ldc, bool add) {
    const auto* aw = reinterpret_cast<const uint32_t*>(a);
    const auto* bw = reinterpret_cast<const uint32_t*>(b);
    const int kw = k / pair, law = lda / pair;
    for (int j = 0; j < n;) {
      const int vectors = min_int((n - j) / W, kWidest);
      if constexpr (kWidest == 4) {
        if (vectors == 4) strip<Math, 4>(m, kw, aw, law, bw + j, ldb, c + j, ldc, add);
        if (vectors == 3) strip<Math, 3>(m, kw, aw, law, bw + j, ldb, c + j, ldc, add);
      }
      if (vectors == 2) strip<Math, 2>(m, kw, aw, law, bw + j, ldb, c + j, ldc, add);
      if (vectors == 1) strip<Math, 1>(m, kw, aw, law, bw + j, ldb, c + j, ldc, add);
      j += vectors * W;
    }
  }
  static void release(const Runtime&) {}
};

// bfloat16 through the matrix unit (AMX), as oneDNN's block-reduce GEMM reaches it.
struct MatrixEngine {
  using elem = bf16;
  static constexpr int pair = 2, exp_degree = 4;
  static constexpr int tile_rows = 64;  // four hardware tiles of 16 rows: fewer calls. Not yet measured.

  static void gemm(const Runtime& runtime, int m, int n, int k, const elem* a, int lda, const elem* b, int ldb,
                   float* c, int ldc, bool add) {
    runtime.brgemm(m, n, k, lda, ldb, ldc, add, &a->bits, &b->bits, c);
  }
  static void release(const Runtime& runtime) { runtime.brgemm_release(); }
};

}  // namespace rmt::RMT_ISA
