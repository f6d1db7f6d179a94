// One attention call as plain data, for the CPU and for CUDA.
#pragma once

#include <cstddef>
#include <cstdint>

#include "layout.h"
#include "philox.h"

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
  const int64_t* seed;    // of dropout, where it lies on the GPU; null on the CPU, which has read it

  RMT_HD int group() const { return heads / kv_heads; }
  RMT_HD Sample sample(int b) const {
    return {token_starts ? token_starts[b] : 0, token_lengths ? token_lengths[b] : layout.token_rows,
            cache_starts ? cache_starts[b] : 0, query_start ? query_start[b] : -1};
  }
};

}  // namespace rmt
