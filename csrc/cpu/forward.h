// Forward: a tile of query rows walks the keys that its rows see, 64 at a time, with an online softmax.
#pragma once

#include "offsets.h"

namespace rmt::RMT_ISA {

template <class Engine, class T>
class Forward {
  using E = typename Engine::elem;
  static constexpr int kRows = Engine::tile_rows;
  static constexpr int kBlock = 8 * kPanel;    // keys between two rescalings of the output
  static constexpr int kStride = kBlock + 16;  // of a block in memory: a power of two would crowd a few cache sets
  static constexpr int kEntries = kBlock + kRows + 48;  // of a table, that a block's rows and keys meet

  struct Packed {  // keys and values of one (batch, key/value head)
    E* keys;       // [panels][staged / pair][64][pair]: K^T
    E* values;     // [width panels][keys / pair][columns][pair]
  };
  struct Workspace {   // of one thread
    E *stage, *q, *p;  // (64, staged), (rows, staged), (rows, block)
    float *s, *o;      // (rows, block), (rows, width)
    float* keep;       // (block)
    Row* rows;
    E* position;      // (rows + 1, staged): query + position bias, the row after the tile's last one too
    float* products;  // (rows + 1, entries): with the table
  };

  const Problem& p_;
  const Runtime& rt_;
  const Sizes<Engine> n_;
  const Offsets<Engine, T> offsets_;
  const float c_;            // scores times this are in units of log2
  const bool scaled_first_;  // c_ <= 0, or a table adds to them: scores are scaled before they are masked and compared
  const int heads_a_tile_;   // short queries: rows of several heads of a group share a tile
  const int tiles_a_head_;

  static int heads_a_tile(const Problem& p) {
    if (p.relative.any()) return 1;  // the tables are a head's own
    return p.queries > kRows / 2 ? 1 : max_int(1, min_int(p.group(), kRows / max_int(1, p.queries)));
  }
  int tiles_a_unit() const { return (p_.group() + heads_a_tile_ - 1) / heads_a_tile_ * tiles_a_head_; }
  int units() const { return p_.batch * p_.kv_heads; }

  Packed carve_packed(Arena& arena) const {
    E* keys = arena.take<E>(n_.key_panels * n_.transposed_panel());
    return {keys, arena.take<E>(n_.packed(n_.keys))};
  }
  Workspace carve_workspace(Arena& arena) const {
    Workspace w{};
    w.stage = arena.take<E>(kPanel * n_.staged);
    w.q = arena.take<E>(kRows * n_.staged);
    w.s = arena.take<float>(kRows * kStride);
    w.p = sizeof(E) == 4 ? reinterpret_cast<E*>(w.s) : arena.take<E>(kRows * kStride);
    w.o = arena.take<float>(kRows * n_.width);
    w.keep = arena.take<float>(kBlock);
    w.rows = arena.take<Row>(kRows);
    if (p_.relative.key) {
      w.position = arena.take<E>((kRows + 1) * n_.staged);
      w.products = arena.take<float>((kRows + 1) * kEntries);
    }
    return w;
  }
  size_t packed_bytes() const {
    Arena count;
    carve_packed(count);
    return count.used();
  }
  size_t workspace_bytes() const {
    Arena count;
    carve_workspace(count);
    return count.used();
  }
  size_t tables_bytes() const {
    Arena count;
    offsets_.carve(count, false);
    return count.used();
  }
  typename Offsets<Engine, T>::Tables tables(int h) const {
    Arena arena(rt_.scratch + h * tables_bytes());
    return offsets_.carve(arena, false);
  }
  Packed packed(int slot) const {
    Arena arena(rt_.scratch + p_.heads * tables_bytes() + slot * packed_bytes());
    return carve_packed(arena);
  }
  Workspace workspace(int thread, int slots) const {
    Arena arena(rt_.scratch + p_.heads * tables_bytes() + slots * packed_bytes() + thread * workspace_bytes());
    return carve_workspace(arena);
  }

