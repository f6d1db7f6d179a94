// What a kernel asks of the machine, as one set of functions in rmt::device. ptx.h says them to an NVIDIA GPU;
// emulation/device.h computes them on the host, thread by thread, so that the same kernels run, and are tested,
// where there is no GPU.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../layout.h"

namespace rmt {

// A type of 16 bits that matrices are made of. Two of them travel in one word, the first one low.
struct BF16 {};
struct F16 {};

// 16 bytes: what a thread moves at once.
struct alignas(16) Vector {
  uint32_t word[4];
};

// An address in a block's shared memory.
using Shared = uint32_t;

}  // namespace rmt

#if defined(RMT_EMULATED)
#include "emulation/device.h"
#else
#include "ptx.h"
#endif
