// What a thread of a running kernel asks of the emulated GPU: rmt::device, without its types. ptx.h says what each
// does.
#pragma once

#include <cstdint>

namespace rmt::emulation {

int thread();
int block();

// Every thread of the block, or of the warp, must call these.
void barrier();
void warp_barrier();
uint64_t shuffle_xor(uint64_t value, int mask);
uint32_t ballot(bool value);
int least(int value);
int most(int value);
void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void multiply_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void load_matrices(uint32_t (&words)[4], uint32_t row, bool transposed);

void store_shared(uint32_t to, uint32_t word);
uint32_t load_shared(uint32_t from);

// Nothing arrives before the thread waits for it.
void copy_async(uint32_t to, const void* from, bool wanted);
void commit_copies();
void wait_copies(int groups);

// Before 16 bytes are read or written.
void load_far(const void* from);
void store_far(const void* to);
int load_acquire(const int* from);
void store_release(int* to, int value);
int take_ticket(int* counter);
void pause();

// -- from the host ----------------------------------------------------------------------------------------------------

void allow_shared_memory(const void* kernel, int bytes);

// Calls run(arguments) once as each thread of each block. Raises std::invalid_argument for a launch that a GPU would
// refuse, and std::runtime_error for the first thing that a thread does wrong.
void launch(const void* kernel, int blocks, int threads, int shared_bytes, void (*run)(void* arguments),
            void* arguments);

}  // namespace rmt::emulation
