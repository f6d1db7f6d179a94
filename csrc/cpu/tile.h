// What forward and backward share: derived sizes, scratch carving, masks and dropout on a tile.
#pragma once

#include "pack.h"

namespace rmt::RMT_ISA {

constexpr float kLog2e = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// Hands out 64-byte aligned pieces of scratch; with no base it only counts.
class Arena {
 public:
  explicit Arena(char* base = nullptr) : base_(base) {}
  template <class T>
  T* take(size_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// A unit is a batch row's key/value head with its query heads. Threads take whole units where that keeps all of them
// busy; else everything is packed first, and they share the tiles of every unit.
inline bool by_unit(const Problem& p, int threads) {
  const int units = p.batch * p.kv_heads;
  return threads == 1 || units % threads == 0 || units >= 8 * threads;
}

template <class Engine>
struct Sizes {
  int depth;          // head_dim, padded for a product over it
  int staged;         // head_dim, padded for a row-major operand that can be transposed
  int width;          // head_dim, padded for a product that yields it
  int keys, queries;  // padded to whole panels
  int key_panels, query_panels;

  explicit Sizes(const Problem& p)
      : depth(round_up(p.head_dim, Engine::pair)),
        staged(round_up(p.head_dim, 16 * Engine::pair)),
        width(round_up(p.head_dim, 16)),
        keys(round_up(p.keys, kPanel)),
        queries(round_up(p.queries, kPanel)),
        key_panels(keys / kPanel),
        query_panels(queries / kPanel) {}

  // Elements of one transposed panel of 64 rows, and of all rows packed as [rows / pair][columns][pair] panels.
  size_t transposed_panel() const { return static_cast<size_t>(staged) * kPanel; }
  size_t packed(int rows) const { return static_cast<size_t>(rows) * width; }
};

// Panel d of 64 columns in rows packed for a product that yields head_dim columns.
template <class E>
struct Columns {
  const E* panel;
  int ld, count;
};
template <class E>
RMT_INLINE Columns<E> columns_of(const E* packed, int rows, int width, int d) {
  const int count = min_int(kPanel, width - d * kPanel);
  return {packed + static_cast<size_t>(rows) * d * kPanel, count, count};
}

// C (m x width) (+)= A (m x k) @ rows [row, row + k) of `packed`.
template <class Engine>
void multiply_rows(const Runtime& rt, int m, int k, const typename Engine::elem* a, int lda,
                   const typename Engine::elem* packed, int rows, int row, int width, float* c, bool add) {
  for (int d = 0; d * kPanel < width; ++d) {
    const auto b = columns_of(packed, rows, width, d);
    Engine::gemm(rt, m, b.count, k, a, lda, b.panel + static_cast<size_t>(row) * b.ld, b.ld, c + d * kPanel, width,
                 add);
  }
}

// Pack `count` staged rows (row-major, `staged` wide) at `row` of `packed`.
template <class Engine>
void pack_rows(typename Engine::elem* packed, int rows, int row, int width, const typename Engine::elem* from,
               int staged, int count) {
  for (int d = 0; d * kPanel < width; ++d) {
    const int columns = min_int(kPanel, width - d * kPanel);
    auto* to = packed + static_cast<size_t>(rows) * d * kPanel + static_cast<size_t>(row) * columns;
    pair_rows<Engine>(to, columns, from + d * kPanel, staged, count, columns);
  }
}
// Pack `count` staged rows as the columns of a panel.
template <class Engine>
void pack_transposed(typename Engine::elem* panel, const typename Engine::elem* from, int staged, int count) {
  const int words = staged / Engine::pair;
  transpose(reinterpret_cast<uint32_t*>(panel), kPanel, reinterpret_cast<const uint32_t*>(from), words, count, words);
}

// The keys of a sample that some query row may see, or a few more. Others are packed as zeros or not at all: what they
// hold, in a static buffer say, must not matter.
struct Live {
  int lo = 1 << 30, hi = 0, gap_lo = 0, gap_hi = 0;

  bool operator()(int key) const { return key >= lo && key < hi && !(key >= gap_lo && key < gap_hi); }
  void include(int from, int to) {
    if (from >= to) return;
    lo = min_int(lo, from);
    hi = max_int(hi, to);
  }
};
inline Live live_of(const Problem& p, const Sample& sample) {
  Live live;
  for (const RowForm& form : p.layout.form) {
    if (form.rows == 0) continue;
    const bool decoding = sample.query_start >= 0;  // then all rows are TOKENS
    const int last = decoding ? sample.query_start + p.queries - 1 : form.rows - 1;
    live.include(form.lo, form.hi + form.step * last);
    if (form.own >= 0) live.include(form.own + (decoding ? sample.query_start : 0), form.own + last + 1);
  }
  if (live.lo < p.layout.cache) live.lo = max_int(live.lo, sample.cache_begin);
  const int first = p.layout.first_token_key();
  if (p.layout.tokens == 0) return live;
  if (sample.token_begin > 0) live.gap_lo = first, live.gap_hi = first + sample.token_begin;
  if (sample.token_end < p.layout.tokens) live.gap_lo = first + sample.token_end, live.gap_hi = first + p.layout.tokens;
  return live;
}

// Rows of a panel that starts at `from`, rounded up to 16: the step of a product's columns and, paired, of its depth.
RMT_INLINE int panel_rows(int from, int end) { return min_int(kPanel, round_up(end - from, 16)); }

// Stage the rows of a panel; rows that are not live, and rows past the end, become zeros. Returns how many.
template <class E, class T, class IsLive>
int stage_panel(E* to, int staged, const Rows<T>& rows, int from, int end, int head_dim, IsLive live) {
  const int count = panel_rows(from, end);
  for (int i = 0; i < count; ++i, to += staged) {
    const int row = from + i;
    if (row + kAhead < end) prefetch_row(rows[row + kAhead], head_dim);
    if (row < end && live(row)) {
      stage_row(to, rows[row], head_dim, staged);
    } else {
      memset(to, 0, staged * sizeof(E));
    }
  }
  return count;
}

RMT_INLINE void fill_hidden(float* s, int from, int to) {
  for (int i = from; i < to; ++i) s[i] = -kInf;
}
// Hide what `row` does not see of the scores of keys [from, to).
RMT_INLINE void mask_row(float* s, int from, int to, const Row& row) {
  fill_hidden(s, 0, min_int(row.lo, to) - from);
  fill_hidden(s, max_int(row.hi, from) - from, to - from);
  fill_hidden(s, max_int(row.gap_lo, from) - from, min_int(row.gap_hi, to) - from);
}

RMT_INLINE void multiply_wide(vu a, uint32_t m, vu& hi, vu& lo) {
#if defined(__AVX512F__)
  const __m512i by = _mm512_set1_epi32(static_cast<int>(m)), even = _mm512_mul_epu32((__m512i)a, by);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), by);
  hi = (vu)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  lo = (vu)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
#else
  const vw product = __builtin_convertvector(a, vw) * static_cast<uint64_t>(m);
  hi = __builtin_convertvector(product >> 32, vu);
  lo = __builtin_convertvector(product, vu);
#endif
}

// Random words of keys 4 * quad .. 4 * quad + 3: one vector a key, lanes as the vector arguments have them.
RMT_INLINE void draw(const Dropout& dropout, vu quad, vu query, uint32_t head, uint32_t batch, vu words[4]) {
  words[0] = quad;
  words[1] = query;
  words[2] = vu{} + head;
  words[3] = vu{} + batch;
  philox4x32(words, dropout.seed_lo, dropout.seed_hi, multiply_wide);
}

// 1 where the entry is kept, 0 where it is dropped, for keys [from, from + count) of one query row; from % 4 == 0.
inline void draw_row(float* keep, const Dropout& dropout, int from, int count, uint32_t query, uint32_t head,
                     uint32_t batch) {
  for (int i = 0; i < count; i += 4 * W) {
    vu words[4];
    draw(dropout, (vu)iota() + static_cast<uint32_t>((from + i) / 4), vu{} + query, head, batch, words);
    for (int w = 0; w < 4; ++w)
      for (int lane = 0; lane < W && i + 4 * lane < count; ++lane)
        keep[i + 4 * lane + w] = words[w][lane] >= dropout.threshold ? 1.0f : 0.0f;
  }
}
RMT_INLINE float draw_one(const Dropout& dropout, int key, uint32_t query, uint32_t head, uint32_t batch) {
  vu words[4];
  draw(dropout, vu{} + static_cast<uint32_t>(key / 4), vu{} + query, head, batch, words);
  return words[key % 4][0] >= dropout.threshold ? 1.0f : 0.0f;
}

template <class T>
RMT_INLINE float dot(const T* a, const T* b, int count) {
  vf sum{};
  int j = 0;
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<T, bf16>)
    for (; j + 2 * W <= count; j += 2 * W)
      sum = (vf)_mm512_dpbf16_ps((__m512)sum, load<__m512bh>(a + j), load<__m512bh>(b + j));
#endif
  for (; j + W <= count; j += W) sum += widen(a + j) * widen(b + j);
  if (j < count) sum += widen_part(a + j, count - j) * widen_part(b + j, count - j);
  return reduce_add(sum);
}

// y += x * a, `count` long; y is scratch padded to whole vectors.
template <class T>
RMT_INLINE void add_scaled(float* y, const T* x, float a, int count) {
  int j = 0;
  for (; j + W <= count; j += W) store(y + j, load<vf>(y + j) + widen(x + j) * a);
  if (j < count) store(y + j, load<vf>(y + j) + widen_part(x + j, count - j) * a);
}

// to = x * a, `count` long.
template <class T>
RMT_INLINE void store_scaled(T* to, const float* x, float a, int count) {
  int j = 0;
  for (; j + W <= count; j += W) narrow(to + j, load<vf>(x + j) * a);
  if (j < count) narrow_part(to + j, load<vf>(x + j) * a, count - j);
}

}  // namespace rmt::RMT_ISA
