// What a thread does by itself in shared memory, and in global memory that other blocks look at.
#include <cstring>

#include "machine.h"
#include "operations.h"

namespace rmt::emulation {

void store_shared(uint32_t to, uint32_t word) {
  Warp& warp = *current->warp;
  std::memcpy(warp.block->shared.write(to, 4, current->access(Kind::kStore)), &word, 4);
  warp.stores.add(current->index, to);
}

uint32_t load_shared(uint32_t from) {
  Warp& warp = *current->warp;
  uint32_t word;
  std::memcpy(&word, warp.block->shared.read(from, 4, current->access(Kind::kLoad)), 4);
  warp.loads.add(current->index, from);
  return word;
}

void copy_async(uint32_t to, const void* from, bool wanted) {
  if (wanted && (from == nullptr || reinterpret_cast<uintptr_t>(from) % 16 != 0))
    fail("copy_async from " + address(from) + ", which is not an address of 16 aligned bytes");
  current->warp->block->shared.write(to, 16, current->access(Kind::kCopyUnderWay));
  current->copies.push_back({to, current->group, wanted ? from : nullptr});
  counted.copied_bytes += 16;
}

void commit_copies() { ++current->group; }

void wait_copies(int groups) {
  auto& copies = current->copies;
  auto copy = copies.begin();
  const int64_t last = static_cast<int64_t>(current->group) - groups;
  for (; copy != copies.end() && copy->group < last; ++copy) {
    char* to = current->warp->block->shared.end_copy(copy->to, 16, current->access(Kind::kCopy));
    if (copy->from)
      std::memcpy(to, copy->from, 16);
    else
      std::memset(to, 0, 16);
  }
  copies.erase(copies.begin(), copy);
  maybe_leave();
}

void AccessLog::add(int lane, uint32_t address) {
  const uint32_t i = next_[static_cast<size_t>(lane)]++;
  if (i >= used_) {
    if (i >= rows_.size()) rows_.emplace_back();
    rows_[i].lanes = 0;
    used_ = i + 1;
  }
  rows_[i].lanes |= 1u << lane;
  rows_[i].address[lane] = address;
}

int64_t AccessLog::flush() {
  if (used_ == 0) return 0;
  int64_t extra = 0;
  for (size_t i = 0; i < used_; ++i) {
    const Row& row = rows_[i];
    uint32_t words[32][32];
    int count[32] = {}, most = 1;
    for (int lane = 0; lane < 32; ++lane) {
      if (!(row.lanes >> lane & 1)) continue;
      const uint32_t word = row.address[lane] / 4, bank = word % 32;
      int j = 0;
      while (j < count[bank] && words[bank][j] != word) ++j;
      if (j == count[bank]) words[bank][count[bank]++] = word;
      most = count[bank] > most ? count[bank] : most;
    }
    extra += most - 1;
  }
  used_ = 0;
  next_.fill(0);
  return extra;
}

}  // namespace rmt::emulation
