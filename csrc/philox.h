// Philox4x32-10 (Salmon et al., SC'11). The dropout mask of rmt_kernels/philox.py: key = seed, counter = (key / 4,
// query row in the layout, query head, batch), word = key % 4, kept iff word >= floor(p * 2^32).
#pragma once

#include "layout.h"

namespace rmt {

struct Dropout {
  double p;
  uint32_t seed_lo, seed_hi, threshold;

  RMT_HD bool on() const { return p > 0.0; }
  RMT_HD float rescale() const { return static_cast<float>(1.0 / (1.0 - p)); }
};

// Word is uint32_t or a vector of them; mul(a, m, hi, lo) is the 64-bit product of a with m.
template <class Word, class MulHiLo>
RMT_HD void philox4x32(Word c[4], uint32_t k0, uint32_t k1, MulHiLo mul) {
  for (int round = 0; round < 10; ++round) {
    Word hi0, lo0, hi1, lo1;
    mul(c[0], 0xD2511F53u, hi0, lo0);
    mul(c[2], 0xCD9E8D57u, hi1, lo1);
    c[0] = hi1 ^ c[1] ^ k0;
    c[1] = lo1;
    c[2] = hi0 ^ c[3] ^ k1;
    c[3] = lo0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace rmt
