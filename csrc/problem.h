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

// Scores that depend on how far a key lies from a row's own key: their tables and what is learned beside them, in the
// query's type but for the bias. Entry e is for key own + e - reach. See rmt_kernels/relative.py.
struct Relative {
  int offsets = 0, reach = 0;  // entries of the tables; 0: there are none
  bool shifted = false;        // keys ahead of a row's own meet the next row instead of this one
  const char *key = nullptr, *content_bias = nullptr, *position_bias = nullptr;  // (heads, offsets, head_dim), (heads,
                                                                                 // head_dim) each, contiguous, or null
  const float* bias = nullptr;                                                   // (heads, offsets), or null
  char *grad_key = nullptr, *grad_content_bias = nullptr, *grad_position_bias = nullptr;
  float* grad_bias = nullptr;

  RMT_HD bool tables() const { return offsets > 0; }
  RMT_HD bool any() const { return offsets > 0 || content_bias; }
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
  Relative relative;
  const int64_t* seed;  // of dropout, where it lies on the GPU; null on the CPU, which has read it

  RMT_HD int group() const { return heads / kv_heads; }
  RMT_HD Sample sample(int b) const {
    return {token_starts ? token_starts[b] : 0, token_lengths ? token_lengths[b] : layout.token_rows,
            cache_starts ? cache_starts[b] : 0, query_start ? query_start[b] : -1};
  }
};

}  // namespace rmt
