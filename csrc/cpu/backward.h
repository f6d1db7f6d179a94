// Backward: five products on every visible 64 x 64 tile, probabilities recomputed from lse.
//
// A tile holds keys as rows and queries as columns, so that per-query numbers (lse, delta) are vectors:
//   S^T = K Q^T, dP^T = V dO^T, P^T = exp2(c S^T - lse2), dS^T = P^T (dP^T - delta),
//   dV += P^T dO, dK += dS^T Q, dQ^T += K^T dS^T, the last two times the scale when they are written.
// Tile (i, j) of queries and keys is added to dK_j, dV_j in ascending i and to dQ_i in ascending j, whoever runs it:
// by a thread that owns the head and keeps all of dQ^T, or, where there are fewer heads than threads, by one thread for
// the column (dK, dV) and another for the row (dQ), each recomputing the tile.
//
// Where scores depend on offsets, three more products, 16 queries of a tile and 80 entries of the table at a time (what
// they meet 64 keys in): Q' R^T adds to S^T, and of dS laid along the diagonals dQ' += dS R and dR^T += Q'^T dS. A
// thread then owns the head, and takes a run of samples one after another, whose sums for the tables are added up at
// the end.
#pragma once

#include "offsets.h"

namespace rmt::RMT_ISA {

template <class Engine, class T>
class Backward {
  using E = typename Engine::elem;
  static constexpr int kRun = 4 * kPanel;    // queries whose tiles are added to dK and dV at once
  static constexpr int kStride = kRun + 16;  // of a run in memory: a power of two would crowd a few cache sets
  static constexpr int kStrip = 16;          // queries that meet the tables together
  static constexpr int kWindow = 2 * kPanel - kStrip;  // stride of their products with it: at most 96 columns
  static constexpr int kSamples = 4;                   // of a run of samples

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
    // With a table of keys. `position`: query + position bias.
    E* position;       // (queries + 1, staged), row-major
    E* position_t;     // [panels](staged, 64), row-major
    E* following_t;    // the same of the next rows, where keys ahead meet them
    float* dposition;  // (queries + 1, width)
    Span* strips;      // (queries / 16)
    bool* ahead;       // (queries / 16): some row sees keys ahead of its own
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
    // With tables.
    float* t;                   // (64, 64): what they add to the exponents; then dS^T
    float *window, *following;  // (16, window): of a strip of queries: products with the table, dS along the diagonals
    E *left, *right;            // (16, window): dS as left operand, and as right
  };
  // Sums over a run of samples, for one query head.
  struct Sums {
    float* dr;                    // (width, offsets): dR^T
    float* dbias;                 // (offsets)
    float *dcontent, *dposition;  // (width)
  };

  const Problem& p_;
  const Runtime& rt_;
  const Sizes<Engine> n_;
  const Offsets<Engine, T> offsets_;
  const float c_;