  void pack(const Packed& to, const Workspace& w, int b, int g, const Live& live, int panel) const {
    const int from = panel * kPanel;
    if (from >= live.hi || from + kPanel <= live.lo) return;
    const auto keys = head_of<T>(p_.key, p_.cache_key, p_.cache_rows, b, g);
    const int rows = stage_panel(w.stage, n_.staged, keys, from, p_.keys, p_.head_dim, live);
    pack_transposed<Engine>(to.keys + panel * n_.transposed_panel(), w.stage, n_.staged, rows);
    const auto values = head_of<T>(p_.value, p_.cache_value, p_.cache_rows, b, g);
    stage_panel(w.stage, n_.staged, values, from, p_.keys, p_.head_dim, live);
    pack_rows<Engine>(to.values, n_.keys, from, n_.width, w.stage, n_.staged, rows);
  }

  // One row of a block: scores to probabilities against a running pivot, the highest score so far. Returns the factor
  // on what was summed before. Subtracting before scaling keeps every exponent at or below 0, however large the scores.
  static float softmax_row(const float* s, E* p, int count, float c, float& pivot, float& sum) {
    vf most = splat(-kInf);
    for (int j = 0; j < count; j += W) most = max(most, load<vf>(s + j));
    const float highest = reduce_max(most), before = pivot;
    pivot = highest > pivot ? highest : pivot;
    const float finite = pivot == -kInf ? 0.0f : pivot;
    vf total{};
    for (int j = 0; j < count; j += W) {
      const vf x = exp2<Engine::exp_degree>((load<vf>(s + j) - finite) * c);
      total += x;
      narrow(p + j, x);
    }
    if (before == pivot || before == -kInf) {  // in the latter case nothing was summed before
      sum += reduce_add(total);
      return 1.0f;
    }
    const float factor = exp2<6>(splat((before - finite) * c))[0];
    sum = sum * factor + reduce_add(total);
    return factor;
  }

  // The rows of a tile that meet the tables' keys: query + position bias. One more where keys ahead meet the next row.
  // Rows that see nothing are zeros: padding may hold anything.
  void stage_positions(const Workspace& w, int b, int h, int q0, int count) const {
    const T* bias = vector_of(p_.relative.position_bias, h);
    for (int i = 0; i <= count; ++i) {
      E* row = w.position + i * n_.staged;
      const bool there = q0 + i < p_.queries && (i < count || p_.relative.shifted);
      if (there && !blind(i < count ? w.rows[i] : row_of(p_.layout, p_.sample(b), q0 + i))) {
        stage_row(row, row_at<T>(p_.query, b, h, q0 + i), p_.head_dim, n_.staged);
        if (bias) add_bias(row, bias, p_.head_dim);
      } else {
        memset(row, 0, sizeof(E) * n_.staged);
      }
    }
  }
  const T* vector_of(const char* biases, int h) const {
    return biases ? reinterpret_cast<const T*>(biases) + static_cast<int64_t>(h) * p_.head_dim : nullptr;
  }

  // Scores of rows [0, count) and keys [from, to), scaled, with what the tables add. `own`: the first row's own key.
  void add_offsets(const Workspace& w, int h, int own, int count, int from, int to) const {
    const auto tables = this->tables(h);
    const int begin = offsets_.column(from, own + count - 1) / 16 * 16;
    const int end = round_up(offsets_.column(to - 1, own) + 1, 16), keys = to - from;
    bool shifted = false;  // some row sees a key ahead of its own
    for (int i = 0; p_.relative.shifted && i < count; ++i) shifted |= min_int(to, w.rows[i].hi) > own + i + 1;
    if (p_.relative.key) offsets_.multiply(rt_, count + shifted, w.position, tables, begin, end, w.products, kEntries);
    for (int i = 0; i < count; ++i) {
      float* s = w.s + i * kStride;
      const int column = offsets_.column(from, own + i);
      float* product = p_.relative.key ? w.products + i * kEntries + column - begin : nullptr;
      const int ahead = max_int(0, own + i + 1 - from);
      if (shifted && ahead < keys) memcpy(product + ahead, product + kEntries + ahead, sizeof(float) * (keys - ahead));
      const float* bias = p_.relative.bias ? tables.bias + column : nullptr;
      for (int j = 0; j < keys; j += W) {
        vf x = load<vf>(s + j);
        if (p_.relative.key) x += load<vf>(product + j);
        x *= c_;
        if (p_.relative.bias) x += load<vf>(bias + j);
        store(s + j, x);
      }
    }
  }

