// Few rows against many keys, as in decoding: what counts is to keep enough bytes of keys and values under way.
//
// Keys are split into chunks over blocks, and a chunk's tiles over a block's warps: a warp owns 16 of a tile's 64 keys
// and fetches them for itself, so that nothing waits for a barrier. What warps have summed is put together in shared
// memory, what blocks have by `combine_kernel`.
#pragma once

#include "dropout.h"
#include "rows.h"
#include "softmax.h"
#include "tile.h"

namespace rmt {

template <class Element_, int kWidth_, int kStages_, int kBlocks_, bool kDropout_>
struct DecodeConfig {
  using Element = Element_;
  static constexpr int kWidth = kWidth_, kStages = kStages_, kBlocks = kBlocks_;
  static constexpr bool kDropout = kDropout_;

  static constexpr int kRows = 16, kWarps = 4, kThreads = 32 * kWarps, kKeys = 16 * kWarps, kDepth = kWidth / 16;
  static constexpr int kChunk = 512;  // keys of a block: a multiple of kKeys
  static constexpr int kSlice = Tile<kWidth>::bytes(16), kStage = 2 * kSlice;  // a warp's keys of a tile, and values
  static constexpr int kRing = 0, kQuery = (kStages - 1) * kStage, kView = kRing + kWarps * kStages * kStage,
                       kMerged = kView + View<kRows, kKeys>::kBytes, kShared = kMerged + 2 * 4 * kWarps * kRows;
  static_assert(kStage >= 4 * 16 * kWidth, "what a warp has summed takes the place of a stage");
};

// What a chunk of keys gives each row of lse: sums of values (rows, chunks, kWidth), the highest score, which they are
// relative to, and the sum of weights (rows, chunks).
struct Parts {
  float *sums, *highest, *totals;
  int chunks;
};

// How much a part counts among others.
RMT_DEVICE float part_weight(float highest, float highest_of_all, const Scale& scale) {
  return device::exp2((highest - finite(highest_of_all)) * scale.factor);
}

template <class Config>
struct DecodeBlock {
  using C = Config;
  using Element = typename C::Element;
  using In = Reader<C::kWidth>;
  using Sees = View<C::kRows, C::kKeys>;

  const Problem& p;
  const Scale& scale;
  const Shared memory;
  const int thread, warp, lane, g, t;

  uint32_t query[C::kDepth][4];
  float acc[C::kWidth / 8][4];
  Softmax softmax[2];

  RMT_DEVICE DecodeBlock(const Problem& problem, const Scale& problem_scale)
      : p(problem), scale(problem_scale), memory(device::shared_memory()), thread(device::thread()), warp(thread / 32),
        lane(thread % 32), g(lane / 4), t(lane % 4) {}

  RMT_DEVICE Shared stage(int number) const {
    return memory + C::kRing + (warp * C::kStages + number % C::kStages) * C::kStage;
  }

  // The warp's keys and values of a tile, -1: none. A group of copies either way.
  RMT_DEVICE void fetch(int number, int tile) {
    if (tile >= 0) {
      const int first = tile * C::kKeys + 16 * warp;
      const Fence fence = Sees::fence(memory + C::kView);
      copy_keys<C::kWidth, 16, 32>(stage(number), Sees::keys(memory + C::kView), p.cache_key, p.key, p.cache_rows,
                                   p.head_dim, fence, first, lane);
      copy_keys<C::kWidth, 16, 32>(stage(number) + C::kSlice, Sees::values(memory + C::kView), p.cache_value, p.value,
                                   p.cache_rows, p.head_dim, fence, first, lane);
    }
    device::commit_copies();
  }