  bool by_unit() const { return p_.relative.any() || RMT_ISA::by_unit(p_, rt_.threads); }
  int units() const { return p_.batch * p_.kv_heads; }
  KeySide carve_keys(Arena& arena) const {
    KeySide k;
    k.k = arena.take<E>(n_.transposed_panel());
    k.v = arena.take<E>(n_.transposed_panel());
    k.kt = arena.take<E>(n_.transposed_panel());
    return k;
  }
  // A thread that owns the head packs key panels as it comes to them; else all of them are packed first.
  int kept_key_panels() const { return by_unit() ? 1 : n_.key_panels; }
  QuerySide carve_queries(Arena& arena, bool with_dq) const {
    QuerySide q{};
    q.qt = arena.take<E>(n_.query_panels * n_.transposed_panel());
    q.dot = arena.take<E>(n_.query_panels * n_.transposed_panel());
    q.q = arena.take<E>(n_.packed(n_.queries));
    q.dout = arena.take<E>(n_.packed(n_.queries));
    q.lse = arena.take<float>(n_.queries);
    q.delta = arena.take<float>(n_.queries);
    q.dq = with_dq ? arena.take<float>(n_.packed(n_.queries)) : nullptr;
    q.rows = arena.take<Row>(n_.queries);
    q.spans = arena.take<Span>(n_.query_panels);
    if (p_.relative.tables()) {
      q.strips = arena.take<Span>(n_.queries / kStrip);
      q.ahead = arena.take<bool>(n_.queries / kStrip);
    }
    if (p_.relative.key) {
      q.position = arena.take<E>((n_.queries + 1) * n_.staged);
      q.position_t = arena.take<E>(n_.query_panels * n_.transposed_panel());
      if (p_.relative.shifted) q.following_t = arena.take<E>(n_.query_panels * n_.transposed_panel());
      q.dposition = arena.take<float>((n_.queries + 1) * n_.width);
    }
    return q;
  }
  Workspace carve_workspace(Arena& arena) const {
    Workspace w{};
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
    if (p_.relative.tables()) {
      w.t = arena.take<float>(kPanel * kPanel);
      w.window = arena.take<float>(kStrip * kWindow);
      w.following = arena.take<float>(kStrip * kWindow);
      w.left = arena.take<E>(kStrip * kWindow);
      w.right = arena.take<E>(kStrip * kWindow);
    }
    return w;
  }
  size_t unit_bytes() const {
    Arena count;
    for (int j = 0; j < kept_key_panels(); ++j) carve_keys(count);
    for (int h = 0; h < p_.group(); ++h) carve_queries(count, by_unit());
    return count.used();
  }
  size_t tables_bytes() const {
    Arena count;
    offsets_.carve(count, true);
    return count.used();
  }
  Sums carve_sums(Arena& arena) const {
    Sums sums{};
    if (p_.relative.key) sums.dr = arena.take<float>(static_cast<size_t>(n_.width) * offsets_.stride);
    if (p_.relative.bias) sums.dbias = arena.take<float>(offsets_.entries);
    if (p_.relative.content_bias) sums.dcontent = arena.take<float>(n_.width);
    if (p_.relative.position_bias) sums.dposition = arena.take<float>(n_.width);
    return sums;
  }
  size_t sums_bytes() const {
    Arena count;
    carve_sums(count);
    return count.used();
  }
  int runs() const { return (p_.batch + kSamples - 1) / kSamples; }
  size_t shared_bytes() const { return p_.heads * (tables_bytes() + runs() * sums_bytes()); }
  typename Offsets<Engine, T>::Tables tables(int h) const {
    Arena arena(rt_.scratch + h * tables_bytes());
    return offsets_.carve(arena, true);
  }
  Sums sums(int run, int h) const {
    Arena arena(rt_.scratch + p_.heads * tables_bytes() + (run * p_.heads + h) * sums_bytes());
    return carve_sums(arena);
  }
  size_t workspace_bytes() const {
    Arena count;
    carve_workspace(count);
    return count.used();
  }
  int slots() const { return by_unit() ? rt_.threads : units(); }
  KeySide key_side(int slot, int j) const {
    Arena arena(rt_.scratch + shared_bytes() + slot * unit_bytes());
    for (int before = j % kept_key_panels(); before > 0; --before) carve_keys(arena);
    return carve_keys(arena);
  }
  QuerySide query_side(int slot, int head) const {
    Arena arena(rt_.scratch + shared_bytes() + slot * unit_bytes());
    for (int j = 0; j < kept_key_panels(); ++j) carve_keys(arena);
    for (int h = 0; h < head; ++h) carve_queries(arena, by_unit());
    return carve_queries(arena, by_unit());
  }
  Workspace workspace(int thread) const {
    Arena arena(rt_.scratch + shared_bytes() + slots() * unit_bytes() + thread * workspace_bytes());
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
    const auto pack = [&](const Matrix& m, E* transposed, E* plain, const T* bias = nullptr) {
      const Rows<T> rows = head_of<T>(m, m, 0, b, h);
      const int staged = stage_panel(w.stage, n_.staged, rows, from, p_.queries, p_.head_dim, sees);
      for (int i = 0; bias && i < count; ++i)
        if (sees(from + i)) add_bias(w.stage + i * n_.staged, bias, p_.head_dim);
      pack_transposed<Engine>(transposed + panel * n_.transposed_panel(), w.stage, n_.staged, staged);
      pack_rows<Engine>(plain, n_.queries, from, n_.width, w.stage, n_.staged, staged);
    };
    pack(p_.query, to.qt, to.q, vector_of(p_.relative.content_bias, h));
    pack(p_.grad_out, to.dot, to.dout);
    if (!p_.relative.tables()) return;
    const int own = own_key(p_.layout, sample, 0);
    for (int i = from; i < from + kPanel; i += kStrip) {
      to.strips[i / kStrip] = span_of(to.rows + i, kStrip);
      to.ahead[i / kStrip] = false;
      for (int j = i; j < i + kStrip; ++j) to.ahead[i / kStrip] |= to.rows[j].hi > own + j + 1;
    }
  }

