// What the threads of a warp, or of a block, do together.
#include <algorithm>
#include <cstring>

#include "machine.h"
#include "operations.h"

namespace rmt::emulation {

const char* name(Meeting meeting) {
  static const char* const names[] = {
      "barrier", "warp_barrier",   "shuffle_xor",   "ballot",        "least",
      "most",    "multiply<BF16>", "multiply<F16>", "load_matrices", "load_matrices_transposed"};
  return names[static_cast<int>(meeting)];
}

void barrier() {
  Warp& warp = *current->warp;
  if (!warp.meet(Meeting::kBarrier)) return;
  Block& block = *warp.block;
  if (block.finished != 0) fail("waits at barrier(), but threads of other warps have ended");
  if (++block.at_barrier < static_cast<int>(block.warps.size())) {
    leave(Warp::State::kAtBarrier);
    return;
  }
  block.at_barrier = 0;
  ++block.epoch;
  ++counted.barriers;
  for (auto& other : block.warps) other->state = Warp::State::kRunnable;
}

void warp_barrier() { current->warp->meet(Meeting::kWarpBarrier); }

namespace {

// Every lane's `value` becomes what `combine` makes of all of them, lane after lane.
template <class Combine>
uint64_t reduce(Meeting meeting, uint64_t value, Combine combine) {
  Warp& warp = *current->warp;
  const size_t lane = static_cast<size_t>(current->index);
  warp.values[lane] = value;
  if (warp.meet(meeting)) {
    uint64_t all = warp.values[0];
    for (size_t i = 1; i < 32; ++i) all = combine(all, warp.values[i]);
    warp.value_results.fill(all);
  }
  return warp.value_results[lane];
}

}  // namespace

uint64_t shuffle_xor(uint64_t value, int mask) {
  Warp& warp = *current->warp;
  const size_t lane = static_cast<size_t>(current->index);
  warp.values[lane] = value;
  warp.masks[lane] = mask;
  if (warp.meet(Meeting::kShuffle))
    for (size_t i = 0; i < 32; ++i) {
      if (warp.masks[i] < 0 || warp.masks[i] > 31 || warp.masks[i] != mask)
        fail("shuffle_xor by " + std::to_string(mask) + ", and by " + std::to_string(warp.masks[i]) + " in lane " +
             std::to_string(i) + ": all lanes must give one mask of 0 to 31");
      warp.value_results[i] = warp.values[i ^ static_cast<size_t>(mask)];
    }
  return warp.value_results[lane];
}

uint32_t ballot(bool value) {
  const uint64_t bit = static_cast<uint64_t>(value) << current->index;
  return static_cast<uint32_t>(reduce(Meeting::kBallot, bit, [](uint64_t a, uint64_t b) { return a | b; }));
}

int least(int value) {
  const auto combine = [](uint64_t a, uint64_t b) -> uint64_t { return std::min<int64_t>(a, b); };
  return static_cast<int>(reduce(Meeting::kLeast, static_cast<uint64_t>(value), combine));
}

int most(int value) {
  const auto combine = [](uint64_t a, uint64_t b) -> uint64_t { return std::max<int64_t>(a, b); };
  return static_cast<int>(reduce(Meeting::kMost, static_cast<uint64_t>(value), combine));
}

namespace {

template <class Compute>
void multiply(Meeting meeting, Compute compute, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Warp& warp = *current->warp;
  Multiplication& operands = warp.multiplication;
  const int lane = current->index;
  for (int i = 0; i < 4; ++i) operands.a[i][lane] = a[i];
  operands.b[0][lane] = b0;
  operands.b[1][lane] = b1;
  for (int i = 0; i < 4; ++i) operands.c[i / 2][lane][i % 2] = c[i];
  if (warp.meet(meeting)) {
    compute(operands, warp.c_results);
    ++counted.multiplies;
  }
  for (int i = 0; i < 4; ++i) c[i] = warp.c_results[i / 2][lane][i % 2];
}

}  // namespace

void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply(Meeting::kMultiplyBF16, [](auto& in, auto& out) { multiply_bf16(in, out); }, c, a, b0, b1);
}
void multiply_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  multiply(Meeting::kMultiplyF16, [](auto& in, auto& out) { multiply_f16(in, out); }, c, a, b0, b1);
}

namespace {

// Rows of one matrix that lie in the same banks, at different places, are read one after another.
int row_conflicts(const uint32_t* rows) {
  int most = 1;
  for (int i = 0; i < 8; ++i) {
    int together = 1;
    for (int j = 0; j < i; ++j) {
      if (rows[j] == rows[i]) {
        together = 0;
        break;
      }
      together += rows[j] % 128 == rows[i] % 128;
    }
    most = std::max(most, together);
  }
  return most - 1;
}

void load_matrices(Warp& warp, bool transposed) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t words[32];
    for (int row = 0; row < 8; ++row) {
      const Lane& lane = warp.lanes[static_cast<size_t>(8 * matrix + row)];
      const uint32_t address = warp.rows[static_cast<size_t>(lane.index)];
      std::memcpy(words + 4 * row, warp.block->shared.read(address, 16, lane.access(Kind::kLoadMatrices)), 16);
    }
    counted.matrix_load_conflicts += row_conflicts(&warp.rows[static_cast<size_t>(8 * matrix)]);
    if (transposed)
      transpose(words, warp.matrix_results[matrix]);
    else
      std::memcpy(warp.matrix_results[matrix], words, sizeof words);
  }
  ++counted.matrix_loads;
}

}  // namespace

void load_matrices(uint32_t (&words)[4], uint32_t row, bool transposed) {
  Warp& warp = *current->warp;
  const size_t lane = static_cast<size_t>(current->index);
  warp.rows[lane] = row;
  if (warp.meet(transposed ? Meeting::kLoadMatricesTransposed : Meeting::kLoadMatrices)) {
    load_matrices(warp, transposed);
    if (!strict_warps()) warp.order();
  }
  for (int i = 0; i < 4; ++i) words[i] = warp.matrix_results[i][lane];
}

}  // namespace rmt::emulation
