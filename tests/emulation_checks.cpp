// Checks the emulated GPU of csrc/cuda/emulation: that each function of rmt::device computes what csrc/cuda/ptx.h says,
// and that each kind of mistake is found. One line a check; exits with 1 if any failed.
//   g++ -std=c++20 -O2 -DRMT_EMULATED tests/emulation_checks.cpp csrc/cuda/emulation/*.cpp
#include <bit>
#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "../csrc/cuda/device.h"
#include "../csrc/cuda/emulation/races.h"

namespace {

using namespace rmt;
using namespace rmt::device;

int failures = 0;
std::mt19937 generator(1);

void check(const std::string& name, bool passed, const std::string& detail = "") {
  std::printf("%s  %s%s%s\n", passed ? "ok    " : "FAILED", name.c_str(), detail.empty() ? "" : ": ", detail.c_str());
  failures += !passed;
}

// The error must say all of `texts`; afterwards a right kernel must run.
RMT_KERNEL(32, 1) count_threads(int* count) { *count += ballot(true) == 0xffffffffu; }
void check_error(const std::string& name, const std::vector<std::string>& texts, const std::function<void()>& action) {
  std::string what = "no error";
  try {
    action();
  } catch (const std::exception& error) {
    what = error.what();
  }
  bool passed = true;
  for (const std::string& text : texts) passed &= what.find(text) != std::string::npos;
  int count = 0;
  launch(count_threads, 2, 64, 0, 0, &count);
  check(name, passed && count == 128, what);
}

// -- the warp ---------------------------------------------------------------------------------------------------------

struct Seen {
  int block, thread, least, most;
  uint32_t ballot;
  float xor_float;
  int64_t xor_long;
};

RMT_KERNEL(64, 1) look_around(RMT_CONSTANT std::vector<int>& values, Seen* seen) {
  const int value = values[static_cast<size_t>(thread())];
  Seen& s = seen[64 * block() + thread()];
  s.block = block();
  s.thread = thread();
  s.least = least(value);
  s.most = most(value);
  s.ballot = ballot(value % 3 == 0);
  s.xor_float = shuffle_xor(0.5f * static_cast<float>(value), 5);
  s.xor_long = shuffle_xor(int64_t{value} << 33, 16);
}

void check_warp() {
  std::vector<int> values(64);
  for (int& value : values) value = static_cast<int>(generator()) / 256;
  std::vector<Seen> seen(128);
  launch(look_around, 2, 64, 0, 0, values, seen.data());
  bool places = true, reductions = true, ballots = true, shuffles = true;
  for (size_t i = 0; i < 128; ++i) {
    const size_t t = i % 64, first = t / 32 * 32;
    int low = values[first], high = low;
    uint32_t thirds = 0;
    for (size_t j = 0; j < 32; ++j) {
      const int value = values[first + j];
      low = value < low ? value : low;
      high = value > high ? value : high;
      thirds |= (value % 3 == 0 ? 1u : 0u) << j;
    }
    places &= seen[i].block == static_cast<int>(i / 64) && seen[i].thread == static_cast<int>(t);
    reductions &= seen[i].least == low && seen[i].most == high;
    ballots &= seen[i].ballot == thirds;
    shuffles &= seen[i].xor_float == 0.5f * static_cast<float>(values[first + ((t - first) ^ 5)]);
    shuffles &= seen[i].xor_long == int64_t{values[first + ((t - first) ^ 16)]} << 33;
  }
  check("thread and block", places);
  check("least and most", reductions);
  check("ballot", ballots);
  check("shuffle_xor", shuffles);
}

// -- numbers ----------------------------------------------------------------------------------------------------------

// The value of a 16-bit format, put together from its parts.
double decode(uint32_t h, int fraction_bits) {
  const int exponent_bits = 15 - fraction_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = static_cast<int>(h >> fraction_bits) & ((1 << exponent_bits) - 1);
  const int fraction = static_cast<int>(h) & ((1 << fraction_bits) - 1);
  const double sign = h & 0x8000u ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1)
    return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  const int significand = exponent ? fraction + (1 << fraction_bits) : fraction;
  return sign * std::ldexp(significand, (exponent ? exponent : 1) - bias - fraction_bits);
}

