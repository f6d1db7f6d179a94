// Backward: five products on every visible 64 x 64 tile, probabilities recomputed from lse.
//
// A tile holds keys as rows and queries as columns, so that per-query numbers (lse, delta) are vectors:
//   S^T = K Q^T, dP^T = V dO^T, P^T = exp2(c S^T - lse2), dS^T = P^T (dP^T - delta),
//   dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T, the last two times the scale when they are written.
// Tile (i, j) of queries and keys is added to dK_j, dV_j in ascending i and to dQ_i in ascending j, whoever runs it:
// by a thread that owns the head and keeps all of dQ^T, or, where there are fewer heads than threads, by one thread for
// the column (dK, dV) and another for the row (dQ), each recomputing the tile.
#pragma once

#include "tile.h"

namespace rmt::RMT_ISA {

template <class Engine, class T>
class Backward {
  using E = typename Engine::elem;
  static constexpr int kRun = 4 * kPanel;    // queries whose tiles are added to dK and dV at once
  static constexpr int kStride = kRun + 16;  // of a run in memory: a power of two would crowd a few cache sets

  struct KeySide {  // of one key panel
    E *k, *v;       // (64, staged)
    E* kt;          // (staged, 64): K^T, row-major
  };
  struct QuerySide {     // of one (batch, query head)
    E *qt, *dot;         // [panels][staged / pair][64][pair]: Q^T and dO^T
    E *q, *dout;         // [width panels][queries / pair][columns][pair]: Q and dO
    float *lse, *delta;  // (queries): lse in log2 units, +inf where the row sees nothing; delta - grad of lse
    float* dq;           // [panels](width, 64): dQ^T
    Row* rows;           // (queries)
    Span* spans;         // (panels)
  };
  struct Workspace {  // of one thread
    E* stage;         // (64, staged)
    float *s, *dp;    // (64, 64): S^T and dP^T
    E *p, *ds;        // (64, run): P^T and dS^T as left operands
    E* ds_right;      // (64, 64): dS^T as right operand
    float* keep;      // (64, 64)
    float *dk, *dv;   // (64, width)
    float* dq;        // (width, 64), where no query side keeps it
    float* row;       // (width, 64): dQ turned around
  };

  const Problem& p_;
  const Runtime& rt_;
  const Sizes<Engine> n_;
  const float c_;

  int units() const { return p_.batch * p_.kv_heads; }
  KeySide carve_keys(Arena& arena) const {
    KeySide k;
    k.k = arena.take<E>(n_.transposed_panel());
    k.v = arena.take<E>(n_.transposed_panel());
    k.kt = arena.take<E>(n_.transposed_panel());
    return k;
  }
  // A thread that owns the head packs key panels as it comes to them; else all of them are packed first.
  int kept_key_panels() const { return by_unit(p_, rt_.threads) ? 1 : n_.key_panels; }
  QuerySide carve_queries(Arena& arena, bool with_dq) const {
    QuerySide q;
    q.qt = arena.take<E>(n_.query_panels * n_.transposed_panel());
    q.dot = arena.take<E>(n_.query_panels * n_.transposed_panel());
    q.q = arena.take<E>(n_.packed(n_.queries));
    q.dout = arena.take<E>(n_.packed(n_.queries));
    q.lse = arena.take<float>(n_.queries);
    q.delta = arena.take<float>(n_.queries);
    q.dq = with_dq ? arena.take<float>(n_.packed(n_.queries)) : nullptr;
    q.rows = arena.take<Row>(n_.queries);
    q.spans = arena.take<Span>(n_.query_panels);
    return q;
  }
  Workspace carve_workspace(Arena& arena) const {
    Workspace w;
    w.stage = arena.take<E>(kPanel * n_.staged);
    w.s = arena.take<float>(kPanel * kPanel);
    w.dp = arena.take<float>(kPanel * kPanel);
    w.p = arena.take<E>(kPanel * kStride);
    w.ds = arena.take<E>(kPanel * kStride);
    w.ds_right = Engine::pair == 2 ? arena.take<E>(kPanel * kPanel) : nullptr;
    w.keep = arena.take<float>(kPanel * kPanel);
    w.dk = arena.take<float>(kPanel * n_.width);
    w.dv = arena.take<float>(kPanel * n_.width);
    w.dq = arena.take<float>(kPanel * n_.width);
    w.row = arena.take<float>(kPanel * n_.width);
    return w;
  }
  size_t unit_bytes() const {
    Arena count;
    for (int j = 0; j < kept_key_panels(); ++j) carve_keys(count);
    for (int h = 0; h < p_.group(); ++h) carve_queries(count, by_unit(p_, rt_.threads));
    return count.used();
  }
  size_t workspace_bytes() const {
    Arena count;
    carve_workspace(count);
    return count.used();
  }
  int slots() const { return by_unit(p_, rt_.threads) ? rt_.threads : units(); }
  KeySide key_side(int slot, int j) const {
    Arena arena(rt_.scratch + slot * unit_bytes());
    for (int before = j % kept_key_panels(); before > 0; --before) carve_keys(arena);
    return carve_keys(arena);
  }
  QuerySide query_side(int slot, int head) const {
    Arena arena(rt_.scratch + slot * unit_bytes());
    for (int j = 0; j < kept_key_panels(); ++j) carve_keys(arena);
    for (int h = 0; h < head; ++h) carve_queries(arena, by_unit(p_, rt_.threads));
    return carve_queries(arena, by_unit(p_, rt_.threads));
  }
  Workspace workspace(int thread) const {
    Arena arena(rt_.scratch + slots() * unit_bytes() + thread * workspace_bytes());
    return carve_workspace(arena);
  }

