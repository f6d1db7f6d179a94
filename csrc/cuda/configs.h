// Which tiles a kernel uses: one table, no tuning at run time. A row is chosen by width, length and dropout, never by
// batch or number of heads, so that a sample's result does not depend on its neighbours.
//
// What decides: a thread has 255 registers; a warp's product needs rows x (width + keys) / 32 of them for its results.
// A word read from shared memory should serve two products of 16 rows, so a warp of a long call owns 32. Blocks of an
// SM hide each other's barriers: two at least, but for the long backward pass, whose results take all registers of one.
#pragma once

#include <type_traits>

#include "backward.h"
#include "decode.h"
#include "forward.h"

namespace rmt {

// Packed rows up to which small tiles fill more of the chip.
constexpr int kShortRows = 512;

// clang-format off
template <class Element, int kWidth, bool kDropout> struct Tiles;

template <class Element, bool kDropout> struct Tiles<Element, 64, kDropout> {
  //                                        rows keys warps blocks
  using Long      = ForwardConfig <Element, 64, 128, 64, 4, 2, kDropout>;
  using Short     = ForwardConfig <Element, 64,  64, 64, 4, 3, kDropout>;
  using Few       = DecodeConfig  <Element, 64,          4, 3, kDropout>;  // stages, blocks
  using LongBack  = BackwardConfig<Element, 64,  64, 128, 8, kDropout>;
  using ShortBack = BackwardConfig<Element, 64,  64,  64, 4, kDropout>;
};

template <class Element, bool kDropout> struct Tiles<Element, 128, kDropout> {
  using Short     = ForwardConfig <Element, 128,  64, 64, 4, 2, kDropout>;
  // With dropout 128 rows spill, and drawing numbers costs more than reading keys twice.
  using Long      = std::conditional_t<kDropout, Short, ForwardConfig<Element, 128, 128, 64, 4, 2, false>>;
  using Few       = DecodeConfig  <Element, 128,          3, 2, kDropout>;
  using LongBack  = BackwardConfig<Element, 128,  64, 128, 8, kDropout>;
  using ShortBack = BackwardConfig<Element, 128,  64,  64, 4, kDropout>;
};
// clang-format on

}  // namespace rmt