template <class Element>
void check_format(const std::string& name, int fraction_bits) {
  bool unpacks = true, packs = true, rounds = true;
  const uint32_t infinity = 0x7fffu >> fraction_bits << fraction_bits;
  for (uint32_t h = 0; h < 0x10000u; ++h) {
    const double value = decode(h, fraction_bits);
    const Pair pair = unpack<Element>(h | (h ^ 0x8000u) << 16);
    if (std::isnan(value)) {
      unpacks &= std::isnan(pair.low) && std::isnan(pair.high);
      packs &= pack<Element>(pair.low, pair.high) == 0x7fff7fffu;
      continue;
    }
    unpacks &= pair.low == value && pair.high == -value && std::signbit(pair.low) == (h >> 15);
    packs &= pack<Element>(pair.low, pair.high) == (h | (h ^ 0x8000u) << 16);
    if ((h & 0x7fffu) >= infinity) continue;
    // Between h and the next one outwards, which may be infinity: there as far out as its exponent says.
    const double next =
        (h & 0x7fffu) + 1 == infinity ? 2 * value - decode(h - 1, fraction_bits) : decode(h + 1, fraction_bits);
    const float middle = static_cast<float>((value + next) / 2);
    const float inwards = std::nextafter(middle, 0.0f), outwards = std::nextafter(middle, 2 * middle);
    rounds &= pack<Element>(middle, inwards) == ((h + (h & 1)) | h << 16);
    rounds &= pack<Element>(inwards, outwards) == (h | (h + 1) << 16);
  }
  const float huge = std::numeric_limits<float>::max();
  rounds &= pack<Element>(huge, -huge) == (infinity | (infinity | 0x8000u) << 16);
  check("unpack<" + name + "> of all values", unpacks);
  check("pack<" + name + "> of all values", packs);
  check("pack<" + name + "> rounds to nearest, ties to even", rounds);
}

void check_arithmetic() {
  const float infinity = std::numeric_limits<float>::infinity();
  bool powers = exp2(-infinity) == 0 && exp2(infinity) == infinity && std::isnan(exp2(not_a_number()));
  powers &= exp2(-126.0f) == 0x1p-126f && exp2(-126.25f) == 0 && exp2(-149.0f) == 0 && exp2(128.0f) == infinity;
  powers &= exp2(0.0f) == 1 && exp2(0x1p-140f) == 1 && exp2(-0x1p-140f) == 1;
  for (float x = -125.9f; x < 127; x += 0.37f)
    powers &= std::abs(exp2(x) / std::exp2(static_cast<double>(x)) - 1) < 0x1p-22;
  check("exp2", powers);
  check("log", log(1.0f) == 0 && log(0.0f) == -infinity && std::abs(log(10.0f) - 2.302585093) < 1e-6);
  const float a = 1 + 0x1p-12f;  // a * a = 1 + 2^-11 + 2^-24: the last part is rounded away
  check("fma rounds once", fma(a, a, -1.0f) == 0x1p-11f + 0x1p-24f);
  check("product rounds by itself", product(a, a) - 1.0f == 0x1p-11f);
  check("multiply_high", multiply_high(0xdeadbeefu, 0xcafef00du) == 0xdeadbeefull * 0xcafef00dull >> 32);
  check("bits", bits(-1.5f) == 0xbfc00000u && from_bits(0xbfc00000u) == -1.5f && std::isnan(not_a_number()));
}

// -- matrices ---------------------------------------------------------------------------------------------------------

template <class Element>
RMT_KERNEL(32, 1)
multiply_once(const float (*a)[16], const float (*b)[8], float (*c)[8]) {
  const int g = thread() / 4, t = thread() % 4;
  float sums[4] = {c[g][2 * t], c[g][2 * t + 1], c[g + 8][2 * t], c[g + 8][2 * t + 1]};
  uint32_t of_a[4], of_b[2];
  for (int i = 0; i < 4; ++i) {
    const float* row = a[g + i % 2 * 8] + 2 * t + i / 2 * 8;
    of_a[i] = pack<Element>(row[0], row[1]);
  }
  for (int i = 0; i < 2; ++i) of_b[i] = pack<Element>(b[2 * t + i * 8][g], b[2 * t + i * 8 + 1][g]);
  multiply<Element>(sums, of_a, of_b[0], of_b[1]);
  for (int i = 0; i < 4; ++i) c[g + i / 2 * 8][2 * t + i % 2] = sums[i];
}

