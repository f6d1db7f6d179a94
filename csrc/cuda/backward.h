// Backward in one pass, without atomics on gradients: five products a pair of tiles.
//
// A block owns a tile of keys and walks the tiles of query rows that see it, first to last. Scores are computed
// transposed, keys by queries: a warp's 16 keys make probabilities the left operands of the products that follow, which
// stay in registers. A tile of queries collects its gradient from many blocks, in one order always: from the last tile
// of keys to the first, each block waiting for its turn. Blocks begin in that order too, so that whom one waits for has
// begun; and under a causal rule every block's turn has come when it gets there.
#pragma once

#include "dropout.h"
#include "epilogue.h"
#include "prepare.h"
#include "tile.h"

namespace rmt {

template <class Element_, int kWidth_, int kRows_, int kKeys_, int kWarps_, bool kDropout_>
struct BackwardConfig {
  using Element = Element_;
  static constexpr int kWidth = kWidth_, kRows = kRows_, kKeys = kKeys_, kWarps = kWarps_;
  static constexpr bool kDropout = kDropout_;

  static constexpr int kThreads = 32 * kWarps, kDepth = kWidth / 16, kSteps = kRows / 16;
  static_assert(kKeys == 16 * kWarps, "a warp owns 16 keys");
  static_assert(kRows % 64 == 0, "rows of scores are whole 128 bytes");

  // The gradient of queries: warps share it out as kSteps x kParts.
  static constexpr int kParts = kWarps / kSteps, kPart = kWidth / kParts;  // columns of a warp
  static_assert(kWarps % kSteps == 0 && kPart % 32 == 0);

  static constexpr int kRowBytes = Tile<kWidth>::bytes(kRows), kNumbers = 7 * 4 * kRows;
  static constexpr int kStage = 2 * kRowBytes + kNumbers;  // query rows, their grad_out, and what is known of them
  static constexpr int kKey = 0, kValue = Tile<kWidth>::bytes(kKeys), kScores = 2 * kValue,
                       kStages = kScores + Tile<kRows>::bytes(kKeys), kBegin = kStages + 2 * (kStage + 1023) / 1024 * 1024,
                       kShared = kBegin + 16;
  static constexpr int kStride = (kStage + 1023) / 1024 * 1024;  // of stages: tiles begin at multiples of their rows
};

template <class Config>
struct BackwardBlock {
  using C = Config;
  using Element = typename C::Element;
  using In = Reader<C::kWidth>;

  const Problem& p;
  const Scale& scale;
  const Divisor& group;
  const BackwardSpace& space;
  const Shared memory;
  int b, kv_head, key_tile;

  float dk[C::kWidth / 8][4], dv[C::kWidth / 8][4];
  float s[C::kRows / 8][4];              // scores, then probabilities: the warp's 16 keys by the tile's rows
  uint32_t slopes[C::kSteps][4];         // gradients of scores, as left operands
  uint32_t kept[(C::kRows / 8 + 7) / 8];  // four bits for every 8 rows

  RMT_DEVICE BackwardBlock(const Problem& problem, const Scale& problem_scale, const Divisor& by_group,
                           const BackwardSpace& problem_space)
      : p(problem), scale(problem_scale), group(by_group), space(problem_space), memory(device::shared_memory()) {}

  struct Lane {
    int thread, warp, g, t;
    RMT_DEVICE Lane() : thread(device::opaque(device::thread())) {
      warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
    }
  };
  RMT_DEVICE Shared stage(int number) const { return memory + C::kStages + number % 2 * C::kStride; }
  RMT_DEVICE Shared numbers(int number) const { return stage(number) + 2 * C::kRowBytes; }

  // -- which tiles of rows, and how they arrive -------------------------------------------------------------------------

