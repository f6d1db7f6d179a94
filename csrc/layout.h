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

// Whether a row sees nothing.
RMT_HD bool blind(const Row& row) { return row.lo == row.hi && row.own < 0; }

// Index of query row `q` of the call among all query rows of the layout: what dropout counts.
RMT_HD int layout_row(const Layout& layout, const Sample& sample, int q) {
  return sample.query_start >= 0 ? layout.form[0].rows + sample.query_start + q : layout.skip + q;
}

// Index of that row's own key among the keys.
RMT_HD int own_key(const Layout& layout, const Sample& sample, int q) {
  int p = layout_row(layout, sample, q), region = 0, first = layout.cache;
  while (region < 2 && p >= layout.form[region].rows) {
    p -= layout.form[region].rows;
    first += region++ == 0 ? layout.read : layout.tokens;
  }
  return first + p;
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

// What the rows of a tile see together. Keys that some row sees lie in [lo, hi) outside [gap_lo, gap_hi).
struct Span {
  static constexpr int kFar = 1 << 30;

  int lo = kFar, hi = 0, gap_lo = 0, gap_hi = kFar;
  int all_lo = 0, all_hi = kFar;          // every row sees [all_lo, all_hi), gaps of single rows aside
  int any_gap_lo = kFar, any_gap_hi = 0;  // the union of the rows' gaps
  int own_lo = kFar, own_hi = 0;          // SELF keys of rows lie in [own_lo, own_hi); none: own_hi == 0

  RMT_HD void add(const Row& row) {
    all_lo = max_int(all_lo, row.lo);
    all_hi = min_int(all_hi, row.hi);
    if (row.own >= 0) {
      own_lo = min_int(own_lo, row.own);
      own_hi = max_int(own_hi, row.own + 1);
    }
    if (row.lo == row.hi) return;
    lo = min_int(lo, row.lo);
    hi = max_int(hi, row.hi);
    gap_lo = max_int(gap_lo, row.gap_lo);
    gap_hi = min_int(gap_hi, row.gap_hi);
    if (row.gap_lo < row.gap_hi) {
      any_gap_lo = min_int(any_gap_lo, row.gap_lo);
      any_gap_hi = max_int(any_gap_hi, row.gap_hi);
    }
  }
  RMT_HD void merge(const Span& other) {
    lo = min_int(lo, other.lo), hi = max_int(hi, other.hi);
    gap_lo = max_int(gap_lo, other.gap_lo), gap_hi = min_int(gap_hi, other.gap_hi);
    all_lo = max_int(all_lo, other.all_lo), all_hi = min_int(all_hi, other.all_hi);
    any_gap_lo = min_int(any_gap_lo, other.any_gap_lo), any_gap_hi = max_int(any_gap_hi, other.any_gap_hi);
    own_lo = min_int(own_lo, other.own_lo), own_hi = max_int(own_hi, other.own_hi);
  }
  // After the last row: what is empty is [0, 0).
  RMT_HD void finish() {
    if (hi == 0) lo = 0;
    if (own_hi == 0) own_lo = 0;
    if (gap_lo >= gap_hi) gap_lo = gap_hi = 0;
  }

  RMT_HD bool any_own() const { return own_hi > 0; }
  // Rows see intervals: none has a gap or a key of its own.
  RMT_HD bool plain() const { return own_hi == 0 && any_gap_hi == 0; }
  // No row of the tile needs a mask on keys [from, to).
  RMT_HD bool open(int from, int to) const {
    return from >= all_lo && to <= all_hi && (to <= any_gap_lo || from >= any_gap_hi);
  }
  // No row of the tile sees a key of [from, to), own keys aside.
  RMT_HD bool closed(int from, int to) const { return to <= lo || from >= hi || (from >= gap_lo && to <= gap_hi); }
};

RMT_HD Span span_of(const Row* rows, int count) {
  Span s;
  for (int i = 0; i < count; ++i) s.add(rows[i]);
  s.finish();
  return s;
}

// The tiles of so many keys that a tile of rows visits, ascending: runs [begin[i], end[i]), in order and apart.
struct Walk {
  int begin[3], end[3];

  RMT_HD bool holds(int tile) const {
    return (tile >= begin[0] && tile < end[0]) || (tile >= begin[1] && tile < end[1]) ||
           (tile >= begin[2] && tile < end[2]);
  }
  // The first visited tile from `tile` on, or -1.
  RMT_HD int from(int tile) const {
    for (int i = 0; i < 3; ++i)
      if (tile < end[i] && begin[i] < end[i]) return max_int(tile, begin[i]);
    return -1;
  }
  // How many visited tiles come after `tile`.
  RMT_HD int after(int tile) const {
    int count = 0;
    for (int i = 0; i < 3; ++i) count += max_int(0, end[i] - max_int(begin[i], tile + 1));
    return count;
  }
};

// Tiles of which some row sees a key, or that lie between two rows' own keys.
RMT_HD Walk walk_of(const Span& span, int keys) {
  const int begin = span.lo / keys, end = (span.hi + keys - 1) / keys;
  const int own_begin = span.own_lo / keys, own_end = (span.own_hi + keys - 1) / keys;
  // The hole: tiles that lie in every row's gap.
  int hole_begin = min_int(max_int((span.gap_lo + keys - 1) / keys, begin), end);
  int hole_end = min_int(max_int(span.gap_hi / keys, hole_begin), end);
  if (span.gap_lo == span.gap_hi) hole_begin = hole_end = end;
  Walk walk{{begin, hole_end, own_begin}, {hole_begin, end, own_end}};
  // Own keys may lie anywhere: sort the runs by where they begin, empty ones last, then join what touches.
  for (int i = 0; i < 3; ++i)
    if (walk.begin[i] >= walk.end[i]) walk.begin[i] = walk.end[i] = Span::kFar;
  const auto order = [&walk](int a, int b) {
    if (walk.begin[a] <= walk.begin[b]) return;
    const int from = walk.begin[a], to = walk.end[a];
    walk.begin[a] = walk.begin[b], walk.end[a] = walk.end[b];
    walk.begin[b] = from, walk.end[b] = to;
  };
  order(0, 1), order(1, 2), order(0, 1);
  for (int i = 0; i < 2; ++i) {
    if (walk.begin[i + 1] > walk.end[i] || walk.begin[i + 1] == Span::kFar) continue;
    walk.begin[i + 1] = walk.begin[i];
    walk.end[i + 1] = max_int(walk.end[i], walk.end[i + 1]);
    walk.begin[i] = walk.end[i] = 0;
  }
  return walk;
}

// Which keys hold something: neither stale, nor padding, nor at or behind `limit`, from where on no row sees any.
struct Fence {
  int limit, stale, hole_lo, hole_hi;

  RMT_HD bool all_alive(int from, int to) const {
    return to <= limit && from >= stale && (to <= hole_lo || from >= hole_hi || hole_lo == hole_hi);
  }
  // Without branches: asked of every row that is copied.
  RMT_HD bool alive(int key) const { return (key < limit) & (key >= stale) & ((key < hole_lo) | (key >= hole_hi)); }
};

RMT_HD Fence fence_of(const Layout& layout, const Sample& sample, int limit) {
  const int first = layout.first_token_key(), end = min_int(sample.token_end, layout.tokens);
  if (sample.token_begin > 0)
    return {limit, sample.cache_begin, first, first + min_int(sample.token_begin, layout.tokens)};
  return {limit, sample.cache_begin, first + end, first + layout.tokens};
}

// The end of the keys that a call with query_start sees: later ones are the future and may hold anything.
RMT_HD int last_key(const Layout& layout, const Sample& sample, int queries) {
  if (sample.query_start < 0 || queries == 0) return layout.num_keys();
  const RowForm& form = layout.form[1];
  const int last = sample.query_start + queries - 1;
  return min_int(layout.num_keys(), max_int(form.hi + form.step * last, form.own >= 0 ? form.own + last + 1 : 0));
}

}  // namespace rmt
