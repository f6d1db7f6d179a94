// Tiles of rows in shared memory: where an element lies, how tiles arrive, how they become operands of a product.
#pragma once

#include "device.h"

namespace rmt {

// Rows of kWidth 16-bit elements. A row's chunks of 16 bytes are exchanged by the row's number, so that eight rows'
// chunks of one column, which is what a warp reads at once, lie in different banks.
template <int kWidth>
struct Tile {
  static constexpr int kRowBytes = 2 * kWidth, kChunks = kWidth / 8;
  static_assert(kChunks % 8 == 0, "rows of whole 128 bytes");

  RMT_HD static constexpr int bytes(int rows) { return rows * kRowBytes; }
  RMT_DEVICE static Shared chunk_at(Shared base, int row, int chunk) {
    return base + row * kRowBytes + ((chunk ^ (row & 7)) << 4);
  }
  RMT_DEVICE static Shared word_at(Shared base, int row, int column) {
    return chunk_at(base, row, column / 8) + (column % 8) * 2;
  }
};

// Operands of `device::multiply`, read from a tile by a warp. The letters are of c (m x n) += a (m x k) @ b (k x n):
// what the tile's rows and columns are decides which function makes the reader. Its lanes' addresses are one number
// each, worked out where the product begins (see device::opaque).
template <int kWidth>
struct Reader {
  Shared address;
  bool transposed;

  // a, 16 x 16: rows are m, columns k.
  RMT_DEVICE static Reader a(Shared base) { return {at(base, lane() % 16, lane() / 16), false}; }
  // a, 16 x 16: rows are k, columns m.
  RMT_DEVICE static Reader a_transposed(Shared base) { return {at(base, low_rows(), lane() / 8 % 2), true}; }
  // b, twice, 16 x 8 each: rows are n, columns k. Words 0 and 1 are of rows 0 to 7, words 2 and 3 of rows 8 to 15.
  RMT_DEVICE static Reader b(Shared base) { return {at(base, low_rows(), lane() / 8 % 2), false}; }
  // b, twice, 16 x 8 each: rows are k, columns n. Words 0 and 1 are of columns 0 to 7, words 2 and 3 of 8 to 15.
  RMT_DEVICE static Reader b_transposed(Shared base) { return {at(base, lane() % 16, lane() / 16), true}; }

  // The operand that starts at (row, 8 * chunk): row a multiple of 8, chunk even.
  RMT_DEVICE void read(uint32_t (&words)[4], int row, int chunk) const {
    // The base is a multiple of a row: exchanging chunks is an exclusive or on the whole address.
    const Shared from = (address ^ static_cast<Shared>(chunk << 4)) + row * Tile<kWidth>::kRowBytes;
    transposed ? device::load_matrices_transposed(words, from) : device::load_matrices(words, from);
  }

 private:
  // Lane 8i + r addresses row r of the i-th of four matrices, which are the quarters of 16 x 16 elements: the second
  // lies below the first and the third right of it, or the other way round.
  RMT_DEVICE static int lane() { return device::opaque(device::thread()) % 32; }
  RMT_DEVICE static int low_rows() { return lane() % 8 + lane() / 16 * 8; }
  RMT_DEVICE static Shared at(Shared base, int row, int chunk) { return Tile<kWidth>::chunk_at(base, row, chunk); }
};

// One head's keys or values: the first `cache` rows may lie in a tensor of their own.
struct Keys {
  const char *cached, *main;             // of key 0; main + n * stride is key n's address for n >= cache
  int64_t cached_stride, stride;         // bytes
  int cache;

  RMT_DEVICE Keys(const Matrix& cached_keys, const Matrix& keys, int cache_rows, int b, int g) : cache(cache_rows) {
    cached = cached_keys.data + 2 * (b * cached_keys.batch + g * cached_keys.head);
    cached_stride = 2 * cached_keys.row, stride = 2 * keys.row;
    main = keys.data + 2 * (b * keys.batch + g * keys.head) - cache_rows * stride;
  }
  RMT_DEVICE const char* row(int n) const {
    const bool old = n < cache;
    return (old ? cached : main) + n * (old ? cached_stride : stride);
  }
};

// Starts copies of rows [first, first + kRows) to a tile, 16 bytes a thread. `address(row)` is where a row lies or would
// lie; nothing is read where it is not `wanted(row)`, nor in columns from `width` on: those become zeros.
template <int kWidth, int kRows, int kThreads, class Address, class Wanted>
RMT_DEVICE void copy_rows(Shared base, int first, int width, int thread, Address address, Wanted wanted) {
  using T = Tile<kWidth>;
  constexpr int kAtOnce = kThreads / T::kChunks;
  static_assert(kThreads % T::kChunks == 0 && kRows % kAtOnce == 0);
  const int chunk = thread % T::kChunks, start = thread / T::kChunks;
  const bool there = chunk * 8 < width;
  RMT_UNROLL for (int i = 0; i < kRows / kAtOnce; ++i) {
    const int row = start + i * kAtOnce;
    device::copy_async(T::chunk_at(base, row, chunk), address(first + row) + chunk * 16, there & wanted(first + row));
  }
}

}  // namespace rmt
