// How scores, signs aside, become exponents of 2; and what dropout multiplies by.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "../problem.h"
#include "device.h"

namespace rmt {

struct Scale {
  float factor;            // |scale| * log2(e); 1 where the scale is 0, and one operand is taken to be 0 instead
  float coarse;            // a power of two, factor or less
  float size;              // |scale|, likewise
  float signed_factor;     // scale * log2(e)
  float rescale;           // of what dropout keeps; 1 without
  uint32_t kept, flipped;  // on the packed words of one operand: the sign of the scale, or zero

  static Scale of(const Problem& p) {
    const float scale = p.scale, size = std::fabs(scale);
    const bool zero = size < FLT_MIN;
    Scale found{};
    found.rescale = p.dropout.rescale();
    found.size = zero ? 1.0f : size;
    found.factor = static_cast<float>(std::min(found.size * 1.4426950408889634, static_cast<double>(FLT_MAX)));
    found.signed_factor = zero ? 0.0f : std::copysign(found.factor, scale);
    int exponent = 0;
    std::frexp(found.factor, &exponent);
    found.coarse = std::ldexp(1.0f, exponent - 1);
    found.kept = zero ? 0u : ~0u;
    found.flipped = scale < 0.0f && !zero ? 0x80008000u : 0u;
    return found;
  }
  RMT_DEVICE bool changes_words() const { return flipped != 0 || kept == 0; }
  RMT_DEVICE uint32_t signed_word(uint32_t word) const { return (word & kept) ^ flipped; }
};

}  // namespace rmt
