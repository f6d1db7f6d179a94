// From a warp's results to rows in global memory.
#pragma once

#include "device.h"

namespace rmt {

// Four lanes hold a 4 x 4 matrix of words, a row each: afterwards a column each.
RMT_DEVICE void transpose_lanes(uint32_t (&words)[4]) {
  const bool odd = device::thread() & 1, upper = device::thread() & 2;
  const auto exchange = [](uint32_t& low, uint32_t& high, bool keeps_high, int mask) {
    const uint32_t got = device::shuffle_xor(keeps_high ? low : high, mask);
    low = keeps_high ? got : low;
    high = keeps_high ? high : got;
  };
  exchange(words[0], words[1], odd, 1), exchange(words[2], words[3], odd, 1);
  exchange(words[0], words[2], upper, 2), exchange(words[1], words[3], upper, 2);
}

// Stores one of the two rows of a result that a lane's group of four holds, 8 * kTiles columns of which the first
// `width` are wanted: `value(n, i)` is element i (0 or 1) of the lane's pair in columns 8n to 8n + 7. Nothing is
// stored where `to` is null.
template <class Element, int kTiles, class Value>
RMT_DEVICE void store_row(char* to, int width, Value value) {
  static_assert(kTiles % 4 == 0);
  const int t = device::thread() % 4;
  RMT_UNROLL for (int n = 0; n < kTiles; n += 4) {
    uint32_t words[4];
    RMT_UNROLL for (int i = 0; i < 4; ++i) words[i] = device::pack<Element>(value(n + i, 0), value(n + i, 1));
    transpose_lanes(words);
    const int column = 8 * (n + t);
    if (to != nullptr && column < width)
      *reinterpret_cast<Vector*>(to + 2 * column) = {{words[0], words[1], words[2], words[3]}};
  }
}

}  // namespace rmt
