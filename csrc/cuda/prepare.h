// What the backward pass needs to know of each tile of packed query rows, worked out once instead of for every tile of
// keys that meets it.
#pragma once

#include "rows.h"
#include "scale.h"
#include "softmax.h"

namespace rmt {

// In the workspace. Tiles are of kRows packed rows; there are `tiles` for each sample and key/value head.
struct BackwardSpace {
  int tiles;
  float* numbers;  // (batch, kv_heads, tiles, 2, kRows): pivot, which is lse as an exponent of 2, and delta
  int* rows;       // (batch, tiles, 5, kRows): what each row sees, the fields of Row
  int* views;      // (batch, tiles, kViewInts): the tiles of keys that rows see, and those that need no mask
  int* turns;      // (batch, kv_heads, tiles): how many tiles of keys have added to the tile's gradient
  int* tickets;    // how many blocks have begun
  float* sums;     // (batch, kv_heads, tiles, kRows * width): the tile's gradient so far, as lanes hold it
};
constexpr int kViewInts = 12;  // whole copies

// What prepare_kernel leaves of a tile in `views`, as int `at(i)` of it says.
struct TileView {
  template <class At>
  RMT_DEVICE static Walk walk(At at) {
    return {{at(0), at(2), at(4)}, {at(1), at(3), at(5)}};
  }
  template <class At>
  RMT_DEVICE static bool open(At at, int from, int to) {
    Span span;
    span.all_lo = at(6), span.all_hi = at(7), span.any_gap_lo = at(8), span.any_gap_hi = at(9);
    return span.open(from, to);
  }
  template <class At>
  RMT_DEVICE static int tile(At at) {
    return at(10);
  }
  template <class At>
  RMT_DEVICE static bool plain(At at) {
    return at(11) != 0;
  }
  RMT_DEVICE static void leave(int* view, const Walk& walk, const Span& span, int tile) {
    RMT_UNROLL for (int i = 0; i < 3; ++i) view[2 * i] = walk.begin[i], view[2 * i + 1] = walk.end[i];
    view[6] = span.all_lo, view[7] = span.all_hi, view[8] = span.any_gap_lo, view[9] = span.any_gap_hi;
    view[10] = tile, view[11] = span.plain();
  }
};

constexpr int kPrepareThreads = 128;
constexpr float kLarge = 16777216.0f;  // 2^24

// Of a row: its pivot, +inf where it sees nothing, which makes every probability 0.
RMT_DEVICE float pivot_of(float lse) {
  if (lse == -infinity()) return infinity();
  const float pivot = lse * kLog2e, size = pivot < 0.0f ? -pivot : pivot;
  // So large an lse is off by whole exponents: raised by its own rounding, no probability exceeds 1.
  return size > kLarge ? pivot + size * 2.4e-7f : pivot;
}

// A block prepares a tile: delta = out . grad_out - grad_lse, what its rows see, and their gradient where that is 0
// because no tile of keys will meet them.
template <class Element, int kRows, int kKeys>
RMT_KERNEL(kPrepareThreads, 4)
prepare_kernel(RMT_CONSTANT Problem p, RMT_CONSTANT Divisor group, RMT_CONSTANT BackwardSpace space) {
  const int thread = device::thread(), block = device::block();
  if (block == 0 && thread == 0) *space.tickets = 0;
  if (block >= p.batch * p.kv_heads * space.tiles) return;
  const int tile = block % space.tiles, head = block / space.tiles, b = head / p.kv_heads, kv_head = head % p.kv_heads;
  const CheckedSample sample(p, b);
  const PackedRows rows(p, group, b, kv_head);
  const int first = tile * kRows;
  if (thread == 0) space.turns[block] = 0;

  constexpr int kLanes = 8;  // of a row
  float* numbers = space.numbers + static_cast<int64_t>(block) * 2 * kRows;
  for (int i = thread / kLanes; i < kRows; i += kPrepareThreads / kLanes) {
    const int r = first + i;
    const bool there = r < rows.count;
    float delta = 0.0f;
    for (int column = thread % kLanes * 8; there && column < p.head_dim; column += 8 * kLanes) {
      const Vector out = *reinterpret_cast<const Vector*>(rows.address(p.out, r) + 2 * column);
      const Vector grad = *reinterpret_cast<const Vector*>(rows.address(p.grad_out, r) + 2 * column);
      RMT_UNROLL for (int w = 0; w < 4; ++w) {
        const auto x = device::unpack<Element>(out.word[w]), y = device::unpack<Element>(grad.word[w]);
        delta = device::fma(x.low, y.low, delta), delta = device::fma(x.high, y.high, delta);
      }
    }
    delta = row_sum(delta);
    delta += device::shuffle_xor(delta, 4);
    if (thread % kLanes > 0) continue;
    const float lse = there ? p.lse[rows.number(p, r)] : -infinity();
    if (there && p.grad_lse != nullptr) delta -= p.grad_lse[rows.number(p, r)];
    numbers[i] = pivot_of(lse), numbers[kRows + i] = lse == -infinity() ? 0.0f : delta;
  }

  Span own;
  for (int i = thread % 32; i < kRows; i += 32) {
    const Row row = row_seen(p, sample, rows, first + i);
    if (!sees_nothing(row)) own.add(row);
    if (kv_head > 0 || thread >= 32) continue;
    int* fields = space.rows + (static_cast<int64_t>(b) * space.tiles + tile) * 5 * kRows + i;
    fields[0] = row.lo, fields[kRows] = row.hi, fields[2 * kRows] = row.gap_lo, fields[3 * kRows] = row.gap_hi;
    fields[4 * kRows] = row.own;
  }
  Span span = warp_span(own);
  span.finish();
  const Walk walk = walk_of(span, kKeys);
  if (kv_head == 0 && thread == 0)
    TileView::leave(space.views + (static_cast<int64_t>(b) * space.tiles + tile) * kViewInts, walk, span, tile);

  if (walk.from(0) >= 0) return;
  const uint32_t nothing = sample.ok ? 0u : device::pack<Element>(device::not_a_number(), device::not_a_number());
  const int columns = p.head_dim / 8;
  for (int i = thread; i < kRows * columns; i += kPrepareThreads) {
    const int r = first + i / columns;
    if (r < rows.count)
      *reinterpret_cast<Vector*>(rows.address(p.grad_query, r) +
                                 16 * (i % columns)) = {{nothing, nothing, nothing, nothing}};
  }
}

}  // namespace rmt