  const T* vector_of(const char* biases, int h) const {
    return biases ? reinterpret_cast<const T*>(biases) + static_cast<int64_t>(h) * p_.head_dim : nullptr;
  }

  // Query + position bias. Rows that see nothing are zeros, for keys ahead of the row before too.
  void pack_positions(const QuerySide& to, const Workspace& w, int b, int h) const {
    const Rows<T> rows = head_of<T>(p_.query, p_.query, 0, b, h);
    const T* bias = vector_of(p_.relative.position_bias, h);
    const auto turn = [&](int from, E* transposed) {
      pack_transposed<Engine>(Engine::pair == 1 ? transposed : w.stage, to.position + from * n_.staged, n_.staged,
                              kPanel);
      if constexpr (Engine::pair == 2) part_pairs(transposed, w.stage, n_.staged, kPanel);
    };
    memset(to.position, 0, sizeof(E) * (n_.queries + 1) * n_.staged);
    for (int i = 0; i < p_.queries; ++i) {
      if (to.lse[i] == kInf) continue;
      stage_row(to.position + i * n_.staged, rows[i], p_.head_dim, n_.staged);
      if (bias) add_bias(to.position + i * n_.staged, bias, p_.head_dim);
    }
    for (int i = 0; i < n_.query_panels; ++i) {
      turn(i * kPanel, to.position_t + i * n_.transposed_panel());
      if (p_.relative.shifted) turn(i * kPanel + 1, to.following_t + i * n_.transposed_panel());
    }
    memset(to.dposition, 0, sizeof(float) * (n_.queries + 1) * n_.width);
  }

  // P^T and dS^T of a tile from S^T and dP^T, elementwise, in columns [at, at + queries) of the run; `from` is its
  // first key.
  template <bool Masked, bool Drop, bool Tables>
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
          vf score = load<vf>(w.s + here) * c_;
          if constexpr (Tables) score += load<vf>(w.t + here);
          vf p = exp2<Engine::exp_degree>(min(score - lse, vf{}));
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
          if constexpr (Tables) store(w.t + here, ds[e]);
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

  // Where a strip of 16 queries and a panel of keys meet the table: columns [begin, end); key 0 of the strip's first
  // query lies `at` columns behind `begin`, and that query's own key `own` columns.
  struct Window {
    int begin, end, at, own;
  };
  Window window_of(int own, int from) const {
    const int first = offsets_.column(from, own), begin = (first - kStrip + 1) / 16 * 16;
    return {begin, round_up(first + kPanel, 16), first - begin, offsets_.first() - begin};
  }
  bool keys_ahead(const QuerySide& q, int row, const Window& x) const {
    return p_.relative.shifted && q.ahead[row / kStrip] && x.at + kPanel - 1 > x.own;
  }

  // What the tables add to the exponents of a tile, (64 keys, queries), into w.t.
  void offset_scores(const QuerySide& q, const Workspace& w, int h, int own, int i, int from, int queries) const {
    const auto tables = this->tables(h);
    for (int c = 0; c < queries; c += kStrip) {
      const int row = i * kPanel + c;
      if (q.strips[row / kStrip].closed(from, from + kPanel)) {
        for (int r = 0; r < kPanel; ++r) memset(w.t + r * kPanel + c, 0, sizeof(float) * kStrip);
        continue;
      }
      const Window x = window_of(own + row, from);
      const int columns = x.end - x.begin;
      if (p_.relative.key)
        offsets_.multiply(rt_, kStrip, q.position + row * n_.staged, tables, x.begin, x.end, w.window, kWindow);
      if (p_.relative.key && keys_ahead(q, row, x)) {
        offsets_.multiply(rt_, kStrip, q.position + (row + 1) * n_.staged, tables, x.begin, x.end, w.following,
                          kWindow);
        const int ahead = max_int(0, x.own + 1);
        for (int r = 0; r < kStrip; ++r)
          memcpy(w.window + r * kWindow + ahead, w.following + r * kWindow + ahead, sizeof(float) * (columns - ahead));
      }
      for (int r = 0; r < kStrip; ++r) {
        for (int j = 0; j < columns; j += W) {
          vf y{};
          if (p_.relative.key) y = load<vf>(w.window + r * kWindow + j) * c_;
          if (p_.relative.bias) y += load<vf>(tables.bias + x.begin + j);
          store(w.window + r * kWindow + j, y);
        }
      }
      transpose(reinterpret_cast<uint32_t*>(w.t) + c, kPanel, reinterpret_cast<const uint32_t*>(w.window) + x.at,
                kWindow - 1, kStrip, kPanel);
    }
  }

