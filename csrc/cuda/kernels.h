// What the compiled kernels offer to the rest of the program: plain functions, one set for every (element, width).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../problem.h"

namespace rmt {

// What launches follow from besides the call.
struct Chip {
  int64_t l2_bytes;
};

// One pass over a call: what it needs and how it is started.
struct Pass {
  size_t (*workspace)(const Problem&);  // bytes
  void (*run)(const Problem&, const Chip&, char* workspace, uintptr_t stream);
  void (*allow)();  // lets the current device's kernels have their shared memory; before the first run there
  int shared;       // the most bytes of shared memory that a block takes
};

struct Kernels {
  Type type;
  int width;  // the largest head_dim
  Pass forward, decode, backward;
};

// Packed rows, queries times the heads of a group, up to which keys are split over blocks: `decode` serves such calls.
constexpr int kFewRows = 32;

// Hands out pieces of a workspace, 256-byte aligned; with no base it only counts.
class Pieces {
 public:
  explicit Pieces(char* base = nullptr) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// All that were compiled.
const std::vector<Kernels>& every_kernels();

// The set for elements of a type and heads of a width, or null: the narrowest that was compiled.
const Kernels* find_kernels(Type type, int head_dim);

}  // namespace rmt