  void pack_keys(const KeySide& to, const Workspace& w, int b, int g, const Live& live, int panel) const {
    const int from = panel * kPanel;
    const auto keys = head_of<T>(p_.key, p_.cache_key, p_.cache_rows, b, g);
    const auto values = head_of<T>(p_.value, p_.cache_value, p_.cache_rows, b, g);
    const int rows = stage_panel(to.k, n_.staged, keys, from, p_.keys, p_.head_dim, live);
    stage_panel(to.v, n_.staged, values, from, p_.keys, p_.head_dim, live);
    pack_transposed<Engine>(Engine::pair == 1 ? to.kt : w.stage, to.k, n_.staged, rows);
    if constexpr (Engine::pair == 2) part_pairs(to.kt, w.stage, n_.staged, kPanel);
  }

  void pack_queries(const QuerySide& to, const Workspace& w, int b, int h, int panel) const {
    const int from = panel * kPanel, count = min_int(kPanel, p_.queries - from);
    const Sample sample = p_.sample(b);
    const int64_t base = (static_cast<int64_t>(b) * p_.heads + h) * p_.queries;
    for (int i = from; i < from + kPanel; ++i) {
      to.rows[i] = i < p_.queries ? row_of(p_.layout, sample, i) : Row{0, 0, 0, 0, -1};
      const bool sees = to.rows[i].lo < to.rows[i].hi || to.rows[i].own >= 0;
      to.lse[i] = sees ? p_.lse[base + i] * kLog2e : kInf;
      to.delta[i] = 0.0f;
      if (i + kAhead < p_.queries) {
        prefetch_row(row_at<T>(p_.out, b, h, i + kAhead), p_.head_dim);
        prefetch_row(row_at<T>(p_.grad_out, b, h, i + kAhead), p_.head_dim);
      }
      if (!sees) continue;
      to.delta[i] = dot(row_at<T>(p_.out, b, h, i), row_at<T>(p_.grad_out, b, h, i), p_.head_dim) -
                    (p_.grad_lse ? p_.grad_lse[base + i] : 0.0f);
    }
    to.spans[panel] = span_of(to.rows + from, count);
    // Rows that see nothing take part as zeros, whatever they hold.
    const auto sees = [&](int i) { return to.lse[i] != kInf; };
    const auto pack = [&](const Matrix& m, E* transposed, E* plain) {
      const Rows<T> rows = head_of<T>(m, m, 0, b, h);
      const int staged = stage_panel(w.stage, n_.staged, rows, from, p_.queries, p_.head_dim, sees);
      pack_transposed<Engine>(transposed + panel * n_.transposed_panel(), w.stage, n_.staged, staged);
      pack_rows<Engine>(plain, n_.queries, from, n_.width, w.stage, n_.staged, staged);
    };
    pack(p_.query, to.qt, to.q);
    pack(p_.grad_out, to.dot, to.dout);
  }

