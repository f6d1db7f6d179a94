// Forward: a block owns a tile of packed query rows and walks the keys that they see, with an online softmax.
//
// While keys are multiplied the tile's values arrive, while values are multiplied the next keys do: one buffer of each
// is enough, and two or three blocks on an SM hide each other's barriers.
#pragma once

#include "dropout.h"
#include "epilogue.h"
#include "rows.h"
#include "schedule.h"
#include "softmax.h"
#include "tile.h"

namespace rmt {

template <class Element_, int kWidth_, int kRows_, int kKeys_, int kWarps_, int kBlocks_, bool kDropout_>
struct ForwardConfig {
  using Element = Element_;
  static constexpr int kWidth = kWidth_, kRows = kRows_, kKeys = kKeys_, kWarps = kWarps_;
  static constexpr int kBlocks = kBlocks_;  // of an SM
  static constexpr bool kDropout = kDropout_;

  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTiles = kRows / (16 * kWarps);  // of 16 rows, a warp's
  static constexpr int kSteps = kKeys / 16, kDepth = kWidth / 16;
  static_assert(kRows % (16 * kWarps) == 0 && kKeys % 16 == 0);

  static constexpr int kQuery = 0, kKey = Tile<kWidth>::bytes(kRows), kValue = kKey + Tile<kWidth>::bytes(kKeys),
                       kView = kValue + Tile<kWidth>::bytes(kKeys), kShared = kView + View<kRows, kKeys>::kBytes;
};

template <class Config>
struct ForwardBlock {
  using C = Config;
  using Element = typename C::Element;
  using In = Reader<C::kWidth>;
  using Sees = View<C::kRows, C::kKeys>;

  const Problem& p;
  const Scale& scale;
  const Divisor& group;
  const Shared memory;

  float acc[C::kTiles][C::kWidth / 8][4];
  float s[C::kTiles][C::kKeys / 8][4];
  uint32_t weights[C::kSteps][C::kTiles][4];  // left operands of the product with the values
  Softmax softmax[C::kTiles][2];

  RMT_DEVICE ForwardBlock(const Problem& problem, const Scale& problem_scale, const Divisor& by_group)
      : p(problem), scale(problem_scale), group(by_group), memory(device::shared_memory()) {}

  // A thread's place, worked out wherever it is needed: the warp's first row, and in a product's result the lane's row
  // of eight and its pair of columns.
  struct Lane {
    int thread, warp_row, g, t;

    RMT_DEVICE Lane() : thread(device::opaque(device::thread())) {
      warp_row = thread / 32 * 16 * C::kTiles, g = thread % 32 / 4, t = thread % 4;
    }
    RMT_DEVICE int row(int m, int half) const { return warp_row + 16 * m + 8 * half + g; }
  };

  RMT_DEVICE void scores() {
    RMT_UNROLL for (int m = 0; m < C::kTiles; ++m)
      RMT_UNROLL for (int n = 0; n < C::kKeys / 8; ++n)
        RMT_UNROLL for (int i = 0; i < 4; ++i) s[m][n][i] = 0.0f;
    const In query = In::a(memory + C::kQuery + Tile<C::kWidth>::bytes(Lane().warp_row));
    const In keys = In::b(memory + C::kKey);
    RMT_UNROLL for (int d = 0; d < C::kDepth; ++d) {
      uint32_t q[C::kTiles][4];
      RMT_UNROLL for (int m = 0; m < C::kTiles; ++m) query.read(q[m], 16 * m, 2 * d);
      RMT_UNROLL for (int n = 0; n < C::kSteps; ++n) {
        uint32_t k[4];
        keys.read(k, 16 * n, 2 * d);
        RMT_UNROLL for (int m = 0; m < C::kTiles; ++m) {
          device::multiply<Element>(s[m][2 * n], q[m], k[0], k[1]);
          device::multiply<Element>(s[m][2 * n + 1], q[m], k[2], k[3]);
        }
      }
    }
  }

  // The sign of the scale, where it has one, or zeros: the queries take it on.
  RMT_DEVICE void sign_queries() {
    for (int at = 4 * Lane().thread; at < Tile<C::kWidth>::bytes(C::kRows); at += 4 * C::kThreads) {
      const Shared word = memory + C::kQuery + at;
      device::store_shared(word, scale.signed_word(device::load_shared(word)));
    }
  }