  RMT_DEVICE void step(Shared from, int tile, const Draw& draw, int drawn_row, int drawn_head) {
    const int first = tile * C::kKeys + 16 * warp;
    float s[2][4] = {};
    const In keys = In::b(from);
    RMT_UNROLL for (int d = 0; d < C::kDepth; ++d) {
      uint32_t k[4];
      keys.read(k, 0, 2 * d);
      device::multiply<Element>(s[0], query[d], k[0], k[1]);
      device::multiply<Element>(s[1], query[d], k[2], k[3]);
    }
    if (!Sees::open(memory + C::kView, tile)) {
      RMT_UNROLL for (int half = 0; half < 2; ++half) {
        const Row row = Sees::load(memory + C::kView, g + 8 * half);
        RMT_UNROLL for (int n = 0; n < 2; ++n)
          RMT_UNROLL for (int i = 0; i < 2; ++i)
            if (!sees(row, first + 8 * n + 2 * t + i)) s[n][2 * half + i] = -infinity();
      }
    }
    RMT_UNROLL for (int half = 0; half < 2; ++half) {
      Softmax& row = softmax[half];
      float most = row.highest;
      RMT_UNROLL for (int n = 0; n < 2; ++n)
        RMT_UNROLL for (int i = 0; i < 2; ++i) most = device::larger(s[n][2 * half + i], most);
      const auto raised = row.raise(row_most(most), scale);
      RMT_UNROLL for (int n = 0; n < 2; ++n)
        RMT_UNROLL for (int i = 0; i < 2; ++i) {
          float& score = s[n][2 * half + i];
          score = raised.weight(score);
          row.total += score;
        }
      RMT_UNROLL for (int n = 0; n < C::kWidth / 8; ++n)
        RMT_UNROLL for (int i = 0; i < 2; ++i) acc[n][2 * half + i] *= raised.fade;
    }
    if (C::kDropout)
      RMT_UNROLL for (int n = 0; n < 2; ++n) {
        const uint32_t kept = kept_by_rows(draw, first + 8 * n, drawn_row, drawn_head);
        RMT_UNROLL for (int i = 0; i < 4; ++i) s[n][i] = kept >> i & 1u ? s[n][i] : 0.0f;
      }
    uint32_t weights[4];
    RMT_UNROLL for (int i = 0; i < 4; ++i)
      weights[i] = device::pack<Element>(s[i / 2][i % 2 * 2], s[i / 2][i % 2 * 2 + 1]);
    const In values = In::b_transposed(from + C::kSlice);
    RMT_UNROLL for (int n = 0; n < C::kDepth; ++n) {
      uint32_t v[4];
      values.read(v, 0, 2 * n);
      device::multiply<Element>(acc[2 * n], weights, v[0], v[1]);
      device::multiply<Element>(acc[2 * n + 1], weights, v[2], v[3]);
    }
  }

  // Where a warp leaves a pair of columns of what it has summed: groups of 8 columns are exchanged by the row's number,
  // so that four rows of a column lie in different banks.
  RMT_DEVICE Shared left(int of_warp, int r, int column) const {
    return memory + C::kRing + of_warp * C::kStages * C::kStage + 4 * (r * C::kWidth + (column ^ (8 * (r % 4))));
  }
  RMT_DEVICE Shared merged(int which, int of_warp, int r) const {
    return memory + C::kMerged + 4 * ((which * C::kWarps + of_warp) * C::kRows + r);
  }
  // Leaves in shared memory what the warp has summed, where its ring was, then highest and totals; of `count` rows.
  RMT_DEVICE void leave(int count) {
    RMT_UNROLL for (int half = 0; half < 2; ++half) {
      Softmax row = softmax[half];
      row.total = row_sum(row.total);
      const int r = g + 8 * half;
      if (r >= count) continue;
      const bool blind = sees_nothing(Sees::load(memory + C::kView, r));
      const float exact = blind ? 0.0f : device::exp2(-row.remainder(scale));
      RMT_UNROLL for (int n = 0; n < C::kWidth / 8; ++n) {
        uint32_t words[2];
        RMT_UNROLL for (int i = 0; i < 2; ++i) words[i] = device::bits(blind ? 0.0f : acc[n][2 * half + i] * exact);
        device::store_shared_pair(left(warp, r, 8 * n + 2 * t), words[0], words[1]);
      }
      if (t > 0) continue;
      device::store_shared_float(merged(0, warp, r), blind ? -infinity() : row.highest);
      device::store_shared_float(merged(1, warp, r), blind ? 0.0f : row.total * exact);
    }
  }

