// Which block of a launch does what.
#pragma once

#include "device.h"

namespace rmt {

// Tiles for all heads: heads in groups of `together`, whose tensors fit the L2 cache at once; within a group all heads'
// last tiles first. In the forward pass those see most under a causal rule, so no long block starts late. In the
// backward pass blocks of a head wait for each other, last tile first: heads between them give them time.
struct Schedule {
  int tiles, heads, together;

  struct Place {
    int tile, head;
  };
  // As many heads together as fill half of the cache, each with so many bytes.
  static Schedule of(int tiles, int heads, int64_t l2_bytes, int64_t bytes) {
    const int64_t fit = l2_bytes / 2 / (bytes > 0 ? bytes : 1);
    return {tiles, heads, static_cast<int>(fit < 1 ? 1 : fit < heads ? fit : heads)};
  }
  RMT_HD int blocks() const { return tiles * heads; }
  RMT_HD Place place(int block) const {
    const int group = block / (tiles * together), rest = block - group * tiles * together;
    const int size = min_int(together, heads - group * together);
    return {tiles - 1 - rest / size, group * together + rest % size};
  }
};

}  // namespace rmt