  // P^T and dS^T of a tile from S^T and dP^T, elementwise, in columns [at, at + queries) of the run; `from` is its
  // first key.
  template <bool Masked, bool Drop>
  void probabilities(const Workspace& w, const QuerySide& q, int i, int from, int keys, int queries, int at) const {
    const float rescale = Drop ? p_.dropout.rescale() : 1.0f;
    for (int col = 0; col < queries; col += W) {
      const int first = i * kPanel + col;
      const vf lse = load<vf>(q.lse + first), delta = load<vf>(q.delta + first);
      vi lo{}, hi{}, gap_lo{}, gap_hi{};
      if constexpr (Masked) {
        for (int lane = 0; lane < W; ++lane) {
          const Row& row = q.rows[first + lane];
          lo[lane] = row.lo, hi[lane] = row.hi, gap_lo[lane] = row.gap_lo, gap_hi[lane] = row.gap_hi;
        }
      }
      for (int r = 0; r < keys; r += Engine::pair) {
        vf ds[Engine::pair];
#pragma GCC unroll 2
        for (int e = 0; e < Engine::pair; ++e) {
          const int here = (r + e) * kPanel + col, x = (r + e) * kStride + at + col;
          vf p = exp2<Engine::exp_degree>(min(load<vf>(w.s + here) * c_ - lse, vf{}));
          if constexpr (Masked) {
            const vi key = splat(from + r + e);
            p = ((key >= lo) & (key < hi) & ~((key >= gap_lo) & (key < gap_hi))) ? p : vf{};
          }
          vf dp = load<vf>(w.dp + here), dropped = p;
          if constexpr (Drop) {
            const vf keep = load<vf>(w.keep + here) * rescale;
            dp *= keep;
            dropped *= keep;
          }
          ds[e] = p * (dp - delta);
          narrow(w.p + x, dropped);
          narrow(w.ds + x, ds[e]);
        }
        if constexpr (Engine::pair == 2) {
          const vu even = __builtin_convertvector(load<vh>(w.ds + r * kStride + at + col), vu);
          const vu odd = __builtin_convertvector(load<vh>(w.ds + (r + 1) * kStride + at + col), vu);
          store(reinterpret_cast<uint32_t*>(w.ds_right + r * kPanel) + col, even | odd << 16);
        }
      }
    }
  }

  void draw_tile(const Workspace& w, const Sample& sample, int b, int h, int i, int from) const {
    for (int col = 0; col < kPanel; col += W) {
      const vu query = (vu)iota() + static_cast<uint32_t>(layout_row(p_.layout, sample, i * kPanel + col));
      for (int r = 0; r < kPanel; r += 4) {
        vu words[4];
        draw(p_.dropout, vu{} + static_cast<uint32_t>((from + r) / 4), query, h, b, words);
        for (int e = 0; e < 4; ++e) {
          const vf keep = words[e] >= p_.dropout.threshold ? splat(1.0f) : vf{};
          store(w.keep + (r + e) * kPanel + col, keep);
        }
      }
    }
  }

  int query_count(int i) const { return panel_rows(i * kPanel, p_.queries); }
  int key_count(int j) const { return panel_rows(j * kPanel, p_.keys); }

  // Tile (i, j): P^T and dS^T into columns [at, ...) of the run, and dQ^T where it is wanted.
  void tile(const KeySide& k, const QuerySide& q, const Workspace& w, int b, int h, int i, int j, int at,
            float* dq) const {
    const int from = j * kPanel, keys = key_count(j), queries = query_count(i);
    const E *qt = q.qt + i * n_.transposed_panel(), *dot = q.dot + i * n_.transposed_panel();
    Engine::gemm(rt_, keys, queries, n_.depth, k.k, n_.staged, qt, kPanel, w.s, kPanel, false);
    Engine::gemm(rt_, keys, queries, n_.depth, k.v, n_.staged, dot, kPanel, w.dp, kPanel, false);
    const bool masked = !q.spans[i].open(from, from + keys), drop = p_.dropout.on();
    if (drop) draw_tile(w, p_.sample(b), b, h, i, from);
    if (masked) {
      drop ? probabilities<true, true>(w, q, i, from, keys, queries, at)
           : probabilities<true, false>(w, q, i, from, keys, queries, at);
    } else {
      drop ? probabilities<false, true>(w, q, i, from, keys, queries, at)
           : probabilities<false, false>(w, q, i, from, keys, queries, at);
    }
    if (!dq) return;
    const bool apart = Engine::pair == 2;
    Engine::gemm(rt_, n_.width, queries, keys, k.kt, kPanel, apart ? w.ds_right : w.ds + at, apart ? kPanel : kStride,
                 dq, kPanel, true);
  }

