// rmt::device on an NVIDIA GPU, sm_80 or later: each function is an instruction or two.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#define RMT_DEVICE __device__ __forceinline__
// A kernel of at most so many threads a block, so many of whose blocks an SM should hold at once.
#define RMT_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
// A kernel's parameter that is read where it lies, never copied to a thread's own memory.
#define RMT_CONSTANT const __grid_constant__
#define RMT_UNROLL _Pragma("unroll")
#define RMT_UNROLL_BY(count) _Pragma(RMT_TEXT(unroll count))
#define RMT_TEXT(words) #words

namespace rmt::device {

// -- where a thread is ------------------------------------------------------------------------------------------------

RMT_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
RMT_DEVICE int block() { return static_cast<int>(blockIdx.x); }
RMT_DEVICE void barrier() { __syncthreads(); }

// The same number, of which the compiler knows nothing: what follows from it is worked out where it stands, rather than
// once, in registers that the products need.
RMT_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// -- a warp's threads, all of which must call -------------------------------------------------------------------------

template <class T>
RMT_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
RMT_DEVICE uint32_t ballot(bool value) { return __ballot_sync(0xffffffffu, value); }
// The number of the lowest bit that is set; there must be one.
RMT_DEVICE int lowest_bit(uint32_t word) { return __ffs(static_cast<int>(word)) - 1; }
RMT_DEVICE int least(int value) { return __reduce_min_sync(0xffffffffu, value); }
RMT_DEVICE int most(int value) { return __reduce_max_sync(0xffffffffu, value); }
RMT_DEVICE void warp_barrier() { __syncwarp(); }

// -- arithmetic -------------------------------------------------------------------------------------------------------

// 2^x to about 22 bits; results below 2^-126 are 0.
RMT_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
RMT_DEVICE float log(float x) { return ::logf(x); }
// The larger one; the other one of NaN and a number.
RMT_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
RMT_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// a * b, rounded by itself.
RMT_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
RMT_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

template <class Element>
RMT_DEVICE uint32_t pack(float low, float high);
template <>
RMT_DEVICE uint32_t pack<BF16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
template <>
RMT_DEVICE uint32_t pack<F16>(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

struct Pair {
  float low, high;
};
template <class Element>
RMT_DEVICE Pair unpack(uint32_t word);
template <>
RMT_DEVICE Pair unpack<BF16>(uint32_t word) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
template <>
RMT_DEVICE Pair unpack<F16>(uint32_t word) {
  Pair pair;
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(pair.low), "=f"(pair.high)
      : "r"(word));
  return pair;
}

// c (16 x 8) += a (16 x 16) @ b (16 x 8). With g = lane / 4 and t = lane % 4 a lane holds of
//   a: rows g, g + 8, g, g + 8 at columns 2t, 2t + 1 (the first two words) and 2t + 8, 2t + 9;
//   b: column g at rows 2t, 2t + 1 and 2t + 8, 2t + 9;   c: row g at columns 2t, 2t + 1, then row g + 8.
template <class Element>
RMT_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
RMT_DEVICE void multiply<BF16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
RMT_DEVICE void multiply<F16>(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// -- shared memory ----------------------------------------------------------------------------------------------------

// The first address of the block's dynamic shared memory, a multiple of 1024.
RMT_DEVICE Shared shared_memory() {
  extern __shared__ __align__(1024) char memory[];
  return static_cast<Shared>(__cvta_generic_to_shared(memory));
}
RMT_DEVICE void store_shared(Shared to, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(word) : "memory");
}
RMT_DEVICE uint32_t load_shared(Shared from) {
  uint32_t word;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(from) : "memory");
  return word;
}
// Two words that lie side by side, at a multiple of 8.
RMT_DEVICE void store_shared_pair(Shared to, uint32_t first, uint32_t second) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(to), "r"(first), "r"(second) : "memory");
}
RMT_DEVICE void load_shared_pair(uint32_t (&words)[2], Shared from) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(from) : "memory");
}
RMT_DEVICE void store_shared_float(Shared to, float value) { store_shared(to, __float_as_uint(value)); }
RMT_DEVICE float load_shared_float(Shared from) { return __uint_as_float(load_shared(from)); }

// Four 8 x 8 matrices of 16-bit elements. Lane 8i + r gives the address of row r (16 bytes) of matrix i; a lane gets of
// each matrix row lane / 4, columns 2 (lane % 4) and the next: transposed, column lane / 4 and those rows.
RMT_DEVICE void load_matrices(uint32_t (&words)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}
RMT_DEVICE void load_matrices_transposed(uint32_t (&words)[4], Shared row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(row)
               : "memory");
}

// Starts a copy of 16 bytes to shared memory, of zeros where not wanted: nothing is read from there then.
RMT_DEVICE void copy_async(Shared to, const void* from, bool wanted) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(wanted ? 16 : 0)
               : "memory");
}
// Ends a group of this thread's copies.
RMT_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the youngest `groups` of this thread's groups are under way. Other threads' need a barrier.
template <int groups>
RMT_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

// -- global memory that blocks share ----------------------------------------------------------------------------------

// Past the L1 cache, which does not see what other SMs write.
RMT_DEVICE Vector load_far(const Vector* from) {
  const uint4 v = __ldcg(reinterpret_cast<const uint4*>(from));
  return {{v.x, v.y, v.z, v.w}};
}
RMT_DEVICE void store_far(Vector* to, const Vector& v) {
  __stcg(reinterpret_cast<uint4*>(to), make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
}
// What other threads wrote before they released is visible after this thread acquired, and, with a barrier, to its
// block: and the other way round.
RMT_DEVICE int load_acquire(const int* from) {
  int value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
RMT_DEVICE void store_release(int* to, int value) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
// The counter's value before 1 was added.
RMT_DEVICE int take_ticket(int* counter) { return atomicAdd(counter, 1); }
// Between two looks at something that another block will change.
RMT_DEVICE void pause() { __nanosleep(20); }

RMT_DEVICE float not_a_number() { return __int_as_float(0x7fffffff); }
RMT_DEVICE uint32_t bits(float x) { return __float_as_uint(x); }
RMT_DEVICE float from_bits(uint32_t x) { return __uint_as_float(x); }

// -- from the host ----------------------------------------------------------------------------------------------------

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Loads a kernel to the current device, which no CUDA graph that is being captured could do, and lets it have so many
// bytes of dynamic shared memory; once before its first launch there.
template <class... Arguments>
void allow_shared_memory(void (*kernel)(Arguments...), int bytes) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "cudaFuncSetAttribute");
}

template <class... Arguments>
void launch(void (*kernel)(Arguments...), int blocks, int threads, int shared_bytes, uintptr_t stream,
            std::type_identity_t<Arguments>... arguments) {
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                         dim3(static_cast<unsigned>(threads)), pointers, static_cast<size_t>(shared_bytes),
                         reinterpret_cast<cudaStream_t>(stream)),
        "cudaLaunchKernel");
}

}  // namespace rmt::device