  void tile(const Packed& packed, const Workspace& w, int b, int g, int index) const {
    const int q0 = index % tiles_a_head_ * kRows, queries = min_int(kRows, p_.queries - q0);
    const int first = index / tiles_a_head_ * heads_a_tile_;  // head within the group
    const int heads = min_int(heads_a_tile_, p_.group() - first), count = heads * queries;
    const int h0 = g * p_.group() + first;
    const Sample sample = p_.sample(b);
    const float c = scaled_first_ ? 1.0f : c_;
    float pivot[kRows], sum[kRows];
    uint32_t absolute[kRows];  // row in the layout, for dropout
    for (int i = 0; i < count; ++i) {
      const int q = q0 + i % queries;
      w.rows[i] = row_of(p_.layout, sample, q);
      absolute[i] = layout_row(p_.layout, sample, q);
      pivot[i] = -kInf;
      sum[i] = 0.0f;
      if (q + kRows < p_.queries) prefetch_row(row_at<T>(p_.query, b, h0 + i / queries, q + kRows), p_.head_dim);
      stage_row(w.q + i * n_.staged, row_at<T>(p_.query, b, h0 + i / queries, q), p_.head_dim, n_.staged);
      if (p_.relative.content_bias) add_bias(w.q + i * n_.staged, vector_of(p_.relative.content_bias, h0), p_.head_dim);
    }
    if (p_.relative.key) stage_positions(w, b, h0, q0, count);
    const Span span = span_of(w.rows, count);
    bool summed = span.hi == 0 || span.any_own();  // whether `o` holds numbers to add to
    if (summed) memset(w.o, 0, sizeof(float) * count * n_.width);
    for (int i = 0; span.any_own() && i < count; ++i)
      if (w.rows[i].own >= 0)
        start_with_own(w, b, g, h0 + i / queries, q0 + i % queries, i, absolute[i], pivot[i], sum[i]);

    int panel = span.lo / kPanel;
    while (panel * kPanel < span.hi) {
      // A block: up to eight panels side by side that some row sees.
      const int from = panel * kPanel;
      int to = from;
      while (to < span.hi && to - from < kBlock && !span.closed(to, to + kPanel)) to += kPanel;
      panel = max_int(to, from + kPanel) / kPanel;
      if (to == from) continue;
      to = min_int(to, round_up(span.hi, 16));
      const int keys = to - from;

      for (int j = 0; j < keys; j += kPanel)
        Engine::gemm(rt_, count, min_int(kPanel, keys - j), n_.depth, w.q, n_.staged,
                     packed.keys + (from + j) / kPanel * n_.transposed_panel(), kPanel, w.s + j, kStride, false);
      if (p_.relative.tables()) add_offsets(w, h0, own_key(p_.layout, sample, q0), count, from, to);
      const bool masked = !span.open(from, to);
      for (int i = 0; i < count; ++i) {
        float* s = w.s + i * kStride;
        E* p = w.p + i * kStride;
        if (scaled_first_ && !p_.relative.tables())
          for (int j = 0; j < keys; j += W) store(s + j, load<vf>(s + j) * c_);
        if (masked) mask_row(s, from, to, w.rows[i]);
        const float factor = softmax_row(s, p, keys, c, pivot[i], sum[i]);
        if (factor != 1.0f) {
          float* o = w.o + i * n_.width;
          for (int j = 0; j < n_.width; j += W) store(o + j, load<vf>(o + j) * factor);
        }
        if (p_.dropout.on()) {
          draw_row(w.keep, p_.dropout, from, keys, absolute[i], h0 + i / queries, b);
          for (int j = 0; j < keys; j += W) narrow(p + j, widen(p + j) * load<vf>(w.keep + j));
        }
      }
      multiply_rows<Engine>(rt_, count, keys, w.p, kStride, packed.values, n_.keys, from, n_.width, w.o, summed);
      summed = true;
    }

    const float rescale = p_.dropout.on() ? p_.dropout.rescale() : 1.0f;
    for (int i = 0; i < count; ++i) {
      const int h = h0 + i / queries, q = q0 + i % queries;
      store_scaled(row_at<T>(p_.out, b, h, q), w.o + i * n_.width, blind(w.rows[i]) ? 0.0f : rescale / sum[i], p_.head_dim);
      p_.lse[(static_cast<int64_t>(b) * p_.heads + h) * p_.queries + q] =
          blind(w.rows[i]) ? -kInf : (pivot[i] * c + std::log2(sum[i])) * kLn2;
    }
  }