  RMT_DEVICE const int* view(int tile) const {
    return space.views + (static_cast<int64_t>(b) * space.tiles + tile) * kViewInts;
  }
  // The first tile of rows from `tile` on that sees keys of the block's, or -1.
  RMT_DEVICE int next_tile(int tile) const {
    for (; tile < space.tiles; tile += 32) {
      const int mine = tile + Lane().thread % 32;
      const uint32_t found =
          device::ballot(mine < space.tiles && TileView::walk_at(view(min_int(mine, space.tiles - 1))).holds(key_tile));
      if (found != 0) return tile + device::lowest_bit(found);
    }
    return -1;
  }

  RMT_DEVICE void fetch(int number, int tile) {
    const PackedRows rows(p, group, b, kv_head);
    const CheckedSample sample(p, b);
    // Rows of padding may hold anything: queries [padded, padded_end) of the call.
    const int first_token = p.layout.form[0].rows - layout_row(p.layout, sample, 0), tokens = p.layout.form[1].rows;
    const int padded = first_token + (sample.token_begin > 0 ? 0 : min_int(sample.token_end, tokens));
    const int padded_end = first_token + (sample.token_begin > 0 ? min_int(sample.token_begin, tokens) : tokens);
    const auto wanted = [&](int r) {
      const int q = rows.query(r);
      return (r < rows.count) & ((q < padded) | (q >= padded_end));
    };
    const int thread = Lane().thread;
    copy_rows<C::kWidth, C::kRows, C::kThreads>(stage(number), tile * C::kRows, p.head_dim, thread,
                                                [&](int r) { return rows.address(p.query, r); }, wanted);
    copy_rows<C::kWidth, C::kRows, C::kThreads>(stage(number) + C::kRowBytes, tile * C::kRows, p.head_dim, thread,
                                                [&](int r) { return rows.address(p.grad_out, r); }, wanted);
    const int64_t unit = (static_cast<int64_t>(b) * p.kv_heads + kv_head) * space.tiles + tile;
    const auto* of_head = reinterpret_cast<const char*>(space.numbers + unit * 2 * C::kRows);
    const auto* of_sample =
        reinterpret_cast<const char*>(space.rows + (static_cast<int64_t>(b) * space.tiles + tile) * 5 * C::kRows);
    constexpr int kOwn = 2 * 4 * C::kRows / 16;
    for (int i = thread; i < C::kNumbers / 16; i += C::kThreads)
      device::copy_async(numbers(number) + 16 * i, i < kOwn ? of_head + 16 * i : of_sample + 16 * (i - kOwn), true);
    device::commit_copies();
  }

  RMT_DEVICE void fetch_keys() {
    const CheckedSample sample(p, b);
    const Fence fence = fence_of(p.layout, sample, last_key(p.layout, sample, p.queries));
    const auto copy = [&](int offset, const Keys& from) {
      copy_rows<C::kWidth, C::kKeys, C::kThreads>(
          memory + offset, key_tile * C::kKeys, p.head_dim, Lane().thread, [&](int n) { return from.row(n); },
          [&](int n) { return fence.alive(n); });
    };
    copy(C::kKey, Keys(p.cache_key, p.key, p.cache_rows, b, kv_head));
    copy(C::kValue, Keys(p.cache_value, p.value, p.cache_rows, b, kv_head));
  }

  // -- a tile of rows ---------------------------------------------------------------------------------------------------

  // s = a tile of the block's (16 of the warp) times a tile of rows, transposed.
  template <bool kSigned>
  RMT_DEVICE void multiply_rows(float (&c)[C::kRows / 8][4], Shared ours, Shared theirs) const {
    RMT_UNROLL for (int n = 0; n < C::kRows / 8; ++n)
      RMT_UNROLL for (int i = 0; i < 4; ++i) c[n][i] = 0.0f;
    const In left = In::a(ours + Tile<C::kWidth>::bytes(16 * Lane().warp)), right = In::b(theirs);
    RMT_UNROLL for (int d = 0; d < C::kDepth; ++d) {
      uint32_t a[4];
      left.read(a, 0, 2 * d);
      if (kSigned) RMT_UNROLL for (int i = 0; i < 4; ++i) a[i] = scale.signed_word(a[i]);
      RMT_UNROLL for (int n = 0; n < C::kSteps; ++n) {
        uint32_t words[4];
        right.read(words, 16 * n, 2 * d);
        device::multiply<Element>(c[2 * n], a, words[0], words[1]);
        device::multiply<Element>(c[2 * n + 1], a, words[2], words[3]);
      }
    }
  }