  // SELF entries of query panel i whose key lies in key panel j, row by row.
  void own_rows(const QuerySide& q, const Workspace& w, int b, int g, int h, int i, int j, float* dq,
                bool want_keys) const {
    if (!q.spans[i].any_own() || !holds_own_keys(j)) return;
    const Sample sample = p_.sample(b);
    for (int c = 0; c < kPanel; ++c) {
      const int at = i * kPanel + c, own = q.rows[at].own;
      if (own < j * kPanel || own >= (j + 1) * kPanel) continue;
      const T* key = head_of<T>(p_.key, p_.cache_key, p_.cache_rows, b, g)[own];
      const T* value = head_of<T>(p_.value, p_.cache_value, p_.cache_rows, b, g)[own];
      const T *query = row_at<T>(p_.query, b, h, at), *dout = row_at<T>(p_.grad_out, b, h, at);
      const float p = exp2<6>(min(splat(dot(query, key, p_.head_dim) * c_ - q.lse[at]), vf{}))[0];
      const float keep = p_.dropout.on()
                             ? draw_one(p_.dropout, own, layout_row(p_.layout, sample, at), h, b) * p_.dropout.rescale()
                             : 1.0f;
      const float ds = p * (dot(dout, value, p_.head_dim) * keep - q.delta[at]);
      if (want_keys) {
        add_scaled(w.dv + (own - j * kPanel) * n_.width, dout, p * keep, p_.head_dim);
        add_scaled(w.dk + (own - j * kPanel) * n_.width, query, ds, p_.head_dim);
      }
      if (dq) {
        memset(w.row, 0, sizeof(float) * n_.width);
        add_scaled(w.row, key, ds, p_.head_dim);
        for (int d = 0; d < p_.head_dim; ++d) dq[d * kPanel + c] += w.row[d];
      }
    }
  }

  void write_keys(const Workspace& w, int b, int g, int j) const {
    for (int r = 0; r < min_int(kPanel, p_.keys - j * kPanel); ++r) {
      const int key = j * kPanel + r;
      const bool cached = key < p_.cache_rows;
      const Matrix &dk = cached ? p_.grad_cache_key : p_.grad_key, &dv = cached ? p_.grad_cache_value : p_.grad_value;
      const int row = cached ? key : key - p_.cache_rows;
      store_scaled(row_at<T>(dk, b, g, row), w.dk + r * n_.width, p_.scale, p_.head_dim);
      store_scaled(row_at<T>(dv, b, g, row), w.dv + r * n_.width, 1.0f, p_.head_dim);
    }
  }
  void write_queries(const Workspace& w, const float* dq, int b, int h, int i) const {
    transpose(reinterpret_cast<uint32_t*>(w.row), n_.width, reinterpret_cast<const uint32_t*>(dq), kPanel, n_.width,
              kPanel);
    for (int r = 0; r < min_int(kPanel, p_.queries - i * kPanel); ++r)
      store_scaled(row_at<T>(p_.grad_query, b, h, i * kPanel + r), w.row + r * n_.width, p_.scale, p_.head_dim);
  }

  bool holds_own_keys(int j) const {
    for (const RowForm& form : p_.layout.form)
      if (form.own >= 0 && form.own < (j + 1) * kPanel && form.own + form.rows > j * kPanel) return true;
    return false;
  }

  // All tiles of key panel j, for every head of the group.
  void key_column(int slot, const Workspace& w, int b, int g, int j, bool with_queries) const {
    const KeySide k = key_side(slot, j);
    bool summed = false;  // whether dk and dv hold numbers to add to
    const auto clear = [&] {
      memset(w.dk, 0, sizeof(float) * kPanel * n_.width);
      memset(w.dv, 0, sizeof(float) * kPanel * n_.width);
      summed = true;
    };
    if (holds_own_keys(j)) clear();
    for (int x = 0; x < p_.group(); ++x) {
      const QuerySide q = query_side(slot, x);
      const int h = g * p_.group() + x;
      for (int i = 0; i < n_.query_panels;) {
        // A run: up to four query panels side by side that see some key of panel j.
        const int first = i;
        int columns = 0;
        for (; i < n_.query_panels && columns < kRun && !q.spans[i].closed(j * kPanel, (j + 1) * kPanel); ++i) {
          tile(k, q, w, b, h, i, j, columns, with_queries ? q.dq + n_.packed(i * kPanel) : nullptr);
          columns += query_count(i);
        }
        if (columns) {
          multiply_rows<Engine>(rt_, key_count(j), columns, w.p, kStride, q.dout, n_.queries, first * kPanel, n_.width,
                                w.dv, summed);
          multiply_rows<Engine>(rt_, key_count(j), columns, w.ds, kStride, q.q, n_.queries, first * kPanel, n_.width,
                                w.dk, summed);
          summed = true;
        }
        if (i == first) ++i;
      }
      for (int i = 0; i < n_.query_panels; ++i)
        own_rows(q, w, b, g, h, i, j, with_queries ? q.dq + n_.packed(i * kPanel) : nullptr, true);
    }
    if (!summed) clear();
    write_keys(w, b, g, j);
  }

