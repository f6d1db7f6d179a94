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
#include "schedule.h"
#include "tile.h"
#include "turns.h"

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
  static constexpr int kParts = kWarps / kSteps, kColumns = kWidth / kParts;  // of a warp,
  static constexpr int kPart = 32;                                            // so many at a time: 64 spill for sm_90a
  static_assert(kWarps % kSteps == 0 && kColumns % kPart == 0);

  static constexpr int kRowBytes = Tile<kWidth>::bytes(kRows), kNumbers = 7 * 4 * kRows, kView = 4 * kViewInts;
  static constexpr int kStage = 2 * kRowBytes + kNumbers + kView;  // rows, their grad_out, and what is known of them
  static constexpr int kKey = 0, kValue = Tile<kWidth>::bytes(kKeys), kScores = 2 * kValue,
                       kStages = kScores + Tile<kRows>::bytes(kKeys), kStride = (kStage + 1023) / 1024 * 1024,
                       kPlace = kStages + 2 * kStride, kHidden = kPlace + 12, kOk = kHidden + 8, kTurns = kOk + 4,
                       kShared = kTurns + Turns::kBytes;  // stages begin at multiples of 1024
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

  float dk[C::kWidth / 8][4], dv[C::kWidth / 8][4];
  // Of the warp's 16 keys by the tile's rows: scores, then probabilities; gradients of these; both as left operands,
  // the latter now gradients of scores; and which survive dropout, four bits for every 8 rows.
  float s[C::kRows / 8][4], dp[C::kRows / 8][4];
  uint32_t weights[C::kSteps][4], slopes[C::kSteps][4];
  uint32_t kept[(C::kRows / 8 + 7) / 8];

  RMT_DEVICE BackwardBlock(const Problem& problem, const Scale& problem_scale, const Divisor& by_group,
                           const BackwardSpace& problem_space)
      : p(problem), scale(problem_scale), group(by_group), space(problem_space), memory(device::shared_memory()) {}

  struct Lane {
    int thread, warp, g, t;
    RMT_DEVICE Lane() : thread(device::opaque(device::thread())) {
      warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
    }
  };
  // Which keys the block owns, read again wherever it is needed.
  RMT_DEVICE int b() const { return device::load_shared(memory + C::kPlace); }
  RMT_DEVICE int kv_head() const { return device::load_shared(memory + C::kPlace + 4); }
  RMT_DEVICE int key_tile() const { return device::load_shared(memory + C::kPlace + 8); }
  // Rows of padding, which may hold anything: queries [hidden, hidden_end) of the call. Whether the sample is in range.
  RMT_DEVICE int hidden() const { return device::load_shared(memory + C::kHidden); }
  RMT_DEVICE int hidden_end() const { return device::load_shared(memory + C::kHidden + 4); }
  RMT_DEVICE bool ok() const { return device::load_shared(memory + C::kOk) != 0; }

  RMT_DEVICE void find_place(const Schedule& schedule) const {
    const auto [tile, head] = schedule.place(device::take_ticket(space.tickets));
    const int b = head / p.kv_heads;
    const CheckedSample sample(p, b);
    const int first_token = p.layout.form[0].rows - layout_row(p.layout, sample, 0), tokens = p.layout.form[1].rows;
    const bool left = sample.token_begin > 0;
    const int words[6] = {b, head % p.kv_heads, tile,
                          first_token + (left ? 0 : min_int(sample.token_end, tokens)),
                          first_token + (left ? min_int(sample.token_begin, tokens) : tokens), sample.ok};
    RMT_UNROLL for (int i = 0; i < 6; ++i) device::store_shared(memory + C::kPlace + 4 * i, words[i]);
  }

  RMT_DEVICE Shared stage(int number) const { return memory + C::kStages + number % 2 * C::kStride; }
  RMT_DEVICE Shared numbers(int number) const { return stage(number) + 2 * C::kRowBytes; }

  // -- which tiles of rows, and how they arrive -----------------------------------------------------------------------

  // A tile's view, in global memory and in a stage.
  RMT_DEVICE const int* view(int tile) const {
    return space.views + (static_cast<int64_t>(b()) * space.tiles + tile) * kViewInts;
  }
  RMT_DEVICE auto staged_view(int number) const {
    const Shared view = numbers(number) + C::kNumbers;
    return [view](int i) { return static_cast<int>(device::load_shared(view + 4 * i)); };
  }
  // Goes on to the next tile of rows that sees keys of the block's, -1: none. 32 are looked at together: `left` are
  // those of the 32 around `tile` that are still to come.
  RMT_DEVICE void advance(int& tile, uint32_t& left) const {
    int base = tile & ~31;
    while (left == 0) {
      base += 32;
      if (base >= space.tiles) break;
      const int mine = base + Lane().thread % 32;
      const int* ints = view(min_int(mine, space.tiles - 1));
      const Walk walk = TileView::walk([ints](int i) { return ints[i]; });
      left = device::ballot(mine < space.tiles && walk.holds(key_tile()));
    }
    tile = left == 0 ? -1 : base + device::lowest_bit(left);
    left &= left - 1;
  }

  RMT_DEVICE void fetch(int number, int tile) {
    const PackedRows rows(p, group, b(), kv_head());
    const int thread = Lane().thread, first = tile * C::kRows;
    copy_packed<C::kWidth, C::kRows, C::kThreads>(stage(number), rows, p.query, p.head_dim, first, hidden(),
                                                  hidden_end(), thread);
    copy_packed<C::kWidth, C::kRows, C::kThreads>(stage(number) + C::kRowBytes, rows, p.grad_out, p.head_dim, first,
                                                  hidden(), hidden_end(), thread);
    const auto* of_head =
        reinterpret_cast<const char*>(space.numbers + static_cast<int64_t>(unit(tile)) * 2 * C::kRows);
    const auto* of_sample =
        reinterpret_cast<const char*>(space.rows + (static_cast<int64_t>(b()) * space.tiles + tile) * 5 * C::kRows);
    const auto* of_tile = reinterpret_cast<const char*>(view(tile));
    constexpr int kOwn = 2 * 4 * C::kRows, kRest = C::kNumbers;
    for (int i = 16 * thread; i < C::kNumbers + C::kView; i += 16 * C::kThreads) {
      const char* from = i < kOwn ? of_head + i : i < kRest ? of_sample + i - kOwn : of_tile + i - kRest;
      device::copy_async(numbers(number) + i, from, true);
    }
    device::commit_copies();
  }

  RMT_DEVICE void fetch_keys() {
    const int b = this->b(), kv_head = this->kv_head(), key_tile = this->key_tile();
    const CheckedSample sample(p, b);
    const Fence fence = fence_of(p.layout, sample, last_key(p.layout, sample, p.queries));
    const auto copy = [&](int offset, const Matrix& cached, const Matrix& matrix) {
      copy_keys<C::kWidth, C::kKeys, C::kThreads>(memory + offset, Keys::of(cached, matrix, p.cache_rows, b, kv_head),
                                                  cached, matrix, p.cache_rows, p.head_dim, fence, key_tile * C::kKeys,
                                                  Lane().thread);
    };
    copy(C::kKey, p.cache_key, p.key), copy(C::kValue, p.cache_value, p.value);
  }

  // -- a tile of rows -------------------------------------------------------------------------------------------------

  // s = a tile of the block's (16 of the warp) times a tile of rows, transposed.
  RMT_DEVICE void multiply_rows(float (&c)[C::kRows / 8][4], Shared ours, Shared theirs) const {
    RMT_UNROLL for (int n = 0; n < C::kRows / 8; ++n)
      RMT_UNROLL for (int i = 0; i < 4; ++i) c[n][i] = 0.0f;
    const In left = In::a(ours + Tile<C::kWidth>::bytes(16 * Lane().warp)), right = In::b(theirs);
    RMT_UNROLL for (int d = 0; d < C::kDepth; ++d) {
      uint32_t a[4];
      left.read(a, 0, 2 * d);
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

  // Numbers of the two columns that a lane holds of columns 8n to 8n + 7.
  RMT_DEVICE static void load_columns(uint32_t (&words)[2], Shared numbers, int n, int t) {
    device::load_shared_pair(words, numbers + 4 * (8 * n + 2 * t));
  }

  RMT_DEVICE void probabilities(int number) {
    const Lane lane;
    const Shared pivots = numbers(number);
    RMT_UNROLL for (int n = 0; n < C::kRows / 8; ++n) {
      uint32_t pivot[2];
      load_columns(pivot, pivots, n, lane.t);
      RMT_UNROLL for (int e = 0; e < 4; ++e)
        s[n][e] = device::exp2(device::fma(s[n][e], scale.signed_factor, -device::from_bits(pivot[e % 2])));
    }
    const int first_key = key_tile() * C::kKeys;
    if (TileView::open(staged_view(number), first_key, first_key + C::kKeys)) return;
    const Shared fields = pivots + 2 * 4 * C::kRows;
    const int key = first_key + 16 * lane.warp + lane.g;
    const bool plain = TileView::plain(staged_view(number));
    RMT_UNROLL for (int n = 0; n < C::kRows / 8; ++n) {
      uint32_t lo[2], hi[2];
      load_columns(lo, fields, n, lane.t), load_columns(hi, fields + 4 * C::kRows, n, lane.t);
      if (plain) {
        RMT_UNROLL for (int e = 0; e < 4; ++e)
          s[n][e] = sees_plainly(lo[e % 2], hi[e % 2], key + 8 * (e / 2)) ? s[n][e] : 0.0f;
        continue;
      }
      uint32_t gap_lo[2], gap_hi[2], own[2];
      load_columns(gap_lo, fields + 8 * C::kRows, n, lane.t), load_columns(gap_hi, fields + 12 * C::kRows, n, lane.t);
      load_columns(own, fields + 16 * C::kRows, n, lane.t);
      RMT_UNROLL for (int e = 0; e < 4; ++e) {
        const int j = e % 2;
        const Row row{static_cast<int>(lo[j]), static_cast<int>(hi[j]), static_cast<int>(gap_lo[j]),
                      static_cast<int>(gap_hi[j]), static_cast<int>(own[j])};
        s[n][e] = sees(row, key + 8 * (e / 2)) ? s[n][e] : 0.0f;
      }
    }
  }

  RMT_DEVICE void draw_kept(int tile) {
    const Lane lane;
    const Draw draw(p, b());
    const PackedRows rows(p, group, b(), kv_head());
    const CheckedSample sample(p, b());
    const int key = key_tile() * C::kKeys + 16 * lane.warp;
    RMT_UNROLL for (int n = 0; n < C::kRows / 8; ++n) {
      const int r = min_int(tile * C::kRows + 8 * n + 2 * lane.t + lane.g % 2, rows.count - 1);
      const uint32_t bits = kept_by_columns(draw, key, layout_row(p.layout, sample, rows.query(r)), rows.head(r));
      kept[n / 8] = (n % 8 == 0 ? 0u : kept[n / 8]) | bits << (4 * (n % 8));
    }
  }
  RMT_DEVICE bool is_kept(int n, int i) const { return !C::kDropout || (kept[n / 8] >> (4 * (n % 8) + i) & 1u); }

  // From probabilities and their gradients to what is multiplied next: weights, and gradients of scores, the latter
  // also in shared memory, keys by rows, for the gradient of queries.
  RMT_DEVICE void find_operands(int number) {
    const Lane lane;
    const Shared deltas = numbers(number) + 4 * C::kRows;
    RMT_UNROLL for (int n = 0; n < C::kRows / 8; ++n) {
      uint32_t delta[2];
      load_columns(delta, deltas, n, lane.t);
      RMT_UNROLL for (int half = 0; half < 2; ++half) {
        float weight[2], slope[2];
        RMT_UNROLL for (int j = 0; j < 2; ++j) {
          const int e = 2 * half + j;
          const bool here = is_kept(n, e);
          weight[j] = here ? s[n][e] : 0.0f;
          const float through = here ? (C::kDropout ? dp[n][e] * scale.rescale : dp[n][e]) : 0.0f;
          slope[j] = s[n][e] * (through - device::from_bits(delta[j]));
        }
        const int word = n % 2 * 2 + half;
        weights[n / 2][word] = device::pack<Element>(weight[0], weight[1]);
        slopes[n / 2][word] = device::pack<Element>(slope[0], slope[1]);
        const Shared row = Tile<C::kRows>::chunk_at(memory + C::kScores, 16 * lane.warp + 8 * half + lane.g, n);
        device::store_shared(row + 4 * lane.t, slopes[n / 2][word]);
      }
    }
  }

  // Number of a tile of rows among those of all heads.
  RMT_DEVICE int unit(int tile) const { return (b() * p.kv_heads + kv_head()) * space.tiles + tile; }
  RMT_DEVICE int tile(int number) const { return TileView::tile(staged_view(number)); }
  // How many blocks add to a tile of rows before this one, those of later keys, and whether none does after it.
  RMT_DEVICE int turn(int number) const { return TileView::walk(staged_view(number)).after(key_tile()); }
  RMT_DEVICE bool is_last(int number) const { return TileView::walk(staged_view(number)).from(0) == key_tile(); }

  RMT_DEVICE Turns turns() const { return {memory + C::kTurns}; }
  RMT_DEVICE bool is_turn(int number) const {
    return Turns::has_come(space.turns + unit(tile(number)), turn(number));
  }

  // The queries' gradient, a 16 x kPart block of it: what others have summed, and what the block's keys add.
  RMT_DEVICE void add_to_queries(int number, int part) const {
    float dq[C::kPart / 8][4];
    const Lane lane;
    // Lanes' results lie as lanes hold them: a vector of each thread, then the next of each.
    const int64_t first = static_cast<int64_t>(unit(tile(number))) * C::kRows * C::kWidth;
    Vector* sums = reinterpret_cast<Vector*>(space.sums + first) + lane.thread + part / 8 * C::kThreads;
    const bool first_turn = turn(number) == 0;
    RMT_UNROLL for (int n = 0; n < C::kPart / 8; ++n) {
      const Vector before = first_turn ? Vector{} : device::load_far(sums + n * C::kThreads);
      RMT_UNROLL for (int i = 0; i < 4; ++i) dq[n][i] = device::from_bits(before.word[i]);
    }
    const int rows = lane.warp % C::kSteps * 2;  // chunks of columns, of both operands
    const int columns = (lane.warp / C::kSteps * C::kColumns + part) / 8;
    const auto left = Reader<C::kRows>::a_transposed(memory + C::kScores);
    const In right = In::b_transposed(memory + C::kKey);
    RMT_UNROLL for (int k = 0; k < C::kKeys / 16; ++k) {
      uint32_t a[4];
      left.read(a, 16 * k, rows);
      RMT_UNROLL for (int n = 0; n < C::kPart / 16; ++n) {
        uint32_t words[4];
        right.read(words, 16 * k, columns + 2 * n);
        device::multiply<Element>(dq[2 * n], a, words[0], words[1]);
        device::multiply<Element>(dq[2 * n + 1], a, words[2], words[3]);
      }
    }
    if (is_last(number)) return store_queries(tile(number), dq, part);
    RMT_UNROLL for (int n = 0; n < C::kPart / 8; ++n) {
      Vector now;
      RMT_UNROLL for (int i = 0; i < 4; ++i) now.word[i] = device::bits(dq[n][i]);
      device::store_far(sums + n * C::kThreads, now);
    }
  }

  RMT_DEVICE void store_queries(int tile, const float (&dq)[C::kPart / 8][4], int part) const {
    const Lane lane;
    const PackedRows rows(p, group, b(), kv_head());
    const bool ok = this->ok();
    const int column = lane.warp / C::kSteps * C::kColumns + part;
    RMT_UNROLL for (int half = 0; half < 2; ++half) {
      const int r = tile * C::kRows + lane.warp % C::kSteps * 16 + 8 * half + lane.g;
      store_row<Element, C::kPart / 8>(
          r < rows.count ? rows.address(p.grad_query, r) + 2 * column : nullptr, p.head_dim - column,
          [&](int n, int i) { return ok ? dq[n][2 * half + i] * p.scale : device::not_a_number(); });
    }
  }

  RMT_DEVICE void run(const Schedule& schedule) {
    if (device::thread() == 0) find_place(schedule);
    if (Turns::passes()) turns().write(-1, 0);
    device::barrier();
    RMT_UNROLL for (int n = 0; n < C::kWidth / 8; ++n)
      RMT_UNROLL for (int i = 0; i < 4; ++i) dk[n][i] = dv[n][i] = 0.0f;
    int next = -32;
    uint32_t left = 0;
    advance(next, left);
    if (next >= 0) fetch_keys(), fetch(0, next);
    for (int number = 0; next >= 0; ++number) {
      advance(next, left);
      device::wait_copies<0>();
      device::barrier();  // the rows are there; scores, the other stage and sums are done with
      multiply_rows(s, memory + C::kKey, stage(number));
      if (next >= 0) fetch(number + 1, next);
      if (Turns::passes()) turns().pass(space.turns);
      multiply_rows(dp, memory + C::kValue, stage(number) + C::kRowBytes);
      probabilities(number);
      if (C::kDropout) draw_kept(tile(number));
      find_operands(number);
      bool ready = !Turns::waits() || is_turn(number);
      add_rows(dv, weights, stage(number) + C::kRowBytes);
      for (; !ready; ready = is_turn(number)) device::pause();
      device::barrier();  // scores are there, and so are the sums of those before
      add_rows(dk, slopes, stage(number));
      RMT_UNROLL for (int part = 0; part < C::kColumns; part += C::kPart) add_to_queries(number, part);
      if (Turns::passes()) turns().write(is_last(number) ? -1 : unit(tile(number)), turn(number) + 1);
    }
    device::barrier();
    if (Turns::passes()) turns().pass(space.turns);
    store_keys();
  }

  RMT_DEVICE void store_keys() const {
    const Lane lane;
    const bool ok = this->ok();
    RMT_UNROLL for (int half = 0; half < 2; ++half) {
      const int key = key_tile() * C::kKeys + 16 * lane.warp + 8 * half + lane.g;
      const auto store = [&](const Matrix& cached, const Matrix& matrix, const float (&grad)[C::kWidth / 8][4],
                             float factor) {
        const Keys to = Keys::of(cached, matrix, p.cache_rows, b(), kv_head());
        const char* row = key < p.keys ? to.row(cached, matrix, p.cache_rows, key) : nullptr;
        store_row<Element, C::kWidth / 8>(const_cast<char*>(row), p.head_dim, [&](int n, int i) {
          return ok ? grad[n][2 * half + i] * factor : device::not_a_number();
        });
      };
      store(p.grad_cache_key, p.grad_key, dk, p.scale), store(p.grad_cache_value, p.grad_value, dv, scale.rescale);
    }
  }
};

template <class Config>
RMT_KERNEL(Config::kThreads, 1)
backward_kernel(RMT_CONSTANT Problem p, RMT_CONSTANT Scale scale, RMT_CONSTANT Divisor group,
                RMT_CONSTANT BackwardSpace space, RMT_CONSTANT Schedule schedule) {
  BackwardBlock<Config>(p, scale, group, space).run(schedule);
}

}  // namespace rmt