  // From dS^T of a tile in w.t: the part of dQ that comes through the table, and the sums for the table.
  void offset_gradients(const QuerySide& q, const Workspace& w, const Sums& sums, int h, int own, int i, int from,
                        int queries) const {
    const auto tables = this->tables(h);
    for (int c = 0; c < queries; c += kStrip) {
      const int row = i * kPanel + c;
      if (q.strips[row / kStrip].closed(from, from + kPanel)) continue;
      const Window x = window_of(own + row, from);
      const int columns = x.end - x.begin;
      memset(w.window, 0, sizeof(float) * kStrip * kWindow);
      transpose(reinterpret_cast<uint32_t*>(w.window) + x.at, kWindow - 1, reinterpret_cast<const uint32_t*>(w.t) + c,
                kPanel, kPanel, kStrip);
      for (int j = 0; p_.relative.bias && j < columns; j += W) {
        vf sum = load<vf>(sums.dbias + x.begin + j);
        for (int r = 0; r < kStrip; ++r) sum += load<vf>(w.window + r * kWindow + j);
        store(sums.dbias + x.begin + j, sum);
      }
      if (!p_.relative.key) continue;
      const E* transposed = q.position_t + i * n_.transposed_panel() + c;
      if (keys_ahead(q, row, x)) {
        const int ahead = max_int(0, x.own + 1);
        for (int r = 0; r < kStrip; ++r) {
          float *here = w.window + r * kWindow, *next = w.following + r * kWindow;
          memset(next, 0, sizeof(float) * ahead);
          memcpy(next + ahead, here + ahead, sizeof(float) * (columns - ahead));
          memset(here + ahead, 0, sizeof(float) * (columns - ahead));
        }
        table_gradients(w, sums, tables, w.following, x, q.following_t + (transposed - q.position_t),
                        q.dposition + static_cast<size_t>(row + 1) * n_.width);
      }
      table_gradients(w, sums, tables, w.window, x, transposed, q.dposition + static_cast<size_t>(row) * n_.width);
    }
  }
  // dposition (16 x width) += dS (16 x columns) @ R, dR^T (width x columns) += position^T (width x 16) @ dS.
  void table_gradients(const Workspace& w, const Sums& sums, const typename Offsets<Engine, T>::Tables& tables,
                       const float* ds, const Window& x, const E* transposed, float* dposition) const {
    const int columns = x.end - x.begin;
    const E* left;
    if constexpr (Engine::pair == 1) {
      left = ds;
    } else {
      for (int r = 0; r < kStrip; ++r)
        for (int j = 0; j < columns; j += W) narrow(w.left + r * kWindow + j, load<vf>(ds + r * kWindow + j));
      left = w.left;
    }
    multiply_rows<Engine>(rt_, kStrip, columns, left, kWindow, tables.rows, offsets_.entries, x.begin, n_.width,
                          dposition, true);
    for (int at = 0; at < columns; at += kPanel) {
      const int n = min_int(kPanel, columns - at);
      if constexpr (Engine::pair == 2) pair_rows<Engine>(w.right, n, left + at, kWindow, kStrip, n);
      Engine::gemm(rt_, n_.width, n, kStrip, transposed, kPanel, Engine::pair == 1 ? left + at : w.right,
                   Engine::pair == 1 ? kWindow : n, sums.dr + x.begin + at, offsets_.stride, true);
    }
  }