  // A SELF row's own key starts its softmax.
  void start_with_own(const Workspace& w, int b, int g, int h, int q, int i, uint32_t absolute, float& pivot,
                      float& sum) const {
    const int own = w.rows[i].own;
    const T* key = head_of<T>(p_.key, p_.cache_key, p_.cache_rows, b, g)[own];
    const T* value = head_of<T>(p_.value, p_.cache_value, p_.cache_rows, b, g)[own];
    pivot = dot(row_at<T>(p_.query, b, h, q), key, p_.head_dim) * (scaled_first_ ? c_ : 1.0f);
    sum = 1.0f;
    const float keep = p_.dropout.on() ? draw_one(p_.dropout, own, absolute, h, b) : 1.0f;
    add_scaled(w.o + i * n_.width, value, keep, p_.head_dim);
  }

 public:
  Forward(const Problem& p, const Runtime& rt)
      : p_(p),
        rt_(rt),
        n_(p),
        offsets_(p, n_),
        c_(p.scale * kLog2e),
        scaled_first_(c_ <= 0.0f || p.relative.tables()),
        heads_a_tile_(heads_a_tile(p)),
        tiles_a_head_((p.queries + kRows - 1) / kRows) {}

  static size_t scratch(const Problem& p, int threads) {
    const Runtime none{};
    const Forward f(p, none);
    return p.heads * f.tables_bytes() + (by_unit(p, threads) ? threads : f.units()) * f.packed_bytes() +
           threads * f.workspace_bytes();
  }

  void run() const {
    if (p_.relative.tables())
      rt_.parallel(
          rt_.threads, p_.heads * offsets_.panels,
          [](void* self, int item, int thread) { static_cast<const Forward*>(self)->pack_tables(item, thread); },
          const_cast<Forward*>(this));
    if (by_unit(p_, rt_.threads)) {
      rt_.parallel(
          rt_.threads, units(),
          [](void* self, int item, int thread) { static_cast<const Forward*>(self)->unit(item, thread); },
          const_cast<Forward*>(this));
      return;
    }
    rt_.parallel(
        rt_.threads, units() * n_.key_panels,
        [](void* self, int item, int thread) { static_cast<const Forward*>(self)->shared_pack(item, thread); },
        const_cast<Forward*>(this));
    rt_.parallel(
        rt_.threads, units() * tiles_a_unit(),
        [](void* self, int item, int thread) { static_cast<const Forward*>(self)->shared_tile(item, thread); },
        const_cast<Forward*>(this));
  }

 private:
  void unit(int item, int thread) const {
    const int b = item / p_.kv_heads, g = item % p_.kv_heads;
    const Packed to = packed(thread);
    const Workspace w = workspace(thread, rt_.threads);
    const Live live = live_of(p_, p_.sample(b));
    for (int panel = 0; panel < n_.key_panels; ++panel) pack(to, w, b, g, live, panel);
    for (int t = 0; t < tiles_a_unit(); ++t) tile(to, w, b, g, t);
    Engine::release(rt_);
  }
  void pack_tables(int item, int thread) const {
    const int h = item / offsets_.panels, slots = by_unit(p_, rt_.threads) ? rt_.threads : units();
    offsets_.pack(tables(h), workspace(thread, slots).stage, h, item % offsets_.panels);
  }
  void shared_pack(int item, int thread) const {
    const int u = item / n_.key_panels, b = u / p_.kv_heads;
    pack(packed(u), workspace(thread, units()), b, u % p_.kv_heads, live_of(p_, p_.sample(b)), item % n_.key_panels);
  }
  void shared_tile(int item, int thread) const {
    // Later tiles of a causal layout see more keys: they start first.
    const int t = tiles_a_unit() - 1 - item / units(), u = item % units();
    tile(packed(u), workspace(thread, units()), u / p_.kv_heads, u % p_.kv_heads, t);
    Engine::release(rt_);
  }
};

}  // namespace rmt::RMT_ISA
