// What blocks know of each other's stores past the L1 cache (store_far): those before a barrier that came before a
// release, once a thread has acquired it and a barrier has come after that. As vector clocks that count barriers.
#pragma once

#include <cstdint>
#include <map>
#include <unordered_map>

namespace rmt::emulation {

class FarMemory {
 public:
  // Who acts: a thread of a block that has seen so many barriers.
  struct Actor {
    int block, thread;
    uint64_t barriers;
  };

  void clear();
  void acquire(const int* counter, const Actor& who);
  void release(const int* counter, const Actor& who);
  // The thread that stored there last, of whose store the actor does not know; null where all is well.
  const Actor* unknown(const void* at, const Actor& who);
  void store(const void* at, const Actor& who) { last_store_[at] = who; }

 private:
  using Clocks = std::map<int, uint64_t>;  // of a block: stores that saw fewer barriers are known

  struct Knowledge {
    Clocks known, acquired;  // the block's, and what one thread has acquired since the last barrier
    Actor acquirer{-1, -1, 0};
  };

  static void merge(Clocks& to, const Clocks& from);
  Knowledge& of(const Actor& who);

  std::unordered_map<const void*, Actor> last_store_;
  std::unordered_map<const int*, Clocks> released_;
  std::unordered_map<int, Knowledge> blocks_;
};

}  // namespace rmt::emulation
