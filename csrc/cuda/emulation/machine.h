// The threads of the blocks that are alive. A thread is a fiber; a warp is what the scheduler chooses, and its lanes
// take turns by themselves whenever one has to wait for the others.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "control.h"
#include "fiber.h"
#include "matrix.h"
#include "shared_memory.h"

namespace rmt::emulation {

struct Block;
struct Warp;

struct Copy {
  uint32_t to;
  uint32_t group;
  const void* from;  // null: zeros
};

struct Lane {
  Fiber fiber;
  Stack stack;
  Warp* warp;
  int index;   // in the warp
  int thread;  // in the block

  std::vector<Copy> copies;  // under way, oldest first
  uint32_t group;            // that of the next copy

  const int* looked_at;  // by the latest load_acquire, or null
  uint64_t news_seen;    // Machine::news then
  int saw;

  void begin();
  Access access(Kind kind) const;
};

// What the lanes of a warp do together.
enum class Meeting : uint8_t {
  kBarrier,
  kWarpBarrier,
  kShuffle,
  kBallot,
  kLeast,
  kMost,
  kMultiplyBF16,
  kMultiplyF16,
  kLoadMatrices,
  kLoadMatricesTransposed,
};
const char* name(Meeting meeting);

// The addresses of the accesses of one kind since the lanes last met: one row an access, as a GPU would do it for all
// lanes at once.
class AccessLog {
 public:
  void add(int lane, uint32_t address);
  // Forgets all, and returns how many wavefronts more than one each access took.
  int64_t flush();

 private:
  struct Row {
    uint32_t lanes = 0;
    uint32_t address[32];
  };
  std::vector<Row> rows_;
  size_t used_ = 0;
  std::array<uint32_t, 32> next_{};  // row of a lane's next access
};

struct Warp {
  enum class State : uint8_t { kRunnable, kPaused, kAtBarrier, kFinished };

  Block* block;
  int index;  // in the block
  State state;
  std::array<Lane, 32> lanes;

  // Every lane is in one of these sets.
  uint32_t ready, waiting, paused, finished;
  Meeting meeting;      // that the waiting lanes wait for
  int next;             // the lane to go on with, if it is ready
  uint64_t news_known;  // Machine::news when the first of the paused lanes paused
  uint64_t epoch;       // see Access

  // What the lanes bring to a meeting, and what they take away. The results stay until all have come to the next one.
  std::array<uint64_t, 32> values, value_results;
  std::array<int, 32> masks;
  std::array<uint32_t, 32> rows;
  Multiplication multiplication;
  float c_results[2][32][2];
  uint32_t matrix_results[4][32];

  AccessLog loads, stores;

  void begin();
  // Returns true to the lane that comes last, which then acts for all, and false to the others after it has acted.
  bool meet(Meeting what);
  // Orders what lanes did before in shared memory and what they do afterwards.
  void order() { ++epoch; }
  void flush_logs();
};

struct Block {
  int index = -1;  // -1: none
  uint64_t epoch;  // see Access
  int at_barrier, finished;
  SharedMemory shared;
  std::vector<std::unique_ptr<Warp>> warps;

  bool alive() const { return index >= 0; }
  void begin(int index, int threads, int shared_bytes);
};

// The lane that runs.
extern Lane* current;
extern Counters counted;

// Ends the launch: std::runtime_error is raised there, naming the thread.
[[noreturn]] void fail(int thread, const std::string& what);
[[noreturn]] void fail(const std::string& what);
std::string address(const void* of);

// Where a random schedule may leave the warp.
void maybe_leave();
// Leaves the warp; returns when the scheduler comes back to the lane.
void leave(Warp::State state);
bool strict_warps();

}  // namespace rmt::emulation
