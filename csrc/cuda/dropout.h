// Which softmax entries of a product's 16 x 8 result survive dropout: csrc/philox.h, shared out over lanes so that
// four numbers, which one Philox block yields, cost a lane one block.
#pragma once

#include "../problem.h"
#include "device.h"

namespace rmt {

struct Draw {
  uint32_t seed_low, seed_high, threshold, b;

  RMT_DEVICE explicit Draw(const Problem& p, int sample) : threshold(p.dropout.threshold), b(sample) {
    const uint64_t seed = p.seed == nullptr ? 0 : static_cast<uint64_t>(*p.seed);
    seed_low = static_cast<uint32_t>(seed), seed_high = static_cast<uint32_t>(seed >> 32);
  }

  // Four bits: whether keys 4 * quad to 4 * quad + 3 are kept for a row of the layout and a query head.
  RMT_DEVICE uint32_t quad(int quad, int row, int head) const {
    uint32_t words[4] = {static_cast<uint32_t>(quad), static_cast<uint32_t>(row), static_cast<uint32_t>(head), b};
    philox4x32(words, seed_low, seed_high, [](uint32_t x, uint32_t y, uint32_t& high, uint32_t& low) {
      high = device::multiply_high(x, y);
      low = x * y;
    });
    uint32_t kept = 0;
    RMT_UNROLL for (int i = 0; i < 4; ++i) kept |= static_cast<uint32_t>(words[i] >= threshold) << i;
    return kept;
  }
};

// Bit i: whether element i of the lane's result is kept, where result rows are queries and columns are keys from `key`
// (a multiple of 8) on. `row` and `head` are, for even lanes, of the lane's first row, for odd lanes of its second.
RMT_DEVICE uint32_t kept_by_rows(const Draw& draw, int key, int row, int head) {
  const int t = device::thread() % 4;
  const bool odd = t % 2 == 1;
  const uint32_t mine = draw.quad(key / 4 + t / 2, row, head), other = device::shuffle_xor(mine, 1);
  // An even lane holds the quad's first two keys, an odd one its last two.
  return odd ? (other >> 2) | (mine & 12u) : (mine & 3u) | ((other & 3u) << 2);
}

// The same where result rows are keys from `key` (a multiple of 16) on and columns are queries: `row` and `head` are of
// the lane's first column for lanes with lane / 4 even, of its second for others.
RMT_DEVICE uint32_t kept_by_columns(const Draw& draw, int key, int row, int head) {
  const int g = device::thread() % 32 / 4, j = g % 4;
  // Of the four blocks that four lanes need, (quad, quad + 2) x (column, column + 1), each lane draws one.
  uint32_t kept = draw.quad(key / 4 + g / 4 + 2 * (j / 2), row, head) << (4 * j);
  kept |= device::shuffle_xor(kept, 4);
  kept |= device::shuffle_xor(kept, 8);
  kept >>= j;
  return (kept & 1u) | ((kept >> 3) & 2u) | ((kept >> 6) & 4u) | ((kept >> 9) & 8u);
}

}  // namespace rmt