  RMT_DEVICE void run(int b, int kv_head, int tile, int chunk, const Divisor& group, const Parts& parts) {
    const CheckedSample sample(p, b);
    const PackedRows rows(p, group, b, kv_head);
    const int first = tile * C::kRows, first_key = chunk * C::kChunk;
    copy_packed<C::kWidth, C::kRows, C::kThreads>(memory + C::kQuery, rows, p.query, p.head_dim, first, 0, 0, thread);
    device::commit_copies();
    Sees::template make<C::kThreads>(memory + C::kView, p, sample, rows, {b, kv_head, first, sample.ok}, first_key,
                                     min_int(p.keys, first_key + C::kChunk));
    device::wait_copies<0>();
    device::barrier();  // the view and the queries are there

    const auto after = [&](int key_tile) { return key_tile < 0 ? -1 : Sees::from(memory + C::kView, key_tile + 1); };
    int key_tile = Sees::from(memory + C::kView, 0), ahead = key_tile, number = 0;
    RMT_UNROLL for (int i = 0; i < C::kStages - 1; ++i) {
      fetch(i, ahead);
      ahead = after(ahead);
    }
    RMT_UNROLL for (int d = 0; d < C::kDepth; ++d) {
      In::a(memory + C::kQuery).read(query[d], 0, 2 * d);
      RMT_UNROLL for (int i = 0; i < 4; ++i) query[d][i] = scale.signed_word(query[d][i]);
    }
    device::barrier();  // the queries lie in the last stage of the first warp
    RMT_UNROLL for (int n = 0; n < C::kWidth / 8; ++n)
      RMT_UNROLL for (int i = 0; i < 4; ++i) acc[n][i] = 0.0f;
    softmax[0].start(), softmax[1].start();
    const Draw draw(p, b);
    const int drawn = min_int(first + g + 8 * (t % 2), rows.count - 1);
    const int drawn_row = layout_row(p.layout, sample, rows.query(drawn)), drawn_head = rows.head(drawn);

    for (; key_tile >= 0; key_tile = after(key_tile), ++number) {
      device::wait_copies<C::kStages - 2>();
      device::warp_barrier();  // the tile is there, and the one before is done with
      fetch(number + C::kStages - 1, ahead);
      ahead = after(ahead);
      step(stage(number), key_tile, draw, drawn_row, drawn_head);
    }
    device::wait_copies<0>();
    device::warp_barrier();
    leave(rows.count - first);
    device::barrier();
    merge(rows, first, chunk, sample.ok, parts);
  }

