// From Python's arguments to the plain data of a call, for every module.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "../layout.h"

namespace rmt {

inline Layout parse_layout(const std::vector<int64_t>& ints) {
  if (ints.size() != Layout::kInts) throw std::invalid_argument("layout: expected SegmentLayout.ints");
  const auto at = [&](int i) { return static_cast<int>(ints[i]); };
  Layout layout{at(0), at(1), at(2), at(3), at(4), at(5), at(6), {}};
  for (int r = 0; r < 3; ++r) {
    const int i = 7 + 5 * r;
    layout.form[r] = {at(i), at(i + 1), at(i + 2), at(i + 3), at(i + 4)};
  }
  return layout;
}

}  // namespace rmt