  void unit(int item, int thread) const {
    const int b = item / p_.kv_heads, g = item % p_.kv_heads;
    const Workspace w = workspace(thread);
    const Live live = live_of(p_, p_.sample(b));
    for (int x = 0; x < p_.group(); ++x) {
      const QuerySide q = query_side(thread, x);
      for (int i = 0; i < n_.query_panels; ++i) pack_queries(q, w, b, g * p_.group() + x, i);
      memset(q.dq, 0, sizeof(float) * n_.packed(n_.queries));
    }
    for (int j = 0; j < n_.key_panels; ++j) {
      pack_keys(key_side(thread, j), w, b, g, live, j);
      key_column(thread, w, b, g, j, true);
    }
    for (int x = 0; x < p_.group(); ++x) {
      const QuerySide q = query_side(thread, x);
      for (int i = 0; i < n_.query_panels; ++i)
        write_queries(w, q.dq + n_.packed(i * kPanel), b, g * p_.group() + x, i);
    }
    Engine::release(rt_);
  }

  void shared_pack(int item, int thread) const {
    const int per_unit = n_.key_panels + p_.group() * n_.query_panels;
    const int u = item / per_unit, b = u / p_.kv_heads, g = u % p_.kv_heads;
    int x = item % per_unit;
    if (x < n_.key_panels) return pack_keys(key_side(u, x), workspace(thread), b, g, live_of(p_, p_.sample(b)), x);
    x -= n_.key_panels;
    const int head = x / n_.query_panels;
    pack_queries(query_side(u, head), workspace(thread), b, g * p_.group() + head, x % n_.query_panels);
  }
  void shared_column(int item, int thread) const {
    const int u = item % units(), j = item / units();  // causal layouts: early keys are seen by more rows
    key_column(u, workspace(thread), u / p_.kv_heads, u % p_.kv_heads, j, false);
    Engine::release(rt_);
  }
  void shared_row(int item, int thread) const {
    const int heads = units() * p_.group();
    const int i = n_.query_panels - 1 - item / heads, u = item % heads / p_.group(), x = item % p_.group();
    const int b = u / p_.kv_heads, g = u % p_.kv_heads;
    const Workspace w = workspace(thread);
    const QuerySide q = query_side(u, x);
    memset(w.dq, 0, sizeof(float) * kPanel * n_.width);
    for (int j = 0; j < n_.key_panels; ++j) {
      if (!q.spans[i].closed(j * kPanel, (j + 1) * kPanel))
        tile(key_side(u, j), q, w, b, g * p_.group() + x, i, j, 0, w.dq);
      own_rows(q, w, b, g, g * p_.group() + x, i, j, w.dq, false);
    }
    write_queries(w, w.dq, b, g * p_.group() + x, i);
    Engine::release(rt_);
  }

 public:
  Backward(const Problem& p, const Runtime& rt) : p_(p), rt_(rt), n_(p), c_(p.scale * kLog2e) {}

  static size_t scratch(const Problem& p, int threads) {
    Runtime only_threads{};
    only_threads.threads = threads;
    const Backward f(p, only_threads);
    return f.slots() * f.unit_bytes() + threads * f.workspace_bytes();
  }

  void run() const {
    void* self = const_cast<Backward*>(this);
    if (by_unit(p_, rt_.threads)) {
      rt_.parallel(
          rt_.threads, units(),
          [](void* f, int item, int thread) { static_cast<const Backward*>(f)->unit(item, thread); }, self);
      return;
    }
    rt_.parallel(
        rt_.threads, units() * (n_.key_panels + p_.group() * n_.query_panels),
        [](void* f, int item, int thread) { static_cast<const Backward*>(f)->shared_pack(item, thread); }, self);
    rt_.parallel(
        rt_.threads, units() * n_.key_panels,
        [](void* f, int item, int thread) { static_cast<const Backward*>(f)->shared_column(item, thread); }, self);
    rt_.parallel(
        rt_.threads, units() * p_.group() * n_.query_panels,
        [](void* f, int item, int thread) { static_cast<const Backward*>(f)->shared_row(item, thread); }, self);
  }
};

}  // namespace rmt::RMT_ISA
