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

// Copies to shared memory, 16 bytes a thread: which column of chunks a thread copies, of which row first, and how many
// rows further on it goes on.
template <int kWidth, int kRows, int kThreads>
struct Copy {
  using T = Tile<kWidth>;
  static constexpr int kAtOnce = kThreads / T::kChunks, kTimes = kRows / kAtOnce;
  static_assert(kThreads % T::kChunks == 0 && kRows % kAtOnce == 0);

  Shared base;
  int chunk, row;
  bool there;  // columns from `width` on become zeros

  RMT_DEVICE Copy(Shared to, int width, int thread)
      : base(to), chunk(thread % T::kChunks), row(thread / T::kChunks), there(chunk * 8 < width) {}

  // Rows that lie evenly, all wanted: the thread's first one at `from`, others `step` bytes further on each.
  RMT_DEVICE void even(const char* from, int64_t step) const {
    from += chunk * 16;
    RMT_UNROLL for (int i = 0; i < kTimes; ++i, from += step)
        device::copy_async(T::chunk_at(base, row + i * kAtOnce, chunk), from, there);
  }
  // Any rows: `address(row)` is where one lies or would lie. Where it is not `wanted(row)` nothing is read, and it
  // becomes zeros.
  template <class Address, class Wanted>
  RMT_DEVICE void uneven(Address address, Wanted wanted) const {
    RMT_UNROLL_BY(1) for (int i = 0; i < kTimes; ++i) {
      const int r = row + i * kAtOnce;
      device::copy_async(T::chunk_at(base, r, chunk), address(r) + chunk * 16, there & wanted(r));
    }
  }
};

// One head's keys or values: the first `cache` rows may lie in a tensor of their own. Addresses are of key 0, so that
// key n lies at n strides from there.
struct Keys {
  const char *cached, *main;

  RMT_DEVICE static Keys of(const Matrix& cached, const Matrix& matrix, int cache, int b, int g) {
    return {cached.data + 2 * (b * cached.batch + g * cached.head),
            matrix.data + 2 * (b * matrix.batch + g * matrix.head - cache * matrix.row)};
  }
  RMT_DEVICE const char* row(const Matrix& cached_keys, const Matrix& keys, int cache, int n) const {
    const bool old = n < cache;
    return (old ? cached : main) + n * (2 * (old ? cached_keys.row : keys.row));
  }
};

// Starts copies of keys [first, first + kRows) to a tile; those that the fence keeps out become zeros.
template <int kWidth, int kRows, int kThreads>
RMT_DEVICE void copy_keys(Shared base, const Keys& from, const Matrix& cached, const Matrix& matrix, int cache,
                          int width, const Fence& fence, int first, int thread) {
  const Copy<kWidth, kRows, kThreads> copy(base, width, thread);
  const int last = first + kRows, row = first + copy.row;
  if (fence.all_alive(first, last) && (first >= cache || last <= cache)) {
    const bool old = first < cache;
    const int64_t stride = 2 * (old ? cached.row : matrix.row);
    copy.even((old ? from.cached : from.main) + row * stride, copy.kAtOnce * stride);
  } else {
    copy.uneven([&](int r) { return from.row(cached, matrix, cache, first + r); },
                [&](int r) { return fence.alive(first + r); });
  }
}

}  // namespace rmt
