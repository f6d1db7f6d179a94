// One attention call as plain data: what the dispatcher hands to the kernels of an instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../layout.h"
#include "../philox.h"

namespace rmt {

enum class Type { f32, bf16, f16 };

// (batch, heads, rows, head_dim), strides in elements, the last one 1.
struct Matrix {
  char* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};

struct Problem {
  Type type;
  Layout layout;
  int batch, heads, kv_heads, queries, keys, head_dim;
  int cache_rows;  // keys [0, cache_rows) come from cache_key and cache_value
  float scale;
  Dropout dropout;
  const int32_t *token_lengths, *token_starts, *cache_starts, *query_start;  // (batch,) or null
  Matrix query, key, value, cache_key, cache_value;
  Matrix out, grad_out, grad_query, grad_key, grad_value, grad_cache_key, grad_cache_value;
  float *lse, *grad_lse;  // (batch, heads, queries), contiguous; grad_lse may be null

  RMT_HD int group() const { return heads / kv_heads; }
  RMT_HD Sample sample(int b) const {
    return {token_starts ? token_starts[b] : 0, token_lengths ? token_lengths[b] : layout.token_rows,
            cache_starts ? cache_starts[b] : 0, query_start ? query_start[b] : -1};
  }
};

// What the kernels borrow from torch: its threads, its matrix engine, and scratch memory.
struct Runtime {
  int threads;
  // Runs body(context, item, thread) for items [0, count), in ascending order of start, on up to `threads` threads.
  void (*parallel)(int threads, int count, void (*body)(void*, int, int), void* context);
  // C (m x n, fp32) (+)= A (m x k, bf16) @ B (k x n, bf16, pairs of rows interleaved).
  void (*brgemm)(int m, int n, int k, int lda, int ldb, int ldc, bool add, const uint16_t* a, const uint16_t* b,
                 float* c);
  void (*brgemm_release)();
  char* scratch;  // 64-byte aligned, as many bytes as the kernel asked for
};

// The kernels of one instruction set. `scratch` functions tell the bytes that a call needs.
struct Kernels {
  const char* isa;
  size_t (*forward_scratch)(const Problem&, int threads);
  void (*forward)(const Problem&, const Runtime&);
  size_t (*backward_scratch)(const Problem&, int threads);
  void (*backward)(const Problem&, const Runtime&);
};

}  // namespace rmt
