// The online softmax of the rows that a thread holds, on exponents of 2.
#pragma once

#include "scale.h"

namespace rmt {

constexpr float kLn2 = 0.69314718055994530942f, kLog2e = 1.44269504088896340736f;
// 2^28: beyond it float32 scores are 32 apart, and a softmax over them is all or nothing at any temperature.
constexpr float kHuge = 268435456.0f;

RMT_DEVICE float infinity() { return device::from_bits(0x7f800000u); }

// What a score is multiplied by. score * unit - highest * unit is one fused multiply-add, whose second product is
// rounded and whose first is not; where that could matter the unit is a power of two, which makes both exact.
RMT_DEVICE float unit_of(float highest, const Scale& scale) {
  return device::product(highest < 0.0f ? -highest : highest, scale.factor) < kHuge ? scale.factor : scale.coarse;
}
RMT_DEVICE float finite(float highest) { return highest == -infinity() ? 0.0f : highest; }

// The largest and the sum over the four lanes that share a row of a product's result.
RMT_DEVICE float row_most(float x) {
  x = device::larger(x, device::shuffle_xor(x, 1));
  return device::larger(x, device::shuffle_xor(x, 2));
}
RMT_DEVICE float row_sum(float x) {
  x += device::shuffle_xor(x, 1);
  return x + device::shuffle_xor(x, 2);
}

// One row: the highest score so far, and the sum of 2^((score - highest) * unit), of which each of the row's four lanes
// has its own part until the end.
struct Softmax {
  float highest, total;

  RMT_DEVICE void start() { highest = -infinity(), total = 0.0f; }

  // Takes the highest of some scores: what weights they will have, and what all before are to be multiplied by.
  struct Step {
    float unit, pivot, fade;
    RMT_DEVICE float weight(float score) const { return device::exp2(device::fma(score, unit, -pivot)); }
  };
  RMT_DEVICE Step raise(float score, const Scale& scale) {
    const float higher = device::larger(score, highest);
    const float pivot = finite(higher), unit = unit_of(pivot, scale);
    Step step{unit, device::product(pivot, unit), 0.0f};
    // Exactly 1 where the highest score stays: nothing needs to be multiplied then.
    step.fade = device::exp2(device::product(highest, unit) - step.pivot);
    highest = higher, total *= step.fade;
    return step;
  }

  // By what power of 2 the weights are too large, because `pivot` was rounded; 0 where the unit is coarse.
  RMT_DEVICE float remainder(const Scale& scale) const {
    const float pivot = finite(highest), unit = unit_of(pivot, scale);
    return device::fma(pivot, unit, -device::product(pivot, unit));
  }
  // Log-sum-exp in natural units; -inf where nothing was seen.
  RMT_DEVICE float lse(const Scale& scale) const {
    const float sum = device::log(total == 0.0f ? 1.0f : total);

    return device::fma(highest, scale.size, sum - remainder(scale) * kLn2);
  }
};

}  // namespace rmt