  RMT_DEVICE void mask(int first_key) {
    const Lane lane;
    const bool plain = Sees::plain(memory + C::kView);
    const int key = first_key + 2 * lane.t;
    RMT_UNROLL for (int m = 0; m < C::kTiles; ++m)
      RMT_UNROLL for (int half = 0; half < 2; ++half) {
        const Row row = Sees::load(memory + C::kView, lane.row(m, half));
        const auto hide_unless = [&](auto seen) {
          RMT_UNROLL for (int n = 0; n < C::kKeys / 8; ++n)
            RMT_UNROLL for (int i = 0; i < 2; ++i) {
              float& score = s[m][n][2 * half + i];
              score = seen(key + 8 * n + i) ? score : -infinity();
            }
        };
        if (plain) {
          hide_unless([&](int k) { return sees_plainly(row.lo, row.hi, k); });
        } else {
          hide_unless([&](int k) { return sees(row, k); });
        }
      }
  }

  // Scores become weights. What was summed before is brought to new highest scores, if a row of the warp has one.
  RMT_DEVICE void weigh() {
    RMT_UNROLL for (int m = 0; m < C::kTiles; ++m) {
      float fade[2];
      RMT_UNROLL for (int half = 0; half < 2; ++half) {
        Softmax& row = softmax[m][half];
        float most = row.highest;
        RMT_UNROLL for (int n = 0; n < C::kKeys / 8; ++n)
          RMT_UNROLL for (int i = 0; i < 2; ++i) most = device::larger(s[m][n][2 * half + i], most);
        const auto step = row.raise(row_most(most), scale);
        RMT_UNROLL for (int n = 0; n < C::kKeys / 8; ++n)
          RMT_UNROLL for (int i = 0; i < 2; ++i) {
            float& score = s[m][n][2 * half + i];
            score = step.weight(score);
            row.total += score;
          }
        fade[half] = step.fade;
      }
      if (device::ballot(fade[0] != 1.0f || fade[1] != 1.0f) == 0) continue;
      RMT_UNROLL for (int n = 0; n < C::kWidth / 8; ++n)
        RMT_UNROLL for (int i = 0; i < 4; ++i) acc[m][n][i] *= fade[i / 2];
    }
  }

  RMT_DEVICE void drop(int first_key) {
    const Lane lane;
    const Place place = Sees::place(memory + C::kView);
    const PackedRows rows(p, group, place.b, place.kv_head);
    const CheckedSample sample(p, place.b);
    const Draw draw(p, place.b);
    RMT_UNROLL for (int m = 0; m < C::kTiles; ++m) {
      const int r = min_int(place.first + lane.row(m, lane.t % 2), rows.count - 1);  // whose numbers this lane draws
      const int row = layout_row(p.layout, sample, rows.query(r)), head = rows.head(r);
      RMT_UNROLL for (int n = 0; n < C::kKeys / 8; ++n) {
        const uint32_t kept = kept_by_rows(draw, device::opaque(first_key) + 8 * n, row, head);
        RMT_UNROLL for (int i = 0; i < 4; ++i) s[m][n][i] = kept >> i & 1u ? s[m][n][i] : 0.0f;
      }
    }
  }

  RMT_DEVICE void pack_weights() {
    RMT_UNROLL for (int k = 0; k < C::kSteps; ++k)
      RMT_UNROLL for (int m = 0; m < C::kTiles; ++m)
        RMT_UNROLL for (int i = 0; i < 4; ++i)
          weights[k][m][i] = device::pack<Element>(s[m][2 * k + i / 2][i % 2 * 2], s[m][2 * k + i / 2][i % 2 * 2 + 1]);
  }

  RMT_DEVICE void add_values() {
    const In values = In::b_transposed(memory + C::kValue);
    RMT_UNROLL for (int k = 0; k < C::kSteps; ++k) {
      RMT_UNROLL for (int n = 0; n < C::kDepth; ++n) {
        uint32_t v[4];
        values.read(v, 16 * k, 2 * n);
        RMT_UNROLL for (int m = 0; m < C::kTiles; ++m) {
          device::multiply<Element>(acc[m][2 * n], weights[k][m], v[0], v[1]);
          device::multiply<Element>(acc[m][2 * n + 1], weights[k][m], v[2], v[3]);
        }
      }
    }
  }

