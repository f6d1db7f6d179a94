// Query rows as tiles hold them. The heads of a group lie side by side, so that they share a tile's keys: packed row r
// of a key/value head is query r / group in the group's head r % group.
#pragma once

#include "../problem.h"
#include "tile.h"

namespace rmt {

// A sample's padding and place, read on the GPU: numbers out of range are clamped, and the sample is not `ok`.
struct CheckedSample : Sample {
  bool ok = true;

  RMT_DEVICE static int clamped(const int32_t* values, int b, int most, int otherwise, bool& ok) {
    if (values == nullptr) return otherwise;
    const int value = values[b];
    ok = ok && value >= 0 && value <= most;
    return min_int(max_int(value, 0), most);
  }
  RMT_DEVICE CheckedSample(const Problem& p, int b) {
    const int rows = p.layout.token_rows;
    token_begin = clamped(p.token_starts, b, rows, 0, ok);
    token_end = clamped(p.token_lengths, b, rows, rows, ok);
    cache_begin = clamped(p.cache_starts, b, p.layout.cache, 0, ok);
    query_start = clamped(p.query_start, b, max_int(0, rows - p.queries), -1, ok);
  }
};

// Division by a number that is known before the kernel starts, of numbers below 2^31.
struct Divisor {
  int by = 1, shift = 0;
  uint32_t factor = 0;

  Divisor() = default;
  explicit Divisor(int divisor) : by(divisor) {
    while (1ll << shift < divisor) ++shift;
    factor = static_cast<uint32_t>(((1ll << (31 + shift)) + divisor - 1) / divisor);
  }
  RMT_DEVICE int operator()(int x) const {
    return by == 1 ? x : static_cast<int>(device::multiply_high(static_cast<uint32_t>(x), factor) >> (shift - 1));
  }
};

// The packed rows of one key/value head of one sample.
struct PackedRows {
  const Divisor& group;
  int count, first_head, b;

  RMT_DEVICE PackedRows(const Problem& p, const Divisor& by_group, int sample, int kv_head)
      : group(by_group), count(p.queries * by_group.by), first_head(kv_head * by_group.by), b(sample) {}