  // c (the warp's 16 keys by width) += a (16 keys by the tile's rows) @ the tile's rows.
  RMT_DEVICE void add_rows(float (&c)[C::kWidth / 8][4], const uint32_t (&a)[C::kSteps][4], Shared rows) const {
    const In right = In::b_transposed(rows);
    RMT_UNROLL for (int k = 0; k < C::kSteps; ++k)
      RMT_UNROLL for (int n = 0; n < C::kDepth; ++n) {
        uint32_t words[4];
        right.read(words, 16 * k, 2 * n);
        device::multiply<Element>(c[2 * n], a[k], words[0], words[1]);
        device::multiply<Element>(c[2 * n + 1], a[k], words[2], words[3]);
      }
  }

  RMT_DEVICE void probabilities(int number, int tile) {
    const Lane lane;
    const Shared pivots = numbers(number);
    const int first_key = key_tile * C::kKeys;
    RMT_UNROLL for (int n = 0; n < C::kRows / 8; ++n)
      RMT_UNROLL for (int j = 0; j < 2; ++j) {
        const float pivot = device::load_shared_float(pivots + 4 * (8 * n + 2 * lane.t + j));
        RMT_UNROLL for (int half = 0; half < 2; ++half) {
          float& score = s[n][2 * half + j];
          score = device::exp2(device::fma(score, scale.factor, -pivot));
        }
      }
    if (TileView::open_at(view(tile), first_key, first_key + C::kKeys)) return;
    const Shared fields = pivots + 2 * 4 * C::kRows;
    const int key = first_key + 16 * lane.warp + lane.g;
    RMT_UNROLL for (int n = 0; n < C::kRows / 8; ++n)
      RMT_UNROLL for (int j = 0; j < 2; ++j) {
        int field[5];
        RMT_UNROLL for (int f = 0; f < 5; ++f)
          field[f] = device::load_shared(fields + 4 * (f * C::kRows + 8 * n + 2 * lane.t + j));
        const Row row{field[0], field[1], field[2], field[3], field[4]};
        RMT_UNROLL for (int half = 0; half < 2; ++half) {
          float& probability = s[n][2 * half + j];
          probability = sees(row, key + 8 * half) ? probability : 0.0f;
        }
      }
  }

  RMT_DEVICE void draw_kept(int tile) {
    const Lane lane;
    const Draw draw(p, b);
    const PackedRows rows(p, group, b, kv_head);
    const CheckedSample sample(p, b);
    const int key = key_tile * C::kKeys + 16 * lane.warp;
    RMT_UNROLL for (int n = 0; n < C::kRows / 8; ++n) {
      const int r = min_int(tile * C::kRows + 8 * n + 2 * lane.t + lane.g % 2, rows.count - 1);
      const uint32_t bits = kept_by_columns(draw, key, layout_row(p.layout, sample, rows.query(r)), rows.head(r));
      kept[n / 8] = (n % 8 == 0 ? 0u : kept[n / 8]) | bits << (4 * (n % 8));
    }
  }
  RMT_DEVICE bool is_kept(int n, int i) const { return !C::kDropout || (kept[n / 8] >> (4 * (n % 8) + i) & 1u); }

  RMT_DEVICE void add_to_values(int number) {
    uint32_t left[C::kSteps][4];
    RMT_UNROLL for (int k = 0; k < C::kSteps; ++k)
      RMT_UNROLL for (int i = 0; i < 4; ++i) {
        const int n = 2 * k + i / 2, e = i % 2 * 2;
        left[k][i] = device::pack<Element>(is_kept(n, e) ? s[n][e] : 0.0f, is_kept(n, e + 1) ? s[n][e + 1] : 0.0f);
      }
    add_rows(dv, left, stage(number) + C::kRowBytes);
  }

