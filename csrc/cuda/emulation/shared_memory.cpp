#include "shared_memory.h"

#include <string>

#include "machine.h"

namespace rmt::emulation {

const char* name(Kind kind) {
  switch (kind) {
    case Kind::kLoad:
      return "load_shared";
    case Kind::kStore:
      return "store_shared";
    case Kind::kLoadMatrices:
      return "load_matrices";
    case Kind::kCopy:
    case Kind::kCopyUnderWay:
      return "copy_async";
    default:
      return "no access";
  }
}

void SharedMemory::reset(int bytes, bool detect_races) {
  data_.assign(static_cast<size_t>(bytes), '\xff');
  detect_races_ = detect_races;
  if (detect_races) cells_.assign(static_cast<size_t>(bytes + 3) / 4, Cell{});
}

void SharedMemory::report_address(uint32_t address, uint32_t bytes, const Access& access) const {
  std::string text = std::string(name(access.what())) + " of " + std::to_string(bytes) + " bytes at byte " +
                     std::to_string(static_cast<int64_t>(address) - kBase) + " of shared memory";
  if (address % bytes != 0)
    text += " is misaligned";
  else
    text += " is out of bounds: the block has " + std::to_string(data_.size());
  fail(static_cast<int>(access.thread), text);
}

void SharedMemory::report_race(uint32_t offset, const Access& earlier, const Access& access) const {
  std::string text = std::string(name(access.what())) + " at byte " + std::to_string(offset) +
                     " of shared memory races with " + name(earlier.what()) + " of thread " +
                     std::to_string(static_cast<int>(earlier.thread));
  if (earlier.what() == Kind::kCopyUnderWay)
    text += ", which is under way until that thread's wait_copies";
  else if (earlier.warp() == access.warp())
    text += ": the warp did not meet in between";
  else
    text += ": no barrier in between";
  fail(static_cast<int>(access.thread), text);
}

}  // namespace rmt::emulation