template <class Element>
void check_multiply(const std::string& name) {
  float a[16][16], b[16][8], c[16][8];
  double expected[16][8], worst = 0;
  std::normal_distribution<float> normal;
  const auto draw = [&] { return unpack<Element>(pack<Element>(normal(generator), 0.0f)).low; };
  for (auto& row : a)
    for (float& x : row) x = draw();
  for (auto& row : b)
    for (float& x : row) x = draw();
  a[3][4] = unpack<Element>(1).low;  // the least number, which is not normal
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      expected[i][j] = c[i][j] = normal(generator);
      for (int k = 0; k < 16; ++k) expected[i][j] += static_cast<double>(a[i][k]) * b[k][j];
    }
  launch(multiply_once<Element>, 1, 32, 0, 0, a, b, c);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) worst = std::max(worst, std::abs(c[i][j] - expected[i][j]));
  check("multiply<" + name + ">", worst < 1e-5 && worst > 0);

  for (auto& row : a)
    for (float& x : row) x = 0;
  a[2][7] = unpack<Element>(1).low;
  b[7][5] = 3;
  a[11][0] = b[0][1] = std::numeric_limits<float>::infinity();
  for (auto& row : c)
    for (float& x : row) x = 0;
  launch(multiply_once<Element>, 1, 32, 0, 0, a, b, c);
  check("multiply<" + name + "> of the least number, infinity and 0",
        c[2][5] == 3 * a[2][7] && c[2][5] > 0 && std::isinf(c[11][1]) && std::isnan(c[2][1]));
}

RMT_KERNEL(32, 1) load_both(const uint16_t (*matrices)[8][8], uint32_t (*plain)[4], uint32_t (*transposed)[4]) {
  const Shared memory = shared_memory();
  for (int i = thread(); i < 128; i += 32) {  // rows are 48 bytes apart
    const uint16_t* pair = matrices[i / 32][i / 4 % 8] + i % 4 * 2;
    store_shared(memory + static_cast<Shared>(i / 4 * 48 + i % 4 * 4), pair[0] | static_cast<uint32_t>(pair[1]) << 16);
  }
  warp_barrier();
  const Shared row = memory + static_cast<Shared>(thread() * 48);
  load_matrices(plain[thread()], row);
  load_matrices_transposed(transposed[thread()], row);
}

void check_load_matrices() {
  uint16_t matrices[4][8][8];
  for (auto& matrix : matrices)
    for (auto& row : matrix)
      for (uint16_t& x : row) x = static_cast<uint16_t>(generator());
  uint32_t plain[32][4], transposed[32][4];
  launch(load_both, 1, 32, 32 * 48, 0, matrices, plain, transposed);
  bool rows = true, columns = true;
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) {
      const int r = lane / 4, c = lane % 4 * 2;
      rows &= plain[lane][i] == (matrices[i][r][c] | static_cast<uint32_t>(matrices[i][r][c + 1]) << 16);
      columns &= transposed[lane][i] == (matrices[i][c][r] | static_cast<uint32_t>(matrices[i][c + 1][r]) << 16);
    }
  check("load_matrices", rows);
  check("load_matrices_transposed", columns);
}

// -- copies -----------------------------------------------------------------------------------------------------------

// Three groups of one copy a thread, waited for one after another; `seen` are the first words of all after each wait.
RMT_KERNEL(32, 1) copy_groups(const Vector* from, uint32_t (*seen)[3]) {
  const Shared mine = shared_memory() + static_cast<Shared>(thread() * 48);
  const auto look = [&](int when) {
    for (Shared i = 0; i < 3; ++i) seen[4 * thread() + when][i] = load_shared(mine + 16 * i);
  };
  copy_async(mine, from + thread(), true);
  commit_copies();
  copy_async(mine + 16, nullptr, false);
  commit_copies();
  copy_async(mine + 32, from + 32 + thread(), true);
  commit_copies();
  look(0);
  wait_copies<2>();
  look(1);
  wait_copies<1>();
  look(2);
  wait_copies<0>();
  look(3);
}