  // Gradients of scores: left operands for the keys' gradient, and in shared memory, keys by rows, for the queries'.
  RMT_DEVICE void find_slopes(int number) {
    float dp[C::kRows / 8][4];
    multiply_rows<false>(dp, memory + C::kValue, stage(number) + C::kRowBytes);
    const Lane lane;
    const Shared deltas = numbers(number) + 4 * C::kRows;
    const float rescale = C::kDropout ? p.dropout.rescale() : 1.0f;
    RMT_UNROLL for (int n = 0; n < C::kRows / 8; ++n) {
      float delta[2];
      RMT_UNROLL for (int j = 0; j < 2; ++j)
        delta[j] = device::load_shared_float(deltas + 4 * (8 * n + 2 * lane.t + j));
      RMT_UNROLL for (int half = 0; half < 2; ++half) {
        float slope[2];
        RMT_UNROLL for (int j = 0; j < 2; ++j) {
          const int e = 2 * half + j;
          const float through = is_kept(n, e) ? (C::kDropout ? dp[n][e] * rescale : dp[n][e]) : 0.0f;
          slope[j] = s[n][e] * (through - delta[j]);
        }
        const uint32_t word = device::pack<Element>(slope[0], slope[1]);
        slopes[n / 2][n % 2 * 2 + half] = word;
        const Shared row = Tile<C::kRows>::chunk_at(memory + C::kScores, 16 * lane.warp + 8 * half + lane.g, n);
        device::store_shared(row + 4 * lane.t, word);
      }
    }
  }

  // The queries' gradient, a 16 x kPart block of it: what others have summed, and what the block's keys add.
  RMT_DEVICE void add_to_queries(float (&dq)[C::kPart / 8][4]) const {
    const Lane lane;
    const int first = lane.warp % C::kSteps * 2, column = lane.warp / C::kSteps * (C::kPart / 8);  // chunks
    const auto left = Reader<C::kRows>::a_transposed(memory + C::kScores);
    const In right = In::b_transposed(memory + C::kKey);
    RMT_UNROLL for (int k = 0; k < C::kKeys / 16; ++k) {
      uint32_t a[4];
      left.read(a, 16 * k, first);
      RMT_UNROLL for (int n = 0; n < C::kPart / 16; ++n) {
        uint32_t words[4];
        right.read(words, 16 * k, column + 2 * n);
        device::multiply<Element>(dq[2 * n], a, words[0], words[1]);
        device::multiply<Element>(dq[2 * n + 1], a, words[2], words[3]);
      }
    }
  }

  RMT_DEVICE int64_t unit(int tile) const {
    return (static_cast<int64_t>(b) * p.kv_heads + kv_head) * space.tiles + tile;
  }
  RMT_DEVICE Vector* sums(int tile) const {
    return reinterpret_cast<Vector*>(space.sums + unit(tile) * C::kRows * C::kWidth) + Lane().thread;
  }

  RMT_DEVICE void store_queries(int tile, const float (&dq)[C::kPart / 8][4]) const {
    const Lane lane;
    const PackedRows rows(p, group, b, kv_head);
    const CheckedSample sample(p, b);
    const int column = lane.warp / C::kSteps * C::kPart;
    RMT_UNROLL for (int half = 0; half < 2; ++half) {
      const int r = tile * C::kRows + lane.warp % C::kSteps * 16 + 8 * half + lane.g;
      store_row<Element, C::kPart / 8>(
          r < rows.count ? rows.address(p.grad_query, r) + 2 * column : nullptr, p.head_dim - column,
          [&](int n, int i) { return sample.ok ? dq[n][2 * half + i] * p.scale : device::not_a_number(); });
    }
  }