  RMT_DEVICE int query(int r) const { return group(r); }
  RMT_DEVICE int head(int r) const { return first_head + r - group(r) * group.by; }
  RMT_DEVICE char* address(const Matrix& m, int r) const {
    const int q = group(r), h = first_head + r - q * group.by;
    return m.data + 2 * (b * m.batch + h * m.head + q * m.row);
  }
  // Whether every so many packed rows are as many bytes apart: `step` of them, which `even_step` tells.
  RMT_DEVICE bool even(int step) const { return step % group.by == 0; }
  RMT_DEVICE int64_t even_step(const Matrix& m, int step) const { return 2 * m.row * group(step); }
  // Place in a tensor (batch, heads, queries).
  RMT_DEVICE int64_t number(const Problem& p, int r) const {
    return (static_cast<int64_t>(b) * p.heads + head(r)) * p.queries + query(r);
  }
};

// Starts copies of packed rows [first, first + kRows) to a tile; rows that are not there, and those of queries [hidden,
// hidden_end), become zeros.
template <int kWidth, int kRows, int kThreads>
RMT_DEVICE void copy_packed(Shared base, const PackedRows& rows, const Matrix& matrix, int width, int first, int hidden,
                            int hidden_end, int thread) {
  const Copy<kWidth, kRows, kThreads> copy(base, width, thread);
  const int last = first + kRows;
  const bool all = last <= rows.count && (rows.query(last - 1) < hidden || rows.query(first) >= hidden_end);
  if (all && rows.even(copy.kAtOnce)) {
    copy.even(rows.address(matrix, first + copy.row), rows.even_step(matrix, copy.kAtOnce));
  } else {
    copy.uneven([&](int r) { return rows.address(matrix, first + r); },
                [&](int r) {
                  const int q = rows.query(first + r);
                  return (first + r < rows.count) & ((q < hidden) | (q >= hidden_end));
                });
  }
}

// What packed row r sees: nothing where there is no such row.
RMT_DEVICE Row row_seen(const Problem& p, const Sample& sample, const PackedRows& rows, int r) {
  return r < rows.count ? row_of(p.layout, sample, rows.query(r)) : Row{0, 0, 0, 0, -1};
}
RMT_HD bool sees_nothing(const Row& row) { return row.lo == row.hi && row.own < 0; }

// Whether a row sees a key of its interval, which has no gap.
RMT_HD bool sees_plainly(int lo, int hi, int key) {
  return static_cast<uint32_t>(key - lo) < static_cast<uint32_t>(hi - lo);
}
// Whether a row sees a key. Without branches: asked of every score of a tile that needs a mask.
RMT_HD bool sees(const Row& row, int key) {
  return ((key >= row.lo) & (key < row.hi) & ((key < row.gap_lo) | (key >= row.gap_hi))) | (key == row.own);
}

// A span of a warp's lanes' spans, in every lane. Not finished.
RMT_DEVICE Span warp_span(const Span& s) {
  Span all;
  all.lo = device::least(s.lo), all.hi = device::most(s.hi);
  all.gap_lo = device::most(s.gap_lo), all.gap_hi = device::least(s.gap_hi);
  all.all_lo = device::most(s.all_lo), all.all_hi = device::least(s.all_hi);
  all.any_gap_lo = device::least(s.any_gap_lo), all.any_gap_hi = device::most(s.any_gap_hi);
  all.own_lo = device::least(s.own_lo), all.own_hi = device::most(s.own_hi);
  return all;
}

// Whose rows a block computes.
struct Place {
  int b, kv_head, first;  // sample, key/value head, first packed row
  bool ok;                // the sample's numbers are in range
};

// What the rows of a tile see, in shared memory: each row by itself, and together; and whose rows they are. It is read
// again for every tile of keys: kept in registers it would take those that the products need.
template <int kRows, int kKeys>
struct View {
  static constexpr int kTable = 0, kTogether = 5 * kRows, kWalk = kTogether, kOpen = kWalk + 6, kPlain = kOpen + 4,
                       kFence = kPlain + 1, kPlace = kFence + 4, kKeyAt = kPlace + 4, kBytes = 4 * (kKeyAt + 8);

  RMT_DEVICE static void put(Shared base, int at, int value) { device::store_shared(base + 4 * at, value); }
  RMT_DEVICE static int get(Shared base, int at) { return device::load_shared(base + 4 * at); }

  // Packed rows [first, first + kRows) of a call whose keys lie in [first_key, last_key). All of a block's threads call
  // this; what it writes is there after the next barrier. Rows that see nothing are left out of what rows see together:
  // whatever is computed for them is replaced.
  template <int kThreads>
  RMT_DEVICE static void make(Shared base, const Problem& p, const CheckedSample& sample, const PackedRows& rows,
                              const Place& place, int first_key, int last_key) {
    for (int r = device::thread(); r < kRows; r += kThreads) {
      Row row = row_seen(p, sample, rows, place.first + r);
      row.lo = max_int(row.lo, first_key), row.hi = min_int(row.hi, last_key);
      if (row.lo >= row.hi) row.lo = row.hi = 0;
      if (row.own < first_key || row.own >= last_key) row.own = -1;
      const int fields[5] = {row.lo, row.hi, row.gap_lo, row.gap_hi, row.own};
      RMT_UNROLL for (int i = 0; i < 5; ++i) put(base, kTable + i * kRows + r, fields[i]);
    }
    device::barrier();
    if (device::thread() >= 32) return;
    Span own;
    for (int r = device::thread(); r < kRows; r += 32) {
      const Row row = load(base, r);
      if (!sees_nothing(row)) own.add(row);
    }
    Span span = warp_span(own);
    span.finish();
    const Walk walk = walk_of(span, kKeys);
    const Fence fence = fence_of(p.layout, sample, max_int(span.hi, span.own_hi));
    if (device::thread() > 0) return;
    RMT_UNROLL for (int i = 0; i < 3; ++i) {
      put(base, kWalk + 2 * i, walk.begin[i]);
      put(base, kWalk + 2 * i + 1, walk.end[i]);
    }
    const int rest[13] = {span.all_lo,   span.all_hi, span.any_gap_lo, span.any_gap_hi, span.plain(),
                          fence.limit,   fence.stale, fence.hole_lo,   fence.hole_hi,   place.b,
                          place.kv_head, place.first, place.ok};
    RMT_UNROLL for (int i = 0; i < 13; ++i) put(base, kOpen + i, rest[i]);
    put_keys(base, 0, Keys::of(p.cache_key, p.key, p.cache_rows, place.b, place.kv_head));
    put_keys(base, 4, Keys::of(p.cache_value, p.value, p.cache_rows, place.b, place.kv_head));
  }

