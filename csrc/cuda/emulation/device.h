// rmt::device on the host: ptx.h says what each function does. Only checks and the order of things are added here, by
// the emulated GPU of operations.h.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "control.h"
#include "formats.h"
#include "operations.h"

#define RMT_DEVICE inline
#define RMT_KERNEL(threads, blocks) void
#define RMT_CONSTANT const
#define RMT_UNROLL
#define RMT_UNROLL_BY(count)

namespace rmt::device {

// -- where a thread is ------------------------------------------------------------------------------------------------

RMT_DEVICE int thread() { return emulation::thread(); }
RMT_DEVICE int block() { return emulation::block(); }
RMT_DEVICE void barrier() { emulation::barrier(); }
RMT_DEVICE int opaque(int x) { return x; }

// -- a warp's threads, all of which must call -------------------------------------------------------------------------

template <class T>
RMT_DEVICE T shuffle_xor(T value, int mask) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof value);
  word = emulation::shuffle_xor(word, mask);
  std::memcpy(&value, &word, sizeof value);
  return value;
}
RMT_DEVICE uint32_t ballot(bool value) { return emulation::ballot(value); }
RMT_DEVICE int lowest_bit(uint32_t word) { return std::countr_zero(word); }
RMT_DEVICE int least(int value) { return emulation::least(value); }
RMT_DEVICE int most(int value) { return emulation::most(value); }
RMT_DEVICE void warp_barrier() { emulation::warp_barrier(); }

// -- arithmetic -------------------------------------------------------------------------------------------------------

RMT_DEVICE float exp2(float x) {
  const float y = std::exp2(x);
  return y < std::numeric_limits<float>::min() ? 0.0f : y;
}
RMT_DEVICE float log(float x) { return std::log(x); }
RMT_DEVICE float larger(float a, float b) { return std::fmax(a, b); }
RMT_DEVICE float fma(float a, float b, float c) { return std::fma(a, b, c); }
RMT_DEVICE float product(float a, float b) {
  volatile float rounded = a * b;  // or the compiler may make it part of an fma
  return rounded;
}
RMT_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

template <class Element>
RMT_DEVICE uint32_t pack(float low, float high);
template <>
RMT_DEVICE uint32_t pack<BF16>(float low, float high) {
  return emulation::to_bf16(low) | static_cast<uint32_t>(emulation::to_bf16(high)) << 16;
}
template <>
RMT_DEVICE uint32_t pack<F16>(float low, float high) {
  return emulation::to_f16(low) | static_cast<uint32_t>(emulation::to_f16(high)) << 16;
}

struct Pair {
  float low, high;
};
template <class Element>
RMT_DEVICE Pair unpack(uint32_t word);
template <>
RMT_DEVICE Pair unpack<BF16>(uint32_t word) {
  return {emulation::from_bf16(static_cast<uint16_t>(word)), emulation::from_bf16(static_cast<uint16_t>(word >> 16))};
}
template <>
RMT_DEVICE Pair unpack<F16>(uint32_t word) {
  return {emulation::from_f16(static_cast<uint16_t>(word)), emulation::from_f16(static_cast<uint16_t>(word >> 16))};
}

template <class Element>
RMT_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
RMT_DEVICE void multiply<BF16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply_bf16(c, a, b0, b1);
}
template <>
RMT_DEVICE void multiply<F16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::multiply_f16(c, a, b0, b1);
}

RMT_DEVICE float not_a_number() { return std::bit_cast<float>(0x7fffffffu); }
RMT_DEVICE uint32_t bits(float x) { return std::bit_cast<uint32_t>(x); }
RMT_DEVICE float from_bits(uint32_t x) { return std::bit_cast<float>(x); }

// -- shared memory ----------------------------------------------------------------------------------------------------

RMT_DEVICE Shared shared_memory() { return 1024; }
RMT_DEVICE void store_shared(Shared to, uint32_t word) { emulation::store_shared(to, word); }
RMT_DEVICE uint32_t load_shared(Shared from) { return emulation::load_shared(from); }
RMT_DEVICE void store_shared_pair(Shared to, uint32_t first, uint32_t second) {
  store_shared(to, first), store_shared(to + 4, second);
}
RMT_DEVICE void load_shared_pair(uint32_t (&words)[2], Shared from) {
  words[0] = load_shared(from), words[1] = load_shared(from + 4);
}
RMT_DEVICE void store_shared_float(Shared to, float value) { store_shared(to, bits(value)); }
RMT_DEVICE float load_shared_float(Shared from) { return from_bits(load_shared(from)); }

RMT_DEVICE void load_matrices(uint32_t (&words)[4], Shared row) { emulation::load_matrices(words, row, false); }
RMT_DEVICE void load_matrices_transposed(uint32_t (&words)[4], Shared row) {
  emulation::load_matrices(words, row, true);
}

RMT_DEVICE void copy_async(Shared to, const void* from, bool wanted) { emulation::copy_async(to, from, wanted); }
RMT_DEVICE void commit_copies() { emulation::commit_copies(); }
template <int groups>
RMT_DEVICE void wait_copies() {
  emulation::wait_copies(groups);
}

// -- global memory that blocks share ----------------------------------------------------------------------------------

RMT_DEVICE Vector load_far(const Vector* from) {
  emulation::load_far(from);
  return *from;
}
RMT_DEVICE void store_far(Vector* to, const Vector& v) {
  emulation::store_far(to);
  *to = v;
}
RMT_DEVICE int load_acquire(const int* from) { return emulation::load_acquire(from); }
RMT_DEVICE void store_release(int* to, int value) { emulation::store_release(to, value); }
RMT_DEVICE int take_ticket(int* counter) { return emulation::take_ticket(counter); }
RMT_DEVICE void pause() { emulation::pause(); }

// -- from the host ----------------------------------------------------------------------------------------------------

template <class... Arguments>
void allow_shared_memory(void (*kernel)(Arguments...), int bytes) {
  emulation::allow_shared_memory(reinterpret_cast<const void*>(kernel), bytes);
}

// Returns when all blocks have run; there is one stream.
template <class... Arguments>
void launch(void (*kernel)(Arguments...), int blocks, int threads, int shared_bytes, uintptr_t /*stream*/,
            std::type_identity_t<Arguments>... arguments) {
  auto run = [&] { kernel(arguments...); };
  emulation::launch(
      reinterpret_cast<const void*>(kernel), blocks, threads, shared_bytes,
      [](void* closure) { (*static_cast<decltype(run)*>(closure))(); }, &run);
}

}  // namespace rmt::device