  // Puts the warps' sums together: eight threads a row, two columns at a time.
  RMT_DEVICE void merge(const PackedRows& rows, int first, int chunk, bool ok, const Parts& parts) {
    const int in_tile = thread / 8, r = first + in_tile;
    if (r >= rows.count) return;
    Softmax row;
    row.start();
    RMT_UNROLL for (int w = 0; w < C::kWarps; ++w) {
      const float highest = device::load_shared_float(merged(0, w, in_tile));
      row.highest = device::larger(highest, row.highest);
    }
    float weights[C::kWarps];
    RMT_UNROLL for (int w = 0; w < C::kWarps; ++w) {
      weights[w] = part_weight(device::load_shared_float(merged(0, w, in_tile)), row.highest, scale);
      row.total += weights[w] * device::load_shared_float(merged(1, w, in_tile));
    }
    if (!ok) row.total = device::not_a_number();  // a sample out of range shows
    const int64_t number = rows.number(p, r), part = number * parts.chunks + chunk;
    const float share = parts.chunks > 1 ? 1.0f
                        : scale.rescale / (row.total == 0.0f ? 1.0f : row.total);
    for (int column = thread % 8 * 2; column < p.head_dim; column += 16) {
      float sums[2] = {};
      RMT_UNROLL for (int w = 0; w < C::kWarps; ++w) {
        uint32_t words[2];
        device::load_shared_pair(words, left(w, in_tile, column));
        RMT_UNROLL for (int i = 0; i < 2; ++i) sums[i] += weights[w] * device::from_bits(words[i]);
      }
      if (parts.chunks > 1) {
        parts.sums[part * C::kWidth + column] = sums[0], parts.sums[part * C::kWidth + column + 1] = sums[1];
      } else {
        *reinterpret_cast<uint32_t*>(rows.address(p.out, r) + 2 * column) =
            device::pack<Element>(sums[0] * share, sums[1] * share);
      }
    }
    if (thread % 8 > 0) return;
    if (parts.chunks > 1) {
      parts.highest[part] = row.highest, parts.totals[part] = row.total;
    } else {
      p.lse[number] = device::fma(row.highest, scale.size, device::log(row.total == 0.0f ? 1.0f : row.total));
    }
  }
};

template <class Config>
RMT_KERNEL(Config::kThreads, Config::kBlocks)
decode_kernel(RMT_CONSTANT Problem p, RMT_CONSTANT Scale scale, RMT_CONSTANT Divisor group, RMT_CONSTANT Parts parts,
              int tiles) {
  const int block = device::block(), chunk = block % parts.chunks, head = block / parts.chunks / tiles;
  DecodeBlock<Config>(p, scale).run(head / p.kv_heads, head % p.kv_heads, block / parts.chunks % tiles, chunk, group,
                                    parts);
}

// out and lse of a row from its parts, a warp each.
constexpr int kCombineThreads = 128;
template <class Element, int kWidth>
RMT_KERNEL(kCombineThreads, 8)
combine_kernel(RMT_CONSTANT Problem p, RMT_CONSTANT Scale scale, RMT_CONSTANT Parts parts) {
  constexpr int kColumns = kWidth / 32;  // of a lane
  const int lane = device::thread() % 32;
  const int64_t row = static_cast<int64_t>(device::block()) * (kCombineThreads / 32) + device::thread() / 32;
  if (row >= static_cast<int64_t>(p.batch) * p.heads * p.queries) return;
  float highest = -infinity(), total = 0.0f, sums[kColumns] = {};
  for (int c = 0; c < parts.chunks; ++c) {
    const float other = parts.highest[row * parts.chunks + c];
    highest = device::larger(other, highest);
  }
  for (int c = 0; c < parts.chunks; ++c) {
    const int64_t part = row * parts.chunks + c;
    const float weight = part_weight(parts.highest[part], highest, scale);
    total += weight * parts.totals[part];
    RMT_UNROLL for (int i = 0; i < kColumns; ++i) {
      const int column = kColumns * lane + i;
      if (column < p.head_dim) sums[i] += weight * parts.sums[part * kWidth + column];
    }
  }
  const float safe = total == 0.0f ? 1.0f : total, share = scale.rescale / safe;
  const int query = static_cast<int>(row % p.queries), head = static_cast<int>(row / p.queries % p.heads);
  const int64_t b = row / p.queries / p.heads;
  char* out = p.out.data + 2 * (b * p.out.batch + head * p.out.head + query * p.out.row);
  RMT_UNROLL for (int i = 0; i < kColumns; i += 2)
    if (kColumns * lane + i < p.head_dim)
      *reinterpret_cast<uint32_t*>(out + 2 * (kColumns * lane + i)) =
          device::pack<Element>(sums[i] * share, sums[i + 1] * share);
  if (lane == 0) p.lse[row] = device::fma(highest, scale.size, device::log(safe));
}

}  // namespace rmt
