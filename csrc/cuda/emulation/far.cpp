#include "far.h"

namespace rmt::emulation {

void FarMemory::clear() {
  last_store_.clear();
  released_.clear();
  blocks_.clear();
}

void FarMemory::merge(Clocks& to, const Clocks& from) {
  for (const auto& [block, barriers] : from) {
    uint64_t& clock = to[block];
    if (barriers > clock) clock = barriers;
  }
}

// The block's knowledge, in which what was acquired before the last barrier has become everybody's.
FarMemory::Knowledge& FarMemory::of(const Actor& who) {
  Knowledge& knowledge = blocks_[who.block];
  if (!knowledge.acquired.empty() && who.barriers > knowledge.acquirer.barriers) {
    merge(knowledge.known, knowledge.acquired);
    knowledge.acquired.clear();
  }
  return knowledge;
}

void FarMemory::acquire(const int* counter, const Actor& who) {
  const auto released = released_.find(counter);
  if (released == released_.end()) return;
  Knowledge& knowledge = of(who);
  // Where two threads acquire between barriers, the later one is taken to know what both have.
  knowledge.acquirer = who;
  merge(knowledge.acquired, released->second);
}

void FarMemory::release(const int* counter, const Actor& who) {
  const Knowledge& knowledge = of(who);
  Clocks clocks = knowledge.known;
  if (knowledge.acquirer.thread == who.thread) merge(clocks, knowledge.acquired);
  clocks[who.block] = who.barriers;
  released_[counter] = clocks;
}

const FarMemory::Actor* FarMemory::unknown(const void* at, const Actor& who) {
  const auto found = last_store_.find(at);
  if (found == last_store_.end()) return nullptr;
  const Actor& last = found->second;
  if (last.block == who.block) return last.thread == who.thread || last.barriers < who.barriers ? nullptr : &last;
  const Knowledge& knowledge = of(who);
  const auto knows = [&](const Clocks& clocks) {
    const auto clock = clocks.find(last.block);
    return clock != clocks.end() && clock->second > last.barriers;
  };
  return knows(knowledge.known) || (knowledge.acquirer.thread == who.thread && knows(knowledge.acquired)) ? nullptr
                                                                                                          : &last;
}

}  // namespace rmt::emulation