void check_copies() {
  std::vector<Vector> from(64);
  for (Vector& vector : from)
    for (uint32_t& word : vector.word) word = static_cast<uint32_t>(generator());
  uint32_t seen[128][3];
  emulation::set_race_detection(false);
  launch(copy_groups, 1, 32, 32 * 48, 0, from.data(), seen);
  emulation::set_race_detection(true);
  bool right = true;
  for (size_t t = 0; t < 32; ++t) {
    const uint32_t arrived[3] = {from[t].word[0], 0, from[32 + t].word[0]};
    for (size_t when = 0; when < 4; ++when)
      for (size_t i = 0; i < 3; ++i) right &= seen[4 * t + when][i] == (i < when ? arrived[i] : 0xffffffffu);
  }
  check("copies arrive group by group when waited for, zeros where not wanted", right);
  check("copied bytes are counted", emulation::counters().copied_bytes == 3 * 32 * 16);
}

// -- mistakes ---------------------------------------------------------------------------------------------------------

// A kernel is what each thread does: given as a function without captures.
using Body = void (*)();
RMT_KERNEL(64, 1) perform(Body body) { body(); }
void run(Body body, int blocks = 1) { launch(perform, blocks, 64, 4096, 0, body); }

Shared word(int i) { return shared_memory() + static_cast<Shared>(4 * i); }
alignas(16) const uint32_t source[8] = {};

void check_races() {
  check_error("read after write without barrier", {"thread 32", "load_shared", "races with store_shared of thread 0"},
              [] {
                run([] {
                  if (thread() < 32)
                    store_shared(word(thread()), 1);
                  else
                    load_shared(word(thread() - 32));
                });
              });
  check_error("write after read without barrier", {"thread 32", "store_shared", "races with load_shared of thread 0"},
              [] {
                run([] {
                  if (thread() < 32)
                    load_shared(word(thread()));
                  else
                    store_shared(word(thread() - 32), 1);
                });
              });
  check_error("write after write without barrier", {"store_shared", "races with store_shared"},
              [] { run([] { store_shared(word(thread() % 32), 1); }); });
  check_error("read after write in one warp", {"the warp did not meet"}, [] {
    run([] {
      store_shared(word(thread()), 1);
      load_shared(word(thread() ^ 1));
    });
  });
  check_error("ldmatrix after write without barrier", {"load_matrices", "store_shared"}, [] {
    run([] {
      uint32_t words[4];
      store_shared(word(thread()), 1);
      load_matrices(words, word(0));
    });
  });
  check_error("write after ldmatrix without barrier", {"store_shared", "load_matrices"}, [] {
    run([] {
      uint32_t words[4];
      load_matrices(words, word(0));
      if (thread() == 40) store_shared(word(0), 1);
    });
  });
  const Body meets = [] {
    store_shared(word(thread()), 1);
    ballot(true);
    load_shared(word(thread() ^ 1));
    barrier();
    load_shared(word(63 - thread()));
    barrier();
    store_shared(word(63 - thread()), 1);
  };
  run(meets);
  check("no race where barriers are", true);
  emulation::set_strict_warps(true);
  check_error("read after write with a ballot, strictly", {"the warp did not meet"}, [&] { run(meets); });
  emulation::set_strict_warps(false);
  emulation::set_race_detection(false);
  run([] {
    store_shared(word(thread()), 1);
    load_shared(word(thread() ^ 32));
  });
  emulation::set_race_detection(true);
  check("races are let through where not wanted", true);
}