  // Tile (i, j): P^T and dS^T into columns [at, ...) of the run, and dQ^T where it is wanted.
  void tile(const KeySide& k, const QuerySide& q, const Workspace& w, int b, int h, int i, int j, int at,
            float* dq) const {
    const int from = j * kPanel, keys = key_count(j), queries = query_count(i);
    const E *qt = q.qt + i * n_.transposed_panel(), *dot = q.dot + i * n_.transposed_panel();
    Engine::gemm(rt_, keys, queries, n_.depth, k.k, n_.staged, qt, kPanel, w.s, kPanel, false);
    Engine::gemm(rt_, keys, queries, n_.depth, k.v, n_.staged, dot, kPanel, w.dp, kPanel, false);
    const bool masked = !q.spans[i].open(from, from + keys), drop = p_.dropout.on();
    if (drop) draw_tile(w, p_.sample(b), b, h, i, from);
    const auto run = [&]<bool Tables>(std::bool_constant<Tables>) {
      if (masked) {
        drop ? probabilities<true, true, Tables>(w, q, i, from, keys, queries, at)
             : probabilities<true, false, Tables>(w, q, i, from, keys, queries, at);
      } else {
        drop ? probabilities<false, true, Tables>(w, q, i, from, keys, queries, at)
             : probabilities<false, false, Tables>(w, q, i, from, keys, queries, at);
      }
    };
    if (p_.relative.tables()) {
      const int own = own_key(p_.layout, p_.sample(b), 0);
      offset_scores(q, w, h, own, i, from, queries);
      run(std::true_type{});
      memset(w.t + keys * kPanel, 0, sizeof(float) * (kPanel - keys) * kPanel);
      offset_gradients(q, w, sums(b / kSamples, h), h, own, i, from, queries);
    } else {
      run(std::false_type{});
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

  void write_queries(const Workspace& w, const float* dq, const QuerySide& q, int b, int h, int i) const {
    transpose(reinterpret_cast<uint32_t*>(w.row), n_.width, reinterpret_cast<const uint32_t*>(dq), kPanel, n_.width,
              kPanel);
    const Sums sums = p_.relative.any() ? this->sums(b / kSamples, h) : Sums{};
    for (int r = 0; r < min_int(kPanel, p_.queries - i * kPanel); ++r) {
      float* row = w.row + r * n_.width;
      const bool sees = q.lse[i * kPanel + r] != kInf;
      // What comes through the table.
      const float* through = q.dposition && sees ? q.dposition + static_cast<size_t>(i * kPanel + r) * n_.width : nullptr;
      if (sums.dcontent) add_scaled(sums.dcontent, row, 1.0f, n_.width);
      if (sums.dposition && through) add_scaled(sums.dposition, through, 1.0f, n_.width);
      if (through) add_scaled(row, through, 1.0f, n_.width);
      store_scaled(row_at<T>(p_.grad_query, b, h, i * kPanel + r), row, p_.scale, p_.head_dim);
    }
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

  void unit(int item, int thread) const { whole(item / p_.kv_heads, item % p_.kv_heads, thread); }
  // A run of samples, one after another.
  void run_of(int item, int thread) const {
    const int run = item / p_.kv_heads, g = item % p_.kv_heads;
    for (int x = 0; x < p_.group(); ++x) {
      const Sums to = sums(run, g * p_.group() + x);
      if (to.dr) memset(to.dr, 0, sizeof(float) * n_.width * offsets_.stride);
      if (to.dbias) memset(to.dbias, 0, sizeof(float) * offsets_.entries);
      if (to.dcontent) memset(to.dcontent, 0, sizeof(float) * n_.width);
      if (to.dposition) memset(to.dposition, 0, sizeof(float) * n_.width);
    }
    for (int b = run * kSamples; b < min_int(p_.batch, (run + 1) * kSamples); ++b) whole(b, g, thread);
  }
  // The sums of all runs, in their order, to where they belong.
  void write_tables(int h, int thread) const {
    const Relative& r = p_.relative;
    const Sums total = sums(0, h);
    const auto add = [](float* to, const float* from, size_t count) {
      for (size_t j = 0; j < count; j += W) store(to + j, load<vf>(to + j) + load<vf>(from + j));
    };
    for (int run = 1; run < runs(); ++run) {
      const Sums more = sums(run, h);
      if (total.dr) add(total.dr, more.dr, static_cast<size_t>(n_.width) * offsets_.stride);
      if (total.dbias) add(total.dbias, more.dbias, offsets_.entries);
      if (total.dcontent) add(total.dcontent, more.dcontent, n_.width);
      if (total.dposition) add(total.dposition, more.dposition, n_.width);
    }
    const auto vector = [&](char* to, const float* from) {
      store_scaled(reinterpret_cast<T*>(to) + static_cast<int64_t>(h) * p_.head_dim, from, p_.scale, p_.head_dim);
    };
    if (total.dcontent) vector(r.grad_content_bias, total.dcontent);
    if (total.dposition) vector(r.grad_position_bias, total.dposition);
    if (total.dbias)
      memcpy(r.grad_bias + static_cast<int64_t>(h) * r.offsets, total.dbias + offsets_.lead(),
             sizeof(float) * r.offsets);
    if (!total.dr) return;
    const Workspace w = workspace(thread);
    for (int panel = 0; panel < offsets_.panels; ++panel) {
      transpose(reinterpret_cast<uint32_t*>(w.row), n_.width,
                reinterpret_cast<const uint32_t*>(total.dr) + panel * kPanel, offsets_.stride, n_.width, kPanel);
      for (int c = 0; c < kPanel; ++c) {
        const int entry = panel * kPanel + c - offsets_.lead();
        if (entry < 0 || entry >= r.offsets) continue;
        T* to = reinterpret_cast<T*>(r.grad_key) + (static_cast<int64_t>(h) * r.offsets + entry) * p_.head_dim;
        store_scaled(to, w.row + c * n_.width, p_.scale, p_.head_dim);
      }
    }
  }

  void whole(int b, int g, int thread) const {
    const Workspace w = workspace(thread);
    const Live live = live_of(p_, p_.sample(b));
    for (int x = 0; x < p_.group(); ++x) {
      const QuerySide q = query_side(thread, x);
      for (int i = 0; i < n_.query_panels; ++i) pack_queries(q, w, b, g * p_.group() + x, i);
      memset(q.dq, 0, sizeof(float) * n_.packed(n_.queries));
      if (p_.relative.key) pack_positions(q, w, b, g * p_.group() + x);
    }
    for (int j = 0; j < n_.key_panels; ++j) {
      pack_keys(key_side(thread, j), w, b, g, live, j);
      key_column(thread, w, b, g, j, true);
    }
    for (int x = 0; x < p_.group(); ++x) {
      const QuerySide q = query_side(thread, x);
      for (int i = 0; i < n_.query_panels; ++i)
        write_queries(w, q.dq + n_.packed(i * kPanel), q, b, g * p_.group() + x, i);
    }
    Engine::release(rt_);
  }

  void pack_tables(int item, int thread) const {
    const int h = item / offsets_.panels;
    offsets_.pack(tables(h), workspace(thread).stage, h, item % offsets_.panels);
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
    write_queries(w, w.dq, q, b, g * p_.group() + x, i);
    Engine::release(rt_);
  }

 public:
  Backward(const Problem& p, const Runtime& rt) : p_(p), rt_(rt), n_(p), offsets_(p, n_), c_(p.scale * kLog2e) {}

  static size_t scratch(const Problem& p, int threads) {
    Runtime only_threads{};
    only_threads.threads = threads;
    const Backward f(p, only_threads);
    return f.shared_bytes() + f.slots() * f.unit_bytes() + threads * f.workspace_bytes();
  }

  void run() const {
    void* self = const_cast<Backward*>(this);
    if (p_.relative.any()) {
      rt_.parallel(
          rt_.threads, p_.heads * offsets_.panels,
          [](void* f, int item, int thread) { static_cast<const Backward*>(f)->pack_tables(item, thread); }, self);
      rt_.parallel(
          rt_.threads, runs() * p_.kv_heads,
          [](void* f, int item, int thread) { static_cast<const Backward*>(f)->run_of(item, thread); }, self);
      rt_.parallel(
          rt_.threads, p_.heads,
          [](void* f, int item, int thread) { static_cast<const Backward*>(f)->write_tables(item, thread); }, self);
      return;
    }
    if (by_unit()) {
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
