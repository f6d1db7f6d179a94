// Which accesses to a cell of shared memory, 4 bytes, no barrier orders. It takes one write and two reads to remember.
#pragma once

#include <cstdint>

namespace rmt::emulation {

enum class Kind : uint64_t { kNone, kLoad, kStore, kLoadMatrices, kCopy, kCopyUnderWay };
const char* name(Kind kind);

struct Access {
  uint64_t thread : 10;
  uint64_t kind : 3;
  uint64_t warp_epoch : 29;   // counts what orders the lanes of the thread's warp, barriers included
  uint64_t block_epoch : 22;  // counts barriers

  Kind what() const { return static_cast<Kind>(kind); }
  uint64_t warp() const { return thread / 32; }

  // Whether `later` may happen at the same time.
  bool races(const Access& later) const {
    if (what() == Kind::kNone) return false;
    if (what() == Kind::kCopyUnderWay) return true;
    if (block_epoch != later.block_epoch || thread == later.thread) return false;
    return warp() != later.warp() || warp_epoch == later.warp_epoch;
  }
};

class Cell {
 public:
  // Each returns an earlier access that races with this one, or null, and remembers this one.
  const Access* read(const Access& now) {
    if (write_.races(now)) return &write_;
    remember(now);
    return nullptr;
  }
  const Access* write(const Access& now) {
    if (write_.races(now)) return &write_;
    for (const Access& read : read_)
      if (read.races(now)) return &read;
    write_ = now;
    read_[0] = read_[1] = {};
    return nullptr;
  }
  // Ends a copy that was under way.
  void end_copy(const Access& now) { write_ = now; }

 private:
  // Two reads suffice: of different warps, where there are any since the last barrier, or else of different lanes since
  // the lanes were last ordered. Any later write that races with some read races with one of these.
  void remember(const Access& now) {
    Access &first = read_[0], &second = read_[1];
    const bool two = second.what() != Kind::kNone;
    if (first.what() == Kind::kNone || first.block_epoch != now.block_epoch) {
      first = now;
      second = {};
    } else if (two && first.warp() != second.warp()) {
      return;
    } else if (first.warp() != now.warp()) {
      second = now;
    } else if (first.warp_epoch != now.warp_epoch) {
      first = now;
      second = {};
    } else if (first.thread != now.thread) {
      second = now;
    }
  }

  Access write_ = {}, read_[2] = {};
};

}  // namespace rmt::emulation