void check_copy_mistakes() {
  const std::vector<std::string> under_way = {"load_shared", "copy_async", "under way"};
  check_error("read of a copy not waited for", under_way, [] {
    run([] {
      copy_async(word(4 * thread()), source, true);
      commit_copies();
      wait_copies<1>();
      load_shared(word(4 * thread()));
      wait_copies<0>();
    });
  });
  check_error("read of another thread's copy not waited for", under_way, [] {
    run([] {
      copy_async(word(4 * thread()), source, true);
      barrier();
      load_shared(word(4 * (thread() ^ 32)));
    });
  });
  check_error("read of another thread's copy without barrier", {"load_shared", "copy_async", "no barrier"}, [] {
    run([] {
      copy_async(word(4 * thread()), source, true);
      commit_copies();
      wait_copies<0>();
      warp_barrier();
      load_shared(word(4 * (thread() ^ (thread() < 32 ? 1 : 32))));
    });
  });
  check_error("copy over what others may still read", {"copy_async", "races with load_shared"}, [] {
    run([] {
      if (thread() < 32)
        load_shared(word(4 * thread()));
      else
        copy_async(word(4 * (thread() - 32)), source, true);
    });
  });
  check_error("two copies to one place", {"copy_async", "races with copy_async"}, [] {
    run([] {
      copy_async(word(4 * thread()), source, true);
      copy_async(word(4 * thread()), source, true);
    });
  });
  check_error("copy committed, never waited for", {"thread 0", "copies"}, [] {
    run([] {
      copy_async(word(4 * thread()), source, true);
      commit_copies();
    });
  });
  check_error("copy never committed", {"thread 0", "copies"}, [] {
    run([] {
      copy_async(word(4 * thread()), source, true);
      wait_copies<0>();
    });
  });
  check_error("copy from a misaligned place", {"copy_async", "16 aligned"},
              [] { run([] { copy_async(word(4 * thread()), source + 1, true); }); });
  check_error("copy from nowhere", {"copy_async", "16 aligned"},
              [] { run([] { copy_async(word(4 * thread()), nullptr, true); }); });
  check_error("copy to a misaligned place", {"copy_async", "misaligned"},
              [] { run([] { copy_async(word(4 * thread() + 1), source, true); }); });
}

void check_addresses() {
  check_error("load past the end", {"load_shared", "byte 4096", "out of bounds"},
              [] { run([] { load_shared(word(1024)); }); });
  check_error("store before the begin", {"store_shared", "byte -4", "out of bounds"},
              [] { run([] { store_shared(word(-1), 0); }); });
  check_error("load at 0", {"out of bounds"}, [] { run([] { load_shared(0); }); });
  check_error("ldmatrix past the end", {"load_matrices", "thread 5", "byte 4096", "out of bounds"}, [] {
    run([] {
      uint32_t words[4];
      load_matrices(words, word(thread() == 5 ? 1024 : 0));
    });
  });
  check_error("copy past the end", {"copy_async", "out of bounds"},
              [] { run([] { copy_async(word(1024), source, true); }); });
  check_error("misaligned store", {"store_shared", "misaligned"}, [] { run([] { store_shared(word(0) + 2, 0); }); });
  check_error("misaligned row of ldmatrix", {"load_matrices", "misaligned"}, [] {
    run([] {
      uint32_t words[4];
      load_matrices(words, word(2));
    });
  });
}

void check_divergence() {
  check_error("lanes at different functions", {"ballot", "shuffle_xor", "block 2", "thread 40", "thread 32"}, [] {
    run(
        [] {
          if (block() < 2 || thread() < 32) return;
          if (thread() < 40)
            shuffle_xor(1, 1);
          else
            ballot(true);
        },
        3);
  });
  check_error("a lane ends before the others meet", {"thread 31", "ends", "least"}, [] {
    run([] {
      if (thread() % 32 != 31) least(1);
    });
  });
  check_error("a lane has ended when the others meet", {"thread 0", "ended", "most"}, [] {
    run([] {
      if (thread() % 32 != 0) most(1);
    });
  });
  check_error("a warp ends before the others' barrier", {"threads of other warps", "barrier"}, [] {
    run([] {
      if (thread() < 32) barrier();
    });
  });
  check_error("a warp has ended at the others' barrier", {"threads of other warps", "barrier"}, [] {
    run([] {
      if (thread() >= 32) barrier();
    });
  });
  check_error("different masks of shuffle_xor", {"shuffle_xor", "mask"},
              [] { run([] { shuffle_xor(1, thread() & 1); }); });
}

void check_launches() {
  check_error("no block", {"blocks", "0"}, [] { run([] {}, 0); });
  check_error("half a warp", {"threads", "48"}, [] { launch(perform, 1, 48, 0, 0, [] {}); });
  check_error("more shared memory than allowed", {"shared_bytes", "49153"},
              [] { launch(perform, 1, 64, 49153, 0, [] {}); });
  allow_shared_memory(perform, 65536);
  launch(perform, 1, 64, 65536, 0, [] { load_shared(word(16383)); });
  check("as much shared memory as allowed", true);
}

