// Scores that depend on how far a key lies from a row's own key: tables packed once a call, products of rows with a
// window of their entries, and the skew that lays entry `key - own` of a row at its key.
//
// Row i of a tile meets key j at entry j - i + constant. So, in products of rows with entries, what belongs to one key
// lies on a diagonal, and a matrix of rows and keys is the same memory read with a row stride that is one less.
#pragma once

#include "tile.h"

namespace rmt::RMT_ISA {

template <class Engine, class T>
class Offsets {
  using E = typename Engine::elem;
  // Columns of zeros on either side of a table: hidden entries of a panel of keys of which some row sees a part lie at
  // most a tile's rows and a panel's keys outside it.
  static constexpr int kMargin = 2 * kPanel;

  const Problem& p_;
  const Sizes<Engine>& n_;
  int lead_;   // column of a table's first entry
  int first_;  // column of a row's own key

 public:
  // The tables of a head.
  struct Tables {
    E* columns;   // [panels][staged / pair][64][pair]: entries as columns
    E* rows;      // [width panels][entries / pair][columns][pair]: entries as rows; for gradients
    float* bias;  // (entries), in log2 units
  };

  int panels = 0, entries = 0;  // entries: columns of the packed tables, margins included
  int stride = 0;               // of rows over all entries

  Offsets(const Problem& p, const Sizes<Engine>& n) : p_(p), n_(n) {
    if (!p.relative.tables()) return;
    // 16 rows meet 64 keys in 79 entries: the window starts at a multiple of 16 where panels do.
    const int own = p.query_start ? 0 : own_key(p.layout, {0, 0, 0, -1}, 0);
    first_ = p.relative.reach + kMargin + ((own + 15 - p.relative.reach) % 16 + 16) % 16;
    lead_ = first_ - p.relative.reach;
    panels = (lead_ + p.relative.offsets + kMargin + kPanel - 1) / kPanel;
    entries = panels * kPanel;
    stride = entries + 16;  // a power of two would crowd a few cache sets
  }

  // Column of key j for a row whose own key is `own`.
  int column(int key, int own) const { return key - own + first_; }
  int first() const { return first_; }
  int lead() const { return lead_; }

  Tables carve(Arena& arena, bool gradients) const {
    Tables t{};
    if (p_.relative.key) {
      t.columns = arena.take<E>(panels * n_.transposed_panel());
      if (gradients) t.rows = arena.take<E>(n_.packed(entries));
    }
    if (p_.relative.bias) t.bias = arena.take<float>(entries);
    return t;
  }

  void pack(const Tables& to, E* stage, int h, int panel) const {
    const Relative& r = p_.relative;
    const int from = panel * kPanel;
    const auto inside = [&](int column) { return column >= lead_ && column < lead_ + r.offsets; };
    if (r.key) {
      const T* table = reinterpret_cast<const T*>(r.key) + (static_cast<int64_t>(h) * r.offsets - lead_) * p_.head_dim;
      const Rows<T> rows{table, table, p_.head_dim, p_.head_dim, 0};
      stage_panel(stage, n_.staged, rows, from, entries, p_.head_dim, inside);
      pack_transposed<Engine>(to.columns + panel * n_.transposed_panel(), stage, n_.staged, kPanel);
      if (to.rows) pack_rows<Engine>(to.rows, entries, from, n_.width, stage, n_.staged, kPanel);
    }
    for (int c = from; r.bias && c < from + kPanel; ++c)
      to.bias[c] = inside(c) ? r.bias[static_cast<int64_t>(h) * r.offsets + c - lead_] * kLog2e : 0.0f;
  }

  // (m x (to - from)) = rows (m x staged) @ entries [from, to), multiples of 16.
  void multiply(const Runtime& rt, int m, const E* rows, const Tables& tables, int from, int to, float* c,
                int ldc) const {
    for (int at = from; at < to;) {
      const int n = min_int(kPanel - at % kPanel, to - at);
      Engine::gemm(rt, m, n, n_.depth, rows, n_.staged,
                   tables.columns + at / kPanel * n_.transposed_panel() + at % kPanel * Engine::pair, kPanel,
                   c + at - from, ldc, false);
      at += n;
    }
  }
};

// Add a bias to a staged row.
template <class E, class T>
RMT_INLINE void add_bias(E* row, const T* bias, int count) {
  int j = 0;
  for (; j + W <= count; j += W) narrow(row + j, widen(row + j) + widen(bias + j));
  if (j < count) narrow_part(row + j, widen_part(row + j, count - j) + widen_part(bias + j, count - j), count - j);
}

}  // namespace rmt::RMT_ISA
