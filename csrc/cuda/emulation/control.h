// What a test asks of the emulation. Everything here holds for launches that begin afterwards.
#pragma once

#include <cstdint>

namespace rmt::emulation {

// `resident_blocks` blocks are alive at once; the others wait, in order, for one to finish. With seed 0 everything runs
// in order: a warp until it has to wait, a lane until its warp has to meet. Any other seed draws the order of warps and
// lanes, and lets a warp be left in the middle, the same way at every launch.
// Raises std::invalid_argument unless resident_blocks is positive.
void set_schedule(int resident_blocks = 1, uint64_t seed = 0);

// Whether accesses to shared memory are checked for races: at first they are. Bounds and alignment always are.
void set_race_detection(bool on);

// Whether only warp_barrier() and barrier() order what the lanes of a warp do in shared memory, as CUDA promises: at
// first not, and every function that a warp's lanes must call together orders it.
void set_strict_warps(bool on);

// What the latest launch did.
struct Counters {
  int64_t multiplies = 0;              // per warp
  int64_t matrix_loads = 0;            // per warp, of four matrices each
  int64_t matrix_load_conflicts = 0;   // wavefronts beyond the least: four a load
  int64_t shared_load_conflicts = 0;   // wavefronts beyond one a warp's access: an access is the n-th of its kind that
  int64_t shared_store_conflicts = 0;  //   each lane does after the lanes have met
  int64_t copied_bytes = 0;            // by copy_async, zeros included
  int64_t barriers = 0;                // per block
};
const Counters& counters();

}  // namespace rmt::emulation
