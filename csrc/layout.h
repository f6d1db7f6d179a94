// The interval arithmetic of rmt_kernels/layout.py: which keys a query row sees. Plain C++, for host and device.
#pragma once

#include <cstdint>

// Always inlined: on the CPU this header is compiled for several instruction sets, whose copies must not be merged.
#if defined(__CUDACC__)
#define RMT_HD __host__ __device__ __forceinline__
#else
#define RMT_HD inline __attribute__((always_inline))
#endif

namespace rmt {

// Rows of one query region: row p sees keys [lo, hi + step * p) and, where own >= 0, key own + p.
struct RowForm {
  int rows, lo, hi, step, own;
};

// SegmentLayout.ints, in order.
struct Layout {
  static constexpr int kInts = 22;

  int cache, read, tokens, write;  // key rows of each region
  int token_rows;                  // rows of TOKENS, whether they are keys or not
  int window;                      // 0: none
  int skip;                        // leading query rows left out of the call
  RowForm form[3];                 // READ, TOKENS, WRITE

  RMT_HD int num_keys() const { return cache + read + tokens + write; }
  RMT_HD int first_token_key() const { return cache + read; }
  RMT_HD int num_queries() const { return form[0].rows + form[1].rows + form[2].rows - skip; }
};

// What differs between the samples of a batch. TOKENS outside [token_begin, token_end) are padding, at one end only.
struct Sample {
  int token_begin, token_end;
  int cache_begin;  // CACHE keys before it are padding
  int query_start;  // TOKENS position of the first query row, or -1
};

// Row sees keys [lo, hi) outside [gap_lo, gap_hi), and key own where own >= 0. Empty: lo == hi; no gap: gap_lo ==
// gap_hi.
struct Row {
  int lo, hi, gap_lo, gap_hi, own;
};

// Index of query row `q` of the call among all query rows of the layout: what dropout counts.
RMT_HD int layout_row(const Layout& layout, const Sample& sample, int q) {
  return sample.query_start >= 0 ? layout.form[0].rows + sample.query_start + q : layout.skip + q;
}

RMT_HD int min_int(int a, int b) { return a < b ? a : b; }
RMT_HD int max_int(int a, int b) { return a > b ? a : b; }

RMT_HD Row row_of(const Layout& layout, const Sample& sample, int q) {
  constexpr Row nothing{0, 0, 0, 0, -1};
  int p = layout_row(layout, sample, q), region = 0;
  while (region < 2 && p >= layout.form[region].rows) p -= layout.form[region++].rows;
  const RowForm& form = layout.form[region];
  const bool is_token = region == 1;
  if (is_token && (p < sample.token_begin || p >= sample.token_end)) return nothing;

  Row row{form.lo, form.hi + form.step * p, 0, 0, form.own >= 0 ? form.own + p : -1};
  const int first = layout.first_token_key(), old = layout.cache + p + 1 - layout.window;
  const bool slides = is_token && layout.window > 0;
  if (row.lo < layout.cache) {
    row.lo = max_int(row.lo, sample.cache_begin);
    if (slides) row.lo = max_int(row.lo, min_int(old, layout.cache));
  }
  // Hidden tokens: [first, first + begin) where padding or age hides the first ones, else [first + end, ...).
  const int begin = max_int(sample.token_begin, slides ? old - layout.cache : 0);
  if (layout.tokens > 0 && begin > 0) {
    row.gap_lo = first;
    row.gap_hi = first + begin;
  } else if (layout.tokens > 0 && sample.token_end < layout.tokens) {
    row.gap_lo = first + sample.token_end;
    row.gap_hi = first + layout.tokens;
  }
  // Normal form: the gap lies strictly inside the interval or is empty.
  if (row.gap_lo <= row.lo && row.gap_hi > row.lo) row.lo = row.gap_hi;
  if (row.gap_hi >= row.hi && row.gap_lo < row.hi) row.hi = max_int(row.gap_lo, row.lo);
  if (row.lo >= row.hi) row.lo = row.hi = 0;
  if (row.gap_lo <= row.lo || row.gap_hi >= row.hi) row.gap_lo = row.gap_hi = 0;
  return row;
}

// Keys that some row of a tile sees lie in [lo, hi) outside [gap_lo, gap_hi).
struct Span {
  int lo, hi, gap_lo, gap_hi;
  int all_lo, all_hi;          // every row sees [all_lo, all_hi), gaps of single rows aside
  int any_gap_lo, any_gap_hi;  // the union of the rows' gaps
  bool any_own;                // some row has a SELF key

  // No row of the tile needs a mask on keys [from, to).
  RMT_HD bool open(int from, int to) const {
    return from >= all_lo && to <= all_hi && (to <= any_gap_lo || from >= any_gap_hi);
  }
  // No row of the tile sees a key of [from, to).
  RMT_HD bool closed(int from, int to) const { return to <= lo || from >= hi || (from >= gap_lo && to <= gap_hi); }
};

RMT_HD Span span_of(const Row* rows, int count) {
  constexpr int far = 1 << 30;
  Span s{far, 0, 0, far, 0, far, far, 0, false};
  for (int i = 0; i < count; ++i) {
    const Row& row = rows[i];
    s.all_lo = max_int(s.all_lo, row.lo);
    s.all_hi = min_int(s.all_hi, row.hi);
    s.any_own |= row.own >= 0;
    if (row.lo == row.hi) continue;
    s.lo = min_int(s.lo, row.lo);
    s.hi = max_int(s.hi, row.hi);
    s.gap_lo = max_int(s.gap_lo, row.gap_lo);
    s.gap_hi = min_int(s.gap_hi, row.gap_hi);
    if (row.gap_lo < row.gap_hi) {
      s.any_gap_lo = min_int(s.any_gap_lo, row.gap_lo);
      s.any_gap_hi = max_int(s.any_gap_hi, row.gap_hi);
    }
  }
  if (s.hi == 0) s.lo = 0;
  if (s.gap_lo >= s.gap_hi) s.gap_lo = s.gap_hi = 0;
  return s;
}

}  // namespace rmt