// -- races, against a history of all accesses -------------------------------------------------------------------------

void check_race_history() {
  using emulation::Access;
  using emulation::Kind;
  int wrong = 0, found = 0;
  for (int trial = 0; trial < 20000; ++trial) {
    emulation::Cell cell;
    std::vector<Access> history;
    uint64_t barriers = 0, warp_epochs[3] = {};
    for (int step = 0; step < 16; ++step) {
      const uint64_t warp = generator() % 3;
      const int action = static_cast<int>(generator() % 16);
      if (action == 0) {
        ++barriers;
        for (uint64_t& epoch : warp_epochs) ++epoch;
      } else if (action < 6) {
        ++warp_epochs[warp];
      } else {
        const bool write = action == 15;
        const Kind kind = write ? Kind::kStore : Kind::kLoad;
        const Access now = {32 * warp + generator() % 3, static_cast<uint64_t>(kind), warp_epochs[warp], barriers};
        bool expected = false;
        for (const Access& past : history) {
          const bool ordered = past.thread / 32 == warp ? past.warp_epoch != now.warp_epoch || past.thread == now.thread
                                                        : past.block_epoch != now.block_epoch;
          expected |= !ordered && (write || past.what() == Kind::kStore);
        }
        const Access* race = write ? cell.write(now) : cell.read(now);
        wrong += (race != nullptr) != expected;
        found += expected;
        if (expected) break;
        history.push_back(now);
      }
    }
  }
  check("races of random accesses, against their whole history", wrong == 0 && found > 1000 && found < 19000,
        std::to_string(found) + " in 20000, " + std::to_string(wrong) + " wrong");
}

// -- blocks that wait for one another ---------------------------------------------------------------------------------

struct Chain {
  int counter = 0, turn = 0;
  std::vector<int> blocks;  // in the order of their tickets
  Vector sums[64] = {};
};

enum class Turns { kRight, kNone, kPassedEarly, kNoBarrierAfter };

// Each block in the order of the tickets makes every sum 31 times itself and its ticket; or, not in turn, adds 1.
RMT_KERNEL(64, 1) pass_on(Chain* chain, Turns turns) {
  const bool in_turn = turns != Turns::kNone;
  if (thread() == 0) {
    store_shared(word(0), static_cast<uint32_t>(take_ticket(&chain->counter)));
    chain->blocks.push_back(block());
  }
  barrier();
  const uint32_t ticket = load_shared(word(0));
  if (in_turn) {
    if (thread() == 0)
      while (load_acquire(&chain->turn) != static_cast<int>(ticket)) pause();
    if (turns != Turns::kNoBarrierAfter) barrier();
  }
  Vector sum = load_far(&chain->sums[thread()]);
  warp_barrier();
  for (uint32_t& x : sum.word) x = in_turn ? 31 * x + ticket : x + 1;
  store_far(&chain->sums[thread()], sum);
  if (turns != Turns::kPassedEarly) barrier();
  if (in_turn && thread() == 0) store_release(&chain->turn, static_cast<int>(ticket) + 1);
}

Chain run_chain(int resident_blocks, uint64_t seed, Turns turns = Turns::kRight) {
  Chain chain;
  emulation::set_schedule(resident_blocks, seed);
  launch(pass_on, 24, 64, 4, 0, &chain, turns);
  emulation::set_schedule();
  return chain;
}

void check_schedules() {
  uint32_t expected = 0;
  for (uint32_t ticket = 0; ticket < 24; ++ticket) expected = 31 * expected + ticket;
  bool right = true, repeats = true;
  int lost = 0;
  std::set<std::vector<int>> orders;
  for (uint64_t seed = 0; seed <= 20; ++seed) {
    const Chain chain = run_chain(5, seed);
    for (const Vector& sum : chain.sums)
      for (uint32_t x : sum.word) right &= x == expected;
    orders.insert(chain.blocks);
    repeats &= run_chain(5, seed).blocks == chain.blocks;
    emulation::set_race_detection(false);
    const Chain unordered = run_chain(5, seed, Turns::kNone);
    emulation::set_race_detection(true);
    lost += seed != 0 && unordered.sums[0].word[0] != 24;
  }
  check("blocks in the order of tickets, in order and under 20 seeds", right);
  check("seeds draw different orders", orders.size() > 10, std::to_string(orders.size()) + " of 21");
  check("a seed draws the same order again", repeats);
  check("updates are lost where blocks don't wait", lost > 10, std::to_string(lost) + " of 20 seeds");
  for (const auto& [name, turns] : {std::pair("no turns", Turns::kNone),
                                    {"a turn passed on early", Turns::kPassedEarly},
                                    {"no barrier after a turn", Turns::kNoBarrierAfter}}) {
    check_error(std::string("global memory: ") + name, {"load_far", "has not passed on"},
                [turns] { run_chain(1, 0, turns); });
    emulation::set_schedule();
  }
}

