// Bringing rows of a tensor into the forms that gemm.h multiplies.
#pragma once

#include "gemm.h"

namespace rmt::RMT_ISA {

constexpr int round_up(int x, int to) { return (x + to - 1) / to * to; }

// One head of K or V: rows that may lie in two tensors (the cache given apart, and the rest).
template <class T>
struct Rows {
  const T* front;  // rows [0, split)
  const T* back;   // rows [split, ...)
  int64_t front_stride, back_stride;
  int split;

  const T* operator[](int i) const { return i < split ? front + i * front_stride : back + (i - split) * back_stride; }
};

template <class T>
Rows<T> head_of(const Matrix& rest, const Matrix& cache, int split, int b, int h) {
  return {reinterpret_cast<const T*>(cache.data) + b * cache.batch + h * cache.head,
          reinterpret_cast<const T*>(rest.data) + b * rest.batch + h * rest.head, cache.row, rest.row, split};
}
template <class T>
T* row_at(const Matrix& m, int b, int h, int64_t i) {
  return reinterpret_cast<T*>(m.data) + b * m.batch + h * m.head + i * m.row;
}

// Rows of one head lie far apart where heads lie side by side in memory: no hardware prefetcher follows them.
constexpr int kAhead = 12;  // rows
template <class T>
RMT_INLINE void prefetch_row(const T* row, int count) {
  for (int j = 0; j < count; j += 64 / static_cast<int>(sizeof(T))) __builtin_prefetch(row + j);
}

// Copy `count` elements as E, zeros up to `width`. bfloat16 -> bfloat16 copies bits; all else passes through float.
template <class E, class T>
RMT_INLINE void stage_row(E* to, const T* from, int count, int width) {
  int j = 0;
  if constexpr (sizeof(E) == sizeof(T)) {
    constexpr int step = sizeof(vf) / sizeof(E);
    for (; j + step <= count; j += step) store(to + j, load<vf>(from + j));
    if (j < count) memcpy(to + j, from + j, (count - j) * sizeof(E));
  } else {
    for (; j + W <= count; j += W) narrow(to + j, widen(from + j));
    if (j < count) narrow_part(to + j, widen_part(from + j, count - j), count - j);
  }
  if (count < width) memset(to + count, 0, (width - count) * sizeof(E));
}

template <int Block, int... Lane>
RMT_INLINE void swap_blocks(vu& a, vu& b, std::integer_sequence<int, Lane...>) {
  const vu x = a, y = b;
  a = __builtin_shufflevector(x, y, ((Lane & Block) ? Lane - Block + W : Lane)...);
  b = __builtin_shufflevector(x, y, ((Lane & Block) ? Lane + W : Lane + Block)...);
}
template <int Block>
RMT_INLINE void transpose_stage(vu (&r)[W]) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & Block)) swap_blocks<Block>(r[i], r[i + Block], std::make_integer_sequence<int, W>{});
}

// to[j][i] = from[i][j], 32-bit words; rows and columns rounded up to W are read and written.
inline void transpose(uint32_t* to, int to_stride, const uint32_t* from, int from_stride, int rows, int columns) {
  for (int i = 0; i < rows; i += W) {
    for (int j = 0; j < columns; j += W) {
      vu r[W];
#pragma GCC unroll 16
      for (int x = 0; x < W; ++x) r[x] = load<vu>(from + (i + x) * from_stride + j);
      if constexpr (W == 16) transpose_stage<8>(r);
      if constexpr (W >= 8) transpose_stage<4>(r);
      transpose_stage<2>(r);
      transpose_stage<1>(r);
#pragma GCC unroll 16
      for (int x = 0; x < W; ++x) store(to + (j + x) * to_stride + i, r[x]);
    }
  }
}

// The columns of a transposed panel of pairs, [depth / 2][columns][2], as rows: to[depth][columns].
inline void part_pairs(bf16* to, const bf16* from, int depth, int columns) {
  for (int d = 0; d < depth; d += 2) {
    const auto* words = reinterpret_cast<const uint32_t*>(from + d * columns);
    for (int j = 0; j < columns; j += W) {
      const vu pair = load<vu>(words + j);
      store(to + d * columns + j, __builtin_convertvector(pair, vh));
      store(to + (d + 1) * columns + j, __builtin_convertvector(pair >> 16, vh));
    }
  }
}

// Rows of E, side by side in pairs where the engine wants pairs: to[r / pair][ldb][pair] for `rows` rows.
template <class Engine>
inline void pair_rows(typename Engine::elem* to, int ldb, const typename Engine::elem* from, int stride, int rows,
                      int columns) {
  if constexpr (Engine::pair == 1) {
    for (int r = 0; r < rows; ++r)
      for (int j = 0; j < columns; j += W) store(to + r * ldb + j, load<vf>(from + r * stride + j));
  } else {
    for (int r = 0; r < rows; r += 2) {
      const bf16 *even = from + r * stride, *odd = even + stride;
      auto* words = reinterpret_cast<uint32_t*>(to + r * ldb);
      for (int j = 0; j < columns; j += W) {
        const vu low = __builtin_convertvector(load<vh>(even + j), vu);
        const vu high = __builtin_convertvector(load<vh>(odd + j), vu);
        store(words + j, low | high << 16);
      }
    }
  }
}

}  // namespace rmt::RMT_ISA