  RMT_DEVICE void fetch(int offset, const Keys& from, const Matrix& cached, const Matrix& matrix, int key_tile) {
    copy_keys<C::kWidth, C::kKeys, C::kThreads>(memory + offset, from, cached, matrix, p.cache_rows, p.head_dim,
                                                Sees::fence(memory + C::kView), key_tile * C::kKeys, Lane().thread);
    device::commit_copies();
  }
  RMT_DEVICE void fetch_keys(int key_tile) {
    fetch(C::kKey, Sees::keys(memory + C::kView), p.cache_key, p.key, key_tile);
  }
  RMT_DEVICE void fetch_values(int key_tile) {
    fetch(C::kValue, Sees::values(memory + C::kView), p.cache_value, p.value, key_tile);
  }

  RMT_DEVICE void run(int b, int kv_head, int tile) {
    const CheckedSample sample(p, b);
    const PackedRows rows(p, group, b, kv_head);
    const int first = tile * C::kRows;
    copy_packed<C::kWidth, C::kRows, C::kThreads>(memory + C::kQuery, rows, p.query, p.head_dim, first, 0, 0,
                                                  Lane().thread);
    device::commit_copies();
    Sees::template make<C::kThreads>(memory + C::kView, p, sample, rows, {b, kv_head, first, sample.ok}, 0, p.keys);
    RMT_UNROLL for (int m = 0; m < C::kTiles; ++m) {
      RMT_UNROLL for (int n = 0; n < C::kWidth / 8; ++n)
        RMT_UNROLL for (int i = 0; i < 4; ++i) acc[m][n][i] = 0.0f;
      softmax[m][0].start(), softmax[m][1].start();
    }
    if (scale.changes_words()) device::wait_copies<0>();
    device::barrier();  // the view is there
    if (scale.changes_words()) sign_queries();

    int key_tile = Sees::from(memory + C::kView, 0);
    if (key_tile >= 0) fetch_keys(key_tile);
    while (key_tile >= 0) {
      device::wait_copies<0>();
      device::barrier();  // the keys are there, and the last values are done with
      fetch_values(key_tile);
      scores();
      if (!Sees::open(memory + C::kView, key_tile)) mask(key_tile * C::kKeys);
      weigh();
      if (C::kDropout) drop(key_tile * C::kKeys);
      pack_weights();
      device::wait_copies<0>();
      device::barrier();  // the values are there, and the keys are done with
      const int next = Sees::from(memory + C::kView, key_tile + 1);
      if (next >= 0) fetch_keys(next);
      add_values();
      key_tile = next;
    }
    device::wait_copies<0>();
    store();
  }

  RMT_DEVICE void store() {
    const auto [b, kv_head, first, ok] = Sees::place(memory + C::kView);
    const PackedRows rows(p, group, b, kv_head);
    const Lane lane;
    RMT_UNROLL for (int m = 0; m < C::kTiles; ++m)
      RMT_UNROLL for (int half = 0; half < 2; ++half) {
        const int in_tile = lane.row(m, half), r = first + in_tile;
        const bool there = r < rows.count;
        Softmax row = softmax[m][half];
        row.total = row_sum(row.total);
        const bool blind = sees_nothing(Sees::load(memory + C::kView, in_tile));
        if (blind) row.highest = -infinity(), row.total = 0.0f;
        if (!ok) row.total = device::not_a_number();  // a sample out of range shows
        const float share = scale.rescale / (row.total == 0.0f ? 1.0f : row.total);
        store_row<Element, C::kWidth / 8>(
            there ? rows.address(p.out, r) : nullptr, p.head_dim,
            [&, quiet = blind && ok](int n, int i) { return quiet ? 0.0f : acc[m][n][2 * half + i] * share; });
        if (there && lane.t == 0) p.lse[rows.number(p, r)] = row.lse(scale);
      }
  }
};

template <class Config>
RMT_KERNEL(Config::kThreads, Config::kBlocks)
forward_kernel(RMT_CONSTANT Problem p, RMT_CONSTANT Scale scale, RMT_CONSTANT Divisor group,
               RMT_CONSTANT Schedule schedule) {
  const auto place = schedule.place(device::block());
  const int b = place.head / p.kv_heads, kv_head = place.head % p.kv_heads;
  ForwardBlock<Config>(p, scale, group).run(b, kv_head, place.tile);
}

}  // namespace rmt