int flag;

void check_deadlocks() {
  const Body wait_for_block_1 = [] {
    if (block() == 1 && thread() == 0) store_release(&flag, 1);
    if (block() == 0 && thread() == 0)
      while (load_acquire(&flag) == 0) pause();
    barrier();
  };
  flag = 0;
  check_error("deadlock: a block waits for one that is not alive", {"deadlock", "block 0", "seen 0", "barrier"},
              [&] { run(wait_for_block_1, 2); });
  emulation::set_schedule(2);
  run(wait_for_block_1, 2);
  check("no deadlock where both are alive", flag == 1);
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    flag = 0;
    emulation::set_schedule(2, seed);
    run(
        [] {
          if (block() == 1 && thread() == 0) store_release(&flag, 1);
          if (block() == 1) return;
          bool ready = thread() != 0 || load_acquire(&flag) == 1;
          for (int i = 0; i < 20; ++i) shuffle_xor(i, 1);
          for (; !ready; ready = load_acquire(&flag) == 1) pause();
          barrier();
        },
        2);
  }
  check("no deadlock where a thread looks long before it pauses", flag == 1);
  for (uint64_t seed : {0, 7}) {
    emulation::set_schedule(3, seed);
    check_error("deadlock: nobody answers, seed " + std::to_string(seed), {"deadlock", "block 2", "pause"}, [&] {
      run(
          [] {
            while (load_acquire(&flag) != 5) pause();
          },
          3);
    });
  }
  emulation::set_schedule();
}

// -- counters ---------------------------------------------------------------------------------------------------------

RMT_KERNEL(64, 1) conflict(int stride) {
  for (int i = thread(); i < 1024; i += 64) store_shared(word(i), 0);
  barrier();
  const int lane = thread() % 32;
  uint32_t words[4];
  load_matrices(words, word(lane * stride % 1024));
  load_shared(word(lane * stride % 1024));
  float c[4] = {};
  multiply<BF16>(c, words, 0, 0);
}

void check_counters() {
  struct Case {
    int stride, matrices, loads;
  };
  // Words from row to row; wavefronts too many of a warp. At 0 all rows are one: read once.
  for (const Case& c : {Case{0, 0, 0}, Case{4, 0, 3}, Case{8, 4, 7}, Case{32, 28, 31}, Case{36, 0, 3}}) {
    launch(conflict, 1, 64, 4096, 0, c.stride);
    const emulation::Counters& n = emulation::counters();
    const bool right = n.matrix_load_conflicts == 2 * c.matrices && n.shared_load_conflicts == 2 * c.loads &&
                       n.shared_store_conflicts == 0;
    check("bank conflicts at rows " + std::to_string(c.stride) + " words apart", right,
          std::to_string(n.matrix_load_conflicts) + " and " + std::to_string(n.shared_load_conflicts));
  }
  const emulation::Counters& n = emulation::counters();
  check("counts of a launch", n.multiplies == 2 && n.matrix_loads == 2 && n.barriers == 1 && n.copied_bytes == 0);
}

}  // namespace

int main() {
  check_warp();
  check_format<BF16>("BF16", 7);
  check_format<F16>("F16", 10);
  check_arithmetic();
  check_multiply<BF16>("BF16");
  check_multiply<F16>("F16");
  check_load_matrices();
  check_copies();
  check_races();
  check_race_history();
  check_copy_mistakes();
  check_addresses();
  check_divergence();
  check_launches();
  check_schedules();
  check_deadlocks();
  check_counters();
  std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures != 0;
}