  RMT_DEVICE static Row load(Shared base, int r) {
    int fields[5];
    RMT_UNROLL for (int i = 0; i < 5; ++i) fields[i] = get(base, kTable + i * kRows + r);
    return {fields[0], fields[1], fields[2], fields[3], fields[4]};
  }
  // The first tile of keys to visit from `tile` on, or -1.
  RMT_DEVICE static int from(Shared base, int tile) {
    Walk walk;
    RMT_UNROLL for (int i = 0; i < 3; ++i)
      walk.begin[i] = get(base, kWalk + 2 * i), walk.end[i] = get(base, kWalk + 2 * i + 1);
    return walk.from(tile);
  }
  // Whether no row needs a mask on a tile of keys.
  RMT_DEVICE static bool open(Shared base, int tile) {
    Span span;
    span.all_lo = get(base, kOpen), span.all_hi = get(base, kOpen + 1);
    span.any_gap_lo = get(base, kOpen + 2), span.any_gap_hi = get(base, kOpen + 3);
    return span.open(tile * kKeys, (tile + 1) * kKeys);
  }
  // Whether no row has a gap or a key of its own.
  RMT_DEVICE static bool plain(Shared base) { return get(base, kPlain) != 0; }
  // Where keys lie, or values.
  RMT_DEVICE static Keys keys(Shared base) { return get_keys(base, 0); }
  RMT_DEVICE static Keys values(Shared base) { return get_keys(base, 4); }
  RMT_DEVICE static Place place(Shared base) {
    return {get(base, kPlace), get(base, kPlace + 1), get(base, kPlace + 2), get(base, kPlace + 3) != 0};
  }
  RMT_DEVICE static Fence fence(Shared base) {
    return {get(base, kFence), get(base, kFence + 1), get(base, kFence + 2), get(base, kFence + 3)};
  }

 private:
  RMT_DEVICE static void put_keys(Shared base, int at, const Keys& keys) {
    const uint64_t addresses[2] = {reinterpret_cast<uint64_t>(keys.cached), reinterpret_cast<uint64_t>(keys.main)};
    RMT_UNROLL for (int i = 0; i < 2; ++i) {
      put(base, kKeyAt + at + 2 * i, static_cast<int>(addresses[i]));
      put(base, kKeyAt + at + 2 * i + 1, static_cast<int>(addresses[i] >> 32));
    }
  }
  RMT_DEVICE static Keys get_keys(Shared base, int at) {
    uint64_t addresses[2];
    RMT_UNROLL for (int i = 0; i < 2; ++i)
      addresses[i] = static_cast<uint32_t>(get(base, kKeyAt + at + 2 * i)) |
                     static_cast<uint64_t>(static_cast<uint32_t>(get(base, kKeyAt + at + 2 * i + 1))) << 32;
    return {reinterpret_cast<const char*>(addresses[0]), reinterpret_cast<const char*>(addresses[1])};
  }
};

}  // namespace rmt
