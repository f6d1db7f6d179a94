// Blocks add to one sum in global memory, one after another, in the same order always: so the sum has the same bits
// always, and needs no atomics. A counter tells how many have added; a block's turn has come when all before it have.
//
// Two threads see to it, of different warps, for each takes hundreds of cycles that no other warp should wait. One
// looks for the block's turn: the barrier after that lets everybody read what others stored before they passed theirs
// on. The other passes the turn on after a barrier behind which everybody has stored; until then it is noted in shared
// memory. Nobody waits for ever: a block waits only for blocks that began before it.
#pragma once

#include "device.h"

namespace rmt {

struct Turns {
  static constexpr int kBytes = 8;                    // of shared memory
  static constexpr int kPassing = 32, kWaiting = 64;  // threads

  Shared note;

  RMT_DEVICE static bool waits() { return device::thread() == kWaiting; }
  RMT_DEVICE static bool passes() { return device::thread() == kPassing; }

  RMT_DEVICE static bool has_come(const int* counter, int before) {
    return before == 0 || device::load_acquire(counter) == before;
  }
  // What the next `pass` does: of which counter (-1: none) it says that so many have had their turn.
  RMT_DEVICE void write(int counter, int turns) const {
    device::store_shared(note, counter), device::store_shared(note + 4, turns);
  }
  RMT_DEVICE void pass(int* counters) const {
    const int counter = device::load_shared(note);
    if (counter >= 0) device::store_release(counters + counter, device::load_shared(note + 4));
  }
};

}  // namespace rmt
