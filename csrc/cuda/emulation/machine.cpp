#include "machine.h"

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>

#include "far.h"
#include "operations.h"

namespace rmt::emulation {

Lane* current = nullptr;
Counters counted;

namespace {

struct Machine {
  std::mutex one_launch;
  std::map<const void*, int> allowed_shared_bytes;

  int resident_blocks = 1;
  uint64_t seed = 0;
  bool detect_races = true, strict_warps = false;

  // The launch.
  void (*run)(void*);
  void* arguments;
  std::vector<std::unique_ptr<Block>> blocks;
  Fiber scheduler;
  uint64_t random;  // 0: everything in order
  uint64_t news;    // counts changes of memory that paused threads may wait for
  FarMemory far;
  std::string failure;  // empty: none

  uint64_t draw() {  // splitmix64
    uint64_t z = random += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }

  Warp* choose();
  void enter(Warp& warp);
  [[noreturn]] void report_deadlock() const;
};
Machine machine;

int first_lane(uint32_t lanes) { return std::countr_zero(lanes); }

// A ready lane: the first at or, cyclically, after `from`, or any.
Lane& ready_lane(Warp& warp, int from) {
  if (machine.random) from = static_cast<int>(machine.draw() % 32);
  return warp.lanes[static_cast<size_t>((first_lane(std::rotr(warp.ready, from)) + from) % 32)];
}

// Hands over to another lane of the warp, or to the scheduler if all that are not ready are paused.
void next_lane() {
  Lane& self = *current;
  Warp& warp = *self.warp;
  if (warp.ready == 0) {
    leave(Warp::State::kPaused);
    return;
  }
  current = &ready_lane(warp, (self.index + 1) % 32);
  Fiber::switch_over(self.fiber, current->fiber);
}

// A thread's life.
void live() {
  machine.run(machine.arguments);
  Lane& self = *current;
  Warp& warp = *self.warp;
  Block& block = *warp.block;
  const uint32_t bit = 1u << self.index;
  if (!self.copies.empty()) fail("ends before it has waited for all of its copies");
  if (warp.waiting) fail(std::string("ends, but lanes of its warp wait at ") + name(warp.meeting) + "()");
  warp.ready &= ~bit;
  warp.finished |= bit;
  if (warp.finished != ~0u) {
    next_lane();
  } else {
    if (block.at_barrier) fail("ends, but threads of other warps wait at barrier()");
    warp.flush_logs();
    ++block.finished;
    leave(Warp::State::kFinished);
  }
  std::abort();  // nothing comes back to a thread that has ended
}

}  // namespace

int thread() { return current->thread; }
int block() { return current->warp->block->index; }

void fail(int thread, const std::string& what) {
  machine.failure =
      "emulated GPU: block " + std::to_string(block()) + ", thread " + std::to_string(thread) + ": " + what;
  Fiber::switch_over(current->fiber, machine.scheduler);
  std::abort();
}
void fail(const std::string& what) { fail(current->thread, what); }

std::string address(const void* of) {
  char text[24];
  std::snprintf(text, sizeof text, "%p", of);
  return text;
}

bool strict_warps() { return machine.strict_warps; }

void leave(Warp::State state) {
  Lane& self = *current;
  self.warp->state = state;
  self.warp->next = self.index;
  Fiber::switch_over(self.fiber, machine.scheduler);
}

void maybe_leave() {
  if (machine.random && machine.draw() % 8 == 0) leave(Warp::State::kRunnable);
}

bool Warp::meet(Meeting what) {
  maybe_leave();
  if (finished != 0)
    fail(std::string("waits at ") + name(what) + "(), but thread " + std::to_string(32 * index + first_lane(finished)) +
         " of its warp has ended");
  if (waiting != 0 && meeting != what)
    fail(std::string("is at ") + name(what) + "(), but thread " + std::to_string(32 * index + first_lane(waiting)) +
         " of its warp is at " + name(meeting) + "()");
  const uint32_t bit = 1u << current->index;
  meeting = what;
  waiting |= bit;
  ready &= ~bit;
  if (waiting != ~0u) {
    next_lane();
    return false;
  }
  waiting = 0;
  ready = ~0u;
  flush_logs();
  if (what == Meeting::kBarrier || what == Meeting::kWarpBarrier || !machine.strict_warps) order();
  return true;
}

void Warp::flush_logs() {
  counted.shared_load_conflicts += loads.flush();
  counted.shared_store_conflicts += stores.flush();
}

namespace {

FarMemory::Actor actor() {
  const Block& block = *current->warp->block;
  return {block.index, current->thread, block.epoch};
}

void require_known(const void* at, const char* what) {
  const FarMemory::Actor* last = machine.far.unknown(at, actor());
  if (last == nullptr) return;
  fail(std::string(what) + " at what block " + std::to_string(last->block) + ", thread " +
       std::to_string(last->thread) + " stored and has not passed on: by a barrier and a release, and here by an " +
       "acquire and a barrier");
}

}  // namespace

void load_far(const void* from) {
  maybe_leave();
  if (machine.detect_races) require_known(from, "load_far");
}

void store_far(const void* to) {
  maybe_leave();
  if (!machine.detect_races) return;
  require_known(to, "store_far");
  machine.far.store(to, actor());
}

int load_acquire(const int* from) {
  maybe_leave();
  if (machine.detect_races) machine.far.acquire(from, actor());
  current->looked_at = from;
  current->news_seen = machine.news;
  return current->saw = *from;
}

void store_release(int* to, int value) {
  maybe_leave();
  if (machine.detect_races) machine.far.release(to, actor());
  *to = value;
  ++machine.news;
  maybe_leave();
}

int take_ticket(int* counter) {
  maybe_leave();
  ++machine.news;
  const int ticket = (*counter)++;
  maybe_leave();
  return ticket;
}

void pause() {
  Warp& warp = *current->warp;
  const uint32_t bit = 1u << current->index;
  // What has changed since the lane looked wakes it, however much later it pauses.
  const uint64_t seen = current->news_seen;
  current->news_seen = machine.news;
  warp.news_known = warp.paused == 0 ? seen : std::min(warp.news_known, seen);
  warp.paused |= bit;
  warp.ready &= ~bit;
  next_lane();
}

// -- blocks -----------------------------------------------------------------------------------------------------------

void Lane::begin() {
  copies.clear();
  news_seen = 0;
  group = 0;
  looked_at = nullptr;
  fiber.start(stack, live);
}

Access Lane::access(Kind kind) const {
  return {static_cast<uint64_t>(thread), static_cast<uint64_t>(kind), warp->epoch, warp->block->epoch};
}

void Warp::begin() {
  state = State::kRunnable;
  ready = ~0u;
  waiting = paused = finished = 0;
  next = 0;
  epoch = 0;
  loads.flush();
  stores.flush();
  for (size_t i = 0; i < 32; ++i) {
    lanes[i].warp = this;
    lanes[i].index = static_cast<int>(i);
    lanes[i].thread = 32 * index + lanes[i].index;
    lanes[i].begin();
  }
}

void Block::begin(int new_index, int threads, int shared_bytes) {
  index = new_index;
  epoch = 0;
  at_barrier = finished = 0;
  shared.reset(shared_bytes, machine.detect_races);
  warps.resize(static_cast<size_t>(threads / 32));
  for (size_t i = 0; i < warps.size(); ++i) {
    if (!warps[i]) warps[i] = std::make_unique<Warp>();
    warps[i]->block = this;
    warps[i]->index = static_cast<int>(i);
    warps[i]->begin();
  }
}

// -- the scheduler ----------------------------------------------------------------------------------------------------

// The warp to go on with: in order one that is runnable or else one whose paused lanes may see something new; by chance
// any of these. Null: no warp is left.
Warp* Machine::choose() {
  Warp *paused = nullptr, *chosen = nullptr;
  uint64_t candidates = 0;
  bool alive = false;
  for (auto& block : blocks) {
    if (!block->alive()) continue;
    for (auto& warp : block->warps) {
      alive |= warp->state != Warp::State::kFinished;
      const bool runnable = warp->state == Warp::State::kRunnable;
      const bool hopeful = warp->state == Warp::State::kPaused && warp->news_known != news;
      if (!random) {
        if (runnable) return warp.get();
        if (hopeful && !paused) paused = warp.get();
      } else if ((runnable || hopeful) && draw() % ++candidates == 0) {
        chosen = warp.get();
      }
    }
  }
  if (!chosen) chosen = paused;
  if (!chosen && alive) report_deadlock();
  return chosen;
}

void Machine::enter(Warp& warp) {
  warp.ready |= warp.paused;
  warp.paused = 0;
  warp.state = Warp::State::kRunnable;
  current = &ready_lane(warp, warp.next);
  Fiber::switch_over(scheduler, current->fiber);
  current = nullptr;
  if (!failure.empty()) throw std::runtime_error(failure);
}

void Machine::report_deadlock() const {
  std::string text = "emulated GPU: deadlock: no thread can go on";
  int named = 0;
  for (auto& block : blocks) {
    if (!block->alive()) continue;
    for (auto& warp : block->warps) {
      if (warp->state == Warp::State::kFinished || ++named > 8) continue;
      text += "; block " + std::to_string(block->index) + ", warp " + std::to_string(warp->index) + ": ";
      if (warp->state == Warp::State::kAtBarrier) {
        text += "waits at barrier()";
        continue;
      }
      const Lane& lane = warp->lanes[static_cast<size_t>(first_lane(warp->paused))];
      text += std::to_string(std::popcount(warp->paused)) + " threads pause, thread " + std::to_string(lane.thread);
      if (lane.looked_at) text += " having seen " + std::to_string(lane.saw) + " at " + address(lane.looked_at);
      if (warp->waiting)
        text += ", " + std::to_string(std::popcount(warp->waiting)) + " wait at " + name(warp->meeting) + "()";
    }
  }
  if (named > 8) text += "; and " + std::to_string(named - 8) + " more warps";
  throw std::runtime_error(text);
}

namespace {
constexpr int kSharedBytes = 48 * 1024, kMostSharedBytes = 227 * 1024;

void require(bool condition, const char* what, int given, const std::string& accepted) {
  if (!condition)
    throw std::invalid_argument(std::string("emulated GPU: ") + what + " is " + std::to_string(given) + ", must be " +
                                accepted);
}
}  // namespace

void allow_shared_memory(const void* kernel, int bytes) {
  require(bytes >= 0 && bytes <= kMostSharedBytes, "bytes", bytes, "0 to " + std::to_string(kMostSharedBytes));
  std::lock_guard lock(machine.one_launch);
  machine.allowed_shared_bytes[kernel] = bytes;
}

void launch(const void* kernel, int blocks, int threads, int shared_bytes, void (*run)(void* arguments),
            void* arguments) {
  std::lock_guard lock(machine.one_launch);
  const auto allowed = machine.allowed_shared_bytes.find(kernel);
  const int most = std::max(kSharedBytes, allowed == machine.allowed_shared_bytes.end() ? 0 : allowed->second);
  require(blocks > 0, "blocks", blocks, "positive");
  require(threads > 0 && threads <= 1024 && threads % 32 == 0, "threads", threads, "a multiple of 32 up to 1024");
  require(shared_bytes >= 0 && shared_bytes <= most, "shared_bytes", shared_bytes,
          "0 to " + std::to_string(most) + ", what the kernel is allowed");

  machine.run = run;
  machine.arguments = arguments;
  machine.random = machine.seed;
  machine.news = 0;
  machine.far.clear();
  machine.failure.clear();
  counted = {};
  machine.blocks.resize(static_cast<size_t>(machine.resident_blocks));
  int begun = 0;
  for (auto& block : machine.blocks) {
    if (!block) block = std::make_unique<Block>();
    block->index = -1;
    if (begun < blocks) block->begin(begun++, threads, shared_bytes);
  }
  while (Warp* warp = machine.choose()) {
    machine.enter(*warp);
    Block& block = *warp->block;
    if (block.finished < static_cast<int>(block.warps.size())) continue;
    block.index = -1;
    if (begun < blocks) block.begin(begun++, threads, shared_bytes);
  }
}

// -- control.h --------------------------------------------------------------------------------------------------------

void set_schedule(int resident_blocks, uint64_t seed) {
  require(resident_blocks > 0, "resident_blocks", resident_blocks, "positive");
  std::lock_guard lock(machine.one_launch);
  machine.resident_blocks = resident_blocks;
  machine.seed = seed;
}

void set_race_detection(bool on) {
  std::lock_guard lock(machine.one_launch);
  machine.detect_races = on;
}

void set_strict_warps(bool on) {
  std::lock_guard lock(machine.one_launch);
  machine.strict_warps = on;
}

const Counters& counters() { return counted; }

}  // namespace rmt::emulation
