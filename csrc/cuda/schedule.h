// Which block of a launch does what.
#pragma once

#include "device.h"

namespace rmt {

// Tiles of rows, for all heads: heads in groups of `together`, whose keys fit the L2 cache at once; within a group all
// heads' last tiles first, which see most under a causal rule, so that no long block starts late.
struct Schedule {
  int tiles, heads, together;

  struct Place {
    int tile, head;
  };
  RMT_HD int blocks() const { return tiles * heads; }
  RMT_HD Place place(int block) const {
    const int group = block / (tiles * together), rest = block - group * tiles * together;
    const int size = min_int(together, heads - group * together);
    return {tiles - 1 - rest / size, group * together + rest % size};
  }
};

}  // namespace rmt
