// A block's shared memory, every access to which is checked.
#pragma once

#include <cstdint>
#include <vector>

#include "races.h"

namespace rmt::emulation {

class SharedMemory {
 public:
  // The first address. No access at 0 is right.
  static constexpr uint32_t kBase = 1024;

  // New memory, every byte of it 0xff: words that are no numbers in any format.
  void reset(int bytes, bool detect_races);

  // `bytes`, a power of two, are what is accessed and what `address` must be a multiple of. Each access that is wrong
  // ends the launch with an error.
  const char* read(uint32_t address, uint32_t bytes, const Access& access) {
    check(address, bytes, access);
    if (detect_races_)
      for (uint32_t i = first_cell(address), end = i + bytes / 4; i < end; ++i)
        if (const Access* earlier = cells_[i].read(access)) report_race(4 * i, *earlier, access);
    return data_.data() + (address - kBase);
  }
  char* write(uint32_t address, uint32_t bytes, const Access& access) {
    check(address, bytes, access);
    if (detect_races_)
      for (uint32_t i = first_cell(address), end = i + bytes / 4; i < end; ++i)
        if (const Access* earlier = cells_[i].write(access)) report_race(4 * i, *earlier, access);
    return data_.data() + (address - kBase);
  }
  // Where a copy that was under way, and written with that kind, puts its bytes.
  char* end_copy(uint32_t address, uint32_t bytes, const Access& access) {
    if (detect_races_)
      for (uint32_t i = first_cell(address), end = i + bytes / 4; i < end; ++i) cells_[i].end_copy(access);
    return data_.data() + (address - kBase);
  }

 private:
  static uint32_t first_cell(uint32_t address) { return (address - kBase) / 4; }
  void check(uint32_t address, uint32_t bytes, const Access& access) const {
    const uint32_t offset = address - kBase;  // huge for addresses below
    if (address % bytes != 0 || offset > data_.size() || data_.size() - offset < bytes)
      report_address(address, bytes, access);
  }
  [[noreturn]] void report_address(uint32_t address, uint32_t bytes, const Access& access) const;
  [[noreturn]] void report_race(uint32_t offset, const Access& earlier, const Access& access) const;

  std::vector<char> data_;
  std::vector<Cell> cells_;
  bool detect_races_ = true;
};

}  // namespace rmt::emulation