  RMT_DEVICE void run() {
    const int key_tiles = (p.keys + C::kKeys - 1) / C::kKeys;
    if (device::thread() == 0) device::store_shared(memory + C::kBegin, device::take_ticket(space.tickets));
    device::barrier();
    const int ticket = device::load_shared(memory + C::kBegin), head = ticket / key_tiles;
    key_tile = key_tiles - 1 - ticket % key_tiles, b = head / p.kv_heads, kv_head = head % p.kv_heads;

    RMT_UNROLL for (int n = 0; n < C::kWidth / 8; ++n)
      RMT_UNROLL for (int i = 0; i < 4; ++i) dk[n][i] = dv[n][i] = 0.0f;
    int tile = next_tile(0);
    if (tile >= 0) fetch_keys(), fetch(0, tile);
    int* release = nullptr;  // whose turn has ended, and how many have had theirs
    int released = 0;
    for (int number = 0; tile >= 0; ++number) {
      const int next = next_tile(tile + 1);
      device::wait_copies<0>();
      device::barrier();  // the rows are there; scores, the other stage and sums are done with
      if (release != nullptr && device::thread() == 0) device::store_release(release, released);
      if (next >= 0) fetch(number + 1, next);

      multiply_rows<true>(s, memory + C::kKey, stage(number));
      probabilities(number, tile);
      if (C::kDropout) draw_kept(tile);
      add_to_values(number);
      find_slopes(number);

      const Walk walk = TileView::walk_at(view(tile));
      const int turn = walk.after(key_tile);
      const bool last = walk.from(0) == key_tile;
      int* turns = space.turns + unit(tile);
      if (turn > 0 && device::thread() == 0)
        while (device::load_acquire(turns) != turn) device::pause();
      device::barrier();  // scores are there, and so are the sums of those before
      float dq[C::kPart / 8][4];
      RMT_UNROLL for (int n = 0; n < C::kPart / 8; ++n) {
        const Vector sum = turn > 0 ? device::load_far(sums(tile) + n * C::kThreads) : Vector{};
        RMT_UNROLL for (int i = 0; i < 4; ++i) dq[n][i] = device::from_bits(sum.word[i]);
      }
      add_rows(dk, slopes, stage(number));
      add_to_queries(dq);
      if (last) {
        store_queries(tile, dq);
      } else {
        RMT_UNROLL for (int n = 0; n < C::kPart / 8; ++n)
          device::store_far(sums(tile) + n * C::kThreads,
                            {{device::bits(dq[n][0]), device::bits(dq[n][1]), device::bits(dq[n][2]), device::bits(dq[n][3])}});
      }
      release = last ? nullptr : turns, released = turn + 1;
      tile = next;
    }
    device::barrier();
    if (release != nullptr && device::thread() == 0) device::store_release(release, released);
    store_keys();
  }

  RMT_DEVICE void store_keys() const {
    const Lane lane;
    const CheckedSample sample(p, b);
    const Keys keys(p.grad_cache_key, p.grad_key, p.cache_rows, b, kv_head);
    const Keys values(p.grad_cache_value, p.grad_value, p.cache_rows, b, kv_head);
    const float rescale = C::kDropout ? p.dropout.rescale() : 1.0f;
    RMT_UNROLL for (int half = 0; half < 2; ++half) {
      const int key = key_tile * C::kKeys + 16 * lane.warp + 8 * half + lane.g;
      const bool there = key < p.keys;
      const auto store = [&](const Keys& to, const float(&grad)[C::kWidth / 8][4], float factor) {
        store_row<Element, C::kWidth / 8>(
            there ? const_cast<char*>(to.row(key)) : nullptr, p.head_dim,
            [&](int n, int i) { return sample.ok ? grad[n][2 * half + i] * factor : device::not_a_number(); });
      };
      store(keys, dk, p.scale), store(values, dv, rescale);
    }
  }
};

template <class Config>
RMT_KERNEL(Config::kThreads, 1)
backward_kernel(RMT_CONSTANT Problem p, RMT_CONSTANT Scale scale, RMT_CONSTANT Divisor group,
                RMT_CONSTANT BackwardSpace space) {
  BackwardBlock<Config>(p, scale, group, space).run();
}

}  // namespace rmt
